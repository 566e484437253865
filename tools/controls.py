"""Controls for pruning methods: rules that use what no method can see, or that copy the budget of another rule.

Each is a rule of `model.pruning.Method`: rule(layer, scores, layout) -> keep (Hkv, T). Random rules take a seed, so
that every question has its own draws.
"""

import dataclasses
from collections.abc import Callable

import torch

from model.lookahead import Lookahead
from model.pruning.budget import best, budget, by_kv_head, grid_phase, select


def _draw(seed, layer, layout):
    """(Hkv, T) uniform noise, drawn on the CPU so that it is the same on every device."""
    generator = torch.Generator("cpu").manual_seed(1000 * seed + layer + 500)
    return torch.rand(layout.kv_heads, layout.tokens, generator=generator, device="cpu").to(layout.device)


@dataclasses.dataclass
class Evidence:
    """Keeps the patches that hold the answer's evidence first, then random ones; anti: keeps the evidence last."""

    patches: tuple  # per picture, indices of the evidence
    retention: float
    seed: int
    anti: bool = False

    def __call__(self, layer, scores, layout):
        worth = _draw(self.seed, layer, layout)
        for (start, _), patches in zip(layout.spans, self.patches, strict=True):
            worth[:, [start + p for p in patches]] += -1 if self.anti else 1
        return select(worth, layout, lambda s: best(s, budget(s.shape[1], self.retention)))


@dataclasses.dataclass
class Ranked:
    """Each head keeps the tokens with the largest `worth`, a function (layer) -> (Hkv, T); cover: as in plphp."""

    worth: Callable
    retention: float
    cover: float = 0.0

    def __call__(self, layer, scores, layout):
        phase = grid_phase(layer, layout) if self.cover else None

        def choose(part):
            return best(part, budget(part.shape[1], self.retention))

        return select(self.worth(layer), layout, choose, "image", self.cover, phase)


def worth_of_rows(asked, lookahead, of=None):
    """`worth` for `Ranked`: attention of look-ahead rows after the prompt `asked`, or after the prompt `of`, whose
    pictures must have the same numbers of tokens."""
    of = of or asked

    def worth(layer):
        heads = by_kv_head(of.attention_of_rows(lookahead, layer), of.layout)
        if of is asked:
            return heads
        mine = heads.new_zeros(len(heads), asked.tokens)
        for (start, stop), (first, last) in zip(asked.layout.spans, of.layout.spans, strict=True):
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


class Obeying:
    """Base of rules that wrap another rule, `other`: they need the same inputs."""

    @property
    def wants_last_row(self):
        return getattr(self.other, "wants_last_row", False)

    def wants(self, layer, num_layers):
        return not hasattr(self.other, "wants") or self.other.wants(layer, num_layers)


@dataclasses.dataclass
class Like(Obeying):
    """Keeps as many tokens per layer, head and picture as `other`, but chosen at random, or (shared) by the mean score
    of all heads."""

    other: object
    shared: bool
    seed: int = 0

    def __call__(self, layer, scores, layout):
        kept = self.other(layer, scores, layout)
        if self.shared:
            worth = by_kv_head(scores, layout).mean(0, keepdim=True).expand(layout.kv_heads, -1)
        else:
            worth = _draw(self.seed, layer, layout)
        result = torch.ones_like(kept)
        for start, stop in layout.spans:
            result[:, start:stop] = best(worth[:, start:stop], kept[:, start:stop].sum(1, keepdim=True))
        return result


@dataclasses.dataclass
class ValuesDropped(Obeying):
    """A diagnostic that saves no memory: a dropped token keeps its key, and its value becomes zero.

    Every head keeps the attention weights of the unpruned model; the share of dropped tokens contributes zero. If this
    answers correctly where dropping fails, the lost values did no harm: the attention that moved to other tokens did.
    """

    other: object
    only_values = True

    def __call__(self, layer, scores, layout):
        return self.other(layer, scores, layout)
