"""`ragged_decode` in PyTorch, without a loop over heads or tokens: four ways to read the segments.

rectangle   segments of one length at even distances are a strided view of the arena: nothing is copied
rectangles  runs of such segments, as the heads of each sequence in a batch: one after the other, nothing is copied
chunks      the arena is cut into chunks of 64 slots, a view; whole chunks are attended to where they lie, the two ends
            of each segment are gathered, and the parts are merged
gather      each segment is copied and padded to the longest; for small caches the cheapest

Which is taken when was measured (NOTES.md). No result depends on a free slot, whatever it holds: 0 * NaN is NaN.
"""

import torch
import torch.nn.functional as F

CHUNK = 64  # slots
GATHER = 2**20  # bytes of padded keys below which the gather is cheaper than the chunks


def chunk_owners(kv_start, kv_cap):
    """Segment in which each whole chunk of the arena lies, -1 for chunks at a border: (S,) twice -> (N // CHUNK,)."""
    first = -(-kv_start.long() // CHUNK)
    last = (kv_start + kv_cap).long() // CHUNK
    count = (last - first).clamp(min=0)
    chunk = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
    owner = torch.full((int(last.max()),), -1, device=kv_start.device)
    owner[chunk + torch.arange(len(chunk), device=chunk.device)] = torch.repeat_interleave(count)
    return owner


def attend(q, k, v, kv_start, kv_len, lengths, plan, scale, return_lse):
    """q (1, S, M, D), the M rows that read a segment, over arenas k, v -> out (1, S, M, D), lse (1, S, M) or None.

    lengths: kv_len as a list, or None where asking would make a device wait; then nothing depends on it.
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
    k, v = (x if len(x) else x.new_zeros(1, d) for x in (k, v))  # an arena without slots
    out, lse = way(q, k, v, kv_start, kv_len, max(longest, 1), plan, scale, return_lse)
    empty = (kv_len == 0)[:, None]  # attention over nothing: 0 and -inf
    return out.masked_fill(empty[..., None], 0), lse if lse is None else lse.masked_fill(empty, float("-inf"))


def runs_of(starts, lengths):
    """[(a, b, step)]: segments a to b - 1 are of one length, `step` slots from one's start to the next's; as few runs
    as a walk from the left finds."""
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
    """A decode step over segments that are a rectangle: store the new tokens, attend to all. For a compiler.

    Products are written as multiplications and sums, which would be slow as they stand: a compiler makes a few loops
    of them and of the layer around them, and what is written in between is the scores.

    q (B, Hq, D); k_new, v_new (B, Hkv, D); k, v (S, n, D), views of the arenas over all slots; kv_len
    (S,), the new tokens counted -> like q. No result depends on a free slot, whatever it holds.
    """
    segments, n, d = k.shape
    compute, newest = torch.promote_types(q.dtype, torch.float32), kv_len.long() - 1
    segment, slot = (torch.arange(count, device=q.device) for count in (segments, n))
    k.index_put_((segment, newest), k_new.reshape(segments, d))
    v.index_put_((segment, newest), v_new.reshape(segments, d))
    free = (slot > newest[:, None])[:, None]  # (S, 1, n)
    group = q.shape[1] * len(q) // segments
    # of memory: so q is written down once, not for each key
    rows = q.contiguous().as_strided((segments, group, 1, d), (group * d, d, d, 1))
    scores = (rows.to(compute) * k[:, None].to(compute)).sum(-1) * d**-0.5  # (S, G, n)
    scores = scores.masked_fill(free, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()  # divided by their sum at the end; exactly 0 where free
    values = torch.where(weights[..., None] > 0, v[:, None].to(compute), 0)  # 0 * NaN is NaN
    out = (weights[..., None] * values).sum(2) / weights.sum(-1, keepdim=True)
    return out.to(q.dtype).view(q.shape)


def _rectangle(q, k, v, start, step, length, scale, return_lse):
    """q (1, S, M, D) over S segments of `length` slots, the first at `start`, each `step` behind the one before."""
    shape, strides = (1, q.shape[1], length, q.shape[3]), (0, step * q.shape[3], q.shape[3], 1)
    # the offset counts from where the storage begins, and an arena may begin later
    keys, values = (x.as_strided(shape, strides, x.storage_offset() + start * q.shape[3]) for x in (k, v))
    return _dense(q, keys, values, None, scale, return_lse)


def _dense(q, k, v, bias, scale, return_lse):
    """q (1, S, M, D) over k, v (1, S, n, D), bias (S, 1, n) or None."""
    if not return_lse:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.to(compute) @ k.to(compute).transpose(2, 3))  # (1, S, M, n)
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v.to(compute)).to(q.dtype), scores.logsumexp(-1)


def _gathered(q, k, v, kv_start, kv_len, longest, plan, scale, return_lse):
    """Each segment padded with copies of its own last row."""
    column = torch.arange(longest, device=k.device)
    slot = kv_start[:, None] + torch.minimum(column, (kv_len - 1).clamp(min=0)[:, None])
    keys, values = (x.index_select(0, slot.clamp(max=len(x) - 1).flatten()) for x in (k, v))
    bias = torch.zeros(len(kv_len), 1, longest, dtype=k.dtype, device=k.device)
    bias.masked_fill_((column >= kv_len[:, None])[:, None], float("-inf"))
    shape = (1, len(kv_len), longest, k.shape[1])
    return _dense(q, keys.view(shape), values.view(shape), bias, scale, return_lse)


def _chunked(q, k, v, kv_start, kv_len, longest, plan, scale, return_lse):
    """Whole chunks in place, the ends of each segment gathered, merged by the largest score (as in Flash-Decoding)."""
    q, d, end = q[0], k.shape[1], (kv_start + kv_len).long()
    chunks = len(plan.owner)
    whole_k, whole_v = (x[: chunks * CHUNK].view(chunks, CHUNK, d) for x in (k, v))
    owner = plan.owner.clamp(min=0)
    border = torch.arange(1, chunks + 1, device=k.device) * CHUNK  # where each chunk ends
    dead = ((plan.owner < 0) | (border > end[owner]))[:, None, None]  # no chunk of one segment's taken slots
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
    """Slots of each segment that lie in no whole chunk of it (S, 2 * CHUNK), and which of them are meant (bool).

    Those not meant point at the segment's first row, which is harmless to read.
    """
    head_end = torch.minimum(end, -(-start // CHUNK) * CHUNK)
    tail = torch.maximum(end // CHUNK * CHUNK, head_end)
    column = torch.arange(CHUNK, device=start.device)
    slot = torch.cat((start[:, None] + column, tail[:, None] + column), 1)
    taken = slot < torch.stack((head_end, end), 1).repeat_interleave(CHUNK, 1)
    return torch.where(taken, slot, start[:, None]).clamp(max=slots - 1), taken
