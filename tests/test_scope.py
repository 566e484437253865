"""One budget for each part of a picture (scope=part), for each frame, and what is reported, on LLaVA-OneVision."""

import math
from dataclasses import replace

import pytest
import torch
from test_parity import noise

from model import Generation, Sampling, load
from model.pruning import METHODS, make_method
from model.pruning.budget import best, select
from tests.given import given_view
from tests.onevision import make_onevision

SCOPED = [name for name in METHODS if name != "none" and "scope" in make_method(name).settings]


@pytest.fixture(scope="module")
def folder(make_hf_checkpoint, tmp_path_factory):
    """Of a OneVision checkpoint: 4 layers, 8 query heads over 2 KV heads, 36 patches a square."""
    folder = tmp_path_factory.mktemp("scope")
    text = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    make_onevision(make_hf_checkpoint, folder, text, seed=3)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return replace(load(folder, "fp32"), stop_ids=())


def ask(checkpoint, method, question="what is <image>?", sizes=((140, 110),), frames=0, count=1, **options):
    pictures = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    frames = [noise(50, 40, seed=9 + i) for i in range(frames)]
    return Generation(
        checkpoint, question, pictures, Sampling(count), "raw", prune=method, frames=frames, remember=True, **options
    )


def half_up(share, tokens):
    return max(1, math.floor(share * tokens + 0.5))


def test_parts_are_chosen_apart():
    """A picture of two parts and one of a single part; the best scores are the last."""
    places = [torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]), torch.tensor([[0, 0], [0, 1]])]
    view = given_view([(1, 7), (7, 9)], 10, kv_heads=1, places=places, sides=[2, None])
    assert view.parts == view.whole_parts == [(1, 5), (5, 7), (7, 9)]
    kept = select(torch.arange(10.0)[None], view, lambda scores: best(scores, 1), "part")
    assert kept[0].int().tolist() == [1, 0, 0, 0, 1, 0, 1, 0, 1, 1]
    empty = given_view([(0, 2)], 3, kv_heads=1, places=[torch.tensor([[0, 0], [0, 1]])], sides=[2])
    assert empty.parts == [(0, 2), (2, 2)]  # as many as before


@pytest.mark.parametrize("name", SCOPED)
@torch.inference_mode()
def test_each_part_of_a_picture_keeps_its_share(checkpoint, name):
    """The square and the map of its tiles, and a picture without tiles; per layer what the schedule says."""
    amount = {"plphp": {"r": 0.3, "dr": 0}, "plphp-ada": {"r": 0.3, "dr": 0}, "pyramiddrop": {}, "sparsevlm": {}}
    amount = amount.get(name, {"retention": 0.3})
    asked = ask(checkpoint, make_method(name, settings={"scope": "part"} | amount))
    asked.prefill()
    ((start, stop),), (layout,) = asked.spans, [picture.layout for picture in asked.pictures]
    first, second = layout.parts
    assert (first, first + second) == (36, stop - start) and layout.second == 6
    narrowing = {"pyramiddrop": {1: 0.5, 2: 0.25, 3: 0.125}, "sparsevlm": {1: 0.5208, 2: 0.3472, 3: 0.191},
                 "fastv": {2: 0.3, 3: 0.3}}  # fmt: skip
    skipped = {"plphp": 1, "plphp-ada": 1}.get(name, 0)
    for layer, mask in enumerate(asked.masks):
        share = narrowing.get(name, dict.fromkeys(range(skipped, 4), 0.3)).get(layer, 1.0)
        for a, b in ((start, start + first), (start + first, stop)):
            counts = mask[:, a:b].sum(1)
            wanted = half_up(share, b - a)
            assert counts.sum() == 2 * wanted if name in ("adakv", "plphp-ada") else counts.tolist() == [wanted] * 2


def test_what_is_reported_counts_parts(checkpoint):
    asked = ask(checkpoint, "topk:scope=part,keep_tokens=20", "what is <image>?")
    "".join(asked)
    assert asked.kept == [40.0] * 4 and asked.wanted == pytest.approx(40 / asked.vision_tokens) == asked.retention
    both = ask(checkpoint, "pick-grid:retention=0.5+topk:scope=part,keep_tokens=20")
    "".join(both)
    assert both.kept[0] == 38.0  # of 18 tokens of the square all
    left = sum(min(20, round(n / 2)) for n in both.pictures[0].layout.parts)
    assert both.wanted == pytest.approx(0.5 * left / sum(round(n / 2) for n in [both.vision_tokens]), rel=0.02)


@pytest.mark.parametrize("name", ["topk", "grid", "objects", "pick-grid", "pick-random"])
def test_each_frame_keeps_its_share(checkpoint, name):
    """8 frames of 3 x 3 tokens, the last with a newline, and a picture with one."""
    asked = ask(checkpoint, f"{name}:retention=0.4", "<video> and <image>?", [(60, 40)], 8, image_mode="pad")
    "".join(asked)
    tokens = [image["tokens"] for image in asked.images]
    assert tokens == [9] * 7 + [10, 37] and [stop - start for start, stop in asked.spans] == tokens
    for (start, stop), picture in zip(asked.spans, asked.pictures, strict=True):
        own = asked.masks[..., start:stop].sum(2)
        patches = int((picture.layout.patches >= 0).sum()) if name.startswith("pick") else picture.tokens
        assert own.unique().tolist() == [half_up(0.4, patches)]
    kept = sum(half_up(0.4, n - (name.startswith("pick") and n in (10, 37))) for n in tokens)
    assert asked.retention == pytest.approx(kept / sum(tokens)) and asked.wanted == 0.4


class Rows:
    """All tokens of every second row, of the square's and of the map's."""

    def pick(self, picture):
        return (picture.places[:, 0] % 2 == 1).nonzero()[:, 0]


@pytest.mark.parametrize("sizes", [((140, 110),), ((60, 40), (20, 90)), ((60, 40),)])
@torch.inference_mode()
def test_picked_tokens_are_those_of_the_whole_prompt(checkpoint, sizes):
    """Bit for bit, also of a map that shrinks; newlines stay with complete rows; places are the tokens' own."""
    frames = 3 if sizes == ((60, 40),) else 0
    question = "what is " + "<image> " * len(sizes) + "<video>" * bool(frames)
    mode = "pad" if frames else "auto"
    asked = ask(checkpoint, Rows(), question, sizes, frames, image_mode=mode)
    whole, (tokens, picked, _) = asked.encode_images(), asked.pick_images(asked.prune)
    for every, some, of_one, picture in zip(whole, tokens, picked, asked.pictures, strict=True):
        rows = picture.layout.places[:, 0]
        assert of_one.origin.tolist() == (rows % 2 == 1).nonzero()[:, 0].tolist()  # the last row ends with a newline
        assert some.equal(every[of_one.origin]) and len(every) == picture.tokens
    newlines = []
    for of_one, picture in zip(picked, asked.pictures, strict=True):
        newlines.append(int((picture.layout.patches[of_one.origin] < 0).sum()))
    if len(sizes) == 1 and not frames:
        rows, columns = asked.pictures[0].layout.map
        cut = asked.pictures[0].layout.cut
        assert cut[0].stop - cut[0].start > rows and newlines == [rows // 2]
    else:
        assert newlines == [1] * len(sizes) + [0, 0, 0][:frames]  # of a frame the middle row is left
