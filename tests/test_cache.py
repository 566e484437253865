"""The ragged cache under a model: pack, append, decode, extend, repack, join against a dense model with masks.

The oracle runs the whole sequence densely, layer by layer, with a mask that hides the dropped tokens of each KV head
from every row after the prompt. It shares no code with the cache.
"""

import copy
import gc
import signal
import weakref
from itertools import pairwise

import pytest
import torch

from model import Generation, Sampling, llama, load
from model.batch import join, keep_sequences
from model.cache import MORE, RaggedCache
from model.llama import rope_table
from model.pruning import make_method
from tests.oracle import ULP, assert_as_exact, poison, reordered, small_llama
from tests.paths import DEMO, DEMO_PICTURE
from tests.seeds import python_random
from tests.sizes import Sizes

LAYERS = 3  # of small_llama
pytestmark = pytest.mark.usefixtures("frequent_repacks")


@pytest.fixture
def demo(backend):
    return load(DEMO, "fp32", torch.get_default_device())


def random_keep(rng, kv_heads, tokens):
    """keep (L, Hkv, T); heads keep nothing, one token, everything, or some."""
    keep = torch.zeros(LAYERS, kv_heads, tokens, dtype=torch.bool)
    for row in keep.flatten(0, 1):
        row[rng.sample(range(tokens), rng.choice([0, 1, tokens, rng.randint(0, tokens)]))] = True
    return keep


def dense_with_masks(model, x, keep):
    """Hidden states of x (T, C), where rows after the prompt see only keep (L, Hkv, P) of it."""
    t, prompt = len(x), keep.shape[2]
    heads = model.config.num_attention_heads
    rope = rope_table(torch.arange(t), model.config, x.dtype)
    row, column = torch.arange(t)[:, None], torch.arange(t)
    x = x[None]
    for layer, kept in zip(model.model.layers, keep, strict=True):
        seen = torch.cat((kept, torch.ones(len(kept), t - prompt, dtype=torch.bool)), 1)
        seen = seen.repeat_interleave(heads // len(kept), 0)[:, None]  # (Hq, 1, T)
        x, *_ = layer.prefill(x, rope, ((column <= row) & ((row < prompt) | seen))[None])
    return model.model.norm(x)[0]


def prefilled(model, x, keep, slack, backend):
    """A cache of one sequence after its prompt x (P, C)."""
    cache = RaggedCache(LAYERS, slack, backend)
    hidden = model.prefill(x[None], cache, prune=lambda layer, *_: (keep[layer], None))
    poison(cache)
    return cache, hidden[0]


def check(model, x, keep, got):
    """Compare hidden states (T, C) with the dense model; keep: (L, Hkv, P), or None for an unpruned cache."""
    keep = torch.ones(LAYERS, model.config.num_key_value_heads, 1, dtype=torch.bool) if keep is None else keep
    exact = dense_with_masks(copy.deepcopy(model).double(), x.double(), keep)
    plain = []
    for channels in ([], [-1]):
        for inner in (False, True):
            twin = reordered(model, bool(channels), inner)
            # the next numbers: how far that carries
            other = (x * (1 + ULP[x.dtype] * torch.randn(x.shape).sign())).to(x.dtype)
            plain += [dense_with_masks(twin, y.flip(channels), keep).flip(channels) for y in (x, other)]
    assert_as_exact(got, torch.stack(plain), exact, x.dtype)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1), (8, 1), (16, 2)])
@pytest.mark.parametrize("slack", [1, 2, 30])
def test_pruned_decoding_is_dense_attention_with_the_keep_mask(heads, kv_heads, slack, backend):
    """With slack 1 and 2, the cache moves to larger arenas along the way."""
    model, rng = small_llama(heads, kv_heads), python_random(heads + slack)
    for prompt in (1, 9):
        x, keep = torch.randn(prompt + 7, 32), random_keep(rng, kv_heads, prompt)
        cache, hidden = prefilled(model, x[:prompt], keep, slack, backend)
        states = [hidden]
        for t in range(prompt, len(x)):
            states.append(model.decode(x[None, t], cache))
            poison(cache)
        check(model, x, keep, torch.cat(states))
        assert cache.pos.tolist() == [len(x)]
        assert cache.kv_len.tolist() == (keep.sum(2) + 7).tolist()


