"""Ask a loaded checkpoint a question: generate an answer from prompt and pictures, as a stream of text."""

import copy
import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import torch
from PIL import Image

from kernels import window_scores
from kernels.backend import BACKENDS, choose_backend

from .api import Method, PruneLike, choose_method
from .cache import RaggedCache
from .config import InputError, plain_text
from .image import (
    Pictures,
    as_list,
    crop_note,
    kept_of_tiles,
    normalise,
    read_image,
    tile_tokens,
    to_square,
    to_tiles,
    with_mode,
)
from .load import Checkpoint
from .lookahead import FILE as LOOKAHEAD
from .tokenizer import IMAGE, TEMPLATES, Detokenizer, build_prompt
from .view import contrast_of, places_of


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
            raise InputError(f"stop is {_brief(self.stop)}; give a non-empty string or a list of such strings")
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
                raise InputError(f"{name} is {_brief(value)}; give {wanted}")
            if kind is Integral:  # NumPy's integers too
                object.__setattr__(self, name, int(value))


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


class Generation:
    """One answer, while it is generated and afterwards.

    Iterate over it for pieces of text. The constructor checks all input (InputError) before anything is computed. After
    the iteration, complete or not, these fields describe the answer:

    text           the answer
    token_ids      its ids, the stop id excluded
    finish_reason  "stop" | "length" | "interrupted"
    prompt         the question
    prompt_tokens, vision_tokens   number of tokens in the whole prompt, and of its pictures
    images         one dict per picture: path, size (width, height), tiles, tokens
    spans          [(start, stop)] of each picture in the prompt's tokens
    notes          lines about changes to the pictures
    prefilled      tokens that the prefill processed: the prompt, or in a later turn those that were not in the cache
    cache          the RaggedCache
    pruned_for     the question for which tokens were dropped: `prompt`, or that of an earlier turn
    masks          with `remember`, after the prefill: (L, Hkv, T) bool, the tokens that each head keeps
    kept           vision tokens kept per KV head: one number per layer, averaged over its heads
    bytes_held     bytes of the kept keys and values of the prompt
    timing         seconds: vision, prefill, prune (part of prefill), and steps, one entry per decode step (the first
                   token comes from prefill)
    cancelled      set it to True, from a signal handler or another thread, to end the iteration after its next token
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompt: str,
        images: Pictures = (),
        sampling: Sampling | None = None,
        template: str = "auto",
        image_mode: str = "auto",
        system: str | None = None,
        prune: PruneLike = None,
        backend: str = "auto",
        compile: bool = False,
        anyres_order: str = "auto",
        timed: bool = False,
        remember: bool = False,
        before: "Generation | None" = None,
    ) -> None:
        """prompt: the question; images: one picture or a list of them, in the order of their `<image>`.

        template, image_mode, system: as in `Checkpoint.ask`. prune: the pruning method; a name or
        SPEC uses the checkpoint's settings for it; None keeps all tokens. backend: "auto", "triton" or "torch" kernels.
        compile: see `model.fast.FastStep`. anyres_order: "hf" or "orig", see `choose_canvas`. timed: synchronise a CUDA
        device before each clock reading; otherwise all of `timing` except `steps` measures only the launches. remember:
        keep `masks`, for `model.show`.

        before: the Generation whose answer this question follows in a conversation, with its template and image mode.
        `ids`, `images` and the counts then cover the whole conversation; `prompt` is this question. The cache of
        `before` is reused: only the new tokens are processed, and all of them are kept. If it has no cache, the whole
        conversation is prefilled and pruned; set `before.cache = None` to force that.
        """
        images = as_list(images)
        for what, given, kinds, wanted in (
            ("checkpoint", checkpoint, Checkpoint, "what `load` returns"),
            ("prompt", prompt, str, "the question as text"),
            ("sampling", sampling, Sampling | None, "Sampling(max_new_tokens=..., ...)"),
            ("system", system, str | None, "a string or None"),
            ("before", before, Generation | None, "the Generation that this question follows"),
        ):
            if not isinstance(given, kinds):
                raise InputError(f"{what} is {_brief(given)}; give {wanted}")
        self.checkpoint, self.sampling = checkpoint, sampling or Sampling()
        self.prune = choose_method(prune, checkpoint.folder)
        self.backend, self.compile, self.timed, self.remember = backend, compile, timed, remember
        self.template = checkpoint.template if template == "auto" else template
        for what, given, known in (
            ("template", self.template, TEMPLATES),
            ("image mode", image_mode, ("auto", "crop", "pad", "anyres")),
            ("order of tiles", anyres_order, ("auto", "hf", "orig")),
            ("backend", backend, BACKENDS),
        ):
            if given not in known:
                raise InputError(f"{what} {given!r} is unknown; use {', '.join(known)}")
        self.image_settings = with_mode(checkpoint.image_settings, image_mode, anyres_order)
        self.before, earlier, images_before, looks_before = before, [], [], []
        if before is not None:
            if before.checkpoint is not checkpoint:
                raise InputError("all turns of a conversation use one checkpoint; start another for this one")
            self.template, self.image_settings = before.template, before.image_settings
            earlier, images_before, looks_before = before.ids + before.token_ids, before.images, before.looks
        config = checkpoint.config
        prompt, system = plain_text(prompt), system and plain_text(system)
        self.prompt = prompt = prompt if self.template == "raw" else prompt.rstrip("\n")
        text = build_prompt(prompt, len(images), self.template, system, before is not None)
        if not (prompt if self.template == "raw" else prompt.replace(IMAGE, "")).strip():
            raise InputError("the question is empty; give a question")
        try:
            text.encode()
        except UnicodeEncodeError as broken:  # half of a surrogate pair
            raise InputError(f"the prompt is not valid Unicode ({broken}); correct it") from broken
        self.ids = earlier + checkpoint.tokenizer.encode(text, follows=before is not None)
        pictures = [read_image(i) for i in images]
        notes = [note for p in pictures for note in (p.note, crop_note(p, self.image_settings))]
        self.notes = [note for note in notes if note]
        looks = [self._look(p.image) for p in pictures]
        self.looks = looks_before + looks
        self.images = images_before + [
            {"path": p.path, "size": list(p.image.size), "tiles": len(squares), "tokens": self._count(p.image, grid)}
            for p, (squares, grid) in zip(pictures, looks, strict=True)
        ]
        self.vision_tokens = sum(image["tokens"] for image in self.images)
        self.prompt_tokens = len(self.ids) - len(self.images) + self.vision_tokens
        self.room = config.text_config.context - self.prompt_tokens  # for new tokens
        if self.room < 1:
            raise InputError(self._too_long())
        if self.prune:
            self.check_method(self.prune)
        self._begin()

    def _look(self, picture):
        """A PIL image -> (squares, grid): the S x S input pictures of the model; (rows, columns) of tiles, or None."""
        if self.image_settings.mode == "anyres":
            return to_tiles(picture, self.image_settings)
        return [to_square(picture, self.image_settings)], None

    def _count(self, picture, grid):
        """Number of tokens for the picture."""
        tower = self.checkpoint.config.vision_config
        if grid is None:
            return self.checkpoint.config.image_tokens
        return tile_tokens(grid, tower.image_size // tower.patch_size, picture.size, self.image_settings.order)

    def _too_long(self):
        """The error message for a prompt that exceeds the context."""
        text = self.checkpoint.config.text_config
        if self.before is not None:
            past = self.before.prompt_tokens + len(self.before.token_ids)
            return (
                f"this question needs {self.prompt_tokens - past} tokens, and the context has room for "
                f"{max(0, text.context - past)} of its {text.context}; start a new conversation (in a chat: /clear)"
            )
        window = f" (its sliding window, less than its {text.max_position_embeddings} positions)"
        return (
            f"the prompt needs {self.prompt_tokens} tokens, {self.vision_tokens} of them for {len(self.images)} "
            f"pictures, and the model's context is {text.context}"
            f"{window if text.context < text.max_position_embeddings else ''}; use fewer pictures or a shorter prompt"
        )

    def unpruned(self) -> "Generation":
        """A new Generation of the same question without pruning."""
        twin = copy.copy(self)
        twin.prune = None
        twin._begin()
        return twin

    def check_method(self, prune: Method) -> None:
        """InputError if the method does not fit the model; adds a note if there is nothing to drop."""
        text = self.checkpoint.config.text_config
        try:
            prune.check(text.num_hidden_layers, text.num_key_value_heads)
        except ValueError as wrong:
            raise InputError(f"method {prune.name}: {wrong}") from wrong
        if prune.looks_ahead and self.checkpoint.lookahead is None:
            raise InputError(
                f"method {prune.name}: query=lookahead needs {LOOKAHEAD} in {self.checkpoint.folder}; train it with "
                "tools/train_lookahead.py, or use query=last"
            )
        if not self.vision_tokens:
            self.notes.append(f"there is no picture, so {prune.name} has nothing to drop")

    @property
    def pixels(self) -> list[torch.Tensor]:
        """Pixel values of the pictures, (3, S, S) fp32 each; recomputed per call, so that no tensor is kept alive."""
        return [normalise(square, self.image_settings) for square in self.squares]

    @property
    def squares(self) -> list[Image.Image]:
        """The vision tower's input: one PIL image per picture, followed by the picture's tiles if it has any."""
        return [square for squares, _ in self.looks for square in squares]

    @property
    def places(self) -> list[torch.Tensor]:
        """Each token's row and column in its picture, (n, 2) int64 on the CPU per picture: `places_of`."""
        return [places_of(*of_picture[1:]) for of_picture in self._views()]

    @property
    def contrast(self) -> list[torch.Tensor]:
        """How far each token's pixels are from its picture's usual colour: (n,) fp32 on the CPU each, `contrast_of`."""
        return [
            contrast_of(torch.stack([normalise(s, self.image_settings) for s in squares]), side, tokens, cut, grid)
            for (squares, side, tokens, cut), (_, grid) in zip(self._views(), self.looks, strict=True)
        ]

    def _views(self):
        """Per picture: squares, tokens per side of a square, number of tokens, `kept_of_tiles` (None without tiles)."""
        tower = self.checkpoint.config.vision_config
        side = tower.image_size // tower.patch_size
        for (squares, grid), image in zip(self.looks, self.images, strict=True):
            cut = grid and kept_of_tiles(grid, side, image["size"], self.image_settings.order)
            yield squares, side, image["tokens"], cut

    def encode_images(self, first: int = 0) -> list[torch.Tensor]:
        """Vision tokens of the pictures from index `first` on, (P, C) each, in the checkpoint's dtype and device."""
        model, device, dtype = self.checkpoint.model, self.checkpoint.device, self.checkpoint.dtype
        looks, images = self.looks[first:], self.images[first:]
        squares, parts = [square for squares, _ in looks for square in squares], []
        for i in range(0, len(squares), 8):  # limits the memory for many pictures
            pixels = torch.stack([normalise(square, self.image_settings) for square in squares[i : i + 8]])
            parts.append(model.encode_images(pixels.to(device, dtype)))
        if not parts:
            return []
        tokens = torch.cat(parts).split([len(squares) for squares, _ in looks])
        order = self.image_settings.order
        return [
            part[0] if grid is None else model.join_tiles(part, grid, tuple(image["size"]), order)
            for part, (_, grid), image in zip(tokens, looks, images, strict=True)
        ]

    @property
    def way(self) -> str:
        """The kernel backend on the checkpoint's device: "triton" or "torch". InputError if it is not available."""
        if self.checkpoint.device.type == "meta":
            raise InputError("the checkpoint has no weights yet; call its read_weights(), or use load()")
        try:
            return choose_backend(self.backend, self.checkpoint.device, self.checkpoint.dtype)
        except ValueError as wrong:
            raise InputError(str(wrong)) from wrong

    @property
    def unfed(self) -> list[int]:
        """Ids of the answer that are not in the cache yet: the model has not processed the last token."""
        if self.cache is None or self.cache.pos is None:  # the prefill did not run, or did not complete
            return []
        return self.token_ids[int(self.cache.pos[0]) - self.prompt_tokens :]

    def _begin(self):
        """Reset to the state before the prefill."""
        self.text, self.token_ids, self.finish_reason = "", [], "interrupted"
        self.timing = {"vision": 0.0, "prefill": 0.0, "prune": 0.0, "steps": []}
        self.spans, self.cache, self.kept, self.bytes_held, self.masks = [], None, [], 0, None
        self.prefilled, self.pruned_for = 0, self.prompt
        self.failure = None  # in a Batch: the exception that ended this generation
        self.cancelled = False
        self.limit = min(self.sampling.max_new_tokens, self.room)
        self._writer = _Writer(Detokenizer(self.checkpoint.tokenizer), self.sampling.stop)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[str]:
        self._begin()  # a second iteration generates the answer again
        writer = self._writer
        logits = self.prefill()
        choose = Chooser(self.sampling, self.never(), self.checkpoint.device)
        ids = choose(logits)
        step = self.checkpoint.step(self.checkpoint.model.language_model, self.cache, self.compile)
        while True:
            if self._writer is not writer:
                raise RuntimeError("another iteration restarted this answer; make one Generation for each")
            piece = self.take(ids.item())
            if piece:
                yield piece
            if self.over or self.cancelled:
                return
            start = time.perf_counter()
            ids = choose(step(ids)[0])
            ids.tolist()  # waits for the device
            self.timing["steps"].append(time.perf_counter() - start)

    @property
    def over(self) -> bool:
        """True if the answer has ended, complete or failed."""
        return self.finish_reason != "interrupted" or self.failure is not None

    def take(self, token: int) -> str:
        """Append one id to the answer -> the text that can be shown now. Sets `finish_reason` if it was the last id.

        RuntimeError for an id below 0, which means that the logits were not finite.
        """
        if token < 0:
            raise RuntimeError("the model produced NaN or infinity; try --dtype fp32 or bf16")
        if token in self.checkpoint.stop_ids:
            self.finish_reason, piece = "stop", self._writer.flush()
        else:
            self.token_ids.append(token)
            piece = self._writer.push(token)
            if self._writer.stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.limit:
                self.finish_reason = "length"
                piece += self._writer.flush()
        self.text += piece
        return piece

    @property
    def retention(self) -> float:
        """Fraction kept of all (head, vision token) pairs; 1.0 before the prefill or without pictures."""
        total = len(self.kept) * self.vision_tokens
        return sum(self.kept) / total if total else 1.0

    @property
    def wanted(self) -> float | None:
        """The requested fraction of vision tokens, or None; see `Method.wanted`."""
        return self.prune.wanted([image["tokens"] for image in self.images]) if self.prune and self.images else None

    def prefill(self) -> torch.Tensor:
        """Run the model on pictures and prompt and fill the cache -> logits (V,) of the first new token."""
        before, self.before = self.before, None
        if before is not None and before.goes_on:
            return self._extend(before)
        model, device = self.checkpoint.model, self.checkpoint.device
        start = clock(device, self.timed)
        x, self.spans = model.splice(self.ids, self.encode_images())
        seen, self.prefilled = clock(device, self.timed), len(x)
        config = self.checkpoint.config.text_config
        self.cache = RaggedCache(config.num_hidden_layers, slack=min(self.limit, 64), backend=self.way)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        layout = Layout(layers, heads, config.num_key_value_heads, len(x), self.spans, x.device, places=self.places)
        if getattr(self.prune and self.prune.rule, "wants_contrast", False):
            layout = replace(layout, contrast=self.contrast)
        lookahead = self.checkpoint.lookahead if self.prune and self.prune.looks_ahead else None
        pruner = None
        if self.prune:
            ahead = lookahead.rows if lookahead else 0
            pruner = Pruner(self.prune, layout, self.backend, self.timed, ahead, self.remember)
        asked = {"choose": pruner.choose, "narrow": pruner.narrow, "lookahead": lookahead} if pruner else {}
        hidden = model.language_model.prefill(x[None], self.cache, **asked)
        logits = model.language_model.logits(hidden[0, -1])
        self.bytes_held = self.cache.nbytes_held
        self.kept = pruner.kept(self.cache) if pruner else [float(self.vision_tokens)] * layers
        if self.remember:
            everything = torch.ones(layers, layout.kv_heads, len(x), dtype=torch.bool)
            self.masks = torch.stack(pruner.masks).cpu() if pruner else everything
        self.timing["vision"], self.timing["prefill"] = seen - start, clock(device, self.timed) - seen
        self.timing["prune"] = pruner.seconds if pruner else 0.0
        return logits

    @property
    def goes_on(self) -> bool:
        """True if the cache holds this prompt, at most its answer and nothing else, so that a turn can follow."""
        if self.cache is None or self.cache.pos is None:
            return False
        return 0 <= int(self.cache.pos[0]) - self.prompt_tokens <= len(self.token_ids)

    def _extend(self, before):
        """Like `prefill`, for only the tokens that are not in the cache of `before`; they attend to all of it."""
        model, device, cache = self.checkpoint.model, self.checkpoint.device, before.cache
        start, past = clock(device, self.timed), int(cache.pos[0])
        tokens = self.encode_images(len(before.images))
        x, spans = model.splice(self.ids[len(before.ids) + len(before.token_ids) - len(before.unfed) :], tokens)
        seen, self.prefilled = clock(device, self.timed), len(x)
        logits = model.language_model.logits(model.language_model.extend(x[None], cache)[0, -1])
        self.cache, before.cache = cache, None
        self.pruned_for = before.pruned_for
        self.spans = before.spans + [(past + a, past + b) for a, b in spans]
        self.bytes_held = cache.nbytes_held
        self.kept = [kept + self.vision_tokens - before.vision_tokens for kept in before.kept]
        if before.masks is not None:
            layers, heads, known = before.masks.shape
            new = torch.ones(layers, heads, self.prompt_tokens - known, dtype=torch.bool)
            self.masks = torch.cat((before.masks, new), 2)
        self.timing["vision"], self.timing["prefill"] = seen - start, clock(device, self.timed) - seen
        return logits

    def never(self) -> list[int]:
        """Ids that must not be generated: embedding rows without a token, `<image>` and `<pad>`."""
        tokenizer, config = self.checkpoint.tokenizer, self.checkpoint.config
        named = [tokenizer.added[t] for t in ("<image>", "<pad>") if t in tokenizer.added]
        ids = tokenizer.unreachable_ids(config.text_config.vocab_size) + named
        return [i for i in ids if i < config.text_config.vocab_size and i not in self.checkpoint.stop_ids]


