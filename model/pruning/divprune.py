"""DivPrune (arXiv 2503.02175, CVPR 2025; vbdi/divprune @799e2d9): keep the tokens that are farthest from each other.

The distance is 1 - cosine between projected features. The first token is the one farthest from its nearest neighbour.
In the code the newlines of LLaVA-NeXT are candidates like patches, and equal tokens may be chosen twice; here neither.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .budget import budget

BLOCK = 256  # rows of distances at a time


@dataclass(frozen=True, kw_only=True)
class DivPrune:
    """Diverse tokens: each in turn is the one farthest from all that were chosen before (2503.02175)."""

    retention: float = 0.098
    keep_tokens: int | None = None

    def pick(self, picture):
        """-> indices (P',), or None if no token is dropped."""
        count = budget(picture.tokens, self.retention, self.keep_tokens)
        if count == picture.tokens:
            return None
        unit = F.normalize(picture.projected.float(), dim=-1)
        apart = to_nearest(unit)  # then: distance to the nearest chosen token
        chosen = torch.zeros(picture.tokens, dtype=torch.bool, device=picture.device)
        for i in range(count):
            new = apart.masked_fill(chosen, float("-inf")).argmax()  # the first of equals
            chosen[new] = True
            distance = 1 - unit @ unit[new]
            apart = distance if i == 0 else apart.minimum(distance)
        return chosen.nonzero()[:, 0]


def to_nearest(unit):
    """unit vectors (P, C) -> (P,): distance of each to the nearest other one."""
    found = []
    for start in range(0, len(unit), BLOCK):
        distance = 1 - unit[start : start + BLOCK] @ unit.T
        distance[:, start:].fill_diagonal_(float("inf"))
        found.append(distance.amin(1))
    return torch.cat(found)
