"""`add_scores` and `evict` in Triton. The specifications are `add_scores_ref` and `evict_ref`.

    score_kernel    a program per work item of the plan (a split of a segment): reads K once more, (D + 3) * itemsize
                    bytes per slot; no two programs write to one slot
    evict_kernel    a program per segment: finds the lowest score, then the latest of equals, then moves one row

Neither needs the host, so both can be captured in a graph. Memory-bound: D * itemsize + 12 bytes per slot and layer.
"""

import torch
import triton
import triton.language as tl

from .backend import interpreted
from .quantise import CODES
from .ragged_decode_triton import LOG2_E
from .rows_triton import item_of, rotated
from .tiles import architecture, chosen

BASE_2 = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize_on_alignment=["kv_len", "work"])
def score_kernel(
    q, cos, sin, k, k_scale, score, token, kv_len, pos, lse, work,
    scale, heads, q_stride,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, ROPE: tl.constexpr,
    UP: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """grid (items,): add the mean over g of exp(scale * q_g . k - lse_g) to the scores of one split."""
    segment, split, _, size, start, _ = item_of(work)
    length = tl.load(kv_len + segment)
    # request the query rows before the length is known
    r, col = tl.arange(0, M), tl.arange(0, DP)
    sequence, head = (segment // heads).to(tl.int64), segment % heads
    at, there = sequence * q_stride + (head * G + r)[:, None] * D, (r < G)[:, None] & (col < D)[None, :]
    if ROPE:
        c = tl.load(cos + sequence * D + col, col < D, 0.0).to(tl.float32)
        s = tl.load(sin + sequence * D + col, col < D, 0.0).to(tl.float32)
        rows = rotated(q, at, there, c[None, :], s[None, :], col[None, :], D)  # [M, DP]
    else:
        rows = tl.load(q + at + col[None, :], there, 0.0)
    if UP:
        rows = rows.to(tl.float32)
    whole = tl.load(lse + segment * G + r, r < G, float("inf")) * BASE_2  # [M]; inf: padding rows add 0
    position = tl.load(pos + sequence).to(tl.int32)
    # stream K
    begin, end = start + split * size, start + tl.minimum(length, (split + 1) * size)
    for first in range(begin, end, BN):
        slot = first + tl.arange(0, BN)
        taken, newest = slot < end, slot == start + length - 1
        offset = slot.to(tl.int64)[:, None] * D + col[None, :]
        keys = tl.load(k + offset, taken[:, None] & (col < D)[None, :], 0.0)  # [BN, DP]
        if UP or LARGEST:
            keys = keys.to(rows.dtype)
        x = tl.dot(rows, tl.trans(keys), input_precision="ieee") * scale  # [M, BN]
        if LARGEST:
            x *= tl.load(k_scale + slot, taken, 0.0).to(tl.float32)[None, :]
        mass = tl.sum(tl.exp2(x - whole[:, None]), 0) / G
        old = tl.load(score + slot, taken & (slot != start + length - 1), 0.0)  # the newest token's sum begins at 0
        tl.store(score + slot, old + mass, taken)
        tl.store(token + slot, tl.full([BN], 0, tl.int32) + position - 1, taken & newest)


@triton.jit(do_not_specialize_on_alignment=["kv_len", "limit", "before", "kv_start"])
def evict_kernel(
    k, v, k_scale, v_scale, score, token, kv_start, kv_len, limit, before,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """grid (segments,): move the last row of a full segment into the slot with the lowest score."""
    segment = tl.program_id(0)
    start, length = tl.load(kv_start + segment), tl.load(kv_len + segment)
    if length < tl.load(limit + segment):
        return
    bound, lowest = tl.load(before + segment), float("inf")
    for first in range(start, start + length, BN):
        slot = first + tl.arange(0, BN)
        old = tl.load(token + slot, slot < start + length, 2147483647) < bound
        lowest = tl.minimum(lowest, tl.min(tl.load(score + slot, old, float("inf")), 0))
    if lowest == float("inf"):
        return
    latest = tl.full([], -1, tl.int64)  # position of a token and, in the lower 32 bits, its slot
    for first in range(start, start + length, BN):
        slot = first + tl.arange(0, BN)
        place = tl.load(token + slot, slot < start + length, 2147483647)
        least = tl.load(score + slot, place < bound, float("inf")) == lowest
        latest = tl.maximum(latest, tl.max(tl.where(least, (place.to(tl.int64) << 32) + slot, -1), 0))
    victim, last = latest & 0xFFFFFFFF, (start + length - 1).to(tl.int64)
    col = tl.arange(0, DP)
    tl.store(k + victim * D + col, tl.load(k + last * D + col, col < D), col < D)
    tl.store(v + victim * D + col, tl.load(v + last * D + col, col < D), col < D)
    if CODED:
        tl.store(k_scale + victim, tl.load(k_scale + last))
        tl.store(v_scale + victim, tl.load(v_scale + last))
    tl.store(score + victim, tl.load(score + last))
    tl.store(token + victim, tl.load(token + last))
    tl.store(kv_len + segment, length - 1)


def add(q, k, score, token, kv_len, pos, plan, lse, rope, scale, k_scale):
    """q (B, Hq, D), each sequence contiguous, lse (B, Hq) fp32, natural log; the rest as for `add_scores`."""
    q = q if q.stride(2) == 1 and q.stride(1) == q.shape[2] else q.contiguous()
    group, d = q.shape[0] * q.shape[1] // plan.segments, q.shape[2]
    cos, sin = (q, q) if rope is None else (t.contiguous() for t in rope)
    tile = dict(chosen(group, d, q.element_size(), architecture(q.device), coded=k.dtype in CODES))
    del tile["BS"]
    tile["M"] = max(tile["M"], triton.next_power_of_2(group))  # all query heads in one tile
    (work, _, _) = plan.items
    with torch.cuda.device_of(q):
        score_kernel[(len(work),)](
            q, cos, sin, k, k_scale, score, token, kv_len, pos, lse, work,
            scale * LOG2_E, plan.segments // len(q), q.stride(0),
            G=group, D=d, ROPE=rope is not None, UP=interpreted(), LARGEST=CODES.get(k.dtype, 0), **tile,
        )  # fmt: skip


def evict(arenas, score, token, kv_len, limit, before, plan):
    """As `evict` in slot_scores.py; all tensors contiguous."""
    k, v, k_scale, v_scale = arenas
    d = k.shape[1]
    with torch.cuda.device_of(k):
        evict_kernel[(plan.segments,)](
            k, v, k_scale, v_scale, score, token, plan.kv_start, kv_len, limit, before,
            D=d, DP=triton.next_power_of_2(d), BN=512, CODED=k_scale is not None, num_warps=4,
        )  # fmt: skip
