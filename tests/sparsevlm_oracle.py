"""SparseVLM in loops, and in transformers with one mask per layer; nothing here comes from `model`."""

import math

import pytest
import torch

from tests.oracle import expanded, hf_kind, hf_pictures


def by_score(scores):
    """Indices from the highest to the lowest, equal ones in their order."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


def rating_rows(embedded, spans):
    """Rows of the text after the last picture that are more like the pictures than the mean; else the last row.

    embedded (T, C), spans [(start, stop)] of the whole prompt -> indices from the end of the prompt (-1 is the last).
    """
    words = range(spans[-1][1], len(embedded))
    if not words:
        return [-1]
    like = dict.fromkeys(words, 0.0)
    for v in (v for a, b in spans for v in range(a, b)):
        dots = {t: float(embedded[v].double() @ embedded[t].double()) for t in words}
        most = max(dots.values())
        total = sum(math.exp(dot - most) for dot in dots.values())
        for t, dot in dots.items():
            like[t] += math.exp(dot - most) / total
    mean = sum(like.values()) / len(like)
    return [t - len(embedded) for t in words if like[t] > mean] or [t - len(embedded) for t in words]


def rated(weights, rows, columns, heads=None):
    """weights (Hq, T, T) -> {column: mean over rows and heads}; of `heads` query heads with the largest sums."""
    weights = weights[:, rows].double()
    chosen = by_score(weights[:, :, columns].sum((1, 2)).tolist())[:heads]
    return dict(zip(columns, weights[chosen][:, :, columns].mean((0, 1)).tolist(), strict=True))


def density_peaks(x, count):
    """x (m, C), in the order of the scores -> for each the index of its centre, one of `count`."""
    x, m = x.double(), len(x)
    apart = [[float((x[i] - x[j]).square().sum() / x.shape[1]) ** 0.5 for j in range(m)] for i in range(m)]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in apart]
    far, order = [], by_score(density)
    for i in range(m):
        denser = order[: order.index(i)]
        far.append(min([apart[i][j] for j in denser], default=max(map(max, apart))))
    peaks = by_score([f * d for f, d in zip(far, density, strict=True)])[:count]
    return [i if i in peaks else min(peaks, key=lambda p: (apart[i][p], peaks.index(p))) for i in range(m)]


def chosen_of(parts, score, counts, recycle, hidden):
    """parts: per picture the indices of its tokens; score {token: number}; counts: tokens to keep of each part.

    -> (set of the dropped tokens, {centre: [tokens of its cluster]}).
    """
    dropped, clusters = set(), {}
    for part, count in zip(parts, counts, strict=True):
        order = sorted(part, key=lambda j: (-score[j], j))
        rest = order[count:]
        dropped |= {*rest}
        if recycle and rest:
            pool = rest[: int(len(rest) * 0.3) + 1]
            for token, centre in zip(pool, density_peaks(hidden[pool], int(len(pool) / 10) + 1), strict=True):
                clusters.setdefault(pool[centre], []).append(token)
    return dropped - {*clusters}, clusters


def masked_answer(folder, generation, schedule, count, recycle=False, scope="image", heads=None):
    """Greedy ids of transformers, all tokens at their own places, with the dropped ones hidden from later layers.

    schedule: {layer: function n of a picture's tokens -> number that stays}. Clusters are averaged in the output of the
    layer. -> (ids, kept (L, T) bool: the prompt's tokens that each layer sees, number of centres, logits (V,) of the
    first id).
    """
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")
    prompt, spans = expanded(generation), generation.spans
    fixed = len(prompt) - 1  # the last token stays, even in a picture
    pictures = [[*range(a, b)] for a, b in spans]
    pictures = [sum(pictures, [])] if scope == "vision" else pictures
    hidden, seen, kept = torch.zeros(len(prompt), dtype=torch.bool), {}, {}
    centres = 0

    def attend(module, query, key, value, mask, scaling, **_):
        """query (1, Hq, T, D), key and value (1, Hkv, N, D)."""
        group, n, layer = query.shape[1] // key.shape[1], key.shape[2], module.layer_idx
        scores = query @ key.repeat_interleave(group, 1).mT * scaling
        if query.shape[2] > 1:
            visible = torch.ones(n, n).tril().bool() & ~hidden | torch.eye(n).bool()
            kept[layer] = ~hidden
        else:
            visible = torch.cat((kept[layer], torch.ones(n - len(prompt), dtype=torch.bool)))
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        if query.shape[2] > 1:
            seen[layer] = weights[0]
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    def embedded(module, args, given):
        if given["inputs_embeds"].shape[1] > 1:
            seen["raters"] = rating_rows(given["inputs_embeds"][0], spans)

    def narrow(layer):
        def after(module, args, output):
            nonlocal centres
            states = output[0] if isinstance(output, tuple) else output  # (1, T, C)
            if states.shape[1] == 1:
                return
            here = [[j for j in part if not hidden[j]] for part in pictures]
            counts = [schedule[layer](len(part)) for part in pictures]
            score = rated(seen[layer], seen["raters"], sum(here, []), heads)
            drop, clusters = chosen_of(here, score, counts, recycle, states[0])
            before = states[0].clone()
            for centre, tokens in clusters.items():
                merged = [token for token in tokens if token in {centre} | drop - {fixed}]
                states[0, centre] = before[merged].mean(0)
            centres += len(clusters)
            hidden[sorted(drop - {fixed})] = True

        return after

    transformers.AttentionInterface.register("sparse", attend)
    with torch.device("cpu"):
        kind = hf_kind(generation.checkpoint.config)
        model = getattr(transformers, kind + "ForConditionalGeneration")
        model = model.from_pretrained(folder, dtype=torch.float32).eval()
        language = model.model.language_model
        language.set_attn_implementation("sparse")
        language.register_forward_pre_hook(embedded, with_kwargs=True)
        for layer in schedule:
            language.layers[layer].register_forward_hook(narrow(layer))
        out = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            **hf_pictures([generation]), max_new_tokens=count, do_sample=False, eos_token_id=None,
            suppress_tokens=generation.checkpoint.never_ids, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    ids = out.sequences[0, len(prompt) :].tolist()
    return ids, torch.stack([kept[i] for i in sorted(kept)]), centres, out.logits[0][0]
