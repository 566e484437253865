"""MustDrop (arXiv 2411.10803; liuting20/MustDrop @909afa5): tokens are dropped in the vision tower, in the prefill of
the language model, and from its cache before decoding.

Different from the code: the kept tokens retain their positions. The code renumbers them at every step, so that one
token has several positions, and the position of a decoded token differs from layer to layer. Several pictures, and
thresholds for pictures of other sizes, are ours. A tower without CLS has no key tokens (key_share=0).
"""

from dataclasses import dataclass

import torch

from .budget import at_depth, check_fraction, check_scores
from .mustdrop1 import MustDrop1

STEPS = 2, 6, 10, 14  # layers of 32, counted from 0, after which tokens are dropped
TOKENS = 576  # of a picture, for which the thresholds were chosen


@dataclass(frozen=True, kw_only=True)
class MustDrop:
    """Similar patches are merged, and tokens that the text hardly attends to are dropped, in four steps (2411.10803).

    Tokens are dropped after layers 2, 6, 10 and 14 of 32, in proportion for other depths. The rows of the text after
    the last picture decide: a token stays if its share of their attention to its picture reaches one threshold, or if
    the attention of one row to it reaches the other, averaged over heads. Both thresholds are for a picture of 576
    tokens; for n tokens, before merging, they are multiplied by 576 / n, because an even share is 1 / n. Tokens to
    which CLS attends most are never dropped. After the prefill, layers from the first step on hold only the tokens
    that are left after the last.

    threshold: least mean cosine similarity of two patches of a merged window (0 to 1)
    block: patches per side of a window (2 or more)
    key_share: share of the tokens, by attention of CLS, that are never dropped after merging (0 to 1)
    global_threshold: share of the text's attention to a picture with which a token stays (0 to 1)
    individual_threshold: attention of one text row with which a token stays; 0 drops nothing (0 to 1)
    """

    threshold: float = 0.8
    block: int = 3
    key_share: float = 0.08
    global_threshold: float = 0.0012
    individual_threshold: float = 0.001
    merge_after = MustDrop1.merge_after

    def __post_init__(self):
        self._first()
        check_fraction("global_threshold", self.global_threshold)
        check_fraction("individual_threshold", self.individual_threshold)

    def _first(self):
        """The first stage, which raises a ValueError for its settings."""
        return MustDrop1(threshold=self.threshold, block=self.block, key_share=self.key_share)

    @property
    def needs_cls(self):
        return self.key_share > 0

    def layers(self, num_layers):
        return self._first().layers(num_layers)

    def merge(self, patches):
        return self._first().merge(patches)

    def protect(self, picture):
        return self._first().protect(picture)

    def narrow(self, view):
        """-> the tokens that remain after this layer, keep (T,) bool, or None for all."""
        if view.layer not in _steps(view.num_layers):
            return None
        rows = torch.arange(min(view.spans[-1][1], view.tokens - 1), view.tokens, device=view.device)
        attention = view.row_attention(rows)  # (R, T)
        check_scores(attention, view)
        keep = view.text
        for (start, stop), count in zip(view.spans, view.counts, strict=True):
            total, most = attention[:, start:stop].sum(0), attention[:, start:stop].amax(0)  # (n,)
            unit = TOKENS / count
            weak = total < unit * self.global_threshold * total.sum()
            keep[start:stop] = ~weak | (most >= unit * self.individual_threshold)
        return keep

    def compact(self, prefilled):
        """-> per layer the tokens that remain in it, (T,) bool, or None for all that it holds."""
        layers, steps = len(prefilled.kept), _steps(len(prefilled.kept))
        left = prefilled.kept[-1][0]  # the last layer's, equal in all heads
        return [left if steps[0] <= layer <= steps[-1] else None for layer in range(layers)]


def _steps(num_layers):
    """The layers, counted from 0, after which tokens are dropped."""
    return sorted({at_depth(layer, num_layers) for layer in STEPS})
