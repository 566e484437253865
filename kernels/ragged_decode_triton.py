"""`ragged_decode` in Triton (Flash-Decoding over ragged segments), and its one-launch form with append.

Each segment is cut into splits; the split size depends only on the segment's capacity. One program computes attention
over one split (a work item). The partial results of a segment are merged in the order of its splits:

    arena        [k k k k k k k k k . . . ][k k . . ][. . . ]     '.' free slot: never read
    plan.items    |- item 0 -|- item 1 -|   |- 2 -|   |- 3 -|     (segment, split, ..., see `DecodePlan.items`)
    live              yes        yes         yes       yes    (the segment of item 3 is empty: it stores output 0)

    s = scale * q k^T    m = max s    l = sum exp(s - m)    part = sum exp(s - m) v / l    lse = m + log l
    out = sum_i exp(lse_i - lse) part_i              lse = log sum_i exp(lse_i)            (arXiv 2205.14135, 2.1)

The item list is built once, from capacities. A program whose split begins at or after kv_len returns after two
dependent loads, so no step needs a new plan. A live one waits for three: its item, kv_len, the first tile of K. All
else that it reads is requested together with kv_len. Results depend neither on other segments nor on the order in
which programs start and finish.

Bytes: 2 * sum(kv_len) * D * itemsize, plus 8 * G * (D + 1) per partial result if a segment has several. 2 * G FLOP per
element of K and V. Memory-bound above about 30 MB; below, limited by launches and latency.
Exponentials are to base 2 (one instruction); scale includes log2(e). The specification is `ragged_decode_ref`.
M, DP, BN, BS: see tiles.py. heads: Hkv. times: T. UP: convert 16-bit inputs to fp32, as the interpreter needs it.
LARGEST: the largest code if K and V are in 8 bits (quantise.py), else 0. Codes are converted to q's type, which loses
nothing; the scales multiply scores and weights, one number per slot.
"""

import torch
import triton
import triton.language as tl

from .backend import interpreted
from .quantise import CODES
from .rows_triton import apart, item_of, quantised, rotated, rows_of, scales_of, together, unpacked
from .tiles import architecture, chosen

LOG2_E, LN_2 = 1.4426950408889634, tl.constexpr(0.6931471805599453)
LIFT = tl.constexpr(64.0)  # keeps weight * scale of V above the subnormals of fp16; at most 64 * 65504 / 127


# ---------------------------------------------------------------- shared by both forms


