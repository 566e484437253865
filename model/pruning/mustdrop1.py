"""The first stage of MustDrop (arXiv 2411.10803; liuting20/MustDrop @909afa5): merge patches inside the vision tower.

As in the code, all squares of a picture merge equally many windows; their means come first, the most alike before the
others. Different: the last rows and columns of a side that is not divisible stay (the code fails).
Nothing is published for towers without CLS, which can only merge (key_share=0).
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from .budget import best, budget, check_fraction


@dataclass(frozen=True, kw_only=True)
class MustDrop1:
    """Windows of similar patches become their mean after the first layer of the vision tower (2411.10803, stage 1).

    threshold: least mean cosine similarity of two patches of a merged window; a retention replaces it (0 to 1)
    block: patches per side of a window (2 or more)
    key_share: share of the remaining tokens, by attention of CLS, that a second method keeps beyond its budget (0 to 1)
    """

    retention: float | None = None
    keep_tokens: int | None = None
    threshold: float = 0.8
    block: int = 3
    key_share: float = 0.08
    merge_after = 0

    def __post_init__(self):
        check_fraction("threshold", self.threshold)
        check_fraction("key_share", self.key_share)
        if self.block < 2:
            raise ValueError(f"block is {self.block}; give a whole number of 2 or more")

    @property
    def needs_cls(self):
        return self.key_share > 0

    def layers(self, num_layers):
        return (num_layers - 1,)  # LLaVA does not run it, but its input exists

    def merge(self, patches):
        """patches (n, S, S, C) -> matrix (n, P', S * S), or None if no window is merged."""
        n, side, size, across = *patches.shape[:2], self.block**2, patches.shape[1] // self.block
        index, each = (make(side**2, device=patches.device) for make in (torch.arange, torch.eye))
        windows = index.view(side, side)[: across * self.block, : across * self.block]
        windows = windows.reshape(across, self.block, across, self.block).transpose(1, 2).reshape(-1, size)  # (W, size)
        unit = normalize(patches.flatten(1, 2).float(), dim=-1)[:, windows]
        alike = (unit @ unit.mT * (1 - torch.eye(size, device=unit.device))).sum((2, 3)) / (size**2 - size)  # (n, W)
        count = int((alike >= self.threshold).sum(1).min())
        if self.retention is not None or self.keep_tokens is not None:
            surplus = n * side**2 - budget(n * side**2, self.retention, self.keep_tokens)
            count = min(len(windows), math.ceil(surplus / (n * (size - 1))))
        chosen = windows[alike.sort(dim=1, descending=True, stable=True).indices[:, :count]]  # (n, count, size)
        rows = [torch.cat((each[w].mean(1), each[~torch.isin(index, w)])) for w in chosen]
        return torch.stack(rows) if count else None

    def protect(self, picture):
        """-> bool (P,), or None for none; as in the code, P counts the tokens that are left."""
        if not self.key_share:
            return None
        scores = picture.cls_attention(picture.num_layers - 1).mean(0, keepdim=True)
        return best(scores, math.ceil(self.key_share * picture.tokens))[0]
