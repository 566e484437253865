"""Ask a loaded checkpoint something: prompt and pictures in, pieces of text out as they are written."""

import copy
import math
import time
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral, Real

import torch
import torch.nn.functional as F

from kernels import window_scores
from kernels.backend import BACKENDS, choose_backend

from .api import choose_method
from .cache import RaggedCache
from .config import InputError, plain_text
from .image import as_list, crop_note, kept_of_tiles, normalise, read_image, tile_tokens, to_square, to_tiles, with_mode
from .llama import DecoderLayer, LayerParts, Llama, rope_turns
from .load import Checkpoint
from .lookahead import FILE as LOOKAHEAD
from .tokenizer import IMAGE, TEMPLATES, Detokenizer, build_prompt
from .view import contrast_of, places_of


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when the answer ends. InputError for values that mean nothing."""

    max_new_tokens: int = 256  # at least 1
    temperature: float = 0.0  # 0: greedy
    top_k: int = None  # at least 1; None: all tokens
    top_p: float = None  # above 0, up to 1; None: all of the probability
    seed: int = 0  # 0 to 2**64 - 1
    stop: tuple = ()  # strings that end the answer; they are not part of it. One string is a tuple of one

    def __post_init__(self):
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple | set | frozenset) or not all(
            isinstance(s, str) and plain_text(s) for s in stop
        ):
            raise InputError(f"stop is {_brief(self.stop)}; give a text that is not empty, or a list of such texts")
        object.__setattr__(self, "stop", tuple(map(plain_text, stop)))  # the class is frozen
        for name, kind, low, high, wanted in (
            ("max_new_tokens", Integral, 1, math.inf, "an integer of at least 1"),
            ("temperature", Real, 0, 1e4, "a number from 0 (greedy) to 10000"),
            ("top_k", Integral, 1, math.inf, "an integer of at least 1, or None for all tokens"),
            ("top_p", Real, 5e-324, 1, "a number above 0 and up to 1, or None for all of the probability"),
            ("seed", Integral, 0, 2**64 - 1, "an integer from 0 to 2**64 - 1"),
        ):
            value = getattr(self, name)
            if value is None and name in ("top_k", "top_p"):
                continue
            # a comparison with NaN is false
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                raise InputError(f"{name} is {_brief(value)}; give {wanted}")
            if kind is Integral:  # NumPy has its own
                object.__setattr__(self, name, int(value))


@dataclass(frozen=True)
class Layout:
    """What a pruning method may know of a prompt beside its scores."""

    num_layers: int  # L
    q_heads: int  # Hq
    kv_heads: int  # Hkv
    tokens: int  # T, pictures expanded
    spans: list  # [(start, stop)] of the pictures among the T
    device: torch.device
    attended: torch.Tensor = None  # (Hkv, T) fp32, attention of the last 32 rows, where `sink_keys` are guarded
    last: torch.Tensor = None  # (Hq, T) fp32, attention of the last row alone, for rules with `wants_last_row`
    norms: torch.Tensor = None  # (Hkv, T) fp32, L1 norm of the layer's value rows, for methods that ask for values
    places: list = None  # of each picture (n, 2): row and column of its tokens (`model.view.places_of`), on the CPU
    contrast: list = None  # of each picture (n,) fp32 (`model.view.contrast_of`), for rules with `wants_contrast`

    @cached_property
    def text(self):
        """(T,) bool: what is not a picture's."""
        mask = torch.ones(self.tokens, dtype=torch.bool, device=self.device)
        for start, stop in self.spans:
            mask[start:stop] = False
        return mask


