"""`--compile` on a CPU: a layer of a decode step in one graph, beside the step as it is.

`compiled_steps.py` makes what is looked at here, in a process of its own: what a compiler leaves behind is large.
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
    """One of a layer and one of the output head, whatever the number of layers, of tokens, and what was pruned."""
    assert found["answer_graphs"] == 2
    assert {name: case["graphs"] for name, case in found["steps"].items()} == {
        "all": 0, "halves": 0, "uneven": 2, "batch": 2,  # two halves of a layer; a layer and a head of several rows
    }  # fmt: skip


@pytest.mark.parametrize("name", ["all", "halves", "uneven", "batch"])
def test_compiled_steps_are_the_steps(found, name):
    """Logits, and what the cache says, with NaN in every free slot and arenas that move."""
    case = found["steps"][name]
    assert case["whole"] and case["same"] and case["size"] > 1
    assert case["off"] <= 1e-4 * case["size"]


def test_a_compiled_step_is_a_call_per_layer(found):
    """And one of the output head; six layers. What is allocated are some vectors, nothing of a layer's inside."""
    assert found["calls"] == 7 and 0 < found["allocations"] <= 30


def test_compiled_products_of_a_row_are_as_exact_as_others(found):
    for compiled, plain in found["products"].values():
        assert compiled <= 2 * plain + 1e-5


def test_weights_lie_by_rows_for_a_compiler(found):
    assert found["by_rows"]