def test_the_position_is_not_the_length(backend):
    """The middle of the prompt is dropped in every layer; later tokens keep their positions."""
    model, x = small_llama(), torch.randn(24, 32)
    keep = torch.ones(LAYERS, 2, 20, dtype=torch.bool)
    keep[:, :, 3:17] = False
    cache, hidden = prefilled(model, x[:20], keep, 8, backend)
    assert cache.kv_len.unique().tolist() == [6] and cache.pos.tolist() == [20]
    check(model, x, keep, torch.cat((hidden, *(model.decode(x[None, t], cache) for t in range(20, 24)))))


def test_sequences_of_different_lengths_share_the_arenas(backend):
    model, rng = small_llama(), python_random(1)
    prompts = [5, 1, 12]
    xs = [torch.randn(p + 9, 32) for p in prompts]
    keeps = [random_keep(rng, 2, p) for p in prompts]
    pairs = [prefilled(model, x[:p], k, 3, backend) for x, p, k in zip(xs, prompts, keeps, strict=True)]
    alone, states = [c for c, _ in pairs], [[hidden] for _, hidden in pairs]
    reserved = sum(c.nbytes_reserved for c in alone)
    cache = join(alone)
    assert cache.nbytes_reserved == reserved and all(k is None for c in alone for k in (*c.k, *c.v))
    assert cache.nbytes_held > 0 and all(c.nbytes_held == 0 for c in alone)
    live = [0, 1, 2]
    for step in range(9):  # repacked at 3, 6 and 9; the second sequence leaves after 4 tokens
        if step == 4:
            live = [0, 2]
            keep_sequences(cache, live)
            cache.repack(cache.rooms)
        new = model.decode(torch.stack([xs[i][prompts[i] + step] for i in live]), cache)
        poison(cache)
        for sequence, row in zip(live, new, strict=True):
            states[sequence].append(row[None])
    assert cache.pos.tolist() == [14, 21]
    for x, keep, rows in zip(xs, keeps, states, strict=True):
        got = torch.cat(rows)
        check(model, x[: len(got)], keep, got)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("slack", "block"), [(1, 512), (40, 512), (1, 2), (40, 4)])
def test_two_turns_through_the_cache_are_one_long_prompt(kv_heads, slack, block, backend, monkeypatch):
    """block: tokens of a turn that are processed together."""
    monkeypatch.setattr(llama, "BLOCK", block)
    model, x = small_llama(kv_heads=kv_heads), torch.randn(2, 21, 32)
    cache = RaggedCache(LAYERS, slack, backend=backend)
    states = [model.prefill(x[:, :8], cache), model.decode(x[:, 8], cache)[:, None]]
    states += [model.extend(x[:, 9:15], cache), model.extend(x[:, 15:16], cache)]
    states += [model.decode(x[:, t], cache)[:, None] for t in range(16, 21)]
    for got, rows in zip(torch.cat(states, 1), x, strict=True):
        check(model, rows, None, got)
    assert cache.pos.tolist() == [21, 21] and cache.kv_len.unique().tolist() == [21]


def test_a_long_turn_stores_no_matrix_of_its_length_squared():
    model, cache = small_llama(), RaggedCache(LAYERS, backend="torch")
    model.prefill(torch.randn(1, 20, 32), cache)
    with Sizes() as sizes:
        model.extend(torch.randn(1, 2900, 32), cache)
    assert sizes.largest < 2900**2 and cache.pos.item() == 2920


