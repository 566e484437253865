"""PLPHP: per-layer, per-head pruning of vision tokens (arXiv 2502.14504), and our variant with a budget per head.

    gamma  = mean over heads of the attention that the last prompt token pays to all vision tokens    one per layer
    rate   = r + dr  if gamma >= alpha       a layer with much attention to the pictures keeps more,
             r - dr  if gamma < beta         a layer with little attention to the pictures keeps less,
             r       otherwise               clamped to 0 .. 1
    keep   = each KV head keeps its floor(rate * n + 0.5) most attended of a picture's n tokens, at least one

Only K and V are dropped, after the layer's own attention: the first new token is that of the unpruned model. The heads
of a layer keep the same number of tokens, but not the same tokens.

The abstract and reviews of the paper say what is computed but give no values, and its code is not public: alpha, beta,
r, dr, which layers are not pruned, the query row and averaging over the query heads of a KV head are our choices.
"""

from dataclasses import dataclass

from .budget import best, check_fraction, pooled, ranking, select, top


@dataclass(frozen=True, kw_only=True)
class Plphp:
    """Each head keeps its most attended tokens, at a rate chosen per layer (2502.14504).

    gamma is the share of attention that goes to the pictures, from the last prompt row or, with query=lookahead, from
    the look-ahead rows. For group, values, window and query see `ranking`, for scope and cover `select`.

    r: fraction that a layer keeps if its gamma is between beta and alpha (0 to 1)
    dr: added to r if gamma is at least alpha, subtracted if it is below beta (0 to 1)
    alpha: layers keep more if their attention to the pictures (gamma) is at least this value (beta or more)
    beta: layers keep less if their attention to the pictures (gamma) is below this value (up to alpha)
    skip: number of first layers that are not pruned; null means 1 for fewer than 12 layers, else 2 (0 or more)
    retention: replaces r; dr is then at most 0.75 * retention and at most 1 - retention (above 0 and up to 1)
    keep_tokens: tokens that each head keeps of each picture, whatever gamma is (1 or more)
    """

    r: float = 0.4
    dr: float = 0.3
    alpha: float = 0.25
    beta: float = 0.1
    skip: int | None = None
    group: str = "mean"
    values: bool = False
    window: int = 1
    scope: str = "image"
    query: str = "last"
    cover: float = 0.0
    retention: float | None = None
    keep_tokens: int | None = None

    def __post_init__(self):
        check_fraction("r", self.r)
        check_fraction("dr", self.dr)
        if not self.alpha >= self.beta:
            raise ValueError(f"alpha {self.alpha} is below beta {self.beta}; give alpha >= beta")
        if self.skip is not None and (type(self.skip) is not int or self.skip < 0):
            raise ValueError(f"skip is {self.skip!r}; give a whole number of 0 or more")

    def keep(self, view):
        """-> keep (Hkv, T) bool, or None in the first layers."""
        skip = (2 if view.num_layers >= 12 else 1) if self.skip is None else self.skip
        if view.layer < skip:
            return None
        rate = self.rate(gamma(view.attention(query=self.query), view.spans))
        scores = ranking(view, self.window, self.query, self.group, self.values)
        return select(scores, view, top(rate, self.keep_tokens, self.choose), self.scope, self.cover)

    def rate(self, gamma):
        """The fraction that a layer keeps, from 0 to 1."""
        r = self.r if self.retention is None else self.retention
        dr = self.dr if self.retention is None else min(self.dr, 0.75 * r, 1 - r)
        rate = r + dr if gamma >= self.alpha else r - dr if gamma < self.beta else r
        return min(1.0, max(0.0, rate))

    def choose(self, scores, count):
        """scores (Hkv, n) of a picture -> bool (Hkv, n): the `count` best in each head."""
        return best(scores, count)


@dataclass(frozen=True, kw_only=True)
class PlphpAda(Plphp):
    """PLPHP with one budget for all heads of a layer, so that some keep more than others (our variant).

    The most attended (head, token) pairs of a picture are kept.

    floor: minimum for every head, as a fraction of an equal share of the budget (0 to 1)
    """

    floor: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        check_fraction("floor", self.floor)

    def choose(self, scores, count):
        return pooled(scores, count, self.floor)


def gamma(scores, spans):
    """Share of attention that goes to vision tokens, a float. scores (Hq, T): of the last row or of look-ahead rows."""
    return float(sum(scores[:, start:stop].sum(1) for start, stop in spans).mean())
