"""Keep an even grid of each picture, whatever it shows: what a method that looks has to beat."""

import torch

from .budget import best, budget, select

# Steps along rows and columns of the R2 sequence: the powers of 1 / 1.3247..., which solves x**3 = x + 1. And the
# golden ratio, for the shift from head to head.
DOWN, RIGHT, SHIFT = 0.5698402909980532, 0.7548776662466927, 0.6180339887498949


def grid_tokens(layer, scores, layout, *, retention=0.5, keep_tokens=None, scope="image"):
    """An even grid of every picture, another one in each KV head of each layer; it looks at no attention.

    A token at row y and column x has the phase y * DOWN + x * RIGHT, plus SHIFT for each head before this one, modulo
    1; the lowest phases stay, which for any number of them lie evenly in both directions. retention: fraction kept;
    keep_tokens: that many per head and picture instead; scope: as in plphp. Returns keep (Hkv, T) bool.
    """
    phase = torch.zeros(layout.kv_heads, layout.tokens, dtype=torch.float64)
    heads = torch.arange(layout.kv_heads, dtype=torch.float64)[:, None] + layer * layout.kv_heads
    for i, (start, stop) in enumerate(layout.spans):
        rows, columns = layout.places[i].T if layout.places else (0, torch.arange(stop - start))
        phase[:, start:stop] = (rows * DOWN + columns * RIGHT + heads * SHIFT) % 1
    return select(
        -phase.to(layout.device), layout, lambda s: best(s, budget(s.shape[1], retention, keep_tokens)), scope
    )
