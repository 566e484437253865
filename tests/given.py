"""A layer's view with known attention, for tests of methods."""

import torch

from model.view import View
from tests.seeds import torch_random


class Given(View):
    """A View whose attention is `scores` (Hq, T), whatever rows are asked for."""

    def attention(self, rows=1, query="last"):
        return self.scores

    def _attention_of(self, rows):
        return self.scores


def given_view(
    spans, tokens, q_heads=4, kv_heads=2, num_layers=4, layer=1, scores=None, places=None, contrast=True, sides=None
):
    """Without scores: random ones. contrast: False for none; True for one that only the later half of a picture has;
    or what `View.contrast` returns."""
    q, k = torch.zeros(1, q_heads, 1, 1), torch.zeros(1, kv_heads, tokens, 1)
    contrast = [torch.linspace(0, 1, stop - start) for start, stop in spans] if contrast is True else contrast
    view = Given(layer, num_layers, q, k, k, spans, places, contrast and (lambda: contrast), sides=sides)
    noise = torch.randn(q_heads, tokens, generator=torch_random(0)).softmax(-1)
    view.scores = noise if scores is None else scores
    return view
