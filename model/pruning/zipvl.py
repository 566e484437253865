"""ZipVL (arXiv 2410.08584): in each layer only the important tokens attend, and only their K and V are stored."""

from dataclasses import dataclass

import torch

from .budget import best, check_scores, mass, select, top


@dataclass(frozen=True, kw_only=True)
class ZipVL:
    """Each layer computes attention among its important tokens only, and stores only their K and V (2410.08584, v2).

    A layer needs the fewest tokens that hold `tau` of the attention of its probe rows, summed over heads: the last rows
    of the prompt and random earlier ones. It takes that many by the mean over the probe rows that can see a token, so
    that early tokens, which more rows see, have no advantage; text is added to them. Other tokens get nothing from
    this layer's attention, but go on through its MLP. All keep their positions. Hidden states change, so the first
    new token may already differ; with tau=1 nothing is dropped.

    The numbers of probe rows are our recollection; we found no code. v1 of the paper, which stores the other tokens in
    fewer bits, is not here. With retention or keep_tokens (ours) each picture has that many important tokens, whatever
    they hold.

    tau: share of the attention that the important tokens hold (above 0 and up to 1)
    last_rows: last rows of the prompt that are probed (1 or more)
    random_rows: random earlier rows that are probed, others in each layer (0 or more)
    retention: fraction of the vision tokens that are important; replaces tau (above 0 and up to 1)
    keep_tokens: important tokens of each picture; replaces tau (1 or more)
    seed: of the random rows (any whole number)
    """

    tau: float = 0.975
    last_rows: int = 64
    random_rows: int = 64
    retention: float | None = None
    keep_tokens: int | None = None
    scope: str = "image"
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau is {self.tau}; give a number above 0 and up to 1")
        if self.last_rows < 1:
            raise ValueError(f"last_rows is {self.last_rows}; give a whole number of 1 or more")
        if self.random_rows < 0:
            raise ValueError(f"random_rows is {self.random_rows}; give a whole number of 0 or more")
        if self.scope != "image" and self.retention is None and self.keep_tokens is None:
            raise ValueError(f"scope={self.scope} has no effect with tau; give retention or keep_tokens, or no scope")

    def attend(self, view):
        """-> the important tokens (T,) bool, or None for all."""
        fixed = self.retention is not None or self.keep_tokens is not None
        if self.tau == 1 and not fixed:
            return None
        rows = self.probes(view)
        raw = view.attention(rows).sum(0, keepdim=True)  # (1, T), the sum divided by the number of rows
        seen = (rows[:, None] >= torch.arange(view.tokens, device=view.device)).sum(0)  # by how many rows, 1 or more
        if fixed:
            return select(raw / seen, view, top(self.retention, self.keep_tokens), self.scope)[0]
        check_scores(raw, view)
        return best(raw / seen, int(mass(raw, self.tau).sum()))[0] | view.text

    def keep(self, view):
        """-> keep (Hkv, T) bool, the important tokens in every head, or None for all."""
        return None if view.attended is None else view.attended.expand(view.kv_heads, -1)

    def probes(self, view):
        """-> indices (R,) int64, ascending: the last rows, and random ones of those before them."""
        first = max(0, view.tokens - self.last_rows)
        generator = torch.Generator("cpu").manual_seed((self.seed * view.num_layers + view.layer) % 2**63)
        earlier = torch.randperm(first, generator=generator, device="cpu")[: self.random_rows].sort().values
        return torch.cat((earlier, torch.arange(first, view.tokens, device="cpu"))).to(view.device)
