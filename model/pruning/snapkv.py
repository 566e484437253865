"""SnapKV (arXiv 2404.14469) and AdaKV (2407.11550) on vision tokens.

Both rank by the attention of the last prompt rows, smoothed along the tokens. The originals drop text too, rank the
tokens of the whole prompt, and keep the window itself. Here the window is text, which is always kept; each picture is
smoothed separately; scores are combined over the query heads of a KV head, so that K and V are stored once.
"""

from dataclasses import dataclass

import torch.nn.functional as F

from .budget import best, check_fraction, pooled, ranking, select, top


@dataclass(frozen=True, kw_only=True)
class SnapKV:
    """Each head keeps the tokens to which the last 32 text rows attend most, after smoothing (2404.14469).

    window: last prompt rows, all after the last picture, whose mean attention ranks the tokens (1 or more)
    kernel: number of neighbouring tokens over which scores are smoothed (1 or more, odd)
    pool: smoothing by the mean or the maximum (avg or max)
    """

    retention: float = 0.5
    keep_tokens: int | None = None
    window: int = 32
    kernel: int = 5
    pool: str = "avg"
    group: str = "mean"
    values: bool = False
    scope: str = "image"
    query: str = "last"
    cover: float = 0.0

    def __post_init__(self):
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel is {self.kernel}; give an odd whole number of 1 or more")
        if self.pool not in ("avg", "max"):
            raise ValueError(f"pool is {self.pool!r}; use avg or max")

    def keep(self, view):
        """-> keep (Hkv, T) bool."""
        heads = ranking(view, self.window, self.query, self.group, self.values).clone()
        for start, stop in view.spans:
            heads[:, start:stop] = self.smooth(heads[:, start:stop])
        return select(heads, view, top(self.retention, self.keep_tokens, self.choose), self.scope, self.cover)

    def smooth(self, scores):
        """scores (Hkv, n) of a picture -> the same shape; the mean treats positions outside the picture as 0."""
        pool = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
        return pool(scores[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]

    def choose(self, scores, count):
        return best(scores, count)


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV with one budget for all heads of a layer, so that some keep more than others (2407.11550).

    floor: minimum for every head, as a fraction of an equal share of the budget; AdaKV's safeguard (0 to 1)
    """

    floor: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        check_fraction("floor", self.floor)

    def choose(self, scores, count):
        return pooled(scores, count, self.floor)
