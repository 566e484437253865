"""One prompt, many caches: apply several pruning methods to the same prompt and compare the logits that follow.

The prompt is computed once. Each method packs its own cache; all caches are joined into one ragged batch, in which each
sequence is pruned differently, and the same tokens are fed to all of them at once.
"""

import torch

from kernels import dequantised, quantise, window_scores
from model.batch import join
from model.cache import RaggedCache
from model.config import InputError
from model.picture import after_picking, original_positions, origins, protected_of, unpicked
from model.pruning.budget import by_kv_head
from model.pruning.plphp import gamma
from model.report import compare
from model.view import Pruning, pruned_prefill


class Asked:
    """A prompt of T tokens followed by F fed tokens, computed once without pruning.

    layers    per layer: q (1, Hq, W, D) of the prompt's rows after the last picture, the most that any window covers;
              k and v (1, Hkv, T, D) of the prompt; q_fed (1, Hq, F, D)
    logits    (F + 1, V) fp32, after the prompt and after each fed token
    spans     [(start, stop)] of the tokens that may be pruned
    pick      function (method) -> tokens and `Picked` of each picture, for methods that act before the language model
    sides     for each picture the first row of the map of its tiles in its places, or None; None if not known
    others    alternative rankings for some controls: {name: function () -> Asked or look-ahead rows}
    """

    def __init__(self, language, x, prompt, spans, lookahead=None, backend="auto", places=None, contrast=None):
        """x (T + F, C): embedded tokens; prompt: T; spans: [(start, stop)] of the tokens that may be pruned; lookahead:
        trained rows; places, contrast: of the pictures, as in `Generation`."""
        self.language, self.x, self.lookahead, self.backend = language, x, lookahead, backend
        self.tokens, self.fed, self.layers, self.others = prompt, x[prompt:], [], {}
        self.spans, self.places, self.contrast = spans, places, contrast
        self.pick = self.sides = None
        self.num_layers, self.kv_heads = language.config.num_hidden_layers, language.config.num_key_value_heads
        hidden = language.prefill(x[None], prune=self._look)
        self.logits = language.logits(hidden[0, self.tokens - 1 :]).float()
        self._ahead = {}

    def rows(self, lookahead):
        """Per layer q (1, Hq, m, D) and k (1, Hkv, m, D) of look-ahead rows after the prompt. Computed once."""
        if id(lookahead) not in self._ahead:
            t, found = self.tokens, []

            def look(layer, q, k, v, *_):
                found.append((q[:, :, t:], k[:, :, t:]))
                return None, None

            self.language.prefill(self.x[None, :t], prune=look, lookahead=lookahead)
            self._ahead[id(lookahead)] = lookahead, found  # the reference keeps the id from being reused
        return self._ahead[id(lookahead)][1]

    def attention_of_rows(self, lookahead, layer):
        """(Hq, T): attention of the look-ahead rows to the prompt in a layer, mean over the rows."""
        q, own = self.rows(lookahead)[layer]
        k = torch.cat((self.layers[layer][1], own), 2)
        return window_scores(q[0], k[0], group="none", backend=self.backend)[:, : self.tokens]

    def attention_of_fed(self, layer, first=None):
        """(Hkv, T): attention of the fed tokens to the prompt in a layer, mean over these tokens and the group.

        first: number of fed tokens to use, from the start; None: all.
        """
        _, k, _, q = self.layers[layer]
        q = q[:, :, :first]
        end = torch.full((q.shape[2],), self.tokens - 1, device=q.device)
        return by_kv_head(window_scores(q[0], k[0], q_pos=end, group="none", backend=self.backend), self.kv_heads)

    def _look(self, layer, q, k, v, *_):
        """Store a layer's tensors; prune nothing."""
        t = self.tokens
        first = min(t - 1, self.spans[-1][1] if self.spans else 0)
        self.layers.append((q[:, :, first:t], k[:, :, :t], v[:, :, :t], q[:, :, t:]))
        return None, None

    def cache(self, method):
        """Prune the prompt with a method.

        Returns the cache, each layer's keep mask as (Hkv, T) bool or None for all, and the logits (1, V) of the first
        new token. Only methods that narrow the prompt change these logits.
        """
        cache = RaggedCache(self.num_layers, slack=max(1, len(self.fed)), backend=self.backend)
        lookahead = self.lookahead if method is not None and method.looks_ahead else None
        pruning = method and Pruning(
            method, self.num_layers, self.spans, self.places, self.contrast and (lambda: self.contrast),
            lookahead.rows if lookahead else 0, self.backend, remember=method.narrows, embeddings=self.x[: self.tokens],
            sides=self.sides,
        )  # fmt: skip
        if method is not None and method.picks:
            return self._picked(method, cache, lookahead)
        if method is not None and (method.narrows or method.compacts or method.evicts):
            return self._narrowed(pruning, cache, lookahead)
        keeps = []
        for layer, (q, k, v, _) in enumerate(self.layers):
            seen = q, k, v
            if lookahead is not None:
                seen = *(torch.cat(pair, 2) for pair in zip((q, k), self.rows(lookahead)[layer], strict=True)), v
            keep, _ = pruning(layer, *seen) if pruning else (None, None)
            keeps.append(keep)
            if keep is not None and getattr(method.rule, "only_values", False):  # an experiment, see controls.py
                v, keep = v * keep[None, ..., None], None
            if codes := getattr(method and method.rule, "codes", None):  # likewise
                k, v = (dequantised(*quantise(rows, codes), rows.dtype) for rows in (k, v))
            cache.pack(layer, k, v, keep)
        return cache, keeps, self.logits[:1]

    def _narrowed(self, pruning, cache, lookahead):
        """As `cache`, for methods that change the prefill or act after it: run the whole prompt again."""
        language = self.language
        hidden = pruned_prefill(language, self.x[: self.tokens], cache, pruning, lookahead)
        return cache, pruning.masks, language.logits(hidden[0, -1:]).float()

    def _picked(self, method, cache, lookahead):
        """As `cache`, for methods that change the vision tokens: run the prompt with these. The masks are those of the
        whole prompt."""
        if self.pick is None:
            raise InputError(f"method {method.name} needs the pictures, and there are none here; use another method")
        tokens, picked = self.pick(method)
        x, spans = respliced(self.x[: self.tokens], self.spans, tokens)
        pruning = Pruning(
            method, self.num_layers, spans, *after_picking(picked, self.places, lambda: self.contrast),
            lookahead.rows if lookahead else 0, self.backend, remember=True, protected=protected_of(picked, spans, x),
            embeddings=x, counts=[stop - start for start, stop in self.spans], sides=self.sides,
        )  # fmt: skip
        origin = origins(picked, self.spans, self.tokens)
        positions = None if method.moves else original_positions(origin).to(x.device)
        following = None if method.moves else self.tokens
        hidden = pruned_prefill(self.language, x, cache, pruning, lookahead, positions, following)
        masks = unpicked(torch.stack(pruning.masks).cpu(), origin, self.tokens)
        return cache, [*masks.to(x.device)], self.language.logits(hidden[0, -1:]).float()