class Pruner:
    """Asks a method about the layers of one prefill: what a layer's attention says goes in, what is kept comes out.

    text      tokens of no picture in the prompt as each layer saw it, which stay
    layout    of the prompt as the current layer sees it
    seconds   spent on scoring and choosing; see `timed` of Generation
    masks     if `remember`: (Hkv, T) bool of each layer, the tokens of the whole prompt that each head keeps
    """

    def __init__(self, method, layout, backend="auto", timed=False, ahead=0, remember=False):
        """ahead: how many of the rows of q, k and v, the last ones, are look-ahead rows and no part of the prompt."""
        self.method, self.layout, self.backend, self.timed, self.ahead = method, layout, backend, timed, ahead
        self.text, self.seconds = [], 0.0
        self.masks = [] if remember else None
        self.tokens = layout.tokens  # of the whole prompt
        self.rows = torch.arange(layout.tokens, device=layout.device)  # those of them that the current layer sees

    def choose(self, layer, q, k, v):
        """Which rows of k and v (1, Hkv, T, D) each head keeps, after q (1, Hq, T, D): (Hkv, T) bool, None for all."""
        keep = None
        if self.layout.spans and self.method.wants(layer, self.layout.num_layers):
            start = clock(k.device, self.timed)
            layout = self._guarded(q, k)
            if self.method.settings.get("values"):
                layout = replace(layout, norms=v[0, :, : layout.tokens].float().norm(1, dim=-1))
            if getattr(self.method.rule, "wants_last_row", False):
                layout = replace(layout, last=self._scores(q, k, 1))
            ranking = self._ahead(q, k) if self.method.looks_ahead else self._scores(q, k, self.method.window)
            keep = self._heed(self.method.choose, layer, ranking, layout)
            self.seconds += clock(k.device, self.timed) - start
        self.text.append(self.layout.tokens - sum(b - a for a, b in self.layout.spans))
        if self.masks is not None:
            self.masks.append(self._of_the_prompt(keep))
        return keep

    def _of_the_prompt(self, keep):
        """What a layer keeps of the rows that it sees, or None for all -> (Hkv, T) bool of the whole prompt."""
        mask = torch.zeros(self.layout.kv_heads, self.tokens, dtype=torch.bool, device=self.rows.device)
        mask[:, self.rows] = True if keep is None else keep
        return mask

    def kept(self, cache):
        """Vision tokens that a KV head of each layer keeps in the prompt's cache, averaged over the layer's heads."""
        return [n - text for n, text in zip(cache.kv_len.double().mean(1).tolist(), self.text, strict=True)]

    def narrow(self, layer, q, k, v):
        """Which tokens go on to the layers after this one: indices (T',), ascending, or None for all."""
        if not self.layout.spans or self.method.layer != layer + 1:
            return None
        start = clock(k.device, self.timed)
        keep = self._heed(self.method.narrow, self._scores(q, k, self.method.window), self._guarded(q, k))
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
        """The layout, with what the method needs to know the keys that attention is parked on."""
        if not self.method.settings.get("sink_keys"):
            return self.layout
        attended = self._scores(q, k, 32).view(self.layout.kv_heads, -1, self.layout.tokens).mean(1)
        return replace(self.layout, attended=attended)

    def _scores(self, q, k, window):
        """(Hq, T) fp32, averaged over the last rows, down to where the last picture ends. None for a window of 0."""
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
        """What a method answers; what it refuses is wrong input."""
        try:
            return ask(*arguments)
        except ValueError as wrong:
            raise InputError(str(wrong)) from wrong


