"""Ask a loaded checkpoint something: prompt and pictures in, pieces of text out as they are written."""

import copy
import time
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from kernels import window_scores
from kernels.backend import choose_backend

from .cache import RaggedCache
from .config import InputError
from .image import normalise, read_image, to_square, with_mode
from .llama import DecoderLayer, rope_turns
from .tokenizer import TEMPLATES, Detokenizer, build_prompt


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when the answer ends."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_k: int = None
    top_p: float = None
    seed: int = 0
    stop: tuple = ()  # strings that end the answer; they are not part of it


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

    @cached_property
    def text(self):
        """(T,) bool: what is not a picture's."""
        mask = torch.ones(self.tokens, dtype=torch.bool, device=self.device)
        for start, stop in self.spans:
            mask[start:stop] = False
        return mask


class Pruner:
    """Asks a method about the layers of one prefill: what a layer's attention says goes in, what is kept comes out.

    kept      vision tokens that a KV head of each layer keeps, averaged over its heads; tensors or numbers
    layout    of the prompt as the current layer sees it
    seconds   spent on scoring and choosing
    """

    def __init__(self, method, layout, backend="auto"):
        self.method, self.layout, self.backend = method, layout, backend
        self.kept, self.seconds = [], 0.0

    def choose(self, layer, q, k, v):
        """Which rows of k and v (1, Hkv, T, D) each head keeps, after q (1, Hq, T, D): (Hkv, T) bool, None for all."""
        start, keep = time.perf_counter(), None
        if self.layout.spans and self.method.wants(layer, self.layout.num_layers):
            _wait(k.device)
            start = time.perf_counter()
            layout = self._guarded(q, k)
            if self.method.settings.get("values"):
                layout = replace(layout, norms=v[0].float().norm(1, dim=-1))
            if getattr(self.method.rule, "wants_last_row", False):
                layout = replace(layout, last=self._scores(q, k, 1))
            keep = self._heed(self.method.choose, layer, self._scores(q, k, self.method.window), layout)
            _wait(k.device)
        vision, heads = sum(b - a for a, b in self.layout.spans), self.layout.kv_heads
        # text is always kept
        self.kept.append(vision if keep is None else keep.sum() / heads - (self.layout.tokens - vision))
        self.seconds += time.perf_counter() - start
        return keep

    def narrow(self, layer, q, k, v):
        """Which tokens go on to the layers after this one: indices (T',), ascending, or None for all."""
        if not self.layout.spans or self.method.layer != layer + 1:
            return None
        _wait(k.device)
        start = time.perf_counter()
        keep = self._heed(self.method.narrow, self._scores(q, k, self.method.window), self._guarded(q, k))
        rows = keep.nonzero()[:, 0]
        before = [0, *keep.cumsum(0).tolist()]
        spans = [(before[a], before[b]) for a, b in self.layout.spans]
        self.layout = replace(self.layout, tokens=len(rows), spans=spans)
        self.seconds += time.perf_counter() - start
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
        return window_scores(q[0, :, -rows:], k[0], group="none", backend=self.backend) if rows else None

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
    prompt_tokens, vision_tokens, images [{"path", "size", "tiles", "tokens"}]    what was asked, pictures expanded
    spans          [(start, stop)] of the pictures among the prompt's tokens
    cache          the RaggedCache
    kept           vision tokens that a KV head keeps, one number per layer, averaged over the layer's heads
    bytes_held     K and V bytes of the prompt rows that were kept
    timing         seconds: vision, prefill, prune (a part of prefill), and steps, one entry per decode step (the first
                   token comes from prefill)
    """

    def __init__(
        self, checkpoint, prompt, images=(), sampling=None, template="auto", image_mode="auto", system=None,
        prune=None, backend="auto", compile=False,
    ):  # fmt: skip
        """prompt: the question; images: paths, "-", data: URIs or PIL images, in the order of their `<image>`.

        prune: what chooses the tokens that each head keeps (`model.pruning.make_method`), None to keep all; backend:
        of the kernels; compile: the decode step, see `DecodeStep`.
        """
        self.checkpoint, self.sampling = checkpoint, sampling or Sampling()
        self.prune, self.backend, self.compile = prune, backend, compile
        self.template = checkpoint.template if template == "auto" else template
        if self.template not in TEMPLATES or image_mode not in ("auto", "crop", "pad"):
            raise InputError(
                f"template {self.template!r} or image mode {image_mode!r} is unknown; use {TEMPLATES}, crop or pad"
            )
        self.image_settings = with_mode(checkpoint.image_settings, image_mode)
        config = checkpoint.config
        text = build_prompt(prompt, len(images), self.template, system)
        self.ids = checkpoint.tokenizer.encode(text)
        pictures = [read_image(i) for i in images]
        self.notes = [p.note for p in pictures if p.note]
        tokens = config.image_tokens
        self.images = [{"path": p.path, "size": list(p.image.size), "tiles": 1, "tokens": tokens} for p in pictures]
        self.vision_tokens = len(images) * tokens
        self.prompt_tokens = len(self.ids) - len(images) + self.vision_tokens
        self.room = config.text_config.max_position_embeddings - self.prompt_tokens  # for new tokens
        if self.room < 1:
            raise InputError(
                f"the prompt needs {self.prompt_tokens} tokens, {self.vision_tokens} of them for {len(images)} "
                "images, and the model's context is "
                f"{config.text_config.max_position_embeddings}; use fewer images or a shorter prompt"
            )
        if prune:
            self.check_method(prune)
        self.squares = [to_square(p.image, self.image_settings) for p in pictures]
        self._begin()

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
        if not self.vision_tokens:
            self.notes.append(f"there is no picture, so {prune.name} has nothing to drop")

    @property
    def pixels(self):
        """Pixel values of the pictures, (3, S, S) fp32 each; made anew, so that no tensor outlives its use."""
        return [normalise(square, self.image_settings) for square in self.squares]

    def encode_images(self):
        """The pictures' tokens, (n, P, C), or nothing."""
        if not self.squares:
            return ()
        pixels = torch.stack(self.pixels).to(self.checkpoint.device, self.checkpoint.dtype)
        return self.checkpoint.model.encode_images(pixels)

    @property
    def way(self):
        """What the backend comes to where the checkpoint is: "triton" or "torch"."""
        return choose_backend(self.backend, self.checkpoint.device, self.checkpoint.dtype)

    @property
    def unfed(self):
        """Ids of the answer that the cache has not seen: a last token was chosen, but nothing came after it."""
        return self.token_ids[int(self.cache.pos[0]) - self.prompt_tokens :] if self.cache else []

    def _begin(self):
        """Nothing said yet."""
        self.text, self.token_ids, self.finish_reason = "", [], "interrupted"
        self.timing = {"vision": 0.0, "prefill": 0.0, "prune": 0.0, "steps": []}
        self.spans, self.cache, self.kept, self.bytes_held = [], None, [], 0

    @torch.inference_mode()
    def __iter__(self):
        self._begin()  # iterating again gives the answer again
        sampling, tokenizer = self.sampling, self.checkpoint.tokenizer
        limit = min(sampling.max_new_tokens, self.room)
        choose = _chooser(sampling, self.never(), self.checkpoint.device)
        ids = choose(self._prefill(limit))
        step = DecodeStep(self.checkpoint.model.language_model, self.cache, self.compile)
        writer = _Writer(Detokenizer(tokenizer), sampling.stop)
        while len(self.token_ids) < limit:
            token = _read(ids)
            if token in self.checkpoint.stop_ids:
                self.finish_reason = "stop"
                break
            self.token_ids.append(token)
            piece = writer.push(token)
            self.text += piece
            if piece:
                yield piece
            if writer.stopped:
                self.finish_reason = "stop"
                return
            if len(self.token_ids) < limit:
                start = time.perf_counter()
                ids = choose(step(ids)[0])
                ids.tolist()  # reading them is what waits for the device
                self.timing["steps"].append(time.perf_counter() - start)
        else:
            self.finish_reason = "length"
        rest = writer.flush()
        self.text += rest
        if rest:
            yield rest

    def _prefill(self, limit):
        """Pictures and prompt through the model, the cache filled -> logits (V,) of the first new token."""
        model = self.checkpoint.model
        start = time.perf_counter()
        x, self.spans = model.splice(self.ids, self.encode_images())
        _wait(self.checkpoint.device)
        self.timing["vision"] = time.perf_counter() - start
        start = time.perf_counter()
        config = self.checkpoint.config.text_config
        self.cache = RaggedCache(config.num_hidden_layers, slack=min(limit, 64), backend=self.backend)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        layout = Layout(layers, heads, config.num_key_value_heads, len(x), self.spans, x.device)
        pruner = Pruner(self.prune, layout, self.backend) if self.prune else None
        asked = {"choose": pruner.choose, "narrow": pruner.narrow} if pruner else {}
        hidden = model.language_model.prefill(x[None], self.cache, **asked)
        logits = model.language_model.logits(hidden[0, -1])
        self.bytes_held = self.cache.nbytes_held
        self.kept = [float(n) for n in pruner.kept] if pruner else [float(self.vision_tokens)] * layers
        _wait(self.checkpoint.device)
        self.timing["prefill"] = time.perf_counter() - start
        self.timing["prune"] = pruner.seconds if pruner else 0.0
        return logits

    def never(self):
        """Ids that must not be said: rows of the embedding that stand for no token, `<image>` and `<pad>`."""
        tokenizer, config = self.checkpoint.tokenizer, self.checkpoint.config
        named = [tokenizer.added[t] for t in ("<image>", "<pad>") if t in tokenizer.added]
        ids = tokenizer.unreachable_ids(config.text_config.vocab_size) + named
        return [i for i in ids if i < config.text_config.vocab_size and i not in self.checkpoint.stop_ids]