def respliced(x, spans, tokens):
    """x (T, C) with other tokens (P', C) in the place of each span -> (T', C), their spans."""
    pieces, new, end, length = [], [], 0, 0
    for (start, stop), mine in zip(spans, tokens, strict=True):
        pieces += [x[end:start], mine.to(x.dtype)]
        length, end = length + start - end, stop
        new.append((length, length + len(mine)))
        length += len(mine)
    return torch.cat([*pieces, x[end:]]), new


def asked_with(checkpoint, ids, image_tokens, fed, backend="auto", places=None, contrast=None):
    """Asked from a prompt's token ids, the image tokens (P, C) of each of its pictures, and the token ids to feed."""
    x, spans = checkpoint.model.splice([*ids, *fed], image_tokens)
    language = checkpoint.model.language_model
    return Asked(language, x, len(x) - len(fed), spans, checkpoint.lookahead, backend, places, contrast)


def asked_by(generation, fed):
    """Asked from a Generation's prompt and pictures, and the token ids to feed after it."""
    pictures, views = generation.encode_images(), (generation.places, generation.contrast)
    asked = asked_with(generation.checkpoint, generation.ids, pictures, fed, generation.backend, *views)
    asked.pick = lambda method: generation.pick_images(method)[:2]
    asked.sides = [picture.layout.second for picture in generation.pictures]
    return asked


def replay(asked, methods):
    """Feed the same tokens to the caches of B methods.

    Returns logits (B, F + 1, V) fp32; kept: the fraction of vision rows in each cache; keeps: for each method a list of
    (Hkv, T) bool or None per layer.
    """
    caches, keeps, first = zip(*(asked.cache(method) for method in methods), strict=True)
    segments, vision = asked.num_layers * asked.kv_heads, sum(stop - start for start, stop in asked.spans)
    held = [cache.kv_len.sum().item() - segments * (asked.tokens - vision) for cache in caches]
    kept = [h / (segments * vision) if vision else 1.0 for h in held]
    logits = torch.stack(first)
    if len(asked.fed):
        language, cache = asked.language, join(caches)
        hidden = language.extend(asked.fed.expand(len(methods), -1, -1), cache, answer=True)
        logits = torch.cat((logits, language.logits(hidden).float()), 1)
    return logits, kept, keeps


@torch.inference_mode()
def along(reference, methods, batch=8):
    """Compare methods along a finished, greedy, unpruned Generation: per method `compare`, plus `kept` and `steps`.

    batch: number of caches decoded together.
    """
    ended = not reference.unfed  # by the stop id; that step counts too
    fed = reference.token_ids if ended else reference.token_ids[:-1]
    asked = asked_by(reference, fed)
    never = torch.tensor(reference.checkpoint.never_ids, dtype=torch.long, device=asked.x.device)
    full = asked.logits.index_fill(1, never, float("-inf"))
    ids, found = reference.token_ids + ([full[-1].argmax().item()] if ended else []), []
    for start in range(0, len(methods), batch):
        logits, kept, _ = replay(asked, methods[start : start + batch])
        for pruned, share in zip(logits, kept, strict=True):
            result = compare(full, pruned.index_fill(1, never, float("-inf")), ids)
            found.append({"steps": len(ids), "kept": share, **result})
    return found


def gammas_of(asked, lookahead=None):
    """gamma of every layer: attention of the prompt's last row, or of look-ahead rows, to pictures; mean over heads."""
    if lookahead is not None:
        return [gamma(asked.attention_of_rows(lookahead, i), asked.spans) for i in range(asked.num_layers)]
    return [gamma(window_scores(q[0, :, -1:], k[0], group="none"), asked.spans) for q, k, _, _ in asked.layers]


def terciles(gammas):
    """(alpha, beta) of PLPHP: with them a third of the layers keeps more and a third less, so the mean is as wanted."""
    ordered = sorted(gammas)
    return round(ordered[2 * len(ordered) // 3], 3), round(ordered[len(ordered) // 3], 3)


def three_rates(thresholds):
    """Settings of PLPHP for fitted (alpha, beta), in the words of a SPEC."""
    return f"alpha={thresholds[0]},beta={thresholds[1]},skip=0"
