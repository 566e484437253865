"""PLPHP's ranking with fixed rates, one for all layers or a table, instead of rates that depend on gamma.

With `rates` each head has a budget measured offline, as in HeadKV (arXiv 2410.19258) and SparseMM (2506.05344);
with `mass` it keeps as many tokens as hold a given share of its attention, as in ZipVL (2410.08584).
"""

from dataclasses import dataclass

from .budget import best, by_head, check_fraction, mass, ranking, select, top


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Each head keeps its most attended tokens, the same number in every layer.

    Give at most one of retention, keep_tokens, mass and rates; the default is a retention of 0.5.

    mass: keep the fewest tokens with this share of a head's attention to the picture (above 0 and up to 1)
    rates: list with an entry per layer: a fraction, or a list with a fraction per KV head (0 to 1)
    """

    retention: float | None = None
    keep_tokens: int | None = None
    mass: float | None = None
    rates: list | None = None
    group: str = "mean"
    values: bool = False
    window: int = 1
    scope: str = "image"
    query: str = "last"
    cover: float = 0.0

    def __post_init__(self):
        given = [n for n in ("retention", "keep_tokens", "mass", "rates") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; give one of them")
        if self.mass is not None and not (type(self.mass) in (int, float) and 0 < self.mass <= 1):
            raise ValueError(f"mass is {self.mass!r}; give a number above 0 and up to 1")
        if self.rates is not None and not isinstance(self.rates, list):
            raise ValueError(f"rates is {self.rates!r}; give a list with an entry for each layer")
        for row in self.rates or ():
            for rate in row if isinstance(row, list) else [row]:
                check_fraction("an entry of rates", rate)

    def check(self, num_layers, kv_heads):
        """ValueError if `rates` does not match the model's numbers of layers and KV heads."""
        for row in self.rates or ():
            if isinstance(row, list) and len(row) != kv_heads:
                raise ValueError(f"rates has {len(row)} heads in a layer, the model {kv_heads}; give one for each")
        if self.rates is not None and len(self.rates) != num_layers:
            raise ValueError(f"rates has {len(self.rates)} layers, the model {num_layers}; give one for each")

    def keep(self, view):
        """-> keep (Hkv, T) bool."""
        heads = ranking(view, self.window, self.query, self.group, self.values)
        return select(heads, view, lambda s: self.choose(view.layer, s), self.scope, self.cover)

    def choose(self, layer, scores):
        """scores (Hkv, n) of a picture -> bool (Hkv, n): the best in each head."""
        if self.mass is not None:
            return mass(scores, self.mass)
        if self.rates is not None:
            return best(scores, by_head(self.rates, layer, *scores.shape))
        return top(0.5 if self.retention is None else self.retention, self.keep_tokens)(scores)
