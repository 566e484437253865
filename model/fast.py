"""Optimised decode steps, made of a few large operations. Results equal those of `Llama.decode` up to rounding.

Only checkpoint.py imports this file: FastStep is the default of `Checkpoint.step`, whose other value is
`model.generate.plain_step`, and `read_weights` calls `arrange` unless weights are memory-mapped. On one core of an
Intel Xeon, weights side by side and `addmm_` make a step of the demo 1.07 to 1.12 times as fast. kernels/NOTES.md has
this and the other measurements, of captured graphs and of `--compile`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from kernels.ragged_decode_torch import rectangle_step

from .llama import Linear, rotate


def arrange(language):
    """Store the weights of q, k and v in one matrix, gate and up in another. Copies each once; for inference."""
    for layer in language.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        for group in ((attn.q_proj, attn.k_proj, attn.v_proj), (mlp.gate_proj, mlp.up_proj)):
            lay(group)


def lay(layers):
    """Make the weights (N, C) of linear layers views of one matrix."""
    weights = [layer.weight for layer in layers]
    parts = torch.cat(weights).split([len(w) for w in weights])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)


def joined(layers):
    """The weights (N, C) of linear layers as one matrix, or None if they do not lie side by side."""
    first, stop = layers[0].weight, layers[0].weight.storage_offset()
    for layer in layers:
        w = layer.weight
        same = w.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or not w.is_contiguous() or w.storage_offset() != stop:
            return None
        stop += w.numel()
    return first.detach().as_strided((sum(len(layer.weight) for layer in layers), first.shape[1]), first.stride())


PLAIN = Linear.forward, nn.Linear.forward


class Product:
    """Linear layers with the same input, computed as one product if their weights lie side by side."""

    def __init__(self, *layers):
        self.called = any(type(layer).forward not in PLAIN for layer in layers)  # such as those of model/parallel.py
        self.layers, self.weight = layers, None if self.called else joined(layers)
        self.sizes, biases = [layer.out_features for layer in layers], [layer.bias for layer in layers]
        self.bias = None if None in biases else torch.cat([bias.detach() for bias in biases])  # small, so copied
        if self.bias is None and any(bias is not None for bias in biases):
            self.weight = None

    def __call__(self, x):
        """x (B, C) -> the output (B, N) of each layer."""
        if self.called:
            return [layer(x) for layer in self.layers]
        if self.weight is None or in_loops(x):
            return [matvec(x, layer.weight, layer.bias) for layer in self.layers]
        return F.linear(x, self.weight, self.bias).split(self.sizes, -1)

    def add(self, x, y):
        """Add the single layer's output for y (B, C) to x (B, N), in place and in one call."""
        if self.weight is None or self.bias is not None or in_loops(x):
            return x.add_(self(y)[0])
        return x.addmm_(y, self.weight.t())


def in_loops(x):
    """True while torch.compile compiles for a CPU and a single x (1, C)."""
    return torch.compiler.is_compiling() and x.is_cpu and len(x) == 1


def matvec(x, weight, bias=None):
    """x (B, C) times a weight (N, C), plus a bias -> (B, N).

    When compiled for a CPU, a single x is multiplied and summed in a generated loop, which reads the weights at 50 to
    85 % of memory bandwidth; PyTorch's own CPU matvec reaches 20 to 45 %.
    """
    if not in_loops(x):
        return F.linear(x, weight, bias)
    compute = torch.promote_types(x.dtype, torch.float32)
    # as_strided reads memory, so the compiler stores x once instead of recomputing it for each of the N outputs
    row = x.contiguous().as_strided(x.shape[-1:], (1,))
    y = (weight.to(compute) * row.to(compute)).sum(-1)
    y = y if bias is None else y + bias.to(compute)
    return y.to(x.dtype)[None]


