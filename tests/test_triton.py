"""Triton's ragged_decode where splits, tiles and tickets matter. On a CPU in the interpreter, else on the GPU.

Tests for all backends are in other files. Here: lengths around the borders of tiles and splits, all head dims, NaN in
all memory that no result may depend on, bitwise equal results.
"""

import contextlib
import gc
import json
import mmap

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this system")

from kernels import (
    decode_plan,
    dequantised,
    ragged_decode,
    ragged_decode_append,
    ragged_decode_append_ref,
    ragged_decode_ref,
)
from kernels.quantise import has_e4m3
from kernels.ragged_decode_triton import append_attend, attend
from kernels.tiles import architecture, chosen, entry, tiles
from model import Generation, Sampling, load
from model.cache import RaggedCache
from model.fast import FastStep
from tests.oracle import assert_attends, assert_near, check_step, of_segments, small_llama
from tests.paths import DEMO, DEMO_PICTURE
from tests.seeds import python_random, torch_random
from tests.test_quantise import stored

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ONLY_CUDA = pytest.mark.skipif(not CUDA, reason="needs a CUDA device: no interpreter has threads or graphs")
NAN = float("nan")


def problem(lengths, hkv, group, d, dtype=torch.float32, rows=None, slack=3, seed=0, split=32):
    """(q, k, v, kv_start, kv_len, kv_cap, plan) on the device: NaN in every free slot and in the workspace."""
    generator = torch_random(seed)
    length = torch.tensor(lengths, dtype=torch.int32)
    cap = length + slack
    start = cap.cumsum(0, dtype=torch.int32) - cap
    k, v = (torch.randn(int(cap.sum()), d, generator=generator) for _ in range(2))
    for s, n in zip(start.tolist(), lengths, strict=True):
        k[s + n : s + n + slack] = v[s + n : s + n + slack] = NAN
    b = len(lengths) // hkv
    q = torch.randn(b, *([] if rows is None else [rows]), hkv * group, d, generator=generator)
    q, k, v = (t.to(DEVICE, dtype) for t in (q, k, v))
    start, length, cap = (t.to(DEVICE) for t in (start, length, cap))
    plan = decode_plan(start, cap, split=split)
    spoil(plan, (rows or 1) * group, d)
    return q, k, v, start, length, cap, plan


def spoil(plan, rows, d):
    for room in plan.scratch(rows, d):
        room.fill_(NAN)


def check(got, q, k, v, start, length, k_scale=None, v_scale=None, **options):
    """Compare (out, lse) with the reference in float64; allowed: twice the reference's own error in this dtype."""
    rows = (dequantised(t, unit, torch.float64).double() for t, unit in ((k, k_scale), (v, v_scale)))
    exact = ragged_decode_ref(q.double(), *rows, start, length, return_lse=True, **options)
    options |= {"k_scale": k_scale, "v_scale": v_scale}
    plain = ragged_decode_ref(q, k, v, start, length, return_lse=True, **options)
    assert_attends(got, plain, exact, length)


def decoded(q, k, v, start, length, cap, plan, **options):
    return ragged_decode(q, k, v, start, length, plan=plan, return_lse=True, backend="triton", **options)


CODES = pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn], ids=["as q", "int8", "fp8"])


def in_codes(made, codes):
    """A `problem` with its arenas in 8 bits, and {k_scale, v_scale}; unchanged and {} if codes is None."""
    if codes is None:
        return made, {}
    if codes == torch.float8_e4m3fn and not has_e4m3(made[0].device):
        pytest.skip("this GPU has no float8_e4m3fn")
    q, k, v, start, length, *rest = made
    k, v, k_scale, v_scale = stored(k, v, start, length, codes)
    return (q, k, v, start, length, *rest), {"k_scale": k_scale, "v_scale": v_scale}


