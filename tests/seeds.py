"""Where the tests' random numbers begin: at the name of the test, and at a base that a sweep changes.

TEST_SEED=7 .venv/bin/python -m pytest tests/test_cache.py    # the same tests with other numbers
.venv/bin/python tests/sweep.py                               # all that draw numbers, with 20 bases
"""

import hashlib
import os
import random
import zlib

import numpy
import torch

BASE = int(os.environ.get("TEST_SEED", "0"))
asked = [0]  # how often a test made a generator of its own


def seed_all(name):
    """Everything drawn from now on follows from a name and the base."""
    seed = zlib.crc32(f"{BASE} {name}".encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def drawn():
    """Something that differs as soon as a number was drawn."""
    key, place = numpy.random.get_state()[1:3]
    state = f"{asked} {place} {random.getstate()}".encode() + key.tobytes() + torch.get_rng_state().numpy().tobytes()
    return hashlib.sha256(state).hexdigest()


def torch_random(seed=0):
    """torch's generator of a case that has a number of its own, on the CPU; other numbers with another base."""
    asked[0] += 1
    return torch.Generator("cpu").manual_seed(seed + 1000 * BASE)


def python_random(seed=0):
    """The same for Python's own numbers."""
    asked[0] += 1
    return random.Random(seed + 1000 * BASE)
