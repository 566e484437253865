"""Our model against transformers (the oracle) on random weights: logits, greedy ids, pixels, configs."""

import copy
import json
import types
from dataclasses import fields, replace

import pytest
import torch
from conftest import IMAGE_ID, TEXT, VISION, preprocess
from PIL import Image

from model import Generation, Sampling, load
from model.checkpoint import canonical_key
from model.config import CLIP_L_336, TextConfig, VisionConfig, parse_config
from model.image import ImageSettings, read_image
from model.llava import Llava
from tests.seeds import python_random, torch_random

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

CASES = {  # differences from the base config of conftest: (text, vision, top)
    "mha, head_dim 16": ({"num_key_value_heads": 4}, {}, {}),
    "gqa, head_dim 20 is not hidden/heads": ({"head_dim": 20}, {}, {}),
    "gqa, head_dim 80, 3 layers": ({"head_dim": 80, "num_hidden_layers": 3}, {}, {}),
    "mqa, head_dim 64": ({"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}, {}, {}),
    "mqa, hidden 48": ({"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}, {}, {}),
    "last layer": ({}, {}, {"vision_feature_layer": -1}),
    "third last layer, cls kept": ({}, {}, {"vision_feature_layer": -3, "vision_feature_select_strategy": "full"}),
    "first layer, counted from the front": ({}, {}, {"vision_feature_layer": 1}),
    "two layers": ({}, {}, {"vision_feature_layer": [-3, -2]}),
    "two layers, cls kept": ({}, {}, {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full"}),
    "vision gelu, 16 patches": ({}, {"hidden_act": "gelu", "image_size": 56}, {}),
    "image is no multiple of patch": ({}, {"image_size": 39, "num_attention_heads": 4}, {}),
    "tied": ({}, {}, {"tie_word_embeddings": True}),
    "attention and mlp bias": ({"attention_bias": True, "mlp_bias": True}, {}, {}),
    "projector without bias": ({}, {}, {"multimodal_projector_bias": False}),
    "other eps and theta": (
        {"rms_norm_eps": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 30.0}},
        {"layer_norm_eps": 0.1},
        {},
    ),
}
PROMPTS = {
    0: "USER: how many red circles are there? ASSISTANT:",
    1: "USER: <image>\nwhat is the content of this picture? ASSISTANT:",
    2: "USER: <image> above <image>\nyes or no? ASSISTANT:",
}


@pytest.fixture(scope="module")
def pair(make_hf_checkpoint, tmp_path_factory):
    """Function (case) -> (transformers' model, our checkpoint) with the same weights, made once per case."""
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            text, vision, top = CASES[case]
            made[case] = make_hf_checkpoint(folder, text, vision, top, seed=len(made)), load(folder, dtype="fp32")
        return made[case]

    return get


def pictures(count):
    return [noise(40 + 9 * i, 31, seed=i) for i in range(count)]


def noise(width, height, mode="RGB", seed=0):
    data = python_random(seed).randbytes(width * height * len(Image.new(mode, (1, 1)).getbands()))
    return Image.frombytes(mode, (width, height), data)


def hf_inputs(checkpoint, ids, pixels):
    """Arguments of transformers' model: each image id repeated once per image token."""
    count = checkpoint.config.image_tokens
    expanded = [i for token in ids for i in [token] * (count if token == IMAGE_ID else 1)]
    inputs = {"input_ids": torch.tensor([expanded])}
    return inputs | ({"pixel_values": torch.stack(pixels)} if pixels else {})


def float64_twin(hf):
    """The same model entirely in float64, even where transformers always computes in fp32."""

    def norm(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt() * self.weight

    def rotary(self, x, position_ids):
        d, theta = 2 * len(self.inv_freq), self.config.rope_parameters["rope_theta"]
        frequencies = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
        angles = position_ids[..., None].double() * torch.cat((frequencies, frequencies))
        return angles.cos(), angles.sin()

    twin = copy.deepcopy(hf).double()
    for module in twin.modules():
        if type(module).__name__.endswith("RMSNorm"):  # of Llama, Mistral, Qwen2
            module.forward = types.MethodType(norm, module)
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = types.MethodType(rotary, module)
    return twin


def our_logits(checkpoint, ids, pixels):
    model = checkpoint.model
    x, spans = model.splice(ids, model.encode_images(torch.stack(pixels)) if pixels else ())
    return model.language_model.logits(model.language_model.prefill(x[None]))[0], spans


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("images", PROMPTS)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_prefill_logits_at_all_positions_are_as_exact_as_transformers(pair, case, images):
    hf, checkpoint = pair(case)
    ids = checkpoint.tokenizer.encode(PROMPTS[images])
    pixels = [preprocess(p, checkpoint.image_settings) for p in pictures(images)]
    inputs = hf_inputs(checkpoint, ids, pixels)
    ours, spans = our_logits(checkpoint, ids, pixels)
    theirs = hf(**inputs).logits[0]
    if pixels:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    exact = float64_twin(hf)(**inputs).logits[0]
    assert exact.dtype == torch.float64 and ours.shape == exact.shape and exact.std() > 0.5
    two_ulp = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + two_ulp
    assert [stop - start for start, stop in spans] == [checkpoint.config.image_tokens] * images
    assert all(inputs["input_ids"][0, start:stop].eq(IMAGE_ID).all() for start, stop in spans)


def both_ids(hf, checkpoint, images, count, stop_ids=()):
    """Our Generation after `count` tokens, or after a stop id, and all the ids of transformers."""
    asked = PROMPTS[images], pictures(images), Sampling(max_new_tokens=count)
    ours = Generation(replace(checkpoint, stop_ids=stop_ids), *asked, template="raw")
    list(ours)
    theirs = hf.generate(
        **hf_inputs(checkpoint, ours.ids, ours.pixels),
        do_sample=False, max_new_tokens=count, suppress_tokens=ours.checkpoint.never_ids,
        eos_token_id=list(stop_ids) or None,
    )  # fmt: skip
    return ours, theirs[0].tolist()


@pytest.mark.parametrize("case", CASES)
def test_32_greedy_ids_are_those_of_transformers(pair, case):
    ours, theirs = both_ids(*pair(case), list(CASES).index(case) % 3, 32)
    assert ours.token_ids == theirs[-32:] and ours.finish_reason == "length"
    assert len(set(ours.token_ids)) > 3  # the model does not repeat one word forever


def test_an_answer_ends_where_transformers_ends_it(pair):
    both = pair("mha, head_dim 16")
    stop = both_ids(*both, 1, 12)[0].token_ids[7]
    ours, theirs = both_ids(*both, 1, 12, (stop,))
    assert [*ours.token_ids, stop] == theirs[ours.prompt_tokens :] and ours.finish_reason == "stop"


# ---------------------------------------------------------------- the vision tower

TOWERS = [c for c in CASES if "layer" in c and "3 layers" not in c] + ["vision gelu, 16 patches"]


@pytest.mark.parametrize("case", TOWERS)
@torch.inference_mode()
def test_features_are_the_hidden_states_of_the_chosen_layers(pair, case):
    hf, checkpoint = pair(case)
    size, layers = checkpoint.config.vision_config.image_size, checkpoint.config.feature_layers
    pixels = torch.randn(2, 3, size, size, generator=torch_random(0))
    theirs = hf.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    for state, layer in zip(checkpoint.model.vision_tower(pixels, layers), layers, strict=True):
        torch.testing.assert_close(state, theirs[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", TOWERS)
@torch.inference_mode()
def test_vision_layers_behind_the_feature_layer_are_not_run(pair, case):
    _, checkpoint = pair(case)
    model, last = checkpoint.model, max(checkpoint.config.feature_layers)
    size = checkpoint.config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch_random(0))
    clean = model.encode_images(pixels)
    poisoned = copy.deepcopy(model)
    tower = poisoned.vision_tower.vision_model
    for module in (tower.post_layernorm, *tower.encoder.layers[last:]):
        for weight in module.parameters():
            weight.fill_(float("nan"))
    assert torch.equal(poisoned.encode_images(pixels), clean)
    for weight in tower.encoder.layers[last - 1].parameters():
        weight.fill_(float("nan"))
    assert poisoned.encode_images(pixels).isnan().all()  # the layer before is used


# ---------------------------------------------------------------- pictures


def hf_pixels(image, size, mode):
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    processor = LlavaImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return processor(image, do_pad=mode == "pad", return_tensors="pt")["pixel_values"][0]


def fuzzed_sizes(target):
    rng = python_random(target)
    odd = [(1, 1), (1, 2), (2, 1), (3, 500), (500, 3), (400, 7), (7, 400), (60, 1), (1, 60), (640, 480), (481, 640)]
    near = [(target + a, target + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    near += [(2 * target + 1, target), (target, 2 * target + 1), (336, 337), (335, 336)]
    return odd + near + [(rng.randint(1, 600), rng.randint(1, 600)) for _ in range(36)]


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("target", [28, 56, 336])
def test_pixels_of_any_size_equal_the_pillow_processor_of_transformers(target, mode):
    large = [(336, 336), (337, 336), (336, 335), (640, 427), (278, 600), (500, 20)]
    wrong = {}
    for seed, size in enumerate(large if target == 336 else fuzzed_sizes(target)):
        image = noise(*size, seed=seed)
        off = (preprocess(image, ImageSettings(target, mode)) - hf_pixels(image, target, mode)).abs().max().item()
        if not off <= 1e-6:
            wrong[size] = off
    assert not wrong


@pytest.mark.parametrize("kind", ["1", "L", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_other_pixel_formats_become_the_rgb_of_transformers(kind):
    """Transparency is painted white."""
    image = noise(45, 33).convert(kind) if kind in ("1", "P") else noise(45, 33, kind)
    ours = preprocess(read_image(image).image, ImageSettings(28))
    torch.testing.assert_close(ours, hf_pixels(image, 28, "crop"), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- configs

LLAVA_7B = {  # all that the published 1.5-7b file sets for its language model
    "model_type": "llava",
    "text_config": {
        "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "model_type": "llama",
    },
}  # fmt: skip


def hf_config(raw):
    kinds = {"llava_next": "LlavaNextConfig", "llava_onevision": "LlavaOnevisionConfig"}
    kind = getattr(transformers, kinds.get(raw["model_type"], "LlavaConfig"))
    return kind(**{k: v for k, v in copy.deepcopy(raw).items() if k != "model_type"})


def assert_same_config(ours, theirs):
    """Compare each field that transformers also has."""
    text, vision = theirs.text_config, theirs.vision_config
    qwen2 = text.model_type == "qwen2"
    absent = {"head_dim": text.hidden_size // text.num_attention_heads, "sliding_window": None, "attention_bias": qwen2}
    for field in fields(TextConfig):
        want = getattr(text, field.name, absent.get(field.name, False))
        if qwen2 and field.name == "sliding_window" and "sliding_attention" not in text.layer_types:
            want = None
        want = text.rope_parameters["rope_theta"] if field.name == "rope_theta" else want
        assert getattr(ours.text_config, field.name) == want, field.name
    for field in fields(VisionConfig):
        assert getattr(ours.vision_config, field.name) == getattr(vision, field.name), field.name
    layers = theirs.vision_feature_layer
    assert ours.vision_feature_layer == (tuple(layers) if isinstance(layers, list) else layers)
    for name in ("image_token_index", "projector_hidden_act", "multimodal_projector_bias", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.vision_feature_select_strategy == theirs.vision_feature_select_strategy
    canvases = getattr(theirs, "image_grid_pinpoints", None)
    assert ours.image_grid_pinpoints == (canvases and tuple(map(tuple, canvases)))
    assert ours.video_token_index == getattr(theirs, "video_token_index", None)
    limit = getattr(theirs, "vision_aspect_ratio", None)
    assert limit == (ours.max_tiles and f"anyres_max_{ours.max_tiles}")


def test_four_numbers_resolve_to_the_7b_model():
    with torch.device("meta"):
        ours = Llava(parse_config(LLAVA_7B)).state_dict()
        theirs = transformers.LlavaForConditionalGeneration(hf_config(LLAVA_7B)).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {canonical_key(k): v.shape for k, v in theirs.items()}
    assert sum(w.numel() for w in ours.values()) == sum(w.numel() for w in theirs.values()) == 7_063_427_072


QWEN2, SIGLIP = {"model_type": "qwen2"}, {"model_type": "siglip_vision_model"}
ONEVISION = {"model_type": "llava_onevision"}
SPARSE = {
    "nothing": {},
    "7b": LLAVA_7B,
    "clip named": {"vision_config": CLIP_L_336},
    "vision empty": {"vision_config": {}},
    "vision without model_type": {"vision_config": {"hidden_size": 96, "num_hidden_layers": 3}},
    "text without model_type": {"text_config": {"hidden_size": 512, "num_attention_heads": 8}},
    "explicit head_dim": {"text_config": {"hidden_size": 512, "num_attention_heads": 8, "head_dim": 80}},
    "nulls": {"text_config": {"num_key_value_heads": None, "head_dim": None, "hidden_size": 256}},
    "list of layers": {"vision_feature_layer": [-3, -2], "vision_feature_select_strategy": "full"},
    "no bias": {"multimodal_projector_bias": False, "text_config": {"attention_bias": True, "mlp_bias": True}},
    "old theta": {"text_config": {"rope_theta": 5e5, "rope_scaling": None}},
    "new theta": {"text_config": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}},
    "both thetas": {"text_config": {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}},
    "token id": {"image_token_id": 77},
    "token index": {"image_token_index": 77},
    "next": {"model_type": "llava_next"},
    "next, other canvases": {"model_type": "llava_next", "image_grid_pinpoints": [[336, 672], [672, 336]]},
    "mistral": {"model_type": "llava_next", "text_config": {"model_type": "mistral"}},
    "v1.6-mistral": {
        "model_type": "llava_next",
        "text_config": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064},
    },
    "interleave": {
        "text_config": QWEN2, "vision_config": SIGLIP, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "next, qwen2": {"model_type": "llava_next", "text_config": QWEN2},
    "onevision": ONEVISION,
    "onevision 0.5b": ONEVISION | {
        "text_config": QWEN2 | {
            "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24, "num_attention_heads": 14,
            "num_hidden_layers": 24, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 152000,
            "rope_theta": 1e6, "use_sliding_window": False,
        },
        "tie_word_embeddings": False, "image_token_index": 151646, "vision_aspect_ratio": "anyres_max_9",
    },
    "onevision, new spellings": ONEVISION | {
        "image_token_id": 7, "video_token_id": 8, "vision_aspect_ratio": "anyres_max_4",
        "text_config": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    },
    "onevision, empty parts": ONEVISION | {"text_config": {}, "vision_config": {"image_size": 384}},
    "onevision, parts without model_type": ONEVISION | {
        "text_config": {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4},
        "vision_config": {"hidden_size": 96, "image_size": 384},
    },
    "onevision, llama": ONEVISION | {"text_config": {"model_type": "llama"}},
    "onevision, clip": ONEVISION | {
        "vision_config": CLIP_L_336 | {"model_type": "clip_vision_model", "image_size": 384, "patch_size": 16},
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    },
    "onevision, nulls": ONEVISION | {
        "image_grid_pinpoints": None, "text_config": {"num_key_value_heads": None}, "vision_config": None,
    },
    "onevision, other canvases": ONEVISION | {"image_grid_pinpoints": [[384, 768], [768, 384]]},
    "a window": ONEVISION | {"text_config": {"use_sliding_window": True, "max_window_layers": 20}},
    "a window of no layer": ONEVISION | {"text_config": {"use_sliding_window": True, "max_window_layers": 32}},
    "a window of some layers": ONEVISION | {
        "text_config": {
            "use_sliding_window": True, "sliding_window": 700, "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    },
    "a window that is not used": ONEVISION | {"text_config": {"sliding_window": 512, "max_window_layers": 0}},
}  # fmt: skip


@pytest.mark.parametrize("name", SPARSE)
def test_keys_that_a_config_leaves_out_get_the_values_of_transformers(name, tmp_path):
    """A full config, written by transformers, reads as the sparse one."""
    raw = {"model_type": "llava"} | SPARSE[name]
    theirs = hf_config(raw)
    assert_same_config(parse_config(raw), theirs)
    theirs.save_pretrained(tmp_path)
    full = json.loads((tmp_path / "config.json").read_text())
    assert len(full["text_config"]) > 15
    assert_same_config(parse_config(full), theirs)


@pytest.mark.parametrize("text", [None, False, True])
@pytest.mark.parametrize("top", [None, False, True])
@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_embeddings_are_tied_exactly_when_transformers_ties_them(kind, top, text):
    raw = {"model_type": kind} | ({} if top is None else {"tie_word_embeddings": top})
    raw["text_config"] = {} if text is None else {"tie_word_embeddings": text}
    assert parse_config(raw).tie_word_embeddings == hf_config(raw).tie_word_embeddings


def test_old_and_new_spellings_mean_the_same():
    rope = {"rope_type": "default", "rope_theta": 500.0}
    common = {"model_type": "llava", "vision_config": VISION}
    new = parse_config(
        common | {"dtype": "float16", "image_token_id": 5, "text_config": TEXT | {"rope_parameters": rope}}
    )
    text = TEXT | {"rope_theta": 500.0, "rope_scaling": None}
    old = parse_config(common | {"torch_dtype": "float16", "image_token_index": 5, "text_config": text})
    assert new == old
    assert (old.dtype, old.image_token_index, old.text_config.rope_theta) == ("float16", 5, 500.0)
