"""Keep vision tokens at random: the simplest baseline."""

from dataclasses import dataclass

import torch

from .budget import best, select, top


@dataclass(frozen=True, kw_only=True)
class Random:
    """A baseline: each head of each layer keeps random tokens.

    pooled: the heads of a layer share one budget, so they keep different numbers of tokens (true or false)
    shared: the heads of a layer keep the same tokens (true or false)
    seed: of the random choice (any whole number)
    """

    retention: float = 0.5
    keep_tokens: int | None = None
    pooled: bool = False
    shared: bool = False
    scope: str = "image"
    seed: int = 0

    def __post_init__(self):
        if self.pooled and self.shared:
            raise ValueError("pooled and shared are both true; give one of them")

    def keep(self, view):
        """-> keep (Hkv, T) bool."""
        noise = draw(self.seed, view)[: 1 if self.shared else None]
        choose = top(self.retention, self.keep_tokens, _one_pot if self.pooled else best)
        return select(noise, view, choose, self.scope).expand(view.kv_heads, -1)


def draw(seed, view):
    """(Hkv, T) fp32 uniform noise, different in each layer; drawn on the CPU, so the same on every device."""
    generator = torch.Generator("cpu").manual_seed((seed * view.num_layers + view.layer) % 2**63)
    return torch.rand(view.kv_heads, view.tokens, generator=generator, device="cpu").to(view.device)


def _one_pot(scores, count):
    """scores (H, n) -> bool (H, n): the H * count best over all heads together; a head may keep none."""
    return best(scores.reshape(1, -1), count * len(scores)).view(scores.shape)
