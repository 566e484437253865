"""The JSON files of a checkpoint: each setting is followed, has no effect, or is rejected by name."""

import dataclasses
import importlib
import json
import random

import pytest
import torch
from conftest import TEXT, VISION, preprocess, refusal, write_json, write_small_files
from PIL import Image

from model.checkpoint import open_checkpoint, read_generation_settings
from model.config import NOT_COMPUTED, LlavaConfig, TextConfig, VisionConfig, parse_config, read_config
from model.image import read_image_settings
from model.tokenizer import Tokenizer
from tests.paths import DEMO

BASE = {"model_type": "llava", "text_config": TEXT, "vision_config": VISION}


# ---------------------------------------------------------------- config.json, field by field

# no effect on an answer: names, training, memory, return values of `generate`, ids set by the tokenizer or the shapes
HARMLESS = {
    "architectures", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "output_hidden_states",
    "problem_type", "return_dict", "transformers_version", "attention_dropout", "initializer_range",
    "initializer_factor", "use_cache", "pretraining_tp", "bos_token_id", "pad_token_id", "projection_dim",
    "image_seq_length",
}  # fmt: skip
READ = {field.name for kind in (LlavaConfig, TextConfig, VisionConfig) for field in dataclasses.fields(kind)} | {
    "eos_token_id",  # by read_generation_settings
    "rope_parameters",  # only its theta is read; its type must be "default"
    "vision_aspect_ratio",  # its number is max_tiles
    "vision_use_head",  # its tensors are not read
    "use_sliding_window", "max_window_layers", "layer_types",  # of Qwen2: they decide on the sliding window
}  # fmt: skip


@pytest.mark.parametrize("kind", ["LlavaConfig", "LlavaNextConfig", "LlavaOnevisionConfig",
                                  "LlamaConfig", "MistralConfig", "Qwen2Config",
                                  "CLIPVisionConfig", "SiglipVisionConfig"])  # fmt: skip
def test_every_field_of_transformers_configs_is_read_or_harmless(kind):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    theirs = {field.name for field in dataclasses.fields(getattr(transformers, kind))}
    assert len(theirs) > 10 and theirs <= READ | HARMLESS, theirs - READ - HARMLESS


OTHERS = {  # a value that changes the arithmetic of some decoder
    "quantization_config": {"quant_method": "awq", "bits": 4},
    "compression_config": {"quant_method": "compressed-tensors"},
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0},
    "partial_rotary_factor": 0.5,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "attention_multiplier": 0.1,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.2,
    "logits_scaling": 8.0,
    "num_local_experts": 8,
}


@pytest.mark.parametrize("place", ["top", "text_config", "vision_config"])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_computed_is_refused_wherever_it_stands(name, place):
    def settings(value):
        return BASE | ({name: value} if place == "top" else {place: BASE[place] | {name: value}})

    word = OTHERS[name]["quant_method"] if name.endswith("_config") else name
    assert word in refusal(parse_config, settings(OTHERS[name]))
    assert parse_config(settings(NOT_COMPUTED.get(name))) == parse_config(settings(None)) == parse_config(BASE)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_settings_that_are_refused_do_not_hide_behind_default_ones(name):
    other = {"rope_scaling": "rope_parameters", "rope_parameters": "rope_scaling"}[name]
    rope = {other: {"rope_type": "default", "rope_theta": 1e4}, name: {"type": "linear", "factor": 2.0}}
    assert name in refusal(parse_config, BASE | {"text_config": TEXT | rope})
    layers = {name: {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    assert "per layer" in refusal(parse_config, BASE | {"text_config": TEXT | layers})
    for inner, outer in ((0.5, 1), (1, 0.5)):
        part = {"partial_rotary_factor": outer, name: {"rope_type": "default", "partial_rotary_factor": inner}}
        assert "partial_rotary_factor 0.5" in refusal(parse_config, BASE | {"text_config": TEXT | part})


THETAS = [
    {},
    {"rope_theta": 1e6},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 1e6},
    {"rope_scaling": {"type": "default", "rope_theta": 7.0}, "rope_theta": 1e6},
    {"rope_scaling": {"rope_type": "default"}, "rope_theta": 1e6},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}, "rope_parameters": {"rope_theta": 500.0}},
    {"rope_scaling": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
]


@pytest.mark.parametrize("rope", THETAS, ids=str)
def test_of_two_places_for_theta_the_one_of_transformers_counts(rope):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    theirs = transformers.LlamaConfig(**json.loads(json.dumps(TEXT | rope))).rope_parameters["rope_theta"]
    assert parse_config(BASE | {"text_config": TEXT | rope}).text_config.rope_theta == theirs


