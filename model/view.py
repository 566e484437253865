"""What a pruning method sees of a prompt and a layer, and how its choice is applied during the prefill."""

import time
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import torch
import torch.nn.functional as F

from kernels import window_scores

from .config import InputError
from .layout import cells
from .looking import looking_attention, looking_mlp
from .share import WHOLE, checksum, gather_alike

ROWS = 64  # rows of the prompt whose attention is computed together


class View:
    """One layer of a prompt. Attention is computed when a method first asks for it, then cached. All tensors are
    copies: a method may write into them without changing the model or a later measurement.

    layer, num_layers   index of the layer, from 0; L
    q_heads, kv_heads   Hq, Hkv
    tokens, device      T, number of tokens in this layer; device of all tensors, except those on the CPU
    spans               [(start, stop)] of each picture among the T tokens
    whole_spans         [(start, stop)] of each picture in the prompt, before any narrowing
    parts, whole_parts  as spans and whole_spans, of the parts of a picture: the whole picture, and the map of its tiles
    counts              number of tokens of each picture before a stage `pick` or `merge`
    attended            (T,) bool: the tokens that took part in this layer's attention (stage `attend`), or None: all
    protected           (T,) bool: vision tokens that the stage `protect` keeps in all layers, or None
    places              per picture (n, 2) int64 on the CPU: row and column of its tokens (`model.layout.Layout.places`)
    """

    def __init__(
        self, layer, num_layers, q, k, v, spans, places=None, contrast=None, ahead=0, backend="auto",
        protected=None, x=None, upcoming=None, embeddings=None, origin=None, whole_spans=None, attended=None,
        counts=None, sides=None, whole_parts=None, share=WHOLE,
    ):  # fmt: skip
        """q (1, Hq, W + ahead, D): the prompt's last W rows, then the look-ahead rows; k, v (1, Hkv, T + ahead, D).

        places: None if the spans are text; each span is then a row. contrast: function that `contrast` calls.
        x (1, T + ahead, C) and upcoming: the layer's output, and the function for q and k of the next layer, see
        `Llama.prefill`. embeddings (T', C): of the whole prompt. These three, if not None, can be asked for.
        origin, whole_spans, counts, whole_parts: None if no token has been dropped. sides: see `Pruning`. share: q, k
        and v are of its heads only; what the view answers is of all heads.
        """
        self.layer, self.num_layers, self.spans = layer, num_layers, spans
        self.q_heads, self.kv_heads = share.ranks * q.shape[1], share.ranks * k.shape[1]
        self.tokens, self._share = k.shape[2] - ahead, share
        places = [cells(1, stop - start) for start, stop in spans] if places is None else places
        self.places, self.device = [place.clone() for place in places], k.device
        self._q, self._k, self._v = q[0], k[0], v[0]
        self._contrast, self._ahead, self._backend = contrast, ahead, backend
        self._x, self._upcoming, self._embeddings = x, upcoming, embeddings
        self._origin = origin
        self.whole_spans = list(spans if whole_spans is None else whole_spans)
        self.counts = [stop - start for start, stop in self.whole_spans] if counts is None else list(counts)
        self.parts = parts_of(spans, self.places, sides or [None] * len(spans))
        self.whole_parts = list(self.parts if whole_parts is None else whole_parts)
        self.protected = None if protected is None else protected.clone()
        self.attended = None if attended is None else attended.clone()
        self._attention = {}

    @cached_property
    def keys(self):
        """(Hkv, T, D), rotated by RoPE."""
        return self._share.gather(self._k[:, : self.tokens]).clone()

    @cached_property
    def values(self):
        """(Hkv, T, D)."""
        return self._share.gather(self._v[:, : self.tokens]).clone()

    @cached_property
    def origin(self):
        """(T,) int64: index in the prompt of each of the T tokens."""
        return torch.arange(self.tokens, device=self.device) if self._origin is None else self._origin.clone()

    @cached_property
    def hidden(self):
        """(T, C): the layer's output. ValueError before the layer's attention."""
        return _known(self._x, "hidden states", "ask in keep or narrow")[0, : self.tokens].clone()

    @cached_property
    def embeddings(self):
        """(T', C): the embedded tokens of the whole prompt, as the first layer got them; `embeddings[origin]` are those
        of the T tokens. ValueError if they are not known."""
        return _known(self._embeddings, "embeddings", "give them to the Pruning").clone()

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
        return self._share.gather(self._last_queries(rows)).clone()

    def _last_queries(self, rows):
        """`queries` of this process's heads, not copied."""
        rows = max(1, min(rows, self.tokens - self.spans[-1][1]))
        end = self._q.shape[1] - self._ahead
        return self._q[:, end - rows : end]

    def attention(self, rows=1, query="last"):
        """(Hq, T) fp32: attention of each query head to each token, averaged over the rows of `queries(rows)`.

        rows: their number, or the indices of other rows among the T tokens, (R,) int64. query: "lookahead" for the
        look-ahead rows instead (`model.lookahead`); only for a method whose setting `query` has this value. ValueError
        if they were not computed, and for other values.
        """
        if isinstance(rows, torch.Tensor):
            return self._share.gather(self._attention_of(rows))
        if query not in ("last", "lookahead") or type(rows) is not int or rows < 1:
            raise ValueError(
                f'attention(rows={rows!r}, query={query!r}); give rows of 1 or more, "last" or "lookahead"'
            )
        ahead = query == "lookahead"
        if ahead and not self._ahead:
            raise ValueError('there are no look-ahead rows; the method needs a setting query="lookahead"')
        q, k = (self._q[:, -self._ahead :], self._k) if ahead else (self._last_queries(rows), self._k[:, : self.tokens])
        asked = query, q.shape[1]
        if asked not in self._attention:
            scores = window_scores(q, k, group="none", backend=self._backend)
            scores = scores[:, : self.tokens]  # without the attention to look-ahead rows
            self._attention[asked] = self._share.gather(scores)
        return self._attention[asked].clone()

    def _attention_of(self, rows):
        """(Hq of this process, T) fp32: attention averaged over the rows (R,)."""
        q, rows = self._queries_of(rows)
        return window_scores(q, self._k[:, : self.tokens], q_pos=rows, group="none", backend=self._backend)

    def row_attention(self, rows):
        """(R, T) fp32: attention of each of the rows (R,), int64 indices, to each token, averaged over all heads."""
        q, rows = self._queries_of(rows)
        future = torch.arange(self.tokens, device=self.device) > rows[:, None]
        total = torch.zeros(len(rows), self.tokens, device=self.device)
        for of_group, keys in zip(q.unflatten(0, (len(self._k), -1)), self._k[:, : self.tokens], strict=True):
            scores = of_group.float() @ keys.float().T * q.shape[-1] ** -0.5  # (G, R, T)
            total += scores.masked_fill_(future, float("-inf")).softmax(-1).sum(0)
        return self._share.total(total) / self.q_heads

    def next_attention(self, rows=1):
        """(Hq, T) fp32: attention in the next layer, averaged over the prompt's last rows, if no token were dropped.
        ValueError in the last layer."""
        rows = max(1, min(rows, self.tokens - self.spans[-1][1]))
        upcoming = _known(self._upcoming, "next layer", "ask in an earlier layer")
        q, k = upcoming(slice(self.tokens - rows, self.tokens))
        return self._share.gather(window_scores(q[0], k[0, :, : self.tokens], group="none", backend=self._backend))

    @cached_property
    def sums(self):
        """(Hq, T) fp32: the attention that each token gets from all rows of the prompt together. In blocks of rows, so
        that no T x T matrix is stored; it takes as long as about two more attentions of the layer."""
        total = torch.zeros(len(self._q), self.tokens, device=self.device)
        for rows in torch.arange(self.tokens, device=self.device).split(ROWS):
            total += self._attention_of(rows) * len(rows)
        return self._share.gather(total)

    def _queries_of(self, rows):
        """-> q (Hq of this process, R, D) of the rows (R,), and the rows on the queries' device. ValueError if
        they are not known."""
        first = self.tokens - (self._q.shape[1] - self._ahead)  # earlier rows are not stored
        rows = rows.to(self.device)
        indices = rows.ndim == 1 and rows.dtype == torch.int64 and len(rows) > 0
        if not indices or rows.min() < first or rows.max() >= self.tokens:
            raise ValueError(
                f"rows are {rows.dtype} {tuple(rows.shape)}; give int64 indices (R,) from {first} to {self.tokens - 1}"
            )
        return self._q[:, rows - first], rows

    def value_norms(self):
        """(Hkv, T) fp32: the L1 norm of each token's value vector."""
        return self._share.gather(self._v[:, : self.tokens].float().norm(1, dim=-1))

    def contrast(self):
        """Per picture (n,) fp32 on the CPU: how far each token's pixels are from the picture's usual colour
        (`model.layout.Layout.contrast`). ValueError if the pixels are not known."""
        if self._contrast is None:
            raise ValueError("the method needs the pictures' pixels, and there are none here; use grid or random")
        return [far.clone() for far in self._contrast()]


