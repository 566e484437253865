"""One prompt, many caches: what several pruning methods make of the same prompt, and what follows from that.

The prompt is computed once. The caches that all methods make of it are joined into one ragged batch, in which every
sequence has been pruned in another way, and the same tokens are fed to all of them at once.
"""

import torch

from kernels import window_scores
from model.cache import RaggedCache
from model.generate import Layout, Pruner
from model.pruning.budget import by_kv_head


class Asked:
    """A prompt of T tokens and F more that are fed behind it, computed once without pruning.

    layers    per layer: q (1, Hq, W, D) of the prompt's last rows, down to the last picture, as far as any window
              reaches; k and v (1, Hkv, T, D) of the prompt; q_fed (1, Hq, F, D)
    logits    (F + 1, V) fp32, after the prompt and after each fed token
    layout    of the prompt
    others    what some controls rank by instead: {name: function () -> Asked or look-ahead rows}
    """

    def __init__(self, language, x, prompt, spans, lookahead=None, backend="auto", places=None, contrast=None):
        """x (T + F, C): embedded tokens, of which `prompt` = T are the prompt's; spans: [(start, stop)] of the tokens
        that may be pruned; lookahead: trained rows; places, contrast: of pictures, as `Generation` has them."""
        self.language, self.x, self.lookahead, self.backend = language, x, lookahead, backend
        self.tokens, self.fed, self.layers, self.others = prompt, x[prompt:], [], {}
        text = language.config
        heads = text.num_attention_heads, text.num_key_value_heads
        self.layout = Layout(
            text.num_hidden_layers, *heads, self.tokens, spans, self.x.device, places=places, contrast=contrast
        )
        hidden = language.prefill(x[None], self, choose=self._look)
        self.logits = language.logits(hidden[0, self.tokens - 1 :]).float()
        self._ahead = {}

    def rows(self, lookahead):
        """Per layer q (1, Hq, m, D) and k (1, Hkv, m, D) of look-ahead rows behind the prompt. Computed once."""
        if id(lookahead) not in self._ahead:
            t, found = self.tokens, []

            def look(layer, q, k, v):
                found.append((q[:, :, t:], k[:, :, t:]))

            self.language.prefill(self.x[None, :t], self, choose=look, lookahead=lookahead)
            self._ahead[id(lookahead)] = lookahead, found  # held, so that no other gets its id
        return self._ahead[id(lookahead)][1]

    def attention_of_rows(self, lookahead, layer):
        """(Hq, T): the attention that look-ahead rows pay to the prompt in a layer, mean over them."""
        q, own = self.rows(lookahead)[layer]
        k = torch.cat((self.layers[layer][1], own), 2)
        return window_scores(q[0], k[0], group="none", backend=self.backend)[:, : self.tokens]

    def attention_of_fed(self, layer, first=None):
        """(Hkv, T): the attention that the fed tokens pay to the prompt in a layer, mean over them and the group.

        first: only that many of them.
        """
        _, k, _, q = self.layers[layer]
        q = q[:, :, :first]
        end = torch.full((q.shape[2],), self.tokens - 1, device=q.device)
        return by_kv_head(window_scores(q[0], k[0], q_pos=end, group="none", backend=self.backend), self.layout)

    def _look(self, layer, q, k, v):
        """Remember a layer, keep all."""
        t, spans = self.tokens, self.layout.spans
        first = min(t - 1, spans[-1][1] if spans else 0)
        self.layers.append((q[:, :, first:t], k[:, :, :t], v[:, :, :t], q[:, :, t:]))

    def pack(self, layer, k, v, keep):
        """In the place of a cache: nothing is packed."""

    def cache(self, method):
        """What a method makes of the prompt.

        Returns its cache, what each layer kept as (Hkv, T) bool or None for all, and the logits (1, V) of the first new
        token, which a method that narrows the prompt changes.
        """
        cache = RaggedCache(self.layout.num_layers, slack=max(1, len(self.fed)), backend=self.backend)
        if method is not None and method.layer is not None:
            return self._narrowed(method, cache)
        lookahead = self.lookahead if method is not None and method.looks_ahead else None
        pruner = Pruner(method, self.layout, self.backend, ahead=lookahead.rows if lookahead else 0) if method else None
        keeps = []
        for layer, (q, k, v, _) in enumerate(self.layers):
            seen = q, k, v
            if lookahead is not None:
                seen = *(torch.cat(pair, 2) for pair in zip((q, k), self.rows(lookahead)[layer], strict=True)), v
            keep = pruner.choose(layer, *seen) if pruner else None
            keeps.append(keep)
            if keep is not None and getattr(method.rule, "only_values", False):  # an experiment of tools/controls.py
                v, keep = v * keep[None, ..., None], None
            cache.pack(layer, k, v, keep)
        return cache, keeps, self.logits[:1]

    def _narrowed(self, method, cache):
        """The prompt again, from the layer on at which tokens leave it."""
        pruner = Pruner(method, self.layout, self.backend, remember=True)
        language = self.language
        hidden = language.prefill(self.x[None, : self.tokens], cache, choose=pruner.choose, narrow=pruner.narrow)
        return cache, pruner.masks, language.logits(hidden[0, -1:]).float()


