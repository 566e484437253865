"""What a decode step attends to, summed per slot, and the eviction of the slots with the least.

    score[slot] += mean over g of exp(scale * q_g . k[slot] - lse_g)      for each slot that the new token sees

H2O (arXiv 2306.14048) calls tokens with a high sum heavy hitters. Slots are in no order: a key carries its position, so
attention does not depend on where a token lies in its segment. An eviction therefore moves one row, the last:

    [a b c d e . .]   c has the lowest score   ->   [a b e d . . .]

Beside the arenas lie score (N,) fp32, infinite for tokens that are never evicted, and token (N,) int32, the position of
the token in each slot.
"""

import torch

from .quantise import dequantised
from .ragged_decode import rotated

ROWS = 2**24  # scores that the PyTorch backend stores at a time


def add_scores_ref(q, k, score, token, kv_start, kv_len, pos, *, rope=None, scale=None, k_scale=None):
    """The specification of `add_scores`: loops over segments and rows, computes in fp32 (float64 stays float64)."""
    rows = rotated(q, rope)[:, None] if q.ndim == 3 else q
    b, t, hq, d = rows.shape
    hkv, compute = len(kv_start) // b, torch.promote_types(q.dtype, torch.float32)
    for s, (start, length) in enumerate(zip(kv_start.tolist(), kv_len.tolist(), strict=True)):
        taken, old = slice(start, start + length), start + length - t
        heads = slice(s % hkv * (hq // hkv), (s % hkv + 1) * (hq // hkv))
        keys = dequantised(k[taken], None if k_scale is None else k_scale[taken], compute).to(compute)
        score[old : old + t] = 0
        token[old : old + t] = torch.arange(int(pos[s // hkv]) - t, int(pos[s // hkv]), device=q.device)
        for i in range(t):
            seen = length - t + 1 + i
            logits = (d**-0.5 if scale is None else scale) * rows[s // hkv, i, heads].to(compute) @ keys[:seen].T
            score[start : start + seen] += logits.softmax(-1).mean(0).to(score.dtype)


def add_scores(q, k, score, token, kv_len, pos, plan, backend, *, lse=None, rope=None, scale=None, k_scale=None):
    """Add to score what the newest tokens of each segment attend to, after they were stored; in place.

    q        (B, Hq, D) of one new token per sequence, or (B, T, Hq, D) of the last T, rotated; token i of T sees the
             segment up to itself
    k        (N, D) arena, or its codes with k_scale (N,) fp16
    score    (N,) fp32; the new tokens' own sums begin at 0
    token    (N,) int32; the new tokens get their positions, the last T before pos
    kv_len   (S,) int32, the new tokens included; pos (B,) int64, position of the token after them
    plan     `decode_plan` of the segments; backend "triton" or "torch"
    lse      (B, Hq) fp32, log-sum-exp of the scores of q over its segment; Triton needs it, PyTorch computes it
    rope     (cos, sin), each (B, 1, D), if q (B, Hq, D) is not yet rotated

    As in `unchecked_decode`, arguments must fit. Deterministic; with Triton a sequence's results do not depend on the
    others. Triton reads K once more; several tokens at a time take the PyTorch form on every backend.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "triton" and q.ndim == 3:
        from . import slot_scores_triton  # only here: the rest works without triton

        slot_scores_triton.add(q, k, score, token, kv_len, pos, plan, lse, rope, scale, k_scale)
        return
    q = rotated(q, rope)[:, None] if q.ndim == 3 else q
    b, t, device = len(q), q.shape[1], q.device
    rows = q.unflatten(2, (plan.segments // b, -1)).transpose(1, 2).flatten(0, 1)  # (S, T, G, D)
    column, compute = torch.arange(plan.longest, device=device), torch.promote_types(q.dtype, torch.float32)
    at = torch.minimum(column, kv_len[:, None] - 1)  # (S, n): the last row again and again instead of free slots
    slot = plan.kv_start[:, None] + at
    keys = dequantised(k[slot], None if k_scale is None else k_scale[slot], compute).to(compute).mT  # (S, D, n)
    sums = torch.zeros(slot.shape, dtype=compute, device=device)
    size = max(1, ROWS // (slot.numel() * rows.shape[2]))
    for first, block in zip(range(0, t, size), rows.split(size, 1), strict=True):
        logits = scale * (block.flatten(1, 2).to(compute) @ keys).unflatten(1, block.shape[1:3])  # (S, t, G, n)
        last = kv_len[:, None] - t + first + torch.arange(block.shape[1], device=device)  # (S, t), a token sees itself
        logits.masked_fill_((column > last[..., None])[:, :, None], float("-inf"))
        sums += logits.softmax(-1).mean(2).sum(1)
    sums = torch.where(column < kv_len[:, None] - t, score[slot] + sums, sums).to(score.dtype)
    sums, new = sums.gather(1, at).flatten(), torch.arange(-t, 0, device=device)
    place = (pos.repeat_interleave(plan.segments // b)[:, None] + new).flatten().int()
    token.index_copy_(0, ((plan.kv_start + kv_len)[:, None] + new).flatten(), place)
    score.index_copy_(0, slot.flatten(), sums)


def evict_ref(arenas, score, token, kv_start, kv_len, limit, before):
    """The specification of `evict`."""
    for s, (start, length) in enumerate(zip(kv_start.tolist(), kv_len.tolist(), strict=True)):
        old = [a for a in range(start, start + length) if token[a] < before[s] and score[a] < float("inf")]
        if length < limit[s] or not old:
            continue
        victim = min(old, key=lambda a: (float(score[a]), -int(token[a])))
        for arena in (*arenas, score, token):
            if arena is not None:
                arena[victim] = arena[start + length - 1]
        kv_len[s] -= 1


def evict(arenas, score, token, kv_len, limit, before, plan, backend):
    """Evict a token from each segment with kv_len >= limit: the last row moves into its slot, and kv_len decreases.

    It is the token with the lowest score, and of equal scores the latest. Tokens from position `before` on and those
    with an infinite score stay; a segment that has no others keeps all.

    arenas   k, v, k_scale and v_scale; the scales may be None. score (N,) fp32, token (N,) int32; see above
    kv_len, limit, before   (S,) int32; kv_len is changed in place
    plan     `decode_plan` of the segments; backend "triton" or "torch"

    As in `unchecked_decode`, arguments must fit. Nothing is copied to the host. If memory runs out, nothing has moved.
    """
    if backend == "triton":
        from . import slot_scores_triton

        slot_scores_triton.evict(arenas, score, token, kv_len, limit, before, plan)
        return
    column = torch.arange(plan.longest, device=score.device)
    slot = plan.kv_start[:, None] + torch.minimum(column, kv_len[:, None] - 1).clamp(min=0)  # (S, n)
    there = (column < kv_len[:, None]) & (token[slot] < before[:, None])
    sums = score[slot].masked_fill(~there, float("inf"))
    lowest = sums.amin(1, keepdim=True)
    latest = torch.where(sums == lowest, token[slot], -1).argmax(1, keepdim=True)
    goes = (kv_len >= limit) & (lowest[:, 0] < float("inf"))
    last = slot.gather(1, (kv_len[:, None] - 1).clamp(min=0).long())[:, 0]
    victim = torch.where(goes, slot.gather(1, latest)[:, 0], last)  # where nothing goes, a row replaces itself
    moved = [(_bits(arena), _bits(arena)[last]) for arena in (*arenas, score, token) if arena is not None]
    fewer, victim = goes.int(), victim.long()
    for arena, row in moved:
        arena.index_copy_(0, victim, row)
    kv_len.sub_(fewer)


def _bits(t):
    """A view of fp8 as int8, because PyTorch has no index_copy_ for fp8."""
    return t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t
