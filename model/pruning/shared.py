"""One ranking for all heads of a layer: what per-head pruning has to beat at equal bytes."""

from .budget import budget, by_kv_head, select, shared


def shared_tokens(layer, scores, layout, *, retention=0.5, keep_tokens=None, window=1, values=False, scope="image"):
    """All heads of a layer keep the same tokens, those that they attend to most on average.

    retention: fraction kept; keep_tokens: that many per picture instead; window: rows at the prompt's end whose
    attention is averaged; values, scope: as in plphp. Returns keep (Hkv, T) bool.
    """
    heads = by_kv_head(scores, layout, values=values)
    return select(heads, layout, lambda s: shared(s, budget(s.shape[1], retention, keep_tokens)), scope)
