"""From logits to text: how the next token is chosen, and when the answer ends."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from .config import InputError, brief, plain_text


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when the answer ends. InputError for invalid values."""

    max_new_tokens: int = 256  # at least 1
    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # at least 1; None: all tokens
    top_p: float | None = None  # above 0, up to 1; None: no limit
    seed: int = 0  # 0 to 2**64 - 1
    stop: str | Collection[str] | None = ()  # strings that end the answer, themselves excluded; or one such string

    def __post_init__(self):
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple | set | frozenset) or not all(
            isinstance(s, str) and plain_text(s) for s in stop
        ):
            raise InputError(f"stop is {brief(self.stop)}; give a non-empty string or a list of such strings")
        object.__setattr__(self, "stop", tuple(map(plain_text, stop)))  # the class is frozen
        for name, kind, low, high, wanted in (
            ("max_new_tokens", Integral, 1, math.inf, "an integer of at least 1"),
            ("temperature", Real, 0, 1e4, "a number from 0 (greedy) to 10000"),
            ("top_k", Integral, 1, math.inf, "an integer of at least 1, or None for all tokens"),
            ("top_p", Real, 5e-324, 1, "a number above 0 and up to 1, or None for no limit"),
            ("seed", Integral, 0, 2**64 - 1, "an integer from 0 to 2**64 - 1"),
        ):
            value = getattr(self, name)
            if value is None and name in ("top_k", "top_p"):
                continue
            # NaN fails the comparison
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                raise InputError(f"{name} is {brief(value)}; give {wanted}")
            if kind is Integral:  # NumPy's integers too
                object.__setattr__(self, name, int(value))


class Chooser:
    """Chooses the next token of one answer: logits -> id, on their device; -1 if they are not finite."""

    def __init__(self, sampling, never, device):
        """never: ids that must not be chosen."""
        self.sampling, self.never = sampling, torch.tensor(never, dtype=torch.long, device=device)
        self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def __call__(self, logits):
        """logits (V,) -> id (1,)."""
        sampling, (token, logits) = self.sampling, self.greedy(logits[None])
        if sampling.temperature > torch.finfo(logits.dtype).tiny:  # below that, sampling is greedy
            weights = probabilities(logits[0], sampling.temperature, sampling.top_k, sampling.top_p)
            noise = torch.empty_like(weights).exponential_(generator=self.generator)
            # the same as multinomial, without the synchronisation of its checks
            token = torch.where(token < 0, token, (weights / noise).argmax(-1))
        return token

    def greedy(self, logits):
        """logits (B, V) -> the best ids (B,), and the logits (B, V) in fp32 with -inf for `never`."""
        logits = logits.float().index_fill(-1, self.never, float("-inf"))
        best, token = logits.max(-1)
        return torch.where(best.isfinite(), token, -1), logits  # a NaN makes the maximum NaN


def probabilities(logits, temperature, top_k=None, top_p=None):
    """Keep the top_k logits, then the smallest set with probability mass top_p.

    logits (V,) -> softmax (V,) of logits / temperature over this set, 0 elsewhere, in the dtype of logits.
    top_p (nucleus sampling, arXiv 1904.09751) always keeps the best token, even if it alone exceeds top_p. Ties go to
    the lower index, as in greedy decoding.
    """
    limits = torch.finfo(logits.dtype)  # the temperature must not round to 0 or infinity
    logits = (logits - logits.max()) / min(max(temperature, limits.tiny), limits.max)  # the best is 0
    if top_k is not None or top_p is not None:
        logits, order = logits.sort(descending=True, stable=True)
        if top_k is not None:
            logits[top_k:] = float("-inf")
        if top_p is not None and top_p < 1:
            weights = logits.softmax(-1)
            before = weights.cumsum(-1) - weights  # mass of all better tokens
            before[0] = -1.0  # a tiny top_p rounds to 0 in fp32
            logits = logits.masked_fill(before >= top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter_(0, order, logits)
    return logits.softmax(-1)


class Writer:
    """Converts ids to text; holds back text that might be the start of a stop string."""

    def __init__(self, detokenizer, stop):
        self.detokenizer, self.stop, self.held, self.stopped = detokenizer, tuple(stop), "", False

    def push(self, token):
        """The text that can be shown after one more id; sets `stopped` when a stop string is complete."""
        self.held += self.detokenizer.push(token)
        found = [self.held.find(s) for s in self.stop if s in self.held]
        if found:
            self.held, self.stopped = self.held[: min(found)], True
            return self.flush()
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready

    def flush(self):
        """The text still held back, at the end of the answer."""
        rest, self.held = self.held + ("" if self.stopped else self.detokenizer.flush()), ""
        return rest
