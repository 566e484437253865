"""What a pruning method sees of a prompt and a layer, and how its choice is applied during the prefill."""

import time
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kernels import window_scores

from .config import InputError


@dataclass(frozen=True)
class Layout:
    """What a pruning method receives besides the scores: the prompt's layout and, if it asks for them, layer values."""

    num_layers: int  # L
    q_heads: int  # Hq
    kv_heads: int  # Hkv
    tokens: int  # T, with each picture as its vision tokens
    spans: list[tuple[int, int]]  # [(start, stop)] of each picture among the T tokens
    device: torch.device
    attended: torch.Tensor | None = None  # (Hkv, T) fp32, attention of the last 32 rows, if `sink_keys` is set
    last: torch.Tensor | None = None  # (Hq, T) fp32, attention of the last row alone, for rules with `wants_last_row`
    norms: torch.Tensor | None = None  # (Hkv, T) fp32, L1 norms of the layer's values, if `values` is set
    places: list[torch.Tensor] | None = (
        None  # per picture (n, 2): row and column of its tokens (`model.view.places_of`), on the CPU
    )
    contrast: list[torch.Tensor] | None = (
        None  # per picture (n,) fp32 (`model.view.contrast_of`), for rules with `wants_contrast`
    )

    @cached_property
    def text(self) -> torch.Tensor:
        """(T,) bool: True for tokens outside pictures."""
        mask = torch.ones(self.tokens, dtype=torch.bool, device=self.device)
        for start, stop in self.spans:
            mask[start:stop] = False
        return mask


class Pruner:
    """Applies a pruning method to the layers of one prefill: scores from a layer's q and k -> tokens that are kept.

    text      per layer, number of text tokens that it saw; they are always kept
    layout    the prompt as the current layer sees it
    seconds   time spent on scoring and choosing; see `timed` in Generation
    masks     with `remember`: (Hkv, T) bool per layer, the tokens of the whole prompt that each head keeps
    """

    def __init__(self, method, layout, backend="auto", timed=False, ahead=0, remember=False):
        """ahead: number of look-ahead rows, which follow the prompt's rows in q, k and v."""
        self.method, self.layout, self.backend, self.timed, self.ahead = method, layout, backend, timed, ahead
        self.text, self.seconds = [], 0.0
        self.masks = [] if remember else None
        self.tokens = layout.tokens  # in the whole prompt
        self.rows = torch.arange(layout.tokens, device=layout.device)  # indices of those that the current layer sees

    def choose(self, layer, q, k, v):
        """Which of the T prompt tokens each head keeps: (Hkv, T) bool, or None for all.

        q (1, Hq, T + ahead, D); k, v (1, Hkv, T + ahead, D).
        """
        keep = None
        if self.layout.spans and self.method.wants(layer, self.layout.num_layers):
            start = clock(k.device, self.timed)
            layout = self._guarded(q, k)
            if self.method.settings.get("values"):
                layout = replace(layout, norms=v[0, :, : layout.tokens].float().norm(1, dim=-1))
            if getattr(self.method.rule, "wants_last_row", False):
                layout = replace(layout, last=self._scores(q, k, 1))
            keep = self._heed(self.method.choose, layer, self._ranking(q, k), layout)
            self.seconds += clock(k.device, self.timed) - start
        self.text.append(self.layout.tokens - sum(b - a for a, b in self.layout.spans))
        if self.masks is not None:
            self.masks.append(self._of_the_prompt(keep))
        return keep

    def _of_the_prompt(self, keep):
        """keep (Hkv, tokens that the layer sees) or None for all -> (Hkv, T) bool over the whole prompt."""
        mask = torch.zeros(self.layout.kv_heads, self.tokens, dtype=torch.bool, device=self.rows.device)
        mask[:, self.rows] = True if keep is None else keep
        return mask

    def kept(self, cache):
        """Vision tokens kept per KV head in the prompt's cache: a float per layer, averaged over its heads."""
        return [n - text for n, text in zip(cache.kv_len.double().mean(1).tolist(), self.text, strict=True)]

    def narrow(self, layer, q, k, v):
        """The tokens that later layers process: ascending indices (T',), or None for all. q, k, v: as in `choose`."""
        if not self.layout.spans or self.method.layer != layer + 1:
            return None
        start = clock(k.device, self.timed)
        keep = self._heed(self.method.narrow, self._ranking(q, k), self._guarded(q, k))
        rows = keep.nonzero()[:, 0]
        self.rows = self.rows[rows]
        before = [0, *keep.cumsum(0).tolist()]
        spans, left = self.layout.spans, keep.cpu()

        def thinned(views):
            return views and [view[left[a:b]] for view, (a, b) in zip(views, spans, strict=True)]

        self.layout = replace(
            self.layout, tokens=len(rows), spans=[(before[a], before[b]) for a, b in spans],
            places=thinned(self.layout.places), contrast=thinned(self.layout.contrast),
        )  # fmt: skip
        self.seconds += clock(k.device, self.timed) - start
        return rows

    def _guarded(self, q, k):
        """The layout, with `attended` filled in if the setting `sink_keys` is not 0."""
        if not self.method.settings.get("sink_keys"):
            return self.layout
        attended = self._scores(q, k, 32).view(self.layout.kv_heads, -1, self.layout.tokens).mean(1)
        return replace(self.layout, attended=attended)

    def _ranking(self, q, k):
        """What the method ranks by, (Hq, T) fp32, or None."""
        return self._ahead(q, k) if self.method.looks_ahead else self._scores(q, k, self.method.window)

    def _scores(self, q, k, window):
        """(Hq, T) fp32: mean attention of the last `window` rows that follow the last picture. None if window is 0."""
        behind = self.layout.tokens - self.layout.spans[-1][1]
        rows = min(window, max(1, behind))
        if not rows:
            return None
        end = q.shape[2] - self.ahead
        asking, keys = q[0, :, end - rows : end], k[0, :, : self.layout.tokens]
        return window_scores(asking, keys, group="none", backend=self.backend)

    def _ahead(self, q, k):
        """(Hq, T) fp32: attention of the look-ahead rows to the prompt, averaged over them."""
        scores = window_scores(q[0, :, -self.ahead :], k[0], group="none", backend=self.backend)
        return scores[:, : self.layout.tokens]

    def _heed(self, ask, *arguments):
        """Call a function of the method; the ValueError for what it returned becomes an InputError."""
        try:
            return ask(*arguments)
        except ValueError as wrong:
            raise InputError(str(wrong)) from wrong


