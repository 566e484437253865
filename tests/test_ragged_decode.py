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
    ragged_decode_ref,
)
from kernels.backend import choose_backend, interpreted
from kernels.ragged_decode_plan import _work_items
from tests.oracle import ULP, assert_as_exact, assert_attends, check_step, masked_attention
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
    rng, generator = python_random(seed), torch_random(seed)
    b, hkv, group, d = (rng.choice(x) for x in ((1, 1, 2, 3), (1, 2, 4), range(1, 9), (8, 20, 64, 80)))
    group, d = (7, 64 * (seed + 1)) if seed < 2 else (group, d)  # Qwen2's groups are no power of two
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


def on_device(*tensors):
    """Move tensors to the device of the `backend` fixture."""
    return [t.to(torch.get_default_device()) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_where_there_is_room_and_attends_to_the_new_token(backend, dtype):
    """A third of the segments are full. The reference is dense attention with one more token. Every second case applies
    RoPE to q and k in the step; in every third, q, k and v are parts of one tensor."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels compute in fp32; float64 is refused")
    # Triton's interpreter truncates to bf16 where a GPU rounds, which adds an error
    cut_off = backend == "triton" and dtype == torch.bfloat16 and interpreted()
    for seed in range(40 if backend == "torch" else 12):
        with torch.device("cpu"):
            made = case(seed, dtype)
        q, *_, k, v, start, length, cap = on_device(*made)
        q = q if q.ndim == 3 else q[:, 0].contiguous()
        cap = torch.where(torch.arange(len(cap)) % 3 == seed % 3, length, cap)
        new = [torch.randn(len(q), len(start) // len(q), q.shape[2]).to(dtype) for _ in "kv"]
        rope = None
        if seed // 2 % 2 == 0 and not cut_off:  # random angles, random signs of the sines
            angles = torch.randn(len(q), 1, q.shape[2] // 2).repeat(1, 1, 2)
            rope = [angles.cos().to(dtype), (angles.sin() * torch.randn(q.shape[2]).sign()).to(dtype)]
            rope = torch.stack(rope) if seed % 4 else rope
        if seed % 3 == 0:
            q, *new = torch.cat((q, *new), 1).split([t.shape[1] for t in (q, *new)], 1)
        plan = decode_plan(start, cap, split=32) if seed % 4 else None
        # a GPU uses fused multiply-add
        off = {} if rope is None else {"rtol": ULP[dtype], "atol": 8 * ULP[torch.promote_types(dtype, torch.float32)]}
        check_step(
            lambda *step, plan=plan, **how: ragged_decode_append(*step, plan=plan, backend=backend, **how),
            q, new, (k, v), (start, length, cap), f"seed {seed}", off, scale=[None, 0.3][seed % 2], rope=rope,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rectangle_is_stepped_in_one_piece(dtype):
    """`rectangle_step`, not compiled, against the append reference; segments may hold different numbers."""

    def step(q, k_new, v_new, k, v, start, length, cap, return_lse):
        shape = len(start), int(cap[0]), q.shape[2]
        return [torch_way.rectangle_step(q, k_new, v_new, k.view(shape), v.view(shape), length + 1)]

    for seed in range(40):
        rng, generator = python_random(seed), torch_random(seed)
        b, hkv, group, n, d = (rng.choice(c) for c in ((1, 1, 2, 3), (1, 2, 4), (1, 2, 3, 7), (2, 5, 64), (8, 20, 64)))
        q, *new = (torch.randn(b, heads, d, generator=generator).to(dtype) for heads in (hkv * group, hkv, hkv))
        k, v = (torch.randn(b * hkv, n, d, generator=generator).to(dtype) for _ in "kv")
        length = torch.tensor([rng.randint(0, n - 1) for _ in range(b * hkv)], dtype=torch.int32)
        free = torch.arange(n) >= length[:, None]
        k[free] = v[free] = float("nan")
        tables = n * torch.arange(b * hkv, dtype=torch.int32), length, torch.full_like(length, n)
        check_step(step, q, new, (k.flatten(0, 1), v.flatten(0, 1)), tables, f"seed {seed}")


# ---------------------------------------------------------------- the torch backend reads segments where they lie


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[20, 20], [5, 9, 9, 3], [30, 1], [7, 7, 7], [12, 2, 0]])
def test_heads_of_one_length_in_each_sequence_are_read_where_they_lie(monkeypatch, dtype, lengths):
    """As in a batch: runs of segments that form rectangles, except where a sequence is empty."""
    b, heads, tokens = len(lengths), 3, 30
    keep = torch.rand(b * heads, tokens).argsort(1).argsort(1) < torch.tensor(lengths).repeat_interleave(heads)[:, None]
    # the slack differs per sequence, so that distances are uneven
    read_in_place(monkeypatch, dtype, b, keep, [lengths[s // heads] + 4 + 3 * (s // heads) for s in range(b * heads)])


def test_large_caches_are_read_where_they_lie(monkeypatch):
    """However many runs there are."""
    monkeypatch.setattr(torch_way, "FEW", 0)
    keep = torch.arange(3000) < torch.tensor([[3000], [70], [0], [2503]])
    read_in_place(monkeypatch, torch.float32, 1, keep, [3100, 70, 5, 2600])


def read_in_place(monkeypatch, dtype, b, keep, caps):
    """Compare a call that must gather nothing with dense attention."""
    monkeypatch.setattr(torch_way, "_gathered", None)
    k, v = torch.randn(2, *keep.shape, 16).to(dtype)
    q = torch.randn(b, 2 * len(keep) // b, 16).to(dtype)
    *call, cap = arena(k, v, keep, caps)
    plan = decode_plan(call[2], cap)
    exact, plain = dense(q, k, v, keep, dtype=torch.float64), in_orders(q, k, v, keep)
    assert_attends([ragged_decode(q, *call, plan=plan)], plain, exact, call[3])
    assert_attends(ragged_decode(q, *call, plan=plan, return_lse=True), plain, exact, call[3])


# ---------------------------------------------------------------- segments that share slots, or hold nothing


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("tables", [
    ([0, 0], [900, 700], [1000, 1000]),  # a shared prefix
    ([9, 9, 9], [900, 900, 900], [1000, 1000, 1000]),
    ([0, 100, 640, 0], [900, 700, 0, 900], [1000, 1000, 0, 900]),
    ([700, 0], [300, 800], [300, 1000]),  # backwards
])  # fmt: skip
def test_segments_may_share_rows(backend, planned, gathered, tables, monkeypatch):
    monkeypatch.setattr(torch_way, "FEW", 0 if gathered else 8)
    start, lengths, cap = (torch.tensor(x, dtype=torch.int32) for x in tables)
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


def test_nobody_keeps_anything():
    q, none = torch.randn(2, 4, 8), torch.zeros(4, dtype=torch.int32)
    for slots in (0, 5):
        hollow = torch.full((slots, 8), float("nan"))
        out, lse = ragged_decode(q, hollow, hollow, none, none, return_lse=True)
        assert (out == 0).all() and (lse == float("-inf")).all()
        assert (ragged_decode(q, hollow, hollow, none, none, plan=decode_plan(none, none)) == 0).all()


# ---------------------------------------------------------------- bad calls


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


GOOD = {
    "q": torch.zeros(2, 4, 8), "k": torch.zeros(40, 8), "v": torch.zeros(40, 8),
    "kv_start": ints(0, 10, 20, 30), "kv_len": ints(3, 10, 0, 7),
}  # fmt: skip
PLAN = decode_plan(GOOD["kv_start"], ints(10, 10, 10, 10))
STEP = GOOD | {"k_new": torch.zeros(2, 2, 8), "v_new": torch.zeros(2, 2, 8), "kv_cap": PLAN.kv_cap}
PLANS = {"kv_start": torch.ones(2, 3, dtype=torch.int32), "kv_cap": torch.ones(2, 3, dtype=torch.int32)}
BAD = {  # (changes to a good call, word of the error)
    ragged_decode: [
        ({"q": torch.zeros(4, 8)}, "(4, 8)"),
        ({"q": torch.zeros(2, 4, 16)}, "16"),
        ({"v": torch.zeros(39, 8)}, "(39, 8)"),
        ({"k": torch.zeros(40, 8).half()}, "float16"),
        ({n: torch.zeros(40, 8).int() for n in "kv"} | {"q": torch.zeros(2, 4, 8).int()}, "int32"),
        ({"k": torch.zeros(40, 8, device="meta")}, "meta"),
        ({"k": torch.zeros(40, 16)[:, :8]}, "non-contiguous"),
        ({"q": torch.zeros(2, 8, 4).transpose(1, 2)}, "non-contiguous"),
        ({"q": torch.zeros(2, 5, 8)}, "5"),
        ({"q": torch.zeros(3, 4, 8)}, "3 sequences"),
        ({"q": torch.zeros(0, 4, 8)}, "(0, 4, 8)"),
        ({"q": torch.zeros(2, 0, 4, 8)}, "(2, 0, 4, 8)"),
        ({"kv_start": GOOD["kv_start"].long()}, "int64"),
        ({"kv_len": GOOD["kv_len"].to("meta")}, "meta"),
        ({"kv_len": GOOD["kv_len"][:3]}, "(3,)"),
        ({"kv_len": ints(3, -1, 0, 7)}, "-1"),
        ({"kv_len": ints(3, -1, 0, 7), "plan": PLAN}, "-1"),
        ({"kv_start": ints(0, -10, 20, 30)}, "-10"),
        ({"kv_len": ints(3, 10, 0, 11)}, "arenas have 40"),
        ({"kv_len": ints(3, 11, 0, 7), "plan": PLAN}, "11"),
        ({"plan": decode_plan(ints(0, 0, 0), ints(0, 0, 0))}, "3 segments"),
        ({"k": torch.zeros(39, 8), "v": torch.zeros(39, 8), "plan": PLAN}, "40 slots"),
        ({"kv_start": GOOD["kv_start"] + 1, "plan": PLAN}, "[1, 11, 21, 31]"),
        ({"plan": (1, 2)}, "tuple"),
        ({"scale": torch.tensor(0.5)}, "scale is of type Tensor"),
        ({"backend": "cuda"}, "'cuda'"),
        ({n: torch.zeros(*GOOD[n].shape[:-1], 320) for n in "qkv"} | {"backend": "triton"}, "up to 256, not 320"),
        ({n: GOOD[n].double() for n in "qkv"} | {"backend": "triton"}, "float64"),
    ],
    ragged_decode_append: [
        ({"kv_cap": PLAN.kv_cap + 1, "plan": PLAN}, "but the plan has"),
        ({"kv_cap": PLAN.kv_cap.to("meta"), "plan": PLAN}, "on meta"),
        ({"kv_cap": [10] * 4, "plan": PLAN}, "kv_cap is of type list"),
        ({"kv_cap": None}, "kv_cap is of type NoneType"),
        ({"kv_cap": PLAN.kv_cap + 30}, "need 70 slots, the arenas have 40"),
        ({"k_new": torch.zeros(2, 1, 8)}, "(2, 1, 8)"),
        ({"v_new": torch.zeros(2, 2, 8).double()}, "float64"),
        ({"q": torch.zeros(2, 1, 4, 8)}, "(2, 1, 4, 8)"),
        ({"scale": torch.ones(())}, "scale is of type Tensor"),
        ({"rope": (torch.ones(2, 8), torch.ones(2, 8))}, "(2, 8)"),
        ({"rope": (torch.ones(2, 1, 8), torch.ones(2, 1, 8, device="meta"))}, "on meta"),
        ({"kv_len": GOOD["kv_len"] + 9}, "repack"),
    ],
    decode_plan: [
        ({"kv_start": ints(0, 5), "kv_cap": ints(5)}, "(1,)"),
        ({"kv_start": ints(0, -5), "kv_cap": ints(5, 5)}, "-5"),
        ({"kv_start": ints(), "kv_cap": ints()}, "(0,)"),
        ({"kv_start": torch.zeros(1), "kv_cap": ints(1)}, "float32"),
        ({"kv_start": ints(1), "kv_cap": [1]}, "kv_cap is of type list"),
        *(({"kv_start": ints(1), "kv_cap": ints(1), "split": n}, "multiple of 16") for n in (0, 8, 24.0, 40, 2**40)),
    ],
    decode_plans: [
        ({n: t.long() for n, t in PLANS.items()}, "int64 (2, 3) on cpu; give int32 tensors (L, S)"),
        ({n: t[0] for n, t in PLANS.items()}, "(3,)"),
        ({"kv_cap": PLANS["kv_cap"][:1]}, "(1, 3)"),
        ({"kv_cap": PLANS["kv_cap"].to("meta")}, "on meta"),
        ({"kv_start": PLANS["kv_start"].tolist()}, "kv_start is of type list"),
        ({"kv_start": -PLANS["kv_start"]}, "-1"),
        ({"split": 10}, "split is 10"),
    ],
    merge_states: [
        ({"out_b": torch.ones(1, 4).double()}, "float64"),
        ({"lse_a": torch.ones(2)}, "do not fit"),
    ],
}  # fmt: skip
PARTS = ("out", (1, 4)), ("lse", (1,))
CALLS = {
    ragged_decode: GOOD, ragged_decode_append: STEP, decode_plan: {}, decode_plans: PLANS,
    merge_states: {f"{name}_{side}": torch.ones(*shape) for name, shape in PARTS for side in "ab"},
}  # fmt: skip


@pytest.mark.parametrize("operation", BAD, ids=lambda operation: operation.__name__)
def test_bad_calls_are_refused_with_the_value(operation, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that a GPU does not refuse the CPU tensors first
    for change, word in BAD[operation]:
        with pytest.raises(ValueError) as refused:
            operation(**CALLS[operation] | change)
        message = str(refused.value)
        assert word in message and "; " in message and "\n" not in message, (word, message)


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


# ---------------------------------------------------------------- plans, merging


def test_plans_of_several_layers_are_those_of_each():
    caps = torch.tensor([[5000, 0, 770, 64], [1, 900, 30000, 70], [9, 9, 9, 9]], dtype=torch.int32)
    starts = caps.cumsum(1, dtype=torch.int32) - caps
    for split in (None, 48):
        plans = decode_plans(starts, caps, split=split)
        together = _work_items(starts.tolist(), caps.tolist(), split, caps.device)
        for plan, items, start, cap in zip(plans, together, starts, caps, strict=True):
            one = decode_plan(start, cap, split=split)
            assert (plan.starts, plan.caps) == (start.tolist(), cap.tolist())
            assert torch.equal(plan.kv_start, start) and torch.equal(plan.kv_cap, cap)
            assert all(torch.equal(a, b) for a, b in zip(items, one.items, strict=True))
            work, firsts, _ = one.items
            segment = work[:, 0].long()
            assert torch.equal(work[:, 4:], torch.stack((start[segment], cap[segment]), 1))
            count = work[:, 0].bincount(minlength=4).tolist()
            assert firsts.tolist() == [sum(count[:s]) for s in range(4)] and min(count) == 1


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