class Generation:
    """One answer, while it is written and after.

    Iterate over it for pieces of text. Everything that can be refused is refused by the constructor (InputError),
    before any computing. When the iteration is over, or was broken off, the fields say what happened:

    text           the answer
    token_ids      its ids, the stop id excluded
    finish_reason  "stop" | "length" | "interrupted"
    prompt         the question
    prompt_tokens, vision_tokens, images [{"path", "size", "tiles", "tokens"}]    what was asked, pictures expanded
    spans          [(start, stop)] of the pictures among the prompt's tokens
    notes          lines about what was done to the pictures
    cache          the RaggedCache
    masks          with `remember`, once the prompt is computed: (L, Hkv, T) bool, the tokens that each head keeps
    kept           vision tokens that a KV head keeps, one number per layer, averaged over the layer's heads
    bytes_held     K and V bytes of the prompt rows that were kept
    timing         seconds: vision, prefill, prune (a part of prefill), and steps, one entry per decode step (the first
                   token comes from prefill)
    cancelled      set it to True, from a signal handler or another thread, to end the iteration after its next token
    """

    def __init__(
        self, checkpoint, prompt, images=(), sampling=None, template="auto", image_mode="auto", system=None,
        prune=None, backend="auto", compile=False, anyres_order="auto", timed=False, remember=False,
        before=None,
    ):  # fmt: skip
        """prompt: the question; images: one picture or a list of them, in the order of their `<image>`.

        A picture is what `read_image` takes: a path, "-" (stdin), a data: URI, bytes, a binary file, a PIL image, or a
        uint8 array or tensor.

        prune: what chooses the tokens that each head keeps (`model.api.choose_method`): a name or SPEC as of `--prune`,
        with the checkpoint's own settings, a function, class or Method of `model.pruning`, None to keep all; backend:
        of the kernels; compile: the decode step, see `DecodeStep`; anyres_order: "hf" or "orig", see `choose_canvas`;
        timed: let a CUDA device finish before a clock is read. Otherwise the parts of `timing` but `steps` only say how
        long the host took to launch them. remember: keep `masks`, for `model.show`.

        before: the Generation whose answer this question follows in a conversation; template and image mode are taken
        from it. Prompt, pictures and counts then mean the whole conversation. Its cache is taken over: only the new
        tokens are fed, and all of them are kept. If it has no cache, the whole conversation is prefilled and pruned;
        set `before.cache = None` to ask for that.
        """
        images = as_list(images)
        for what, given, kinds, wanted in (
            ("checkpoint", checkpoint, Checkpoint, "what `load` returns"),
            ("prompt", prompt, str, "the question as a text"),
            ("sampling", sampling, Sampling | None, "Sampling(max_new_tokens=..., ...)"),
            ("system", system, str | None, "a text or None"),
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
                raise InputError("a conversation is of one checkpoint; start another for this one")
            self.template, self.image_settings = before.template, before.image_settings
            earlier, images_before, looks_before = before.ids + before.token_ids, before.images, before.looks
        config = checkpoint.config
        prompt, system = plain_text(prompt), system and plain_text(system)
        self.prompt = prompt = prompt if self.template == "raw" else prompt.rstrip("\n")
        text = build_prompt(prompt, len(images), self.template, system, before is not None)
        if not (prompt if self.template == "raw" else prompt.replace(IMAGE, "")).strip():
            raise InputError("the question is empty; say what to ask")
        try:
            text.encode()
        except UnicodeEncodeError as broken:  # half of a surrogate pair
            raise InputError(f"the prompt is no Unicode text ({broken}); mend it") from broken
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
        """A PIL image -> (squares, grid): the S x S pictures the model looks at; (rows, columns) of tiles or None."""
        if self.image_settings.mode == "anyres":
            return to_tiles(picture, self.image_settings)
        return [to_square(picture, self.image_settings)], None

    def _count(self, picture, grid):
        """Tokens that the picture becomes."""
        tower = self.checkpoint.config.vision_config
        if grid is None:
            return self.checkpoint.config.image_tokens
        return tile_tokens(grid, tower.image_size // tower.patch_size, picture.size, self.image_settings.order)

    def _too_long(self):
        """One line: what the prompt needs and what there is."""
        text = self.checkpoint.config.text_config
        if self.before is not None:
            past = self.before.prompt_tokens + len(self.before.token_ids)
            return (
                f"this question needs {self.prompt_tokens - past} tokens, and the context has room for "
                f"{max(0, text.context - past)} of its {text.context}; start a new conversation (in a chat: /clear)"
            )
        window = f" (its sliding window; beyond it is {text.max_position_embeddings})"
        return (
            f"the prompt needs {self.prompt_tokens} tokens, {self.vision_tokens} of them for {len(self.images)} "
            f"images, and the model's context is {text.context}"
            f"{window if text.context < text.max_position_embeddings else ''}; use fewer images or a shorter prompt"
        )

    def unpruned(self):
        """The same question, still to be asked, with a cache that keeps everything."""
        twin = copy.copy(self)
        twin.prune = None
        twin._begin()
        return twin

    def check_method(self, prune):
        """InputError if the model is not one for the method; a note if there is nothing to drop."""
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
    def pixels(self):
        """Pixel values of the pictures, (3, S, S) fp32 each; made anew, so that no tensor outlives its use."""
        return [normalise(square, self.image_settings) for square in self.squares]

    @property
    def squares(self):
        """What the vision tower looks at: one PIL image per picture, or the picture's tiles behind it."""
        return [square for squares, _ in self.looks for square in squares]

    @property
    def places(self):
        """Where in its picture each token sits, (n, 2) per picture: `places_of`."""
        return [places_of(*of_picture[1:]) for of_picture in self._views()]

    @property
    def contrast(self):
        """How far each token's pixels are from its picture's usual colour, (n,) per picture: `contrast_of`."""
        return [
            contrast_of(torch.stack([normalise(s, self.image_settings) for s in squares]), side, tokens, cut, grid)
            for (squares, side, tokens, cut), (_, grid) in zip(self._views(), self.looks, strict=True)
        ]

    def _views(self):
        """Of each picture: its squares, tokens per side of one, tokens in all, which part of its tiles is seen."""
        tower = self.checkpoint.config.vision_config
        side = tower.image_size // tower.patch_size
        for (squares, grid), image in zip(self.looks, self.images, strict=True):
            cut = grid and kept_of_tiles(grid, side, image["size"], self.image_settings.order)
            yield squares, side, image["tokens"], cut

    def encode_images(self, first=0):
        """The tokens of the pictures from number `first` on, (P, C) each."""
        model, device, dtype = self.checkpoint.model, self.checkpoint.device, self.checkpoint.dtype
        looks, images = self.looks[first:], self.images[first:]
        squares, parts = [square for squares, _ in looks for square in squares], []
        for i in range(0, len(squares), 8):  # so that many pictures need the memory of a few
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
    def way(self):
        """What the backend comes to where the checkpoint is: "triton" or "torch". InputError if it cannot work."""
        if self.checkpoint.device.type == "meta":
            raise InputError("the checkpoint has no weights yet; call its read_weights(), or use load()")
        try:
            return choose_backend(self.backend, self.checkpoint.device, self.checkpoint.dtype)
        except ValueError as wrong:
            raise InputError(str(wrong)) from wrong

    @property
    def unfed(self):
        """Ids of the answer that the cache has not seen: a last token was chosen, but nothing came after it."""
        if self.cache is None or self.cache.pos is None:  # nothing was computed, or not to the end of the prompt
            return []
        return self.token_ids[int(self.cache.pos[0]) - self.prompt_tokens :]

    def _begin(self):
        """Nothing said yet."""
        self.text, self.token_ids, self.finish_reason = "", [], "interrupted"
        self.timing = {"vision": 0.0, "prefill": 0.0, "prune": 0.0, "steps": []}
        self.spans, self.cache, self.kept, self.bytes_held, self.masks = [], None, [], 0, None
        self.failure = None  # in a Batch: the error that ended this one
        self.cancelled = False
        self.limit = min(self.sampling.max_new_tokens, self.room)
        self._writer = _Writer(Detokenizer(self.checkpoint.tokenizer), self.sampling.stop)

    @torch.inference_mode()
    def __iter__(self):
        self._begin()  # iterating again gives the answer again
        writer = self._writer
        logits = self.prefill()
        choose = Chooser(self.sampling, self.never(), self.checkpoint.device)
        ids = choose(logits)
        step = DecodeStep(self.checkpoint.model.language_model, self.cache, self.compile)
        while True:
            if self._writer is not writer:
                raise RuntimeError("this answer was begun again elsewhere; make another Generation for that")
            piece = self.take(ids.item())
            if piece:
                yield piece
            if self.over or self.cancelled:
                return
            start = time.perf_counter()
            ids = choose(step(ids)[0])
            ids.tolist()  # reading them is what waits for the device
            self.timing["steps"].append(time.perf_counter() - start)

    @property
    def over(self):
        """Is the answer complete, or will it never be?"""
        return self.finish_reason != "interrupted" or self.failure is not None

    def take(self, token):
        """One more id of the answer -> the text that it makes certain. `finish_reason` says whether it was the last.

        RuntimeError for an id below 0, which stands for broken logits.
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
    def retention(self):
        """Kept over all (head, vision token) pairs; 1.0 before the prefill and without pictures."""
        total = len(self.kept) * self.vision_tokens
        return sum(self.kept) / total if total else 1.0

    @property
    def wanted(self):
        """The fraction of the vision tokens that was asked for, or None; see `Method.wanted`."""
        return self.prune.wanted([image["tokens"] for image in self.images]) if self.prune and self.images else None

    def prefill(self):
        """Pictures and prompt through the model, the cache filled -> logits (V,) of the first new token."""
        before, self.before = self.before, None
        if before is not None and before.goes_on:
            return self._extend(before)
        model, device = self.checkpoint.model, self.checkpoint.device
        start = clock(device, self.timed)
        x, self.spans = model.splice(self.ids, self.encode_images())
        seen = clock(device, self.timed)
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
    def goes_on(self):
        """Does the cache hold this prompt and answer and nothing more? Then the next question can be fed to it."""
        if self.cache is None or self.cache.pos is None:
            return False
        return 0 <= int(self.cache.pos[0]) - self.prompt_tokens <= len(self.token_ids)

    def _extend(self, before):
        """`prefill` of only what the cache of `before` has not seen; it attends to everything that the cache kept."""
        model, device, cache = self.checkpoint.model, self.checkpoint.device, before.cache
        start, past = clock(device, self.timed), int(cache.pos[0])
        tokens = self.encode_images(len(before.images))
        x, spans = model.splice(self.ids[len(before.ids) + len(before.token_ids) - len(before.unfed) :], tokens)
        seen = clock(device, self.timed)
        logits = model.language_model.logits(model.language_model.extend(x[None], cache)[0, -1])
        self.cache, before.cache = cache, None
        self.spans = before.spans + [(past + a, past + b) for a, b in spans]
        self.bytes_held = cache.nbytes_held
        self.kept = [kept + self.vision_tokens - before.vision_tokens for kept in before.kept]
        if before.masks is not None:
            layers, heads, known = before.masks.shape
            new = torch.ones(layers, heads, self.prompt_tokens - known, dtype=torch.bool)
            self.masks = torch.cat((before.masks, new), 2)
        self.timing["vision"], self.timing["prefill"] = seen - start, clock(device, self.timed) - seen
        return logits

    def never(self):
        """Ids that must not be said: rows of the embedding that stand for no token, `<image>` and `<pad>`."""
        tokenizer, config = self.checkpoint.tokenizer, self.checkpoint.config
        named = [tokenizer.added[t] for t in ("<image>", "<pad>") if t in tokenizer.added]
        ids = tokenizer.unreachable_ids(config.text_config.vocab_size) + named
        return [i for i in ids if i < config.text_config.vocab_size and i not in self.checkpoint.stop_ids]


def off_budget(method, kept, wanted):
    """One line if a method kept more than 3 points more or less than what was wanted (fractions or None), else None."""
    if wanted is None or abs(kept - wanted) <= 0.03:
        return None
    hint = "; tools/calibrate.py fits its settings to a model" if "alpha" in method.settings else ""
    return f"{method.name} kept {100 * kept:.1f} % of the vision tokens, {100 * wanted:.1f} % were asked for{hint}"


class DecodeStep:
    """One more token of each of B sequences into their cache: ids (B,) on its device -> logits (B, V) of the next.

    With Triton's kernels on CUDA a step is a captured graph: hundreds of launches become one. It is captured again when
    the arenas have moved. The first step after that runs as it is, which also compiles the kernels.
    """

    def __init__(self, language, cache, compile=False):
        """compile: let torch.compile write a layer's loops; the first step takes long, see `_compile`."""
        self.language, self.cache = language, cache
        self.turns = rope_turns(language.config, cache.pos.device)
        self.parts, self.logits_of = LayerParts(), Llama.logits
        if compile:
            self._compile()
        self.graph = self.ids = self.logits = None
        self.seen = None  # version of the cache that the last step ran on

    def __call__(self, ids):
        cache = self.cache
        if self.captures and self.seen == cache.version and cache.room > 0:
            return self._replay(ids)
        self.graph = self.logits = None  # frees the graph's memory
        logits = self._step(ids)
        self.seen = cache.version
        return logits

    @property
    def captures(self):
        """Are steps captured? The kernels of the torch backend cannot be: they look at lengths."""
        return self.cache.fused and self.cache.pos.is_cuda

    def _step(self, ids):
        """Allocates from the device only; reads nothing back."""
        x = F.embedding(ids, self.language.model.embed_tokens.weight)
        hidden = self.language.decode(x, self.cache, self.turns, self.parts)
        try:
            return self.logits_of(self.language, hidden)
        except BaseException:  # no next token: the step has not happened
            self.cache.give_back()
            raise

    def _compile(self):
        """Parts of a layer, the same for all layers; nothing is compiled before it is used.

        On a CPU a whole layer where its cache is a rectangle, whose number of slots may change (dynamic); elsewhere
        the two halves around the attention.
        """
        halves = DecoderLayer.before_attention, DecoderLayer.after_attention
        before, after = (torch.compile(half, dynamic=False) for half in halves)
        if self.cache.fused or not self.cache.pos.is_cpu:
            self.parts = LayerParts(before, after)
            return
        self.language.lay_by_rows()
        self.parts = LayerParts(before, after, torch.compile(DecoderLayer.whole, dynamic=True))
        self.logits_of = torch.compile(Llama.logits, dynamic=False)

    def _replay(self, ids):
        device = self.cache.pos.device
        if self.graph is None:
            self.ids, graph = ids.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                self.logits = self._step(self.ids)  # records the step, and claims the host's part of its slots
            self.graph = graph
        else:
            self.ids.copy_(ids)
            self.cache.reserve()
        self.graph.replay()
        return self.logits


def _brief(value):
    """A value in an error message: its type says enough of most."""
    simple = value is None or isinstance(value, str | bool | int | float)
    return repr(value)[:60] if simple else f"a {type(value).__name__}"


def ask(checkpoint, prompt, images=(), prune=None, **options):
    """The whole answer as a string. images, prune: see `Generation`; options: fields of Sampling."""
    generation = Generation(checkpoint, prompt, images, Sampling(**options), prune=prune)
    return "".join(generation)


@torch.inference_mode()
def next_turn(checkpoint, cache, ids, pixels=()):
    """Feed a new turn behind what a cache has kept, without computing the past again -> logits (V,) of the next token.

    ids: token ids that the cache has not seen, one image placeholder per picture: `unfed` of the answer before, what
    the template puts between the turns, the question. pixels: what `preprocess` makes of each picture, (3, S, S). The
    cache, of one sequence, takes all of the new tokens; `Llama.decode` goes on from there, in inference_mode as here.
    """
    model, tokens = checkpoint.model, ()
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    known = range(len(model.language_model.model.embed_tokens.weight)), (checkpoint.config.image_token_index,)
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) and any(i in k for k in known) for i in ids):
        raise InputError("the turn is no list of the checkpoint's token ids; encode its text")
    if not ids:
        raise InputError("the turn has no tokens; give the ids of a question")
    if not isinstance(cache, RaggedCache) or cache.pos is None or len(cache.pos) != 1:
        raise InputError("the cache holds no prompt, or several; give the `cache` of one Generation that was iterated")
    pixels = list(pixels) if isinstance(pixels, tuple | torch.Tensor) else as_list(pixels)
    if pixels:
        size = checkpoint.config.vision_config.image_size
        if not all(isinstance(p, torch.Tensor) and p.shape == (3, size, size) for p in pixels):
            raise InputError(
                f"the pictures of a turn are tensors (3, {size}, {size}) here; make them with `preprocess`"
            )
        tokens = model.encode_images(torch.stack(pixels).to(checkpoint.device, checkpoint.dtype))
    x, _ = model.splice(ids, tokens)
    room = checkpoint.config.text_config.context - int(cache.pos[0])
    if len(x) > room:
        raise InputError(f"the turn needs {len(x)} tokens, the context has room for {room}; start a new conversation")
    return model.language_model.logits(model.language_model.extend(x[None], cache)[0, -1])


