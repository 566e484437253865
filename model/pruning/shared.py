"""One ranking for all heads of a layer: the baseline for per-head pruning at equal bytes."""

from .budget import ranking, select, top


def shared_tokens(
    view, *, retention=0.5, keep_tokens=None, window=1, values=False, scope="image", query="last", cover=0.0
):
    """All heads of a layer keep the same tokens, those with the highest mean attention.

    Returns keep (Hkv, T) bool.
    """
    mean = ranking(view, window, query, values=values).mean(0, keepdim=True)  # (1, T)
    return select(mean, view, top(retention, keep_tokens), scope, cover).expand(view.kv_heads, -1)
