"""G-Search and P-Sigmoid (arXiv 2412.00556): vision tokens leave the hidden states layer by layer, on a schedule.

The paper's code and equations are not public. The following is our reconstruction from its abstract and reviews:
`tools/calibrate.py schedule` searches the least tokens per layer (G-Search) and the shape of the sigmoid (P-Sigmoid).

    share(l) = lo + (hi - lo) / (1 + exp(steepness * (l / (L - 1) - centre)))   for layers l from 1 on; share(0) = 1
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from .budget import best, budget, check_fraction, later, select


@dataclass(frozen=True, kw_only=True)
class GSearch:
    """Each layer passes on fewer vision tokens, those that it attends to most (2412.00556, our reconstruction).

    A layer's tokens are ranked by the attention of the last prompt row, mean over heads, and each picture separately.
    A layer has a fraction of the picture's original tokens, which never grows with depth. Hidden states are dropped, so
    prefill gets cheaper, and the first new token may already differ. The kept tokens retain their positions.

    schedule: fraction for each layer, none above the one before; [] keeps all; replaces the sigmoid (0 to 1, first 1)
    retention: mean over all layers of the fractions of the sigmoid; null means 0.5 (above 0 and up to 1)
    lo: fraction at the deep end of the sigmoid, or less if retention needs it (0 to hi)
    hi: fraction at the shallow end of the sigmoid, or more if retention needs it (lo to 1)
    steepness: of the sigmoid, 0 is flat, 100 almost a step (0 to 1000)
    """

    schedule: list | None = None
    retention: float | None = None
    lo: float = 0.0
    hi: float = 1.0
    steepness: float = 10.0
    query: str = "last"

    def __post_init__(self):
        for name in ("lo", "hi"):
            check_fraction(name, getattr(self, name))
        if self.lo > self.hi:
            raise ValueError(f"lo {self.lo} is above hi {self.hi}; give lo <= hi")
        if not 0 <= self.steepness <= 1000:
            raise ValueError(f"steepness is {self.steepness}; give a number from 0 to 1000")
        if self.schedule is not None and self.retention is not None:
            raise ValueError("schedule and retention are given; give one of them")
        for fraction in self.schedule or ():
            check_fraction("an entry of schedule", fraction)
        if self.schedule and self.schedule[0] != 1:
            raise ValueError(f"schedule begins with {self.schedule[0]}; give 1, as no token leaves before it")
        for before, after in pairwise(self.schedule or ()):
            if after > before:
                raise ValueError(f"schedule grows from {before} to {after}; dropped tokens cannot return, so lower it")

    def check(self, num_layers, kv_heads):
        """ValueError if `schedule` does not match the model's number of layers, or if retention cannot be reached."""
        if self.schedule and len(self.schedule) != num_layers:
            raise ValueError(f"schedule has {len(self.schedule)} layers, the model {num_layers}; give one for each")
        if self.retention is not None and self.retention < 1 and self.retention * num_layers <= 1:
            raise ValueError(
                f"retention is {self.retention:g}, but the first of {num_layers} layers keeps everything; "
                f"give more than {1 / num_layers:.4g}"
            )

    def narrow(self, view):
        """-> the tokens that the next layer processes, keep (T,) bool, or None for all."""
        shares = self.shares(view.num_layers)
        if view.layer + 1 >= len(shares) or shares[view.layer + 1] == shares[view.layer]:
            return None
        counts = iter([budget(stop - start, shares[view.layer + 1]) for start, stop in view.whole_spans])
        mean = view.attention(query=self.query).mean(0, keepdim=True)  # (1, T)
        return select(mean, view, lambda scores: best(scores, next(counts)))[0]

    def shares(self, num_layers):
        """The fraction of the vision tokens in each layer, [] for all tokens in all layers."""
        if self.schedule is not None:
            return self.schedule
        retention = 0.5 if self.retention is None else self.retention
        return sigmoid_shares(num_layers, retention, self.lo, self.hi, self.steepness)


@lru_cache  # every layer of a prefill asks for it
def sigmoid_shares(num_layers, retention, lo, hi, steepness):
    """The sigmoid whose mean over the layers, with 1 for the first, is retention: a tuple, not increasing.

    Its centre is found by bisection. lo or hi moves if retention is outside of them.
    """
    if num_layers == 1:
        return (1.0,)
    wanted = later(retention, 1, num_layers)
    lo, hi = min(lo, wanted), max(hi, wanted)
    depths = torch.arange(1, num_layers, device="cpu").double() / (num_layers - 1)
    low, high = -50.0, steepness + 50.0  # of steepness * centre: all layers have lo, and hi, to the last bit
    for _ in range(60):
        middle = (low + high) / 2
        shares = lo + (hi - lo) * torch.sigmoid(middle - steepness * depths)
        low, high = (middle, high) if shares.mean() < wanted else (low, middle)
    return (1.0, *shares.clamp(0, 1).tolist())
