"""VisionZip (arXiv 2412.04467, CVPR 2025; dvlab-research/VisionZip @3151f6d): dominant tokens, the others merged.

As in the code, CLS is a dominant token, and a contextual token is its target plus the mean of the tokens assigned to
it. Different: 54 + 10 tokens of 576 are a fraction; each square of LLaVA-NeXT gets its share by its number of tokens
without the canvas border (the code: the same number for each, border included).

In a tower without CLS (SigLIP) the dominant tokens are those that get the most attention from the patches of their
square, as in EffiVLM-Bench (LoverLost/EffiVLM-Bench @08bf1f9, siglip_model.py; VisionZip's own code has CLIP only). It
takes attention, keys and features of the layer before the one that LLaVA-OneVision reads; here they are of the latter.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .budget import best, budget, check_fraction, divided


@dataclass(frozen=True, kw_only=True)
class VisionZip:
    """CLS, the tokens to which it attends most, and sums of the others by the likeness of their keys (2412.04467).

    contextual: share of the kept tokens that are such sums (0 to 1)
    """

    retention: float = 0.1111
    keep_tokens: int | None = None
    contextual: float = 10 / 64

    def __post_init__(self):
        check_fraction("contextual", self.contextual)

    def pick(self, picture):
        """-> matrix (P', P + n), without CLS (P', P), or None if no token is dropped."""
        total, layer = budget(picture.tokens, self.retention, self.keep_tokens), picture.read_layer
        if total == picture.tokens:
            return None
        cls = int(picture.has_cls)
        scores = (picture.cls_attention if cls else picture.patch_attention)(layer).sum(0)  # (P,)
        keys = picture.keys(layer).float().mean(0)  # (P, D)
        room = torch.bincount(picture.tile, minlength=picture.squares).tolist()
        matrix = torch.zeros(total, picture.tokens + cls * picture.squares, device=picture.device)
        for square, part in enumerate(matrix.split(divided(total, room, room))):
            if len(part):
                own = (picture.tile == square).nonzero()[:, 0]
                if cls:
                    part[0, picture.tokens + square] = 1
                merged = min(math.floor(self.contextual * len(part) + 0.5), len(part) - cls)
                part[cls:, own] = of_square(scores[own], F.normalize(keys[own], dim=-1), len(part) - cls, merged)
        return matrix


def of_square(scores, metric, count, merged):
    """scores (p,), metric (p, D) -> matrix (count, p): the dominant tokens in order, then `merged` contextual ones."""
    dominant = best(scores[None], count - merged)[0]
    rest, unit = (~dominant).nonzero()[:, 0], torch.eye(len(scores), device=scores.device)
    if not merged:
        return unit[dominant]
    targets = rest[:: max(1, len(rest) // merged)][:merged]
    others = rest[~torch.isin(rest, targets)]
    nearest = F.one_hot((metric[others] @ metric[targets].T).argmax(1), merged).float()  # (others, merged)
    means = nearest.T @ unit[others] / nearest.sum(0).clamp(min=1)[:, None]
    return torch.cat((unit[dominant], unit[targets] + means))