def off_budget(method, kept, wanted):
    """One line if kept and wanted (fractions; wanted may be None) differ by more than 0.03, else None.

    Also if no vision token is kept, or if all are although the fraction was not given.
    """
    if method is None:
        return None
    if kept == 0:
        return f"{method.name} kept no vision token; return True for those that the answer needs"
    if kept == 1 and wanted is None:
        return f"{method.name} dropped no vision token; check its settings, and that it returns what to keep"
    if wanted is None or abs(kept - wanted) <= 0.03:
        return None
    hint = "; tools/calibrate.py fits its settings to a model" if "alpha" in method.settings else ""
    return f"{method.name} kept {100 * kept:.1f} % of the vision tokens instead of {100 * wanted:.1f} %{hint}"


class PlainStep:
    """A decode step: append one token per sequence to the cache, ids (B,) on its device -> next logits (B, V)."""

    def __init__(self, language, cache, compile=False):
        if compile:
            raise InputError("a plain step is not compiled; use model.fast.FastStep")
        self.language, self.cache = language, cache

    def __call__(self, ids):
        hidden = self.language.decode(self.language.model.embed_tokens(ids), self.cache)
        try:
            return self.language.logits(hidden)
        except BaseException:  # no logits: undo the step
            self.cache.give_back()
            raise


