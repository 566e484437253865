"""H2O (arXiv 2306.14048): heavy hitters, the tokens with the most attention so far, also among the answer's tokens.

What the original does (FMInference/H2O, modify_llama.py) and what is done here:

- A token's score is the sum of its attention over all rows, of the prompt and of every later token. The same here, as
  the mean over the query heads of a KV head; the original has as many KV heads as query heads.
- The original keeps heavy hitters and the newest tokens, each a tenth of the prompt's length. Here the text of the
  prompt is always kept. The budget is a share of the vision tokens, 2 * 0.1 by default, for which vision tokens and the
  tokens of the answer compete; half of it is for the newest tokens.
- The original masks what it evicts and goes on holding it. Here its slot is reused, so that a long answer takes no more
  bytes than a short one.
- Tokens of later turns of a conversation, and what they ask about, are never evicted; the budget rises by them.
"""

from dataclasses import dataclass

from .budget import by_kv_head, check_fraction, select, top


@dataclass(frozen=True, kw_only=True)
class H2O:
    """Each head keeps the tokens with the most attention so far, in fixed bytes while the answer grows (2306.14048).

    newest: share of these slots that is for the newest tokens, whatever their attention (0 to 1)
    extra_tokens: slots of each head for the answer, beside those of the kept vision tokens (1 or more)
    """

    retention: float = 0.2
    keep_tokens: int | None = None
    newest: float = 0.5
    extra_tokens: int = 1
    scope: str = "image"

    def __post_init__(self):
        check_fraction("newest", self.newest)
        if self.extra_tokens < 1:
            raise ValueError(f"extra_tokens is {self.extra_tokens}; give a whole number of 1 or more")

    def keep(self, view):
        """-> keep (Hkv, T) bool: after the prompt."""
        return select(self.evict(view), view, top(self.retention, self.keep_tokens), self.scope)

    def evict(self, view):
        """-> scores (Hkv, T) fp32: what tokens bring into the competition with those of the answer."""
        return by_kv_head(view.sums, view.kv_heads)
