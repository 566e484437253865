"""A checkpoint's config.json, with defaults for the keys that published configs omit.

Field names are Hugging Face's. The published llava-1.5-7b config gives four numbers of its language model
and relies on class defaults for the rest, so the defaults below are part of the format.
"""

import codecs
import json
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path


class InputError(ValueError):
    """The user's input cannot be used. The message is one line: what is wrong; what to do."""


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower, CLIP or SigLIP. Defaults are those of transformers' `clip_vision_model` (a ViT-B/32)."""

    model_type: str = "clip_vision_model"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def num_patches(self):
        """Patches of a picture, without CLS."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def has_cls(self):
        """True if the tower reads a CLS token before the patches. SigLIP has none."""
        return self.model_type == "clip_vision_model"


# A LLaVA config without vision_config means CLIP ViT-L/14 at 336 px.
CLIP_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip

# Defaults of `siglip_vision_model` that differ from those of CLIP; the tower of a LLaVA-OneVision without vision_config
SIGLIP = {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
SIGLIP_SO400M_384 = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip

# Defaults of `mistral` and `qwen2` that differ from those of `llama`. In Mistral's files, null turns the sliding window
# off. Qwen2 always has a bias in q, k and v.
MISTRAL = {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
QWEN2 = {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
}  # fmt: skip
# Default (height, width) of the canvases that LLaVA-NeXT and LLaVA-OneVision cut into tiles
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
PINPOINTS_ONEVISION = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))


@dataclass(frozen=True)
class TextConfig:
    """Llama, Mistral or Qwen2 decoder. Defaults are those of `llama`, a 7B model (LLaVA's files set rms_norm_eps to
    1e-5)."""

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # None: as many as query heads
    head_dim: int = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int = None  # how many tokens a token attends to, itself included; None: all

    @property
    def context(self):
        """Longest sequence in tokens, limited to the sliding window: up to that length the window has no effect."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @property
    def output_bias(self):
        """True if the attention's output projection has a bias. Qwen2's has none."""
        return self.attention_bias and self.model_type != "qwen2"

    def __post_init__(self):
        # the two defaults that depend on other fields; object.__setattr__ because the class is frozen
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)


@dataclass(frozen=True)
class LlavaConfig:
    """The whole model: vision tower, decoder, and how they are joined."""

    model_type: str = "llava"
    text_config: TextConfig = field(default_factory=TextConfig)
    vision_config: VisionConfig = field(default_factory=lambda: VisionConfig(**CLIP_L_336))
    image_token_index: int = 32000
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int | tuple = -2  # a tuple: those layers, concatenated along the channels
    vision_feature_select_strategy: str = "default"  # "default" drops CLS, "full" keeps it
    tie_word_embeddings: bool = False
    video_token_index: int = None  # LLaVA-OneVision
    image_grid_pinpoints: tuple = None  # LLaVA-NeXT: sizes ((a, b), ...) of the canvases that tiles are cut from
    max_tiles: int = None  # LLaVA-OneVision: the tokens of more tiles than this are shrunk to about as many
    dtype: str = None  # of the stored weights; None if the file does not say

    @property
    def feature_layers(self):
        """The selected hidden states as indices 0..num_hidden_layers; 0 is the input of the first layer."""
        layers = self.vision_feature_layer
        depth = self.vision_config.num_hidden_layers
        return tuple(i if i >= 0 else depth + 1 + i for i in (layers if isinstance(layers, tuple) else (layers,)))

    @property
    def image_tokens(self):
        """Tokens per S x S square: a whole picture of LLaVA-1.5, one tile of LLaVA-NeXT."""
        dropped = self.vision_feature_select_strategy == "default"
        return self.vision_config.num_patches + self.vision_config.has_cls - dropped


def read_config(folder):
    """LlavaConfig of a checkpoint folder. InputError if config.json is missing, malformed or not supported."""
    raw = read_json(Path(folder) / "config.json")
    if raw is None:
        raise InputError(f"{folder} has no config.json; give the folder of a llava-hf checkpoint")
    with making_sense_of(Path(folder) / "config.json"):
        return parse_config(raw)


