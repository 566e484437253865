"""PyramidDrop (arXiv 2410.17247; Cooperx521/PyramidDrop @6444f30): the deeper the layer, the fewer vision tokens.

Different from the code: the kept tokens retain their positions. The code renumbers them at every stage, so that one
token has several positions, and the position of a decoded token differs from layer to layer. Several pictures, and
query heads that share a KV head, are ours.
"""

from dataclasses import dataclass

from .budget import at_depth, best, budget, check_depths, check_stages, select

STAGES = 8, 16, 24  # first layers of the stages, of 32


@dataclass(frozen=True, kw_only=True)
class PyramidDrop:
    """At each stage the least attended vision tokens are removed from the hidden states (2410.17247).

    The kept tokens are those that the last prompt row would attend to most in the first layer of the stage, averaged
    over heads. Because hidden states are dropped too, prefill gets cheaper, and the first new token may already differ.

    retention: mean over all layers of the fraction to keep: ratios become powers of one number; null: as ratios say
        (above 0 and up to 1)
    stages: first layer of each stage, below the number of layers; null: 8, 16 and 24 of 32, in proportion for other
        depths (1 or more, ascending)
    ratios: fraction of a picture's tokens to keep from each stage on; null: 0.5, 0.25, 0.125, ...
        (above 0 and up to 1, descending)
    """

    retention: float | None = None
    stages: list | None = None
    ratios: list | None = None
    scope: str = "image"

    def __post_init__(self):
        check_stages(self.stages, self.ratios)
        wanted = len(STAGES if self.stages is None else self.stages)
        if self.ratios is not None and len(self.ratios) != wanted:
            raise ValueError(f"ratios has {len(self.ratios)} entries; give {wanted}, one for each stage")

    def check(self, num_layers, kv_heads):
        """ValueError if the model has no such stage, or if the retention cannot be reached."""
        check_depths(self._stages(num_layers), num_layers, self.retention)

    def narrow(self, view):
        """-> the tokens that remain after this layer, keep (T,) bool, or None for all."""
        ratio = self.schedule(view.num_layers).get(view.layer + 1)
        if ratio is None:
            return None
        spans = view.whole_parts if self.scope == "part" else view.whole_spans
        whole = [stop - start for start, stop in spans]
        counts = iter([budget(n, ratio) for n in ([sum(whole)] if self.scope == "vision" else whole)])
        scores = view.next_attention().mean(0, keepdim=True)  # (1, T)
        return select(scores, view, lambda s: best(s, next(counts)), self.scope)[0]

    def schedule(self, num_layers):
        """{first layer of a stage: fraction of the tokens to keep from there on}."""
        stages = self._stages(num_layers)
        if self.ratios is not None:
            return dict(zip(stages, self.ratios, strict=True))
        low, high = (0.0, 1.0) if self.retention else (0.5, 0.5)
        while high - low > 1e-9:
            middle = (low + high) / 2
            less = mean_fraction(_powers(stages, middle), num_layers) < self.retention
            low, high = (middle, high) if less else (low, middle)
        return _powers(stages, high)

    def _stages(self, num_layers):
        return [at_depth(layer, num_layers) for layer in STAGES] if self.stages is None else self.stages


def _powers(stages, ratio):
    return {layer: ratio**i for i, layer in enumerate(stages, 1)}


def mean_fraction(schedule, num_layers):
    """Mean over all layers of the fraction kept; schedule: {layer: fraction from there on}, everything before."""
    fraction, total = 1.0, 0.0
    for layer in range(num_layers):
        fraction = schedule.get(layer, fraction)
        total += fraction
    return total / num_layers
