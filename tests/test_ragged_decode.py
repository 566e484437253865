"""ragged_decode and merge_states against dense float64 attention with a mask, with NaN in every slot not kept."""

import sys

import pytest
import torch

import kernels.ragged_decode_torch as torch_way
from kernels import (
    decode_plan,
    decode_plans,
    merge_states,
    merge_states_ref,
    ragged_decode,
    ragged_decode_append,
    ragged_decode_append_ref,
    ragged_decode_ref,
)
from kernels.backend import choose_backend, interpreted
from kernels.ragged_decode import work_items
from model.config import TextConfig
from model.llama import rope_table, rotate
from tests.oracle import ULP, assert_as_exact, assert_attends, assert_stored, masked_attention
from tests.seeds import python_random, torch_random

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def arena(k, v, keep, caps, order=None, offset=0):
    """Dense k, v (S, N, D) and keep (S, N) -> arenas with NaN everywhere except kept rows, kv_start, kv_len, kv_cap.

    order: of the segments in the arena; offset: slots before the first.
    """
    segments, _, d = k.shape
    shape = offset + sum(caps), d
    k_arena, v_arena = (torch.full(shape, float("nan"), dtype=k.dtype, device=k.device) for _ in range(2))
    start, length, at = [0] * segments, keep.sum(1).tolist(), offset
    for s in order or range(segments):
        start[s] = at
        k_arena[at : at + length[s]], v_arena[at : at + length[s]] = k[s, keep[s]], v[s, keep[s]]
        at += caps[s]
    return k_arena, v_arena, *(torch.tensor(x, dtype=torch.int32, device=k.device) for x in (start, length, caps))


def case(seed, dtype):
    """A random call and its dense twin, on the CPU. A quarter have equal lengths, a quarter also equal capacities."""
    with torch.device("cpu"):
        return _case(seed, dtype)


def _case(seed, dtype):
    rng, generator = python_random(seed), torch_random(seed)
    b, hkv, group, d = (
        rng.choice([1, 1, 2, 3]),
        rng.choice([1, 2, 4]),
        rng.choice([1, 2, 3, 4, 5, 6, 7, 8]),
        rng.choice([8, 20, 64, 80]),
    )
    rows, n = rng.choice([None, 1, 2, 5]), rng.choice([1, 2, 17, 64, 65])
    segments = b * hkv
    q = torch.randn(b, *([] if rows is None else [rows]), hkv * group, d, generator=generator).to(dtype)
    k, v = (torch.randn(segments, n, d, generator=generator).to(dtype) for _ in range(2))
    lengths = [rng.choice([0, 1, n, rng.randint(0, n)]) for _ in range(segments)]
    if seed % 4 > 1:
        lengths = lengths[:1] * segments
    keep = torch.zeros(segments, n, dtype=torch.bool)
    for s, length in enumerate(lengths):
        keep[s, rng.sample(range(n), length)] = True
    caps = [length + (3 if seed % 4 == 3 else rng.randint(0, 4)) for length in lengths]
    order = rng.sample(range(segments), segments) if seed % 3 == 0 else None
    return q, k, v, keep, *arena(k, v, keep, caps, order, offset=3 * (seed % 2))


def dense(q, k, v, keep, scale=None, dtype=None):
    """masked_attention for q in the layout of ragged_decode."""
    b = len(q)
    q4 = q if q.ndim == 4 else q[:, None]
    k, v = (t.unflatten(0, (b, -1)) for t in (k, v))
    dtype = dtype or q.dtype
    out, lse = masked_attention(q4.to(dtype), k.to(dtype), v.to(dtype), keep.unflatten(0, (b, -1)), scale)
    return out.view(q.shape), lse.view(q.shape[:-1])


