"""Oracles of attention among some tokens: masks in transformers, and ZipVL's choice in loops. No code of model/."""

import pytest
import torch

from tests.oracle import expanded, hf_kind, hf_pictures


def sparse_ids(folder, generation, choose, count, stored=True):
    """Greedy ids of transformers when in each layer only some of the prompt's tokens attend and are attended to.

    choose(layer, weights) -> (T,) bool, once per layer; weights (Hq, T, T): the attention of all rows to all tokens,
    causal. All other columns get -inf added to their scores, and the output of all other rows is set to 0. Decoded
    tokens do not see these columns either if only what takes part is stored.

    Returns (ids, logits (count, vocab), [choice of each layer]).
    """
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")
    prompt = expanded(generation)
    taking_part = {}

    def attend(module, query, key, value, mask, scaling, **_):
        """query (1, Hq, T, D), key and value (1, Hkv, N, D)."""
        group, t, n, layer = query.shape[1] // key.shape[1], query.shape[2], key.shape[2], module.layer_idx
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        if t > 1:
            scores = scores + torch.full((t, n), float("-inf")).triu(1)
            taking_part[layer] = choose(layer, scores[0].softmax(-1))
        part = torch.cat((taking_part[layer], torch.ones(n - len(prompt), dtype=torch.bool)))
        part = part if t > 1 or stored else torch.ones_like(part)
        hide = torch.zeros(n).masked_fill(~part, float("-inf"))
        weights = (scores + hide).softmax(-1)  # NaN in rows that see no column; they take no part
        out = weights @ value.repeat_interleave(group, 1)
        if t > 1:
            out[:, :, ~part] = 0.0
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("sparse", attend)
    with torch.device("cpu"):
        kind = hf_kind(generation.checkpoint.config)
        model = getattr(transformers, kind + "ForConditionalGeneration")
        model = model.from_pretrained(folder, dtype=torch.float32).eval()
        model.model.language_model.set_attn_implementation("sparse")
        out = model.generate(
            input_ids=torch.tensor([prompt]), **hf_pictures([generation]), max_new_tokens=count, do_sample=False,
            eos_token_id=None, suppress_tokens=generation.checkpoint.never_ids, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    ids, logits = out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)
    return ids, logits, [taking_part[layer] for layer in sorted(taking_part)]


def zipvl_by_hand(probes, tau, spans):
    """choose(layer, weights) for `sparse_ids`: ZipVL in loops. probes: per layer the indices of the probed rows."""

    def choose(layer, weights):
        heads, t, _ = weights.shape
        rows = weights.double().tolist()
        raw = [sum(rows[h][r][j] for h in range(heads) for r in probes[layer]) for j in range(t)]
        need = count_of(raw, tau)
        mean = [raw[j] / sum(r >= j for r in probes[layer]) for j in range(t)]
        important = {*sorted(range(t), key=lambda j: (-mean[j], j))[:need], t - 1}
        vision = {j for a, b in spans for j in range(a, b)}
        return torch.tensor([j in important or j not in vision for j in range(t)])

    return choose


def count_of(raw, tau):
    """The smallest number of tokens whose largest scores sum up to tau of all."""
    held, wanted = 0.0, tau * sum(raw)
    for count, score in enumerate(sorted(raw, reverse=True), 1):
        held += score
        if held >= wanted:
            return count
    return len(raw)