def appended(q, k, v, start, length, cap, plan, new=None, **scales):
    """One step of ragged_decode_append, with random new tokens unless they are given."""
    if new is None:
        generator, shape = torch_random(9), (len(q), len(start) // len(q), q.shape[-1])
        new = [torch.randn(shape, generator=generator).to(q) for _ in "kv"]
    options = {"return_lse": True, "plan": plan, "backend": "triton", **scales}
    return ragged_decode_append(q, *new, k, v, start, length, cap, **options)


def assert_same(got, wanted, length, what=""):
    """Assert that (out, lse) are bitwise equal."""
    for name, heads, a, b in zip(("out", "lse"), (-2, -1), got, wanted, strict=True):
        assert_near(a, b, 0.0, f"{name} {what}".strip(), of_segments(length, a.shape, heads))


@pytest.fixture(autouse=True)
def outputs_begin_as_nan(monkeypatch):
    """So that rows that are never written show up."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(NAN))
    monkeypatch.setattr(torch, "empty_like", lambda like: empty_like(like).fill_(NAN))


# ---------------------------------------------------------------- correctness


BN = tiles(1, 128, 4)["BN"]  # 16 slots: the smallest tile, to test few slots per border


@pytest.mark.parametrize("seed", range(6))
def test_lengths_at_the_borders_of_tiles_and_splits(seed):
    rng, split = python_random(seed), 2 * BN
    borders = [0, 1, BN - 1, BN, BN + 1, split - 1, split, split + 1, rng.randint(2, 4 * split)]
    lengths = rng.sample(borders, 5) + [rng.choice([7 * split + 5, 0])]  # one very long, or none
    rng.shuffle(lengths)
    hkv, group, slack = [1, 2, 3][seed % 3], [1, 4, 2][seed % 3], [3, 0][seed % 2]
    made = q, k, v, start, length, cap, plan = problem(lengths, hkv, group, 128, slack=slack, seed=seed, split=split)
    check(decoded(*made), q, k, v, start, length)
    assert len(plan.items[0]) == sum(max(1, -(-c // split)) for c in cap.tolist())


DIMS = [32, 64, 72, 80, 96, 128, 256]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", DIMS)
def test_head_dims_and_groups(d, dtype):
    """Each dim with three group sizes of 1 .. 16, Qwen2's dims with its 7; the last case has rows for several tiles."""
    for i, group in enumerate([7 if d in (64, 128) else 1 + DIMS.index(d), 8 + DIMS.index(d), 16]):
        made = problem([70, 0, 33, 5], 2, group, d, dtype, [None, 2, 5][i], seed=i, split=48)
        check(decoded(*made), *made[:5])


def test_an_infinite_new_value_stays_in_its_split():
    """The other splits must not multiply it by 0."""
    q, k, v, start, length, cap, plan = problem([100], 1, 2, 64, split=32)
    new = torch.randn(2, 1, 1, 64, generator=torch_random(3)).to(q)
    new[1, ..., 5] = float("inf")
    wanted = ragged_decode_append_ref(q, *new, k.clone(), v.clone(), start, length, cap)
    out, _ = appended(q, k, v, start, length, cap, plan, new)
    assert torch.equal(out.isinf(), wanted.isinf()) and wanted.isinf().sum() == 2
    torch.testing.assert_close(out, wanted)


def test_many_parts_of_very_different_weight():
    """More parts than one round of the merge, the heaviest first: exp2 of the difference would overflow."""
    q, k, v, start, length, _, plan = problem([1100, 20], 2, 2, 32, split=16)
    assert len(plan.items[0]) > tiles(2, 32, 4)["BS"]
    k[:1100] *= torch.linspace(100, 1, 1100, device=DEVICE)[:, None]
    q[:, :2] = k[0] / k[0].norm()
    check(decoded(q, k, v, start, length, _, plan, scale=1.0), q, k, v, start, length, scale=1.0)


def test_splits_depend_on_the_segment_alone():
    start = torch.tensor([0, 5000, 5100, 5100, 65100, 85100], dtype=torch.int32)
    cap = torch.tensor([5000, 100, 0, 60000, 20000, 200000], dtype=torch.int32)
    work = decode_plan(start, cap).items[0]
    for s, size, count in ((0, 448, 12), (1, 64, 2), (2, 64, 1), (3, 960, 63), (4, 512, 40), (5, 1024, 196)):
        rows = work[work[:, 0] == s]
        assert rows[:, 1].tolist() == list(range(count)) and (rows[:, 3] == size).all()
        assert (rows[:, 2] == (work[:, 0] == s).nonzero()[0]).all()


def test_an_arena_of_more_than_two_to_the_31_elements():
    """Rows beyond element 2^31 are read and written in place, not 2^32 elements earlier."""
    d, rows = 64, 2**31 // 64  # the arenas start in the middle of the memory, so a wrapped offset stays inside
    k, v = (untouched(2 * rows * d + 1000 * d)[rows * d :].view(-1, d) for _ in range(2))
    q, near, far, _, length, cap, _ = problem([50, 70], 2, 4, d, torch.float16)
    start = torch.tensor([0, rows + 100], dtype=torch.int32, device=DEVICE)
    for s, at in enumerate(start.tolist()):
        n, source = int(length[s]), int(s * cap[0])
        k[at : at + n], v[at : at + n] = near[source : source + n], far[source : source + n]
    plan = decode_plan(start, cap, split=32)
    together = cap.cumsum(0, dtype=torch.int32) - cap
    check(decoded(q, k, v, start, length, cap, plan), q, near, far, together, length)
    got = appended(q, k, v, start, length, cap, plan)
    assert_same(got, appended(q, near, far, together, length, cap, decode_plan(together, cap, split=32)), length)
    assert k[rows + 170].any() and v[rows + 170].any()


def test_sequences_whose_rows_span_more_than_two_to_the_31_elements():
    """Of q and the new token. A wrapped offset stays inside the memory."""
    d, apart = 64, 2**30 + 2**16
    q, k, v, start, length, cap, plan = problem([50, 70, 9, 33, 40, 5], 2, 2, d, torch.float16)
    new = [torch.randn(3, 2, d, generator=torch_random(seed)).to(q) for seed in (1, 2)]
    far, moved = untouched(2**32 + 2**18)[2**31 :], []
    for i, rows in enumerate((q, *new)):
        moved.append(far[2**15 * i :].as_strided(rows.shape, (apart, d, 1)).copy_(rows))
    wanted = appended(q, k.clone(), v.clone(), start, length, cap, plan, new)
    assert_same(appended(moved[0], k, v, start, length, cap, plan, moved[1:]), wanted, length)


def test_a_workspace_of_more_than_two_to_the_31_elements():
    """Partial results beyond element 2^31 are written and merged there."""
    q, k, v, start, length, cap, plan = made = problem([100, 70], 2, 2, 64, torch.float16, split=32)
    wanted, wanted_step = decoded(*made), appended(q, k.clone(), v.clone(), start, length, cap, plan)
    work, firsts, _ = plan.items
    shift = 2**31 // (2 * 64) + 5  # items
    work[:, 2] += shift
    firsts += shift
    part = untouched(2 * (2**32 + 2**16)).view(torch.float32)[2**31 :]  # a wrapped offset stays inside the memory
    plan.buffers[2, 64] = part, untouched(2 * (2 * shift + 2**16)).view(torch.float32)
    assert_same(decoded(*made), wanted, length)
    assert_same(appended(*made), wanted_step, length)


def untouched(elements):
    """fp16 memory of this size; pages are allocated only when touched."""
    if CUDA:
        return torch.zeros(elements, dtype=torch.float16, device=DEVICE)
    no_reserve = 0x4000  # Linux; in Python's mmap from 3.13 on
    memory = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=torch.float16)


