"""The attention of the last rows of a prompt to each token, per head. Pruning methods rank tokens by it.

    p[h, w, j] = softmax over j <= q_pos[w] of scale * q[h, w] . k[h // G, j]
    score[h, j] = mean over w of p[h, w, j]

Computes only W rows of the T x T attention matrix, in fp32, and reads no values.
"""

import torch

from .backend import check_alike, choose_backend

GROUPS = ("mean", "max", "none")


def window_scores_ref(q, k, *, q_pos=None, scale=None, group="mean"):
    """The specification of `window_scores`: loops over heads and rows, computes in fp32 (float64 stays float64)."""
    (hq, w, d), (hkv, t, _) = q.shape, k.shape
    q_pos = range(t - w, t) if q_pos is None else q_pos.tolist()
    scale = d**-0.5 if scale is None else scale
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = torch.zeros(hq, t, dtype=compute, device=q.device)
    for h in range(hq):
        for row, position in zip(q[h].to(compute), q_pos, strict=True):
            seen = k[h // (hq // hkv), : position + 1].to(compute)
            scores[h, : len(seen)] += (scale * (seen @ row)).softmax(0) / w
    grouped = scores.view(hkv, hq // hkv, t)
    return {"none": scores, "mean": grouped.mean(1), "max": grouped.amax(1)}[group]


def window_scores(q, k, *, q_pos=None, scale=None, group="mean", backend="auto"):
    """Attention probabilities of W query rows, averaged over the rows.

    q        (Hq, W, D), rotated like the keys
    k        (Hkv, T, D), of q's dtype
    q_pos    (W,) int32 or int64, position of each row; a row sees keys 0 .. q_pos; default: the last W positions
    scale    of the scores, default D**-0.5
    group    "none": scores per query head; "mean" | "max": over the query heads of a KV head
    backend  see `choose_backend`

    Returns scores (Hkv, T), or (Hq, T) for "none", fp32 (float64 for float64). ValueError for arguments that do not
    fit; positions are checked on CPU tensors only.
    """
    _check(q, k, q_pos, group)
    way = choose_backend(backend, q.device, q.dtype, (q, k))
    (hq, w, d), (hkv, t, _) = q.shape, k.shape
    scale = d**-0.5 if scale is None else scale
    sees_all = q_pos is None and w == 1
    if q_pos is None and (w > 1 or way == "triton"):
        q_pos = torch.arange(t - w, t, device=q.device)
    if way == "triton":
        from . import window_scores_triton  # only here: the rest works without triton

        return window_scores_triton.scores(q, k, q_pos.contiguous(), scale, group)
    compute = torch.promote_types(q.dtype, torch.float32)
    rows = q.reshape(hkv, -1, d).to(compute)  # (Hkv, G * W, D), to read each KV head's keys once
    scores = (scale * (rows @ k.to(compute).transpose(1, 2))).view(hq, w, t)
    if not sees_all:
        scores = scores.masked_fill_(torch.arange(t, device=q.device) > q_pos[:, None], float("-inf"))  # causal
    scores = scores.softmax(-1)
    scores = scores.mean(1) if w > 1 else scores[:, 0]
    if group == "none":
        return scores
    grouped = scores.view(hkv, hq // hkv, t)
    return grouped.mean(1) if group == "mean" else grouped.amax(1)


def _check(q, k, q_pos, group):
    """ValueError for arguments that `window_scores` does not support."""
    check_alike(q=q, k=k)
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2] or 0 in (*q.shape, *k.shape):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)}; give (Hq, W, D) and (Hkv, T, D)")
    if q.shape[0] % k.shape[0]:
        raise ValueError(f"{q.shape[0]} query heads over {k.shape[0]} KV heads; make Hq a multiple of Hkv")
    if group not in GROUPS:
        raise ValueError(f"group is {group!r}; use one of {', '.join(GROUPS)}")
    w, t = q.shape[1], k.shape[1]
    if q_pos is None:
        if w > t:
            raise ValueError(f"{w} rows of {t} tokens; give q_pos or fewer rows")
    elif q_pos.shape != (w,) or q_pos.dtype not in (torch.int32, torch.int64) or q_pos.device != q.device:
        raise ValueError(
            f"q_pos is {q_pos.dtype} of shape {tuple(q_pos.shape)} on {q_pos.device}; give {w} integers on {q.device}"
        )
    elif q.device.type == "cpu" and q_pos.min() < 0:
        raise ValueError(f"q_pos is {q_pos.tolist()}; give positions from 0")
