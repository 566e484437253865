"""Decode attention over a KV cache in which every head keeps its own tokens.

    out = softmax(scale * q K^T) V        for each query row, over the kept tokens of its segment

A segment is one (sequence, KV head). Segment b * Hkv + h owns kv_cap slots of the flat arenas, starting at kv_start.
Its first kv_len slots are taken; a free slot ('.') is reserved for a future token:

    K arena (N, D)   [k k k k k . . . ][k k . . . ][k k k k . . . ]
    kv_start = 0  8  13     kv_len = 5  2  4     kv_cap = 8  5  7

The G = Hq / Hkv query heads of a KV head read the same rows: 2 * sum(kv_len) * D * itemsize bytes per call. With T
query rows per sequence that is 2 * T * G FLOP per element read. A decode step (T = 1) is memory-bound or, on a small
cache, bound by fixed costs.

`ragged_decode_append` is the decode step: it also stores the new token's key and value, in the same launch. Both check
their arguments, then call a function that does the work. A caller that made plan and arenas itself, as `RaggedCache`
does in every layer of every step, calls that function: `unchecked_decode` or `unchecked_append`.
"""

import torch

from .backend import check_alike, check_tables, choose_backend
from .merge_states import merge_states
from .quantise import CODES, dequantised, quantise, quantise_ref
from .ragged_decode_plan import DecodePlan, decode_plan
from .ragged_decode_torch import attend


