"""Decode attention over a KV cache in which every head keeps its own tokens.

    out = softmax(scale * q K^T) V        for each query row, over the kept tokens of its segment

A segment is one (sequence, KV head). Segment b * Hkv + h owns kv_cap slots of the flat arenas, starting at kv_start.
Its first kv_len slots are taken; a free slot ('.') is reserved for a future token:

    K arena (N, D)   [k k k k k . . . ][k k . . . ][k k k k . . . ]
    kv_start = 0  8  13     kv_len = 5  2  4     kv_cap = 8  5  7

The G = Hq / Hkv query heads of a KV head read the same rows: 2 * sum(kv_len) * D * itemsize bytes per call. With T
query rows per sequence that is 2 * T * G FLOP per element read. A decode step (T = 1) is memory-bound or, on a small
cache, bound by fixed costs.

`ragged_decode_append` is the decode step: it also stores the new token's key and value, in the same launch.

`merge_states` combines two partial results over disjoint keys exactly, from their log-sum-exps. FlashAttention (arXiv
2205.14135) and Flash-Decoding use the same identity.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch

from .backend import DTYPES, check_alike, choose_backend
from .ragged_decode_torch import attend


def ragged_decode_ref(q, k, v, kv_start, kv_len, *, scale=None, return_lse=False):
    """The specification of `ragged_decode`: loops over segments and computes in fp32 (float64 stays float64)."""
    rows = q if q.ndim == 4 else q[:, None]  # (B, T, Hq, D)
    b, t, hq, d = rows.shape
    hkv = len(kv_start) // b
    scale = d**-0.5 if scale is None else scale
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(rows.shape, dtype=compute, device=q.device)
    lse = torch.full((b, t, hq), float("-inf"), dtype=compute, device=q.device)
    for s, (start, length) in enumerate(zip(kv_start.tolist(), kv_len.tolist(), strict=True)):
        if length == 0:
            continue  # no keys: out 0, lse -inf
        heads = slice(s % hkv * (hq // hkv), (s % hkv + 1) * (hq // hkv))
        keys, values = (x[start : start + length].to(compute) for x in (k, v))  # (n, D)
        scores = scale * (rows[s // hkv, :, heads].to(compute) @ keys.T)  # (T, G, n)
        out[s // hkv, :, heads] = scores.softmax(-1) @ values
        lse[s // hkv, :, heads] = scores.logsumexp(-1)
    out = out.to(q.dtype).view(q.shape)
    return (out, lse.view(q.shape[:-1])) if return_lse else out


@dataclass(frozen=True)
class DecodePlan:
    """The parts of a cache's layout that stay fixed during decoding: start and capacity of each of its S segments.

    kv_start, kv_cap (S,) int32; starts, caps: the same as lists
    split: slots per work item of the Triton kernels, None for `split_size`
    segments: S; shortest, longest: smallest and largest capacity; end: slots that the arena must have
    buffers: work items, ticket counters and workspaces of the Triton kernels, allocated on first use (but see `items`).
        Calls share them, so no two calls may use a plan at the same time. Keys: "items", row tiles, (rows, d).
    """

    kv_start: torch.Tensor
    kv_cap: torch.Tensor
    starts: list
    caps: list
    split: int | None
    segments: int
    shortest: int
    longest: int
    end: int
    buffers: dict = field(default_factory=dict)

    @cached_property
    def overlap(self):
        """Two segments that share slots, (a, b), or None. Computed on first use, from the lists."""
        segments = zip(self.starts, self.caps, range(self.segments), strict=True)
        slots = sorted((start, start + cap, s) for start, cap, s in segments if cap)
        return next(((a, b) for (_, end, a), (start, _, b) in pairwise(slots) if start < end), None)

    @property
    def items(self):
        """The `WorkItems`. On CUDA `decode_plans` builds them, because a decode step must not copy from the host."""
        if "items" not in self.buffers:
            (self.buffers["items"],) = work_items([self.caps], self.split, self.kv_start.device)
        return self.buffers["items"]

    def tickets(self, tiles):
        """Ticket counters (S * tiles,) int32: finished programs per segment and row tile. All 0 between calls."""
        if tiles not in self.buffers:
            self.buffers[tiles] = self.kv_cap.new_zeros(self.segments * tiles)
        return self.buffers[tiles]

    def scratch(self, rows, d):
        """Workspace for partial results of all W items, fp32: out (W, rows, d), log-sum-exp (W, rows); rows: T * G."""
        if (rows, d) in self.buffers:
            return self.buffers[rows, d]
        items, device = len(self.items.work), self.kv_start.device
        workspace = torch.empty(items, rows, d, device=device), torch.empty(items, rows, device=device)
        if rows <= 16:  # a decode step; the workspace of a conversation's new turn is too large to keep
            self.buffers[rows, d] = workspace
        return workspace


@dataclass(frozen=True)
class WorkItems:
    """How the Triton kernels cut the segments of a plan into W splits; a work item describes one split.

    work (W, 4) int32, one row per program: segment, index of the split in it, the segment's first item, slots per split
    firsts, sizes (S,) int32, per segment: its first item, slots per split
    """

    work: torch.Tensor
    firsts: torch.Tensor
    sizes: torch.Tensor


def work_items(caps, split, device):
    """One WorkItems per layer, from a single copy to the device. caps: for each layer a list of S capacities."""
    caps = torch.tensor(caps, device="cpu")  # (L, S)
    sizes = torch.tensor([[split or split_size(cap) for cap in row] for row in caps.tolist()], device="cpu")
    counts = (caps + sizes - 1).div(sizes, rounding_mode="floor").clamp(min=1)
    firsts = counts.cumsum(1) - counts
    ends = counts.flatten().cumsum(0)
    owner = torch.repeat_interleave(counts.flatten())  # segment of each item, numbered across layers
    number = torch.arange(len(owner), device="cpu") - (ends - counts.flatten())[owner]
    work = torch.stack((owner % sizes.shape[1], number, firsts.flatten()[owner], sizes.flatten()[owner]), 1)
    flat = torch.cat([t.flatten().int() for t in (work, firsts, sizes)]).to(device)
    work, firsts, sizes = flat.split([4 * len(owner), firsts.numel(), sizes.numel()])
    works = work.view(-1, 4).split(counts.sum(1).tolist())
    return [WorkItems(*tables) for tables in zip(works, firsts.chunk(len(caps)), sizes.chunk(len(caps)), strict=True)]


def split_size(cap):
    """Slots per work item of a segment with `cap` slots.

    64 per 768 slots of the segment, at most 512; above 32,768 slots 64 per 4,096, at most 1,024. A segment has at most
    12 items up to 6,144 slots and 64 up to 65,536: enough to fill the device, few enough to merge cheaply (NOTES.md).
    The size depends on this segment alone, so the rest of the batch cannot change the order of a sum.
    """
    short, long = -(-cap // 768), -(-cap // 4096)
    return 64 * min(16, max(1, min(8, short), long))


def decode_plan(kv_start, kv_cap, *, split=None):
    """Plan for `ragged_decode` over segments kv_start, kv_cap (S,) int32. Build it once per prefill: it synchronises.

    split: slots per work item of the Triton kernels, default `split_size`; a multiple of 16 up to 2**20. ValueError for
    another split, and for tables of another dtype or shape, on two devices, or with negative entries.
    """
    _check_tables(kv_start, kv_cap, split, 1)
    return _plans(kv_start[None], kv_cap[None], split)[0]


def decode_plans(kv_start, kv_cap, *, split=None):
    """Plans for L layers, kv_start and kv_cap (L, S) int32. Synchronises once. ValueError as for `decode_plan`."""
    _check_tables(kv_start, kv_cap, split, 2)
    return _plans(kv_start, kv_cap, split)


def _check_tables(kv_start, kv_cap, split, ndim):
    """ValueError for arguments that `decode_plan` (ndim 1) or `decode_plans` (ndim 2) does not support."""
    for name, t in (("kv_start", kv_start), ("kv_cap", kv_cap)):
        _check_tensor(name, t)
        if t.dtype != torch.int32 or t.ndim != ndim or 0 in t.shape:
            where = "segment" if ndim == 1 else "layer and segment"
            raise ValueError(f"{name} is {t.dtype} of shape {tuple(t.shape)}; give one int32 per {where}")
    if kv_start.shape != kv_cap.shape or kv_start.device != kv_cap.device:
        starts, caps = ("x".join(map(str, t.shape)) for t in (kv_start, kv_cap))
        raise ValueError(f"{starts} starts on {kv_start.device}, {caps} capacities on {kv_cap.device}; make them match")
    if split is not None and (type(split) is not int or not 16 <= split <= 2**20 or split % 16):
        raise ValueError(f"split is {split!r}; give a multiple of 16 slots, up to 2**20")


def _check_tensor(name, t):
    if not isinstance(t, torch.Tensor):
        raise ValueError(f"{name} is of type {type(t).__name__}; give a tensor")


def _plans(kv_start, kv_cap, split):
    pair = torch.stack((kv_start, kv_cap))  # a copy, because the caller may overwrite its tables later
    (starts, caps), (kv_start, kv_cap) = pair.tolist(), pair.unbind()
    plans = [_plan(*layer, split) for layer in zip(kv_start, kv_cap, starts, caps, strict=True)]
    if kv_start.is_cuda:
        for plan, items in zip(plans, work_items(caps, split, kv_start.device), strict=True):
            plan.buffers["items"] = items
    return plans


def _plan(kv_start, kv_cap, starts, caps, split):
    """A layer's plan. kv_start, kv_cap (S,) int32; starts, caps: the same as lists."""
    if min(starts) < 0 or min(caps) < 0:
        raise ValueError(f"starts {starts} or capacities {caps} are negative; give slot numbers from 0")
    ends = [start + cap for start, cap in zip(starts, caps, strict=True)]
    return DecodePlan(kv_start, kv_cap, starts, caps, split, len(caps), min(caps), max(caps), max(ends))


