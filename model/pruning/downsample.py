"""A smaller picture: pool the grid of features. VTC-Bench (arXiv 2510.07143) found that this beats many methods."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .budget import budget


@dataclass(frozen=True, kw_only=True)
class Downsample:
    """A baseline: bilinear interpolation of the features on a coarser grid (a control of 2510.07143).

    The grid is the largest one with about the picture's proportions and at most the requested number of tokens. The
    tiles of LLaVA-NeXT are resized as one map, apart from the whole picture, and both by the same fraction.
    """

    retention: float = 0.5
    keep_tokens: int | None = None

    def pick(self, picture):
        """-> matrix (P', P), or None if no grid is smaller."""
        count = budget(picture.tokens, self.retention, self.keep_tokens)
        shapes = [shape for shape in picture.shapes if all(shape)]  # the tiles' map of a very thin picture is empty
        sizes = [smaller(rows, columns, count * rows * columns // picture.tokens) for rows, columns in shapes]
        if sizes == shapes:
            return None
        parts = [resized(*old, *new) for old, new in zip(shapes, sizes, strict=True)]
        return torch.block_diag(*parts)


def smaller(rows, columns, count):
    """(rows, columns) of the grid with the most tokens, up to count (1 at least), of the two closest to the old
    proportions."""
    count = max(1, count)
    exact = math.sqrt(count * rows / columns)  # the new rows, if they could be broken
    tried = [max(1, min(math.floor(exact) + more, rows, count)) for more in (0, 1)]
    return max(((r, min(columns, count // r)) for r in tried), key=math.prod)


def resized(rows, columns, new_rows, new_columns):
    """Matrix (new_rows * new_columns, rows * columns) of a bilinear interpolation that averages over what it skips."""
    down = F.interpolate(torch.eye(rows)[None, None], (new_rows, rows), mode="bilinear", antialias=True)[0, 0]
    right = F.interpolate(torch.eye(columns)[None, None], (new_columns, columns), mode="bilinear", antialias=True)[0, 0]
    return torch.kron(down, right)
