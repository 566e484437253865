"""VTC-CLS (arXiv 2412.05819; THU-MIG/VTC-CLS @e41ac9b): rank tokens by the attention of CLS in several layers.

The original sums layers 16 to 22 of the 24 of CLIP-L and keeps 36 of 576 tokens, without tiles. Here the range is the
same part of a tower of any depth, and 36 tokens are a fraction. The tokens of LLaVA-NeXT's squares are ranked together;
each square has its own CLS. Nothing is published for towers without CLS.
"""

from dataclasses import dataclass

from .budget import best, budget


@dataclass(frozen=True, kw_only=True)
class VtcCls:
    """The tokens to which CLS attends most, summed over late layers of the vision tower but the last (2412.05819).

    first: first of the summed layers, counted from 0; null for two thirds of the depth (0 or more)
    """

    retention: float = 0.0625
    keep_tokens: int | None = None
    first: int | None = None
    needs_cls = True

    def __post_init__(self):
        if self.first is not None and self.first < 0:
            raise ValueError(f"first is {self.first}; give a whole number of 0 or more")

    def layers(self, num_layers):
        """The summed layers, up to the one whose output LLaVA reads. ValueError if there are none."""
        last = max(0, num_layers - 2)
        first = min(round(num_layers * 2 / 3), last) if self.first is None else self.first
        if first > last:
            raise ValueError(f"first is {first}, the vision tower has {num_layers} layers; give one from 0 to {last}")
        return range(first, last + 1)

    def pick(self, picture):
        """-> indices (P',)."""
        scores = sum(picture.cls_attention(layer).mean(0) for layer in self.layers(picture.num_layers))  # (P,)
        return best(scores[None], budget(picture.tokens, self.retention, self.keep_tokens))[0].nonzero()[:, 0]
