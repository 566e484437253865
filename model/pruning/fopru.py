"""FoPru (arXiv 2411.14164): rank tokens by the attention among patches in the layer whose output LLaVA reads.

No code was published. The paper's two candidates for the scores are the attention that a token receives, and the one
that it gives. A row of softmax sums to 1, so what is given differs between tokens only because the columns of CLS
and of the canvas border are left out. Ours: the default retention; rows of a picture, and of the tiles'
map, are ranked by their mean; attention between the squares of LLaVA-NeXT is none, and tokens on the canvas border
count neither as rows nor as columns.
"""

from dataclasses import dataclass

import torch

from .budget import best, budget

BLOCK = 256  # rows of attention at a time


@dataclass(frozen=True, kw_only=True)
class FoPru:
    """The tokens, or rows of the picture, with the most attention among patches of the vision tower (2411.14164).

    form: choose single tokens, or whole rows until the budget is reached (rank or row)
    """

    retention: float = 0.25
    keep_tokens: int | None = None
    form: str = "rank"

    def __post_init__(self):
        if self.form not in ("rank", "row"):
            raise ValueError(f"form is {self.form!r}; use rank or row")

    def pick(self, picture):
        """-> indices (P',)."""
        scores, count = significance(picture), budget(picture.tokens, self.retention, self.keep_tokens)
        if self.form == "row":
            row = picture.places[:, 0].to(picture.device)
            length = torch.bincount(row)
            means = scores.new_zeros(len(length)).index_add_(0, row, scores) / length
            order = means.sort(descending=True, stable=True).indices
            before = length[order].cumsum(0) - length[order]  # tokens in better rows
            return torch.isin(row, order[before < count]).nonzero()[:, 0]
        return best(scores[None], count)[0].nonzero()[:, 0]


def significance(picture):
    """(P,) fp32: the attention received (mean over queries) or given (mean over keys), whichever varies more."""
    received, given = torch.zeros(2, picture.tokens, device=picture.device)
    for start in range(0, picture.tokens, BLOCK):
        stop = min(start + BLOCK, picture.tokens)
        rows = picture.attention(picture.read_layer, start, stop).mean(0)  # (stop - start, P)
        received += rows.sum(0)
        given[start:stop] = rows.sum(1)
    per_square = torch.bincount(picture.tile)[picture.tile]
    received, given = received / per_square, given / per_square
    return received if received.var(correction=0) >= given.var(correction=0) else given
