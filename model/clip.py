"""The vision towers CLIP and SigLIP, up to the layer LLaVA reads, before any final norm.

SigLIP (arXiv 2303.15343) is CLIP without the CLS token and the norm before the first layer, and with a bias in the
patch embedding. B pictures, P patches, and CLS in front of them in CLIP (below 1 + P for either), H heads, D channels
per head, C = H * D. Module names are the checkpoint's keys, including `pre_layrnorm` (sic).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def quick_gelu(x):
    """OpenAI's sigmoid approximation of GELU, as used to train CLIP."""
    return x * torch.sigmoid(1.702 * x)


SQUARES = 8  # pictures or tiles that go through a layer together
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


class Embeddings(nn.Module):
    """Patch embeddings by a strided convolution, with CLS in front if the tower has it, plus learned positions."""

    def __init__(self, config):
        super().__init__()
        c, patch, self.has_cls = config.hidden_size, config.patch_size, config.has_cls
        if self.has_cls:
            self.class_embedding = nn.Parameter(torch.randn(c) * 0.02)
        self.patch_embedding = nn.Conv2d(config.num_channels, c, patch, stride=patch, bias=not self.has_cls)
        self.position_embedding = nn.Embedding(config.num_patches + self.has_cls, c)

    def forward(self, pixel_values):  # (B, 3, S, S)
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, P, C)
        if self.has_cls:
            x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1)
        return x + self.position_embedding.weight  # (B, 1 + P, C)


class Attention(nn.Module):
    """Bidirectional multi-head attention: x (B, 1 + P, C) -> the same shape."""

    def __init__(self, config):
        super().__init__()
        c = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1 + P, D), no mask
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with an activation between them: x (..., C) -> (..., C)."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: x (B, 1 + P, C) -> the same shape."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """The tower's transformer, as far as LLaVA uses it."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = Embeddings(config)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.has_cls else None
        self.pre_layrnorm = norm  # SigLIP has none
        layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        # stored in every checkpoint but not used: LLaVA reads earlier features
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values, feature_layers, after=None):
        """Hidden states of the requested layers, with CLS: a list of (B, 1 + P, C) in the order requested.

        pixel_values (B, 3, S, S); feature_layers: indices, 0 = input of the first layer, i = output of the i-th. Layers
        after the last requested one do not run. after(layer, x): called with the index and output of each layer,
        returns what the next layer reads, such as fewer tokens.
        """
        x = self.embeddings(pixel_values)
        x = x if self.pre_layrnorm is None else self.pre_layrnorm(x)
        states = {0: x} if 0 in feature_layers else {}  # no others are held
        for i, layer in enumerate(self.encoder.layers[: max(feature_layers)]):
            # a group of squares at a time: 37 of them have 27,000 tokens
            x = torch.cat([layer(squares) for squares in x.split(SQUARES)]) if len(x) > SQUARES else layer(x)
            x = x if after is None else after(i, x)
            if i + 1 in feature_layers:
                states[i + 1] = x
        return [states[i] for i in feature_layers]


class VisionTower(nn.Module):
    """Wraps `VisionTransformer`, because checkpoint keys start with `vision_tower.vision_model`."""

    def __init__(self, config):
        super().__init__()
        self.vision_model = VisionTransformer(config)

    def forward(self, pixel_values, feature_layers, after=None):
        return self.vision_model(pixel_values, feature_layers, after)
