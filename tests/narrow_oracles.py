"""Methods that drop tokens at several depths, computed again: transformers' decoder with the attention written out and
masks that hide the dropped tokens, the rules in loops. Nothing here imports the model.

A rule has `before(layer, weights)` and `after(layer, weights)`: which tokens of the prompt are hidden from this layer
on, or from the next one on, a list of indices. weights (H, T, T) float64: the layer's attention among those that are
not hidden yet. `held(seen)`: what decoded tokens see in each layer; seen: per layer a set of tokens of the prefill.
"""

import math

import torch


class Rule:
    def before(self, layer, weights):
        return []

    def after(self, layer, weights):
        return []

    def held(self, seen):
        return seen


def hide(decoder, tokens, rule):
    """Give a transformers decoder attention with masks by a rule -> a dict, filled later: {layer: tokens held}."""
    import transformers

    hidden, seen, held = set(), {}, {}

    def softmax(scores):
        n = scores.shape[-1]
        allowed = torch.ones(n, n).tril().bool() & ~torch.tensor([i in hidden for i in range(n)])
        allowed |= torch.eye(n, dtype=torch.bool)  # a hidden row attends to itself: a softmax needs a key
        return (scores + torch.zeros(n, n).masked_fill(~allowed, float("-inf"))).softmax(-1)

    def attend(module, query, key, value, mask, scaling, **_):
        """query (1, H, T, D), key and value (1, Hkv, N, D)."""
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scores, layer = query @ key.transpose(2, 3) * scaling, module.layer_idx
        if query.shape[2] == tokens:
            hidden.update(rule.before(layer, softmax(scores)[0].double()))
            weights = softmax(scores)
            seen[layer] = set(range(tokens)) - hidden
            hidden.update(rule.after(layer, weights[0].double()))
        else:
            held.update(held or rule.held(seen))
            gone = [i for i in range(tokens) if i not in held[layer]]
            scores[..., gone] = float("-inf")
            weights = scores.softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("hidden", attend)
    decoder.set_attn_implementation("hidden")
    return held


def answer(hf, ids, image_id, pictures, count, never, rule):
    """transformers' logits after a prompt whose pictures are these embeddings (each (P', C)), its greedy ids, and the
    tokens of the prompt that each layer holds while decoding."""
    embed, pictures = hf.get_input_embeddings(), iter(pictures)
    x = torch.cat([next(pictures) if i == image_id else embed(torch.tensor([i])) for i in ids])[None]
    held = hide(hf.model.language_model, x.shape[1], rule)
    out = hf.generate(
        inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long), max_new_tokens=count,
        do_sample=False, eos_token_id=None, suppress_tokens=never, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.logits[0][0], out.sequences[0].tolist(), [held[layer] for layer in sorted(held)]


def amount(tokens, fraction):
    """At least one token; half is rounded up."""
    return max(1, min(tokens, math.floor(fraction * tokens + 0.5)))


class PyramidDrop(Rule):
    """Before a layer of {layer: fraction}, the most attended of each picture stay, or of all pictures together."""

    def __init__(self, spans, fractions, together=False):
        spans = [range(*span) for span in spans]
        self.pots, self.fractions = [sum(map(list, spans), [])] if together else spans, fractions
        self.gone = set()

    def before(self, layer, weights):
        if layer in self.fractions:
            last = [sum(column) / len(weights) for column in zip(*weights[:, -1].tolist(), strict=True)]
            for pot in self.pots:
                left = sorted((i for i in pot if i not in self.gone), key=lambda i: (-last[i], i))
                self.gone.update(left[amount(len(pot), self.fractions[layer]) :])
            self.gone.discard(weights.shape[1] - 1)  # it predicts the next token
        return self.gone


class MustDrop(Rule):
    """After some layers, a token of a picture is dropped whose attention from the text is small, in sum and at most.

    counts: tokens of each picture before merging; keys: tokens of the prompt that stay.
    """

    def __init__(self, spans, counts, keys, layers, share=0.0012, peak=0.001):
        self.spans, self.counts, self.keys, self.layers = spans, counts, set(keys), layers
        self.share, self.peak, self.gone = share, peak, set()

    def after(self, layer, weights):
        if layer not in self.layers:
            return []
        tokens = weights.shape[1]
        rows = range(min(self.spans[-1][1], tokens - 1), tokens)
        mean = weights.mean(0)
        for (start, stop), count in zip(self.spans, self.counts, strict=True):
            left = [i for i in range(start, stop) if i not in self.gone]
            total = {i: sum(mean[row, i].item() for row in rows) for i in left}
            for i in left:
                weak = total[i] < self.share * 576 / count * sum(total.values())
                faint = max(mean[row, i].item() for row in rows) < self.peak * 576 / count
                if weak and faint and i not in self.keys and i != tokens - 1:
                    self.gone.add(i)
        return self.gone

    def held(self, seen):
        self.prefilled = seen
        first, last = min(self.layers), max(seen)
        return {layer: seen[layer] if layer < first else seen[last] - self.gone for layer in seen}
