"""Tensor parallel: several processes share one language model, each with its own heads, neurons and words.

The plan is that of Megatron-LM (arXiv 1909.08053) in `torch.distributed.tensor`: q, k, v, gate and up are divided by
their outputs, o and down by their inputs, embedding and head by words. A layer then needs two all-reduces. Each process
caches the keys and values of its own KV heads. Tower and projector are whole in every process.

torchrun starts the processes; `model.processes` connects them. llama.py and cache.py know nothing of this file.
"""

from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInputOutput,
    RowwiseParallel,
    parallelize_module,
)

from .config import InputError
from .generate import plain_step
from .lookahead import LoRA

ROWWISE = "o_proj", "down_proj"  # divided by their inputs


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
    parallelize_module(language, mesh, plan(language), src_data_rank=None)
    share = Share(mesh)
    for name, weight in language.named_parameters():
        if isinstance(weight, DTensor):
            share.placements[f"language_model.{name}"] = weight.placements[0]
    if checkpoint.lookahead is not None:
        split_adapters(checkpoint.lookahead, share)
    return replace(checkpoint, step=plain_step, share=share)


def plan(language):
    """{name of a module of a `Llama`: its ParallelStyle}."""
    styles = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    styles["output"] = PrepareModuleInputOutput(
        input_layouts=(Replicate(), None),
        desired_input_layouts=(Replicate(), None),
        output_layouts=Shard(-1),
        desired_output_layouts=Replicate(),
    )
    if language.lm_head is not None:
        styles["lm_head"] = ColwiseParallel()  # called by none; `output` takes its weight
    for i, layer in enumerate(language.model.layers):
        for part in ("self_attn", "mlp"):
            for name, _ in getattr(layer, part).named_children():
                style = RowwiseParallel() if name in ROWWISE else ColwiseParallel()
                styles[f"model.layers.{i}.{part}.{name}"] = style
    return styles


def split_adapters(lookahead, share):
    """Divide the adapters like the layers that they belong to."""
    for i, adapter in enumerate(lookahead.layers):
        for name, lora in adapter.named_children():
            rank, c_in = lora.lora_A.shape
            c_out = len(lora.lora_B)
            if name in ROWWISE:
                c_in //= share.ranks
                share.placements[f"layers.{i}.{name}.lora_A"] = Shard(1)
            else:
                c_out //= share.ranks
                share.placements[f"layers.{i}.{name}.lora_B"] = Shard(0)
            with torch.device("meta"):
                setattr(adapter, name, LocalLoRA(torch.nn.Linear(c_in, c_out), lora.rows, rank))


class LocalLoRA(LoRA):
    """Adds to this process's part of the output: its columns, or its term of the sum, which is reduced later."""

    def add(self, x, y):
        super().add(x.to_local(), y.to_local())
        return y


class Share:
    """The part of one process; see `model.share.Whole` for the methods.

    placements   {canonical name: Shard(dimension) or Replicate()}; without an entry a tensor is whole and a plain one
    """

    def __init__(self, mesh):
        self.mesh, self.ranks, self.rank = mesh, mesh.size(), mesh.get_local_rank()
        self.placements = {}

    def gather(self, own):
        sent = own.view(torch.uint8) if own.dtype == torch.bool else own  # no backend sends bool
        return self._full(sent, Shard(0)).view(own.dtype)

    def own(self, of_all):
        return of_all.tensor_split(self.ranks)[self.rank]

    def total(self, own):
        return self._full(own, Partial())

    def _full(self, own, placement):
        """One collective: the whole of which `own` is this process's part, on the device of `own`."""
        sent = own.to(self.mesh.device_type).contiguous()
        return DTensor.from_local(sent, self.mesh, [placement], run_check=False).full_tensor().to(own.device)

    def read(self, name, file, key, **kind):
        placement, piece = self.placements.get(name), file.get_slice(key)
        if not isinstance(placement, Shard):
            own = file.get_tensor(key).to(**kind)
        else:
            start, stop = self._bounds(piece.get_shape()[placement.dim])
            own = piece[start:stop] if placement.dim == 0 else piece[:, start:stop]
            own = own.to(**kind).contiguous()
        if placement is None or not name.startswith("language_model."):
            return own
        shape = torch.Size(piece.get_shape())
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(own, self.mesh, [placement], run_check=False, shape=shape, stride=stride)

    def numbers(self, weight, at):
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        if own is weight or not weight.placements[0].is_shard():
            return own[at]
        dim = weight.placements[0].dim
        start, stop = self._bounds(weight.shape[dim])
        here, at = (at[dim] >= start) & (at[dim] < stop), list(at)
        at[dim] = (at[dim] - start).clamp(0, max(0, stop - start - 1))
        return self.total(torch.where(here, own[tuple(at)], 0))

    def _bounds(self, size):
        """The part of this process in `size` numbers. Only words may be divided unevenly, as `torch.chunk` does."""
        each = -(-size // self.ranks)
        return min(size, self.rank * each), min(size, (self.rank + 1) * each)
