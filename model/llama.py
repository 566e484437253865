"""The Llama decoder, also Mistral and Qwen2: RMSNorm, rotary positions (RoPE), grouped-query attention, SwiGLU.

B sequences, T tokens, C channels, Hq query heads over Hkv KV heads of D channels, G = Hq / Hkv. There are two forward
passes. In `prefill` a prompt's tokens attend to each other; in `decode` new tokens also attend to a cache: one per
sequence in a decode step, several in a new turn of a conversation. Module names are the checkpoint's keys.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from kernels import merge_states

BLOCK = 512  # tokens of a new turn that are processed together
ROWS = 2048  # tokens of a prompt that go through an MLP together, at least


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(positions, config, dtype):
    """cos and signed sin of RoPE (arXiv 2104.09864) in dtype, each positions.shape + (1, D); the 1 is for heads.

    Channel i is paired with channel i + D/2 (the "half" layout of the checkpoints). The sine has the minus sign of the
    rotation matrix, so `rotate` needs no negation. Angles are computed in fp32.
    """
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)  # 2i for pair i
    speed = config.rope_theta ** (-half / config.head_dim)  # (D/2,), radians per position
    angles = positions[..., None, None] * speed  # (..., 1, D/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, rope):
    """Rotate x (..., H, D) by rope = (cos, signed sin), (..., 1, D) each. `rotated` in kernels/ rounds only once."""
    cos, sin = rope
    if cos.dtype != x.dtype:  # in training under autocast
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


class Linear(nn.Linear):
    """x (B, T, C_in) -> (B, T, C_out). A `model.lookahead.LoRA` changes the output of the look-ahead rows."""

    def forward(self, x, lora=None):
        y = super().forward(x)
        return y if lora is None else lora.add(x, y)


class Attention(nn.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config):
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.q_heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, d
        self.q_proj = Linear(c, self.q_heads * d, bias=config.attention_bias)
        self.k_proj = Linear(c, self.kv_heads * d, bias=config.attention_bias)
        self.v_proj = Linear(c, self.kv_heads * d, bias=config.attention_bias)
        self.o_proj = Linear(self.q_heads * d, c, bias=config.output_bias)

    def project(self, x, rope, adapter=None):
        """x (..., C) -> q (..., Hq, D), k and v (..., Hkv, D); rope, if not None, rotates q and k."""
        q, k, v = (
            getattr(self, name)(x, lora=adapter and getattr(adapter, name)).unflatten(-1, (-1, self.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def prefill(self, x, rope, mask=None, adapter=None, prefix=(), attend=None):
        """x (B, T, C) -> y (B, T, C) and this layer's q (B, Hq, T, D) and k, v (B, Hkv, T, D).

        prefix (for training look-ahead rows): k and v (B, Hkv, T', D) before x's own; mask must cover T' + T columns.
        attend(q, k, v) -> (B, Hq, T, D) replaces the attention over all tokens.
        """
        q, k, v = (t.transpose(1, 2) for t in self.project(x, rope, adapter))  # (B, H, T, D)
        if prefix:
            k, v = (torch.cat(pair, 2) for pair in zip(prefix, (k, v), strict=True))
        if attend is not None:
            y = attend(q, k, v)
        else:
            y = dense_attention(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2), lora=adapter and adapter.o_proj), q, k, v

    def decode(self, x, rope, cache, layer):
        """New tokens, x (B, C) or (B, T, C) -> y like x. Appends their k and v to the cache."""
        if x.ndim == 2:
            q, k, v = self.project(x, None if cache.fused else rope)  # the fused kernel rotates
            y = cache.append_attend(layer, q, k, v, rope)  # only that kernel uses rope
        else:
            q, k, v = self.project(x, rope)  # (B, T, H, D)
            cache.append(layer, k, v)
            earlier = cache.attend(layer, q.contiguous(), cache.len_before[layer], return_lse=True)
            y, _ = merge_states(*earlier, *causal_attention(q, k, v))
            cache.add_scores(layer, q)
        return self.o_proj(y.flatten(-2))


def dense_attention(q, k, v, mask=None):
    """Attention of q (B, Hq, T, D) to k and v (B, Hkv, T', D) -> like q; causal, or with a mask (see `Llama.prefill`).

    Without a mask no T x T matrix is stored. In fp32, PyTorch has no fused CUDA kernel for grouped heads. There, and
    with the same result on a CPU, each KV head becomes a sequence of G heads that share k and v without a copy.
    """
    (b, hq, *_), hkv = q.shape, k.shape[1]
    if mask is None and q.dtype == torch.float32 and hq != hkv:
        q, (k, v) = q.unflatten(1, (hkv, -1)).flatten(0, 1), (t.flatten(0, 1)[:, None] for t in (k, v))
        k, v = (t.expand(-1, hq // hkv, -1, -1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).unflatten(0, (b, hkv)).flatten(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=hq != hkv)


def causal_attention(q, k, v):
    """Causal attention among T tokens, computed in fp32 (float64 for float64), and its log-sum-exp.

    Written out because PyTorch's SDPA does not return the log-sum-exp, and rows of `ragged_decode` see all tokens of a
    segment. Materialises B * Hq * T * T scores; T is at most BLOCK.

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
        self.gate_proj = Linear(c, f, bias=config.mlp_bias)
        self.up_proj = Linear(c, f, bias=config.mlp_bias)
        self.down_proj = Linear(f, c, bias=config.mlp_bias)

    def forward(self, x, adapter=None):
        gate, up, down = (adapter.gate_proj, adapter.up_proj, adapter.down_proj) if adapter else (None, None, None)
        y = F.silu(self.gate_proj(x, lora=gate)) * self.up_proj(x, lora=up)
        return self.down_proj(y, lora=down)


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def prefill(self, x, rope, mask=None, adapter=None, prefix=(), attend=None, mlp=None):
        """Like `Attention.prefill`, for the whole layer -> x, q, k, v. mlp(module, x) -> y replaces the MLP."""
        y, q, k, v = self.self_attn.prefill(self.input_layernorm(x), rope, mask, adapter, prefix, attend)
        x = x + y
        del y
        if mlp is not None:
            return x + mlp(self.mlp, self.post_attention_layernorm(x)), q, k, v
        # in blocks, because the MLP's inner rows are several times as wide as x; look-ahead rows are in the last one
        *blocks, last = x.tensor_split(max(1, x.shape[1] // ROWS), 1)
        done = [self.after_attention(block) for block in blocks] + [self.after_attention(last, adapter)]
        return torch.cat(done, 1) if blocks else done[0], q, k, v

    def after_attention(self, x, adapter=None):
        """The half of the layer after attention, x (..., C) -> the same shape."""
        return x + self.mlp(self.post_attention_layernorm(x), adapter)

    def queries_and_keys(self, x, rope, rows):
        """Of an input x (B, T, C): q (B, Hq, R, D) of the rows (a slice), and k (B, Hkv, T, D)."""
        x, attn = self.input_layernorm(x), self.self_attn
        q, k = (t.unflatten(-1, (-1, attn.head_dim)) for t in (attn.q_proj(x[:, rows]), attn.k_proj(x)))
        q = rotate(q, tuple(t[..., rows, :, :] for t in rope))
        return q.transpose(1, 2), rotate(k, rope).transpose(1, 2)

    def decode(self, x, rope, cache, layer):
        """Like `Attention.decode`, for the whole layer -> x."""
        return self.after_attention(x + self.self_attn.decode(self.input_layernorm(x), rope, cache, layer))


class Trunk(nn.Module):
    """The decoder without its output head; `model.` in the checkpoint's keys."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Output(nn.Module):
    """Hidden states (..., C) and the head's weight (vocab_size, C) -> logits (..., vocab_size)."""

    def forward(self, hidden, weight):
        return F.linear(hidden, weight)


class Llama(nn.Module):
    """Decoder with its output head. tied=True: the head is the embedding matrix."""

    def __init__(self, config, tied=False):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.output = Output()

    def prefill(
        self, x, cache=None, positions=None, mask=None, prune=None, lookahead=None, following=None, inside=None
    ):
        """Embedded tokens x (B, T, C) -> final hidden states (B, T, C), after the final norm.

        Attention is causal. With a cache, each layer's K and V are packed into it when the layer is done, and the dense
        K and V are freed.

        prune(layer, q, k, v, x, upcoming) is called after each layer with its q (B, Hq, T, D), k and v (B, Hkv, T, D)
        and its output x (B, T, C), which it may change in place. upcoming is None after the last layer, else
        `queries_and_keys` of the next one with x and rope. It returns the tokens that each head keeps in the cache,
        (B * Hkv, T) bool, and those that later layers process, indices (T',); None means all. If later layers process
        fewer tokens, the result is (B, T', C). Keeping fewer in the cache does not change hidden states; it affects
        decoding only.

        inside(layer) is called before each layer. It returns functions `attend` and `mlp` that replace the attention
        and the MLP of this layer (see `DecoderLayer.prefill`), or None for either.

        positions (B, T) or (T,), for RoPE, default to 0..T-1. following: the position of the next token, by default the
        one after the last. mask replaces the causal mask, for training on packed sequences: bool (True = may attend),
        or floats to add to the scores, broadcast to (B, Hq, T, T).

        lookahead: a `model.lookahead.Lookahead`. Its m rows follow the prompt in every layer: `prune` receives T + m
        rows of q, k and v; the cache and the result have only the prompt's tokens.
        """
        tokens = x.shape[1]  # without the look-ahead rows
        positions = torch.arange(tokens, device=x.device) if positions is None else positions
        following = positions[..., -1] + 1 if following is None else following
        if lookahead is not None:
            x = torch.cat((x, lookahead.embeddings.expand(len(x), -1, -1)), 1)
            positions = torch.cat((positions, following + torch.arange(lookahead.rows, device=x.device)))
        rope = rope_table(positions, self.config, x.dtype)  # (..., T, 1, D)
        for i, layer in enumerate(self.model.layers):
            attend, mlp = (None, None) if inside is None else inside(i)
            x, q, k, v = layer.prefill(x, rope, mask, lookahead and lookahead.layers[i], attend=attend, mlp=mlp)
            after = self.model.layers[i + 1 : i + 2]
            upcoming = partial(after[0].queries_and_keys, x, rope) if after else None
            keep, go_on = (None, None) if prune is None else prune(i, q, k, v, x, upcoming)
            if cache is not None:
                cache.pack(i, k[:, :, :tokens], v[:, :, :tokens], keep)
            if go_on is not None:  # look-ahead rows stay too, and all keep their positions
                stay = torch.cat((go_on, torch.arange(tokens, x.shape[1], device=x.device)))
                x, rope, tokens = x[:, stay], tuple(t[..., stay, :, :] for t in rope), len(go_on)
            del q, k, v, upcoming  # free them before the next layer allocates its own
        if cache is not None:
            cache.pos[:] = following
        return self.model.norm(x[:, :tokens])

    def decode(self, x, cache, layers=None):
        """Embedded new tokens after a cache, x (B, C) or (B, T, C) -> final hidden states like x.

        Each new token attends to the whole cache, to earlier new tokens and to itself. The cache grows by the new
        tokens; after an error or Ctrl-C it is unchanged, except that a cache that evicts may have given up a token; the
        next step then gives up none. Tokens (B, T, C) are of a prompt and are never evicted. ValueError for more than
        BLOCK tokens; see `extend`.

        layers: functions (x, rope, cache, layer) -> x to use instead of each layer's `decode` (model/fast.py).
        """
        tokens = 1 if x.ndim == 2 else x.shape[1]
        if tokens > BLOCK:
            raise ValueError(f"{tokens} new tokens need a matrix of {tokens} x {tokens} scores; use extend()")
        positions = cache.pos if x.ndim == 2 else cache.pos[:, None] + torch.arange(tokens, device=x.device)
        rope = rope_table(positions, self.config, x.dtype)
        with cache.reserving(tokens):
            cache.grow(tokens, held=x.ndim == 3)
            for i, run in enumerate(layers or [layer.decode for layer in self.model.layers]):
                x = run(x, rope, cache, i)
            return self.model.norm(x)

    def extend(self, x, cache, answer=False):
        """`decode` for any number of tokens (B, T, C), in blocks, so that no T x T matrix is stored.

        answer: the tokens are of an answer, so a cache that evicts does so before each of them.
        """
        if answer and cache.evicts:
            return torch.stack([self.decode(row, cache) for row in x.unbind(1)], 1)
        with cache.reserving(x.shape[1]):  # the arenas move at most once
            return torch.cat([self.decode(block, cache) for block in x.split(BLOCK, 1)], 1)

    def step(self, ids, cache, layers=None):
        """A decode step: append one token per sequence to the cache, ids (B,) -> next logits (B, V)."""
        with cache.reserving(1):
            return self.logits(self.decode(self.model.embed_tokens(ids), cache, layers))

    @property
    def head(self):
        """The module whose weight (vocab_size, C) gives the logits."""
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden):
        """Final hidden states (..., C) -> logits (..., vocab_size)."""
        return self.output(hidden, self.head.weight)
