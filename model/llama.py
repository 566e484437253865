"""The Llama decoder: RMSNorm, rotary position embeddings (RoPE), grouped-query attention, SwiGLU.

B sequences, T tokens, C channels, Hq query heads over Hkv KV heads of D channels, G = Hq / Hkv. There are three forward
passes: `prefill` (many tokens attend to each other), `decode` (one token per sequence attends to a cache) and `extend`
(many tokens attend to a cache and to each other). Module names are the checkpoint's keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kernels import merge_states
from kernels.ragged_decode_torch import rectangle_step


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        small = x.is_cpu and x.dtype == torch.float32 and x.numel() <= 4096
        if small and not torch.is_grad_enabled() and not in_loops(x):
            # On a CPU F.rms_norm is six small calls. (x, -x) has mean 0 and the mean square of x, so the first half of
            # its layer norm is x / rms(x), in one call
            pair = torch.cat((x, -x), -1)
            return F.layer_norm(pair, pair.shape[-1:], eps=self.eps)[..., : x.shape[-1]] * self.weight
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_turns(config, device):
    """(2, D) fp32: per channel, the rotation angle per position in radians, and the sign of the sine.

    Channel i is paired with channel i + D/2 (the "half" layout of the checkpoints). The sign contains the minus of
    the rotation matrix, so `rotate` needs no negation.
    """
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    speed = config.rope_theta ** (-half / config.head_dim)  # (D/2,)
    sign = torch.ones_like(speed)
    return torch.stack((torch.cat((speed, speed)), torch.cat((-sign, sign))))


def rope_table(positions, config, dtype, turns=None):
    """cos and signed sin of RoPE (arXiv 2104.09864): two tensors of dtype, positions.shape + (1, D), the 1 for heads.

    Angles are computed in fp32. turns: `rope_turns`, if already computed.
    """
    speed, sign = rope_turns(config, positions.device) if turns is None else turns
    angles = positions[..., None, None] * speed  # (..., 1, D)
    return angles.cos().to(dtype), (angles.sin() * sign).to(dtype)


def rotate(x, rope):
    """Rotate x (..., H, D) by rope = (cos, signed sin), (..., 1, D) each, of its positions."""
    cos, sin = rope
    if cos.dtype != x.dtype:  # in training under autocast
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def in_loops(x):
    """True while torch.compile generates CPU loops for x."""
    return torch.compiler.is_compiling() and x.is_cpu


def linear(x, weight, bias=None):
    """x (..., C) times a weight (N, C), plus a bias (N,) -> (..., N).

    When compiled for a CPU, a matvec is written as multiply and sum. The generated loop reads the weights at 50 to 85 %
    of memory bandwidth; PyTorch's own CPU matvec reaches 20 to 45 % (kernels/NOTES.md).
    """
    if not in_loops(x) or x.shape[:-1].numel() > 1:
        return F.linear(x, weight, bias)
    compute = torch.promote_types(x.dtype, torch.float32)
    # as_strided reads memory, so the compiler stores x once instead of recomputing it for each of the N outputs
    row = x.contiguous().as_strided(x.shape[-1:], (1,))
    y = (weight.to(compute) * row.to(compute)).sum(-1)
    y = y if bias is None else y + bias.to(compute)
    return y.to(x.dtype).view(*x.shape[:-1], len(weight))


def adapted(x, layer, lora=None):
    """Apply a linear layer to x (B, T, C); lora, a `model.lookahead.LoRA`, adds to the look-ahead rows."""
    y = linear(x, layer.weight, layer.bias)
    return y if lora is None else lora.add(x, y)


class SideBySide:
    """Computes several bias-free linear layers of one input as one product; their weights become views of one matrix.

    For inference. The weights are copied once; their names and values do not change. `current` returns False if a
    weight was later replaced instead of updated in place.

    In fp32 on a CPU the matrix is stored column by column. If it has at most `FEW` rows, its product with a single x is
    the sum of its columns weighted by x, computed by `embedding_bag`. Together this is two to four times as fast as
    the BLAS matvec (kernels/NOTES.md).
    """

    FEW = 512  # up to this many rows the weighted sum is faster

    def __init__(self, *layers):
        weights = [layer.weight for layer in layers]  # (N, C) each
        columns = in_columns(weights[0])
        self.layers, self.weight = layers, torch.cat([w.t() for w in weights], 1).t() if columns else torch.cat(weights)
        self.sizes = [layer.out_features for layer in layers]
        self.parts = self.weight.split(self.sizes)
        for layer, part in zip(layers, self.parts, strict=True):
            layer.weight = nn.Parameter(part, requires_grad=False)
        n, c = self.weight.shape
        self.bag = None
        if columns and n <= self.FEW:
            self.bag = torch.arange(c, device="cpu"), torch.zeros(1, dtype=torch.long, device="cpu")

    def __call__(self, x):
        """x (..., C) -> (..., N): the outputs of all layers, concatenated."""
        if self.bag is None or x.ndim > 2 or len(x) > 1:
            return F.linear(x, self.weight)
        columns, which, start = self.weight.t(), *self.bag
        return torch.embedding_bag(columns, which, start, False, 0, False, x[0])[0]  # mode 0: sum

    def each(self, x):
        """x (..., C) -> the output of each layer, views of (..., N)."""
        return self(x).split(self.sizes, -1)

    def current(self):
        """True if the layers' weights are still views of this matrix."""
        return all(a.weight.data_ptr() == b.data_ptr() for a, b in zip(self.layers, self.parts, strict=True))


