"""What a pruning method sees of a prompt and a layer, and how its choice is applied during the prefill."""

import time
from functools import cache, cached_property

import torch

from kernels import window_scores

from .config import InputError
from .image import cells


class View:
    """One layer of a prompt. Attention is computed when a method first asks for it, then cached. All tensors are
    copies: a method may write into them without changing the model or a later measurement.

    layer, num_layers   index of the layer, from 0; L
    q_heads, kv_heads   Hq, Hkv
    tokens, device      T, number of tokens in this layer; device of all tensors, except those on the CPU
    spans               [(start, stop)] of each picture among the T tokens
    protected           (T,) bool: vision tokens that the stage `protect` keeps in all layers, or None
    places              per picture (n, 2) int64 on the CPU: row and column of its tokens (`model.image.places_of`)
    """

    def __init__(
        self, layer, num_layers, q, k, v, spans, places=None, contrast=None, ahead=0, backend="auto",
        protected=None,
    ):  # fmt: skip
        """q (1, Hq, W + ahead, D): the prompt's last W rows, then the look-ahead rows; k, v (1, Hkv, T + ahead, D).

        places: None if the spans are text; each span is then a row. contrast: function that `contrast` calls.
        """
        self.layer, self.num_layers, self.spans = layer, num_layers, spans
        self.q_heads, self.kv_heads, self.tokens = q.shape[1], k.shape[1], k.shape[2] - ahead
        places = [cells(1, stop - start) for start, stop in spans] if places is None else places
        self.places, self.device = [place.clone() for place in places], k.device
        self._q, self._k, self._v = q[0], k[0], v[0]
        self._contrast, self._ahead, self._backend = contrast, ahead, backend
        self.protected = None if protected is None else protected.clone()
        self._attention = {}

    @cached_property
    def keys(self):
        """(Hkv, T, D), rotated by RoPE."""
        return self._k[:, : self.tokens].clone()

    @cached_property
    def values(self):
        """(Hkv, T, D)."""
        return self._v[:, : self.tokens].clone()

    @property
    def text(self):
        """(T,) bool: True for tokens outside pictures."""
        mask = torch.ones(self.tokens, dtype=torch.bool, device=self.device)
        for start, stop in self.spans:
            mask[start:stop] = False
        return mask

    def queries(self, rows=1):
        """(Hq, rows, D): the queries of the prompt's last rows, rotated by RoPE. Fewer if fewer rows follow the last
        picture, but at least one."""
        rows = max(1, min(rows, self.tokens - self.spans[-1][1]))
        end = self._q.shape[1] - self._ahead
        return self._q[:, end - rows : end].clone()

    def attention(self, rows=1, query="last"):
        """(Hq, T) fp32: attention of each query head to each token, averaged over the rows of `queries(rows)`.

        query: "lookahead" for the look-ahead rows instead (`model.lookahead`); only for a method whose setting `query`
        has this value. ValueError if they were not computed, and for other values.
        """
        if query not in ("last", "lookahead") or type(rows) is not int or rows < 1:
            raise ValueError(
                f'attention(rows={rows!r}, query={query!r}); give rows of 1 or more, "last" or "lookahead"'
            )
        ahead = query == "lookahead"
        if ahead and not self._ahead:
            raise ValueError('there are no look-ahead rows; the method needs a setting query="lookahead"')
        q, k = (self._q[:, -self._ahead :], self._k) if ahead else (self.queries(rows), self._k[:, : self.tokens])
        asked = query, q.shape[1]
        if asked not in self._attention:
            scores = window_scores(q, k, group="none", backend=self._backend)
            self._attention[asked] = scores[:, : self.tokens]  # without the attention to look-ahead rows
        return self._attention[asked].clone()

    def value_norms(self):
        """(Hkv, T) fp32: the L1 norm of each token's value vector."""
        return self._v[:, : self.tokens].float().norm(1, dim=-1)

    def contrast(self):
        """Per picture (n,) fp32 on the CPU: how far each token's pixels are from the picture's usual colour
        (`model.image.contrast_of`). ValueError if the pixels are not known."""
        if self._contrast is None:
            raise ValueError("the method needs the pictures' pixels, and there are none here; use grid or random")
        return [far.clone() for far in self._contrast()]


class Pruning:
    """A method applied to each layer of one prefill.

    method    a `model.pruning.Method`: calls the stages of a rule such as `Plphp`, and always keeps text
    seconds   time spent on measuring and choosing; see `timed` in Generation
    masks     with `remember`: per layer (Hkv, tokens of the whole prompt) bool, what each head keeps
    """

    def __init__(
        self, method, num_layers, spans, places=None, contrast=None, ahead=0, backend="auto", timed=False,
        remember=False, protected=None,
    ):  # fmt: skip
        """ahead: number of look-ahead rows, which follow the prompt's rows in q, k and v; the rest as in `View`."""
        self.method, self.num_layers, self.ahead, self.backend = method, num_layers, ahead, backend
        self.spans, self.places, self.contrast = spans, places, contrast and cache(contrast)
        self.timed, self.seconds, self.masks = timed, 0.0, [] if remember else None
        self.protected = protected  # (T,) bool or None
        self.seen = None  # (T,) indices in the prompt of the tokens that the current layer sees; None: all

    def __call__(self, layer, q, k, v):
        """q (1, Hq, T + ahead, D); k, v (1, Hkv, T + ahead, D) of a layer; q may have only the last rows.

        -> keep (Hkv, T) bool, the tokens that each head keeps, and go_on (T',), ascending indices of the tokens that
        later layers process. Either may be None: all. InputError if the method raises ValueError.
        """
        keep = stay = None
        if self.spans:
            start = clock(k.device, self.timed)
            pictures = self.spans, self.places, self.contrast
            view = View(layer, self.num_layers, q, k, v, *pictures, self.ahead, self.backend, self.protected)
            try:
                keep, stay = self.method.keep(view), self.method.narrow(view)
            except ValueError as wrong:
                raise InputError(str(wrong)) from wrong
            self.seconds += clock(k.device, self.timed) - start
        if self.masks is not None:
            here = k.new_ones(k.shape[1], k.shape[2] - self.ahead, dtype=torch.bool) if keep is None else keep
            whole = here if self.seen is None else torch.zeros_like(self.masks[0]).index_copy_(1, self.seen, here)
            self.masks.append(whole)
        return keep, None if stay is None else self._narrow(stay)

    def _narrow(self, stay):
        """Later layers see only the tokens where stay (T,) is True -> their indices (T',)."""
        go_on = stay.nonzero()[:, 0]
        self.protected = None if self.protected is None else self.protected[go_on]
        self.seen = go_on if self.seen is None else self.seen[go_on]
        moved, spans, stay = [0, *stay.cumsum(0).tolist()], self.spans, stay.cpu()  # moved: old index -> new
        contrast = self.contrast

        def thinned(pictures):
            return [of_one[stay[a:b]] for of_one, (a, b) in zip(pictures, spans, strict=True)]

        self.spans = [(moved[a], moved[b]) for a, b in spans]
        self.places = self.places and thinned(self.places)
        self.contrast = contrast and cache(lambda: thinned(contrast()))
        return go_on


def clock(device, wait):
    """The time in seconds. wait: first synchronise a CUDA device, so that the time includes its work."""
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