def clock(device, wait):
    """Seconds. wait: read the clock when a CUDA device has finished what it was given, so that it means something."""
    if wait and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Chooser:
    """How one answer goes on: logits -> next id, on their device; -1 where they are not finite."""

    def __init__(self, sampling, never, device):
        """never: ids that must not be chosen."""
        self.sampling, self.never = sampling, torch.tensor(never, dtype=torch.long, device=device)
        self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def __call__(self, logits):
        """logits (V,) -> id (1,)."""
        sampling, (token, logits) = self.sampling, self.greedy(logits[None])
        if sampling.temperature > torch.finfo(logits.dtype).tiny:  # below, nothing but the best has a chance
            weights = probabilities(logits[0], sampling.temperature, sampling.top_k, sampling.top_p)
            noise = torch.empty_like(weights).exponential_(generator=self.generator)
            # what multinomial does, without waiting to check its weights
            token = torch.where(token < 0, token, (weights / noise).argmax(-1))
        return token

    def greedy(self, logits):
        """logits (B, V) -> the best ids (B,) and the logits (B, V) in fp32 without those of `never`."""
        logits = logits.float().index_fill(-1, self.never, float("-inf"))
        best, token = logits.max(-1)
        return torch.where(best.isfinite(), token, -1), logits  # the maximum of anything with a NaN is NaN


