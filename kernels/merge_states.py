"""Attention over the union of disjoint sets of keys, exactly, from the attention over each and its log-sum-exp.

FlashAttention (arXiv 2205.14135) and Flash-Decoding use the same identity.
"""

import torch

from .backend import check_alike


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