# ---------------------------------------------------------------- bitwise equality


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_the_work_does_not_matter(dtype):
    """In the interpreter, the last item in the list finishes last, so every order merges differently."""
    made = *_, length, _, plan = problem([130, 64, 3, 97], 2, 4, 64, dtype, split=32)
    wanted, wanted_step = decoded(*made), appended(*made)
    for seed in range(4):
        order = torch.randperm(len(plan.items[0]), generator=torch_random(seed))
        plan.items[0].copy_(plan.items[0][order.to(DEVICE)])
        spoil(plan, 4, 64)
        assert_same(decoded(*made), wanted, length, f"seed {seed}")
        assert_same(appended(*made), wanted_step, length, f"step, seed {seed}")
        assert (plan.tickets(1) == 0).all()


def test_the_neighbours_do_not_matter():
    """One sequence alone, between others, and with neighbours of other lengths."""
    alone = q, k, v, start, length, cap, _ = problem([90, 33], 2, 4, 64, split=32)
    new = torch.randn(2, 1, 2, 64).to(q)
    wanted, wanted_step = decoded(*alone), appended(*alone, new)
    for others in ([1, 0], [400, 7]):
        between = q2, k2, v2, start2, *_ = problem([*others, 90, 33, *others], 2, 4, 64, split=32, seed=5)
        q2[1] = q[0]
        for s in (0, 1):
            n, a, b = int(cap[s]), int(start2[2 + s]), int(start[s])
            k2[a : a + n], v2[a : a + n] = k[b : b + n], v[b : b + n]
        assert_same([t[1:2] for t in decoded(*between)], wanted, length)
        got = appended(*between, new.expand(2, 3, 2, 64))
        assert_same([t[1:2] for t in got], wanted_step, length)