def in_orders(q, k, v, keep, scale=None):
    """`dense` in q's dtype with its sums over keys and channels in four orders: out and lse, stacked."""
    found = []
    for keys in ([], [1]):
        for channels in ([], [-1]):
            turned = q.flip(channels), k.flip(keys + channels), v.flip(keys), keep.flip(keys)
            found.append(dense(*turned, scale))
    return [torch.stack(results) for results in zip(*found, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("few", [0, 8, 1000])
def test_it_is_dense_attention_with_the_keep_mask(dtype, few, monkeypatch):
    """few: number of runs up to which all are read in place; with 0 all segments are gathered."""
    monkeypatch.setattr(torch_way, "FEW", few)
    for seed in range(80):
        q, k, v, keep, k_arena, v_arena, start, length, cap = case(seed, dtype)
        scale = [None, 0.3][seed % 2]
        exact, exact_lse = dense(q, k, v, keep, scale, torch.float64)
        plain, plain_lse = in_orders(q, k, v, keep, scale)
        plan = decode_plan(start, cap) if seed % 5 < 3 else None
        call = (q, k_arena, v_arena, start, length)
        alone = ragged_decode(*call, scale=scale, plan=plan)
        out, lse = ragged_decode(*call, scale=scale, plan=plan, return_lse=True)
        reference = ragged_decode_ref(*call, scale=scale, return_lse=True)
        for name, got in (("ours", alone), ("ours with lse", out), ("reference", reference[0])):
            assert got.dtype == q.dtype and got.shape == q.shape
            assert_attends([got], [plain], [exact], length, f"{name}, seed {seed}")
        for got in ((out, lse), reference):
            assert got[1].dtype == torch.promote_types(dtype, torch.float32)
            assert_attends(got, (plain, plain_lse), (exact, exact_lse), length, f"seed {seed}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rectangle_is_stepped_in_one_piece(dtype):
    """`rectangle_step`, not compiled, against the append reference; segments may hold different numbers."""
    for seed in range(40):
        rng, generator = python_random(seed), torch_random(seed)
        b, hkv, group, n, d = (rng.choice(c) for c in ((1, 1, 2, 3), (1, 2, 4), (1, 2, 3, 7), (2, 5, 64), (8, 20, 64)))
        q, k_new, v_new = (torch.randn(b, heads, d, generator=generator).to(dtype) for heads in (hkv * group, hkv, hkv))
        k, v = (torch.randn(b * hkv, n, d, generator=generator).to(dtype) for _ in "kv")
        length = torch.tensor([rng.randint(0, n - 1) for _ in range(b * hkv)], dtype=torch.int32)
        free = torch.arange(n) >= length[:, None]
        k[free] = v[free] = float("nan")
        start, cap = n * torch.arange(b * hkv, dtype=torch.int32), torch.full_like(length, n)
        tail, arenas = (start, length, cap), [(k.flatten(0, 1).clone(), v.flatten(0, 1).clone()) for _ in range(2)]
        exact = ragged_decode_append_ref(
            *(t.double() for t in (q, k_new, v_new, k.flatten(0, 1), v.flatten(0, 1))), *tail
        )
        plain = ragged_decode_append_ref(q, k_new, v_new, *arenas[0], *tail)
        out = torch_way.rectangle_step(q, k_new, v_new, *(t.view(k.shape) for t in arenas[1]), length + 1)
        assert out.dtype == dtype and out.shape == q.shape
        assert_attends([out], [plain], [exact], length, f"seed {seed}")
        assert_stored(arenas[1], arenas[0], *tail, f"seed {seed}")


def some_rope(b, d, dtype):
    """cos and sin (B, 1, D) of random angles, with random signs of the sines."""
    angles = torch.randn(b, 1, d // 2).repeat(1, 1, 2)
    return [angles.cos().to(dtype), (angles.sin() * torch.randn(d).sign()).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_where_there_is_room_and_attends_to_the_new_token(backend, dtype):
    """A third of the segments are full. The reference is dense attention with one more token. Every second case applies
    RoPE to q and k in the step; in every third, q, k and v are parts of one tensor."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels compute in fp32; float64 is refused")
    # Triton's interpreter truncates to bf16 where a GPU rounds, which adds an error
    cut_off = backend == "triton" and dtype == torch.bfloat16 and interpreted()
    for seed in range(40 if backend == "torch" else 12):
        q, k, v, keep, k_arena, v_arena, start, length, cap = (on_device(t) for t in case(seed, dtype))
        q = q if q.ndim == 3 else q[:, 0].contiguous()
        cap = torch.where(torch.arange(len(cap)) % 3 == seed % 3, length, cap)
        k_new, v_new = (torch.randn(len(q), len(start) // len(q), q.shape[2]).to(dtype) for _ in range(2))
        exact_q, *exact_new = (t.double() for t in (q, k_new, v_new))
        rope = None if seed // 2 % 2 or cut_off else some_rope(len(q), q.shape[2], dtype)
        if seed % 3 == 0:
            q, k_new, v_new = torch.cat((q, k_new, v_new), 1).split([t.shape[1] for t in (q, k_new, v_new)], 1)
        tail, options = (start, length, cap), {"scale": [None, 0.3][seed % 2], "return_lse": True, "rope": rope}
        exact_options = options | {"rope": rope and [t.double() for t in rope]}
        exact = ragged_decode_append_ref(
            exact_q, *exact_new, k_arena.double(), v_arena.double(), *tail, **exact_options
        )
        wanted, ours = ((k_arena.clone(), v_arena.clone()) for _ in range(2))
        plain = ragged_decode_append_ref(q, k_new, v_new, *wanted, *tail, **options)
        plan = decode_plan(start, cap, split=32) if seed % 4 else None
        got = ragged_decode_append(q, k_new, v_new, *ours, *tail, **options, plan=plan, backend=backend)
        assert_attends(got, plain, exact, length, f"seed {seed}")
        # a GPU uses fused multiply-add
        off, ulp = (0, 0) if rope is None else (ULP[torch.promote_types(dtype, torch.float32)], ULP[dtype])
        assert_stored(ours, wanted, *tail, f"seed {seed}", rtol=ulp, atol=8 * off)


def test_rope_may_be_one_tensor(backend):
    rope, q, new = torch.stack(some_rope(2, 16, torch.float32)), torch.randn(2, 4, 16), torch.randn(2, 2, 16)
    start, length, cap = (torch.tensor(x, dtype=torch.int32) for x in ([0, 9, 18, 27], [8, 3, 0, 5], 4 * [9]))
    arenas = torch.randn(2, 36, 16)
    one, two = (
        ragged_decode_append(q, new, new, *arenas.clone(), start, length, cap, rope=rope, backend=backend)
        for rope in (rope, rope.unbind())
    )
    assert torch.equal(one, two)


def test_a_step_turns_what_a_model_turns(backend):
    """RoPE by the model's `rotate` and RoPE inside the step agree up to rounding."""
    config = TextConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    rope = rope_table(torch.tensor([7, 300]), config, torch.float32)
    q, k_new, v_new = torch.randn(2, 4, 16), torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    start, length, cap = (torch.tensor(x, dtype=torch.int32) for x in ([0, 9, 18, 27], [8, 3, 0, 5], 4 * [9]))
    k, v = torch.randn(2, 36, 16)
    ours, wanted = (k.clone(), v.clone()), (k.clone(), v.clone())
    out = ragged_decode_append(q, k_new, v_new, *ours, start, length, cap, rope=rope, backend=backend)
    other = ragged_decode_append_ref(rotate(q, rope), rotate(k_new, rope), v_new, *wanted, start, length, cap)
    torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-6, atol=1e-6)


def on_device(thing):
    """Move a tensor to the device of the `backend` fixture."""
    return thing.to(torch.get_default_device()) if isinstance(thing, torch.Tensor) else thing


def test_equal_lengths_are_read_where_they_lie(monkeypatch):
    k = torch.randn(2 * 4, 30, 16)
    keep = torch.zeros(8, 30, dtype=torch.bool)
    keep[:, 5:25] = True
    k_arena, v_arena, start, length, cap = arena(k, k, keep, [24] * 8)
    seen = []
    monkeypatch.setattr(torch_way, "_dense", lambda q, k, v, *_: seen.append((k, v)) or (q, None))
    ragged_decode(torch.randn(2, 8, 16), k_arena, v_arena, start, length, plan=decode_plan(start, cap))
    keys, values = seen[0]
    assert keys.data_ptr() == k_arena.data_ptr() and values.data_ptr() == v_arena.data_ptr()
    assert keys.shape == (1, 8, 20, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[5, 9, 9, 3], [30, 1], [7, 7, 7], [12, 2, 0]])
def test_heads_of_one_length_in_each_sequence_are_read_where_they_lie(monkeypatch, dtype, lengths):
    """As in a batch: runs of segments that form rectangles, except where a sequence is empty."""
    b, heads, tokens = len(lengths), 3, 30
    k, v = torch.randn(2, b * heads, tokens, 16).to(dtype)
    q = torch.randn(b, 6, 16).to(dtype)
    keep = torch.zeros(b * heads, tokens, dtype=torch.bool)
    for s, n in enumerate(n for n in lengths for _ in range(heads)):
        keep[s, torch.randperm(tokens)[:n]] = True
    slack = [4 + 3 * (s // heads) for s in range(b * heads)]  # differs per sequence, so that distances are uneven
    k_arena, v_arena, start, length, cap = arena(
        k, v, keep, [int(n) + m for n, m in zip(keep.sum(1), slack, strict=True)]
    )
    monkeypatch.setattr(torch_way, "_gathered", None)
    out, lse = ragged_decode(q, k_arena, v_arena, start, length, plan=decode_plan(start, cap), return_lse=True)
    alone = ragged_decode(q, k_arena, v_arena, start, length, plan=decode_plan(start, cap))
    exact, exact_lse = dense(q, k, v, keep, dtype=torch.float64)
    plain, plain_lse = in_orders(q, k, v, keep)
    assert_attends([alone], [plain], [exact], length)
    assert_attends((out, lse), (plain, plain_lse), (exact, exact_lse), length)


def test_runs_are_segments_of_one_length_at_even_distances():
    def runs(starts, lengths):
        return torch_way.runs_of(starts, lengths)

    assert runs([0, 9, 18, 30, 40], [5, 5, 5, 5, 5]) == [(0, 3, 9), (3, 5, 10)]
    assert runs([0, 9, 18], [5, 4, 4]) == [(0, 1, 0), (1, 3, 9)] and runs([0, 9, 18], [5, 5, 4])[0] == (0, 2, 9)
    assert runs([0], [5]) == [(0, 1, 0)]
    assert runs([20, 10, 0], [2, 2, 2]) == [(0, 1, 0), (1, 2, 0), (2, 3, 0)]  # decreasing starts are no rectangle
    assert runs([4, 4, 4], [2, 2, 2]) == [(0, 3, 0)]  # all share the same rows


def test_large_caches_are_read_in_place(monkeypatch):
    """At real sizes nothing is gathered."""
    monkeypatch.setattr(torch_way, "FEW", 0)
    monkeypatch.setattr(torch_way, "_gathered", None)
    for seed in range(4):
        k, v, q = torch.randn(4, 3000, 32), torch.randn(4, 3000, 32), torch.randn(1, 8, 32)
        keep = torch.arange(3000) < torch.tensor([[3000], [70], [0], [2500 + seed]])
        call = arena(k, v, keep, [3100, 70, 5, 2600])
        out, lse = ragged_decode(q, *call[:4], plan=decode_plan(call[2], call[4]), return_lse=True)
        exact, exact_lse = dense(q, k, v, keep, dtype=torch.float64)
        plain, plain_lse = in_orders(q, k, v, keep)
        assert_attends((out, lse), (plain, plain_lse), (exact, exact_lse), call[3])


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize(
    ("start", "lengths", "cap"),
    [
        ([0, 0], [900, 700], [1000, 1000]),  # a shared prefix
        ([0, 100, 640, 0], [900, 700, 0, 900], [1000, 1000, 0, 900]),
        ([700, 0], [300, 800], [300, 1000]),  # backwards
    ],
)
def test_segments_may_share_rows(backend, planned, gathered, start, lengths, cap, monkeypatch):
    monkeypatch.setattr(torch_way, "FEW", 0 if gathered else 8)
    start, lengths, cap = (torch.tensor(x, dtype=torch.int32) for x in (start, lengths, cap))
    k, v, q = torch.randn(1100, 16), torch.randn(1100, 16), torch.randn(1, 2 * len(start), 16)
    options = {"plan": decode_plan(start, cap) if planned else None, "return_lse": True}
    got = ragged_decode(q, k, v, start, lengths, **options, backend=backend)
    exact = ragged_decode_ref(q.double(), k.double(), v.double(), start, lengths, return_lse=True)
    plain = ragged_decode_ref(q, k, v, start, lengths, return_lse=True)
    assert_attends(got, plain, exact, lengths)


def test_a_step_over_shared_slots_is_refused(backend):
    """Two segments would write to one slot. Empty capacities and neighbours share nothing."""
    tables = ([16, 8, 3, 0], [3, 0, 0, 5], [9, 8, 0, 8]), ([16, 8, 7, 0], [3, 0, 0, 5], [9, 8, 2, 8])
    q, new, (k, v) = torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.randn(2, 25, 8)
    apart, shared = (tuple(torch.tensor(x, dtype=torch.int32) for x in table) for table in tables)
    ragged_decode_append(q, new, new, k, v, *apart, backend=backend)
    for plan in (None, decode_plan(shared[0], shared[2])):
        with pytest.raises(ValueError, match=r"segments 3 \(0 to 7\) and 2 \(7 to 8\) share slots; "):
            ragged_decode_append(q, new, new, k, v, *shared, plan=plan, backend=backend)


def test_rows_of_a_segment_may_be_shuffled():
    q, k, v, keep, k_arena, v_arena, start, length, _ = case(9, torch.float64)
    out = ragged_decode(q, k_arena, v_arena, start, length)
    for s, n in zip(start.tolist(), length.tolist(), strict=True):
        order = torch.randperm(n) + s
        k_arena[s : s + n], v_arena[s : s + n] = k_arena[order], v_arena[order]
    torch.testing.assert_close(ragged_decode(q, k_arena, v_arena, start, length), out)


def test_nobody_keeps_anything():
    q, none = torch.randn(2, 4, 8), torch.zeros(4, dtype=torch.int32)
    for slots in (0, 5):
        hollow = torch.full((slots, 8), float("nan"))
        out, lse = ragged_decode(q, hollow, hollow, none, none, return_lse=True)
        assert (out == 0).all() and (lse == float("-inf")).all()
        assert (ragged_decode(q, hollow, hollow, none, none, plan=decode_plan(none, none)) == 0).all()


GOOD = {
    "q": torch.zeros(2, 4, 8), "k": torch.zeros(40, 8), "v": torch.zeros(40, 8),
    "kv_start": torch.tensor([0, 10, 20, 30], dtype=torch.int32),
    "kv_len": torch.tensor([3, 10, 0, 7], dtype=torch.int32),
}  # fmt: skip
PLAN = decode_plan(GOOD["kv_start"], torch.tensor([10, 10, 10, 10], dtype=torch.int32))
BAD = {
    "q of one dimension too few": ({"q": torch.zeros(4, 8)}, "(4, 8)"),
    "another head size": ({"q": torch.zeros(2, 4, 16)}, "16"),
    "k and v differ": ({"v": torch.zeros(39, 8)}, "(39, 8)"),
    "k of another dtype": ({"k": torch.zeros(40, 8).half()}, "float16"),
    "whole numbers": ({n: torch.zeros(40, 8).int() for n in "kv"} | {"q": torch.zeros(2, 4, 8).int()}, "int32"),
    "k on another device": ({"k": torch.zeros(40, 8, device="meta")}, "meta"),
    "k with gaps": ({"k": torch.zeros(40, 16)[:, :8]}, "non-contiguous"),
    "q transposed": ({"q": torch.zeros(2, 8, 4).transpose(1, 2)}, "non-contiguous"),
    "Hq no multiple of Hkv": ({"q": torch.zeros(2, 5, 8)}, "5"),
    "segments no multiple of B": ({"q": torch.zeros(3, 4, 8)}, "3 sequences"),
    "starts of another type": ({"kv_start": GOOD["kv_start"].long()}, "int64"),
    "lengths on another device": ({"kv_len": GOOD["kv_len"].to("meta")}, "meta"),
    "fewer lengths": ({"kv_len": GOOD["kv_len"][:3]}, "(3,)"),
    "negative length": ({"kv_len": torch.tensor([3, -1, 0, 7], dtype=torch.int32)}, "-1"),
    "negative start": ({"kv_start": torch.tensor([0, -10, 20, 30], dtype=torch.int32)}, "-10"),
    "beyond the arena": ({"kv_len": torch.tensor([3, 10, 0, 11], dtype=torch.int32)}, "40 slots"),
    "beyond the capacity": ({"kv_len": torch.tensor([3, 11, 0, 7], dtype=torch.int32), "plan": PLAN}, "11"),
    "a plan of other segments": ({"plan": decode_plan(*[torch.zeros(3, dtype=torch.int32)] * 2)}, "3 segments"),
    "a plan of a larger arena": ({"k": torch.zeros(39, 8), "v": torch.zeros(39, 8), "plan": PLAN}, "40 slots"),
    "a plan of other starts": ({"plan": PLAN, "kv_start": GOOD["kv_start"] + 1}, "[1, 11, 21, 31]"),
    "a plan that is none": ({"plan": (1, 2)}, "tuple"),
    "no sequences": ({"q": torch.zeros(0, 4, 8)}, "(0, 4, 8)"),
    "no rows": ({"q": torch.zeros(2, 0, 4, 8)}, "(2, 0, 4, 8)"),
    "an unknown backend": ({"backend": "cuda"}, "'cuda'"),
    "starts with gaps": ({"kv_start": GOOD["kv_start"].repeat_interleave(2)[::2]}, "non-contiguous"),
    "a scale that is a tensor": ({"scale": torch.tensor(0.5)}, "scale is of type Tensor"),
    "large heads in Triton": (
        {n: torch.zeros(*GOOD[n].shape[:-1], 320) for n in "qkv"} | {"backend": "triton"},
        "up to 256, not 320",
    ),
    "float64 in Triton": ({n: GOOD[n].double() for n in "qkv"} | {"backend": "triton"}, "float64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_are_refused_with_the_value(name):
    change, word = BAD[name]
    with pytest.raises(ValueError) as refused:
        ragged_decode(**GOOD | change)
    message = str(refused.value)
    assert word in message and ";" in message and "\n" not in message


def test_bad_steps_are_refused():
    new, cap = torch.zeros(2, 2, 8), PLAN.kv_cap
    good = [*(GOOD[n] for n in ("q",)), new, new, *(GOOD[n] for n in ("k", "v", "kv_start", "kv_len"))]
    for arguments, options, word in (
        ([*good, cap + 1], {"plan": PLAN}, "but the plan has"),
        ([*good, cap.to("meta")], {"plan": PLAN}, "on meta"),
        ([good[0], new[:, :1], *good[2:], cap], {}, "(2, 1, 8)"),
        ([good[0], new, new.double(), *good[3:], cap], {}, "float64"),
        ([good[0][:, None], *good[1:], cap], {}, "(2, 1, 4, 8)"),
        ([*good, cap + 30], {}, "capacities need 70 slots, the arenas have 40"),
        ([*good, None], {}, "kv_cap is of type NoneType"),
        ([*good, [10] * 4], {"plan": PLAN}, "kv_cap is of type list"),
        ([*good, cap], {"scale": torch.ones(())}, "scale is of type Tensor"),
        ([*good, cap], {"rope": (torch.ones(2, 8), torch.ones(2, 8))}, "(2, 8)"),
        ([*good, cap], {"rope": (torch.ones(2, 1, 8), torch.ones(2, 1, 8, device="meta"))}, "on meta"),
        ([*good[:6], GOOD["kv_len"] + 9, cap], {}, "repack"),
    ):
        with pytest.raises(ValueError) as refused:
            ragged_decode_append(*arguments, **options)
        message = str(refused.value)
        assert word in message and ";" in message and "\n" not in message, message
    for split in (0, 8, 24.0, 40, 2**40):
        with pytest.raises(ValueError, match="multiple of 16"):
            decode_plan(GOOD["kv_start"], cap, split=split)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cpu; it needs CUDA or TRITON_INTERPRET=1"):
        ragged_decode(**GOOD, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="CPU tensors"):
        choose_backend("triton", torch.device("cuda"), torch.float32)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    with pytest.raises(ValueError, match="not installed"):
        ragged_decode(**GOOD, backend="triton")
    assert choose_backend("auto", torch.device("cuda"), torch.float32) == "torch"


@pytest.mark.parametrize(
    ("start", "cap", "word"),
    [([0, 5], [5], "1 capacities"), ([0, -5], [5, 5], "-5"), ([], [], "(0,)"), ([0.0], [1], "float32")],
)
def test_bad_plans_are_refused(start, cap, word):
    integers = [torch.tensor(x, dtype=torch.float32 if x == [0.0] else torch.int32) for x in (start, cap)]
    with pytest.raises(ValueError) as refused:
        decode_plan(*integers)
    assert word in str(refused.value)
    with pytest.raises(ValueError) as refused:
        decode_plans(*(t[None] for t in integers))
    assert word.removeprefix("(").removesuffix(",)") in str(refused.value)


def test_bad_plans_of_several_layers_are_refused():
    good = torch.ones(2, 3, dtype=torch.int32)
    for tables, split, word in (
        ((good.long(), good.long()), None, "int64 of shape (2, 3); give one int32 per layer and segment"),
        ((good[0], good[0]), None, "(3,)"),
        ((good, good[:1]), None, "2x3 starts on cpu, 1x3 capacities"),
        ((good, good.tolist()), None, "kv_cap is of type list"),
        ((good, good), 10, "split is 10"),
    ):
        with pytest.raises(ValueError) as refused:
            decode_plans(*tables, split=split)
        assert word in str(refused.value) and "; " in str(refused.value)


def test_plans_of_several_layers_are_those_of_each():
    caps = torch.tensor([[5000, 0, 770, 64], [1, 900, 30000, 70], [9, 9, 9, 9]], dtype=torch.int32)
    starts = caps.cumsum(1, dtype=torch.int32) - caps
    for split in (None, 48):
        plans = decode_plans(starts, caps, split=split)
        for i, (plan, start, cap) in enumerate(zip(plans, starts, caps, strict=True)):
            one = decode_plan(start, cap, split=split)
            assert (plan.starts, plan.caps) == (one.starts, one.caps)
            assert torch.equal(plan.kv_start, start) and torch.equal(plan.kv_cap, cap)
            together = work_items(caps.tolist(), split, cap.device)[i]
            for name in ("work", "firsts", "sizes"):
                assert torch.equal(getattr(together, name), getattr(one.items, name)), name
            first, count = one.items.firsts.tolist(), one.items.work[:, 0].bincount(minlength=4).tolist()
            assert first == [sum(count[:s]) for s in range(4)] and min(count) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_halves_merge_into_the_whole(dtype):
    for seed in range(30):
        q, k, v, keep, *_ = case(seed, dtype)
        first = keep & (torch.rand(keep.shape) < 0.5)
        exact, exact_lse = dense(q, k, v, keep, dtype=torch.float64)
        parts = []
        for part in (first, keep & ~first):
            parts += ragged_decode(q, *arena(k, v, part, part.sum(1).tolist())[:4], return_lse=True)
        plain, plain_lse = merge_states_ref(*parts)
        out, lse = merge_states(*parts)
        assert out.dtype == dtype and lse.dtype == parts[1].dtype
        assert_as_exact(out, plain, exact, dtype, f"seed {seed}")
        assert_as_exact(lse, plain_lse, exact_lse, lse.dtype, f"seed {seed}")


def test_merging_survives_scores_that_overflow_exp():
    for merge in (merge_states, merge_states_ref):
        for size in (900.0, -900.0):
            out, lse = merge(torch.ones(1, 4), torch.tensor([size]), torch.zeros(1, 4), torch.tensor([size]))
            assert torch.equal(out, torch.full((1, 4), 0.5)) and lse.item() == pytest.approx(size + 0.6931472)
    with pytest.raises(ValueError, match="float64"):
        merge_states(torch.ones(1, 4), torch.ones(1), torch.ones(1, 4).double(), torch.ones(1))
    with pytest.raises(ValueError, match="do not fit"):
        merge_states(torch.ones(1, 4), torch.ones(2), torch.ones(1, 4), torch.ones(1))