PLAIN = LlavaConfig(vision_config=VisionConfig(image_size=28))
TILED = dataclasses.replace(PLAIN, image_grid_pinpoints=((28, 56),))
REFUSED = {  # by a word of the error: settings of config.json
    "llava_next_video": {"model_type": "llava_next_video"},
    "original LLaVA": {"model_type": "llava_llama"},
    "of the original LLaVA": {"mm_vision_tower": "openai/clip-vit-large-patch14-336"},
    "model_type is None": {"model_type": None},
    "qwen3": {"text_config": TEXT | {"model_type": "qwen3"}},
    "pixtral": {"vision_config": VISION | {"model_type": "pixtral"}},
    "a tower without CLS": {"vision_config": VISION | {"model_type": "siglip_vision_model", "hidden_act": "gelu"}},
    "'anyres'": {"model_type": "llava_onevision", "vision_aspect_ratio": "anyres"},
    "gelu_new": {"text_config": TEXT | {"hidden_act": "gelu_new"}},
    "relu": {"projector_hidden_act": "relu"},
    "gelu_pytorch_tanh": {"vision_config": VISION | {"hidden_act": "gelu_pytorch_tanh"}},
    "cls_patch": {"vision_feature_select_strategy": "cls_patch"},
    "4 query heads over 3": {"text_config": TEXT | {"num_key_value_heads": 3}},
    "head_dim 15": {"text_config": TEXT | {"head_dim": 15}},
    "2 vision heads over 33": {"vision_config": VISION | {"hidden_size": 33}},
    "1 colour": {"vision_config": VISION | {"num_channels": 1}},
    "patches of 29": {"vision_config": VISION | {"patch_size": 29}},
    "vision_feature_layer -6": {"vision_feature_layer": -6},
    "(1, 5)": {"vision_feature_layer": [1, 5]},
    "and vision_feature_select_strategy": {"model_type": "llava_next", "vision_feature_select_strategy": "full"},
    "multiples of 28": {"model_type": "llava_next", "image_grid_pinpoints": [[28, 50]]},
}


