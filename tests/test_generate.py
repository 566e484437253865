"""Generating an answer: sampling, stopping, reports, and the contents of the cache."""

import copy
import dataclasses
import io
import math
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model import Generation, InputError, Sampling, load, open_checkpoint
from model.cache import RaggedCache
from model.config import TextConfig
from model.llama import rope_table, rotate
from model.sampling import Chooser, Writer, probabilities
from tests.oracle import small_llama
from tests.paths import DEMO, DEMO_PICTURE
from tests.seeds import torch_random

PICTURE = str(DEMO_PICTURE)
QUESTION = "Describe the picture."


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, "fp32")


def finished(*args, **kwargs):
    generation = Generation(*args, **kwargs)
    assert "".join(generation) == generation.text
    return generation


@pytest.mark.parametrize("spec", [
    None, "plphp", "plphp-ada:query=last", "topk:values=true,cover=0.5", "shared:cover=0.5", "snapkv", "adakv",
    "fastv", "sparsevlm:recycle=true", "random", "grid", "objects", "topk:rates=[0.1,0.2,0.3,0.4,0.5,0.6]",
])  # fmt: skip
def test_tensors_are_made_where_the_model_is(demo, spec):
    """Not on torch's default device, here the meta device, which has no memory."""
    asked = QUESTION, [PICTURE], Sampling(max_new_tokens=8)
    wanted = finished(demo, *asked, prune=spec)
    with torch.device("meta"):
        assert finished(load(DEMO, "fp32"), *asked, prune=spec).token_ids == wanted.token_ids


# ---------------------------------------------------------------- model


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("split", [1, 5, 11])
@pytest.mark.usefixtures("frequent_repacks")
@torch.no_grad()
def test_decoding_token_by_token_equals_one_long_prefill(kv_heads, split):
    model = small_llama(kv_heads=kv_heads)
    x = torch.randn(2, 12, 32)  # two sequences
    whole = model.prefill(x)
    cache = RaggedCache(3, slack=2)  # with several repacks
    states = [model.prefill(x[:, :split], cache)] + [model.decode(x[:, t], cache)[:, None] for t in range(split, 12)]
    torch.testing.assert_close(torch.cat(states, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.pos.tolist() == [12, 12] and cache.kv_len.unique().tolist() == [12]


@torch.no_grad()
def test_a_step_leaves_what_it_is_given():
    model, x, cache = small_llama(), torch.randn(1, 6, 32), RaggedCache(3)
    model.prefill(x, cache)
    before = x.clone()
    model.decode(x[:, 0], cache)
    assert torch.equal(x, before)


@torch.no_grad()
def test_packed_sequences_are_alone_with_mask_and_positions():
    model, x = small_llama(), torch.randn(1, 9, 32)
    alone = model.prefill(torch.cat((x[:, :3], x[:, 6:]), 1))  # prefix of 3, then block two
    block = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]])
    mask = ((block[:, :, None] == block[:, None]) | (block[:, None] == 0)) & torch.ones(9, 9, dtype=torch.bool).tril()
    cache, positions = RaggedCache(3), torch.tensor([0, 1, 2, 3, 4, 5, 3, 4, 5])
    packed = model.prefill(x, cache, positions, mask[:, None])
    torch.testing.assert_close(packed[:, 6:], alone[:, 3:], rtol=1e-4, atol=1e-5)
    assert cache.pos.tolist() == [6]


def test_rope_is_the_complex_rotation():
    config = TextConfig(hidden_size=32, num_attention_heads=2, rope_theta=500.0)
    x, positions = torch.randn(5, 2, 16, dtype=torch.float64), torch.tensor([0, 1, 7, 100, 2047])
    got = rotate(x, rope_table(positions, config, torch.float64))
    angle = positions[:, None].double() * 500.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)  # (5, 8)
    want = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(got, torch.cat((want.real, want.imag), -1), rtol=1e-3, atol=1e-3)


