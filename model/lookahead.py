"""Look-ahead rows: learned tokens after the prompt whose attention predicts that of the answer.

m learned embeddings follow the prompt in prefill, and low-rank adapters (LoRA, arXiv 2106.09685) change the linear
layers for those m rows only. The rows attend to the prompt and causally to each other. The prompt does not attend to
them, and they never enter the cache, so the frozen model's output does not change. A pruning method may rank tokens by
the attention of these rows instead of that of the last prompt row (`query=lookahead`).

This applies LookaheadKV (arXiv 2603.10899), a method for text, to vision tokens. tools/train_lookahead.py trains the
rows for any checkpoint.
"""

import json

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from .config import InputError
from .share import WHOLE

FILE = "lookahead.safetensors"  # in the checkpoint's folder


class LoRA(nn.Module):
    """Adds B A x to a frozen linear layer's output for the last m rows of x. A (rank, C_in), B (C_out, rank)."""

    def __init__(self, layer, rows, rank):
        super().__init__()
        self.rows = rows
        self.lora_A = nn.Parameter(torch.randn(rank, layer.in_features) * layer.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def add(self, x, y):
        """x (B, T, C_in), y (B, T, C_out): add to the last m rows of y in place -> y."""
        y[:, -self.rows :] += F.linear(F.linear(x[:, -self.rows :], self.lora_A), self.lora_B)
        return y


class LayerAdapter(nn.Module):
    """The adapters of one decoder layer, by the names of its linear layers."""

    def __init__(self, layer, rows, rank):
        super().__init__()
        attn, mlp = layer.self_attn, layer.mlp
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            LoRA(linear, rows, rank) for linear in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
        )
        self.gate_proj, self.up_proj, self.down_proj = (
            LoRA(linear, rows, rank) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )


class Lookahead(nn.Module):
    """m learned embeddings (m, C) and the adapters of all layers of a `Llama`."""

    def __init__(self, language, rows=8, rank=16):
        super().__init__()
        self.embeddings = nn.Parameter(0.02 * torch.randn(rows, language.config.hidden_size))
        self.layers = nn.ModuleList(LayerAdapter(layer, rows, rank) for layer in language.model.layers)

    @property
    def rows(self):
        """Number of look-ahead rows, m."""
        return len(self.embeddings)


ADVICE = "train the rows again with tools/train_lookahead.py, or remove the file"


def open_lookahead(path, language):
    """The look-ahead rows of a file, on the meta device. InputError unless their shapes fit the `Llama`."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        shapes = {key: tuple(part.get_shape()) for key, part in parts.items()}
        dtypes = {part.get_dtype() for part in parts.values()} - {"F32", "F16", "BF16"}
        rows, rank = shapes["embeddings"][0], shapes["layers.0.q_proj.lora_A"][0]
    except (SafetensorError, OSError, ValueError, KeyError, IndexError) as broken:
        raise InputError(f"{path} has no readable look-ahead rows ({broken}); {ADVICE}") from broken
    if dtypes:
        raise InputError(f"{path} holds numbers of type {', '.join(sorted(dtypes))}, not floats; {ADVICE}")
    if not rows or not rank:
        raise InputError(f"{path} holds {rows} look-ahead rows of rank {rank}; {ADVICE}")
    with torch.device("meta"):
        lookahead = Lookahead(language, rows, rank)
    wanted = {name: tuple(p.shape) for name, p in lookahead.state_dict().items()}
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if wrong:
        raise InputError(f"{path} is for another model ({wrong[0]} and {len(wrong) - 1} more do not fit); {ADVICE}")
    return lookahead


def fill_lookahead(lookahead, path, language, share=WHOLE):
    """Load the rows' weights, in the dtype and on the device of a loaded `Llama`. share: this process's part of both.

    InputError if they were trained for other weights, are not finite, or were never trained.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {key: share.read(key, file, key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata() or {}
    if not same_weights(about.get("about", ""), language, share):
        raise InputError(f"{path} was trained for other weights than these; {ADVICE}")
    if not all(t.isfinite().all() for t in tensors.values()):
        raise InputError(f"{path} holds NaN or infinity; {ADVICE}")
    if not tensors["embeddings"].any(1).all():  # all tokens would get the same score
        raise InputError(f"{path} holds rows of zeros; {ADVICE}")
    norm = language.model.norm.weight
    tensors = {name: t.to(norm.device, norm.dtype) for name, t in tensors.items()}
    lookahead.load_state_dict(tensors, assign=True)
    lookahead.requires_grad_(False)


def describe_model(language, **more):
    """The metadata of a file: {"about": JSON of `weights_sample` and more}. One key, because safetensors does not keep
    the order of keys, and equal rows should give equal files."""
    return {"about": json.dumps({"weights": weights_sample(language)} | more)}


def weights_sample(language, share=WHOLE):
    """8 evenly spaced numbers of each of the model's parameters, as text."""
    found = [share.sample(name, p.detach(), 8).float().cpu() for name, p in language.named_parameters()]
    return " ".join(f"{number:.8g}" for number in torch.cat(found).tolist())


def same_weights(about, language, share=WHOLE):
    """True if `describe_model` wrote this JSON for the model, whatever the dtypes: rounding to bf16 changes a number by
    up to 1/512 of its size, rounding small ones to fp16 by up to 3e-8."""
    try:
        samples = json.loads(about)["weights"], weights_sample(language, share)
        theirs, ours = ([float(n) for n in sample.split()] for sample in samples)
    except (ValueError, TypeError, KeyError, AttributeError):  # not written by train_lookahead
        return False
    pairs = zip(theirs, ours, strict=False)
    return len(theirs) == len(ours) and all(abs(a - b) <= 1e-7 + abs(b) / 256 for a, b in pairs)