@pytest.mark.parametrize("word", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(word):
    assert word in refusal(parse_config, BASE | REFUSED[word])


@pytest.mark.parametrize("pinpoints", [[], [[336]], [[336, "672"]], [[336, 0]]])
def test_canvases_that_make_no_sense_are_refused(pinpoints, tmp_path):
    write_json(tmp_path / "config.json", BASE | {"model_type": "llava_next", "image_grid_pinpoints": pinpoints})
    assert "image_grid_pinpoints" in refusal(read_config, tmp_path)


# ---------------------------------------------------------------- image preprocessing

PROCESSOR_FIELDS = {  # of transformers' image processors: how each is handled
    "read": {
        "size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_pad", "image_grid_pinpoints",
    },
    "refused when false": {"do_resize", "do_center_crop", "do_rescale", "do_normalize"},
    "refused when true": {"default_to_square"},
    # pictures are always RGB; the others concern array formats or the padding of batches
    "harmless": {
        "do_convert_rgb", "data_format", "input_data_format", "device", "disable_grouping", "return_tensors",
        "pad_size", "image_seq_length",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["clip.image_processing_pil_clip.CLIPImageProcessorPil",
                                  "llava.image_processing_pil_llava.LlavaImageProcessorPil",
                                  "llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil",
                                  "llava_onevision.image_processing_pil_llava_onevision.LlavaOnevisionImageProcessorPil",
                                  "siglip.image_processing_pil_siglip.SiglipImageProcessorPil"])  # fmt: skip
def test_every_field_of_transformers_image_processors_is_known(name):
    pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    module, _, kind = name.rpartition(".")
    theirs = getattr(importlib.import_module("transformers.models." + module), kind).valid_kwargs.__annotations__
    assert len(theirs) > 10 and set(theirs) <= set().union(*PROCESSOR_FIELDS.values())


@pytest.mark.parametrize("name", sorted(PROCESSOR_FIELDS["refused when false"]))
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_a_step_that_is_left_out_is_refused(tmp_path, file, name):
    settings = {name: False}
    write_json(tmp_path / file, settings if file.startswith("pre") else {"image_processor": settings})
    assert f"{file} asks for {name} false" in refusal(read_image_settings, tmp_path, PLAIN)
    write_json(tmp_path / file, {"do_center_crop": False, "do_pad": True})
    assert read_image_settings(tmp_path, PLAIN).mode == ("pad" if file.startswith("pre") else "crop")


OTHER_PROCESSORS = {  # settings, words of the error
    "squashed": ({"size": {"height": 28, "width": 28}}, "keep the aspect"),
    "squashed by a flag": ({"size": 28, "default_to_square": True}, "keep the aspect"),
    "a longest edge": ({"size": {"shortest_edge": 28, "longest_edge": 28}}, "longest_edge"),
    "another size": ({"size": {"shortest_edge": 336}}, "the vision tower takes 28"),
    "another crop": ({"crop_size": 56}, "the vision tower takes 28"),
    "nearest": ({"resample": 0}, "resample 0"),
    "SigLIP": ({"image_processor_type": "SiglipImageProcessor"}, "Siglip"),
    "ViT": ({"feature_extractor_type": "ViTFeatureExtractor"}, "ViTImageProcessor"),
    "tiles of another model": ({"image_processor_type": "LlavaNextImageProcessor"}, "LlavaNext"),
    "code of its own": ({"image_processor_type": "MyImageProcessor"}, "MyImageProcessor"),
    "no deviation": ({"image_std": [0, 1, 1]}, "std"),
}


@pytest.mark.parametrize("name", OTHER_PROCESSORS)
def test_another_way_to_prepare_pictures_is_refused(tmp_path, name):
    settings, words = OTHER_PROCESSORS[name]
    write_json(tmp_path / "preprocessor_config.json", settings)
    message = refusal(read_image_settings, tmp_path, PLAIN)
    assert words in message and "preprocessor_config.json" in message


def test_tiles_need_the_processor_of_tiles_and_its_canvases(tmp_path):
    write_json(tmp_path / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"})
    assert "CLIPImageProcessor" in refusal(read_image_settings, tmp_path, TILED)
    write_json(tmp_path / "preprocessor_config.json", {"image_grid_pinpoints": [[28, 28]]})
    assert "image_grid_pinpoints" in refusal(read_image_settings, tmp_path, TILED)


SMALL = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
CLIP, LLAVA = {"image_processor_type": "CLIPImageProcessor"}, {"image_processor_type": "LlavaImageProcessor"}
PROCESSORS = {  # (preprocessor_config.json, image_processor in processor_config.json)
    "CLIP": (SMALL | CLIP, None),
    "CLIP does not pad to a square": (SMALL | CLIP | {"do_pad": True}, None),
    "CLIP, old name": (SMALL | {"feature_extractor_type": "CLIPFeatureExtractor", "do_pad": True}, None),
    "CLIP, fast": (SMALL | {"image_processor_type": "CLIPImageProcessorFast", "do_pad": True}, None),
    "LLaVA pads": (SMALL | LLAVA | {"do_pad": True}, None),
    "LLaVA does not": (SMALL | LLAVA, None),
    "LLaVA, fast": (SMALL | {"image_processor_type": "LlavaImageProcessorFast", "do_pad": True}, None),
    "no type": (SMALL | {"do_pad": True}, None),
    "no type, no pad": (SMALL, None),
    "numbers": ({"size": 28, "crop_size": 28}, None),
    "nested alone": (None, SMALL | LLAVA | {"do_pad": True}),
    "nested wins with pad": (SMALL | CLIP, SMALL | LLAVA | {"do_pad": True}),
    "nested wins with crop": (SMALL | LLAVA | {"do_pad": True}, SMALL | CLIP),
    "nested wins with numbers": (SMALL | CLIP, SMALL | CLIP | {"image_mean": [0.5] * 3, "rescale_factor": 0.01}),
    "nested is null": (SMALL | LLAVA | {"do_pad": True}, None),
    "aspect of the original code": (SMALL | CLIP | {"image_aspect_ratio": "pad"}, None),
    "grey values": (SMALL | CLIP | {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}, None),
}


@pytest.mark.parametrize("size", [(45, 28), (28, 61), (50, 50)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor_that_transformers_takes(tmp_path, name, size):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    flat, nested = PROCESSORS[name]
    write_json(tmp_path / "config.json", BASE)
    if flat is not None:
        write_json(tmp_path / "preprocessor_config.json", flat)
    if nested is not None or "null" in name:
        write_json(tmp_path / "processor_config.json", {"processor_class": "LlavaProcessor", "image_processor": nested})
    image = Image.frombytes("RGB", size, random.randbytes(3 * size[0] * size[1]))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")  # torchvision rounds otherwise
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(preprocess(image, read_image_settings(tmp_path, PLAIN)), theirs, rtol=0, atol=2e-6)


# ---------------------------------------------------------------- end of an answer, other settings


@pytest.fixture
def tokens(tiny_tokenizer_dir):
    return Tokenizer(tiny_tokenizer_dir)


EOS = [  # top of config.json, its text_config, generation_config.json; ids that end an answer
    ({}, {}, None, None),
    ({"eos_token_id": 7}, {}, None, 7),
    ({}, {"eos_token_id": 8}, None, 8),
    ({"eos_token_id": 7}, {"eos_token_id": 8}, None, 7),
    ({"eos_token_id": None}, {"eos_token_id": [8, 9]}, None, [8, 9]),
    ({"eos_token_id": 7}, {"eos_token_id": 8}, {"eos_token_id": [5, 2]}, [5, 2]),
    ({"eos_token_id": 7}, {"eos_token_id": 8}, {"bos_token_id": 1}, None),
]


@pytest.mark.parametrize("top, text, generation, eos", EOS)
def test_an_answer_ends_where_transformers_ends_it(tmp_path, tokens, top, text, generation, eos):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    write_json(tmp_path / "config.json", BASE | top | {"text_config": TEXT | text})
    read = {"config_file_name": "config.json", "_from_model_config": True}
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
        read = {}
    assert transformers.GenerationConfig.from_pretrained(tmp_path, **read).eos_token_id == eos
    ids, notes = read_generation_settings(tmp_path, tokens, 32064)
    wanted = tokens.eos_id if eos is None else eos  # transformers would never stop
    assert ids == tuple(wanted if isinstance(wanted, list) else [wanted]) and not notes


NOTED = {
    "do_sample True": {"do_sample": True},
    "temperature 0.2": {"do_sample": True, "temperature": 0.2},
    "top_p 0.6": {"do_sample": True, "top_p": 0.6},
    "top_k 5": {"do_sample": True, "top_k": 5},
    "repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "bad_words_ids [[5]]": {"bad_words_ids": [[5]]},
    "forced_eos_token_id 2": {"forced_eos_token_id": 2},
    "suppress_tokens [3]": {"suppress_tokens": [3]},
    "num_beams 4": {"num_beams": 4},
    "max_new_tokens 64": {"max_new_tokens": 64},
    "stop_strings ['###']": {"stop_strings": ["###"]},
}


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("words", NOTED)
def test_other_settings_of_an_answer_are_named_in_one_line(tmp_path, tokens, words, file):
    write_json(tmp_path / "config.json", BASE)
    write_json(tmp_path / file, (BASE if file == "config.json" else {}) | NOTED[words])
    (note,) = read_generation_settings(tmp_path, tokens, 32064)[1]
    assert words in note and file in note and len(note.splitlines()) == 1


QUIET = [
    {},
    {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001, "use_cache": True,
     "transformers_version": "4.36.0"},
    {"temperature": 0.9, "top_p": 0.6},  # no effect without do_sample
    {"do_sample": False, "temperature": 0.2, "repetition_penalty": 1.0, "num_beams": 1, "suppress_tokens": None},
]  # fmt: skip


def test_settings_that_change_nothing_make_no_noise(tmp_path, tokens):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    for settings in QUIET:
        write_json(tmp_path / "generation_config.json", settings)
        assert read_generation_settings(tmp_path, tokens, 32064)[1] == ()
    transformers.GenerationConfig(eos_token_id=2).save_pretrained(tmp_path)  # all defaults
    assert read_generation_settings(tmp_path, tokens, 32064)[1] == ()
    transformers.LlavaConfig().save_pretrained(tmp_path / "only config")
    assert read_generation_settings(tmp_path / "only config", tokens, 32064)[1] == ()


def test_notes_on_files_that_are_not_used(make_checkpoint, tiny_tokenizer_dir, tmp_path):
    assert open_checkpoint(DEMO).notes == ()
    make_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path).notes == ()
    write_small_files(tmp_path, tiny_tokenizer_dir, 28)
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    write_json(tmp_path / "processor_config.json", {"image_processor": SMALL | {"size": 28}})
    write_json(tmp_path / "generation_config.json", {"repetition_penalty": 2.0})
    adapter, processor, generation = open_checkpoint(tmp_path).notes
    assert "not applied" in adapter and "differ in size" in processor and "repetition_penalty 2.0" in generation