@triton.jit
def _attend(
    q, k, v, k_scale, v_scale, begin, end, scale, m, l, acc,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, UP: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Attention of q [M, DP] over slots begin .. end - 1; returns the updated softmax state m, l [M], acc [M, DP]."""
    PACK: tl.constexpr = 2 if LARGEST and DP > 32 and D % 2 == 0 else 1  # codes of V are loaded in pairs: `unpacked`
    col, pack = tl.arange(0, DP), tl.arange(0, DP // PACK)
    if LARGEST:
        acc *= LIFT
        k_next, v_next = scales_of(k_scale, v_scale, begin, end, BN)
    if PACK > 1:
        v = v.to(tl.pointer_type(tl.int16), bitcast=True)
        even, odd = apart(acc)
    for first in range(begin, end, BN):
        slot = first + tl.arange(0, BN)
        taken = slot < end
        at = slot.to(tl.int64)[:, None] * D + col[None, :]  # an arena may have more than 2^31 elements
        there = taken[:, None] & (col < D)[None, :]
        keys = tl.load(k + at, there, 0.0)  # [BN, DP]
        if PACK > 1:
            at = slot.to(tl.int64)[:, None] * (D // PACK) + pack[None, :]
            there = taken[:, None] & (pack < D // PACK)[None, :]
        values = tl.load(v + at, there, 0.0)  # [BN, DP / PACK]; masked, because a weight of 0 times NaN is NaN
        if UP or LARGEST:
            keys = keys.to(q.dtype)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale  # [M, BN]
        if LARGEST:
            k_unit, v_unit = k_next, v_next
            k_next, v_next = scales_of(k_scale, v_scale, first + BN, end, BN)
            s *= k_unit.to(tl.float32)[None, :]
        s = tl.where(taken[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))  # finite: each tile has a taken slot
        p = tl.exp2(s - top[:, None])
        fade = tl.exp2(m - top)
        l = l * fade + tl.sum(p, 1)
        if LARGEST:
            p *= v_unit.to(tl.float32)[None, :] * LIFT
        if PACK > 1:
            left, right = unpacked(values, k.dtype.element_ty, q.dtype)
            even = even * fade[:, None] + tl.dot(p.to(q.dtype), left, input_precision="ieee")
            odd = odd * fade[:, None] + tl.dot(p.to(q.dtype), right, input_precision="ieee")
        else:
            acc = acc * fade[:, None] + tl.dot(p.to(q.dtype), values.to(q.dtype), input_precision="ieee")
        m = top
    if LARGEST:
        if PACK > 1:
            acc = together(even, odd)
        acc /= LIFT
    return m, l, acc


@triton.jit
def _merge(
    part, part_lse, first, live, r, there, rows,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of items first .. first + live - 1, in that order -> m, l [M], acc [M, DP].

    The first loop finds the largest log-sum-exp, BS items at a time, so that the second needs no running maximum. The
    second adds one part per iteration in registers: summing a tile of several parts would go through shared memory.
    """
    m = tl.full([M], float("-inf"), tl.float32)
    for i in range(0, live, BS):
        item = i + tl.arange(0, BS)
        at = (first + item).to(tl.int64)[:, None] * rows + r[None, :]  # [BS, M]
        known = (item < live)[:, None] & there[None, :]
        lse = tl.load(part_lse + at, known, float("-inf"), cache_modifier=".cg")  # L2: other programs wrote it
        m = tl.maximum(m, tl.max(lse, 0))
    top = tl.where(there, m, 0.0)[:, None]
    col = tl.arange(0, DP)
    channels = there[:, None] & (col < D)[None, :]
    l, acc = tl.zeros([M, 1], tl.float32), tl.zeros([M, DP], tl.float32)
    for i in range(0, live):
        at = (first + i).to(tl.int64) * rows + r[:, None]  # [M, 1]
        weight = tl.exp2(tl.load(part_lse + at, there[:, None], float("-inf"), cache_modifier=".cg") - top)
        x = tl.load(part + at * D + col[None, :], channels, 0.0, cache_modifier=".cg")  # [M, DP]
        l += weight
        acc += weight * x
    return m, tl.sum(l, 1), acc


@triton.jit
def _store(out, lse, place, there, m, l, acc, UNIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Store rows `place` of out (., D) and lse (.) = UNIT * the base-2 log-sum-exp. No keys: l = 0, out 0, lse -inf."""
    col = tl.arange(0, DP)
    l = tl.where(l == 0, 1.0, l)
    rows = acc / l[:, None]
    at = place.to(tl.int64)
    tl.store(out + at[:, None] * D + col[None, :], rows.to(out.dtype.element_ty), there[:, None] & (col < D)[None, :])
    tl.store(lse + at, (m + tl.log2(l)) * UNIT, there)


# ---------------------------------------------------------------- two launches: splits, then merge


@triton.jit(do_not_specialize_on_alignment=["kv_len", "work"])
def split_kernel(
    q, k, v, k_scale, v_scale, kv_len, work, part, part_lse, out, lse,
    scale, heads, times,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, UP: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """grid (items, tiles of M rows): attention over one split, final if it is the segment's only live one."""
    segment, split, first, size, start, _ = item_of(work)
    length = tl.load(kv_len + segment)
    # request the query rows before the length is known
    r, place, there = rows_of(segment, heads, times, G, M)
    col = tl.arange(0, DP)
    at = place.to(tl.int64)[:, None] * D + col[None, :]
    rows = tl.load(q + at, there[:, None] & (col < D)[None, :], 0.0)  # [M, DP]
    if UP:
        rows = rows.to(tl.float32)
    if (split > 0) & (split * size >= length):
        return
    # stream K and V
    m, l, acc = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, DP], tl.float32)
    begin, end = start + split * size, start + tl.minimum(length, (split + 1) * size)
    m, l, acc = _attend(rows, k, v, k_scale, v_scale, begin, end, scale, m, l, acc, D, DP, BN, UP, LARGEST)
    # store
    if length <= size:
        _store(out, lse, place, there, m, l, acc, LN_2, D, DP)
    else:
        row = (first + split).to(tl.int64) * (times * G) + r  # of the workspace
        _store(part, part_lse, row, there, m, l, acc, 1.0, D, DP)


