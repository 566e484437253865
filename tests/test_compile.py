"""`--compile` on a CPU: one graph per layer of a decode step, compared with the plain step.

The results come from `compiled_steps.py` in its own process, because a compiler leaves large memory behind.
"""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT


@pytest.fixture(scope="module")
def found():
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler")
    command = [sys.executable, "-m", "tests.compiled_steps", str(random.randrange(2**32))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_compiled_answer_is_the_same(found):
    plain, compiled = found["texts"]
    assert plain == compiled and len(plain) > 50


def test_all_layers_and_prompts_share_the_graphs(found):
    """One for a layer and one for the output head, independent of layers, tokens and pruning."""
    assert found["answer_graphs"] == 2
    assert {name: case["graphs"] for name, case in found["steps"].items()} == {
        "all": 0, "halves": 0, "uneven": 2, "batch": 2,  # two halves of a layer; layer and head for several rows
    }  # fmt: skip


@pytest.mark.parametrize("name", ["all", "halves", "uneven", "batch"])
def test_compiled_steps_are_the_steps(found, name):
    """Same logits and cache tables, with NaN in every free slot and arenas that move."""
    case = found["steps"][name]
    assert case["whole"] and case["same"] and case["size"] > 1
    assert case["off"] <= 1e-4 * case["size"]


def test_a_compiled_step_is_a_call_per_layer(found):
    """Plus one for the output head; six layers. Only a few vectors are allocated, no tensors inside a layer."""
    assert found["calls"] == 7 and 0 < found["allocations"] <= 30


def test_compiled_products_of_a_row_are_as_exact_as_others(found):
    for compiled, plain in found["products"].values():
        assert compiled <= 2 * plain + 1e-5