def parts_of(spans, places, sides):
    """[(start, stop)] of the parts of pictures, in order: of a picture with tiles two, even if one is empty.

    Arguments as in `Pruning`, one entry per picture.
    """
    parts = []
    for (start, stop), own, side in zip(spans, places, sides, strict=True):
        first = start + int((own[:, 0] < side).sum()) if side is not None else stop
        parts += [(start, first)] if side is None else [(start, first), (first, stop)]
    return parts


def pruned_prefill(language, x, cache, pruning, lookahead=None, positions=None, following=None):
    """`Llama.prefill` of embedded tokens x (T, C) with all stages of a `Pruning`, or without pruning if it is None."""
    inside = pruning and pruning.inside
    hidden = language.prefill(
        x[None], cache, positions, prune=pruning, lookahead=lookahead, following=following, inside=inside
    )
    for layer, keep in pruning.compact() if pruning else ():
        cache.drop(layer, keep)
    if pruning and pruning.sums:
        places = torch.arange(len(x), device=x.device) if positions is None else positions
        own = pruning.share.own
        held = [
            (scores[mask], places.expand_as(mask)[mask])
            for scores, mask in zip(map(own, pruning.sums), map(own, pruning.masks), strict=True)
        ]
        cache.watch(*zip(*held, strict=True), pruning.method.newest, pruning.method.extra_tokens)
    return hidden


