"""Give the language model an even grid of each picture's tokens: the baseline for methods that choose by content."""

from dataclasses import dataclass

from .budget import along_grid, best, budget


@dataclass(frozen=True, kw_only=True)
class PickGrid:
    """A baseline: the language model gets evenly spaced tokens of each picture."""

    retention: float = 0.5
    keep_tokens: int | None = None

    def pick(self, picture):
        """-> indices (P',)."""
        phase = along_grid(picture.places) % 1  # the lowest are evenly spaced, however many they are
        return best(-phase[None], budget(picture.tokens, self.retention, self.keep_tokens))[0].nonzero()[:, 0]
