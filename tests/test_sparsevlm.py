"""SparseVLM: which words rate, how many tokens stay, what is recycled; the whole against masked transformers."""

import dataclasses
import math

import pytest
import torch
from conftest import refusal
from PIL import Image
from sparsevlm_oracle import density_peaks, masked_answer, rating_rows
from test_batch import together
from test_next import ask, make_next
from test_parity import noise

from model import Generation, Sampling, load
from model.pruning import make_method
from model.pruning.sparsevlm import SparseVLM, centres, raters, recycled
from model.view import View
from tests.onevision import make_onevision
from tests.paths import DEMO_PICTURE
from tests.seeds import torch_random


def words_of(embeddings, spans, origin=None):
    """`raters` for a prompt with these embeddings (T, C), of which the tokens `origin` are left."""
    origin = torch.arange(len(embeddings)) if origin is None else origin
    q = torch.zeros(1, 1, len(origin), 1)
    left = [(int((origin < a).sum()), int((origin < b).sum())) for a, b in spans]
    return raters(View(1, 4, q, q, q, left, embeddings=embeddings, origin=origin, whole_spans=spans))


# ---------------------------------------------------------------- the rating words


def test_words_like_the_picture_rate_it():
    """Of the text behind the last picture only; a word before it, however alike, is none."""
    x = torch.zeros(14, 4)
    x[:, 0] = 0.1
    x[2:6] = torch.tensor([0.0, 3, 0, 0])
    x[7:9] = torch.tensor([0.0, 0, 3, 0])
    for planted in (1, 6, 10, 12):
        x[planted] = torch.tensor([0.0, 2, 2, 0])
    assert words_of(x, [(2, 6), (7, 9)]).tolist() == [10, 12]
    assert words_of(x, [(2, 6)]).tolist() == [6, 10, 12]


@pytest.mark.parametrize("spans", [[(3, 20)], [(0, 9), (9, 15), (17, 30)], [(2, 33)], [(2, 34)]])
def test_the_words_are_those_of_a_loop_whatever_has_left_the_prompt(spans):
    """A picture or several, much text, one word, none."""
    generator = torch_random(0)
    for scale in (0.2, 1.0, 30.0):
        x = torch.randn(34, 8, generator=generator) * scale
        wanted = rating_rows(x, spans)
        assert words_of(x, spans).tolist() == [34 + row for row in wanted]
        few = torch.rand(34, generator=generator) < 0.3
        few[spans[-1][1] :] = True
        few[-1] = True
        origin = few.nonzero()[:, 0]
        assert origin[words_of(x, spans, origin)].tolist() == [34 + row for row in wanted]
    assert words_of(torch.ones(9, 8), [(0, 4)]).tolist() == [4, 5, 6, 7, 8]  # all alike


# ---------------------------------------------------------------- recycling


def test_as_many_are_recycled_as_in_the_original():
    for rest in range(1, 5000):
        pool = int(rest * 0.3) + 1
        assert recycled(rest) == (pool, int(pool / 10) + 1) and pool <= rest