@pytest.mark.parametrize("way", ["two launches", "step"])
def test_what_a_table_of_tiles_may_change(way, monkeypatch, tmp_path):
    """For a fixed split, stages never change a bit. Another BN sums in another order: close, not equal. (On a GPU so
    may warps; in the interpreter neither warps nor stages exist.) Both launchers use the table of tiles.py."""
    q, k, v, start, length, cap, plan = made = problem([130, 64, 3, 97], 2, 4, 64, split=64)
    arch = architecture(q.device)
    formula = chosen(4, 64, 4, arch, {})
    new = torch.randn(2, 2, 2, 64).to(q)

    def run(**tuned):
        tile, given = formula | tuned, (k, v, length, plan, 64**-0.5)
        if way == "step":
            return append_attend(q, *new, *given, tile=tile)
        out, lse = attend(q[:, None], *given, tile=tile)
        return out[:, 0], lse[:, 0]

    wanted, other = run(), run(BN=formula["BN"] // 2)
    for stages in (1, 2, 3):
        assert_same(run(num_stages=stages), wanted, length, f"{stages} stages")
    torch.testing.assert_close(other, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(other[0], wanted[0])
    entries = {entry(formula, 4): {"BN": formula["BN"] // 2}}
    (tmp_path / "tuned.json").write_text(json.dumps({arch: {"about": "", "tiles": entries}}))
    monkeypatch.setattr("kernels.tiles.TUNED", tmp_path / "tuned.json")
    assert_same(appended(*made, new) if way == "step" else decoded(*made), other, length, "of the table")


# ---------------------------------------------------------------- consecutive steps


def step_over(plan):
    """A step for `check_step`."""
    return lambda *step, **how: ragged_decode_append(*step, plan=plan, backend="triton", **how)


def test_steps_follow_each_other_over_one_plan():
    """Segments cross a split border, start empty and become full; each step resets tickets and partial results."""
    _, *arenas, start, length, cap, plan = problem([30, 0, 64, 7], 2, 2, 64, slack=4, split=32)
    kept = []
    for step in range(6):  # in the last two steps every segment is full
        generator = torch_random(step)
        q, *new = (torch.randn(2, h, 64, generator=generator).to(DEVICE) for h in (4, 2, 2))
        spoil(plan, 2, 64)
        arenas = check_step(step_over(plan), q, new, arenas, (start, length, cap), f"step {step}")
        kept = kept or [*plan.buffers.values()]  # work items, tickets and a workspace, allocated once
        assert len(kept) == 3 and all(a is b for a, b in zip(kept, plan.buffers.values(), strict=True))
        length += (length < cap).int()
    assert torch.equal(length, cap)


@pytest.mark.parametrize(("group", "d", "dtype"), [(17, 64, torch.float32), (20, 256, torch.float16)])
def test_more_query_heads_than_a_tile_has_rows(group, d, dtype):
    """Several programs per split: each merges its own rows, and one stores the new token."""
    q, *arenas, start, length, cap, plan = problem([70, 5], 2, group, d, dtype, split=32)
    assert tiles(group, d, q.element_size())["M"] < group
    new = [torch.randn(1, 2, d).to(q) for _ in "kv"]
    for _ in range(2):  # the tickets are reset
        arenas = check_step(step_over(plan), q, new, arenas, (start, length, cap))


class Replayed:
    """Stands in for CUDA's graph: undoes what a capture records, and a replay runs it without the host's part."""

    def __init__(self, step):
        self.step = step

    def replay(self):
        cache, counts = self.step.cache, self.step.cache.counts
        cache.claim(-1)  # compensates `grow`, which a real replay does not run
        self.step.logits.copy_(self.step._step(self.step.ids))
        assert cache.counts == counts


def stand_in(step, monkeypatch):
    """Let a step capture and replay a stand-in graph."""

    @contextlib.contextmanager
    def record(graph, stream=None):
        cache = step.cache
        rows = [t for layer in range(len(cache.k)) for t in cache.rows(layer) if t is not None]
        tables = cache.kv_len, cache.pos, *rows
        before, version = [t.clone() for t in tables], cache.version
        yield
        assert cache.version == version, "a capture must not move the arenas"
        for table, old in zip(tables, before, strict=True):
            table.copy_(old)

    monkeypatch.setattr(step, "captures", True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Replayed(step))
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", type("device", (contextlib.nullcontext,), {}))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)


@pytest.mark.usefixtures("frequent_repacks")
@pytest.mark.parametrize(("slack", "batch", "kind"), [(1, 1, "auto"), (2, 1, "int8"), (5, 2, "auto"), (3, 2, "fp8")])
def test_captured_steps_count_their_slots(slack, batch, kind, monkeypatch):
    """The host side of `FastStep` with a stand-in graph: captures, replays, repacks, and a turn in between."""
    model, x = small_llama().to(DEVICE), torch.randn(batch, 9, 32, device=DEVICE)
    caches = [RaggedCache(3, slack, "triton", kind) for _ in range(2)]
    for cache in caches:
        model.prefill(x, cache)
    step = FastStep(model, caches[0])
    stand_in(step, monkeypatch)
    replays = 0
    for token in range(24):
        ids = torch.full((batch,), token, device=DEVICE)
        got = step(ids).clone()
        replays += step.graph is not None
        torch.testing.assert_close(got, model.logits(model.decode(model.model.embed_tokens(ids), caches[1])))
        if token == 12:
            turn = torch.randn(batch, 3, 32, device=DEVICE)
            for cache in caches:
                model.extend(turn, cache)
    assert replays > 4 and caches[0].room == caches[1].room >= 0
    assert torch.equal(caches[0].kv_len, caches[1].kv_len) and (caches[0].kv_len <= caches[0].kv_cap).all()


@pytest.mark.parametrize(("slack", "extra"), [(1, 1), (4, 6)])
def test_captured_steps_evict(slack, extra, monkeypatch):
    """The graph may be captured before the first eviction: the device decides. A turn of the prompt in between."""
    model, x = small_llama().to(DEVICE), torch.randn(1, 9, 32, device=DEVICE)
    caches = [RaggedCache(3, slack, "triton") for _ in range(2)]
    for cache in caches:
        model.prefill(x, cache)
        sums = torch.rand(18, generator=torch_random(3)).to(DEVICE)
        sums[::3] = float("inf")  # tokens 0, 3 and 6 of each head
        cache.watch([sums] * 3, [torch.arange(9, device=DEVICE).repeat(2)] * 3, 0.5, extra)
    step, replays, moves = FastStep(model, caches[0]), 0, set()
    stand_in(step, monkeypatch)
    for token in range(20):
        ids = torch.full((1,), token, device=DEVICE)
        got = step(ids).clone()
        replays += step.graph is not None
        moves.add(caches[0].version)
        torch.testing.assert_close(got, model.logits(model.decode(model.model.embed_tokens(ids), caches[1])))
        if token == 12:
            for cache in caches:
                model.extend(torch.ones(1, 3, 32, device=DEVICE), cache)
    ours, theirs = caches
    assert replays > 12 and len(moves) <= 3 and ours.counts == theirs.counts and ours.ahead == [0]
    assert torch.equal(ours.kv_len, theirs.kv_len) and ours.kv_len.unique().tolist() == [9 + extra + 3]
    for layer in range(3):
        for rows, others in zip(ours.positions(layer), theirs.positions(layer), strict=True):
            assert torch.equal(rows, others)


@pytest.mark.parametrize("fails", ["capture", "first replay", "later replay"])
def test_a_graph_that_finds_no_memory_claims_nothing(fails, monkeypatch):
    """As in a batch, which undoes its step after an error."""
    model, cache = small_llama().to(DEVICE), RaggedCache(3, 9, "triton")
    model.prefill(torch.randn(1, 9, 32, device=DEVICE), cache)
    step = FastStep(model, cache)
    stand_in(step, monkeypatch)
    ids = torch.tensor([5], device=DEVICE)
    for _ in range(3 if fails == "later replay" else 1):
        step(ids)
    record, tables = torch.cuda.graph, (cache.kv_len.clone(), cache.pos.clone(), cache.room)

    @contextlib.contextmanager
    def broken(graph, stream=None):
        with record(graph):
            yield
        raise torch.OutOfMemoryError("when the capture ends")

    def no_memory(self):
        raise torch.OutOfMemoryError("when it is launched")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError), cache.reserving(1):
        patch.setattr(*((torch.cuda, "graph", broken) if fails == "capture" else (Replayed, "replay", no_memory)))
        step(ids)
    assert torch.equal(cache.kv_len, tables[0]) and torch.equal(cache.pos, tables[1]) and cache.room == tables[2]
    step(ids)
    assert torch.equal(cache.pos, tables[1] + 1) and cache.room == tables[2] - 1


# ---------------------------------------------------------------- only on a GPU


@ONLY_CUDA
def test_with_a_plan_a_step_asks_nothing_and_leaves_nothing():
    made = problem([30, 5], 2, 2, 64)
    new = torch.randn(2, 1, 2, 64, device=DEVICE)
    appended(*made, new)
    torch.cuda.synchronize()
    gc.collect()  # memory of earlier tests
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            appended(*made, new), decoded(*made)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before


@ONLY_CUDA
@pytest.mark.parametrize(("temperature", "kind"), [(0.0, "auto"), (0.8, "auto"), (0.0, "int8"), (0.0, "fp8")])
def test_the_captured_decode_loop_says_what_eager_steps_say(temperature, kind):
    if kind == "fp8" and not has_e4m3(torch.device("cuda")):
        pytest.skip("this GPU has no float8_e4m3fn")
    demo = load(DEMO, "fp32", "cuda")
    sampling = Sampling(max_new_tokens=100, temperature=temperature, top_p=0.9 if temperature else None)
    asked = demo, "Describe the picture.", [DEMO_PICTURE], sampling
    captured, eager = (Generation(*asked, backend=way, kv_dtype=kind) for way in ("triton", "torch"))
    assert "".join(captured) == "".join(eager) and captured.token_ids == eager.token_ids


@ONLY_CUDA
@CODES
@pytest.mark.parametrize("group", [1, 4])
def test_ten_thousand_replays_are_equal(group, codes):
    """A race in the ticket would eventually merge a missing part."""
    made = problem([3000, 17, 900, 2048] * 4, 4, group, 128, torch.bfloat16, split=128)
    made, scales = in_codes(made, codes)
    new = torch.randn(2, 4, 4, 128, device=DEVICE, dtype=torch.bfloat16)
    wanted = appended(*made, new, **scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        spoil(made[-1], group, 128)  # a merge that reads too early must not find the part of the previous replay
        got = appended(*made, new, **scales)
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(10_000):
        graph.replay()
        differing += (got[0] != wanted[0]).any() | (got[1] != wanted[1]).any()
    assert differing.item() == 0 and (made[-1].tickets(1) == 0).all()


@ONLY_CUDA
@CODES
def test_a_growing_series_in_a_graph_equals_eager(codes):
    made, scales = in_codes(problem([500, 0, 128, 127], 2, 4, 128, torch.bfloat16, slack=300, split=128), codes)
    q, k, v, start, length, cap, plan = made
    new = torch.zeros(2, 2, 2, 128, device=DEVICE, dtype=torch.bfloat16)
    eager, eager_length = (k.clone(), v.clone()), length.clone()
    eager_scales = {name: scale.clone() for name, scale in scales.items()}
    appended(*made, new, **scales)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = appended(*made, new, **scales)
        length += 1
    for step in range(280):
        for t in (q, *new):
            t.copy_(torch.randn(t.shape, generator=torch_random(step)))
        graph.replay()
        wanted = appended(q, *eager, start, eager_length, cap, plan, new, **eager_scales)
        eager_length += 1
        assert_same(got, wanted, eager_length, f"step {step}")
        if step % 40 == 0:
            check(got, q, k, v, start, length, **scales)
