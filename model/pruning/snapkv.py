"""SnapKV (arXiv 2404.14469) and AdaKV (2407.11550) on vision tokens.

Both rank by the attention of the last prompt rows, smoothed along the tokens. The originals drop text too, rank the
tokens of the whole prompt, and keep the window itself. Here the window is text, which stays; pictures are smoothed each
by itself; grouped heads agree before they are smoothed, and store one copy.
"""

from dataclasses import dataclass

import torch.nn.functional as F

from .budget import best, budget, by_kv_head, check_floor, grid_phase, pooled, select

POOLS = ("avg", "max")


@dataclass(frozen=True, kw_only=True)
class SnapKV:
    """Each head keeps what the last 32 text rows attend to most, smoothed (2404.14469).

    window: last prompt rows, all behind the pictures, whose mean attention ranks (1 or more)
    kernel: neighbouring tokens that scores are smoothed over (1 or more, odd)
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
        if self.pool not in POOLS:
            raise ValueError(f"pool is {self.pool!r}; use {' or '.join(POOLS)}")

    def __call__(self, layer, scores, layout):
        """scores (Hq, T) fp32 -> keep (Hkv, T) bool."""
        heads = by_kv_head(scores, layout, self.group, self.values).clone()
        for start, stop in layout.spans:
            heads[:, start:stop] = self.smooth(heads[:, start:stop])
        phase = grid_phase(layer, layout) if self.cover else None
        return select(
            heads, layout, lambda s: self.choose(s, budget(s.shape[1], self.retention, self.keep_tokens)), self.scope,
            self.cover, phase,
        )  # fmt: skip

    def smooth(self, scores):
        """scores (Hkv, n) -> the same shape; beyond the ends of a picture the mean finds zeros."""
        pool = F.avg_pool1d if self.pool == "avg" else F.max_pool1d
        return pool(scores[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]

    def choose(self, scores, count):
        return best(scores, count)


@dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV with one budget for all heads of a layer: some keep more than others (2407.11550).

    floor: fraction of an even share that every head keeps in any case, the original's safeguard (0 to 1)
    """

    floor: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        check_floor(self.floor)

    def choose(self, scores, count):
        return pooled(scores, count, self.floor)
