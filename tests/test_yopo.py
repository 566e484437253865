"""YOPO: against transformers with a mask per head, the planted cases of its rules, and the calibration of its table."""

import dataclasses

import pytest
import torch
from test_methods import answered
from test_next import ask, make_next
from yopo_oracle import yopo_ids

from model import Sampling, load
from model.pruning import make_method

# ---------------------------------------------------------------- against transformers

# per layer a ratio for each of 8 query heads over 2 KV heads
TABLE = [
    [0.0] * 8,
    [0.01, 0.2, 0.01, 0.02, 0.01, 0.01, 0.03, 0.02],
    [0.02, 0.01, 0.01, 0.01, 0.02, 0.01, 0.01, 0.09],
    [0.01, 0.03, 0.02, 0.01, 0.01, 0.02, 0.0, 0.03],
]
ACTIVE = [[True, True], [True, False], [False, True], [False, False]]  # above 0.035, with the first layer
SETTINGS = {  # name: settings beside the table
    "table": {},
    "cut": {"cut": 0.5},
    "window": {"radius": 1},
    "half": {"neurons": 0.5},
    "lost": {"renormalise": False},
    "lost and cut": {"renormalise": False, "cut": 0.75, "radius": 2},
    "cache": {"prefill": False},
    "cache and window": {"prefill": False, "radius": 0, "neurons": 0.25},
    "all": {"cut": 0.75, "radius": 2, "neurons": 0.5},
}


@pytest.fixture(scope="module")
def folders(make_hf_checkpoint, tmp_path_factory):
    """Folders of LLaVA and LLaVA-NeXT: 4 layers, 8 query heads over 2 KV heads, squares of 36 and 16 tokens."""
    text = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    square, tiled = (tmp_path_factory.mktemp(name) for name in ("square", "tiled"))
    make_hf_checkpoint(square, text, vision={"image_size": 84}, seed=3)
    make_next(make_hf_checkpoint, tiled, text, {"image_size": 56}, seed=3)
    return square, tiled


def of_transformers(folder, generation, settings):
    last = {1.0: 4, 0.75: 3, 0.5: 2}[settings.get("cut", 1.0)]
    return yopo_ids(folder, generation, ACTIVE, last, 24, **{k: v for k, v in settings.items() if k != "cut"})


@pytest.mark.parametrize("question", ["one", "three", "last"])
@pytest.mark.parametrize("name", SETTINGS)
def test_ids_and_kept_sets_are_those_of_transformers(folders, name, question):
    checkpoint = dataclasses.replace(load(folders[0], "fp32"), stop_ids=())
    method = make_method("yopo", settings={"heads": TABLE} | SETTINGS[name])
    found = answered(checkpoint, question, 24, method)
    ids, kept = of_transformers(folders[0], found, SETTINGS[name])
    assert found.token_ids == ids
    assert found.cache.kv_len.tolist() == [[n + 23 for n in keep.sum(1).tolist()] for keep in kept]
    assert ids != answered(checkpoint, question, 24).token_ids  # otherwise pruning would have no effect here


@pytest.mark.parametrize("name", SETTINGS)
def test_on_llava_next_squares_are_apart_and_newlines_are_cells(folders, name):
    method = make_method("yopo", settings={"heads": TABLE} | SETTINGS[name])
    asked = ask(load(folders[1], "fp32"), "what is <image> and <image>?", [(150, 120), (40, 90)], prune=method)
    asked.sampling, asked.remember = Sampling(24), True
    "".join(asked)
    ids, kept = of_transformers(folders[1], asked, SETTINGS[name])
    assert asked.token_ids == ids and asked.masks.equal(torch.stack(kept))
