"""FastV (arXiv 2403.06764): vision tokens are removed from the hidden states before a layer and all later ones."""

from dataclasses import dataclass

from .budget import budget, select, shared


@dataclass(frozen=True, kw_only=True)
class FastV:
    """From layer `layer` on, the least attended vision tokens are removed from the hidden states (2403.06764).

    The kept tokens are those that the last prompt row attended to most in the previous layer, averaged over heads.
    Because hidden states are dropped too, prefill gets cheaper, and the first new token may already differ. The kept
    tokens retain their positions.

    layer: first layer without the dropped tokens, the paper's K (1 or more, below the number of layers)
    retention: fraction of the vision tokens to keep, 1 minus the paper's R (above 0 and up to 1)
    keep_tokens: tokens to keep of each picture; replaces retention (1 or more)
    """

    layer: int = 2
    retention: float = 0.5
    keep_tokens: int | None = None
    scope: str = "image"

    def __post_init__(self):
        if self.layer < 1:
            raise ValueError(f"layer is {self.layer}; give a whole number of 1 or more")

    def narrow(self, scores, layout):
        """Attention (Hq, T) fp32 in layer `layer` - 1 -> keep (T,) bool. Called once."""
        heads = scores.mean(0, keepdim=True).expand(layout.kv_heads, -1)
        return select(
            heads, layout, lambda s: shared(s, budget(s.shape[1], self.retention, self.keep_tokens)), self.scope
        )[0]
