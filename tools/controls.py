"""Rules that know more than a pruning method may, or obey another one: what methods are compared with.

Each is a rule of `model.pruning.Method`: rule(layer, scores, layout) -> keep (Hkv, T). Those that draw take a seed, so
that every question has draws of its own.
"""

import dataclasses
from collections.abc import Callable

import torch

from model.lookahead import Lookahead
from model.pruning.budget import best, budget, by_kv_head, grid_phase, select


def _draw(seed, layer, layout):
    """(Hkv, T) of uniform noise: on the CPU, the same on every device."""
    generator = torch.Generator("cpu").manual_seed(1000 * seed + layer + 500)
    return torch.rand(layout.kv_heads, layout.tokens, generator=generator, device="cpu").to(layout.device)


@dataclasses.dataclass
class Evidence:
    """Keeps the patches that show what the answer needs, then others at random; anti: those last of all."""

    patches: tuple  # per picture, indices of its patches
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
    """Ranks by what `worth` says, a function (layer) -> (Hkv, T), each head by its own; cover: as in plphp."""

    worth: Callable
    retention: float
    cover: float = 0.0

    def __call__(self, layer, scores, layout):
        phase = grid_phase(layer, layout) if self.cover else None

        def choose(part):
            return best(part, budget(part.shape[1], self.retention))

        return select(self.worth(layer), layout, choose, "image", self.cover, phase)


def worth_of_rows(asked, lookahead, of=None):
    """For `Ranked`: the attention of look-ahead rows behind the prompt `asked`, or behind another one, `of`, whose
    pictures have as many tokens."""
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
    """Look-ahead rows that nobody trained: a token of the vocabulary, `rows` times, without adapters."""
    language = checkpoint.model.language_model
    neutral = Lookahead(language, rows, rank=1).to(checkpoint.device, checkpoint.dtype)  # B of an adapter begins at 0
    token = checkpoint.tokenizer.encode(text)[-1]
    neutral.embeddings.data[:] = language.model.embed_tokens.weight[token]
    return neutral.requires_grad_(False)


class Obeying:
    """What a rule has in common that asks another one, `other`, first."""

    @property
    def wants_last_row(self):
        return getattr(self.other, "wants_last_row", False)

    def wants(self, layer, num_layers):
        return not hasattr(self.other, "wants") or self.other.wants(layer, num_layers)


@dataclasses.dataclass
class Like(Obeying):
    """In each layer, head and picture as many tokens as another rule keeps, but others: at random, or shared."""

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
    """No way to save anything, but to learn why: a dropped token keeps its key and loses its value.

    So every head still divides its attention as the unpruned model does, and what it gave to dropped tokens reads
    nothing. If this answers right where dropping does not, not the lost values did the harm but the attention that went
    to other tokens instead.
    """

    other: object
    only_values = True

    def __call__(self, layer, scores, layout):
        return self.other(layer, scores, layout)