@dataclass(frozen=True)
class Prefilled:
    """What the stage `compact` sees after the prefill. All tensors are copies.

    spans       [(start, stop)] of each picture among the T tokens of the prompt
    kept        per layer (Hkv, T) bool: the tokens that each head holds
    protected   (T,) bool: vision tokens that the stage `protect` keeps in all layers, or None
    guarded     per layer (Hkv, T) bool: the tokens that no method may drop: text, and those that its settings protect
    """

    spans: list
    kept: list
    protected: torch.Tensor | None
    guarded: list

    @property
    def tokens(self):
        return self.kept[0].shape[1]

    @property
    def kv_heads(self):
        return self.kept[0].shape[0]


class Pruning:
    """A method applied to each layer of one prefill.

    method    a `model.pruning.Method`: calls the stages of a rule such as `Plphp`, and always keeps text
    seconds   time spent on measuring and choosing; see `timed` in Generation
    chosen    with several processes: the `checksum` of all that the method chose
    sums      if the method evicts: per layer (Hkv, tokens of the whole prompt) fp32, its scores of the tokens
    guarded   if the method compacts: per layer (Hkv, tokens of the whole prompt) bool, what no head may drop
    masks     with `remember`, or if the method compacts or evicts: per layer (Hkv, tokens of the whole prompt) bool,
              what each head keeps
    """

    def __init__(
        self, method, num_layers, spans, places=None, contrast=None, ahead=0, backend="auto", timed=False,
        remember=False, protected=None, embeddings=None, counts=None, sides=None, share=WHOLE,
    ):  # fmt: skip
        """ahead: number of look-ahead rows, which follow the prompt's rows in q, k and v; the rest as in `View`.

        sides: for each picture the row of its places where the map of its tiles begins, None if it has none; None if no
        picture has any. share: this process's heads; the method chooses for all heads, in all processes alike.
        """
        self.share, self.chosen = share, 0
        self.method, self.num_layers, self.ahead, self.backend = method, num_layers, ahead, backend
        self.spans, self.places, self.contrast = spans, places, contrast and cache(contrast)
        self.timed, self.seconds, self.sums, self.guarded = timed, 0.0, [], []
        self.masks = [] if remember or method.compacts or method.evicts else None
        self.protected = self.protected_whole = protected  # (T,) bool or None
        self.seen = None  # (T,) indices in the prompt of the tokens that the current layer sees; None: all
        self.embeddings, self.whole_spans, self.counts = embeddings, list(spans), counts
        self.sides = sides or [None] * len(spans)
        self.whole_parts = None  # [(start, stop)] in the prompt, known from the first view on
        self.looking = None  # what vision tokens and heads may look at in the current layer; None: everything
        self.attended = None  # (T,) bool: the tokens that take part in the current layer's attention; None: all

    def inside(self, layer):
        """-> functions `attend` and `mlp` that replace those of a layer, or None; see `Llama.prefill`."""
        self.attended = self.looking = None
        if not (self.spans and self.method.attends):
            return None, None
        return partial(self._attend, layer), None if self.ahead else self._mlp

    def _attend(self, layer, q, k, v):
        """The layer's attention among the tokens that the method's stage `attend` chooses -> (1, Hq, T, D)."""
        start = clock(k.device, self.timed)
        chosen = self._asked(lambda: self.method.attend(self._view(layer, q, k, v)))
        self.seconds += clock(k.device, self.timed) - start
        if not isinstance(chosen, torch.Tensor | None):
            return self._look(q, k, v, chosen)
        self.attended = chosen
        tokens = self.attended if self.attended is None else F.pad(self.attended, (0, self.ahead), value=True)
        return attention_among(q, k, v, tokens)

    def _look(self, q, k, v, looking):
        """The layer's attention if the method returned a `model.pruning.Looking` -> (1, Hq, T, D)."""
        if self.ahead and looking.neurons < 1:
            raise InputError("look-ahead rows need the whole MLP; use query=last, or neurons=1")
        if self.share.ranks > 1 and looking.neurons < 1:
            raise InputError("several processes share the MLP, so all need all of it; use neurons=1")
        self.looking = looking = replace(looking, heads=self.share.own(looking.heads))
        places = self.places or [cells(1, stop - start) for start, stop in self.spans]
        return looking_attention(q, k, v, looking, self.spans, places, self.sides)

    def _mlp(self, module, x):
        """The layer's MLP, after its attention."""
        if self.looking is None or self.looking.neurons == 1:
            return module(x)
        return looking_mlp(module, x, self.looking.neurons, self.spans)

    def __call__(self, layer, q, k, v, x=None, upcoming=None):
        """q (1, Hq, T + ahead, D); k, v (1, Hkv, T + ahead, D) of a layer; q may have only the last rows.

        x, upcoming: see `View`; tokens that the method merges are averaged in x.
        -> keep (Hkv, T) bool, the tokens that each of these heads keeps, and go_on (T',), ascending indices of the
        tokens that later layers process. Either may be None: all. InputError if the method raises ValueError.
        """
        keep = stay = None
        if self.spans:
            start = clock(k.device, self.timed)
            view = self._view(layer, q, k, v, x, upcoming)
            keep, stay = self._asked(lambda: (self.method.keep(view), self.method.narrow(view)))
            if self.method.evicts:
                self.sums.append(self._whole(self._asked(lambda: self.method.evict(view))))
            if self.method.compacts:
                self.guarded.append(self._whole(self._asked(lambda: self.method.guarded(view))))
            if stay is not None and stay.dtype == torch.int64:
                merge(x[0], stay)
                stay = stay == torch.arange(len(stay), device=stay.device)
            self.seconds += clock(k.device, self.timed) - start
        if self.masks is not None:
            self._record(k, keep)
        return keep if keep is None else self.share.own(keep), None if stay is None else self._narrow(stay)

    def _view(self, layer, q, k, v, x=None, upcoming=None):
        view = View(
            layer, self.num_layers, q, k, v, self.spans, self.places, self.contrast, self.ahead, self.backend,
            self.protected, x, upcoming, self.embeddings, self.seen, self.whole_spans, self.attended,
            self.counts, self.sides, self.whole_parts, self.share,
        )  # fmt: skip
        self.whole_parts = view.whole_parts
        return view

    def _asked(self, ask):
        """What the method answers; its ValueError as an InputError."""
        try:
            answer = ask()
        except ValueError as wrong:
            raise InputError(str(wrong)) from wrong
        self.note(*(answer if isinstance(answer, tuple) else [getattr(answer, "heads", answer)]))
        return answer

    def note(self, *chosen):
        """Add tensors of bool or int64 that the method chose to `chosen`; others are left out."""
        if self.share.ranks > 1:
            chosen = [t for t in chosen if isinstance(t, torch.Tensor) and not t.is_floating_point()]
            self.chosen = checksum(self.chosen, chosen)

    def _record(self, k, keep):
        """Note what each head keeps of the prompt's tokens, (Hkv, tokens of the prompt) bool."""
        shape = self.share.ranks * k.shape[1], k.shape[2] - self.ahead
        self.masks.append(self._whole(k.new_ones(shape, dtype=torch.bool) if keep is None else keep))

    def _whole(self, here):
        """here (Hkv, T) of the tokens that the current layer sees -> of the prompt's tokens, 0 for the others."""
        if self.seen is None:
            return here
        return here.new_zeros(self.masks[0].shape).index_copy_(1, self.seen, here)

    def compact(self):
        """After the prefill: yield (layer, keep), where keep (number of tokens that its heads hold together,) bool
        chooses those that they go on holding, head after head. Corrects `masks`. InputError as above."""
        if not (self.whole_spans and self.method.compacts):
            return
        device = self.masks[0].device
        start = clock(device, self.timed)
        kept = [mask.clone() for mask in self.masks]
        prefilled = Prefilled(self.whole_spans, kept, self.protected_whole, self.guarded)
        for layer, keep in enumerate(self._asked(lambda: self.method.compact(prefilled))):
            self.note(keep)
            if keep is not None and not keep[self.masks[layer]].all():
                yield layer, self.share.own(keep)[self.share.own(self.masks[layer])]
                self.masks[layer] &= keep
        self.seconds += clock(device, self.timed) - start  # with what the caller did in between

    def _narrow(self, stay):
        """Later layers see only the tokens where stay (T,) is True -> their indices (T',)."""
        if "::" in self.method.name:  # one of a user's own; before collectives of other sizes
            gather_alike(self.share, stay.new_zeros(1, 0, dtype=torch.int32), self.chosen)
        go_on = stay.nonzero()[:, 0]
        self.protected = None if self.protected is None else self.protected[go_on]
        self.seen = go_on if self.seen is None else self.seen[go_on]
        new, spans, contrast, stay = [0, *stay.cumsum(0).tolist()], self.spans, self.contrast, stay.cpu()

        def thinned(pictures):
            return [of_one[stay[a:b]] for of_one, (a, b) in zip(pictures, spans, strict=True)]

        self.spans = [(new[a], new[b]) for a, b in spans]  # new: from an index before to that after
        self.places = self.places and thinned(self.places)
        self.contrast = contrast and cache(lambda: thinned(contrast()))
        return go_on