def in_columns(weight):
    """True if a weight with this dtype and device is stored column by column for decoding."""
    return weight.dtype == torch.float32 and weight.is_cpu


def add_linear(x, layer, y, side=None):
    """Add layer(y) to x (B, C) in place -> x; one call without a bias. side: a SideBySide of this layer alone."""
    if side is not None and len(y) == 1:
        return x.add_(side(y))
    if layer.bias is not None or in_loops(x):
        return x.add_(linear(y, layer.weight, layer.bias))
    return x.addmm_(y, layer.weight.t())


class Attention(nn.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config):
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.q_heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, d
        self.q_proj = nn.Linear(c, self.q_heads * d, bias=config.attention_bias)
        self.k_proj = nn.Linear(c, self.kv_heads * d, bias=config.attention_bias)
        self.v_proj = nn.Linear(c, self.kv_heads * d, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.q_heads * d, c, bias=config.attention_bias)
        self.qkv = self.out = None  # set by `Llama.arrange`

    def project(self, x, rope, adapter=None):
        """x (..., C) -> q (..., Hq, D), k and v (..., Hkv, D); rope, if not None, rotates q and k."""
        if self.qkv is None or adapter or torch.is_grad_enabled() or in_loops(x):
            q, k, v = (
                adapted(x, getattr(self, name), adapter and getattr(adapter, name)).unflatten(-1, (-1, self.head_dim))
                for name in ("q_proj", "k_proj", "v_proj")
            )
            return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (..., Hq + 2 * Hkv, D)
        turned = heads[..., : -self.kv_heads, :]
        turned = turned if rope is None else rotate(turned, rope)  # q and k at once
        q, k = turned.split((self.q_heads, self.kv_heads), -2)
        return q, k, heads[..., -self.kv_heads :, :]

    def prefill(self, x, rope, mask=None, adapter=None, past=()):
        """x (B, T, C) -> y (B, T, C) and this layer's q (B, Hq, T, D) and k, v (B, Hkv, T, D).

        past: k and v (B, Hkv, T', D) to put before x's own; mask must then cover all T' + T columns.
        """
        q, k, v = (t.transpose(1, 2) for t in self.project(x, rope, adapter))  # (B, H, T, D)
        if past:
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.q_heads != self.kv_heads
        )
        return adapted(y.transpose(1, 2).flatten(2), self.o_proj, adapter and adapter.o_proj), q, k, v

    def extend(self, x, rope, cache, layer, past):
        """x (B, T, C), T new tokens per sequence after `past` (S,) cached ones -> y (B, T, C). Appends k and v."""
        q, k, v = self.project(x, rope)  # (B, T, H, D)
        cache.append(layer, k, v)
        y, lse = cache.attend(layer, q.contiguous(), past, return_lse=True)  # every row attends to the whole past
        y, _ = merge_states(y, lse, *causal_attention(q, k, v))
        return self.o_proj(y.flatten(2))


