"""Seeds of the tests' random numbers: the name of the test and a base, which a sweep changes.

TEST_SEED=7 .venv/bin/python -m pytest tests/test_cache.py    # the same tests with other numbers
.venv/bin/python tests/sweep.py                               # all tests that draw numbers, with 20 bases
"""

import hashlib
import os
import random
import zlib

import numpy
import torch

BASE = int(os.environ.get("TEST_SEED", "0"))
asked = [0]  # number of generators that tests have created


def seed_all(name):
    """Seed Python, NumPy and torch from a name and the base."""
    seed = zlib.crc32(f"{BASE} {name}".encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def drawn():
    """A digest that changes whenever a random number is drawn."""
    key, place = numpy.random.get_state()[1:3]
    state = f"{asked} {place} {random.getstate()}".encode() + key.tobytes() + torch.get_rng_state().numpy().tobytes()
    return hashlib.sha256(state).hexdigest()


def torch_random(seed=0):
    """A CPU torch generator seeded by a case's number and the base."""
    asked[0] += 1
    return torch.Generator("cpu").manual_seed(seed + 1000 * BASE)


def python_random(seed=0):
    """A Python generator seeded by a case's number and the base."""
    asked[0] += 1
    return random.Random(seed + 1000 * BASE)