class DecodeStep:
    """One more token of each of B sequences into their cache: ids (B,) on its device -> logits (B, V) of the next.

    With Triton's kernels on CUDA a step is a captured graph: hundreds of launches become one. It is captured again when
    the arenas have moved. The first step after that runs as it is, which also compiles the kernels.
    """

    def __init__(self, language, cache, compile=False):
        """compile: let torch.compile join the small operations between the products; the first step takes long."""
        self.language, self.cache = language, cache
        self.turns = rope_turns(language.config, cache.pos.device)
        halves = DecoderLayer.before_attention, DecoderLayer.after_attention
        self.halves = tuple(torch.compile(half, dynamic=False) for half in halves) if compile else halves
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
        return self.language.logits(self.language.decode(x, self.cache, self.turns, self.halves))

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


def ask(checkpoint, prompt, images=(), **options):
    """The whole answer as a string. options: fields of Sampling."""
    generation = Generation(checkpoint, prompt, images, Sampling(**options))
    return "".join(generation)


@torch.inference_mode()
def next_turn(checkpoint, cache, ids, pixels=()):
    """Feed a new turn behind what a cache has kept, without computing the past again -> logits (V,) of the next token.

    ids: token ids that the cache has not seen, one image placeholder per picture: `unfed` of the answer before, what
    the template puts between the turns, the question. pixels: (3, S, S) each. The cache, of one sequence, takes all of
    the new tokens; `Llama.decode` goes on from there, under inference_mode as here.
    """
    if not len(ids):
        raise InputError("the turn has no tokens; give the ids of a question")
    model = checkpoint.model
    tokens = ()
    if len(pixels):
        tokens = model.encode_images(torch.stack(list(pixels)).to(checkpoint.device, checkpoint.dtype))
    x, _ = model.splice(ids, tokens)
    room = checkpoint.config.text_config.max_position_embeddings - int(cache.pos[0])
    if len(x) > room:
        raise InputError(f"the turn needs {len(x)} tokens, the context has room for {room}; start a new conversation")
    return model.language_model.logits(model.language_model.extend(x[None], cache)[0, -1])


