"""Pack the dense K and V of a prefill into arenas that hold only the tokens that each head keeps.

    keep, head 0   1 1 0 1 0 0      k_arena  [a b d . .][c f . .]      kv_start = 0  5     kv_len = 3  2
          head 1   0 0 1 0 0 1      kv_pos    0 1 3 - -  2 5 - -       '.' and '-': `slack` free slots per head

Each kept row is read and written once. The results hold no reference to the dense tensors, whose memory is therefore
freed as soon as the caller drops them.
"""

import torch

from .backend import check_alike, choose_backend


def ragged_pack_ref(k, v, keep, *, slack, total=None):
    """The specification of `ragged_pack`: copies row by row. total is unused."""
    lengths = keep.sum(-1).tolist()
    starts = [sum(lengths[:h]) + h * slack for h in range(len(lengths))]
    n = sum(lengths) + len(lengths) * slack
    k_arena, v_arena = k.new_zeros(n, k.shape[2]), v.new_zeros(n, v.shape[2])
    kv_pos = torch.full((n,), -1, dtype=torch.int32, device=k.device)
    for h, start in enumerate(starts):
        for i, position in enumerate(keep[h].nonzero().flatten().tolist()):
            k_arena[start + i], v_arena[start + i], kv_pos[start + i] = k[h, position], v[h, position], position
    integers = (torch.tensor(x, dtype=torch.int32, device=k.device) for x in (starts, lengths))
    return k_arena, v_arena, *integers, kv_pos


def ragged_pack(k, v, keep, *, slack, total=None, backend="auto"):
    """Pack the tokens that each head keeps, followed by free slots for new tokens.

    k, v     (Hkv, T, D); for several sequences at once (B * Hkv, T, D)
    keep     (Hkv, T) bool
    slack    free slots after each head's tokens; their contents are undefined
    total    number of kept tokens over all heads, if known; on CUDA this avoids a synchronisation
    backend  see `choose_backend`

    Returns k_arena, v_arena (N, D) like k, N = total + Hkv * slack; kv_start, kv_len (Hkv,) int32; kv_pos (N,) int32,
    the original index of each slot's token, -1 for free slots. Kept tokens stay in ascending order. ValueError for
    arguments that do not fit; a wrong total is detected on CPU tensors only.
    """
    _check(k, v, keep, slack)
    way = choose_backend(backend, k.device, k.dtype, (k, v))
    heads, tokens, d = k.shape
    lengths = None
    if total is None or k.device.type == "cpu":
        lengths = keep.sum(-1).tolist()
        if total is not None and total != sum(lengths):
            raise ValueError(f"total is {total}, but keep selects {sum(lengths)} rows; give that number or None")
        total = sum(lengths)
    if total == heads * tokens:
        return _pack_equal(k, v, torch.arange(tokens, device=k.device), slack)
    if way == "triton":
        from . import ragged_pack_triton  # only here: the rest works without triton

        return ragged_pack_triton.pack(k, v, keep, slack, total, lengths)
    head, position = keep.nonzero_static(size=total).unbind(1)  # ascending
    if lengths and min(lengths) == max(lengths):
        shape = heads, lengths[0]
        return _pack_equal(*(x[head, position].view(*shape, d) for x in (k, v)), position.view(shape), slack)
    kv_len = keep.sum(-1)
    kv_start = kv_len.cumsum(0) - kv_len + slack * torch.arange(heads, device=k.device)
    slot = torch.arange(total, device=k.device) + slack * head
    k_arena, v_arena = (x.new_empty(total + heads * slack, d).index_copy_(0, slot, x[head, position]) for x in (k, v))
    kv_pos = torch.full((len(k_arena),), -1, dtype=torch.int32, device=k.device)
    kv_pos[slot] = position.int()
    return k_arena, v_arena, kv_start.int(), kv_len.int(), kv_pos


def _pack_equal(k, v, position, slack):
    """Pack heads of equal length by strided copies: k, v (Hkv, n, D); position (Hkv, n) or (n,) of each token."""
    heads, n, d = k.shape
    k_arena, v_arena = (x.new_empty(heads, n + slack, d) for x in (k, v))
    kv_pos = torch.full((heads, n + slack), -1, dtype=torch.int32, device=k.device)
    for arena, rows in ((k_arena, k), (v_arena, v), (kv_pos, position)):
        arena[:, :n] = rows
    kv_start = torch.arange(heads, dtype=torch.int32, device=k.device) * (n + slack)
    return k_arena.view(-1, d), v_arena.view(-1, d), kv_start, torch.full_like(kv_start, n), kv_pos.flatten()


def _check(k, v, keep, slack):
    """ValueError for arguments that `ragged_pack` does not support."""
    check_alike(k=k, v=v)
    if k.ndim != 3 or k.shape != v.shape or keep.shape != k.shape[:2] or 0 in k.shape:
        shapes = f"k {tuple(k.shape)}, v {tuple(v.shape)}, keep {tuple(keep.shape)}"
        raise ValueError(f"{shapes}; give k and v (Hkv, T, D), keep (Hkv, T), none of them empty")
    if keep.dtype != torch.bool or keep.device != k.device:
        raise ValueError(f"keep is {keep.dtype} on {keep.device}; make it bool on {k.device}")
    if type(slack) is not int or slack < 0:
        raise ValueError(f"slack is {slack}; give an integer number of slots, 0 or more")