def test_the_model_is_differentiable_end_to_end(demo):
    model = copy.deepcopy(demo.model).requires_grad_(True)
    x, _ = model.splice([1, demo.config.image_token_index, 5, 6], model.encode_images(torch.randn(1, 3, 224, 224)))
    model.language_model.logits(model.language_model.prefill(x[None])).logsumexp(-1).mean().backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    last = demo.config.vision_config.num_hidden_layers - 1  # never run: LLaVA reads the layer before
    assert all(
        n.startswith(f"vision_tower.vision_model.encoder.layers.{last}.") or "post_layernorm" in n or "k_proj.bias" in n
        for n in unused
    ), unused


# ---------------------------------------------------------------- sampling


@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.05, 1), st.floats(0.2, 3))
@settings(max_examples=60, deadline=None)
def test_top_k_and_top_p_keep_the_right_set(seed, top_k, top_p, temperature):
    logits = torch.randn(10, dtype=torch.float64, generator=torch_random(seed))
    got = probabilities(logits, temperature, top_k, top_p)
    weights = (logits / temperature).softmax(-1)
    order = weights.argsort(descending=True).tolist()[:top_k]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += (weights[i] / total).item()
    assert set(got.nonzero().flatten().tolist()) == set(kept)
    torch.testing.assert_close(got[kept], weights[kept] / weights[kept].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1e-46, None, None), (1e-39, None, None), (1e-6, None, None), (5e-324, 5, 0.5),
    (1.0, None, 1e-320), (1.0, None, 5e-324), (1.0, 1, None), (1e4, 1, 1e-46),
])  # fmt: skip
def test_tiny_numbers_leave_the_best_token(dtype, temperature, top_k, top_p):
    logits = torch.tensor([0.5, 3.0, float("-inf"), 2.999, -80.0], dtype=dtype)
    assert probabilities(logits, temperature, top_k, top_p).tolist() == [0, 1, 0, 0, 0]


def test_of_equal_logits_the_greedy_one_is_the_best():
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0] * 20)
    for top_k, top_p, kept in ((1, None, 1), (2, None, 2), (None, 1e-300, 1), (None, 1e-3, 1), (500, None, 100)):
        chances = probabilities(logits, 1.0, top_k, top_p)
        best = logits.sort(descending=True, stable=True).indices[:kept]
        assert set(chances.nonzero().flatten().tolist()) == set(best.tolist())
    chooser = Chooser(Sampling(temperature=1e-40), [], torch.device("cpu"))
    assert [chooser(logits).item() for _ in range(9)] == [1] * 9


def test_a_huge_temperature_gives_every_token_its_chance():
    logits = torch.tensor([0.0, float("-inf"), 80.0, -80.0])
    third = torch.tensor([1.0, 0.0, 1.0, 1.0]) / 3
    torch.testing.assert_close(probabilities(logits, 1e300), third)
    torch.testing.assert_close(probabilities(logits, float("inf"), 3, 1.0), third)


