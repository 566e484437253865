"""FastV (arXiv 2403.06764): vision tokens are removed from the hidden states before a layer and all later ones."""

from dataclasses import dataclass

from .budget import select, top


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

    def check(self, num_layers, kv_heads):
        """ValueError if the model has no such layer."""
        if self.layer >= num_layers:
            raise ValueError(f"layer is {self.layer}, the model has {num_layers}; give one from 1 to {num_layers - 1}")

    def narrow(self, view):
        """-> the tokens that remain after this layer, keep (T,) bool, or None for all."""
        if view.layer != self.layer - 1:
            return None
        mean = view.attention().mean(0, keepdim=True)  # (1, T)
        return select(mean, view, top(self.retention, self.keep_tokens), self.scope)[0]