def _brief(value):
    """A value for an error message: simple values are shown, up to 60 characters, others by their type."""
    simple = value is None or isinstance(value, str | bool | int | float)
    return repr(value)[:60] if simple else f"a {type(value).__name__}"


def ask(checkpoint: Checkpoint, prompt: str, images: Pictures = (), prune: PruneLike = None, **options: Any) -> str:
    """Return the whole answer as a string. images, prune, errors: see `Generation`; options: fields of Sampling."""
    generation = Generation(checkpoint, prompt, images, Sampling(**options), prune=prune)
    return "".join(generation)


@torch.inference_mode()
def next_turn(checkpoint, cache, ids, pixels=()):
    """Append a new turn to a cache without recomputing the past -> logits (V,) of the next token, in the model's dtype.

    ids: token ids that are not in the cache yet, with one image placeholder per picture: `unfed` of the previous
    answer, the template's text between the turns, and the question. pixels: `preprocess` of each picture, (3, S, S)
    fp32. The cache must hold one sequence and keeps all new tokens. Continue with `Llama.decode`, in inference_mode as
    here. InputError for arguments that do not fit the checkpoint or exceed its context.
    """
    model, tokens = checkpoint.model, ()
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    known = range(len(model.language_model.model.embed_tokens.weight)), (checkpoint.config.image_token_index,)
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) and any(i in k for k in known) for i in ids):
        raise InputError("the turn is not a list of the checkpoint's token ids; encode its text")
    if not ids:
        raise InputError("the turn has no tokens; give the ids of a question")
    if not isinstance(cache, RaggedCache) or cache.pos is None or len(cache.pos) != 1:
        raise InputError("the cache holds no prompt or several; give the `cache` of one Generation that was iterated")
    pixels = list(pixels) if isinstance(pixels, tuple | torch.Tensor) else as_list(pixels)
    if pixels:
        size = checkpoint.config.vision_config.image_size
        if not all(isinstance(p, torch.Tensor) and p.shape == (3, size, size) for p in pixels):
            raise InputError(f"the pictures of a turn must be tensors (3, {size}, {size}); make them with `preprocess`")
        tokens = model.encode_images(torch.stack(pixels).to(checkpoint.device, checkpoint.dtype))
    x, _ = model.splice(ids, tokens)
    room = checkpoint.config.text_config.context - int(cache.pos[0])
    if len(x) > room:
        raise InputError(f"the turn needs {len(x)} tokens, the context has room for {room}; start a new conversation")
    return model.language_model.logits(model.language_model.extend(x[None], cache)[0, -1])


