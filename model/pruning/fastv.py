"""FastV (arXiv 2403.06764): vision tokens leave the prompt after a layer, and no later layer ever sees them."""

from dataclasses import dataclass

from .budget import budget, select, shared


@dataclass(frozen=True, kw_only=True)
class FastV:
    """From layer `layer` on, for all heads, what the last prompt row attended to most in the layer before (2403.06764).

    Hidden states are dropped, not only K and V: prefill gets cheaper too, and the first new token may already differ.
    Layers before it keep all. Positions stay those of the prompt. layer: the K of the paper, 2 there; retention:
    fraction kept (the paper's R is the fraction dropped); keep_tokens: that many per picture instead; scope: as in
    plphp.
    """

    layer: int = 2
    retention: float = 0.5
    keep_tokens: int | None = None
    scope: str = "image"

    def __post_init__(self):
        if self.layer < 1:
            raise ValueError(f"layer is {self.layer}; give 1 or more, the layer before it has to look first")

    def narrow(self, scores, layout):
        """Attention (Hq, T) of layer `layer` - 1 -> (T,) bool: the tokens that go on. Called once."""
        heads = scores.mean(0, keepdim=True).expand(layout.kv_heads, -1)
        return select(
            heads, layout, lambda s: shared(s, budget(s.shape[1], self.retention, self.keep_tokens)), self.scope
        )[0]