@pytest.mark.parametrize("m", [1, 2, 9, 10, 25, 44, 83])
def test_clusters_are_those_of_a_loop(m):
    for seed in range(4):
        x = torch.randn(m, 16, generator=torch_random(seed)) * 2.0**-seed
        assert centres(x, m // 10 + 1).tolist() == density_peaks(x, m // 10 + 1)


def test_each_cloud_is_a_cluster():
    """Three clouds, far apart and of different sizes; their densest points are close to their middles."""
    generator = torch_random(0)
    cloud = torch.tensor([0] * 20 + [1] * 8 + [2] * 6)[torch.randperm(34, generator=generator)]
    x = torch.eye(3, 12)[cloud] * 90 + torch.randn(34, 12, generator=generator) * 0.3
    owner = centres(x, 3)
    assert len(owner.unique()) == 3 and (cloud[owner] == cloud).all() and (owner[owner] == owner).all()


def test_of_equal_densities_the_better_rated_token_is_the_centre():
    """With one neighbour, itself, all densities are 1; of two tokens alike, the first wins."""
    far = torch.randn(9, 64, generator=torch_random(0)) + 100
    assert all(centres(far.roll(i, 0), 1).tolist() == [0] * 9 for i in range(9))
    assert centres(torch.ones(12, 5), 2).tolist() == [0, 1, *[0] * 10]
    pairs = torch.tensor([[0.0, 0], [9, 0], [9, 0], [0, 0], [0.1, 0]])
    assert centres(pairs, 2).tolist() == [0, 1, 1, 0, 0]


# ---------------------------------------------------------------- how many, and where


def test_the_lists_of_the_original():
    """192 tokens of 576; the models of LLaVA-NeXT and the 13B have the same fractions."""
    assert SparseVLM().counts(576, 32) == {3: 300, 7: 200, 16: 110}  # the first layers with so many
    assert SparseVLM().counts(2880, 40) == {4: 1500, 9: 1000, 20: 550}
    assert SparseVLM(ratios=[0.5260, 0.1910, 0.0625]).counts(576, 32) == {3: 303, 7: 110, 16: 36}
    assert SparseVLM().counts(10, 6) == {1: 5, 2: 3, 4: 2} and SparseVLM().counts(10, 4) == {1: 5, 2: 3, 3: 2}
    assert SparseVLM().counts(1000, 3) == {1: 521, 2: 191} and SparseVLM().counts(1000, 2) == {1: 191}
    assert SparseVLM(retention=1.0).counts(36, 32) == {3: 36, 7: 36, 16: 36}


@pytest.mark.parametrize("recycle", [False, True])
@pytest.mark.parametrize(("whole", "layers"), [(576, 32), (2880, 40), (144, 6), (100, 4)])
def test_retention_is_the_mean_over_the_layers(whole, layers, recycle):
    """Within two tokens, and never above it; the ratios keep their proportions."""
    for retention in (0.3, 0.35, 0.5, 0.7, 0.95, 1.0):
        counts = SparseVLM(retention=retention, recycle=recycle).counts(whole, layers)
        left, held = whole, 0
        for layer in range(layers):
            rest = left - min(left, counts.get(layer, left))
            left -= rest - (int((int(rest * 0.3) + 1) / 10) + 1 if recycle and rest else 0)
            held += left
        assert retention - 2 / whole < held / (whole * layers) <= retention, counts
        a, b, c = counts.values()
        if a < whole:
            assert abs(b / a - 0.3472 / 0.5208) < 1.5 / a and abs(c / a - 0.191 / 0.5208) < 1.5 / a


def test_equal_scores_stay_in_their_order():
    """Of two pictures, the second of which has its best token at the end."""
    q = torch.zeros(1, 2, 30, 4)
    k = q.clone()
    k[:, :, 25], q[:, :, 26:] = 9, 9
    view = View(0, 4, q, k, k, [(2, 12), (16, 26)], embeddings=torch.ones(30, 3), backend="torch")
    stay = SparseVLM().narrow(view).nonzero()[:, 0].tolist()
    assert stay == [0, 1, *range(2, 7), 12, 13, 14, 15, *range(16, 20), 25, *range(26, 30)]


BAD = [
    ("stages=[2,1,3]", "stages is [2, 1, 3]; give whole numbers of 1 or more, in ascending order"),
    ("stages=[1,1,2]", "stages is [1, 1, 2]"),
    ("stages=[0,1,2]", "stages is [0, 1, 2]"),
    ("stages=[1.5,2,3]", "stages is [1.5, 2, 3]"),
    ("stages=[1,2]", "ratios has 3 entries for 2 stages; give one for each"),
    ("ratios=[0.5,0.3]", "ratios has 2 entries for 3 stages"),
    ("ratios=[]", "ratios has 0 entries for 3 stages"),
    ("ratios=[0.3,0.5,0.1]", "ratios is [0.3, 0.5, 0.1]; give numbers above 0 and up to 1, none above the one before"),
    ("ratios=[0.5,0.3,0]", "ratios is [0.5, 0.3, 0]"),
    ("ratios=[1.5,0.3,0.1]", "ratios is [1.5, 0.3, 0.1]"),
    ("heads=0", "heads is 0; give a whole number of 1 or more"),
    ("stages=[1,2,4]", "stages has layer 4, the model has 4; give 1 to 3"),
    ("retention=0.25", "retention is 0.25, but the first 1 of 4 layers keep everything; give more than 0.25"),
    ("retention=0.5,ratios=[0.5,0.4,0.1]", "retention and ratios are both given"),
]


@pytest.mark.parametrize(("given", "words"), BAD)
def test_settings_that_cannot_be_meant_are_refused(small, given, words):
    assert words in refusal(Generation, small, "what?", pictures(1), prune=f"sparsevlm:{given}")


# ---------------------------------------------------------------- against transformers


@pytest.fixture(scope="module")
def small(make_checkpoint, tmp_path_factory):
    """A checkpoint of random weights: 4 layers, 4 heads over 2 KV heads, 36 tokens a picture."""
    folder = tmp_path_factory.mktemp("small")
    make_checkpoint(folder, {"num_hidden_layers": 4}, {"image_size": 84}, seed=3)
    return dataclasses.replace(load(folder, "fp32"), stop_ids=())


@pytest.fixture(scope="module")
def oracle(make_hf_checkpoint, tmp_path_factory):
    """A folder and its checkpoint: 5 layers, 8 query heads over 2 KV heads, 100 tokens a picture, no stop id."""
    folder = tmp_path_factory.mktemp("oracle")
    text = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 2}
    make_hf_checkpoint(folder, text, vision={"image_size": 140}, seed=3)
    return folder, dataclasses.replace(load(folder, "fp32"), stop_ids=())


