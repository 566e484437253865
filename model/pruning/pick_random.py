"""Give the language model random tokens of each picture: the simplest baseline."""

from dataclasses import dataclass

import torch

from .budget import best, budget


@dataclass(frozen=True, kw_only=True)
class PickRandom:
    """A baseline: the language model gets random tokens of each picture.

    seed: of the random choice (any whole number)
    """

    retention: float = 0.5
    keep_tokens: int | None = None
    seed: int = 0

    def pick(self, picture):
        """-> indices (P',), different in each picture; drawn on the CPU, so the same on every device."""
        generator = torch.Generator("cpu").manual_seed((self.seed * 2**16 + picture.number) % 2**63)
        noise = torch.rand(1, picture.tokens, generator=generator, device="cpu")
        return best(noise, budget(picture.tokens, self.retention, self.keep_tokens))[0].nonzero()[:, 0]