@triton.jit(do_not_specialize_on_alignment=["kv_len", "firsts", "sizes"])
def merge_kernel(
    kv_len, firsts, sizes, part, part_lse, out, lse,
    heads, times,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """grid (segments, tiles of M rows): merge the partial results of one segment, if it has several."""
    segment = tl.program_id(0)
    live = tl.cdiv(tl.load(kv_len + segment), tl.load(sizes + segment))
    if live <= 1:
        return
    r, place, there = rows_of(segment, heads, times, G, M)
    first = tl.load(firsts + segment)
    m, l, acc = _merge(part, part_lse, first, live, r, there, times * G, D, DP, M, BS)
    _store(out, lse, place, there, m, l, acc, LN_2, D, DP)


# ---------------------------------------------------------------- one launch: append, splits, merge in the last program


@triton.jit(do_not_specialize_on_alignment=["kv_len", "work"])
def append_kernel(
    q, k_new, v_new, cos, sin, k, v, k_scale, v_scale, kv_len, work, tickets, part, part_lse, out, lse,
    scale, heads, q_stride, k_stride, v_stride,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
    ROPE: tl.constexpr, UP: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """grid (items, tiles of M rows): attention over one split. The last split also stores the new token, which kv_len
    does not count, and attends to it. heads: Hkv; strides: between sequences; ROPE: rotate q and k_new first.

    The program that finishes last merges the partial results of its segment. No program waits for another.
    """
    segment, split, first, size, start, cap = item_of(work)
    length = tl.load(kv_len + segment)
    # request the query rows and the new token before the length is known
    r, place, there = rows_of(segment, 1, 1, G, M)
    col = tl.arange(0, DP)
    sequence, head = (segment // heads).to(tl.int64), segment % heads  # 64 bits: offsets may exceed 2^31
    q_at, exists = sequence * q_stride + (head * G + r)[:, None] * D, there[:, None] & (col < D)[None, :]
    # read the new token from k_new, not from the arena: that load would have to wait for the store
    k_at, known = sequence * k_stride + head * D, col < D
    if ROPE:
        c = tl.load(cos + sequence * D + col, known, 0.0).to(tl.float32)
        s = tl.load(sin + sequence * D + col, known, 0.0).to(tl.float32)
        rows = rotated(q, q_at, exists, c[None, :], s[None, :], col[None, :], D)  # [M, DP]
        key = rotated(k_new, k_at, known, c, s, col, D)
    else:
        rows = tl.load(q + q_at + col[None, :], exists, 0.0)
        key = tl.load(k_new + k_at + col, known, 0.0)
    value = tl.load(v_new + sequence * v_stride + head * D + col, known, 0.0)
    last = tl.maximum(tl.cdiv(length, size) - 1, 0)
    if split > last:
        return
    # store the new token and begin with it
    mine = split == last
    free = (start + length).to(tl.int64) * D + col
    fits = mine & (length < cap) & (tl.program_id(1) == 0)
    if LARGEST:
        key, key_scale = quantised(key.to(tl.float32), k.dtype.element_ty, LARGEST)
        value, value_scale = quantised(value.to(tl.float32), v.dtype.element_ty, LARGEST)
        tl.store(k_scale + start + length, key_scale, fits)
        tl.store(v_scale + start + length, value_scale, fits)
    tl.store(k + free, key, fits & known)
    tl.store(v + free, value, fits & known)
    if LARGEST:  # attend to what is stored
        key, value = key.to(tl.float32) * key_scale.to(tl.float32), value.to(tl.float32) * value_scale.to(tl.float32)
    score = tl.sum(rows.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    m = tl.where(mine, score, float("-inf"))  # -inf: the first tile cancels l
    own = tl.where(mine, value.to(tl.float32), 0.0)  # 0, because 0 * inf is NaN
    l, acc = tl.full([M], 1.0, tl.float32), tl.zeros([M, DP], tl.float32) + own[None, :]
    # stream K and V
    if UP:
        rows = rows.to(tl.float32)
    begin, end = start + split * size, start + tl.minimum(length, (split + 1) * size)
    m, l, acc = _attend(rows, k, v, k_scale, v_scale, begin, end, scale, m, l, acc, D, DP, BN, UP, LARGEST)
    # store
    if last == 0:
        _store(out, lse, place, there, m, l, acc, LN_2, D, DP)
    else:
        _store(part, part_lse, (first + split).to(tl.int64) * G + r, there, m, l, acc, 1.0, D, DP)
        tl.debug_barrier()  # one thread increments the counter for all: their stores must come first
        ticket = tickets + segment * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == last:
            m, l, acc = _merge(part, part_lse, first, last + 1, r, there, G, D, DP, M, BS)
            _store(out, lse, place, there, m, l, acc, LN_2, D, DP)
            tl.store(ticket, 0)  # reset for the next step


# ---------------------------------------------------------------- launchers


def attend(q, k, v, kv_len, plan, scale, tile=None, k_scale=None, v_scale=None):
    """q (B, T, Hq, D) over arenas k, v -> out like q, lse (B, T, Hq) fp32, natural log. tile: default `chosen`."""
    b, times, hq, d = q.shape
    rows = times * hq * b // plan.segments
    (work, firsts, sizes), (part, part_lse) = plan.items, plan.scratch(rows, d)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    tile = dict(tile or chosen(rows, d, q.element_size(), architecture(q.device), coded=k.dtype in CODES))
    bs, row_tiles = tile.pop("BS"), triton.cdiv(rows, tile["M"])
    with torch.cuda.device_of(q):
        split_kernel[len(work), row_tiles](
            q, k, v, k_scale, v_scale, kv_len, work, part, part_lse, out, lse,
            scale * LOG2_E, plan.segments // b, times,
            G=rows // times, D=d, UP=interpreted(), LARGEST=CODES.get(k.dtype, 0), **tile,
        )  # fmt: skip
        merge_kernel[plan.segments, row_tiles](
            kv_len, firsts, sizes, part, part_lse, out, lse,
            plan.segments // b, times,
            G=rows // times, D=d, M=tile["M"], DP=tile["DP"], BS=bs, num_warps=4,
        )  # fmt: skip
    return out, lse


def append_attend(q, k_new, v_new, k, v, kv_len, plan, scale, rope=None, tile=None, k_scale=None, v_scale=None):
    """q (B, Hq, D), k_new and v_new (B, Hkv, D), each sequence contiguous: store the new token at kv_len and attend ->
    out like q, lse (B, Hq) fp32. rope: cos and sin (B, 1, D), contiguous, rotate q and k_new first; or None."""
    rows, d = q.shape[0] * q.shape[1] // plan.segments, q.shape[2]
    (work, _, _), (part, part_lse) = plan.items, plan.scratch(rows, d)
    cos, sin = (q, q) if rope is None else rope
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # without the gaps that q may have
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    tile = tile or chosen(rows, d, q.element_size(), architecture(q.device), coded=k.dtype in CODES)
    row_tiles = triton.cdiv(rows, tile["M"])
    with torch.cuda.device_of(q):
        append_kernel[len(work), row_tiles](
            q, k_new, v_new, cos, sin, k, v, k_scale, v_scale, kv_len,
            work, plan.tickets(row_tiles), part, part_lse, out, lse,
            scale * LOG2_E, plan.segments // len(q), q.stride(0), k_new.stride(0), v_new.stride(0),
            G=rows, D=d, ROPE=rope is not None, UP=interpreted(), LARGEST=CODES.get(k.dtype, 0), **tile,
        )  # fmt: skip
    return out, lse
