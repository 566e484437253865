"""Keep an even grid of each picture, whatever it shows: what a method that looks has to beat."""

from .budget import best, budget, grid_phase, select


def grid_tokens(layer, scores, layout, *, retention=0.5, keep_tokens=None, scope="image"):
    """An even grid of every picture, another one in each KV head of each layer; it looks at no attention.

    retention: fraction kept; keep_tokens: that many per head and picture instead; scope: as in plphp. The order of the
    grid is `budget.grid_phase`. Returns keep (Hkv, T) bool.
    """
    phase = grid_phase(layer, layout)
    return select(-phase, layout, lambda s: best(s, budget(s.shape[1], retention, keep_tokens)), scope)
