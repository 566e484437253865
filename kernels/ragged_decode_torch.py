"""`ragged_decode` in PyTorch, without a loop over heads or tokens. The segments are read in one of four ways:

rectangle   segments of equal length at equal distances are a strided view of the arena; no copy
rectangles  several runs of such segments, for example the heads of each sequence in a batch; a loop over runs, no copy
chunks      the arena is viewed as chunks of 64 slots: chunks that lie in one segment are read in place, the two ends of
            each segment are gathered, and the partial results are merged
gather      each segment is copied and padded to the longest; cheapest for small caches, needed if segments overlap

The thresholds between them were measured (NOTES.md). Free slots may hold NaN and must not affect a result, so a weight
of 0 is not enough to exclude them: 0 * NaN is NaN.
"""

import torch
import torch.nn.functional as F

CHUNK = 64  # slots
GATHER = 2**20  # bytes of padded keys below which the gather is cheaper than the chunks


def chunk_owners(kv_start, kv_cap):
    """Segment of each whole chunk up to the end of the last segment, -1 if it crosses a border: (S,), (S,) -> (W,)."""
    first = -(-kv_start.long() // CHUNK)
    last = (kv_start + kv_cap).long() // CHUNK
    count = (last - first).clamp(min=0)
    chunk = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
    owner = torch.full((int(last.max()),), -1, device=kv_start.device)
    owner[chunk + torch.arange(len(chunk), device=chunk.device)] = torch.repeat_interleave(count)
    return owner


def attend(q, k, v, kv_start, kv_len, lengths, plan, scale, return_lse):
    """q (1, S, M, D), M query rows per segment, over arenas k, v (N, D) -> out (1, S, M, D), lse (1, S, M) or None.

    lengths: kv_len as a list, or None on CUDA with a plan, where reading it would synchronise.
    """
    _, segments, _, d = q.shape
    longest = plan.longest if lengths is None else max(lengths)
    if lengths is not None and plan.step is not None and longest == min(lengths) > 0:
        return _rectangle(q, k, v, plan.starts[0], plan.step, longest, scale, return_lse)
    runs = [] if lengths is None or min(lengths) == 0 else runs_of(plan.starts, lengths)
    if 0 < 2 * len(runs) <= segments:
        parts = [
            _rectangle(q[:, a:b], k, v, plan.starts[a], step, lengths[a], scale, return_lse) for a, b, step in runs
        ]
        out, lse = zip(*parts, strict=True)
        return torch.cat(out, 1), torch.cat(lse, 1) if return_lse else None
    small = segments * longest * d * q.element_size() < GATHER
    way = _gathered if plan.owner is None or small or q.element_size() < 4 else _chunked
    k, v = (x if len(x) else x.new_zeros(1, d) for x in (k, v))  # indices need at least one slot
    out, lse = way(q, k, v, kv_start, kv_len, max(longest, 1), plan, scale, return_lse)
    empty = (kv_len == 0)[:, None]
    return out.masked_fill(empty[..., None], 0), lse if lse is None else lse.masked_fill(empty, float("-inf"))


def runs_of(starts, lengths):
    """[(a, b, step)]: segments a to b - 1 have equal length and start `step` slots apart. From the left, each run is as
    long as possible."""
    runs, a = [], 0
    while a < len(starts):
        b, step = a + 1, 0
        if b < len(starts) and lengths[b] == lengths[a]:
            step = max(0, starts[b] - starts[a])
        while b < len(starts) and lengths[b] == lengths[a] and starts[b] - starts[b - 1] == step:
            b += 1
        runs.append((a, b, step))
        a = b
    return runs


def rectangle_step(q, k_new, v_new, k, v, kv_len):
    """A decode step over segments of equal capacity, for torch.compile: store the new tokens, attend to all.

    Matrix products are written as multiply and sum, which is slow in eager mode. The compiler fuses them and the rest
    of the layer into a few loops; of the intermediate results only the scores are written to memory.

    q (B, Hq, D); k_new, v_new (B, Hkv, D); k, v (S, n, D), views of the arenas over all slots, changed in place; kv_len
    (S,) including the new tokens -> like q. Free slots do not affect the result, even if they hold NaN.
    """
    segments, n, d = k.shape
    compute, newest = torch.promote_types(q.dtype, torch.float32), kv_len.long() - 1
    segment, slot = (torch.arange(count, device=q.device) for count in (segments, n))
    k.index_put_((segment, newest), k_new.reshape(segments, d))
    v.index_put_((segment, newest), v_new.reshape(segments, d))
    free = (slot > newest[:, None])[:, None]  # (S, 1, n)
    group = q.shape[1] * len(q) // segments
    # as_strided makes the compiler store q in memory once instead of recomputing it for each key
    rows = q.contiguous().as_strided((segments, group, 1, d), (group * d, d, d, 1))
    scores = (rows.to(compute) * k[:, None].to(compute)).sum(-1) * d**-0.5  # (S, G, n)
    scores = scores.masked_fill(free, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()  # normalised at the end; exactly 0 for free slots
    values = torch.where(weights[..., None] > 0, v[:, None].to(compute), 0)  # 0 * NaN is NaN
    out = (weights[..., None] * values).sum(2) / weights.sum(-1, keepdim=True)
    return out.to(q.dtype).view(q.shape)


def _rectangle(q, k, v, start, step, length, scale, return_lse):
    """`attend` over S segments of `length` slots: the first begins at slot `start`, each next `step` slots later."""
    shape, strides = (1, q.shape[1], length, q.shape[3]), (0, step * q.shape[3], q.shape[3], 1)
    # as_strided counts from the start of the storage, but an arena may be a view that begins later
    keys, values = (x.as_strided(shape, strides, x.storage_offset() + start * q.shape[3]) for x in (k, v))
    return _dense(q, keys, values, None, scale, return_lse)


def _dense(q, k, v, bias, scale, return_lse):
    """Attention of q (1, S, M, D) over k, v (1, S, n, D); additive bias (S, 1, n) or None."""
    if not return_lse:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.to(compute) @ k.to(compute).transpose(2, 3))  # (1, S, M, n)
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v.to(compute)).to(q.dtype), scores.logsumexp(-1)