def ragged_decode_ref(q, k, v, kv_start, kv_len, *, scale=None, return_lse=False, k_scale=None, v_scale=None):
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
        taken = slice(start, start + length)
        keys, values = (  # (n, D)
            x[taken].to(compute) if unit is None else x[taken].to(compute) * unit[taken, None].to(compute)
            for x, unit in ((k, k_scale), (v, v_scale))
        )
        scores = scale * (rows[s // hkv, :, heads].to(compute) @ keys.T)  # (T, G, n)
        out[s // hkv, :, heads] = scores.softmax(-1) @ values
        lse[s // hkv, :, heads] = scores.logsumexp(-1)
    out = out.to(q.dtype).view(q.shape)
    return (out, lse.view(q.shape[:-1])) if return_lse else out


def ragged_decode(
    q, k, v, kv_start, kv_len, *, scale=None, return_lse=False, plan=None, backend="auto", k_scale=None, v_scale=None
):  # fmt: skip
    """Attention of query rows over the tokens that each head keeps.

    q         (B, Hq, D), or (B, T, Hq, D) where each of the T rows sees the whole segment
    k, v      (N, D) arenas of q's dtype; keys are already rotated
    kv_start  (B * Hkv,) int32, first slot of each segment; query head h reads KV head h // (Hq // Hkv)
    kv_len    (B * Hkv,) int32, taken slots of each segment; 0 is allowed
    scale     of the scores, a number, default D**-0.5
    plan      `decode_plan(kv_start, kv_cap)`, whose kv_start then applies; without it every call builds one
    backend   "auto" | "torch" | "triton", see `choose_backend`
    k_scale, v_scale  (N,) fp16, of arenas in 8 bits: k and v are then int8 or float8_e4m3fn, see quantise.py
        With fp16 q and Triton on a GPU, v_scale must be below 1,000: weights times 64 times v_scale are fp16.

    Returns out, with shape and dtype of q; with return_lse also lse, the natural log-sum-exp of the scaled scores, fp32
    (float64 for float64), with the shape of q without D. An empty segment gives out 0 and lse -inf. Free slots never
    affect a result, even if they hold NaN. Segments may overlap, for example if two sequences share a prefix.
    ValueError for arguments that do not fit; with a plan, lengths are checked on CPU tensors only.

    With Triton, a sequence's results are bit-identical whatever else is in the batch. The torch backend chooses a
    strategy from all lengths of the call, so results may differ by rounding between batches. On CUDA with a plan it
    copies all segments, each padded to the largest capacity.
    """
    _check(q, k, v, {"kv_start": kv_start, "kv_len": kv_len}, plan, scale, k_scale, v_scale)
    backend = choose_backend(backend, q.device, q.dtype, (q, k, v), k.dtype)
    if plan is None:
        plan = decode_plan(kv_start, kv_len)
        lengths = plan.caps
    else:
        lengths = _lengths(kv_start, kv_len, plan)
    _check_arena(k, plan)
    return unchecked_decode(q, (k, v, k_scale, v_scale), kv_len, plan, backend, scale, return_lse, lengths)


def unchecked_decode(q, arenas, kv_len, plan, backend, scale=None, return_lse=False, lengths=None):
    """`ragged_decode` for arguments that are known to fit. arenas: k, v, k_scale, v_scale; backend: "triton" or
    "torch"; lengths: kv_len as a list, if known."""
    k, v, *scales = arenas
    q, segments, d = q.contiguous(), plan.segments, q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    if backend == "triton":
        rows = q if q.ndim == 4 else q[:, None]
        out, lse = _launchers(q).attend(rows, k, v, kv_len.contiguous(), plan, scale, None, *scales)
    else:  # all rows that read a segment are one small matrix: (S, T * G, D)
        rows = q if q.ndim == 3 else q.unflatten(2, (segments // len(q), -1)).transpose(1, 2).contiguous()
        rows = rows.view(1, segments, -1, d)
        lengths = lengths or _on_host(kv_len)
        out, lse = attend(rows, k, v, plan.kv_start, kv_len, lengths, plan, scale, return_lse, *scales)
        if q.ndim == 4:  # (B, Hkv, T, G, ...) -> (B, T, Hkv, G, ...)
            shape = (len(q), segments // len(q), q.shape[1], -1)
            out = out.view(*shape, d).transpose(1, 2).contiguous()
            lse = None if lse is None else lse.view(shape).transpose(1, 2).contiguous()
    return (out.view(q.shape), lse.view(q.shape[:-1])) if return_lse else out.view(q.shape)


def rotated(x, rope):
    """Rotate x (B, H, D), D even: x * cos + roll(x, D/2) * sin, computed in fp32 or float64, rounded once to x's dtype.
    rope: cos and signed sin (B, 1, D), any floating dtype, or both in one tensor; None returns x. This is RoPE."""
    if rope is None:
        return x
    compute = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(compute) for t in rope)
    return (x.to(compute) * cos + x.to(compute).roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def ragged_decode_append_ref(
    q, k_new, v_new, k, v, kv_start, kv_len, kv_cap, *,
    scale=None, return_lse=False, rope=None, k_scale=None, v_scale=None,
):  # fmt: skip
    """The specification of `ragged_decode_append`: attend to the old and new tokens; store the new where one fits."""
    q, k_new = rotated(q, rope), rotated(k_new, rope)
    d, starts, lengths = q.shape[-1], kv_start.tolist(), kv_len.tolist()
    k_new, v_new = k_new.reshape(-1, d), v_new.reshape(-1, d)
    stored = [(k, k_new), (v, v_new)]
    if k_scale is not None:
        (k_new, k_unit), (v_new, v_unit) = quantise_ref(k_new, k.dtype), quantise_ref(v_new, v.dtype)
        stored = [(k, k_new), (v, v_new), (k_scale, k_unit), (v_scale, v_unit)]
    joined = []  # arenas with the old tokens and the new one of each segment, and their scales
    for arena, new in stored:
        pairs = [(arena[a : a + n], new[s : s + 1]) for s, (a, n) in enumerate(zip(starts, lengths, strict=True))]
        joined.append(torch.cat([x for pair in pairs for x in pair]))
        for s, (a, n, cap) in enumerate(zip(starts, lengths, kv_cap.tolist(), strict=True)):
            if n < cap:
                arena[a + n] = new[s]
    start = (kv_len + 1).cumsum(0, dtype=torch.int32) - (kv_len + 1)
    scales = dict(zip(("k_scale", "v_scale"), joined[2:], strict=False))
    return ragged_decode_ref(q, *joined[:2], start, kv_len + 1, scale=scale, return_lse=return_lse, **scales)


def ragged_decode_append(
    q, k_new, v_new, k, v, kv_start, kv_len, kv_cap, *,
    scale=None, return_lse=False, plan=None, backend="auto", rope=None, k_scale=None, v_scale=None,
):  # fmt: skip
    """A decode step of one layer: store each segment's new token in k and v, in place; attend to old and new tokens.

    q (B, Hq, D); k_new, v_new (B, Hkv, D); the rest as for `ragged_decode`, ValueError included. Without rope, q and
    k_new must already be rotated; with rope, (cos, sin) as for `rotated`, both are rotated here. kv_len does not count
    the new token and is not changed; the caller updates it. A full segment (kv_len = kv_cap) attends to the new token
    but does not store it; `RaggedCache` makes room first. With a plan, its kv_start and kv_cap apply. ValueError if
    segments overlap, because two of them might write to one slot. Returns what `ragged_decode` returns.

    Arenas in 8 bits: the new token is rotated, then quantised, and attends to its own stored form, so that the result
    depends only on what the arenas hold after the step.

    Triton needs one launch. The torch backend needs several and, on CUDA, synchronises to find the full segments.
    """
    plan = decode_plan(kv_start, kv_cap) if plan is None else plan
    q, k_new, v_new = (_dense_within(x) for x in (q, k_new, v_new))
    _check(q, k, v, {"kv_start": kv_start, "kv_len": kv_len, "kv_cap": kv_cap}, plan, scale, k_scale, v_scale)
    _check_arena(k, plan)
    _check_step(q, k_new, v_new, kv_cap, plan, rope)
    lengths = _lengths(kv_start, kv_len, plan)
    inputs = (q, k_new, v_new, k, v, *(() if rope is None else rope))
    backend = choose_backend(backend, q.device, q.dtype, inputs, k.dtype)
    arenas = k, v, k_scale, v_scale
    return unchecked_append(q, k_new, v_new, arenas, kv_len, plan, backend, rope, scale, return_lse, lengths)


def unchecked_append(
    q, k_new, v_new, arenas, kv_len, plan, backend, rope=None, scale=None, return_lse=False, lengths=None
):  # fmt: skip
    """`ragged_decode_append` for arguments that are known to fit; arenas, backend, lengths as in `unchecked_decode`."""
    k, v, k_scale, v_scale = arenas
    q, k_new, v_new = (_dense_within(x) for x in (q, k_new, v_new))
    d = q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    if backend == "triton":
        rope = None if rope is None else [t.contiguous() for t in rope]
        out, lse = _launchers(q, k_new, v_new).append_attend(
            q, k_new, v_new, k, v, kv_len.contiguous(), plan, scale, rope, None, k_scale, v_scale
        )
        return (out, lse) if return_lse else out
    q, k_new = rotated(q, rope), rotated(k_new, rope)
    rows, key, value = (x.reshape(1, plan.segments, -1, d) for x in (q, k_new, v_new))  # (1, S, G or 1, D)
    lengths = lengths or _on_host(kv_len)
    old = attend(rows, k, v, plan.kv_start, kv_len, lengths, plan, scale, True, k_scale, v_scale)
    compute, stored = old[1].dtype, [(k, key), (v, value)]
    if k_scale is not None:
        (key, k_unit), (value, v_unit) = quantise(key, k.dtype), quantise(value, v.dtype)
        stored = [(k, key), (v, value), (k_scale, k_unit), (v_scale, v_unit)]
        key, value = dequantised(key, k_unit, compute), dequantised(value, v_unit, compute).to(q.dtype)
    score = scale * (rows.to(compute) * key.to(compute)).sum(-1)
    out, lse = merge_states(*old, value.expand_as(rows), score)  # the log-sum-exp over a single key is its score
    free = (kv_len < plan.kv_cap).nonzero()[:, 0]
    slot = (plan.kv_start + kv_len)[free].long()  # stored last, because k_new and v_new may be views of an arena
    for arena, new in stored:
        arena[slot] = new[0, free, 0]
    return (out.view(q.shape), lse.view(q.shape[:-1])) if return_lse else out.view(q.shape)


def _launchers(*inputs):
    """The module with the Triton kernels. They have no backward pass: ValueError if an input requires a gradient."""
    from . import ragged_decode_triton  # only here: the rest works without triton

    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise ValueError("backend 'triton': an input requires a gradient; use torch.no_grad() or backend 'torch'")
    return ragged_decode_triton


def _on_host(kv_len):
    """kv_len as a list, or None on CUDA, to avoid a synchronisation."""
    return None if kv_len.is_cuda else kv_len.tolist()


def _dense_within(x):
    """x (B, H, D), copied unless each sequence is contiguous; gaps between sequences are allowed."""
    return x if x.ndim == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _check(q, k, v, tables, plan, scale, k_scale, v_scale):
    """ValueError for arguments that `ragged_decode` does not support."""
    if q.ndim not in (3, 4) or k.ndim != 2 or k.shape != v.shape or k.shape[1] != q.shape[-1] or 0 in q.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes}; give q (B, [T,] Hq, D), not empty, and k and v (N, D)")
    if k_scale is None and v_scale is None:
        check_alike(q=q, k=k, v=v)
    else:
        check_alike(q=q)
        _check_codes(q, k, v, k_scale, v_scale)
    if not (k.is_contiguous() and v.is_contiguous()):
        raise ValueError(f"non-contiguous k or v (strides {k.stride()}, {v.stride()}); call .contiguous()")
    check_tables(tables, 1, q.device)
    segments, b, hq = len(tables["kv_start"]), len(q), q.shape[-2]
    if segments % b or hq % (segments // b):
        raise ValueError(
            f"{segments} segments for {b} sequences of {hq} query heads; give B * Hkv segments, Hq a multiple of Hkv"
        )
    if scale is not None and not isinstance(scale, (int, float)):
        raise ValueError(f"scale is of type {type(scale).__name__}; give a number")
    if plan is not None and not isinstance(plan, DecodePlan):
        raise ValueError(f"plan is a {type(plan).__name__}; give decode_plan(kv_start, kv_cap)")
    if plan is not None and plan.segments != segments:
        raise ValueError(f"the plan is for {plan.segments} segments, this call has {segments}; build a new plan")


def _check_codes(q, k, v, k_scale, v_scale):
    for name, codes, unit in (("k", k, k_scale), ("v", v, v_scale)):
        if codes.dtype not in CODES or codes.dtype != k.dtype or codes.device != q.device:
            raise ValueError(f"{name} is {codes.dtype} on {codes.device}; with scales give int8 or float8_e4m3fn")
        if (
            not isinstance(unit, torch.Tensor)
            or unit.dtype != torch.float16
            or unit.shape != codes.shape[:1]
            or (unit.device != q.device or not unit.is_contiguous())
        ):
            raise ValueError(f"{name}_scale is no contiguous fp16 tensor ({len(codes)},) on {q.device}; see quantise()")
        if codes.shape[1] % 2 == 0 and codes.storage_offset() % 2:  # Triton reads codes of V in pairs
            raise ValueError(f"{name} begins at an odd byte of its storage; give an arena with an even offset")


def _check_step(q, k_new, v_new, kv_cap, plan, rope):
    """ValueError for arguments that `ragged_decode_append` does not support but `ragged_decode` does."""
    b, d, device = len(q), q.shape[-1], q.device
    if q.ndim != 3 or not k_new.shape == v_new.shape == (b, plan.segments // b, d):
        shapes = f"q {tuple(q.shape)}, k_new {tuple(k_new.shape)}, v_new {tuple(v_new.shape)}"
        raise ValueError(f"{shapes}; give q (B, Hq, D), k_new and v_new (B, Hkv, D)")
    check_alike(q=q, k_new=k_new, v_new=v_new)
    if rope is not None and (len(rope) != 2 or d % 2 or any(t.shape != (b, 1, d) or t.device != device for t in rope)):
        shapes = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in rope)
        raise ValueError(f"rope is {shapes}, q {tuple(q.shape)} on {device}; give cos and sin (B, 1, D), D even")
    if kv_cap is not plan.kv_cap and q.is_cpu and kv_cap.tolist() != plan.caps:
        raise ValueError(f"kv_cap is {kv_cap.tolist()}, but the plan has {plan.caps}; build a plan from this kv_cap")
    if plan.overlap:
        first, second = (f"{s} ({plan.starts[s]} to {plan.starts[s] + plan.caps[s] - 1})" for s in plan.overlap)
        raise ValueError(f"segments {first} and {second} share slots; give each its own to append to")


def _check_arena(k, plan):
    if plan.end > len(k):
        raise ValueError(f"the segments need {plan.end} slots, the arenas have {len(k)}; make them match")


def _lengths(kv_start, kv_len, plan):
    """kv_len `_on_host`. ValueError for tables on the CPU that do not fit the plan."""
    lengths = _on_host(kv_len)
    if lengths is None:
        return None
    if kv_start is not plan.kv_start and not torch.equal(kv_start, plan.kv_start):
        raise ValueError(f"the plan is for starts {plan.starts}, not {kv_start.tolist()}; build a new plan")
    if min(lengths) < 0 or (max(lengths) > plan.shortest and (kv_len > plan.kv_cap).any()):
        raise ValueError(f"lengths {lengths} are negative or exceed the capacities {plan.caps}; repack first")
    return lengths