class FastLayer:
    """The decode step of a DecoderLayer: x (B, C), one token per sequence -> x, updated in place.

    functions: compiled versions of `before_attention`, `after_attention` and, on a CPU, `whole`, for layers whose cache
    is a rectangle.
    """

    def __init__(self, layer, functions=None):
        self.functions = functions or (FastLayer.before_attention, FastLayer.after_attention, None)
        attn, mlp = layer.self_attn, layer.mlp
        self.layer, self.head_dim = layer, attn.head_dim
        self.qkv, self.out = Product(attn.q_proj, attn.k_proj, attn.v_proj), Product(attn.o_proj)
        self.gate_up, self.down = Product(mlp.gate_proj, mlp.up_proj), Product(mlp.down_proj)

    def before_attention(self, x, rope):
        """The half before attention -> q (B, Hq, D), k and v (B, Hkv, D), q and k rotated by rope unless it is None."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(self.layer.input_layernorm(x)))
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def after_attention(self, x, y):
        """The half of a layer after attention. y (B, Hq, D) is the attention output."""
        x = self.out.add(x, y.flatten(1))
        gate, up = self.gate_up(self.layer.post_attention_layernorm(x))
        return self.down.add(x, F.silu(gate) * up)

    def whole(self, x, rope, k, v, kv_len):
        """The layer in one function. k, v (S, n, D): its `rectangle` of the cache; kv_len (S,) counts new tokens."""
        q, k_new, v_new = self.before_attention(x, rope)
        return self.after_attention(x, rectangle_step(q, k_new, v_new, k, v, kv_len))

    def __call__(self, x, rope, cache, i):
        before_attention, after_attention, whole = self.functions
        rectangle = whole and cache.rectangle(i)
        if rectangle:
            return whole(self, x, rope, *rectangle, cache.kv_len[i])
        q, k, v = before_attention(self, x, None if cache.fused else rope)
        return after_attention(self, x, cache.append_attend(i, q, k, v, rope))


class FastStep:
    """A decode step: append one token per sequence to the cache, ids (B,) on its device -> next logits (B, V).

    With the Triton kernels on CUDA, a step is replayed from a captured graph, which replaces hundreds of launches by
    one. When the cache's `version` changes, the next step runs uncaptured (the first also compiles the kernels), and
    the one after it is captured again.
    """

    def __init__(self, language, cache, compile=False, alone=True):
        """compile: use torch.compile, with one compilation for all layers; the first step is then slow.

        alone: False if several processes share the model. Steps with collectives are not captured, which has never been
        tested, and not compiled as a whole, because the collectives are in the modules.
        """
        self.language, self.cache, self.logits_of = language, cache, type(language).logits
        self.compiles_whole = compile and alone and not cache.fused and cache.pos.is_cpu
        self.captures = alone and cache.fused and cache.pos.is_cuda  # the torch backend reads lengths on the host
        functions = None
        if compile:
            halves = [
                torch.compile(half, dynamic=False) for half in (FastLayer.before_attention, FastLayer.after_attention)
            ]
            functions = (*halves, torch.compile(FastLayer.whole, dynamic=True) if self.compiles_whole else None)
        if self.compiles_whole:
            self.logits_of = torch.compile(logits_by_loops, dynamic=False)
        self.layers = [FastLayer(layer, functions) for layer in language.model.layers]
        self.graph = self.ids = self.logits = None
        self.seen = None  # version of the cache that the last step ran on

    def __call__(self, ids):
        cache = self.cache
        if self.captures and self.seen == cache.version and cache.fits():
            return self._replay(ids)
        self.graph = self.logits = None  # frees the graph's memory
        logits = self._step(ids)
        self.seen = cache.version
        return logits

    def _step(self, ids):
        """One step. Copies nothing between host and device, so that it can be captured."""
        with self.cache.reserving(1):
            x = self.language.model.embed_tokens(ids)
            return self.logits_of(self.language, self.language.decode(x, self.cache, self.layers))

    def _replay(self, ids):
        cache = self.cache
        if self.graph is None:
            self.ids, graph, counts = ids.clone(), torch.cuda.CUDAGraph(), cache.counts
            try:
                with (
                    torch.cuda.device(cache.pos.device),
                    torch.cuda.graph(graph, stream=torch.cuda.Stream(cache.pos.device)),
                ):
                    self.logits = self._step(self.ids)
            finally:
                cache.counts = counts  # recording a step claims no slots
            self.graph = graph
        else:
            self.ids.copy_(ids)
        counts = cache.counts
        cache.claim()  # the graph claims its slots on the device
        try:
            self.graph.replay()
        except RuntimeError:  # out of memory: it did not run
            cache.counts = counts
            raise
        return self.logits


def logits_by_loops(language, hidden):
    """`Llama.logits` for the compiler: hidden (B, C) -> (B, V)."""
    return matvec(hidden, language.head.weight)
