"""SparseVLM (arXiv 2410.04417, ICML 2025; Gumpest/SparseVLMs @26a5f48): words that resemble a picture rate its tokens.

As in the code, a word is a token of the text after the picture; here, after the last one. If no text follows, the last
token rates. Different: the lists of version 1.5 are fractions of each picture's tokens, and its layers scale with the
depth. Tokens keep their positions (version 1 renumbers them in the middle of the model, so that one token has several
positions, and the position of a decoded token differs from layer to layer). A centre stays at the place of its own
token (the code appends the centres to the kept tokens). Of equal densities, the better rated token is the denser (the
code adds noise). Several pictures, and query heads that share a KV head, are ours. Left out: the number of tokens from
the rank of the attention (version 1), and its division by a prior that depends on positions alone (version 2).
"""

from dataclasses import dataclass

import torch

from .budget import at_depth, best, budget, check_depths, check_scores, check_stages

AFTER = 2, 6, 15  # the code's layers of 32, counted from 0, after which tokens are removed
RATIOS = 0.5208, 0.3472, 0.191  # of 576 tokens 300, 200 and 110


@dataclass(frozen=True, kw_only=True)
class SparseVLM:
    """At each stage, the vision tokens to which words about the picture attend least are removed (2410.04417).

    These words are the tokens after the last picture that are more like the pictures than their mean, by embeddings.
    Their attention in the layer before the stage, averaged over them and over heads, ranks the tokens. Because hidden
    states are dropped too, prefill gets cheaper, and the first new token may already differ.

    retention: mean over all layers of the fraction to keep: the default ratios times one number, recycled tokens
        included; null: as ratios say (above 0 and up to 1)
    stages: first layer of each stage, below the number of layers; null: 3, 7 and 16 of 32, in proportion for other
        depths (1 or more, ascending)
    ratios: fraction of a picture's tokens to keep from each stage on; null: 0.5208, 0.3472, 0.191
        (above 0 and up to 1, descending)
    recycle: cluster the best 30 % of the removed tokens; a tenth of these stay as means of the clusters (true or false)
    heads: rank by this many query heads, those that attend to pictures most; null: by all (1 or more)
    """

    retention: float | None = None
    stages: list | None = None
    ratios: list | None = None
    recycle: bool = False
    heads: int | None = None
    scope: str = "image"

    def __post_init__(self):
        check_stages(self.stages, self.ratios)
        wanted, given = (len(d if s is None else s) for d, s in ((AFTER, self.stages), (RATIOS, self.ratios)))
        if wanted != given:
            raise ValueError(f"ratios has {given} entries for {wanted} stages; give one for each")
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"heads is {self.heads}; give a whole number of 1 or more")

    def check(self, num_layers, kv_heads):
        """ValueError if the model has no such stage, or if the retention cannot be reached."""
        check_depths(self._stages(num_layers), num_layers, self.retention)

    def narrow(self, view):
        """-> the tokens that remain after this layer, (T,) bool, or with `recycle` owners (T,) int64; None for all."""
        if view.layer + 1 not in self._stages(view.num_layers):
            return None
        scores = self.scores(view)
        owner = torch.arange(view.tokens, device=view.device)
        for part, whole in pictures(view, self.scope):
            order = part[scores[part].sort(descending=True, stable=True).indices]
            rest = order[self.counts(whole, view.num_layers)[view.layer + 1] :]
            owner[rest] = -1
            if self.recycle and len(rest):
                pool, clusters = recycled(len(rest))
                owner[rest[:pool]] = rest[centres(view.hidden[rest[:pool]], clusters)]
        return owner if self.recycle else owner >= 0

    def scores(self, view):
        """(T,) fp32: the attention of the rating words, averaged over them and over the heads."""
        attention = view.attention(raters(view))  # (Hq, T)
        check_scores(attention, view)
        if self.heads is not None:
            attention = attention[best(attention[:, ~view.text].sum(1)[None], self.heads)[0]]
        return attention.mean(0)

    def counts(self, whole, num_layers):
        """{first layer of a stage: tokens to keep from there on of a picture of `whole`, without recycled ones}."""

        ratios = self.ratios or RATIOS

        def scaled(factor):
            counts = [budget(whole, min(1.0, factor * ratio)) for ratio in ratios]
            return dict(zip(self._stages(num_layers), counts, strict=True))  # the last of equal stages

        if self.retention is None:
            return scaled(1.0)
        low, high = 0.0, 1 / ratios[-1]
        while high - low > 1e-9:
            middle = (low + high) / 2
            fits = self.held(scaled(middle), whole, num_layers) <= self.retention * whole * num_layers
            low, high = (middle, high) if fits else (low, middle)
        return scaled(low)

    def held(self, counts, whole, num_layers):
        """Number of tokens of a picture of `whole` that all layers together hold."""
        left, total = whole, 0
        for layer in range(num_layers):
            rest = max(0, left - counts.get(layer, whole))
            left -= rest - (recycled(rest)[1] if self.recycle and rest else 0)
            total += left
        return total

    def _stages(self, num_layers):
        if self.stages is not None:
            return self.stages
        return [min(at_depth(layer, num_layers, first=0) + 1, num_layers - 1) for layer in AFTER]


def pictures(view, scope):
    """[(indices (n,) of a picture's tokens, their number in the prompt)]; of its parts, or of all pictures, as `scope`
    says."""
    spans, whole = (view.parts, view.whole_parts) if scope == "part" else (view.spans, view.whole_spans)
    parts = [torch.arange(*span, device=view.device) for span in spans]
    wholes = [stop - start for start, stop in whole]
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
