"""Tensor parallel: several processes share one language model, each with its own heads, neurons and words.

The plan is that of Megatron-LM (arXiv 1909.08053): q, k, v, gate and up are divided by their outputs; o and down by
their inputs, so that their outputs are summed; embedding and head by words. A layer then needs two all-reduces. Each
process caches the keys and values of its own KV heads. Tower and projector are whole in every process.

All computing is with plain tensors. The styles of `torch.distributed.tensor.parallel` divide in the same way but
compute with DTensors, whose dispatch takes longer than a small layer: with it a decode step of the demo took four times
as long on a CPU, even with collectives that take no time (the backend `fake`).

torchrun starts the processes; `model.processes` connects them. llama.py and cache.py know nothing of this file.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from .config import InputError
from .llama import Linear, Output
from .lookahead import LoRA
from .share import INPUTS, ONCE, OUTPUTS, Share

PLAN = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), OUTPUTS)
PLAN |= dict.fromkeys(("o_proj", "down_proj"), INPUTS)


def split(checkpoint, mesh):
    """An opened Checkpoint -> one whose `read_weights` reads only the part of this process. mesh: a DeviceMesh with one
    dimension. InputError if the model cannot be divided among so many processes."""
    language, ranks = checkpoint.model.language_model, mesh.size()
    text = checkpoint.config.text_config
    sizes = text.num_key_value_heads, text.intermediate_size
    if any(size % ranks for size in sizes):
        fit = [str(n) for n in range(1, sizes[0] + 1) if not any(size % n for size in sizes)]
        raise InputError(
            f"{sizes[0]} KV heads and {sizes[1]} neurons cannot be divided among {ranks} processes; use "
            f"{', '.join(fit)}"
        )
    share = Share(mesh)
    with torch.device("meta"):
        divide_layers(language, share)
        divide_words(language, share)
        if checkpoint.lookahead is not None:
            divide_adapters(checkpoint.lookahead, language, share)
    return replace(checkpoint, step=partial(checkpoint.step, alone=False), share=share)


def divide_layers(language, share):
    """Replace the linear layers of a `Llama` by this process's parts."""
    for i, layer in enumerate(language.model.layers):
        for part in ("self_attn", "mlp"):
            module = getattr(layer, part)
            for name, linear in [*module.named_children()]:
                where, bias = f"language_model.model.layers.{i}.{part}.{name}", linear.bias is not None
                share.parts[f"{where}.weight"] = linear.weight.shape, PLAN[name]
                if bias:
                    share.parts[f"{where}.bias"] = linear.bias.shape, OUTPUTS if PLAN[name] == OUTPUTS else ONCE
                n, c = linear.weight.shape
                if PLAN[name] == OUTPUTS:
                    own = Linear(c, n // share.ranks, bias)
                else:
                    own = RowParallel(share, c // share.ranks, n, bias)
                setattr(module, name, own)


def divide_words(language, share):
    """Replace embedding and head. Their numbers of words may differ, as with `torch.chunk`."""
    shape = language.head.weight.shape
    start, stop = share.bounds(shape[0])
    language.model.embed_tokens = VocabParallelEmbedding(share, start, stop - start, shape[1])
    language.output = VocabParallelOutput(share, shape[0])
    share.parts["language_model.model.embed_tokens.weight"] = shape, OUTPUTS
    if language.lm_head is not None:
        language.lm_head = nn.Linear(shape[1], stop - start, bias=False)
        share.parts["language_model.lm_head.weight"] = shape, OUTPUTS


def divide_adapters(lookahead, language, share):
    """Divide the adapters like the layers that they belong to."""
    for i, (adapter, layer) in enumerate(zip(lookahead.layers, language.model.layers, strict=True)):
        for name, lora in [*adapter.named_children()]:
            part = "lora_A" if PLAN[name] == INPUTS else "lora_B"
            share.parts[f"layers.{i}.{name}.{part}"] = getattr(lora, part).shape, PLAN[name]
            linear = getattr(layer.self_attn, name, None) or getattr(layer.mlp, name)
            setattr(adapter, name, LoRA(linear, lora.rows, len(lora.lora_A)))


class RowParallel(Linear):
    """A linear layer with a part of the inputs. The output is the sum of the processes' outputs."""

    def __init__(self, share, *sizes):
        super().__init__(*sizes)
        self.share = share

    def forward(self, x, lora=None):
        return self.share.total(super().forward(x, lora))


class VocabParallelEmbedding(nn.Embedding):
    """An embedding with the words from `start` on. The others' are zeros in the sum."""

    def __init__(self, share, start, *sizes):
        super().__init__(*sizes)
        self.share, self.start = share, start

    def forward(self, ids):
        own = ids - self.start
        other = (own < 0) | (own >= self.num_embeddings)
        return self.share.total(super().forward(own.masked_fill(other, 0)).masked_fill(other[..., None], 0))


class VocabParallelOutput(Output):
    """Gathers the logits of all processes' words, `words` in all."""

    def __init__(self, share, words):
        super().__init__()
        self.share, self.words = share, words

    def forward(self, hidden, weight):
        own = super().forward(hidden, weight)
        return self.share.gather_parts(own.movedim(-1, 0), self.words).movedim(0, -1)