def parse_config(raw):
    """LlavaConfig from a parsed config.json (dict), in old or new spelling.

    InputError for unsupported models; ValueError and TypeError for malformed values, see `making_sense_of`.
    """
    kind = raw.get("model_type")
    if kind == "llava_llama" or "mm_vision_tower" in raw or "mm_projector_type" in raw:
        raise InputError(
            "config.json is in the format of the original LLaVA code; use the llava-hf conversion of the checkpoint"
        )
    if kind not in ("llava", "llava_next", "llava_onevision"):
        raise InputError(
            f"model_type is {kind!r}; only LLaVA-1.5 ('llava'), LLaVA-NeXT ('llava_next') and LLaVA-OneVision "
            "('llava_onevision') can be used"
        )
    onevision = kind == "llava_onevision"
    raw = {**raw, **{f"{of}_token_index": raw.get(f"{of}_token_index", raw.get(f"{of}_token_id")) for of in _TOKENS}}
    text, vision = dict(raw.get("text_config") or {}), raw.get("vision_config")
    vision = dict((SIGLIP_SO400M_384 if onevision else CLIP_L_336) if vision is None else vision)
    if onevision:  # the defaults that differ from those of LLaVA-1.5
        text["model_type"] = text.get("model_type") or "qwen2"
        vision["model_type"] = vision.get("model_type") or "siglip_vision_model"
        raw = {**ONEVISION, **{key: value for key, value in raw.items() if value is not None}}
    for part in (raw, text, vision):
        _refuse_unknown_settings(part)
    # transformers 5 moved the RoPE settings into rope_parameters; if both dicts exist, it uses rope_scaling
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    text["rope_theta"] = rope.get("rope_theta", text.get("rope_theta"))
    text = _with_defaults(text)
    if vision.get("model_type") == "siglip_vision_model":
        vision = {**SIGLIP, **{key: value for key, value in vision.items() if value is not None}}
    layers = raw.get("vision_feature_layer", -2)
    if not all(isinstance(i, int) for i in (layers if isinstance(layers, list) else [layers])):
        raise ValueError(f"vision_feature_layer is {layers!r}")
    top = {
        **raw,
        "vision_feature_layer": tuple(layers) if isinstance(layers, list) else layers,
        "tie_word_embeddings": raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"),
        "video_token_index": raw["video_token_index"] if onevision else None,
        "image_grid_pinpoints": None if kind == "llava" else _pinpoints(raw, onevision),
        "max_tiles": max_tiles_of(raw["vision_aspect_ratio"]) if onevision else None,
        "dtype": raw.get("dtype", raw.get("torch_dtype")),
        "text_config": _fill(TextConfig, text),
        "vision_config": _fill(VisionConfig, vision),
    }
    config = _fill(LlavaConfig, top)
    _refuse_unknown(config)
    return config


_TOKENS = "image", "video"  # their ids are `..._token_index` in old files and `..._token_id` in new ones
# Defaults of `llava_onevision` that differ from those of `llava`
ONEVISION = {
    "image_token_index": 151646, "video_token_index": 151647, "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
}  # fmt: skip


def _with_defaults(text):
    """A text_config with the defaults of its model_type and the sliding window that takes effect, or None."""
    kind = text.get("model_type")
    if kind == "mistral":
        return {**MISTRAL, **text}
    if kind != "qwen2":
        return {**text, "sliding_window": None}
    kinds, depth = text.get("layer_types"), text.get("num_hidden_layers", 32)
    some = text.get("max_window_layers", 28) < depth if kinds is None else "sliding_attention" in kinds
    window = text.get("sliding_window", 4096) if text.get("use_sliding_window") and some else None
    return {**QWEN2, **text, "attention_bias": True, "sliding_window": window}


def max_tiles_of(text):
    """The number in "anyres_max_9". InputError for other texts."""
    number = str(text).removeprefix("anyres_max_")
    if not number.isdecimal() or int(number) < 1:
        raise InputError(f"vision_aspect_ratio is {text!r}; only anyres_max_N can be used")
    return int(number)


def _pinpoints(raw, onevision):
    """image_grid_pinpoints ((a, b), ...) of a config with tiles. ValueError if they are malformed."""
    given = raw.get("image_grid_pinpoints")
    default = PINPOINTS_ONEVISION if onevision else PINPOINTS
    pairs = default if given is None else tuple(tuple(pair) for pair in given)
    if not pairs or not all(len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair) for pair in pairs):
        raise ValueError(f"image_grid_pinpoints is {given!r}")
    return pairs