def _gathered(q, k, v, kv_start, kv_len, longest, plan, scale, return_lse):
    """`attend` over a copy of each segment, padded to `longest` with its own last row, so that no free slot is read."""
    column = torch.arange(longest, device=k.device)
    slot = kv_start[:, None] + torch.minimum(column, (kv_len - 1).clamp(min=0)[:, None])
    keys, values = (x.index_select(0, slot.clamp(max=len(x) - 1).flatten()) for x in (k, v))
    bias = torch.zeros(len(kv_len), 1, longest, dtype=k.dtype, device=k.device)
    bias.masked_fill_((column >= kv_len[:, None])[:, None], float("-inf"))
    shape = (1, len(kv_len), longest, k.shape[1])
    return _dense(q, keys.view(shape), values.view(shape), bias, scale, return_lse)


def _chunked(q, k, v, kv_start, kv_len, longest, plan, scale, return_lse):
    """`attend` with whole chunks read in place and the ends of each segment gathered; merged as in Flash-Decoding."""
    q, d, end = q[0], k.shape[1], (kv_start + kv_len).long()
    chunks = len(plan.owner)
    whole_k, whole_v = (x[: chunks * CHUNK].view(chunks, CHUNK, d) for x in (k, v))
    owner = plan.owner.clamp(min=0)
    border = torch.arange(1, chunks + 1, device=k.device) * CHUNK  # the end of each chunk
    dead = ((plan.owner < 0) | (border > end[owner]))[:, None, None]  # crosses a border or contains free slots
    scores = torch.bmm(q[owner], whole_k.transpose(1, 2)).mul_(scale).masked_fill_(dead, float("-inf"))  # (W, M, CHUNK)
    slot, taken = _ends(kv_start.long(), end, len(k))
    rest = torch.bmm(q, k[slot].transpose(1, 2)).mul_(scale)  # (S, M, 2 * CHUNK)
    rest = rest.masked_fill_(~taken[:, None], float("-inf"))
    where = owner[:, None].expand(-1, q.shape[1])
    top = rest.amax(-1).scatter_reduce(0, where, scores.amax(-1), "amax")  # (S, M)
    top = top.masked_fill(top == float("-inf"), 0)
    scores, rest = (scores - top[owner][..., None]).exp_(), (rest - top[..., None]).exp_()
    parts = torch.bmm(scores, whole_v).masked_fill_(dead, 0)
    out = torch.bmm(rest, v[slot]).index_add_(0, owner, parts)
    total = rest.sum(-1).index_add_(0, owner, scores.sum(-1))
    return (out / total[..., None])[None], (top + total.log())[None] if return_lse else None


def _ends(start, end, slots):
    """Slots of each segment outside its whole chunks, (S, 2 * CHUNK) int64, and a bool mask of the valid entries.

    Invalid entries are the segment's first slot, which is safe to read.
    """
    head_end = torch.minimum(end, -(-start // CHUNK) * CHUNK)
    tail = torch.maximum(end // CHUNK * CHUNK, head_end)
    column = torch.arange(CHUNK, device=start.device)
    slot = torch.cat((start[:, None] + column, tail[:, None] + column), 1)
    taken = slot < torch.stack((head_end, end), 1).repeat_interleave(CHUNK, 1)
    return torch.where(taken, slot, start[:, None]).clamp(max=slots - 1), taken
