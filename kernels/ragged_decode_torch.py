"""`ragged_decode` in PyTorch. The segments are read in one of two ways:

in place   a loop over runs of segments with equal lengths at equal distances. Each run is a strided view of the arena,
           without a copy: the whole cache if it is a rectangle, the heads of a sequence in a batch, or one segment
gathered   each segment is copied and padded to the longest. This is cheaper for many short segments, and necessary on
           CUDA with a plan, where the host does not know the lengths

Arenas in 8 bits are always gathered, a few segments at a time, and dequantised to fp32: a few MB, never a whole layer.

The thresholds between them were measured (NOTES.md). Free slots may hold NaN and must not affect a result, so a weight
of 0 is not enough to exclude them: 0 * NaN is NaN.
"""

import torch
import torch.nn.functional as F

from .quantise import dequantised

FEW = 8  # runs that are always read in place
LONG = 2**15  # bytes of keys; more runs are read in place only if the longest segment has at least this many
TILE = 2**19  # elements of K, and of V, that are dequantised together, if a segment has no more


def attend(q, k, v, kv_start, kv_len, lengths, plan, scale, return_lse, k_scale=None, v_scale=None):
    """q (1, S, M, D), M query rows per segment, over arenas k, v (N, D) -> out like q, lse (1, S, M) or None.

    lengths: kv_len as a list, or None on CUDA with a plan, where reading it would synchronise.
    """
    longest = plan.longest if lengths is None else max(lengths)
    if k_scale is not None:
        count = max(1, TILE // (max(1, longest) * q.shape[3]))  # segments
        results = [
            _gathered(*block, k, v, longest, scale, return_lse, k_scale, v_scale)
            for block in zip(q.split(count, 1), kv_start.split(count), kv_len.split(count), strict=True)
        ]
        return _joined(results, return_lse)
    runs = None if lengths is None else runs_of(plan.starts, lengths)
    if runs and (len(runs) <= FEW or longest * q.shape[3] * q.element_size() >= LONG):
        results = [
            _rectangle(q[:, first:end], k, v, plan.starts[first], stride, lengths[first], scale, return_lse)
            for first, end, stride in runs
        ]
        return _joined(results, return_lse)
    return _gathered(q, kv_start, kv_len, k, v, longest, scale, return_lse)


def _joined(results, return_lse):
    if len(results) == 1:
        return results[0]
    out, lse = zip(*results, strict=True)
    return torch.cat(out, 1), torch.cat(lse, 1) if return_lse else None


def runs_of(starts, lengths):
    """[(a, b, stride)]: segments a to b - 1 have equal length and start `stride` slots apart. From left to right, each
    run is as long as possible."""
    runs, a = [], 0
    while a < len(starts):
        b, stride = a + 1, 0
        if b < len(starts) and lengths[b] == lengths[a]:
            stride = max(0, starts[b] - starts[a])
        while b < len(starts) and lengths[b] == lengths[a] and starts[b] - starts[b - 1] == stride:
            b += 1
        runs.append((a, b, stride))
        a = b
    return runs


def rectangle_step(q, k_new, v_new, k, v, kv_len):
    """A decode step over segments of equal capacity, for torch.compile: store the new tokens, attend to all.

    Matrix products are written as multiply and sum, in eager mode 16 times as slow as `_dense`. The compiler fuses them
    and the rest of the layer into a few loops; of the intermediate results only the scores are written to memory.

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


def _rectangle(q, k, v, start, stride, length, scale, return_lse):
    """Attention of q (1, S, M, D) over S segments of `length` slots: the first begins at slot `start`, and each
    further one `stride` slots after the previous -> out, lse or None."""
    shape, strides = (1, q.shape[1], length, q.shape[3]), (0, stride * q.shape[3], q.shape[3], 1)
    # as_strided counts from the start of the storage, but an arena may be a view that begins later
    keys, values = (x.as_strided(shape, strides, x.storage_offset() + start * q.shape[3]) for x in (k, v))
    return _dense(q, keys, values, None, scale, return_lse)


def _gathered(q, kv_start, kv_len, k, v, longest, scale, return_lse, k_scale=None, v_scale=None):
    """As `_rectangle`, over copies of the segments, padded with their last row to `longest`: reads no free slots."""
    dtype = q.dtype
    q = q if k_scale is None else q.to(torch.promote_types(dtype, torch.float32))
    column = torch.arange(longest, device=k.device)
    slot = kv_start[:, None] + torch.minimum(column, (kv_len - 1).clamp(min=0)[:, None])
    slot = slot.clamp(max=len(k) - 1).flatten()
    keys, values = (
        dequantised(x[slot], None if unit is None else unit[slot], q.dtype) for x, unit in ((k, k_scale), (v, v_scale))
    )
    bias = torch.zeros(len(kv_len), 1, longest, dtype=q.dtype, device=k.device)
    bias.masked_fill_((column >= kv_len[:, None])[:, None], float("-inf"))
    shape = (1, len(kv_len), longest, k.shape[1])
    out, lse = _dense(q, keys.view(shape), values.view(shape), bias, scale, return_lse)
    empty = (kv_len == 0)[:, None]
    return out.masked_fill(empty[..., None], 0).to(dtype), lse if lse is None else lse.masked_fill(empty, float("-inf"))


def _dense(q, k, v, bias, scale, return_lse):
    """Attention of q (1, S, M, D) over k, v (1, S, n, D); bias (S, 1, n) is added if given. No keys: 0, lse -inf.

    In two forms: SDPA, which is up to 4 times as fast but returns no log-sum-exp, and products where one is asked for.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    if k.shape[2] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"), dtype=compute)
    if not return_lse:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    scores = scale * (q.to(compute) @ k.to(compute).transpose(2, 3))  # (1, S, M, n)
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1) @ v.to(compute)).to(q.dtype), scores.logsumexp(-1)