def test_sampling_is_repeatable_and_depends_on_the_seed(demo):
    def text(seed):
        return demo.ask(QUESTION, [PICTURE], temperature=5.0, seed=seed, max_new_tokens=12)

    state = torch.get_rng_state()
    texts = [text(1), text(1), text(2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.get_rng_state())  # own generator; the global one is untouched


def test_padding_vocabulary_and_image_ids_are_never_said(demo):
    generation = Generation(demo, QUESTION, [PICTURE])
    never = generation.checkpoint.never_ids
    assert demo.config.image_token_index in never and demo.tokenizer.added["<pad>"] in never
    hot = finished(demo, QUESTION, [PICTURE], Sampling(temperature=1e4, max_new_tokens=200))
    assert len(set(hot.token_ids)) > 60 and not set(hot.token_ids) & set(never)


# ---------------------------------------------------------------- stopping


def test_length_and_stop_are_told_apart(demo):
    short, whole = (finished(demo, QUESTION, [PICTURE], Sampling(max_new_tokens=n)) for n in (5, 200))
    assert (short.finish_reason, len(short.token_ids), len(short.timing["steps"])) == ("length", 5, 4)
    assert whole.finish_reason == "stop" and demo.stop_ids[0] not in whole.token_ids
    assert whole.token_ids[:5] == short.token_ids and whole.text.startswith(short.text)


@pytest.mark.parametrize("stop", [" objects", "s. A", "ects."])
def test_a_stop_string_ends_the_answer_before_it(demo, stop):
    whole = demo.ask(QUESTION, [PICTURE])
    assert stop in whole
    generation = finished(demo, QUESTION, [PICTURE], Sampling(stop=(stop, "never said")))
    assert generation.text == whole[: whole.index(stop)] and generation.finish_reason == "stop"


def test_the_context_ends_the_answer(demo):
    text = dataclasses.replace(demo.config.text_config, max_position_embeddings=280)
    small = dataclasses.replace(demo, config=dataclasses.replace(demo.config, text_config=text))
    generation = finished(small, QUESTION, [PICTURE], Sampling(max_new_tokens=500))
    assert 0 < generation.context_left == len(generation.token_ids) == 280 - generation.prompt_tokens
    assert generation.finish_reason == "length"
    with pytest.raises(InputError, match="280"):
        Generation(small, "circle " * 100, [PICTURE])


WRONG = [
    {"template": "llama3"}, {"template": None}, {"image_mode": "stretch"}, {"image_mode": 3}, {"system": "<image>"},
    {"system": 3}, {"anyres_order": "up"}, {"backend": "cuda"}, {"backend": None}, {"sampling": 64}, {"sampling": {}},
    {"prompt": None}, {"prompt": b"What?"}, {"prompt": ["What?"]}, {"prompt": "half a pair: \ud800"},
    {"images": 3}, {"images": [[PICTURE]]}, {"images": {PICTURE: 1}}, {"images": (p for p in [PICTURE])},
    {"images": [None]}, {"checkpoint": str(DEMO)}, {"checkpoint": None},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{next(iter(wrong))} {next(iter(wrong.values()))!a:.20}")
def test_what_the_library_does_not_know_is_refused_at_once(demo, wrong):
    with pytest.raises(InputError, match="; ") as error:
        Generation(**{"checkpoint": demo, "prompt": QUESTION, "images": [PICTURE], **wrong})
    assert "\n" not in str(error.value)


PICTURES = {
    "name": PICTURE, "path": Path(PICTURE), "picture": Image.open(PICTURE), "tuple": (PICTURE,),
    "bytes": Path(PICTURE).read_bytes(), "buffer": io.BytesIO(Path(PICTURE).read_bytes()),
}  # fmt: skip


@pytest.mark.parametrize("what", PICTURES)
def test_one_picture_needs_no_list(demo, what):
    one = Generation(demo, QUESTION, PICTURES[what])
    assert len(one.images) == 1 and torch.equal(one.pixels[0], Generation(demo, QUESTION, [PICTURE]).pixels[0])
    if what == "name":
        assert demo.ask(QUESTION, PICTURE) == demo.ask(QUESTION, [PICTURE])


def test_what_was_done_to_a_picture_is_noted(demo):
    wide = Image.new("RGBA", (300, 100), (255, 0, 0, 0))
    loss, white = "removes 67 %", "on white"
    wide.putpixel((0, 0), (255, 0, 0, 255))
    for mode, lines in (("crop", [white, loss]), ("pad", [white])):
        notes = Generation(demo, QUESTION, [PICTURE, wide], image_mode=mode).notes
        assert len(notes) == len(lines) and all(part in note for part, note in zip(lines, notes, strict=True))


@pytest.mark.parametrize(
    ("given", "stop"),
    [("four", ("four",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ({"a"}, ("a",)), ((), ()), (None, ())],
)
def test_a_stop_text_is_one_text(given, stop):
    assert Sampling(stop=given).stop == stop


NUMBERS = {  # of no use
    "max_new_tokens": [0, -1, True, 2.0, "5", None],
    "temperature": [-1, -1e-9, math.nan, math.inf, 1e5, "hot", None, True],
    "top_p": [0.0, -0.1, 1.1, math.nan, "0.9", True],
    "top_k": [0, -5, 2.5, True, "5"],
    "seed": [-1, 2**64, 1.5, None, True, "1"],
    "stop": ["", ["a", ""], b"a", [1], 5],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_sampling_without_sense_is_refused(name, value):
    with pytest.raises(InputError, match=f"^{name} is .*; give "):
        Sampling(**{name: value})


def test_sampling_at_its_limits_is_taken():
    for values in ((1, 0, 1, 1e-320, 0), (10**9, 1e4, 10**6, 1, 2**64 - 1)):
        assert dataclasses.astuple(Sampling(*values))[:5] == values


def test_a_checkpoint_without_weights_says_so():
    with pytest.raises(InputError, match="no weights yet; "):
        "".join(Generation(open_checkpoint(DEMO), QUESTION, PICTURE))


def test_a_backend_that_cannot_work_is_refused_where_it_is_asked_for(demo, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="backend 'triton': "):
        "".join(Generation(demo, QUESTION, PICTURE, backend="triton"))


def test_answers_may_be_written_side_by_side_and_again(demo):
    asked = [(QUESTION, PICTURE), ("How many objects are there?", PICTURE)]
    sampling = Sampling(20, temperature=1.0)
    alone = [finished(demo, *question, sampling).text for question in asked]
    pair = [Generation(demo, *question, sampling) for question in asked]
    for _ in range(2):
        list(zip_longest(*pair))  # a piece of each in turn
        assert [generation.text for generation in pair] == alone


def test_one_answer_cannot_be_written_twice_at_once(demo):
    generation = Generation(demo, QUESTION, PICTURE, Sampling(20))
    first, second = iter(generation), iter(generation)
    next(first), next(second)
    with pytest.raises(RuntimeError, match="restarted this answer"):
        list(first)
    assert "".join(list(second)) and generation.text == demo.ask(QUESTION, PICTURE, max_new_tokens=20)


class Letters:
    """A detokenizer whose tokens are strings."""

    def push(self, token):
        return token

    def flush(self):
        return "|"


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=2))
@settings(max_examples=200, deadline=None)
def test_stop_strings_are_found_however_the_text_arrives(text, stop):
    writer, out = Writer(Letters(), stop), ""
    for letter in text:
        out += writer.push(letter)
        if writer.stopped:
            break
    out += writer.flush()
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert out == text + "|"
    else:  # the stop text completed first; of several, the one that starts first
        seen = text[: min(ends)]
        assert out == seen[: min(seen.find(s) for s in stop if s in seen)]


# ---------------------------------------------------------------- pictures in the prompt


def test_spans_are_where_the_pictures_are(demo):
    generation = finished(demo, "First <image> and then <image> what?", [PICTURE, PICTURE], Sampling(max_new_tokens=1))
    (a, b), (c, d) = generation.spans
    assert b - a == d - c == 256 and b < c and d < generation.prompt_tokens == len(generation.ids) + 2 * 255
    assert a == generation.ids.index(demo.config.image_token_index)


def test_pictures_go_to_their_placeholders_in_order(demo):
    tokens = torch.stack((torch.full((256, 192), 1.0), torch.full((256, 192), 2.0)))
    image = demo.config.image_token_index
    x, spans = demo.model.splice([1, image, 5, image, 6], tokens)
    assert x.shape == (3 + 512, 192)
    assert [x[a:b].unique().tolist() for a, b in spans] == [[1.0], [2.0]]
    embed = demo.model.language_model.model.embed_tokens.weight
    assert torch.equal(x[[0, 257, -1]], embed[[1, 5, 6]])


def test_nan_is_an_error_not_an_answer(demo):
    broken = load(DEMO, "fp32")
    broken.model.language_model.model.norm.weight = torch.nn.Parameter(torch.full((192,), float("nan")))
    with pytest.raises(RuntimeError, match="NaN"):
        list(Generation(broken, QUESTION, [PICTURE]))


def test_breaking_off_keeps_the_text(demo):
    generation = Generation(demo, QUESTION, [PICTURE])
    pieces = iter(generation)
    text = next(pieces) + next(pieces)
    pieces.close()
    assert generation.finish_reason == "interrupted" and generation.text == text
