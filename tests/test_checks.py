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
from tests.oracle import assert_attends, assert_stored
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


# ---------------------------------------------------------------- comparisons


def test_a_wrong_kernel_is_reported_by_segment():
    """Two sequences, two KV heads, four query heads: segment 3 is read by query heads 2 and 3 of the second."""
    length, out, lse = torch.tensor([5, 0, 7, 70]), torch.rand(2, 4, 8), torch.rand(2, 4)
    lse[0, 2:] = -torch.inf
    exact = out.double(), lse.double()
    assert_attends((out, lse), (out, lse), exact, length)
    wrong = out.clone()
    wrong[1, 2, 6], wrong[1, 1, 0] = 3.5, 1.5
    with pytest.raises(AssertionError) as told:
        assert_attends([wrong], [out], exact, length, "seed 4")
    place = "out seed 4: segment 3 (sequence 1, KV head 1, 70 tokens), query head 2, channel 6: got 3.5, expected 0."
    assert str(told.value).startswith(place) and "; 2 of 64 values are wrong, shape (2, 4, 8)" in str(told.value)
    for value in (torch.nan, torch.inf, 0.0):  # of no keys the log-sum-exp is -inf
        wrong = lse.clone()
        wrong[0, 3] = value
        with pytest.raises(
            AssertionError, match=r"lse: segment 1 \(sequence 0, KV head 1, 0 tokens\), query head 3: got "
        ):
            assert_attends((out, wrong), (out, lse), exact, length)


def test_a_wrong_slot_is_reported_by_segment():
    start, length, cap = torch.tensor([4, 0]), torch.tensor([2, 3]), torch.tensor([3, 4])
    k = torch.rand(7, 2)
    k[6] = torch.nan
    v = k.clone()
    assert_stored((k, v), (k.clone(), v.clone()), start, length, cap)
    v[6, 1] = 0.5  # behind the length, where nothing was stored
    with pytest.raises(
        AssertionError, match=r"stored v: segment 0 \(2 tokens, 3 slots\), slot 2, channel 1: got 0.5, "
    ):
        assert_stored((k, v), (k, k), start, length, cap)


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