def pictures(count):
    """`count` different pictures."""
    with Image.open(DEMO_PICTURE) as picture:
        return [picture.convert("RGB").rotate(90 * i) for i in range(count)]


QUESTIONS = {  # name: (question, number of pictures, template)
    "one": ("what is left?", 1, "auto"),
    "three": ("what is <image> and <image> left of <image> there?", 3, "auto"),
    "last": ("what is left of <image> in <image>", 2, "raw"),  # a picture ends the prompt
}


def answered(checkpoint, question, tokens, prune=None):
    prompt, count, template = QUESTIONS[question]
    generation = Generation(
        checkpoint, prompt, pictures(count), Sampling(tokens), template, prune=prune, backend="torch", remember=True
    )
    "".join(generation)
    return generation


@torch.inference_mode()
def first_logits(generation):
    return generation.again(generation.prune).prefill()


def parts_of(ratio):
    return lambda n: max(1, math.floor(ratio * n + 0.5))


FIVE = {0: parts_of(0.5208), 1: parts_of(0.3472), 2: parts_of(0.191)}  # 2, 6 and 15 of 32 in 5 layers
CASES = {  # spec: (schedule, further arguments of `masked_answer`)
    "sparsevlm": (FIVE, {}),
    "sparsevlm:recycle=true": (FIVE, {"recycle": True}),
    "sparsevlm:recycle=true,scope=vision": (FIVE, {"recycle": True, "scope": "vision"}),
    "sparsevlm:heads=3": (FIVE, {"heads": 3}),
    "sparsevlm:stages=[2,4],ratios=[0.4,0.1],recycle=true": (
        {1: parts_of(0.4), 3: parts_of(0.1)}, {"recycle": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_kept_sets_and_ids_are_those_of_transformers_with_masks(oracle, question, spec):
    """One mask per layer; the centres of clusters are averaged in the output of the layer, at their own places."""
    folder, checkpoint = oracle
    generation = answered(checkpoint, question, 24, make_method(spec))
    schedule, more = CASES[spec]
    ids, kept, merged, logits = masked_answer(folder, generation, schedule, 24, **more)
    assert torch.equal(generation.masks, kept[:, None].expand_as(generation.masks))
    assert generation.token_ids == ids
    torch.testing.assert_close(first_logits(generation), logits, rtol=1e-3, atol=1e-3)
    assert generation.cache.kv_len.tolist() == [[n + 23] * 2 for n in kept.sum(1).tolist()]
    plain = first_logits(answered(checkpoint, question, 1))
    assert (plain - logits).abs().max() > 0.02  # otherwise pruning would have no effect here
    assert (merged > len(schedule)) == ("recycle" in more)  # several clusters


@pytest.mark.parametrize("recycle", [False, True])
def test_tiles_and_newlines_of_llava_next(make_hf_checkpoint, tmp_path, recycle):
    make_next(make_hf_checkpoint, tmp_path, {"num_hidden_layers": 5}, {"image_size": 56}, seed=3)
    asked = ask(
        load(tmp_path, "fp32"), "what is <image> and <image> there?", [(150, 120), (40, 90)], remember=True,
        prune=make_method("sparsevlm", settings={"recycle": recycle}), sampling=Sampling(24),
    )  # fmt: skip
    "".join(asked)
    ids, kept, merged, logits = masked_answer(tmp_path, asked, FIVE, 24, recycle)
    assert asked.token_ids == ids and torch.equal(asked.masks, kept[:, None].expand_as(asked.masks))
    torch.testing.assert_close(first_logits(asked), logits, rtol=1e-3, atol=1e-3)
    assert bool(merged) == recycle


@pytest.mark.parametrize("recycle", [False, True])
@pytest.mark.parametrize("frames", [0, 3])
def test_shrunk_maps_and_frames_of_llava_onevision(make_hf_checkpoint, tmp_path, frames, recycle):
    """A picture of 36 tiles, whose map shrinks to 18 x 18 tokens; three frames of 9 and two pictures of one square."""
    make_onevision(make_hf_checkpoint, tmp_path, {"num_hidden_layers": 5}, seed=3)
    question, sizes = "what is <image> there?", [(150, 150)]
    if frames:
        question, sizes = "is <video> <image> or <image>?", [(150, 150), (50, 40)]
    asked = ask(
        dataclasses.replace(load(tmp_path, "fp32"), stop_ids=()), question, sizes,
        remember=True, prune=make_method("sparsevlm", settings={"recycle": recycle}), sampling=Sampling(24),
        frames=[noise(50, 40, seed=9 + i) for i in range(frames)],
    )  # fmt: skip
    "".join(asked)
    assert [image["tokens"] for image in asked.images] == ([9, 9, 10, 37, 37] if frames else [36 + 18 * 19])
    ids, kept, merged, logits = masked_answer(tmp_path, asked, FIVE, 24, recycle)
    assert asked.token_ids == ids and torch.equal(asked.masks, kept[:, None].expand_as(asked.masks))
    torch.testing.assert_close(first_logits(asked), logits, rtol=1e-3, atol=1e-3)
    assert bool(merged) == recycle and kept.double().mean() < 0.8


# ---------------------------------------------------------------- any answer


@pytest.mark.parametrize("more", [{}, {"recycle": True}, {"recycle": True, "scope": "vision", "heads": 1}])
def test_ratios_of_one_are_no_pruning_bit_for_bit(small, more):
    for every in ({"ratios": [1, 1, 1]}, {"retention": 1.0}, {"stages": [], "ratios": []}):
        pruned, plain = (
            Generation(small, "what?", pictures(2), prune=p)
            for p in (make_method("sparsevlm", settings=every | more), None)
        )
        with torch.inference_mode():
            assert pruned.prefill().equal(plain.prefill())
        assert pruned.bytes_held == plain.bytes_held


@pytest.mark.parametrize("recycle", [False, True])
def test_the_bytes_are_those_of_the_kept_tokens(small, recycle):
    generation = answered(small, "three", 3, make_method("sparsevlm", settings={"recycle": recycle}))
    kept = [108, 57, 36, 21]  # of 36 in a picture 19, 12 and 7
    if recycle:
        kept = [108, 60, 39, 24]  # 17 are dropped, then 20 - 12, then 13 - 7: one cluster each time
    assert generation.kept == kept
    text = generation.prompt_tokens - 108
    assert generation.bytes_held == sum(n + text for n in kept) * 2 * 2 * 16 * 4  # K and V, two heads, fp32
    assert generation.retention == sum(kept) / (4 * 108)


def test_a_batch_and_a_later_turn(small):
    """A batch says what each says alone; a later turn adds to what was kept."""
    prune = make_method("sparsevlm:recycle=true", 0.6)
    alone = [answered(small, question, 12, prune) for question in QUESTIONS]
    mates = together([generation.again(prune) for generation in alone], 2)
    assert [g.token_ids for g in mates] == [g.token_ids for g in alone]
    assert [g.bytes_held for g in mates] == [g.bytes_held for g in alone]
    first = answered(small, "one", 4, prune)
    kept = first.kept
    then = Generation(small, "and there?", sampling=Sampling(4), prune=prune, before=first, backend="torch")
    "".join(then)
    assert then.kept == kept and len(then.token_ids) == 4 and max(kept) == 36 > min(kept)


def test_behind_a_method_before_the_model_the_words_see_what_is_left(small):
    """The fractions are of the tokens that the language model gets."""
    generation = answered(small, "three", 4, make_method("pick-grid:retention=0.5,positions=original+sparsevlm"))
    assert generation.kept == [54.0, 27.0, 18.0, 9.0]  # 18 in a picture: 9, 6 and 3
    assert generation.parts[1]["method"] == "sparsevlm" and generation.parts[1]["actual"] == pytest.approx(0.5)