def asked_with(checkpoint, ids, image_tokens, fed, backend="auto", places=None, contrast=None):
    """Asked of a prompt's token ids, the image tokens (P, C) of each picture in it, and token ids that are fed."""
    x, spans = checkpoint.model.splice([*ids, *fed], image_tokens)
    language = checkpoint.model.language_model
    return Asked(language, x, len(x) - len(fed), spans, checkpoint.lookahead, backend, places, contrast)


def asked_by(generation, fed):
    """Asked of a Generation's prompt and pictures, with token ids that are fed behind it."""
    pictures, views = generation.encode_images(), (generation.places, generation.contrast)
    return asked_with(generation.checkpoint, generation.ids, pictures, fed, generation.backend, *views)


def replay(asked, methods):
    """Feed the same tokens behind what each of B methods kept.

    Returns logits (B, F + 1, V) fp32, kept: the fraction of vision rows each cache holds, keeps: B lists of a layer's
    (Hkv, T) bool or None.
    """
    caches, keeps, first = zip(*(asked.cache(method) for method in methods), strict=True)
    layout, segments = asked.layout, asked.layout.num_layers * asked.layout.kv_heads
    vision = sum(stop - start for start, stop in layout.spans)
    held = [cache.kv_len.sum().item() - segments * (layout.tokens - vision) for cache in caches]
    kept = [h / (segments * vision) if vision else 1.0 for h in held]
    logits = torch.stack(first)
    if len(asked.fed):
        language, cache = asked.language, RaggedCache.join(caches)
        hidden = language.extend(asked.fed.expand(len(methods), -1, -1), cache)
        logits = torch.cat((logits, language.logits(hidden).float()), 1)
    return logits, kept, keeps


@torch.inference_mode()
def along(reference, methods, batch=8):
    """How methods do along a finished, greedy, unpruned Generation: a `compare` for each, with `kept` and `steps`.

    batch: caches that are decoded together.
    """
    ended = not reference.unfed  # by the stop id: then that step counts too
    fed = reference.token_ids if ended else reference.token_ids[:-1]
    asked = asked_by(reference, fed)
    never = torch.tensor(reference.never(), dtype=torch.long, device=asked.x.device)
    full = asked.logits.index_fill(1, never, float("-inf"))
    ids, found = reference.token_ids + ([full[-1].argmax().item()] if ended else []), []
    for start in range(0, len(methods), batch):
        logits, kept, _ = replay(asked, methods[start : start + batch])
        for pruned, share in zip(logits, kept, strict=True):
            result = compare(full, pruned.index_fill(1, never, float("-inf")), ids)
            found.append({"steps": len(ids), "kept": share, **result})
    return found


def compare(full, pruned, ids):
    """How far pruned logits (F + 1, V) are from unpruned ones at the steps of the same greedy answer.

    ids: the answer, F + 1 long. Returns a dict: same, the share of its tokens that pruned logits would choose too;
    diverges, the index of the first that they would not, or None; kl, (F + 1,) nats from unpruned to pruned.
    """
    same = pruned.argmax(-1) == torch.tensor(ids, device=full.device)
    ours, theirs = full.log_softmax(-1), pruned.log_softmax(-1)
    gap = torch.where(ours == float("-inf"), 0, ours - theirs)  # ids that are never said count nothing
    wrong = (~same).nonzero()
    return {
        "same": same.float().mean().item(),
        "diverges": wrong[0].item() if len(wrong) else None,
        "kl": (ours.exp() * gap).sum(-1).clamp(min=0),
    }