def _known(value, what, cure):
    """The value; ValueError if it is None."""
    if value is None:
        raise ValueError(f"the {what} are not known here; {cure}")
    return value


def merge(x, owner):
    """Average tokens of x (T + ahead, C) in place into those that own them. owner (T,) int64: a token's own index if it
    stays, the index of the token into which it is averaged, or -1 if it is dropped."""
    count = torch.bincount(owner[owner >= 0], minlength=len(owner))
    at = (count > 1).nonzero()[:, 0]  # the bits of all others stay as they are
    total = (owner == at[:, None]).float() @ x[: len(owner)].float()  # index_add_ has no fixed order on a GPU
    x[at] = (total / count[at, None]).to(x.dtype)


def attention_among(q, k, v, tokens):
    """Causal attention among some of the tokens, (T,) bool, or all if None: q (1, Hq, T, D), k, v (1, Hkv, T, D) ->
    (1, Hq, T, D), 0 for the rows of the others."""
    shared = q.shape[1] != k.shape[1]
    if tokens is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    at = tokens.nonzero()[:, 0]
    y = F.scaled_dot_product_attention(*(t[:, :, at] for t in (q, k, v)), is_causal=True, enable_gqa=shared)
    return torch.zeros_like(q).index_copy_(2, at, y)


def clock(device, wait):
    """The time in seconds. wait: first synchronise a CUDA device, so that the time includes its work."""
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