@pytest.mark.parametrize("block", [512, 2])
def test_a_new_turn_after_another_sequence_has_left(backend, block, monkeypatch):
    monkeypatch.setattr(llama, "BLOCK", block)
    model, x = small_llama(), torch.randn(2, 14, 32)
    cache = RaggedCache(LAYERS, slack=2, backend=backend)
    model.prefill(x[:, :6], cache)
    keep_sequences(cache, [1])
    cache.repack([1])
    states = [model.prefill(x[:, :6])[1], model.extend(x[1:, 6:11], cache)[0], model.decode(x[1:, 11], cache)]
    poison(cache)
    check(model, x[1, :12], None, torch.cat(states))
    assert cache.pos.tolist() == [12] and cache.kv_len[0].tolist() == [12, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_turn_sees_what_was_kept_and_itself(dtype, backend):
    model, rng = small_llama().to(dtype), python_random(5)
    x, keep = torch.randn(25, 32).to(dtype), random_keep(rng, 2, 12)
    keep[0], keep[1, 0] = False, True  # a layer that kept nothing, a head that kept all
    cache, hidden = prefilled(model, x[:12], keep, 3, backend)
    turn = model.extend(x[None, 12:20], cache)[0]
    poison(cache)
    check(model, x, keep, torch.cat((hidden, turn, *(model.decode(x[None, t], cache) for t in range(20, 25)))))


@pytest.mark.parametrize(
    ("backend", "limit", "stop", "unfed"),
    [("torch", 12, (), 1), ("torch", 200, (), 0), ("torch", 200, (" objects",), 1), ("triton", 3, (), 1)],
    ids=["length", "stop id", "text", "triton"],
    indirect=["backend"],
)
def test_a_new_turn_of_the_demo_equals_asking_all_at_once(demo, backend, limit, stop, unfed):
    """For every way an answer can end; with a second picture in the second turn, except in the slow interpreter."""
    sampling = Sampling(max_new_tokens=limit, stop=stop)
    first = Generation(demo, "Describe the picture.", [DEMO_PICTURE], sampling, backend=backend)
    "".join(first)
    assert first.finish_reason == ("length" if limit < 200 else "stop") and len(first.unfed) == unfed
    more = [] if backend == "triton" else first.pixels
    second = [*first.unfed, *demo.tokenizer.encode("</s>USER: ")[1:], *[demo.config.image_token_index] * len(more)]
    second += demo.tokenizer.encode("How many objects are there? ASSISTANT:")[1:]
    pixels = [picture.to(demo.device) for picture in (*first.pixels, *more)]
    language, pictures = demo.model.language_model, demo.model.encode_images(torch.stack(pixels))
    with torch.inference_mode():
        x, _ = demo.model.splice(second, pictures[len(first.pixels) :])
        logits = language.logits(language.extend(x[None], first.cache)[0, -1])
    ids = [*first.ids, *first.token_ids[: len(first.token_ids) - unfed], *second]
    with torch.inference_mode():
        x, _ = demo.model.splice(ids, pictures)
        whole = language.logits(language.prefill(x[None])[0, -1])
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert first.cache.pos.item() == len(x) and first.cache.kv_len.unique().tolist() == [len(x)]


def test_a_prefill_that_was_broken_off_has_no_cache(demo):
    first = Generation(demo, "What?", [DEMO_PICTURE], Sampling(max_new_tokens=2))
    "".join(first)
    last = demo.model.language_model.model.layers[-1].mlp
    ctrl_c = last.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        "".join(first)
    ctrl_c.remove()
    assert first.cache is None and first.unfed == [] and not first.goes_on


@pytest.mark.parametrize("slack", [2, 40])
def test_a_step_that_is_broken_off_leaves_the_cache_as_it_was(backend, slack):
    model, x = small_llama(), torch.randn(2, 16, 32)
    cache = RaggedCache(LAYERS, slack, backend=backend)
    states = [model.prefill(x[:, :8], cache)]
    last = model.model.layers[-1].mlp
    ctrl_c = last.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    for step in (lambda: model.decode(x[:, 8], cache), lambda: model.extend(x[:, 8:13], cache)):
        with pytest.raises(KeyboardInterrupt):
            step()
        assert cache.pos.tolist() == [8, 8] and cache.kv_len.unique().tolist() == [8]
    ctrl_c.remove()
    states += [model.extend(x[:, 8:15], cache), model.decode(x[:, 15], cache)[:, None]]
    for got, rows in zip(torch.cat(states, 1), x, strict=True):
        check(model, rows, None, got)


@torch.no_grad()
def test_a_long_answer_moves_the_cache_a_few_times(backend, monkeypatch):
    """Pruned or not; the fewer tokens a cache keeps, the fewer bytes it reserves, at every step."""
    moves, reserved = [], []
    repack = RaggedCache.repack
    monkeypatch.setattr("model.cache.MORE", MORE)
    monkeypatch.setattr(RaggedCache, "repack", lambda cache, rooms: (moves.append(rooms), repack(cache, rooms)))
    for retention in (1.0, 0.99, 0.95, 0.8, 0.3):
        cache, moves[:] = RaggedCache(LAYERS, backend=backend), []
        k, v = torch.randn(2, 1, 2, 600, 8)
        for layer in range(LAYERS):
            cache.pack(layer, k, v, torch.rand(2, 600).argsort(1) < round(600 * retention))
        sizes = []
        for _ in range(1000):
            cache.grow()
            sizes.append(cache.nbytes_reserved)
        assert len(moves) == 3 and cache.kv_len.unique().tolist() == [round(600 * retention) + 1000]
        reserved.append(torch.tensor(sizes))
    assert all((less < more).all() for more, less in pairwise(reserved))


def test_misuse_is_refused():
    model, cache = small_llama(), RaggedCache(LAYERS)
    assert cache.nbytes_held == cache.nbytes_reserved == 0
    model.prefill(torch.randn(1, 3, 32), cache)
    with pytest.raises(ValueError, match="already holds a prompt"):
        model.prefill(torch.randn(1, 3, 32), cache)
    with pytest.raises(ValueError, match="no caches"):
        join([])
    with pytest.raises(ValueError, match=f"{llama.BLOCK + 1} new tokens"):
        model.decode(torch.randn(1, llama.BLOCK + 1, 32), cache)


def test_a_gradient_reaches_q_and_v_or_is_refused(backend):
    """A prompt is packed without gradients; then a step asks for them."""
    cache = RaggedCache(1, backend=backend)
    with torch.no_grad():
        cache.pack(0, *torch.randn(2, 1, 2, 5, 32))
        cache.grow()
    q, v = torch.randn(1, 4, 32, requires_grad=True), torch.randn(1, 2, 32, requires_grad=True)
    for asked in ((q, v), (q, v.detach()), (q.detach(), v)):
        if backend == "triton":
            with pytest.raises(ValueError, match="requires a gradient"):
                cache.append_attend(0, asked[0], torch.randn(1, 2, 32), asked[1])
        else:
            cache.k[0], cache.v[0] = cache.k[0].detach(), cache.v[0].detach()  # without the last step's graph
            cache.append_attend(0, asked[0], torch.randn(1, 2, 32), asked[1]).sum().backward()
            assert all((x.grad is not None) == x.requires_grad for x in asked)
            q.grad = v.grad = None
    if backend == "triton":
        with pytest.raises(ValueError, match="requires a gradient"):
            cache.attend(0, q)


def drops(rng, cache, layer, share=0.5):
    """Drop about this share of a layer's taken slots -> one bool for each, segment after segment."""
    taken = int(cache.kv_len[layer].sum())
    stays = torch.tensor([rng.random() >= share for _ in range(taken)], dtype=torch.bool)
    cache.drop(layer, stays)
    return stays


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("slack", [1, 30])
def test_what_a_layer_drops_after_the_prefill_is_as_if_it_was_never_kept(heads, kv_heads, slack, backend):
    """Another share in each layer: nothing, half and all. Later steps move the arenas with slack 1."""
    model, rng = small_llama(heads, kv_heads), python_random(heads)
    x, keep = torch.randn(16, 32), random_keep(rng, kv_heads, 9)
    cache, hidden = prefilled(model, x[:9], keep, slack, backend)
    for layer, share in enumerate((0.5, 0.0, 1.0)):
        before = cache.kv_len.clone()
        keep[layer][keep[layer].clone()] = drops(rng, cache, layer, share)
        poison(cache)
        assert torch.equal(cache.kv_len, before.index_copy(0, torch.tensor([layer]), keep[layer].sum(1)[None].int()))
    assert cache.kv_len.tolist() == keep.sum(2).tolist() and (cache.kv_cap - cache.kv_len == slack).all()
    states = [hidden, model.extend(x[None, 9:12], cache)[0]]
    states += [model.decode(x[None, t], cache) for t in range(12, 16)]
    poison(cache)
    check(model, x, keep, torch.cat(states))
    assert cache.pos.tolist() == [16]


def test_sequences_of_a_batch_drop_their_own_tokens(backend):
    """Also with other numbers of free slots in each sequence."""
    model, rng, prompts = small_llama(), python_random(3), (5, 9)
    xs, keeps = [torch.randn(p + 4, 32) for p in prompts], [random_keep(rng, 2, p) for p in prompts]
    pairs = [
        prefilled(model, x[:p], keep, slack, backend)
        for x, p, keep, slack in zip(xs, prompts, keeps, (2, 5), strict=True)
    ]
    cache, room = join([cache for cache, _ in pairs]), None
    for layer in range(LAYERS):
        room = cache.kv_cap[layer] - cache.kv_len[layer]
        stays, begin = drops(rng, cache, layer), 0
        assert torch.equal(cache.kv_cap[layer] - cache.kv_len[layer], room)
        for keep in keeps:
            count = int(keep[layer].sum())
            keep[layer][keep[layer].clone()] = stays[begin : begin + count]
            begin += count
    states = [[hidden] for _, hidden in pairs]
    for step in range(4):
        new = model.decode(torch.stack([x[p + step] for x, p in zip(xs, prompts, strict=True)]), cache)
        poison(cache)
        for rows, row in zip(states, new, strict=True):
            rows.append(row[None])
    assert room.tolist() == [2, 2, 5, 5]
    for x, keep, rows in zip(xs, keeps, states, strict=True):
        check(model, x, keep, torch.cat(rows))


# ---------------------------------------------------------------- memory


def live_bytes(apart=()):
    """Bytes of the storages of all live tensors, each storage once; apart: data pointers to skip."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # isinstance would call into unrelated objects
        if issubclass(type(thing), torch.Tensor) and thing.device.type == torch.get_default_device().type:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(n for pointer, n in storages.items() if pointer not in apart), set(storages)


@pytest.mark.parametrize("settings", [("random:pooled=true", 0.3), ("random", 0.3), ("random", 1.0)])
def test_after_prefill_nothing_lives_but_the_kept_rows(demo, backend, settings):
    spec, retention = settings
    method = make_method(spec, retention)
    asked = demo, "Describe the picture.", [DEMO_PICTURE], Sampling(max_new_tokens=64)
    generation = Generation(*asked, prune=method, backend=backend)
    _, before = live_bytes()
    text = iter(generation)
    next(text)  # the prefill is over
    after, _ = live_bytes(apart=before)
    cache = generation.cache
    assert abs(after - cache.nbytes_reserved) < 0.01 * cache.nbytes_reserved
    row = 2 * 32 * 4  # K and V, D, fp32
    kept = round(retention * 256) + generation.prompt_tokens - 256
    assert generation.bytes_held == 6 * 4 * kept * row
    assert cache.nbytes_reserved == generation.bytes_held + 6 * 4 * 64 * row
    assert cache.nbytes_held == generation.bytes_held + (len(generation.token_ids) - 1) * 6 * 4 * row


def test_prefill_never_holds_two_dense_layers(backend):
    """At the same point of every layer the same number of bytes is live, except packed layers; layer 0 holds x."""
    model, x = small_llama(), torch.randn(1, 400, 32)
    keep = torch.rand(LAYERS, 2, 400) < 0.3
    cache, seen = RaggedCache(LAYERS, 4, backend=backend), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(live_bytes()[0] - cache.nbytes_reserved))
    model.prefill(x, cache, prune=lambda layer, *_: (keep[layer], None))
    assert len(seen) == LAYERS and max(seen) - seen[0] <= x.nbytes + 2000


def test_a_rectangle_is_the_arenas_and_nothing_less(backend):
    """Views of all slots if every segment has the same capacity and length; otherwise none."""
    even, uneven = RaggedCache(1, slack=3, backend=backend), RaggedCache(1, slack=3, backend=backend)
    k, v = torch.randn(2, 2, 2, 5, 8)  # B, Hkv, T, D
    even.pack(0, k, v)
    uneven.pack(0, k, v, torch.arange(5) < torch.arange(2, 6)[:, None])
    seen = even.rectangle(0)
    for view, arena, rows in zip(seen, (even.k[0], even.v[0]), (k, v), strict=True):
        assert view.shape == (4, 8, 8) and view.data_ptr() == arena.data_ptr()
        assert torch.equal(view[:, :5], rows.flatten(0, 1))
    assert uneven.rectangle(0) is None


def test_the_first_layer_gives_the_next_position(backend):
    cache = RaggedCache(2, backend=backend)
    for layer, tokens in enumerate((5, 3)):  # the second layer sees fewer
        cache.pack(layer, *torch.randn(2, 1, 2, tokens, 8))
    assert cache.pos.tolist() == [5]


def test_dropped_tokens_free_their_memory_layer_by_layer(backend):
    """No more is live at any time than before, except one layer's new arenas."""
    model, cache = small_llama(), RaggedCache(LAYERS, slack=5, backend=backend)
    model.prefill(torch.randn(1, 40, 32), cache)
    row, whole = 2 * 8 * 4, cache.nbytes_reserved  # K and V, D, bytes
    assert whole == LAYERS * 2 * (40 + 5) * row
    live, addresses = live_bytes()
    for layer in range(LAYERS):
        old = weakref.ref(cache.k[layer]), weakref.ref(cache.v[layer])
        cache.drop(layer, torch.arange(2 * 40) % 4 == 0)
        gc.collect()
        assert all(r() is None for r in old)
        assert cache.nbytes_reserved == whole - (layer + 1) * 2 * 30 * row
        assert live - live_bytes()[0] >= (layer + 1) * 2 * 30 * row - 2000  # tables and the mask
    assert cache.nbytes_held == LAYERS * 2 * 10 * row


def test_repacking_frees_the_old_arenas(backend):
    model, cache = small_llama(), RaggedCache(LAYERS, slack=5, backend=backend)
    model.prefill(torch.randn(1, 7, 32), cache)
    assert cache.nbytes_held == LAYERS * 2 * 2 * 7 * 8 * 4  # layers, K and V, KV heads, tokens, D, bytes
    assert cache.nbytes_reserved == LAYERS * 2 * 2 * (7 + 5) * 8 * 4
    old = [weakref.ref(k) for k in cache.k]
    cache.repack([2] * len(cache.spare))
    gc.collect()
    assert cache.nbytes_reserved == LAYERS * 2 * 2 * (7 + 2) * 8 * 4 and not any(r() is not None for r in old)
