"""The cache in 8 bits under a model: logits, memory, batches, turns, and what callers see."""

import copy

import pytest
import torch

from kernels import dequantised, quantise
from model import Generation, InputError, Sampling, load
from model.batch import join, keep_sequences
from model.cache import KV_DTYPES, RaggedCache
from model.config import TextConfig
from model.generate import plain_step
from model.llama import Llama, rope_table
from model.pruning import make_method
from tests.oracle import poison, small_llama
from tests.paths import DEMO, DEMO_PICTURE
from tests.seeds import python_random
from tests.test_cache import LAYERS, dense_with_masks, live_bytes, random_keep
from tests.test_out_of_memory import check_whole, failures

pytestmark = pytest.mark.usefixtures("frequent_repacks")

KINDS = ["int8", "fp8"]
BOTH = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, "fp32", "cpu")


# ---------------------------------------------------------------- the cache under a small model


def dense_with_codes(model, x, keep, codes, turn):
    """`dense_with_masks`, where rows after the prompt see quantised keys and values. They come in turns of `turn`
    tokens, which see each other exactly; a single token sees itself quantised."""
    t, prompt, d = len(x), keep.shape[2], model.config.head_dim
    rope = rope_table(torch.arange(t), model.config, x.dtype)
    row, column = torch.arange(t)[:, None], torch.arange(t)
    exact = (row < prompt) | ((row - prompt) // turn == (column - prompt) // turn) & (turn > 1)
    for layer, kept in zip(model.model.layers, keep, strict=True):
        q, k, v = (y.transpose(0, 1) for y in layer.self_attn.project(layer.input_layernorm(x), rope))  # (H, T, D)
        seen = torch.cat((kept, torch.ones(len(kept), t - prompt, dtype=torch.bool)), 1)[:, None]
        k8, v8 = (dequantised(*quantise(y, codes), x.dtype) for y in (k, v))
        k, v, k8, v8, seen = (y.repeat_interleave(len(q) // len(kept), 0) for y in (k, v, k8, v8, seen))
        scores = d**-0.5 * torch.where(exact, q @ k.mT, q @ k8.mT)
        weights = scores.masked_fill((column > row) | (row >= prompt) & ~seen, float("-inf")).softmax(-1)
        y = (weights * exact) @ v + (weights * ~exact) @ v8
        x = x + layer.self_attn.o_proj(y.transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x)


@BOTH
@pytest.mark.parametrize("turn", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
def test_pruned_decoding_is_dense_attention_over_dequantised_rows(backend, kind, turn, heads, kv_heads):
    """Slack 2: the arenas move along the way. A rounding error may turn a code into its neighbour, hence a third."""
    model, rng = small_llama(heads, kv_heads).to(torch.get_default_device()), python_random(turn)
    x, keep = torch.randn(9 + 6, 32), random_keep(rng, kv_heads, 9)
    cache = RaggedCache(LAYERS, 2, backend, kind)
    states = [model.prefill(x[None, :9], cache, prune=lambda layer, *_: (keep[layer], None))[0]]
    for t in range(9, len(x), turn):
        poison(cache)
        states.append(model.decode(x[None, t] if turn == 1 else x[None, t : t + turn], cache).view(turn, -1))
    got, twin = torch.cat(states).double(), copy.deepcopy(model).double()
    coded = dense_with_codes(twin, x.double(), keep, KV_DTYPES[kind], turn)
    plain = dense_with_masks(twin, x.double(), keep)
    assert (got[:9] - plain[:9]).abs().max() < 1e-3  # the prefill attends to exact rows
    assert (got - coded)[9:].abs().max() < (coded - plain)[9:].abs().max() / 3
    assert cache.arenas(0)[0].dtype == KV_DTYPES[kind] and cache.kv_len.tolist() == (keep.sum(2) + 6).tolist()


def rows_of(cache, layer=1):
    """The taken rows of each segment of a layer, dequantised."""
    k, v, k_scale, v_scale = cache.arenas(layer)
    rows = torch.cat((dequantised(k, k_scale, torch.float32), dequantised(v, v_scale, torch.float32)), 1)
    return [rows[a : a + n] for a, n in zip(cache.kv_start[layer].tolist(), cache.kv_len[layer].tolist(), strict=True)]


@BOTH
def test_joined_moved_and_selected_rows_keep_their_scales(backend, kind):
    model, rng = small_llama().to(torch.get_default_device()), python_random(2)
    caches = []
    for prompt in (5, 1, 12):
        keep = random_keep(rng, 2, prompt)
        caches.append(RaggedCache(LAYERS, 3, backend, kind))
        model.prefill(torch.randn(1, prompt, 32), caches[-1], prune=lambda layer, *_, keep=keep: (keep[layer], None))
    wanted = [row for cache in caches for row in rows_of(cache)]
    reserved = sum(cache.nbytes_reserved for cache in caches)
    cache = join(caches)
    assert cache.nbytes_reserved == reserved and not any(c.nbytes_reserved for c in caches)
    for act, stay in (
        (lambda: None, range(6)),
        (lambda: cache.repack([7, 2, 0]), range(6)),
        (lambda: keep_sequences(cache, [0, 2]), [0, 1, 4, 5]),
    ):
        act()
        poison(cache)
        assert all(torch.equal(a, wanted[s]) for a, s in zip(rows_of(cache), stay, strict=True))
    cache.repack([1, 1])
    poison(cache)
    assert all(torch.equal(a, wanted[s]) for a, s in zip(rows_of(cache), [0, 1, 4, 5], strict=True))
    taken = int(cache.kv_len.sum())
    assert cache.nbytes_held == taken * 2 * (8 + 2) and cache.rectangle(0) is None  # D codes and a scale
    assert cache.nbytes_reserved == (taken + 1 * LAYERS * 4) * 2 * (8 + 2)


@BOTH
def test_dropped_rows_take_their_scales_with_them(backend, kind):
    model = small_llama().to(torch.get_default_device())
    cache, stays = RaggedCache(LAYERS, 3, backend, kind), torch.rand(2, 9) < 0.5
    model.prefill(torch.randn(1, 9, 32), cache)
    wanted = [rows[own] for rows, own in zip(rows_of(cache), stays, strict=True)]
    cache.drop(1, stays.flatten())
    poison(cache)
    assert all(map(torch.equal, rows_of(cache), wanted)) and cache.kv_len[1].tolist() == stays.sum(1).tolist()
    assert cache.nbytes_reserved == (2 * 2 * 12 + int(stays.sum()) + 2 * 3) * 2 * (8 + 2)  # D codes and a scale


def test_a_repack_that_runs_out_of_memory_leaves_codes_and_scales_together():
    model, keep = small_llama(), torch.rand(LAYERS, 4, 7) < 0.6
    cache = RaggedCache(LAYERS, 2, "torch", "int8")
    model.prefill(torch.randn(2, 7, 32), cache, prune=lambda layer, *_: (keep[layer], None))
    wanted = [rows_of(cache, layer) for layer in range(LAYERS)]
    for broken in failures(cache, lambda cache: cache.repack([9, 9])):
        check_whole(broken)
        poison(broken)
        for layer, rows in enumerate(wanted):
            assert all(torch.equal(a, b) for a, b in zip(rows_of(broken, layer), rows, strict=True))


# ---------------------------------------------------------------- error of the logits


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.16), ("fp8", 0.8)])
@pytest.mark.parametrize("prune", [None, "plphp"])
@torch.inference_mode()
def test_logits_of_the_demo_stay_within_the_bound(demo, kind, bound, prune):
    """The demo's longest answer, token by token; its logits have a standard deviation of 4."""
    asked = demo, "Describe the picture.", [DEMO_PICTURE], Sampling(100)
    prune = prune and make_method(prune, 0.3)
    plain = Generation(*asked, prune=prune)
    "".join(plain)
    logits = []
    for generation in (Generation(*asked, prune=prune), Generation(*asked, prune=prune, kv_dtype=kind)):
        logits.append([generation.prefill()])
        step = plain_step(demo.model.language_model, generation.cache)
        logits[-1] += [step(torch.tensor([token]))[0] for token in plain.token_ids]
    error = (torch.stack(logits[0]) - torch.stack(logits[1])).abs().amax(1)
    assert len(error) > 50 and error[0] == 0  # the first token is of the prefill
    assert bound / 20 < error.max() < bound


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.07), ("fp8", 0.3)])
@pytest.mark.parametrize("kv_heads", [32, 8])
def test_logits_of_random_layers_with_the_heads_of_a_7b_model_stay_within_the_bound(kind, bound, kv_heads):
    """32 query heads of 128 channels; logits with a standard deviation of 1. 8 bits take 0.508 of 16 bits."""
    config = TextConfig(
        vocab_size=97, hidden_size=256, intermediate_size=64, num_hidden_layers=3, num_attention_heads=32,
        num_key_value_heads=kv_heads, head_dim=128,
    )  # fmt: skip
    model = Llama(config).requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim > 1:  # 1.5: attention is neither uniform nor on one token
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * (1.5 if "q_proj" in name or "k_proj" in name else 1))
    x, new, logits = torch.randn(1, 320, 256), torch.randn(12, 1, 256), []
    for dtype in ("auto", kind):
        cache = RaggedCache(3, 64, "torch", dtype)
        model.prefill(x, cache)
        logits.append(torch.cat([model.logits(model.decode(row, cache)) for row in new]))
    assert bound / 20 < (logits[0] - logits[1]).abs().max() < bound
    rows = 3 * kv_heads * (320 + 12)
    assert cache.nbytes_held == rows * 2 * (128 + 2) < 0.55 * rows * 2 * 128 * 2


