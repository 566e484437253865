"""Keep an even grid of each picture, whatever it shows: what a method that looks has to beat."""

from .budget import best, budget, grid_phase, select


def grid_tokens(layer, scores, layout, *, retention=0.5, keep_tokens=None, scope="image"):
    """A baseline: each head keeps an even grid of its own, whatever the picture shows.

    The order of the grid is `budget.grid_phase`. Returns keep (Hkv, T) bool.
    """
    phase = grid_phase(layer, layout)
    return select(-phase, layout, lambda s: best(s, budget(s.shape[1], retention, keep_tokens)), scope)
