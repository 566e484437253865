"""`ragged_pack` in Triton: one kernel copies the kept rows of K and V and stores the original index of each.

    keep, one head    1 1 0 1 0 0        rank: running count of kept rows. A kept row is copied to
    rank              1 2 2 3 3 3        slot kv_start[head] + rank - 1; dropped rows are not read.

Bytes: 4 * kept * D * itemsize, one read and one write per row; no arithmetic. The specification is `ragged_pack_ref`.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl

from .backend import head_and_token_strides


@triton.jit
def pack_kernel(
    k, v, keep, rank, kv_start, k_arena, v_arena, kv_pos,
    tokens, slots, k_stride_h, k_stride_t, v_stride_h, v_stride_t,
    D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """grid (Hkv, tiles of BT tokens): copy a tile's kept rows. Strides in units of ALIGN; slots: size of the arenas."""
    head, token = tl.program_id(0), tl.program_id(1) * BT + tl.arange(0, BT)
    at = head.to(tl.int64) * tokens + token
    kept = tl.load(keep + at, token < tokens, 0) != 0
    slot = tl.load(kv_start + head) + tl.load(rank + at, kept, 1) - 1
    kept = kept & (slot < slots)  # a wrong total must not cause writes outside the arenas
    col = tl.arange(0, DP)
    there = kept[:, None] & (col < D)[None, :]
    k_row = (head.to(tl.int64) * k_stride_h + token.to(tl.int64) * k_stride_t) * ALIGN
    v_row = (head.to(tl.int64) * v_stride_h + token.to(tl.int64) * v_stride_t) * ALIGN
    keys = tl.load(k + k_row[:, None] + col[None, :], there)  # [BT, DP]
    values = tl.load(v + v_row[:, None] + col[None, :], there)
    to = slot.to(tl.int64)[:, None] * D + col[None, :]
    tl.store(k_arena + to, keys, there)
    tl.store(v_arena + to, values, there)
    tl.store(kv_pos + slot, token, kept)


def pack(k, v, keep, slack, total, lengths=None):
    """k, v (Hkv, T, D), rows contiguous; keep (Hkv, T) bool; total: kept rows; lengths: kept rows per head as a list,
    or None -> what `ragged_pack` returns."""
    heads, tokens, d = k.shape
    rank = keep.cumsum(-1, dtype=torch.int32)
    if lengths is None:
        kv_len = rank[:, -1].contiguous()
        kv_start = kv_len.cumsum(0, dtype=torch.int32) - kv_len
        kv_start += slack * torch.arange(heads, dtype=torch.int32, device=k.device)
    else:  # one copy to the device instead of six launches
        starts = [before + slack * h for h, before in enumerate(accumulate(lengths[:-1], initial=0))]
        kv_start, kv_len = torch.tensor([starts, lengths], dtype=torch.int32, device=k.device)
    slots = total + heads * slack
    k_arena, v_arena = k.new_empty(slots, d), v.new_empty(slots, d)
    kv_pos = torch.full((slots,), -1, dtype=torch.int32, device=k.device)
    strides, align = head_and_token_strides(k, v)
    with torch.cuda.device_of(k):
        pack_kernel[heads, triton.cdiv(tokens, 32)](
            k, v, keep.contiguous(), rank, kv_start, k_arena, v_arena, kv_pos,
            tokens, slots, *strides,
            D=d, DP=max(16, triton.next_power_of_2(d)), BT=32, ALIGN=align, num_warps=4,
        )  # fmt: skip
    return k_arena, v_arena, kv_start, kv_len, kv_pos
