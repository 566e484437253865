"""Test infrastructure: seeds that follow from test names, a cover of all pairs, transformers next to our `kernels`."""

import itertools
import multiprocessing
import os
import random
import subprocess
import sys

import numpy
import pytest
import torch

from tests.cover import pairs, pairwise
from tests.paths import ROOT
from tests.seeds import seed_all

AT_IMPORT = torch.rand(3)


def drawn():
    return torch.rand(3).tolist(), numpy.random.rand(3).tolist(), random.random()


# ---------------------------------------------------------------- numbers


@pytest.fixture(scope="module")
def shared():
    return drawn()


@pytest.mark.parametrize("case", [1, 2])
def test_numbers_follow_from_the_name_of_the_test(request, case):
    first = drawn()
    seed_all(request.node.nodeid)
    assert first == drawn()
    seed_all(request.node.nodeid.replace(f"[{case}]", "[3]"))
    assert first != drawn()


def test_what_is_shared_or_drawn_at_import_has_a_name_too(shared):
    seed_all("tests/test_checks.py shared 0")
    assert shared == drawn()
    seed_all("tests/test_checks.py")
    assert torch.equal(AT_IMPORT, torch.rand(3))


# ---------------------------------------------------------------- cases


@pytest.mark.parametrize("sizes", [(3,), (2, 5), (5, 3, 2), (4, 4, 4, 2)])
def test_every_pair_of_values_is_covered(sizes):
    cases = [dict(zip("abcd", values, strict=False)) for values in itertools.product(*map(range, sizes))]
    chosen = pairwise(cases)
    assert set().union(*(pairs(cases[i]) for i in chosen)) == set().union(*map(pairs, cases))
    assert len(chosen) < len(cases) or len(sizes) < 3


# ---------------------------------------------------------------- mutants


def test_tests_of_mutants_may_start_workers():
    from tests.mutants import in_processes  # not above, because it imports transformers

    def absolute(number):
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.apply(abs, [number])

    assert sorted(in_processes(absolute, [-1, -2, -3], 2)) == [1, 2, 3]


# ---------------------------------------------------------------- transformers


def test_transformers_works_beside_a_package_of_the_name_of_ours(tmp_path):
    """Hugging Face's `kernels` is installed, in a version that transformers uses; here a stand-in."""
    utils = pytest.importorskip("transformers.utils.import_utils", reason="transformers is the oracle of these tests")
    version = getattr(utils, "KERNELS_MIN_VERSION", "0.17.0")
    info = tmp_path / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise AssertionError('not ours')\n")
    code = """
import kernels
from tools.hf import import_transformers
transformers = import_transformers()
transformers.LlavaForConditionalGeneration, transformers.AutoModelForImageTextToText
assert kernels.ragged_decode is __import__("kernels").ragged_decode
from transformers.utils.import_utils import is_kernels_available
is_kernels_available.cache_clear()
assert is_kernels_available()  # otherwise the test could not fail
"""
    names = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=names)
    assert done.returncode == 0, done.stderr