def out_of_memory(error):
    """Does the exception say that memory, of the host or of a device, was not enough?"""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


class Batch:
    """Generations that take their decode steps together, so that one pass over the weights serves all of them.

    Each is prefilled by itself when it comes in, at any time, and leaves when its answer is over, with its K and V: no
    padding anywhere, no waiting for the longest. What it says does not depend on who else is there, but for the
    rounding of products of another size. All must be of one checkpoint, backend included.

        batch = Batch()
        batch.add(Generation(...))
        while batch:
            for generation in batch.advance():
                print(generation.text)

    One whose logits are broken leaves too, with what went wrong in its `failure`.
    """

    def __init__(self):
        self.running = []  # generations, in the order of the cache's sequences
        self._choosers, self._over = [], []
        self.cache = self._step = self._ids = None

    def __len__(self):
        """How many were added and not handed out so far."""
        return len(self.running) + len(self._over)

    @torch.inference_mode()
    def add(self, generation):
        """Prefill one more and take it in. The next `advance` hands it out if its first token was its last."""
        if not isinstance(generation, Generation):
            raise InputError(f"a batch takes one Generation at a time, not {_brief(generation)}; give it one")
        if self.running and generation.checkpoint is not self.running[0].checkpoint:
            raise InputError("a batch is of one checkpoint; start another for this one")
        if self.running and generation.way != self.running[0].way:
            raise InputError("a batch is of one backend; start another for this one")
        if any(generation is other for other in (*self.running, *self._over)):
            raise ValueError("this generation is in the batch already; add another")
        generation._begin()
        logits = generation.prefill()
        chooser = Chooser(generation.sampling, generation.never(), generation.checkpoint.device)
        ids = chooser(logits)
        self._take(generation, ids.item())
        own, generation.cache = generation.cache, None  # its K and V live in the batch's from here on
        if generation.over:
            self._over.append(generation)
            return
        ids = torch.cat((self._ids, ids)) if self.running else ids
        self.cache = RaggedCache.join([self.cache, own]) if self.running else own
        self._ids = ids
        self.running.append(generation)
        self._choosers.append(chooser)
        self._step = DecodeStep(generation.checkpoint.model.language_model, self.cache)

    @torch.inference_mode()
    def advance(self):
        """One more token for each -> the generations that are over now, in no particular order.

        Where memory runs out, the batch is as before or has made its step: go on by calling it again.
        """
        self._dismiss()  # those that could not leave when memory ran out
        if self.running:
            start = time.perf_counter()
            logits = self._step(self._ids)
            try:
                ids = self._next(logits)
                tokens = ids.tolist()
            except BaseException:  # out of memory: the same step can be tried again
                self.cache.give_back()
                raise
            self._ids = ids
            seconds = time.perf_counter() - start
            for generation, token in zip(self.running, tokens, strict=True):
                self._take(generation, token)
                generation.timing["steps"].append(seconds)  # which it shared with the others
            self._dismiss()
        over, self._over = self._over, []
        return over

    def _take(self, generation, token):
        """generation.take, but what is wrong with one does not end the others."""
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
        """Those that are over leave, and their memory is given back."""
        stay = [i for i, generation in enumerate(self.running) if not generation.over]
        if len(stay) == len(self.running):
            return
        ids = self._ids[stay]
        if stay:
            self.cache.select(stay)  # from here on nothing can fail until all agree
        self._over += [generation for generation in self.running if generation.over]
        self.running, self._choosers = ([listed[i] for i in stay] for listed in (self.running, self._choosers))
        self._ids = ids
        if stay:
            self.cache.repack(max(1, self.cache.room))
        else:
            self.cache = self._step = self._ids = None