def clock(device, wait):
    """The time in seconds. wait: first synchronise a CUDA device, so that the time includes its work."""
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


def out_of_memory(error: BaseException) -> bool:
    """True if the exception is an out-of-memory error, of the host or of a device."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


class Batch:
    """Generations that decode together, so that each step reads the weights once for all of them.

    Each one is prefilled separately when it is added, at any time. When its answer ends, it is removed and its K and V
    are freed: there is no padding and no waiting for the longest. Answers do not depend on each other, except for the
    rounding of matrix products of different sizes. All must use the same checkpoint and backend.

        batch = Batch()
        batch.add(Generation(...))
        while batch:
            for generation in batch.advance():
                print(generation.text)

    A generation with non-finite logits is removed too; its `failure` is the exception.
    """

    def __init__(self) -> None:
        self.running: list[Generation] = []  # generations, in the order of the cache's sequences
        self._choosers, self._over = [], []
        self.cache = self._step = self._ids = None

    def __len__(self) -> int:
        """Number of generations that were added and not yet returned by `advance`."""
        return len(self.running) + len(self._over)

    @torch.inference_mode()
    def add(self, generation: Generation) -> None:
        """Prefill a generation and add it. If its first token was its last, the next `advance` returns it.

        InputError for another checkpoint or backend, ValueError if it is already in the batch.
        """
        if not isinstance(generation, Generation):
            raise InputError(f"a batch takes one Generation at a time, not {_brief(generation)}; add one")
        if self.running and generation.checkpoint is not self.running[0].checkpoint:
            raise InputError("a batch has one checkpoint; start another batch for this one")
        if self.running and generation.way != self.running[0].way:
            raise InputError("a batch has one backend; start another batch for this one")
        if any(generation is other for other in (*self.running, *self._over)):
            raise ValueError("this generation is already in the batch; add another")
        generation._begin()
        logits = generation.prefill()
        chooser = Chooser(generation.sampling, generation.never(), generation.checkpoint.device)
        ids = chooser(logits)
        self._take(generation, ids.item())
        own, generation.cache = generation.cache, None  # its K and V move to the batch's cache
        if generation.over:
            self._over.append(generation)
            return
        ids = torch.cat((self._ids, ids)) if self.running else ids
        self.cache = RaggedCache.join([self.cache, own]) if self.running else own
        self._ids = ids
        self.running.append(generation)
        self._choosers.append(chooser)
        self._step = generation.checkpoint.step(generation.checkpoint.model.language_model, self.cache)

    @torch.inference_mode()
    def advance(self) -> list[Generation]:
        """Decode one token for each generation -> those that have ended, in no particular order.

        Each entry of `timing["steps"]` is the duration of the whole batch's step. If memory runs out, the step is
        either undone or complete; in both cases call `advance` again to continue.
        """
        self._dismiss()  # removes generations that could not be removed before, when memory ran out
        if self.running:
            start = time.perf_counter()
            logits = self._step(self._ids)
            try:
                ids = self._next(logits)
                tokens = ids.tolist()
            except BaseException:  # out of memory: undo the step, so that it can be repeated
                self.cache.give_back()
                raise
            self._ids = ids
            seconds = time.perf_counter() - start
            for generation, token in zip(self.running, tokens, strict=True):
                self._take(generation, token)
                generation.timing["steps"].append(seconds)  # shared
            self._dismiss()
        over, self._over = self._over, []
        return over

    def _take(self, generation, token):
        """`generation.take`; an error ends only this generation."""
        try:
            generation.take(token)
        except RuntimeError as broken:
            generation.failure = broken

    def _next(self, logits):
        """logits (B, V) -> next ids (B,)."""
        if all(chooser.sampling.temperature == 0 for chooser in self._choosers):
            return self._choosers[0].greedy(logits)[0]
        return torch.cat([chooser(row) for chooser, row in zip(self._choosers, logits, strict=True)])

    def _dismiss(self):
        """Remove the generations that have ended and free their memory."""
        stay = [i for i, generation in enumerate(self.running) if not generation.over]
        if len(stay) == len(self.running):
            return
        ids = self._ids[stay]
        if stay:
            self.cache.select(stay)  # nothing below can fail before all fields are updated
        self._over += [generation for generation in self.running if generation.over]
        self.running, self._choosers = ([listed[i] for i in stay] for listed in (self.running, self._choosers))
        self._ids = ids
        if stay:
            self.cache.repack(max(1, self.cache.room))
        else:
            self.cache = self._step = self._ids = None


def answer_together(begin, questions, size):
    """Answer the questions, `size` at a time. Returns a list: for each question its answer, or the exception.

    begin(question): returns its Generation or raises InputError.
    """
    batch, answers, places = Batch(), [None] * len(questions), {}

    def collect():
        for generation in batch.advance():
            answers[places.pop(generation)] = generation.failure or generation.text

    for place, question in enumerate(questions):
        try:
            generation = begin(question)
            batch.add(generation)
            places[generation] = place
        except InputError as wrong:
            answers[place] = wrong
        while len(batch) >= size:
            collect()
    while batch:
        collect()
    return answers


def probabilities(logits, temperature, top_k=None, top_p=None):
    """Softmax of logits (V,) / temperature over the top_k best, then over the smallest set of these with mass top_p.

    Returns (V,) in the dtype of logits. top_p (nucleus sampling, arXiv 1904.09751) always keeps the best token, even if
    it alone exceeds top_p. Ties go to the lower index, as in greedy decoding.
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


class _Writer:
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
