"""Where the tests' random numbers begin: at the name of the test, and at a base that a sweep changes.

TEST_SEED=7 .venv/bin/python -m pytest tests/test_cache.py    # the same tests with other numbers
.venv/bin/python tests/sweep.py                               # all that draw numbers, with 20 bases
"""

import os
import random
import zlib

import numpy
import torch

BASE = int(os.environ.get("TEST_SEED", "0"))


def seed_all(name):
    """Everything drawn from now on follows from a name and the base."""
    seed = zlib.crc32(f"{BASE} {name}".encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def torch_random(seed=0):
    """torch's generator of a case that has a number of its own, on the CPU; other numbers with another base."""
    return torch.Generator("cpu").manual_seed(seed + 1000 * BASE)


def python_random(seed=0):
    """The same for Python's own numbers."""
    return random.Random(seed + 1000 * BASE)
