"""One prompt, many caches: what several pruning methods make of the same prompt, and what follows from that.

The prompt is computed once. The caches that all methods make of it are joined into one ragged batch, in which every
sequence has been pruned in another way, and the same tokens are fed to all of them at once.
"""

import torch

from kernels import window_scores
from model.cache import RaggedCache
from model.generate import Layout, Pruner
from model.pruning.budget import by_kv_head

ROWS = 64  # of a prompt's end whose queries are remembered: no method's window is larger


class Asked:
    """A prompt of T tokens and F more that are fed behind it, computed once without pruning.

    layers    per layer: q (1, Hq, <= ROWS, D) of the prompt's last rows, k and v (1, Hkv, T, D) of the prompt, and
              q_fed (1, Hq, F, D)
    logits    (F + 1, V) fp32, after the prompt and after each fed token
    layout    of the prompt
    """

    def __init__(self, checkpoint, ids, image_tokens, fed, backend="auto"):
        self.checkpoint, self.backend = checkpoint, backend
        model, text = checkpoint.model, checkpoint.config.text_config
        self.x, spans = model.splice([*ids, *fed], image_tokens)
        self.tokens, self.fed, self.layers = len(self.x) - len(fed), self.x[len(self.x) - len(fed) :], []
        self.layout = Layout(
            text.num_hidden_layers,
            text.num_attention_heads,
            text.num_key_value_heads,
            self.tokens,
            spans,
            self.x.device,
        )
        hidden = model.language_model.prefill(self.x[None], self, choose=self._look)
        self.logits = model.language_model.logits(hidden[0, self.tokens - 1 :]).float()

    def attention_of_fed(self, layer):
        """(Hkv, T): the attention that the fed tokens pay to the prompt in a layer, mean over them and the group."""
        _, k, _, q = self.layers[layer]
        end = torch.full((q.shape[2],), self.tokens - 1, device=q.device)
        return by_kv_head(window_scores(q[0], k[0], q_pos=end, group="none", backend=self.backend), self.layout)

    def _look(self, layer, q, k, v):
        """Remember a layer, keep all."""
        t = self.tokens
        self.layers.append((q[:, :, max(0, t - ROWS) : t], k[:, :, :t], v[:, :, :t], q[:, :, t:]))

    def pack(self, layer, k, v, keep):
        """In the place of a cache: nothing is packed."""

    def cache(self, method):
        """What a method makes of the prompt: its cache, and what each layer kept, (Hkv, T) bool or None for all."""
        if method is None or method.layer is None:
            return self._packed(method)
        pruner, dropped = Pruner(method, self.layout, self.backend), {}

        def narrow(layer, q, k, v):
            rows = pruner.narrow(layer, q, k, v)
            if rows is not None:
                mask = torch.zeros(self.tokens, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
                dropped[layer] = mask.expand(self.layout.kv_heads, -1)
            return rows

        language, cache = self.checkpoint.model.language_model, self._empty()
        hidden = language.prefill(self.x[None, : self.tokens], cache, choose=pruner.choose, narrow=narrow)
        self.narrowed = language.logits(hidden[0, -1:]).float()
        (first, mask), *_ = dropped.items()
        return cache, [None if layer <= first else mask for layer in range(self.layout.num_layers)]

    def _packed(self, method):
        cache, keeps = self._empty(), []
        pruner = Pruner(method, self.layout, self.backend) if method else None
        for layer, (q, k, v, _) in enumerate(self.layers):
            keep = pruner.choose(layer, q, k, v) if pruner else None
            if getattr(getattr(method, "rule", None), "only_values", False):  # an experiment, see tools/controls.py
                cache.pack(layer, k, v * keep[None, ..., None])
            else:
                cache.pack(layer, k, v, keep)
            keeps.append(keep)
        return cache, keeps

    def _empty(self):
        return RaggedCache(self.layout.num_layers, slack=max(1, len(self.fed)), backend=self.backend)


def replay(asked, methods):
    """Feed the same tokens behind what each of B methods kept.

    Returns logits (B, F + 1, V) fp32, kept: the fraction of vision rows each cache holds, keeps: B lists of a layer's
    (Hkv, T) bool or None.
    """
    layout, caches, keeps, first = asked.layout, [], [], []
    vision = sum(stop - start for start, stop in layout.spans)
    for method in methods:
        cache, kept = asked.cache(method)
        caches.append(cache)
        keeps.append(kept)
        first.append(asked.logits[:1] if method is None or method.layer is None else asked.narrowed)
    segments = layout.num_layers * layout.kv_heads
    held = [cache.kv_len.sum().item() - segments * (layout.tokens - vision) for cache in caches]
    logits = torch.stack(first)
    if len(asked.fed):
        cache = RaggedCache.join(caches)
        language = asked.checkpoint.model.language_model
        hidden = language.extend(asked.fed.expand(len(methods), -1, -1), cache)
        logits = torch.cat((logits, language.logits(hidden).float()), 1)
    return logits, [h / max(1, segments * vision) for h in held], keeps


def against_unpruned(generation):
    """Ask the same as a finished, pruned, greedy Generation without pruning, and see where the two part.

    Returns (the unpruned Generation, a dict): `compare` of the pruned model's logits along the unpruned answer, its end
    included, and steps, how many those are.
    """
    reference = generation.unpruned()
    "".join(reference)
    checkpoint, ended = generation.checkpoint, reference.finish_reason == "stop"
    with torch.inference_mode():
        tokens = ()
        if reference.squares:
            pixels = torch.stack(reference.pixels).to(checkpoint.device, checkpoint.dtype)
            tokens = checkpoint.model.encode_images(pixels)
        fed = reference.token_ids if ended else reference.token_ids[:-1]
        asked = Asked(checkpoint, reference.ids, tokens, fed, generation.backend)
        pruned, _, _ = replay(asked, [generation.prune])
        never = torch.tensor(reference.never(), dtype=torch.long, device=pruned.device)
        full, pruned = (x.index_fill(1, never, float("-inf")) for x in (asked.logits, pruned[0]))
        ids = reference.token_ids + ([full[-1].argmax().item()] if ended else [])
        return reference, {"steps": len(ids), **compare(full, pruned, ids)}


def compare(full, pruned, ids):
    """How far pruned logits (F + 1, V) are from unpruned ones at the steps of the same greedy answer.

    ids: the answer, F + 1 long. Returns a dict: same, the share of its tokens that pruned logits would choose too;
    diverges, the index of the first that they would not, or None; kl, (F + 1,) nats from unpruned to pruned.
    """
    same = pruned.argmax(-1) == torch.tensor(ids, device=full.device)
    ours, theirs = full.log_softmax(-1), pruned.log_softmax(-1)
    wrong = (~same).nonzero()
    return {
        "same": same.float().mean().item(),
        "diverges": wrong[0].item() if len(wrong) else None,
        "kl": (ours.exp() * (ours - theirs).nan_to_num(0)).sum(-1).clamp(min=0),  # ids that are never said: -inf - -inf
    }
