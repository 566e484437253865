"""Shapes of known LLaVA checkpoints: the fields of config.json that differ from their defaults, as in published files.

The defaults are those of `model.config.TextConfig`, a 7B model.
"""

from types import SimpleNamespace

_VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
_VICUNA_13B = {
    **_VICUNA, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
_MISTRAL = {
    "model_type": "mistral", "intermediate_size": 14336, "max_position_embeddings": 32768, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32064,
}  # fmt: skip
_CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_DEMO = {
    "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "vocab_size": 640,
}  # fmt: skip
_DEMO_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 5,
    "num_attention_heads": 6, "image_size": 224, "patch_size": 14, "projection_dim": 192,
}  # fmt: skip
_TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "vocab_size": 512,
}  # fmt: skip
_TINY_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32,
}  # fmt: skip
# the 7B's proportions at a quarter of its width, with 4 layers, behind a small tower with CLIP-L's patches
_THIN = {
    **_VICUNA, "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4, "num_attention_heads": 8,
    "vocab_size": 512, "max_position_embeddings": 16384,
}  # fmt: skip
_THIN_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 4, "image_size": 336, "patch_size": 14, "projection_dim": 128,
}  # fmt: skip
_WIDE = {**_VICUNA, "num_hidden_layers": 8}  # 8 layers of the 7B, for a GPU
_TINY_LONG = {**_TINY, "num_key_value_heads": 2, "max_position_embeddings": 4096}

_SIGLIP_384 = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
_QWEN2 = {
    "model_type": "qwen2", "attention_bias": True, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}  # fmt: skip
_QWEN2_05B = {
    **_QWEN2, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 152000,
}  # fmt: skip
_QWEN2_7B = {
    **_QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152128,
}  # fmt: skip
_TINY_QWEN2 = {
    **_QWEN2, "hidden_size": 56, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 7,
    "num_key_value_heads": 1, "max_position_embeddings": 16384, "vocab_size": 512,
}  # fmt: skip
_TINY_SIGLIP = {
    **_SIGLIP_384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 56,
}  # fmt: skip
# the 0.5B's proportions at half of its width, with 4 layers, behind a small tower with SigLIP's patches
_THIN_QWEN2 = {
    **_QWEN2_05B, "hidden_size": 448, "intermediate_size": 2432, "num_hidden_layers": 4, "num_attention_heads": 7,
    "num_key_value_heads": 1, "vocab_size": 512,
}  # fmt: skip
_THIN_SIGLIP = {
    **_SIGLIP_384, "hidden_size": 144, "intermediate_size": 538, "num_hidden_layers": 6, "num_attention_heads": 2,
}  # fmt: skip

SHAPES = {  # name: (text_config, vision_config, id of <image>; <pad> is the next one)
    "llava-1.5-7b": (_VICUNA, _CLIP_L_336, 32000),
    "llava-1.5-13b": (_VICUNA_13B, _CLIP_L_336, 32000),
    "next-vicuna-7b": (_VICUNA, _CLIP_L_336, 32000),
    "next-vicuna-13b": (_VICUNA_13B, _CLIP_L_336, 32000),
    "next-mistral-7b": (_MISTRAL, _CLIP_L_336, 32000),
    "demo": (_DEMO, _DEMO_VISION, 638),
    "thin-next": (_THIN, _THIN_VISION, 510),
    "wide-next": (_WIDE, _CLIP_L_336, 32000),
    "tiny": (_TINY, _TINY_VISION, 510),
    "tiny-next": (_TINY_LONG, {**_TINY_VISION, "image_size": 56}, 510),
    "onevision-0.5b": (_QWEN2_05B, _SIGLIP_384, 151646),
    "onevision-7b": (_QWEN2_7B, _SIGLIP_384, 151646),
    "thin-onevision": (_THIN_QWEN2, _THIN_SIGLIP, 509),
    "tiny-onevision": (_TINY_QWEN2, _TINY_SIGLIP, 509),
}

TIED = ("onevision-0.5b", "thin-onevision", "tiny-onevision")  # the head is the embedding matrix

# B, Hkv, G, D of layers on which the kernels are timed. phi3: the D of Phi-3-mini is no power of two
LAYERS = {
    "demo": (1, 4, 2, 32), "7b": (1, 32, 1, 128), "gqa8": (1, 8, 4, 128), "gqa8 x 8": (8, 8, 4, 128),
    "qwen": (1, 4, 7, 128), "qwen-0.5b": (1, 2, 7, 64), "g8": (1, 8, 8, 128), "phi3": (1, 32, 1, 96),
}  # fmt: skip
LONGEST = 2**15  # kept tokens per head (mean, or of a skewed head) above which `fit` uses more sequences


def fit(shape, size, itemsize, in_mbytes, ratio=1):
    """(sequences, mean tokens per head) of a layer with `size` tokens per head, or `size` MB of K and V in total.

    ratio: the longest head over the mean.
    """
    b, hkv, _, d = LAYERS[shape]
    mean = size * 1e6 / (2 * b * hkv * d * itemsize) if in_mbytes else size
    # a skewed head must not hold most of the rows; if bytes are given, no head may exceed LONGEST
    while b * hkv < 2 * ratio or (in_mbytes and ratio * mean > LONGEST):
        b, mean = 2 * b, mean / 2 if in_mbytes else mean
    return b, max(1, round(mean))


def one_long(segments, total, longest):
    """Lengths that sum to `total`: first `longest`, then the rest as equal as possible, at least 1 each."""
    longest = min(longest, total - (segments - 1))
    each, over = divmod(total - longest, segments - 1)
    return [longest] + over * [each + 1] + (segments - 1 - over) * [each]


def text_config(name):
    """The dimensions of a shape's decoder, defaults filled in, as attributes with the names of config.json."""
    seven = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = SimpleNamespace(**seven | SHAPES[name][0])
    config.num_key_value_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    config.head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return config