def causal_attention(q, k, v):
    """Causal attention among T tokens, computed in fp32 (float64 for float64), and its log-sum-exp.

    Written out because PyTorch's SDPA does not return the log-sum-exp. Materialises B * Hq * T * T scores.

    q (B, T, Hq, D), k and v (B, T, Hkv, D) -> (B, T, Hq, D) in v's dtype, (B, T, Hq) in the compute dtype.
    """
    t, d = q.shape[1], q.shape[3]
    compute = torch.promote_types(q.dtype, torch.float32)
    q = q.unflatten(2, (k.shape[2], -1)).to(compute)  # (B, T, Hkv, G, D)
    scores = d**-0.5 * torch.einsum("bthgd,bshd->bhgts", q, k.to(compute))
    future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill_(future, float("-inf"))
    out = torch.einsum("bhgts,bshd->bthgd", scores.softmax(-1), v.to(compute)).flatten(2, 3)
    return out.to(v.dtype), scores.logsumexp(-1).permute(0, 3, 1, 2).flatten(2)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): x (..., C) -> (..., C)."""

    def __init__(self, config):
        super().__init__()
        c, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(c, f, bias=config.mlp_bias)
        self.up_proj = nn.Linear(c, f, bias=config.mlp_bias)
        self.down_proj = nn.Linear(f, c, bias=config.mlp_bias)
        self.gate_up = self.down = None  # set by `Llama.arrange`

    def gated(self, x, adapter=None):
        """x (..., C) -> (..., F), the input of `down_proj`."""
        if self.gate_up is None or adapter or torch.is_grad_enabled() or in_loops(x):
            gate, up = (adapter.gate_proj, adapter.up_proj) if adapter else (None, None)
            return F.silu(adapted(x, self.gate_proj, gate)) * adapted(x, self.up_proj, up)
        gate, up = (y for side in self.gate_up for y in side.each(x))
        return F.silu(gate) * up

    def forward(self, x, adapter=None):
        return adapted(self.gated(x, adapter), self.down_proj, adapter and adapter.down_proj)


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def prefill(self, x, rope, mask=None, adapter=None, past=()):
        """Like `Attention.prefill`, for the whole layer -> x, q, k, v."""
        y, q, k, v = self.self_attn.prefill(self.input_layernorm(x), rope, mask, adapter, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x), adapter), q, k, v

    def before_attention(self, x, rope):
        """First half of a decode step: x (B, C), one token per sequence -> q (B, Hq, D), k and v (B, Hkv, D).

        rope None: q and k are not rotated; the attention kernel does it.
        """
        return self.self_attn.project(self.input_layernorm(x), rope)

    def after_attention(self, x, y):
        """Second half of a decode step: x (B, C), attention output y (B, Hq, D) -> x (B, C), updated in place."""
        attn, mlp = self.self_attn, self.mlp
        x = add_linear(x, attn.o_proj, y.flatten(1), attn.out)
        return add_linear(x, mlp.down_proj, mlp.gated(self.post_attention_layernorm(x)), mlp.down)

    def whole(self, x, rope, k, v, kv_len):
        """A layer's decode step in one function, to be compiled for a CPU: x (B, C) -> x (B, C). k, v (S, n, D): the
        layer's `rectangle` of the cache; kv_len (S,) already counts the new tokens."""
        q, k_new, v_new = self.before_attention(x, rope)
        return self.after_attention(x, rectangle_step(q, k_new, v_new, k, v, kv_len))

    def extend(self, x, rope, cache, layer, past):
        """Like `Attention.extend`, for the whole layer: x (B, T, C) -> x (B, T, C)."""
        x = x + self.self_attn.extend(self.input_layernorm(x), rope, cache, layer, past)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class LayerParts:
    """A layer's functions for a decode step, compiled or not. `whole`, if given, is used when the layer's cache is a
    rectangle; otherwise the two halves around attention are used."""

    before_attention: Callable = DecoderLayer.before_attention
    after_attention: Callable = DecoderLayer.after_attention
    whole: Callable | None = None


