"""SparseVLM (arXiv 2410.04417, ICML 2025; Gumpest/SparseVLMs @26a5f48): words that resemble a picture rate its tokens.

As in the code, a word is a token of the text after the picture; here, after the last one. If no text follows, the last
token rates. Different: the lists of version 1.5 are fractions of each picture's tokens, and the layers 2, 6 and 15 of
32 scale with the depth. Tokens keep their positions (versions 1 renumber them in the middle of the model, so that a
token has several). A centre stays at the place of its own token (the code appends all of them to the kept ones). Of
equal densities, the better rated token is the denser (the code adds noise). Left out: the count from the rank of the
attention (version 1), and its division by a prior that depends on positions alone (version 2).
"""

from dataclasses import dataclass

import torch

from .budget import best, budget

OF_32 = 2, 6, 15  # the code's layers, counted from 0


@dataclass(frozen=True, kw_only=True)
class SparseVLM:
    """After three layers, the vision tokens to which words about the picture attend least are removed (2410.04417).

    These words are the tokens after the last picture whose embeddings are more like the pictures' than their mean.
    Because hidden states are dropped too, prefill gets cheaper, and the first new token may already differ. retention
    multiplies all ratios by one number, so that this fraction of the vision tokens is kept in the mean of all layers.

    after: layers after which tokens are removed, ascending, from 0; null for 2, 6 and 15 of 32, scaled to the depth
    ratios: fraction of a picture's tokens that remains after each of these layers (above 0 and up to 1, descending)
    recycle: cluster the best 30 % of the removed tokens; a tenth of them stay as the means of clusters (true or false)
    heads: rank by this many query heads, those with the most attention to pictures; null for all (1 or more)
    """

    retention: float | None = None
    after: list | None = None
    ratios: list = (0.5208, 0.3472, 0.191)  # of 576 tokens 300, 200 and 110
    recycle: bool = False
    heads: int | None = None
    scope: str = "image"

    def __post_init__(self):
        after, ratios = list(OF_32 if self.after is None else self.after), list(self.ratios)
        if any(type(layer) is not int or layer < 0 for layer in after) or after != sorted({*after}):
            raise ValueError(f"after is {self.after!r}; give a list of layers from 0, ascending")
        if (
            not all(type(ratio) in (int, float) and 0 < ratio <= 1 for ratio in ratios)
            or ratios != sorted(ratios)[::-1]
        ):
            raise ValueError(f"ratios is {self.ratios!r}; give a list of numbers above 0 and up to 1, descending")
        if not ratios or len(after) != len(ratios):
            raise ValueError(f"after has {len(after)} layers and ratios {len(ratios)} numbers; give one for each")
        if self.heads is not None and (type(self.heads) is not int or self.heads < 1):
            raise ValueError(f"heads is {self.heads!r}; give a whole number of 1 or more")

    def check(self, num_layers, kv_heads):
        """ValueError if a layer of `after` has none behind it."""
        last = num_layers - 2
        if self.after is not None and self.after[-1] > last:
            raise ValueError(f"after names layer {self.after[-1]} of {num_layers}; give layers up to {last}")

    def depths(self, num_layers):
        """The layer after which each of the ratios is reached."""
        return [(2 * i * num_layers + 32) // 64 for i in OF_32] if self.after is None else self.after

    def narrow(self, view):
        """-> the tokens that remain after this layer, (T,) bool, or with `recycle` owners (T,) int64; None for all."""
        if view.layer not in self.depths(view.num_layers):
            return None
        scores = self.scores(view)
        owner = torch.arange(view.tokens, device=view.device)
        for part, whole in pictures(view, self.scope):
            order = part[scores[part].sort(descending=True, stable=True).indices]
            rest = order[self.counts(whole, view.num_layers)[view.layer] :]
            owner[rest] = -1
            if self.recycle and len(rest):
                pool, clusters = recycled(len(rest))
                owner[rest[:pool]] = rest[centres(view.hidden[rest[:pool]], clusters)]
        return owner if self.recycle else owner >= 0

    def scores(self, view):
        """(T,) fp32: the attention of the rating words, averaged over them and over the heads."""
        attention = view.attention(raters(view))  # (Hq, T)
        if attention.isnan().any():
            raise ValueError(f"the attention of layer {view.layer} holds NaN, which has no rank; try fp32 or bf16")
        if self.heads is not None:
            attention = attention[best(attention[:, ~view.text].sum(1)[None], self.heads)[0]]
        return attention.mean(0)

    def counts(self, whole, num_layers):
        """{layer: tokens of a picture of `whole` that remain after it, without the centres}."""

        def scaled(factor):
            return {
                layer: budget(whole, min(1.0, factor * ratio))
                for layer, ratio in zip(self.depths(num_layers), self.ratios, strict=True)  # of equal layers the last
            }

        if self.retention is None:
            return scaled(1.0)
        low, high = 0.0, 1 / self.ratios[-1]  # bisection for the largest factor that keeps no more than wanted
        for _ in range(40):
            middle = (low + high) / 2
            fits = self.held(scaled(middle), whole, num_layers) <= self.retention * whole * num_layers
            low, high = (middle, high) if fits else (low, middle)
        return scaled(low)

    def held(self, counts, whole, num_layers):
        """Tokens of a picture of `whole` that all layers hold together."""
        total = 0
        for layer in range(num_layers):
            total += whole
            rest = max(0, whole - counts.get(layer, whole))
            whole -= rest - (recycled(rest)[1] if self.recycle and rest else 0)
        return total


def pictures(view, scope):
    """[(indices (n,) of a picture's tokens, their number in the prompt)]; with scope "vision" of all pictures."""
    parts = [torch.arange(*span, device=view.device) for span in view.spans]
    wholes = [stop - start for start, stop in view.whole_spans]
    return [(torch.cat(parts), sum(wholes))] if scope == "vision" else list(zip(parts, wholes, strict=True))


def raters(view):
    """-> (R,) int64, the rows of the rating words: those that are more than the mean like the pictures.

    The likeness of a word is the mean over vision tokens v of softmax over words of v . word, of the embeddings that
    the language model got. It is that of the whole prompt in every layer, whatever has left it.
    """
    words = view.embeddings[view.whole_spans[-1][1] :].float()
    if not len(words):
        return torch.tensor([view.tokens - 1], device=view.device)
    vision = torch.cat([view.embeddings[a:b] for a, b in view.whole_spans]).float()
    like = (vision @ words.T).softmax(-1).mean(0)
    chosen = like > like.mean()
    chosen = chosen if chosen.any() else ~chosen  # all are alike, or there is one word
    return view.tokens - len(words) + chosen.nonzero()[:, 0]


def recycled(rest):
    """Of `rest` removed tokens, 1 or more: how many are clustered, and the number of clusters."""
    pool = rest * 3 // 10 + 1
    return pool, pool // 10 + 1


def centres(x, count):
    """x (m, C), in the order of their scores -> (m,) int64, the centre of the cluster of each: one of `count` tokens.

    Density peaks (Rodriguez and Laio 2014) by k nearest neighbours, k = count as in the code: the density of a token is
    exp(- mean squared distance to its k nearest, itself included); its score is the density times the distance to the
    nearest denser token. The best are centres; every other token joins the nearest of them.
    """
    x = x.float() / x.shape[1] ** 0.5
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # 0 to itself, and symmetric
    density = apart.topk(count, largest=False).values.square().mean(1).neg().exp()
    rank = density.sort(descending=True, stable=True).indices.argsort()
    far = apart.masked_fill(rank >= rank[:, None], apart.max()).amin(1)
    peaks = (far * density).sort(descending=True, stable=True).indices[:count]
    nearest = peaks[apart[:, peaks].sort(stable=True).indices[:, 0]]
    nearest[peaks] = peaks
    return nearest
