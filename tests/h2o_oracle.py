"""H2O by hand: transformers with eager attention, and per head a mask that is made anew for each decoded token."""

import pytest
import torch

from tests.oracle import expanded, hf_kind, hf_pictures


def heavy_hitters(folder, generation, spans, retention, newest, extra, count):
    """-> greedy ids, and for each decoded token a list over layers of (Hkv, N) bool: what each head holds after it.

    Imports nothing from model/. spans: of the pictures; the rest as the settings of h2o.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")
    held, sums, limits, told = {}, {}, {}, []
    prompt = expanded(generation)
    vision = torch.zeros(len(prompt), dtype=torch.bool)
    for start, stop in spans:
        vision[start:stop] = True

    def attend(module, query, key, value, mask, scaling, **_):
        """query (1, Hq, T, D), key and value (1, Hkv, N, D)."""
        heads, n, layer = key.shape[1], key.shape[2], module.layer_idx
        group = query.shape[1] // heads
        scores = query[0] @ key[0].repeat_interleave(group, 0).transpose(1, 2) * scaling  # (Hq, T, N)
        if query.shape[2] > 1:
            future = torch.ones(n, n, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            sums[layer] = [weights[h * group : (h + 1) * group].sum(1).mean(0).tolist() for h in range(heads)]
            held[layer] = [{*range(n)} for _ in range(heads)]
            for h in range(heads):
                for start, stop in spans:
                    many = max(1, int(retention * (stop - start) + 0.5))
                    order = sorted(range(start, stop), key=lambda j: (-sums[layer][h][j], j))
                    held[layer][h] -= {*order[many:]}
            limits[layer] = [len(own) + extra for own in held[layer]]
        else:
            if layer == 0:
                told.append([])
            for h, own in enumerate(held[layer]):
                competing = {j for j in own if j >= len(prompt) or vision[j]}
                slots = limits[layer][h] - len(own - competing)
                for_newest = min(int(newest * slots), slots - 1)
                if len(own) == limits[layer][h]:
                    victims = [j for j in competing if j < n - 1 - for_newest]
                    own.remove(min(victims, key=lambda j: (sums[layer][h][j], -j)))
                own.add(n - 1)
                sums[layer][h].append(0.0)
            seen = torch.tensor([[j in own for j in range(n)] for own in held[layer]])
            told[-1].append(seen)
            weights = scores.masked_fill(~seen.repeat_interleave(group, 0)[:, None], float("-inf")).softmax(-1)
            for h in range(heads):
                mean = weights[h * group : (h + 1) * group, 0].mean(0).tolist()
                sums[layer][h] = [a + b for a, b in zip(sums[layer][h], mean, strict=True)]
        out = weights @ value[0].repeat_interleave(group, 0)
        return out.transpose(0, 1)[None].contiguous(), None

    transformers.AttentionInterface.register("heavy hitters", attend)
    with torch.device("cpu"):
        kind = hf_kind(generation.checkpoint.config)
        model = getattr(transformers, kind + "ForConditionalGeneration")
        model = model.from_pretrained(folder, dtype=torch.float32).eval()
        model.model.language_model.set_attn_implementation("heavy hitters")
        out = model.generate(
            input_ids=torch.tensor([prompt]), **hf_pictures([generation]), max_new_tokens=count, do_sample=False,
            eos_token_id=None, suppress_tokens=generation.checkpoint.never_ids,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist(), told
