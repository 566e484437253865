"""Ask a loaded checkpoint a question: generate an answer from prompt and pictures, as a stream of text."""

import copy
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from kernels.backend import BACKENDS, choose_backend
from kernels.quantise import has_e4m3

from .api import AnyMethod, PruneLike, choose_method
from .cache import KV_DTYPES, RaggedCache
from .checkpoint import Checkpoint
from .config import InputError, brief
from .image import Pictures
from .lookahead import FILE as LOOKAHEAD
from .picture import Picked, after_picking, look, original_positions, origins, pick, protected_of, spans_of, unpicked
from .prompt import Prompt
from .sampling import Chooser, Sampling, Writer
from .share import gather_alike
from .view import Pruning, clock, pruned_prefill


class Generation(Prompt):
    """A prompt (its fields: see `Prompt`) and its answer, during and after generation.

    Iterate over it for pieces of text. The constructor checks all input (InputError) before anything is computed. After
    the iteration, complete or not, these fields describe the answer:

    text           the answer
    token_ids      its ids, the stop id excluded
    finish_reason  "stop" | "length" | "interrupted"
    spans          [(start, stop)] of each picture in the prompt's tokens
    prefilled      number of tokens prefilled: the whole prompt, or in a later turn only those not yet in the cache
    absent         number of vision tokens that a method dropped before the language model
    moved          positions by which the tokens after them moved up: `absent`, or 0 with positions=original
    cache          the RaggedCache, None before the prefill is complete
    pruned_for     the question used to choose the dropped tokens: `prompt`, or an earlier turn's
    masks          with `remember`, after the prefill: (L, Hkv, T) bool, the tokens that each head keeps
    kept           vision tokens kept per KV head after the prefill: one number per layer, averaged over its heads. A
                   method that evicts gives them up later, for tokens of the answer
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
        kv_dtype: str = "auto",
        frames: Pictures = (),
    ) -> None:
        """prompt: the question; images: one picture or a list of them, in the order of their `<image>`. frames: those
        of a video, in their order, for LLaVA-OneVision, or one file with all of them.

        template, image_mode, system: as in `Checkpoint.ask`. prune: the pruning method, None to keep all tokens; for a
        name or SPEC, defaults come from the checkpoint's folder. backend: "auto", "triton" or "torch" kernels. compile:
        see `model.fast.FastStep`. anyres_order: "hf" or "orig", see `choose_canvas`. timed: synchronise a CUDA device
        before each clock reading; without it, `timing` measures only launches, except in `steps`. remember: keep
        `masks`, for `model.show`. kv_dtype: of the cached keys and values, "auto" (as the weights), "int8" or "fp8".

        before: the previous turn of the conversation; its template and image mode are used again.
        `ids`, `images` and the counts then cover the whole conversation; `prompt` is this question. The cache of
        `before` is reused: only the new tokens are processed, and all of them are kept. If it has no cache, the whole
        conversation is prefilled and pruned; set `before.cache = None` to force that.
        """
        if not isinstance(sampling, Sampling | None):
            raise InputError(f"sampling is {brief(sampling)}; give Sampling(max_new_tokens=..., ...)")
        if not isinstance(before, Generation | None):
            raise InputError(f"before is {brief(before)}; give the Generation that this question follows")
        if backend not in BACKENDS:
            raise InputError(f"backend {backend!r} is unknown; use {', '.join(BACKENDS)}")
        if kv_dtype not in KV_DTYPES:
            raise InputError(f"kv_dtype {brief(kv_dtype)} is unknown; use {', '.join(KV_DTYPES)}")
        super().__init__(checkpoint, prompt, images, template, image_mode, anyres_order, system, before, frames)
        self.sampling, self.before, self._backend = sampling or Sampling(), before, backend
        self.compile, self.timed, self.remember, self.kv_dtype = compile, timed, remember, kv_dtype
        self.prune = choose_method(prune, checkpoint.folder)
        if self.prune:
            self.check_method(self.prune)
        self._begin()

    def check_method(self, prune: AnyMethod) -> None:
        """InputError if the method does not fit the model; adds a note if there is nothing to drop."""
        text = self.checkpoint.config.text_config
        try:
            prune.check(text.num_hidden_layers, text.num_key_value_heads)
            prune.layers(self.checkpoint.config.vision_config.num_hidden_layers)
        except ValueError as wrong:
            raise InputError(f"method {prune.name}: {wrong}") from wrong
        if prune.needs_cls and not self.checkpoint.config.vision_config.has_cls:
            keys = [key for key in prune.settings if key.endswith("key_share")]
            raise InputError(
                f"method {prune.name} needs the CLS token of the vision tower, and this tower has none; "
                f"use {f'{keys[0]}=0, ' if keys else ''}visionzip or fopru"
            )
        if prune.looks_ahead and self.checkpoint.lookahead is None:
            raise InputError(
                f"method {prune.name}: query=lookahead needs {LOOKAHEAD} in {self.checkpoint.folder}; train it with "
                "tools/train_lookahead.py, or use query=last"
            )
        if not self.vision_tokens:
            self.notes.append(f"there is no picture, so {prune.name} has nothing to drop")

    def again(self, method: AnyMethod | None) -> "Generation":
        """A new Generation of the same question with another pruning method, or None."""
        twin = copy.copy(self)
        twin.prune = method
        twin._begin()
        return twin

    @property
    def backend(self) -> str:
        """The kernel backend on the checkpoint's device: "triton" or "torch". InputError if it is not available."""
        if self.checkpoint.device.type == "meta":
            raise InputError("the checkpoint has no weights yet; call its read_weights(), or use load()")
        device, stored = self.checkpoint.device, KV_DTYPES[self.kv_dtype]
        if self.kv_dtype == "fp8" and self._backend != "torch" and not has_e4m3(device):
            raise InputError(f"{device} has no fp8 (float8_e4m3fn) for the kernels; use kv_dtype int8")
        try:
            return choose_backend(self._backend, device, self.checkpoint.dtype, stored=stored)
        except ValueError as wrong:
            raise InputError(str(wrong)) from wrong

    def _begin(self):
        """Reset to the state before the prefill."""
        self.text, self.token_ids, self.finish_reason = "", [], "interrupted"
        self.timing = {"vision": 0.0, "prefill": 0.0, "prune": 0.0, "steps": []}
        self.spans, self.cache, self.kept, self.bytes_held, self.masks = [], None, [], 0, None
        self.prefilled, self.absent, self.moved, self.pruned_for = 0, 0, 0, self.prompt
        self._origin = None  # `origins` of the prompt's tokens, if they moved up to the places of absent ones
        self.failure = None  # in a Batch: the exception that ended this generation
        self.cancelled = False
        self.limit = min(self.sampling.max_new_tokens, self.context_left)
        self._writer = Writer(self.checkpoint.tokenizer.stream(), self.sampling.stop)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[str]:
        self._begin()  # a second iteration generates the answer again
        writer = self._writer
        logits = self.prefill()
        choose = Chooser(self.sampling, self.checkpoint.never_ids, self.checkpoint.device)
        ids = choose(logits)  # (1,)
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

    def prefill(self) -> torch.Tensor:
        """Run the model on pictures and prompt and fill the cache -> logits (V,) of the first new token."""
        before, self.before = self.before, None  # its cache is taken only once; a second iteration prefills everything
        start, language = self._clock(), self.checkpoint.model.language_model
        if before is not None and before.goes_on and before.kv_dtype == self.kv_dtype:
            hidden, encoded = self._extend(before, language)
        else:
            hidden, encoded = self._fill(language)
        logits = language.logits(hidden[0, -1])
        self.bytes_held = self._total(self.cache.nbytes_held)
        self.timing["vision"], self.timing["prefill"] = encoded - start, self._clock() - encoded
        return logits

    def _fill(self, language):
        """Process the whole prompt and prune it -> final hidden states (1, T, C), end time of the vision tower."""
        tokens, picked, picking = self.pick_images(self.prune)
        x, spans = self.checkpoint.model.splice(self.ids, tokens)
        del tokens  # x has a copy
        encoded, self.prefilled, self.absent = self._clock() - picking, len(x), self.prompt_tokens - len(x)
        self.spans = spans_of(self.ids, self.checkpoint.config.image_token_index, [p.tokens for p in self.pictures])
        layers, slack = self.checkpoint.config.text_config.num_hidden_layers, min(self.limit, 64)
        if self.prune and self.prune.evicts and self.vision_tokens:
            slack = min(slack, self.prune.extra_tokens)
        cache = RaggedCache(layers, slack, self.backend, self.kv_dtype)
        lookahead = self.checkpoint.lookahead if self.prune and self.prune.looks_ahead else None
        pruning = self.prune and Pruning(
            self.prune, layers, spans, *after_picking(picked, self.places, lambda: self.contrast),
            ahead=lookahead.rows if lookahead else 0, backend=self.backend, timed=self.timed, remember=self.remember,
            protected=protected_of(picked, spans, x), embeddings=x, counts=self._counts,
            sides=[picture.layout.second for picture in self.pictures], share=self.checkpoint.share,
        )  # fmt: skip
        origin, positions, following = origins(picked, self.spans, self.prompt_tokens), None, None
        if self.prune and self.prune.picks and not self.prune.moves:
            positions, following = original_positions(origin).to(x.device), self.prompt_tokens
        if pruning:
            pruning.note(*(p.origin.to(x.device) for p in picked))
            if self.prune.picks:  # before collectives of other sizes
                gather_alike(self.checkpoint.share, x.new_zeros(1, 0, dtype=torch.int32), pruning.chosen)
        hidden = pruned_prefill(language, x, cache, pruning, lookahead, positions, following)
        self.moved = 0 if positions is not None else self.absent
        self._origin = origin if self.moved else None
        text = self.prompt_tokens - self.vision_tokens  # tokens that every head keeps
        lengths = gather_alike(self.checkpoint.share, cache.kv_len.T, pruning.chosen if pruning else 0)  # (Hkv, L)
        self.cache, self.kept = cache, [n - text for n in lengths.double().mean(0).tolist()]
        self.timing["prune"] = picking + pruning.seconds if pruning else 0.0
        if self.remember:
            everything = torch.ones(layers, len(lengths), len(x), dtype=torch.bool, device="cpu")
            masks = torch.stack(pruning.masks).cpu() if pruning else everything
            self.masks = unpicked(masks, origin, self.prompt_tokens)
        return hidden, encoded

    def pick_images(self, method: AnyMethod | None) -> tuple[Sequence[torch.Tensor], Sequence[Picked], float]:
        """-> lists of the vision tokens (P', C) and of the `Picked` of each picture that a method gives the language
        model, and the seconds that the choice took after the vision tower. InputError for a ValueError of the method.
        """
        if not (method and method.picks):
            return self.encode_images(), [Picked.all(picture.tokens) for picture in self.pictures], 0.0
        found, seconds = [], 0.0
        try:
            for number, picture in enumerate(self.pictures):
                view = look(method, self.checkpoint.model, picture, number, self._pixels(picture))
                start = self._clock()
                found.append(pick(method, view))
                seconds += self._clock() - start
        except ValueError as wrong:
            raise InputError(str(wrong)) from wrong
        tokens, picked = zip(*found, strict=True) if found else ((), ())
        return tokens, picked, seconds

    def _extend(self, before, language):
        """Like `_fill`, but only for the tokens missing from the cache of `before`; they attend to all of it."""
        cache, fed = before.cache, len(before.ids) + len(before.token_ids) - len(before.unfed)
        x, spans = self.checkpoint.model.splice(self.ids[fed:], self.encode_images(len(before.images)))
        first, self.absent, self.moved = before.vision_tokens - len(before.images) + fed, before.absent, before.moved
        encoded, self.prefilled = self._clock(), len(x)
        hidden = language.extend(x[None], cache)
        self.cache, before.cache = cache, None
        self.pruned_for = before.pruned_for
        self.spans = before.spans + [(first + a, first + b) for a, b in spans]
        self.kept = [kept + self.vision_tokens - before.vision_tokens for kept in before.kept]
        if before.masks is not None:
            layers, heads, known = before.masks.shape
            new = torch.ones(layers, heads, self.prompt_tokens - known, dtype=torch.bool)
            self.masks = torch.cat((before.masks, new), 2)
        self._origin = before._origin
        if cache.evicts:
            held = self._held()
            vision = torch.zeros(self.prompt_tokens, dtype=torch.bool, device="cpu")
            for start, stop in self.spans:
                vision[start:stop] = True
            self.kept = held[..., vision].sum(2).double().mean(1).tolist()
            self.masks = None if self.masks is None else held
        return hidden, encoded

    def _held(self):
        """(L, Hkv, tokens of the prompt) bool on the CPU: the tokens in the cache of a method that evicts."""
        shape = len(self.kept), self.cache.kv_len.shape[1], int(self.cache.pos)
        held = torch.zeros(shape, dtype=torch.bool, device="cpu")
        for layer, rows in enumerate(held):
            places, head = (t.cpu() for t in self.cache.positions(layer))
            rows[head, places] = True
        held = self.checkpoint.share.gather(held.transpose(0, 1)).transpose(0, 1)
        if self._origin is None:
            return held
        picked = len(self._origin)  # later tokens were all fed
        whole = unpicked(held[..., :picked], self._origin, picked + self.moved)
        return torch.cat((whole, held[..., picked:]), 2)

    @property
    def bytes_reserved(self) -> int:
        """Bytes of the cache with its free slots, in all processes together; after Ctrl-C only in this one."""
        own = self.cache.nbytes_reserved if self.cache else 0
        return self._total(own) if self.over else own

    def _total(self, count):
        """The sum of a number over the processes that share the model."""
        return int(self.checkpoint.share.total(torch.tensor(count, device=self.checkpoint.device)))

    def _clock(self):
        return clock(self.checkpoint.device, self.timed)

    def encode_images(self, first: int = 0) -> list[torch.Tensor]:
        """Vision tokens of the pictures from index `first` on, (P, C) each, in the checkpoint's dtype and device."""
        model, pictures = self.checkpoint.model, self.pictures[first:]
        counts = [len(picture.squares) for picture in pictures]
        tokens = self.checkpoint.share.each(model.encode_images, map(self._pixels, pictures), counts)
        return [model.join(squares, picture.layout) for squares, picture in zip(tokens, pictures, strict=True)]

    def _pixels(self, picture):
        return picture.pixels.to(self.checkpoint.device, self.checkpoint.dtype)

    @property
    def unfed(self) -> list[int]:
        """Ids of the answer that are not in the cache yet, because the model has not processed them."""
        return self.token_ids[self._fed :] if self.cache else []

    @property
    def goes_on(self) -> bool:
        """True if the cache holds exactly this prompt and part of its answer, so that another turn can extend it."""
        return self.cache is not None and 0 <= self._fed <= len(self.token_ids)

    @property
    def _fed(self):
        """Number of the answer's tokens in the cache."""
        return int(self.cache.pos[0]) + self.moved - self.prompt_tokens

    @property
    def retention(self) -> float:
        """Fraction kept of all (head, vision token) pairs; 1.0 before the prefill or without pictures."""
        total = len(self.kept) * self.vision_tokens
        return sum(self.kept) / total if total else 1.0

    @property
    def parts(self) -> list[dict]:
        """What each part of the method was asked to keep and kept: [{"method", "requested", "actual"}].

        Fractions of the vision tokens; in a composition, the second's are of those that the first left."""
        if not self.prune:
            return []
        names, asked = (part.name for part in self.prune.parts), self.prune.requested(self._counts, self._parts)
        picked = 1 - self.absent / max(1, self.vision_tokens)
        rows = zip(names, asked, self.prune.shares(picked, self.retention), strict=True)
        return [{"method": name, "requested": wanted, "actual": share} for name, wanted, share in rows]

    @property
    def _counts(self):
        return [image["tokens"] for image in self.images]

    @property
    def _parts(self):
        return [n for picture in self.pictures for n in picture.layout.parts]

    @property
    def wanted(self) -> float | None:
        """The requested fraction of vision tokens, or None; see `Method.wanted`."""
        return self.prune.wanted(self._counts, self._parts) if self.prune and self.images else None


def plain_step(language, cache, compile=False):
    """An unoptimised decode step: ids (B,) -> next logits (B, V). The optimised one is `model.fast.FastStep`."""
    if compile:
        raise InputError("a plain step is not compiled; use model.fast.FastStep")
    return partial(language.step, cache=cache)