def clock(device, wait):
    """The time in seconds. wait: first synchronise a CUDA device, so that the time includes its work."""
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def places_of(side, tokens, cut=None):
    """(n, 2) int64 on the CPU: row and column of each of a picture's n tokens, in the model's order.

    side: tokens per side of a square; tokens: n; cut: for LLaVA-NeXT, `kept_of_tiles`: that part of the joined tiles
    is placed below the square of the whole picture and has a newline after each row's last column. A CLS token is
    placed above the square.
    """
    square = _cells(side, side)
    if cut is not None:
        rows, columns = (part.stop - part.start for part in cut)
        return torch.cat((square, _cells(rows, columns + 1) + square.new_tensor([side, 0])))
    return torch.cat((square.new_tensor([[-1, 0]] * (tokens - len(square))).view(-1, 2), square))


def _cells(rows, columns):
    """(rows * columns, 2) int64 on the CPU: row and column of each cell of a table, row by row."""
    return torch.cartesian_prod(torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu"))


def contrast_of(squares, side, tokens, cut=None, grid=None):
    """(n,) fp32: distance of the pixels of each of a picture's n tokens from the picture's usual colour.

    squares (1 + tiles, 3, S, S) fp32: its pixel values; side, tokens, cut: as in `places_of`; grid: (rows, columns) of
    tiles. The usual colour is the median over the patches' means. The distance is the root mean square over a patch's
    pixels; it is 0 for tokens without pixels (newlines and CLS).
    """
    patch = squares.shape[-1] // side
    pixels = squares[..., : side * patch, : side * patch].unflatten(-1, (side, patch)).unflatten(-3, (side, patch))
    usual = pixels[0].mean((-3, -1)).flatten(1).median(1).values  # (3,)
    far = (pixels - usual[:, None, None, None, None]).square().sum(1).mean((-3, -1)).sqrt()  # (1 + tiles, side, side)
    whole = far[0].flatten()
    if grid is None:
        return torch.cat((whole.new_zeros(tokens - len(whole)), whole))
    joined = far[1:].unflatten(0, grid).transpose(1, 2).flatten(2, 3).flatten(0, 1)[cut]
    newlines = joined.new_zeros(len(joined), 1)
    return torch.cat((whole, torch.cat((joined, newlines), 1).flatten()))
