"""`window_scores` in Triton: two kernels that read only q and k. No W x T matrix of probabilities is stored.

    lse_kernel    a program per (KV head, split of the keys, tile of rows): log-sum-exp of each query row over it
    mass_kernel   a program per (KV head, BN keys): merges the splits of each row, sums exp(s - lse) over the rows

      query rows of a KV head      keys 0 ............ T      lse[row, split]      score[column]
      g = 0: w = 0 .. W - 1        |-- split 0 --|-- ...  -->  one number each  -->  sum over w, then over g
      g = 1: w = 0 .. W - 1

Columns are independent, so no reduction between programs is needed. Keys are read twice, 2 * Hkv * T * D * itemsize
bytes; each tile of keys reads 4 * G * W * splits bytes of lse (from L2). 4 * G * W FLOP per key element:
memory-bound for few query rows, compute-bound from about 64. The specification is `window_scores_ref`.
"""

import torch
import triton
import triton.language as tl

from .backend import head_and_token_strides, interpreted
from .ragged_decode_triton import LOG2_E
from .tiles import tiles


@triton.jit
def _rows(
    q, head, w, there, stride_h, stride_w,
    D: tl.constexpr, DP: tl.constexpr, ALIGN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Query rows [M, DP]: row w[i] of query head `head`; head is a scalar or [M]."""
    col = tl.arange(0, DP)
    row = (head.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w) * ALIGN
    rows = tl.load(q + row[:, None] + col[None, :], there[:, None] & (col < D)[None, :], 0.0)
    return rows.to(tl.float32) if UP else rows  # the interpreter cannot compute in 16 bits


@triton.jit
def _keys(
    k, head, column, end, stride_h, stride_t,
    D: tl.constexpr, DP: tl.constexpr, ALIGN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Keys [BN, DP] of a KV head at positions `column`; 0 from position `end` on."""
    col = tl.arange(0, DP)
    row = (head.to(tl.int64) * stride_h + column.to(tl.int64) * stride_t) * ALIGN
    keys = tl.load(k + row[:, None] + col[None, :], (column < end)[:, None] & (col < D)[None, :], 0.0)
    return keys.to(tl.float32) if UP else keys


@triton.jit
def _scores(rows, keys, scale, there, position, column, end):
    """Scores [M, BN] to base 2; -inf for keys after a row's position or from `end` on, and in padding rows."""
    s = tl.dot(rows, tl.trans(keys), input_precision="ieee") * scale
    seen = (column[None, :] <= position[:, None]) & (column < end)[None, :]
    return tl.where(there[:, None] & seen, s, float("-inf"))


@triton.jit
def lse_kernel(
    q, k, q_pos, lse,
    scale, window, tokens, size, q_stride_h, q_stride_w, k_stride_h, k_stride_t,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    UP: tl.constexpr,
):  # fmt: skip
    """grid (Hkv, splits of `size` keys, tiles of M rows): lse (Hq, W, splits) to base 2."""
    # this program's split of the keys and its rows
    head, split = tl.program_id(0), tl.program_id(1)
    r = tl.program_id(2) * M + tl.arange(0, M)  # r = g * W + w
    there, w, query_head = r < G * window, r % window, head * G + r // window
    # load the query rows
    position = tl.load(q_pos + w, there, -1)
    rows = _rows(q, query_head, w, there, q_stride_h, q_stride_w, D, DP, ALIGN, UP)
    m, l = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    # stream the keys
    end = tl.minimum(tokens, (split + 1) * size)
    for first in range(split * size, end, BN):
        column = first + tl.arange(0, BN)
        keys = _keys(k, head, column, end, k_stride_h, k_stride_t, D, DP, ALIGN, UP)
        s = _scores(rows, keys, scale, there, position, column, end)
        top = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(top == float("-inf"), 0.0, top)  # no keys so far
        l = l * tl.exp2(m - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        m = top
    l = tl.where(l == 0, 1.0, l)  # no key in this split: m is -inf
    tl.store(lse + (query_head * window + w) * tl.num_programs(1) + split, m + tl.log2(l), there)


@triton.jit
def mass_kernel(
    q, k, q_pos, lse, out,
    scale, window, tokens, splits, q_stride_h, q_stride_w, k_stride_h, k_stride_t,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, ALIGN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """grid (Hkv, tiles of BN keys): out (Hkv, T), or (Hq, T) for GROUP "none"."""
    # load this program's keys
    head = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    keys = _keys(k, head, column, tokens, k_stride_h, k_stride_t, D, DP, ALIGN, UP)
    split = tl.arange(0, SPLITS)
    total = tl.zeros([BN], tl.float32)
    # stream the query rows, head by head
    for g in range(0, G):
        query_head, mass = head * G + g, tl.zeros([BN], tl.float32)
        for first in range(0, window, M):
            w = first + tl.arange(0, M)
            there = w < window
            position = tl.load(q_pos + w, there, -1)
            rows = _rows(q, query_head, w, there, q_stride_h, q_stride_w, D, DP, ALIGN, UP)
            s = _scores(rows, keys, scale, there, position, column, tokens)
            known = there[:, None] & (split < splits)[None, :]
            pieces = tl.load(lse + (query_head * window + w)[:, None] * splits + split[None, :], known, float("-inf"))
            top = tl.max(pieces, 1)
            top = tl.where(top == float("-inf"), 0.0, top)  # a padding row
            whole = tl.sum(tl.exp2(pieces - top[:, None]), 1)
            mass += tl.sum(tl.exp2(s - top[:, None]) / tl.where(whole == 0, 1.0, whole)[:, None], 0)
        mass /= window
        if GROUP == "none":
            tl.store(out + query_head.to(tl.int64) * tokens + column, mass, column < tokens)
        elif GROUP == "mean":
            total += mass / G
        else:
            total = tl.maximum(total, mass)
    if GROUP != "none":
        tl.store(out + head.to(tl.int64) * tokens + column, total, column < tokens)


def keys_per_split(tokens):
    """Keys per program of `lse_kernel`: 128 for each 1,024 keys, up to 1,024. Up to 8,192 keys that makes at most 8
    splits, so that few KV heads fill more of the device; mass_kernel reads every split's lse for every tile of keys."""
    return min(1024, 128 * triton.cdiv(tokens, 1024))


def scores(q, k, q_pos, scale, group):
    """q (Hq, W, D), k (Hkv, T, D), rows contiguous; q_pos (W,) -> fp32 (Hkv, T), or (Hq, T) for "none"."""
    (hq, window, d), (hkv, tokens, _) = q.shape, k.shape
    size = keys_per_split(tokens)
    splits = triton.cdiv(tokens, size)
    lse = torch.empty(hq, window, splits, dtype=torch.float32, device=q.device)
    out = torch.empty(hq if group == "none" else hkv, tokens, dtype=torch.float32, device=q.device)
    strides, align = head_and_token_strides(q, k)
    shared = {"G": hq // hkv, "D": d, "ALIGN": align, "UP": interpreted()}
    with torch.cuda.device_of(q):
        rows = hq // hkv * window
        tile = tiles(rows, d, q.element_size())
        lse_kernel[hkv, splits, triton.cdiv(rows, tile["M"])](
            q, k, q_pos, lse, scale * LOG2_E, window, tokens, size, *strides,
            M=tile["M"], DP=tile["DP"], BN=tile["BN"], **shared, num_warps=4, num_stages=2,
        )  # fmt: skip
        tile = tiles(window, d, q.element_size())
        mass_kernel[hkv, triton.cdiv(tokens, tile["BN"])](
            q, k, q_pos, lse, out, scale * LOG2_E, window, tokens, splits, *strides,
            M=tile["M"], DP=tile["DP"], BN=tile["BN"], SPLITS=triton.next_power_of_2(splits), GROUP=group, **shared,
            num_warps=4,
        )  # fmt: skip
    return out