# ---------------------------------------------------------------- memory, turns, callers


@BOTH
@pytest.mark.parametrize("prune", [None, "random"])
def test_after_prefill_no_copy_in_more_bits_lives(demo, kind, prune):
    asked = demo, "Describe the picture.", [DEMO_PICTURE], Sampling(max_new_tokens=64)
    generation = Generation(*asked, prune=prune and make_method(prune, 0.3), kv_dtype=kind)
    _, before = live_bytes()
    text = iter(generation)
    next(text)
    after, _ = live_bytes(apart=before)
    cache = generation.cache
    assert abs(after - cache.nbytes_reserved) < 0.03 * cache.nbytes_reserved  # tables and plans
    row = 2 * (32 + 2)
    kept = round(0.3 * 256 if prune else 256) + generation.prompt_tokens - 256
    assert generation.bytes_held == 6 * 4 * kept * row and cache.nbytes_reserved == 6 * 4 * (kept + 64) * row
    assert row <= 0.55 * 2 * 32 * 2  # of bf16


def test_a_turn_goes_on_in_the_cache_of_the_same_type(demo):
    first = Generation(demo, "How many objects are there?", [DEMO_PICTURE], kv_dtype="int8")
    "".join(first)
    cache = first.cache
    plain = Generation(demo, "What colour is the cross?", before=copy.copy(first), kv_dtype="auto")
    assert "".join(plain) == "The cross is red." and plain.prefilled == plain.prompt_tokens
    second = Generation(demo, "What colour is the cross?", before=first, kv_dtype="int8")
    assert "".join(second) == "The cross is red." and second.cache is cache and second.prefilled < 30
    assert plain.cache.dtype == "auto" and second.cache.dtype == "int8"


def test_an_unknown_type_and_one_the_gpu_lacks_are_refused(demo, monkeypatch):
    with pytest.raises(InputError, match=r"kv_dtype 'int4' is unknown; use auto, int8, fp8"):
        Generation(demo, "What?", kv_dtype="int4")
    for backend in ("auto", "triton"):
        old = Generation(demo, "What?", kv_dtype="fp8", backend=backend)
        monkeypatch.setattr("model.generate.has_e4m3", lambda device: False)
        with pytest.raises(InputError, match="has no fp8 .*; use kv_dtype int8"):
            _ = old.backend
    assert Generation(demo, "What?", kv_dtype="fp8", backend="torch").backend == "torch"
    assert Generation(demo, "What?", kv_dtype="int8").backend == "torch"
