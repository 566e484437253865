"""Keep tokens on objects, whatever the question is: the baseline for methods that use the question."""

from dataclasses import dataclass

from .budget import select, top
from .random_tokens import draw


@dataclass(frozen=True, kw_only=True)
class Objects:
    """A baseline: tokens on objects first, then random ones, whatever the question is.

    A token counts as an object if its pixels differ from the picture's usual colour more than the average patch does
    (`model.layout.Layout.contrast`); in a photograph these are the parts with unusual colours. If there are more
    than the budget allows, each head keeps a random subset of them.

    seed: of the random choice (any whole number)
    """

    retention: float = 0.5
    keep_tokens: int | None = None
    scope: str = "image"
    seed: int = 0

    def keep(self, view):
        """-> keep (Hkv, T) bool. ValueError without pixels."""
        worth = draw(self.seed, view)
        for (start, stop), contrast in zip(view.spans, view.contrast(), strict=True):
            worth[:, start:stop] += (contrast > contrast.mean()).to(worth)
        return select(worth, view, top(self.retention, self.keep_tokens), self.scope)