def ragged_decode(q, k, v, kv_start, kv_len, *, scale=None, return_lse=False, plan=None, backend="auto"):
    """Attention of query rows over the tokens that each head keeps.

    q         (B, Hq, D), or (B, T, Hq, D) where each of the T rows sees the whole segment
    k, v      (N, D) arenas of q's dtype; keys are already rotated
    kv_start  (B * Hkv,) int32, first slot of each segment; query head h reads KV head h // (Hq // Hkv)
    kv_len    (B * Hkv,) int32, taken slots of each segment; 0 is allowed
    scale     of the scores, a number, default D**-0.5
    plan      `decode_plan(kv_start, kv_cap)`; without it every call builds one
    backend   "auto" | "torch" | "triton", see `choose_backend`

    Returns out, with shape and dtype of q; with return_lse also lse, the natural log-sum-exp of the scaled scores, fp32
    (float64 for float64), with the shape of q without D. An empty segment gives out 0 and lse -inf. Free slots never
    affect a result, even if they hold NaN. Segments may overlap, for example if two sequences share a prefix.
    ValueError for arguments that do not fit; with a plan, lengths are checked on CPU tensors only.

    With Triton, a sequence's results are bit-identical whatever else is in the batch. The torch backend chooses a
    strategy from all lengths of the call, so results may differ by rounding between batches. On CUDA with a plan it
    copies all segments, each padded to the largest capacity.
    """
    _check(q, k, v, kv_start, kv_len, plan, scale)
    way = choose_backend(backend, q.device, q.dtype, (q, k, v))
    lengths = _lengths(kv_start, kv_len, k.shape[0], plan)
    plan = decode_plan(kv_start, kv_len) if plan is None else plan
    segments, d = kv_start.shape[0], q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    if way == "triton":
        from . import ragged_decode_triton  # only here: the rest works without triton

        rows = q if q.ndim == 4 else q[:, None]
        out, lse = ragged_decode_triton.attend(rows, k, v, kv_start, kv_len, plan, scale)
        return (out.view(q.shape), lse.view(q.shape[:-1])) if return_lse else out.view(q.shape)
    # all rows that read a segment are one small matrix: (S, T * G, D)
    rows = q if q.ndim == 3 else q.unflatten(2, (segments // len(q), -1)).transpose(1, 2).contiguous()
    out, lse = attend(rows.view(1, segments, -1, d), k, v, kv_start, kv_len, lengths, plan, scale, return_lse)
    if q.ndim == 4:  # (B, Hkv, T, G, ...) -> (B, T, Hkv, G, ...)
        shape = (len(q), segments // len(q), q.shape[1], -1)
        out = out.view(*shape, d).transpose(1, 2).contiguous()
        lse = None if lse is None else lse.view(shape).transpose(1, 2).contiguous()
    return (out.view(q.shape), lse.view(q.shape[:-1])) if return_lse else out.view(q.shape)


def turned(x, rope):
    """Rotate x (B, H, D), D even: x * cos + roll(x, D/2) * sin, computed in fp32 or float64, rounded once to x's dtype.
    rope: cos and signed sin (B, 1, D), any floating dtype, or both in one tensor; None returns x. This is RoPE."""
    if rope is None:
        return x
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(compute) for t in rope)
    return (x.to(compute) * cos + x.to(compute).roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def ragged_decode_append_ref(
    q, k_new, v_new, k, v, kv_start, kv_len, kv_cap, *, scale=None, return_lse=False, rope=None
):  # fmt: skip
    """The specification of `ragged_decode_append`: attend to the old and new tokens; store the new where one fits."""
    q, k_new = turned(q, rope), turned(k_new, rope)
    d, starts, lengths = q.shape[-1], kv_start.tolist(), kv_len.tolist()
    joined = []  # K and V arenas with the old tokens and the new one of each segment
    for arena, new in ((k, k_new.reshape(-1, d)), (v, v_new.reshape(-1, d))):
        rows = [(arena[a : a + n], new[s : s + 1]) for s, (a, n) in enumerate(zip(starts, lengths, strict=True))]
        joined.append(torch.cat([row for pair in rows for row in pair]))
        for s, (a, n, cap) in enumerate(zip(starts, lengths, kv_cap.tolist(), strict=True)):
            if n < cap:
                arena[a + n] = new[s]
    start = (kv_len + 1).cumsum(0, dtype=torch.int32) - (kv_len + 1)
    return ragged_decode_ref(q, *joined, start, kv_len + 1, scale=scale, return_lse=return_lse)


def ragged_decode_append(
    q, k_new, v_new, k, v, kv_start, kv_len, kv_cap, *,
    scale=None, return_lse=False, plan=None, backend="auto", rope=None,
):  # fmt: skip
    """A decode step of one layer: store each segment's new token in k and v, in place; attend to old and new tokens.

    q (B, Hq, D); k_new, v_new (B, Hkv, D); the rest as for `ragged_decode`, ValueError included. Without rope, q and
    k_new must already be rotated; with rope, (cos, sin) as for `turned`, both are rotated here. kv_len does not count
    the new token and is not changed: counting it is up to the caller. A full segment (kv_len = kv_cap) attends to the
    new token but does not store it. With a plan, the plan's kv_cap applies. ValueError if segments overlap, because two
    of them might write to one slot. Returns what `ragged_decode` returns.

    Triton needs one launch. The torch backend needs several and, on CUDA, synchronises to find the full segments.
    """
    _check_tensor("kv_cap", kv_cap)
    plan = decode_plan(kv_start, kv_cap) if plan is None else plan
    q, k_new, v_new = (dense_within(x) for x in (q, k_new, v_new))
    _check(q, k, v, kv_start, kv_len, plan, scale, q_dense=True)
    b, hq, d = q.shape if q.ndim == 3 else (0, 0, 0)
    if k_new.shape != v_new.shape or k_new.shape != (b, plan.segments // max(b, 1), d):
        shapes = f"q {tuple(q.shape)}, k_new {tuple(k_new.shape)}, v_new {tuple(v_new.shape)}"
        raise ValueError(f"{shapes}; give q (B, Hq, D), k_new and v_new (B, Hkv, D)")
    check_alike(q=q, k_new=k_new, v_new=v_new)
    if rope is not None and (
        len(rope) != 2 or d % 2 or any(t.shape != (b, 1, d) or t.device != q.device for t in rope)
    ):
        shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in rope)
        raise ValueError(f"rope is {shapes}, q {tuple(q.shape)} on {q.device}; give cos and sin (B, 1, D), D even")
    if kv_cap is not plan.kv_cap and (kv_cap.is_cpu != q.is_cpu or (q.is_cpu and not torch.equal(kv_cap, plan.kv_cap))):
        what = kv_cap.tolist() if kv_cap.is_cpu else f"on {kv_cap.device}"
        raise ValueError(f"kv_cap is {what}, but the plan has {plan.caps} on {q.device}; build a plan from this kv_cap")
    if plan.overlap:
        first, second = (f"{s} ({plan.starts[s]} to {plan.starts[s] + plan.caps[s] - 1})" for s in plan.overlap)
        raise ValueError(f"segments {first} and {second} share slots; give each its own to append to")
    way = choose_backend(backend, q.device, q.dtype, (q, k_new, v_new, k, v, *(() if rope is None else rope)))
    scale = d**-0.5 if scale is None else scale
    if way == "triton":
        from . import ragged_decode_triton

        _lengths(kv_start, kv_len, k.shape[0], plan)
        rope = None if rope is None else [t.contiguous() for t in rope]
        out, lse = ragged_decode_triton.append_attend(q, k_new, v_new, k, v, kv_start, kv_len, plan, scale, rope)
        return (out, lse) if return_lse else out
    q, k_new = turned(q, rope).contiguous(), turned(k_new, rope)
    past = ragged_decode(q, k, v, kv_start, kv_len, scale=scale, return_lse=True, plan=plan, backend="torch")
    group, compute = hq // k_new.shape[1], past[1].dtype
    score = scale * (q.unflatten(1, (-1, group)).to(compute) * k_new[:, :, None].to(compute)).sum(-1)
    out, lse = merge_states(*past, v_new.repeat_interleave(group, 1), score.flatten(1))  # one key: lse = score
    free = (kv_len < plan.kv_cap).nonzero()[:, 0]
    slot = (kv_start + kv_len)[free].long()  # stored last, because k_new and v_new may be views of an arena
    k[slot], v[slot] = k_new.flatten(0, 1)[free], v_new.flatten(0, 1)[free]
    return (out, lse) if return_lse else out


def dense_within(x):
    """x (B, H, D), copied unless each sequence is contiguous; gaps between sequences are allowed."""
    return x if x.ndim == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _check(q, k, v, kv_start, kv_len, plan, scale, q_dense=False):
    """ValueError for arguments that `ragged_decode` does not support. Runs in every step, so it must be cheap.

    q_dense: q comes from `dense_within`, so its strides are not checked.
    """
    q_shape, k_shape, device, dtype = q.shape, k.shape, q.device, q.dtype
    if not (dtype == k.dtype == v.dtype and device == k.device == v.device and dtype in DTYPES):
        check_alike(q=q, k=k, v=v)  # its error names the tensor
    if len(q_shape) not in (3, 4) or len(k_shape) != 2 or k_shape != v.shape or k_shape[1] != q_shape[-1]:
        shapes = f"q {tuple(q_shape)}, k {tuple(k_shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}; give q (B, [T,] Hq, D), k and v (N, D)")
    if not (k.is_contiguous() and v.is_contiguous() and (q_dense or q.is_contiguous())):
        strides = f"strides {q.stride()}, {k.stride()}, {v.stride()}"
        raise ValueError(f"non-contiguous q, k or v ({strides}); call .contiguous()")
    shape = kv_start.shape
    if not (kv_start.dtype == kv_len.dtype == torch.int32 and len(shape) == 1 and shape == kv_len.shape):
        what = ", ".join(f"{n} is {t.dtype} of shape {tuple(t.shape)}" for n, t in _named(kv_start, kv_len))
        raise ValueError(f"{what}; give (B * Hkv,) int32 of both")
    if not (kv_start.is_contiguous() and kv_len.is_contiguous()):
        strides = f"strides {kv_start.stride()}, {kv_len.stride()}"
        raise ValueError(f"non-contiguous kv_start or kv_len ({strides}); call .contiguous()")
    if kv_start.device != device or kv_len.device != device:
        what = ", ".join(f"{n} is on {t.device}" for n, t in _named(kv_start, kv_len))
        raise ValueError(f"{what}, q is on {device}; move them to one device")
    if 0 in q_shape:
        raise ValueError(f"q is empty, {tuple(q_shape)}; give at least one sequence, row, head and channel")
    segments, b, hq = shape[0], q_shape[0], q_shape[-2]
    if segments == 0 or segments % b or hq % (segments // b):
        raise ValueError(
            f"{segments} segments for {b} sequences of {hq} query heads; give B * Hkv segments, Hq a multiple of Hkv"
        )
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError(f"scale is of type {type(scale).__name__}; give a number")
    if plan is not None and not isinstance(plan, DecodePlan):
        raise ValueError(f"plan is a {type(plan).__name__}; give decode_plan(kv_start, kv_cap)")
    if plan is not None and plan.segments != segments:
        raise ValueError(f"the plan is for {plan.segments} segments, this call has {segments}; build a new plan")
    if plan is not None and plan.end > k_shape[0]:
        raise ValueError(f"capacities need {plan.end} slots, the arenas have {k_shape[0]}; make them match")


def _named(kv_start, kv_len):
    return ("kv_start", kv_start), ("kv_len", kv_len)


def _lengths(kv_start, kv_len, slots, plan):
    """kv_len as a list, or None on CUDA with a plan, to avoid a synchronisation. ValueError for wrong lengths."""
    if kv_len.is_cuda and plan is not None:
        return None
    lengths = kv_len.tolist()
    if plan is not None and kv_start is not plan.kv_start and not torch.equal(kv_start, plan.kv_start):
        raise ValueError(f"the plan is for starts {plan.kv_start.tolist()}, not {kv_start.tolist()}; build a new plan")
    if min(lengths) < 0 or (plan is None and min(kv_start.tolist()) < 0):
        raise ValueError(f"starts {kv_start.tolist()} or lengths {lengths} are negative; count slots from 0")
    if plan is None and (kv_start.long() + kv_len).max() > slots:  # int32 might overflow
        where = f"starts {kv_start.tolist()} plus lengths {lengths}"
        raise ValueError(f"{where} exceed the arena's {slots} slots; repack first")
    if plan is not None and max(lengths) > plan.shortest and (kv_len > plan.kv_cap).any():
        raise ValueError(f"lengths {lengths} exceed the capacities {plan.kv_cap.tolist()}; repack first")
    return lengths


def merge_states_ref(out_a, lse_a, out_b, lse_b):
    """The specification of `merge_states`: weights each part by its sum of exponentials, in float64."""
    lse = torch.stack((lse_a, lse_b)).double()  # (2, ...)
    top = lse.amax(0).masked_fill(lse.amax(0) == float("-inf"), 0)  # keeps exp in range
    sums = (lse - top).exp()
    total = sums.sum(0)
    parts = torch.stack((out_a, out_b)).double() * sums[..., None]
    out = torch.where(total[..., None] > 0, parts.sum(0) / total[..., None], 0.0)
    return out.to(out_a.dtype), (top + total.log()).to(lse_a.dtype)


def merge_states(out_a, lse_a, out_b, lse_b):
    """Attention over the union of two disjoint sets of keys, from the attention over each set.

    out_a, out_b (..., D); lse_a, lse_b (...), natural log, -inf for no keys. Returns (out, lse) in the dtypes of out_a
    and lse_a; two empty parts give out 0 and lse -inf. ValueError for shapes, dtypes or devices that do not match.
    """
    if out_a.shape != out_b.shape or lse_a.shape != lse_b.shape or out_a.shape[:-1] != lse_a.shape:
        shapes = [tuple(t.shape) for t in (out_a, lse_a, out_b, lse_b)]
        raise ValueError(f"shapes {shapes} do not fit; give (..., D), (...), (..., D), (...)")
    check_alike(out_a=out_a, out_b=out_b)
    check_alike(lse_a=lse_a[..., None], lse_b=lse_b[..., None])  # [..., None]: lse may have gaps
    ratio = (lse_a - lse_b)[..., None]  # a difference, so large values cannot overflow; NaN where both are -inf
    weight_a, weight_b = ratio.sigmoid().nan_to_num(0.0), (-ratio).sigmoid().nan_to_num(0.0)
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), torch.logaddexp(lse_a, lse_b)
