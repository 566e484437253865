"""HiRED (arXiv 2408.10945, AAAI 2025; hasanar1f/HiRED @502d6dd): token budgets per tile, from the attention of CLS.

Different from the code: a tile's cell is the part of the whole picture that it shows (the code: strips of rows, rows
and columns swapped); only tokens that exist count, and the budget is met exactly (the code drops what it chose on the
canvas border, and what rounding and limits leave over); a newline stays if its row does (the code has none). Nothing is
published for towers without CLS.
"""

import math
from dataclasses import dataclass

import torch

from .budget import best, budget, check_fraction, divided


@dataclass(frozen=True, kw_only=True)
class Hired:
    """Each tile gets a budget by early attention of CLS to its part, and keeps the best by late attention (2408.10945).

    whole: share of the budget for the whole picture, the paper's alpha; LLaVA-NeXT's tiles get the rest (0 to 1)
    """

    retention: float = 0.2
    keep_tokens: int | None = None
    whole: float = 0.5
    needs_cls = True

    def __post_init__(self):
        check_fraction("whole", self.whole)

    def layers(self, num_layers):
        return (0,)  # for budgets; for the choice, the one whose output LLaVA reads

    def pick(self, picture):
        """-> indices (P',)."""
        scores = picture.cls_attention(picture.read_layer).sum(0)  # (P,)
        keep = torch.zeros(picture.tokens, dtype=torch.bool, device=picture.device)
        for square, count in enumerate(self.budgets(picture)):
            own = (picture.tile == square).nonzero()[:, 0]
            keep[own] = best(scores[own][None], count)[0]
        return keep.nonzero()[:, 0]

    def budgets(self, picture):
        """Number of tokens to keep of each square, a list of n integers."""
        total = budget(picture.tokens, self.retention, self.keep_tokens)
        full, *tiles = torch.bincount(picture.tile, minlength=picture.squares).tolist()
        whole = max(min(math.floor(self.whole * total), full), total - sum(tiles))
        if not tiles:
            return [whole]
        early = picture.cls_attention(0).sum(0)[None, :full]
        marked = best(early, math.floor(full * (1 - self.whole)))[0]
        counts = torch.bincount(shown_by(picture)[marked], minlength=picture.squares)[1:]
        return [whole, *divided(total - whole, counts.tolist(), tiles)]


def shown_by(picture):
    """(S * S,): the tile that shows the centre of each token of the whole picture."""
    (side, _), (rows, columns) = picture.shapes
    centres = 2 * torch.arange(side, device=picture.device) + 1  # in halves of a token
    tiles = picture.tile[side**2 :].view(rows, columns)
    return tiles[centres * rows // (2 * side)][:, centres * columns // (2 * side)].flatten()
