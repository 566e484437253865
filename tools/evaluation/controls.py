"""Controls for pruning methods: rules that use what no method can see, or that copy the budget of another rule.

Each is a rule of `model.pruning.Method` with a stage `keep`. Random rules take a seed, so that every question has its
own draws.
"""

import dataclasses
from collections.abc import Callable

import torch

from model.cache import KV_DTYPES
from model.lookahead import Lookahead
from model.pruning.budget import best, budget, by_kv_head, select


def _draw(seed, view):
    """(Hkv, T) uniform noise, drawn on the CPU so that it is the same on every device."""
    generator = torch.Generator("cpu").manual_seed(1000 * seed + view.layer + 500)
    return torch.rand(view.kv_heads, view.tokens, generator=generator, device="cpu").to(view.device)


@dataclasses.dataclass
class Evidence:
    """Keeps the patches that hold the answer's evidence first, then random ones; anti: keeps the evidence last."""

    patches: tuple  # per picture, indices of the evidence
    retention: float
    seed: int
    anti: bool = False

    def keep(self, view):
        worth = _draw(self.seed, view)
        for (start, _), patches in zip(view.spans, self.patches, strict=True):
            worth[:, [start + p for p in patches]] += -1 if self.anti else 1
        return select(worth, view, lambda s: best(s, budget(s.shape[1], self.retention)))


@dataclasses.dataclass
class Ranked:
    """Each head keeps the tokens with the largest `worth`, a function (layer) -> (Hkv, T); cover: as in plphp."""

    worth: Callable
    retention: float
    cover: float = 0.0

    def keep(self, view):
        def choose(part):
            return best(part, budget(part.shape[1], self.retention))

        return select(self.worth(view.layer), view, choose, "image", self.cover)


def worth_of_rows(asked, lookahead, of=None):
    """`worth` for `Ranked`: attention of look-ahead rows after the prompt `asked`, or after the prompt `of`, whose
    pictures must have the same numbers of tokens."""
    of = of or asked

    def worth(layer):
        heads = by_kv_head(of.attention_of_rows(lookahead, layer), of.kv_heads)
        if of is asked:
            return heads
        mine = heads.new_zeros(len(heads), asked.tokens)
        for (start, stop), (first, last) in zip(asked.spans, of.spans, strict=True):
            mine[:, start:stop] = heads[:, first:last]
        return mine

    return worth


def neutral_rows(checkpoint, text=".", rows=8):
    """Untrained look-ahead rows: one token of the vocabulary, `rows` times, with adapters that change nothing."""
    language = checkpoint.model.language_model
    neutral = Lookahead(language, rows, rank=1).to(checkpoint.device, checkpoint.dtype)  # B of an adapter begins at 0
    token = checkpoint.tokenizer.encode(text)[-1]
    neutral.embeddings.data[:] = language.model.embed_tokens.weight[token]
    return neutral.requires_grad_(False)


@dataclasses.dataclass
class Like:
    """Keeps as many tokens per layer, head and picture as `other`, but chosen at random, or (shared) by the mean
    attention of all heads."""

    other: object
    shared: bool
    seed: int = 0

    def keep(self, view):
        kept = self.other.keep(view)
        if kept is None:
            return None
        worth = view.attention().mean(0).expand(view.kv_heads, -1) if self.shared else _draw(self.seed, view)
        result = torch.ones_like(kept)
        for start, stop in view.spans:
            result[:, start:stop] = best(worth[:, start:stop], kept[:, start:stop].sum(1, keepdim=True))
        return result


@dataclasses.dataclass
class ValuesDropped:
    """A diagnostic that saves no memory: a dropped token keeps its key, and its value becomes zero.

    Every head keeps the attention weights of the unpruned model; the share of dropped tokens contributes zero. If this
    answers correctly where dropping fails, the lost values did no harm: the attention that moved to other tokens did.
    """

    other: object
    only_values = True

    def keep(self, view):
        return self.other.keep(view)


@dataclasses.dataclass
class Coded:
    """The choice of `other`; the prompt's keys and values are quantised to `codes` (int8 or float8_e4m3fn)."""

    other: object
    codes: torch.dtype

    def keep(self, view):
        return self.other.keep(view)


def coded(method, kind):
    """A method with the prompt's keys and values in "int8" or "fp8", as with `--kv-dtype`."""
    return dataclasses.replace(method, rule=Coded(method.rule, KV_DTYPES[kind]))
