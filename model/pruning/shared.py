"""One ranking for all heads of a layer: the baseline for per-head pruning at equal bytes."""

from .budget import budget, by_kv_head, grid_phase, select, shared


def shared_tokens(
    layer, scores, layout, *, retention=0.5, keep_tokens=None, window=1, values=False, scope="image", query="last",
    cover=0.0,
):  # fmt: skip
    """All heads of a layer keep the same tokens, those with the highest mean attention.

    scores (Hq, T) fp32 -> keep (Hkv, T) bool.
    """
    heads = by_kv_head(scores, layout, values=values)
    heads = heads.mean(0, keepdim=True).expand_as(heads)
    phase = grid_phase(layer, layout)[:1].expand_as(heads) if cover else None
    return select(heads, layout, lambda s: shared(s, budget(s.shape[1], retention, keep_tokens)), scope, cover, phase)
