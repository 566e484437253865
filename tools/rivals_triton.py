"""Two other ways to decode from heads of different lengths, in Triton, for `bench_kernels.py` to compare with.

Both store the new token in a launch of its own, compute partial results in a second and reduce them in a third. They
are written for this comparison after the published code, not copied; partial results are fp32, tiles are not tuned.

    compactor-style   compactor-vllm (vnchari/compactor-vllm, 48d9f65): pages, one table per head; as many splits for
                      every head, 1 to 12 by a rule for the whole batch. Theirs tunes tiles and rounds partial results
    fastdms-style     FastDMS (shisa-ai/FastDMS, 4b6e142): a range of slots per head; splits of 256 slots, a grid for
                      the longest head, whose length the caller passes. Theirs reads fp8
"""

import torch
import triton
import triton.language as tl

from kernels.backend import interpreted

PAGE, SPLIT = 128, 256  # slots per page of compactor-style; per split of fastdms-style
TILE = 64  # slots; a page consists of whole tiles


@triton.jit
def _row(where, segment, slot, width, PAGE: tl.constexpr):
    """Row of a segment's slot. where: a table (S, width) of pages, or with PAGE 0 each segment's first row (S,)."""
    if PAGE:
        return tl.load(where + segment * width + slot // PAGE).to(tl.int64) * PAGE + slot % PAGE
    return tl.load(where + segment).to(tl.int64) + slot


@triton.jit
def store_kernel(k_new, v_new, k, v, where, length, width, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr):
    """grid (S,): store the new token, the last of the segment's `length`."""
    segment, col = tl.program_id(0), tl.arange(0, DP)
    to = _row(where, segment, tl.load(length + segment) - 1, width, PAGE) * D + col
    at = segment.to(tl.int64) * D + col
    tl.store(k + to, tl.load(k_new + at, col < D), col < D)
    tl.store(v + to, tl.load(v_new + at, col < D), col < D)


@triton.jit
def partial_kernel(
    q, k, v, where, length, part, part_lse, scale, width, least,
    G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """grid (S, splits): attention of a segment's G query rows over one split, of at least `least` slots."""
    segment, splits = tl.program_id(0), tl.num_programs(1)
    end = tl.load(length + segment)
    size = tl.maximum(least, tl.cdiv(tl.cdiv(end, splits), BN) * BN)
    begin = tl.program_id(1) * size
    if begin >= end:
        return
    g, col = tl.arange(0, M), tl.arange(0, DP)
    there = (g < G)[:, None] & (col < D)[None, :]
    rows = tl.load(q + (segment.to(tl.int64) * G + g[:, None]) * D + col[None, :], there, 0.0)  # [M, DP]
    if UP:
        rows = rows.to(tl.float32)
    m, total, acc = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32), tl.zeros([M, DP], tl.float32)
    start = _row(where, segment, begin, width, PAGE)
    for first in range(begin, tl.minimum(begin + size, end), BN):
        taken = first + tl.arange(0, BN) < end
        row = _row(where, segment, first, width, PAGE) if PAGE else start + (first - begin)
        at = (row + tl.arange(0, BN))[:, None] * D + col[None, :]
        known = taken[:, None] & (col < D)[None, :]
        keys, values = tl.load(k + at, known, 0.0), tl.load(v + at, known, 0.0)  # [BN, DP]
        if UP:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        s = tl.dot(rows, tl.trans(keys), input_precision="ieee") * scale
        s = tl.where(taken[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        p, fade = tl.exp2(s - top[:, None]), tl.exp2(m - top)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        m = top
    at = (segment.to(tl.int64) * splits + tl.program_id(1)) * G + g
    tl.store(part + at[:, None] * D + col[None, :], acc / total[:, None], there)
    tl.store(part_lse + at, m + tl.log2(total), g < G)


@triton.jit
def reduce_kernel(
    part, part_lse, length, out, splits, least,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """grid (S, G): merge the partial results of one query row."""
    segment, col = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    end = tl.load(length + segment)
    live = tl.cdiv(end, tl.maximum(least, tl.cdiv(tl.cdiv(end, splits), BN) * BN))
    m, total, acc = float("-inf"), 0.0, tl.zeros([DP], tl.float32)
    for i in range(0, live):
        at = (segment * splits + i) * G + tl.program_id(1)
        lse = tl.load(part_lse + at)
        top = tl.maximum(m, lse)
        fade, weight = tl.exp2(m - top), tl.exp2(lse - top)
        acc = acc * fade + weight * tl.load(part + at * D + col, col < D, 0.0)
        total = total * fade + weight
        m = top
    to = out + (segment * G + tl.program_id(1)) * D + col
    tl.store(to, (acc / total).to(out.dtype.element_ty), col < D)


def decode(q, new, k, v, where, length, splits, least, page):
    """q (B, Hq, D) over k, v (N, D) -> like q. new: [] or K and V (B, Hkv, D) of a new token to store first.

    where: int32 page table (S, pages), or (S,) first rows and page 0; length (S,) int32, the new token counted, at
    least 1; splits: programs per segment; least: slots per split at least, a multiple of TILE.
    """
    (segments, d), width = (len(length), q.shape[-1]), where.stride(0)
    group, dp = q.shape[0] * q.shape[1] // segments, max(16, triton.next_power_of_2(d))
    out, shape = torch.empty_like(q), (segments, splits, group)
    part, part_lse = (torch.empty(s, dtype=torch.float32, device=q.device) for s in ((*shape, d), shape))
    with torch.cuda.device_of(q):
        if new:
            store_kernel[(segments,)](*new, k, v, where, length, width, D=d, DP=dp, PAGE=page, num_warps=1)
        partial_kernel[segments, splits](
            q, k, v, where, length, part, part_lse, d**-0.5 * 1.4426950408889634, width, least,
            G=group, M=max(16, triton.next_power_of_2(group)), D=d, DP=dp, BN=TILE, PAGE=page, UP=interpreted(),
            num_warps=4, num_stages=3 if q.element_size() == 2 else 2,
        )  # fmt: skip
        reduce_kernel[segments, group](part, part_lse, length, out, splits, least, G=group, D=d, DP=dp, BN=TILE)
    return out


def split_count(segments, longest, units):
    """Splits of every head in compactor-style, for a device with `units` multiprocessors.

    One if the heads nearly fill the device or are short; else, up to 12 splits of more than 512 slots, the fewest that
    fill their waves of programs at least 75 % as well as the best count.
    """
    longest = 1 << longest.bit_length()
    if segments >= 0.8 * units or longest <= 1024:
        return 1
    waves = {s: segments * s / units for s in range(1, 13) if longest / s > 512}
    filled = {s: w / -(-w // 1) for s, w in waves.items()}
    return min(s for s, share in filled.items() if share >= 0.75 * max(filled.values()))