def _wait(device):
    """Let a CUDA device finish, so that the clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _chooser(sampling, never, device):
    """Function logits (V,) -> next id (1,), on their device; -1 if they are not finite."""
    never = torch.tensor(never, dtype=torch.long, device=device)
    generator = torch.Generator(device).manual_seed(sampling.seed)

    def choose(logits):
        """logits (V,) -> id (1,)."""
        logits = logits.float().index_fill(0, never, float("-inf"))
        best, token = logits.max(-1)
        finite = best.isfinite()  # the maximum of anything with a NaN is NaN
        if sampling.temperature > 0:
            weights = probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
            noise = torch.empty_like(weights).exponential_(generator=generator)
            token = (weights / noise).argmax(-1)  # what multinomial does, without waiting to check its weights
        return torch.where(finite, token, -1)[None]

    return choose


def _read(ids):
    """The id in ids (1,): the one thing that is read from the device. RuntimeError for that of broken logits."""
    token = ids.item()
    if token < 0:
        raise RuntimeError("the model produced NaN or infinity; try --dtype fp32 or bf16")
    return token


def probabilities(logits, temperature, top_k=None, top_p=None):
    """Softmax of logits (V,) / temperature over the top_k best, then over the smallest set holding top_p of the rest.

    top_p (nucleus sampling, arXiv 1904.09751) always keeps the best token, also when it alone exceeds top_p.
    """
    logits = (logits - logits.max()) / temperature  # the shift keeps a tiny temperature finite
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], float("-inf"))
    if top_p is not None and top_p < 1:
        sorted_logits, order = logits.sort(descending=True)
        weights = sorted_logits.softmax(-1)
        before = weights.cumsum(-1) - weights  # mass of everything better
        rest = torch.zeros_like(order, dtype=torch.bool).scatter_(0, order, before >= top_p)
        logits = logits.masked_fill(rest, float("-inf"))
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