class Trunk(nn.Module):
    """The decoder without its output head; `model.` in the checkpoint's keys."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """Decoder with its output head. tied=True: the head is the embedding matrix."""

    def __init__(self, config, tied=False):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def arrange(self):
        """Rearrange the weights for decoding: one product for q, k and v, one for gate and up. Copies them once."""
        columns = in_columns(self.model.norm.weight)
        for layer in self.model.layers:
            attn, mlp = layer.self_attn, layer.mlp
            if not self.config.attention_bias:
                attn.qkv = SideBySide(attn.q_proj, attn.k_proj, attn.v_proj)
                attn.out = SideBySide(attn.o_proj) if columns else None
            if not self.config.mlp_bias:
                pair = mlp.gate_proj, mlp.up_proj
                mlp.gate_up = [SideBySide(part) for part in pair] if columns else [SideBySide(*pair)]
                mlp.down = SideBySide(mlp.down_proj) if columns else None
        if self.lm_head is not None and self.lm_head.weight.device.type == "cpu":
            SideBySide(self.lm_head)  # only for its memory layout

    def lay_by_rows(self):
        """Undo `arrange` in fp32 on a CPU, because compiled steps read weights row by row. Copies the weights once.

        Steps that are not compiled are slower afterwards, until `arrange` is called again.
        """
        if not in_columns(self.model.norm.weight):
            return
        with torch.inference_mode(False), torch.no_grad():  # the parameters stay trainable
            for layer in self.model.layers:
                attn, mlp = layer.self_attn, layer.mlp
                attn.qkv = attn.out = mlp.gate_up = mlp.down = None
            for weight in self.parameters():
                weight.data = weight.data.contiguous()

    def _part_changed(self):
        """Undo `arrange` in layers where a weight has been replaced since."""
        for layer in self.model.layers:
            attn, mlp = layer.self_attn, layer.mlp
            if attn.qkv and not all(side.current() for side in (attn.qkv, attn.out) if side):
                attn.qkv = attn.out = None
            if mlp.gate_up and not all(side.current() for side in (*mlp.gate_up, mlp.down) if side):
                mlp.gate_up = mlp.down = None

    def prefill(self, x, cache=None, positions=None, mask=None, choose=None, narrow=None, lookahead=None):
        """Embedded tokens x (B, T, C) -> final hidden states (B, T, C), after the final norm.

        Attention is causal. With a cache, each layer's K and V are packed into it when the layer is done, and the dense
        K and V are freed. After each layer, two optional functions get its q (B, Hq, T, D), k and v (B, Hkv, T, D):

            choose(layer, q, k, v)   returns which tokens every head keeps, (B * Hkv, T) bool, or None for all. Hidden
                                     states do not change, so dropped tokens affect decoding only
            narrow(layer, q, k, v)   returns the tokens that later layers process, indices (T',), or None for all; the
                                     result is then (B, T', C)

        positions (B, T) or (T,) default to 0..T-1. mask replaces the causal mask: bool (True = may attend), or floats
        to add to the scores, broadcast to (B, Hq, T, T). Both are for training on packed sequences, without `narrow`.

        lookahead: a `model.lookahead.Lookahead`. Its m rows follow the prompt in every layer: `choose` and `narrow`
        receive T + m rows of q, k and v; the cache and the result have only the prompt's tokens.
        """
        self._part_changed()
        tokens = x.shape[1]
        if lookahead is not None:
            x = torch.cat((x, lookahead.embeddings.expand(len(x), -1, -1)), 1)
        positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        rope = rope_table(positions, self.config, x.dtype)  # (..., T, 1, D)
        for i, layer in enumerate(self.model.layers):
            x, q, k, v = layer.prefill(x, rope, mask, lookahead and lookahead.layers[i])
            if cache is not None:
                keep = None if choose is None else choose(i, q, k, v)
                cache.pack(i, k[:, :, :tokens], v[:, :, :tokens], keep)
            rows = None if narrow is None else narrow(i, q, k, v)
            if rows is not None:  # tokens keep their positions
                rows, tokens = torch.cat((rows, torch.arange(tokens, x.shape[1], device=x.device))), len(rows)
                x, rope = x[:, rows], tuple(t[..., rows, :, :] for t in rope)
            del q, k, v  # free them before the next layer allocates its own
        return self.model.norm(x[:, :tokens])

    def decode(self, x, cache, turns=None, parts=LayerParts()):
        """One embedded token per sequence, x (B, C) -> final hidden states (B, C). The cache grows by one token.

        turns: `rope_turns`, to compute them once for many steps; parts: a layer's functions, compiled or not.
        """
        rope = rope_table(cache.pos, self.config, x.dtype, turns)  # (B, 1, D)
        x = x.clone()  # the layers add to it in place
        cache.grow()
        try:
            for i, layer in enumerate(self.model.layers):
                rectangle = cache.rectangle(i) if parts.whole else None
                if rectangle is not None:
                    x = parts.whole(layer, x, rope, *rectangle, cache.lengths[i])
                    continue
                q, k, v = parts.before_attention(layer, x, None if cache.fused else rope)
                x = parts.after_attention(layer, x, cache.append_attend(i, q, k, v, rope))
            return self.model.norm(x)
        except BaseException:  # also on Ctrl-C
            cache.give_back()
            raise

    def extend(self, x, cache):
        """A new turn: T embedded tokens per sequence, x (B, T, C), after a cache -> final hidden states (B, T, C).

        Each new token attends to the whole cache and to the new tokens up to itself. The cache grows by T tokens.
        """
        positions = cache.pos[:, None] + torch.arange(x.shape[1], device=x.device)
        rope = rope_table(positions, self.config, x.dtype)  # (B, T, 1, D)
        past = cache.kv_len.clone()
        cache.grow(x.shape[1])
        try:
            for i, layer in enumerate(self.model.layers):
                x = layer.extend(x, rope, cache, i, past[i])
            return self.model.norm(x)
        except BaseException:
            cache.give_back(len(positions[0]))
            raise

    def logits(self, hidden):
        """Final hidden states (..., C) -> logits (..., vocab_size)."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return linear(hidden, head.weight)