def decode_text(data):
    """Decode UTF-8 bytes; drop a byte-order mark and make line ends \\n. ValueError for other encodings."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16; save it as UTF-8")
    return plain_text(data.decode())


def plain_text(text):
    """The text without byte-order mark, with \\n as line end."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_json(path):
    """The parsed file, a dict; None if there is no file. InputError if it is not a JSON object."""
    try:
        value = json.loads(decode_text(Path(path).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError, RecursionError) as broken:
        raise InputError(f"{path} is not readable JSON ({broken}); fetch the file again") from broken
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; fetch the file again")
    return value


@contextmanager
def making_sense_of(path):
    """Turn errors caused by malformed content of a file (a word instead of a number) into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, AttributeError, KeyError, ValueError, ArithmeticError) as broken:
        what = " ".join(str(broken).split())
        raise InputError(f"{path} does not make sense ({what}); take the file of the original checkpoint") from broken


def _fill(kind, raw):
    """The dataclass `kind`, filled from the keys of raw; missing and null keys take the class default."""
    known = {f.name: raw[f.name] for f in fields(kind) if raw.get(f.name) is not None}
    types = {f.name: f.type for f in fields(kind)}
    for name, value in known.items():
        wanted = (int, float) if types[name] is float else types[name]
        if not isinstance(value, wanted) or (isinstance(value, bool) and types[name] is not bool):
            raise ValueError(f"{name} is {value!r}")
        if types[name] in (int, float) and not (value > 0 or name.endswith("token_index") and value == 0):
            raise ValueError(f"{name} is {value!r}")
    return kind(**known)


# Settings of other decoders that change the arithmetic, and the values for which they do not
NOT_COMPUTED = {
    "partial_rotary_factor": 1, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "query_pre_attn_scalar": None, "attention_multiplier": None, "embedding_multiplier": 1, "residual_multiplier": 1,
    "logits_scaling": 1, "logit_scale": 1, "clip_qkv": None, "use_qk_norm": False, "qk_layernorm": False,
    "num_local_experts": None,
}  # fmt: skip


def _refuse_unknown_settings(part):
    """InputError for unsupported settings in config.json or one of its nested configs."""
    quantised = part.get("quantization_config") or part.get("compression_config")
    if quantised:
        how = isinstance(quantised, dict) and quantised.get("quant_method") or "quantization_config"
        raise InputError(
            f"config.json describes quantised weights ({how}); use an unquantised copy in F32, BF16 or F16"
        )
    places = [part]
    for name in ("rope_scaling", "rope_parameters"):
        rope = part.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
            what = f"rope type {kind!r}" if kind != "default" else "RoPE settings per layer"
            raise InputError(f"config.json asks for {what} in {name}; only the rope type 'default' is supported")
        places.append(rope)
    for place in places:
        for name, neutral in NOT_COMPUTED.items():
            if place.get(name) not in (None, neutral):
                raise InputError(f"config.json asks for {name} {place[name]!r}; only models without it are supported")


# vision towers and their activations
TOWERS = {"clip_vision_model": ("quick_gelu", "gelu"), "siglip_vision_model": ("gelu_pytorch_tanh", "gelu")}


def _refuse_unknown(config):
    """InputError for the first setting that would change the arithmetic and is not implemented."""
    text, vision = config.text_config, config.vision_config
    strategy, heads, kv = config.vision_feature_select_strategy, text.num_attention_heads, text.num_key_value_heads
    side, depth, canvases = vision.image_size, vision.num_hidden_layers, config.image_grid_pinpoints or ()
    uneven = [pair for pair in canvases if pair[0] % side or pair[1] % side]
    acts = TOWERS.get(vision.model_type, ())
    wide, towers, act, layer = (
        vision.hidden_size, vision.num_attention_heads, vision.hidden_act, config.vision_feature_layer,
    )  # fmt: skip
    for holds, what, understood in (
        (
            text.model_type in ("llama", "mistral", "qwen2"),
            f"text model_type {text.model_type!r}",
            "llama, mistral and qwen2",
        ),
        (acts, f"vision model_type {vision.model_type!r}", " and ".join(TOWERS)),
        (text.hidden_act == "silu", f"text hidden_act {text.hidden_act!r}", "'silu'"),
        (act in acts, f"vision hidden_act {act!r}", " and ".join(acts)),
        (config.projector_hidden_act == "gelu", f"projector_hidden_act {config.projector_hidden_act!r}", "'gelu'"),
        (strategy in ("default", "full"), f"vision_feature_select_strategy {strategy!r}", "default and full"),
        (
            vision.has_cls or strategy == "full",
            f"vision_feature_select_strategy {strategy!r} of a tower without CLS",
            "full",
        ),
        (
            not canvases or config.image_tokens == vision.num_patches,
            f"tiles and vision_feature_select_strategy {strategy!r}",
            "default",
        ),
        (not uneven, f"image_grid_pinpoints {uneven[:4]}", f"multiples of {side}"),
        (heads % kv == 0, f"{heads} query heads over {kv} KV heads", "whole groups"),
        (text.head_dim % 2 == 0, f"head_dim {text.head_dim}", "even numbers"),
        (wide % towers == 0, f"{towers} vision heads over {wide} channels", "whole heads"),
        (vision.num_channels == 3, f"{vision.num_channels} colour channels", "three"),
        (vision.patch_size <= side, f"patches of {vision.patch_size} in {side} pixels", "smaller ones"),
        (
            all(0 <= i <= depth for i in config.feature_layers),
            f"vision_feature_layer {layer}",
            f"-{depth + 1} to {depth}",
        ),
    ):
        if not holds:
            raise InputError(f"config.json asks for {what}; only {understood} can be used")


def brief(value):
    """A value for an error message: simple values are shown, up to 60 characters, others by their type."""
    simple = value is None or isinstance(value, str | bool | int | float)
    return repr(value)[:60] if simple else f"a {type(value).__name__}"