def answer_together(begin, questions, size):
    """The answers to the questions in their order, or the exception in place of an answer; `size` at a time.

    begin(question): its Generation, or an InputError.
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
    """Softmax of logits (V,) / temperature over the top_k best, then over the smallest set holding top_p of the rest.

    top_p (nucleus sampling, arXiv 1904.09751) always keeps the best token, also when it alone exceeds top_p. Of equal
    logits the one with the lower index is the better one, as in greedy decoding.
    """
    limits = torch.finfo(logits.dtype)  # the temperature is cast to it: neither to 0 nor to infinity
    logits = (logits - logits.max()) / min(max(temperature, limits.tiny), limits.max)  # the shift keeps 0 at the best
    if top_k is not None or top_p is not None:
        logits, order = logits.sort(descending=True, stable=True)
        if top_k is not None:
            logits[top_k:] = float("-inf")
        if top_p is not None and top_p < 1:
            weights = logits.softmax(-1)
            before = weights.cumsum(-1) - weights  # mass of everything better
            before[0] = -1.0  # fp32 takes a tiny top_p for 0
            logits = logits.masked_fill(before >= top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter_(0, order, logits)
    return logits.softmax(-1)


class _Writer:
    """Text from ids, withholding what might be the beginning of a stop string."""

    def __init__(self, detokenizer, stop):
        self.detokenizer, self.stop, self.held, self.stopped = detokenizer, tuple(stop), "", False

    def push(self, token):
        """Text that is safe to show after one more id; sets `stopped` when a stop string is complete."""
        self.held += self.detokenizer.push(token)
        found = [self.held.find(s) for s in self.stop if s in self.held]
        if found:
            self.held, self.stopped = self.held[: min(found)], True
            return self.flush()
        keep = max((n for s in self.stop for n in range(1, len(s)) if self.held.endswith(s[:n])), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready

    def flush(self):
        """What was withheld, at the end of the answer."""
        rest, self.held = self.held + ("" if self.stopped else self.detokenizer.flush()), ""
        return rest
