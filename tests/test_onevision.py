"""LLaVA-OneVision: SigLIP, Qwen2, shrunk maps of tiles and the frames of a video, against transformers."""

import json
import shutil
import types
from dataclasses import replace

import pytest
import torch
from conftest import IMAGE_ID, PAD_ID, added_token, preprocess, refusal, write_json
from oracle import expanded, hf_pictures, is_frame, masked_ids
from safetensors.torch import load_file, save_file
from test_checkpoint import LAYOUTS
from test_methods import RULES, by_hand
from test_next import EXTREMES, assert_as_exact_as_transformers, random_sizes
from test_parity import noise

from model import Generation, Sampling, load, open_checkpoint
from model.config import PINPOINTS_ONEVISION, parse_config
from model.image import HALF, ImageSettings, frame_settings, read_image_settings
from model.layout import layout_of, nearest
from model.pruning import make_method

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

SIDE = 28  # of a square in the small models: 3 x 3 patches of 9 and one unused pixel, as 384 = 27 * 14 + 6
SMALL = tuple((a * SIDE // 384, b * SIDE // 384) for a, b in PINPOINTS_ONEVISION)
SETTINGS = ImageSettings(384, "anyres", HALF, HALF, pinpoints=PINPOINTS_ONEVISION, max_tiles=9)
SIGLIP = {"model_type": "siglip_vision_model", "patch_size": 9, "vision_use_head": False}
PROCESSOR = {
    "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_grid_pinpoints": [list(pair) for pair in SMALL],
}  # fmt: skip
LARGE = [(2304, 2304), (384, 2304), (2304, 384), (1919, 1153), (4000, 3000), (1440, 1440), (1200, 1000), (3000, 40)]


# ---------------------------------------------------------------- how many tokens


def counted(size, mode="anyres", last=True):
    return layout_of(size, replace(SETTINGS, mode=mode), 27, 0, last).tokens


def test_token_counts_of_328_sizes_are_those_of_the_processor_and_of_the_model_of_transformers():
    """36 canvases of 384 to 2304 pixels; both count for themselves there."""
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    pinpoints = [list(pair) for pair in PINPOINTS_ONEVISION]
    processor = types.SimpleNamespace(
        image_processor=types.SimpleNamespace(image_grid_pinpoints=pinpoints), num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    processor._get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features.__get__(processor)
    tower = types.SimpleNamespace(image_size=384, patch_size=14)
    model = types.SimpleNamespace(config=types.SimpleNamespace(image_grid_pinpoints=pinpoints, vision_config=tower))
    shrunk = 0
    for wide, high in random_sizes(300, 3000) + EXTREMES + LARGE:
        layout = layout_of((wide, high), SETTINGS, 27, 0)
        said = LlavaOnevisionProcessor._get_number_of_features(processor, high, wide, 384, 384)
        tiles = torch.zeros(1 + layout.grid[0] * layout.grid[1], 729, 1)
        _, (seen,) = LlavaOnevisionModel.pack_image_features(model, [tiles], [(high, wide)], torch.zeros(1))
        assert layout.tokens == said == seen, (wide, high)
        shrunk += layout.map != tuple(part.stop - part.start for part in layout.cut)
    assert 100 < shrunk < 300


def test_token_counts_of_known_sizes():
    """9 tiles have 81 x 81 tokens; more shrink to about as many from 1.1 times that side on."""
    assert (counted((384, 384)), counted((1152, 1152))) == (729 + 27 * 28, 729 + 81 * 82)
    assert counted((1920, 768)) == 729 + 54 * 136  # 10 tiles, ratio 1.05
    assert counted((1536, 1152)) == 729 + 70 * (93 + 1)  # 12 tiles: 81 // 1.155 by 108 // 1.155
    assert (counted((99, 99), "pad"), counted((99, 99), "crop")) == (730, 730)
    assert (counted((99, 99), "frame", last=False), counted((99, 99), "frame")) == (196, 197)


@pytest.mark.parametrize("shape", [(0, 7), (4, 0), (1, 1), (3, 5), (9, 14), (81, 27)])
def test_a_token_of_a_smaller_map_stands_for_the_patch_nearest_to_its_centre(shape):
    """In fractions; of two equally near patches the later."""
    high, wide = (81, 27) if all(shape) else shape
    values = torch.arange(high * wide).view(high, wide)
    rows, columns = (
        [int((2 * i + 1) * of // (2 * n)) for i in range(n)] for n, of in zip(shape, values.shape, strict=True)
    )
    assert nearest(values, shape).tolist() == [[row * wide + column for column in columns] for row in rows]


def test_a_newline_of_a_square_is_after_its_last_row():
    """And stands for no patch."""
    layout = layout_of((60, 40), replace(SETTINGS, mode="frame"), 3, 0)
    assert layout.places.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    assert layout.patches.tolist() == [0, 2, 6, 8, -1]  # of 3 x 3: the nearest to the centres of 2 x 2


@pytest.mark.parametrize("side", [24, 27])
def test_the_thinnest_pictures_have_a_place_and_a_patch_for_each_token(side):
    for size in EXTREMES + LARGE:
        for limit in (None, 9):
            layout = layout_of(size, replace(SETTINGS, max_tiles=limit), side, 0)
            assert len(layout.patches) == len(layout.places) == layout.tokens


# ---------------------------------------------------------------- pixels


def hf_processor(**settings):
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    return LlavaOnevisionImageProcessorPil(**PROCESSOR | settings)


def small(mode):
    return ImageSettings(SIDE, mode, HALF, HALF, pinpoints=SMALL, max_tiles=9)


def test_pixels_of_tiles_equal_the_pillow_processor_of_transformers():
    for seed, size in enumerate([(a, b) for a, b in EXTREMES if max(a, b) < 700] + random_sizes(60, 250, seed=1)):
        image = noise(*size, seed=seed)
        theirs = hf_processor()([[image]], return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(preprocess(image, small("anyres")), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mean", [HALF, (0.48, 0.46, 0.41)])
def test_pixels_of_several_pictures_equal_the_pillow_processor_of_transformers(mean):
    """Each is padded to a square of the mean colour."""
    images = [noise(*size, seed=seed) for seed, size in enumerate(random_sizes(20, 120, seed=2) + [(1, 60), (61, 2)])]
    theirs = hf_processor(image_mean=list(mean))([images], return_tensors="pt")["pixel_values"]
    for image, pixels in zip(images, theirs, strict=True):
        ours = preprocess(image, replace(small("pad"), mean=mean))
        torch.testing.assert_close(ours[None], pixels, rtol=0, atol=1e-6)


def test_frames_are_resized_and_normalised_as_the_video_processor_does():
    """transformers' video processor needs torchvision; SigLIP's Pillow processor takes the same steps."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size=PROCESSOR["size"])
    for seed, size in enumerate([(90, 60), (28, 28), (20, 300), (3, 2)]):
        image = noise(*size, seed=seed)
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(preprocess(image, small("frame")), theirs, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the model

MODELS = {  # (text, vision, top)
    "0.5b, tied": (
        {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64},
        {},
        {"tie_word_embeddings": True},
    ),
    "7b, untied": (
        {"num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 16, "num_hidden_layers": 3,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"hidden_act": "gelu"},
        {},
    ),
    "4 tiles, an earlier layer, a pooling head, llama": (
        {"model_type": "llama", "attention_bias": True},
        {"vision_use_head": True, "layer_norm_eps": 0.01},
        {"vision_aspect_ratio": "anyres_max_4", "vision_feature_layer": [-2, 1]},
    ),
}  # fmt: skip
QUESTIONS = {  # (prompt, sizes of the pictures, number of frames)
    "a picture": ("what is <image> there?", [(60, 40)], 0),
    "a picture of 36 tiles": ("<image> how many red circles?", [(400, 380)], 0),
    "a strip": ("<image> left or right?", [(500, 20)], 0),
    "two pictures": ("<image> above <image>\nyes or no?", [(60, 40), (33, 90)], 0),
    "three pictures": ("<image> left of <image> right of <image>?", [(20, 20), (200, 16), (61, 64)], 0),
    "one frame": ("<video>\nwhat is there?", [], 1),
    "two frames": ("what is <video> there?", [], 2),
    "eight frames": ("<video>\nwhat is the content?", [], 8),
    "a video and a picture": ("<video> or <image> there?", [(90, 100)], 3),
    "two pictures and a video": ("<image> or <video> or <image>?", [(90, 100), (20, 70)], 2),
    "text": ("how many are there?", [], 0),
}


def make_onevision(make_hf_checkpoint, folder, text=None, vision=None, top=None, seed=3):
    """A folder with a `<video>` token and the processor's file; returns transformers' model."""
    text = {"model_type": "qwen2", "max_position_embeddings": 1024} | (text or {})
    top = {"image_grid_pinpoints": PROCESSOR["image_grid_pinpoints"], "video_token_index": PAD_ID} | (top or {})
    hf = make_hf_checkpoint(folder, text, SIGLIP | (vision or {}), top, seed, "LlavaOnevision")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"][str(PAD_ID)] = added_token("<video>")
    write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if k != "pad_token"})
    write_json(folder / "preprocessor_config.json", PROCESSOR)
    return hf


@pytest.fixture(scope="module")
def made(make_hf_checkpoint, tmp_path_factory):
    """Function (name of a model) -> (transformers' model, folder, our checkpoint), made once per name; read-only."""
    kept = {}

    def get(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp("onevision")
            kept[name] = make_onevision(make_hf_checkpoint, folder, *MODELS[name]), folder, endless(folder)
        return kept[name]

    return get


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the 0.5B-like folder that a test may change."""
    return shutil.copytree(made("0.5b, tied")[1], tmp_path / "checkpoint")


def endless(folder):
    """The checkpoint in fp32; no id ends an answer."""
    return replace(load(folder, "fp32"), stop_ids=())


def ask(checkpoint, prompt, sizes=(), frames=0, count=32, **options):
    """A Generation of random pictures and of frames of 60 x 40."""
    pictures = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    video = [noise(60, 40, seed=50 + i) for i in range(frames)]
    options = {"sampling": Sampling(max_new_tokens=count), "template": "raw", "frames": video} | options
    return Generation(checkpoint, prompt, pictures, **options)


def hf_ids(hf, asked, count):
    """Greedy ids of transformers after the whole conversation."""
    out = hf.generate(
        input_ids=torch.tensor([expanded(asked)]), **hf_pictures([asked]), do_sample=False, max_new_tokens=count,
        suppress_tokens=asked.checkpoint.never_ids, eos_token_id=None,
    )  # fmt: skip
    return out[0, -count:].tolist()


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_at_all_positions_are_as_exact_as_transformers(made, name, question):
    hf, _, checkpoint = made(name)
    assert_as_exact_as_transformers(hf, ask(checkpoint, *QUESTIONS[question]))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_32_greedy_ids_are_those_of_transformers(made, name, question):
    hf, _, checkpoint = made(name)
    asked = ask(checkpoint, *QUESTIONS[question])
    "".join(asked)
    assert asked.token_ids == hf_ids(hf, asked, 32) and len(set(asked.token_ids)) > 3


TURNS = {  # first: (prompt, sizes, frames), second
    "a picture, then text": (("what is <image>?", [(60, 40)], 0), (" and there?", [], 0)),
    "a video, then a picture": (("what is <video>?", [], 3), (" and <image>?", [(90, 70)], 0)),
    "a video, then a video": (("what is <video>?", [], 2), (" and <video>?", [], 2)),
    "two pictures, then one": (("what is <image><image>?", [(60, 40), (30, 50)], 0), (" and <image>?", [(90, 70)], 0)),
}


@pytest.mark.parametrize("case", TURNS)
def test_two_turns_give_the_ids_of_transformers_for_the_whole_conversation(made, case):
    hf, _, checkpoint = made("7b, untied")
    first, second = TURNS[case]
    before = ask(checkpoint, *first, count=6)
    "".join(before)
    asked = ask(checkpoint, *second, count=16, before=before)
    "".join(asked)
    assert asked.prefilled < asked.prompt_tokens and asked.token_ids == hf_ids(hf, asked, 16)


# ---------------------------------------------------------------- pruning


@pytest.mark.parametrize("question", ["a picture of 36 tiles", "two pictures", "eight frames", "a video and a picture"])
@pytest.mark.parametrize("spec", ["plphp", "plphp-ada", "plphp:window=3", "snapkv"])
def test_heads_keep_the_sets_and_say_the_ids_of_transformers_with_masks(make_hf_checkpoint, tmp_path, spec, question):
    """Of each picture and of each frame its own share."""
    text = {"num_hidden_layers": 4, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 16}
    make_onevision(make_hf_checkpoint, tmp_path, text)
    asked = ask(endless(tmp_path), *QUESTIONS[question], count=24, prune=make_method(spec))
    asked.remember = True
    "".join(asked)
    (window, smooth, rule), behind = RULES[spec,], asked.prompt_tokens - asked.spans[-1][1]
    rows = min(window, behind)
    assert rows > 1 or window == 1
    ids, kept = masked_ids(tmp_path, asked, by_hand(rule, smooth, asked.spans, 7), 24, rows)
    assert asked.token_ids == ids and torch.equal(asked.masks, torch.stack(kept))
    for start, stop in asked.spans:  # in some layer
        assert 0 < min(keep[:, start:stop].double().mean() for keep in kept) < 1
    assert len(asked.spans) == len(asked.pictures)


# ---------------------------------------------------------------- key layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_key_layout_gives_the_same_ids(made, tmp_path, layout):
    """The pooling head of the tower is not read, under any name."""
    _, folder, checkpoint = made("4 tiles, an earlier layer, a pooling head, llama")
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    published = {name: load_file(path)[key] for name, (path, key, _) in checkpoint.keys.items()}
    assert not any(".head." in name for name in published)
    head = {f"vision_tower.vision_model.head.{name}": torch.ones(3) for name in ("probe", "mlp.fc1.weight")}
    save_file({LAYOUTS[layout](k): t for k, t in (published | head).items()}, tmp_path / "model.safetensors")
    again = endless(tmp_path)
    question = QUESTIONS["two pictures and a video"]
    assert "".join(ask(again, *question)) == "".join(ask(checkpoint, *question))
    assert again.image_settings.order == ("orig" if layout.startswith("E") else "hf")


def test_a_resampler_of_the_original_code_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.vision_resampler.proj.weight": torch.ones(3)}, folder / "model.safetensors")
    assert "vision_resampler" in refusal(open_checkpoint, folder)


@pytest.mark.parametrize("top, text", [(True, False), (False, True), (True, True)])
def test_a_tied_head_is_found_wherever_it_is_said(folder, top, text):
    """The published 0.5B file has it in text_config, and false at the top."""
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"tie_word_embeddings": top}
    raw["text_config"] |= {"tie_word_embeddings": text}
    write_json(folder / "config.json", raw)
    language = load(folder, "fp32").model.language_model
    assert language.lm_head is None
    theirs = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(language.model.embed_tokens.weight, theirs.lm_head.weight)


# ---------------------------------------------------------------- relatives: SigLIP in LLaVA, Qwen2 in LLaVA-NeXT


@torch.inference_mode()
def test_llava_with_siglip_and_qwen2_is_as_exact_as_transformers(make_hf_checkpoint, tmp_path):
    """llava-interleave-qwen: the last layer, all of its tokens, and squashed pictures."""
    top = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    hf = make_hf_checkpoint(tmp_path, {"model_type": "qwen2"}, SIGLIP, top, seed=3)
    settings = {"image_processor_type": "SiglipImageProcessor", "size": PROCESSOR["size"]}
    write_json(tmp_path / "preprocessor_config.json", settings)
    asked = ask(endless(tmp_path), "<image> above <image>?", [(50, 31), (20, 60)])
    assert_as_exact_as_transformers(hf, asked)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    theirs = processor([noise(50, 31, seed=0), noise(20, 60, seed=1)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.stack(asked.pixels), theirs, rtol=0, atol=1e-6)
    for size in ({"shortest_edge": SIDE}, SIDE):
        write_json(tmp_path / "preprocessor_config.json", settings | {"size": size})
        assert "keeps the aspect" in refusal(open_checkpoint, tmp_path)


@torch.inference_mode()
def test_llava_next_with_qwen2_is_as_exact_as_transformers(make_hf_checkpoint, tmp_path):
    top = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
    hf = make_hf_checkpoint(tmp_path, {"model_type": "qwen2"}, None, top, 3, "LlavaNext")
    asked = ask(endless(tmp_path), "<image> above <image>?", [(50, 31), (90, 80)])
    assert_as_exact_as_transformers(hf, asked)
    assert asked.images[0]["tokens"] != asked.images[1]["tokens"]


# ---------------------------------------------------------------- processors, old and nested

VIDEOS = PROCESSOR | {"video_processor_type": "LlavaOnevisionVideoProcessor", "image_mean": [0.4, 0.5, 0.6]}
FOLDERS = {  # files beside the old preprocessor_config.json; mean of the pictures, mean of the frames
    "one file": ({}, HALF, HALF),
    "names of tokens only": ({"processor_config.json": {"num_image_tokens": 9}}, HALF, HALF),
    "a file for videos": ({"video_preprocessor_config.json": VIDEOS}, HALF, (0.4, 0.5, 0.6)),
    "nested": (
        {"processor_config.json": {
            "image_processor": PROCESSOR | {"image_mean": [0.3] * 3}, "video_processor": VIDEOS,
            "vision_aspect_ratio": "anyres_max_9",
        }},
        (0.3, 0.3, 0.3), (0.4, 0.5, 0.6),
    ),
    "nested wins": (
        {"processor_config.json": {"video_processor": VIDEOS},
         "video_preprocessor_config.json": VIDEOS | {"image_mean": [0.1] * 3}},
        HALF, (0.4, 0.5, 0.6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_processors_old_and_nested(folder, case):
    files, pictures, frames = FOLDERS[case]
    for name, content in files.items():
        write_json(folder / name, content)
    asked = ask(load(folder, "fp32"), "<image> or <video>?", [(60, 40)], 2)
    assert asked.image_settings == replace(small("anyres"), mean=pictures)
    assert [picture.settings.mean for picture in asked.pictures] == [pictures, frames, frames]
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = theirs([[noise(60, 40, seed=0)]], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(asked.pictures[0].pixels, pixels, rtol=0, atol=1e-6)


def test_a_folder_without_a_processor_has_the_values_of_its_class(folder):
    (folder / "preprocessor_config.json").unlink()
    ours = read_image_settings(folder, open_checkpoint(folder).config)
    theirs = type(hf_processor())()
    assert (ours.mean, ours.std) == (tuple(theirs.image_mean), tuple(theirs.image_std)) and ours.mode == "anyres"


# ---------------------------------------------------------------- input that cannot be used

CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": SIDE}
NESTED = {"image_processor": PROCESSOR, "vision_aspect_ratio": "anyres_max_9"}
FILES = {  # file, content; words of the error
    "CLIP's processor": ("preprocessor_config.json", CLIP, ["CLIPImageProcessor", "LlavaOnevisionImageProcessor"]),
    "NeXT's processor": ("preprocessor_config.json", {"image_processor_type": "LlavaNextImageProcessor"}, ["Next"]),
    "another size": ("preprocessor_config.json", PROCESSOR | {"size": {"height": 384, "width": 384}}, ["384", "28"]),
    "other canvases": ("preprocessor_config.json", PROCESSOR | {"image_grid_pinpoints": [[28, 28]]}, ["pinpoints"]),
    "a resize by nearest": ("preprocessor_config.json", PROCESSOR | {"resample": 0}, ["resample 0"]),
    "another limit": ("processor_config.json", NESTED | {"vision_aspect_ratio": "anyres_max_4"}, ["anyres_max_4"]),
    "a broken limit": (
        "processor_config.json",
        NESTED | {"vision_aspect_ratio": "anyres"},
        ["'anyres'", "anyres_max_N"],
    ),
    "no limit": ("processor_config.json", NESTED | {"vision_aspect_ratio": "anyres_max_0"}, ["anyres_max_N"]),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_another_model_are_refused(folder, case):
    name, content, words = FILES[case]
    write_json(folder / name, content)
    message = refusal(open_checkpoint, folder)
    assert all(word in message for word in words), message


VIDEO_FILES = {
    "size": {"size": {"height": 384, "width": 384}},
    "do_normalize false": {"do_normalize": False},
    "do_resize false": {"do_resize": False},
    "resample 2": {"resample": 2},
    "std": {"image_std": [0, 1, 1]},
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("words", VIDEO_FILES)
def test_other_steps_for_frames_are_refused_only_when_there_are_frames(folder, words, nested):
    content, name = VIDEO_FILES[words], "processor_config.json" if nested else "video_preprocessor_config.json"
    write_json(folder / name, {"video_processor": content} if nested else content)
    checkpoint = load(folder, "fp32")
    assert ask(checkpoint, "<image>?", [(60, 40)]).images
    message = refusal(ask, checkpoint, "<video>?", (), 2)
    assert words in message and name in message
    write_json(folder / name, {"video_processor": {"do_center_crop": False}})
    assert frame_settings(folder, small("anyres")) == small("frame")


def test_a_llava_with_siglip_refuses_the_processor_of_clip_and_the_other_way_round(make_checkpoint, tmp_path):
    vision = SIGLIP | {"hidden_act": "gelu_pytorch_tanh"}
    make_checkpoint(tmp_path, vision=vision, top={"vision_feature_select_strategy": "full"})
    write_json(tmp_path / "preprocessor_config.json", CLIP)
    message = refusal(open_checkpoint, tmp_path)
    assert "CLIPImageProcessor" in message and "SiglipImageProcessor" in message
    make_checkpoint(tmp_path)
    settings = {"image_processor_type": "SiglipImageProcessor", "size": PROCESSOR["size"]}
    write_json(tmp_path / "preprocessor_config.json", settings)
    assert "SiglipImageProcessor" in refusal(open_checkpoint, tmp_path)


CONFIGS = {  # settings of config.json, words of the error
    "canvases": ({"image_grid_pinpoints": [[28, 50], [28, 28]]}, ["[(28, 50)]", "multiples of 28"]),
    "limit": ({"vision_aspect_ratio": "pad"}, ["'pad'", "anyres_max_N"]),
    "no tiles": ({"vision_aspect_ratio": "anyres_max_0"}, ["anyres_max_N"]),
    "tower": ({"vision_config": {"model_type": "clip_vision_model", "patch_size": 14, "image_size": 28}}, ["'full'"]),
    "CLS": ({"vision_feature_select_strategy": "default"}, ["'default'", "without CLS"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_settings_that_do_not_fit_the_family_are_refused(folder, case):
    change, words = CONFIGS[case]
    raw = json.loads((folder / "config.json").read_text()) | change
    message = refusal(parse_config, raw)
    assert all(word in message for word in words), message


def test_frames_that_cannot_be_used_are_refused(made):
    checkpoint = made("0.5b, tied")[2]
    frames = [noise(60, 40), noise(60, 41), noise(60, 40)]
    message = refusal(Generation, checkpoint, "what?", frames=frames)
    assert "60 x 40 and 60 x 41" in message and "one size" in message
    assert "--frames" in refusal(ask, checkpoint, "what is <video>?")  # none
    assert "2 <video>" in refusal(ask, checkpoint, "<video> or <video>?", (), 2)
    assert ask(checkpoint, "what?", (), 2).ids == ask(checkpoint, "<video>\nwhat?", (), 2).ids  # in front


def test_other_families_take_no_frames(make_checkpoint, made, tmp_path):
    make_checkpoint(tmp_path)
    assert "give them as pictures" in refusal(Generation, load(tmp_path), "what?", frames=[noise(60, 40)])
    without = replace(made("0.5b, tied")[2].config, video_token_index=None)
    assert "no <video> token" in refusal(ask, replace(made("0.5b, tied")[2], config=without), "what?", (), 2)


def test_a_prompt_beyond_the_context_is_refused_with_numbers_and_what_helps(folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["max_position_embeddings"] = 80
    write_json(folder / "config.json", raw)
    checkpoint, large = load(folder, "fp32"), QUESTIONS["a picture of 36 tiles"]
    asked = ask(made_long(raw, folder), *large)
    tiles = refusal(ask, checkpoint, *large)
    assert f"needs {asked.prompt_tokens} tokens, {asked.vision_tokens} of them for 1 pictures" in tiles
    assert "use --image-mode pad" in tiles and "is 80" in tiles
    assert ask(checkpoint, *large, image_mode="pad").vision_tokens == 10  # the cure helps
    many = refusal(ask, checkpoint, "<image>" * 25, [(20, 20)] * 25)
    assert "pad" not in many and "fewer pictures" in many
    frames = refusal(ask, checkpoint, "<video>", (), 60)
    assert "60 pictures and frames" in frames and "fewer frames" in frames


def made_long(raw, folder):
    """The checkpoint with a context of 1,024 tokens."""
    raw["text_config"]["max_position_embeddings"] = 1024
    write_json(folder / "config.json", raw)
    return load(folder, "fp32")


def test_several_pictures_are_squares_and_frames_are_not_counted_as_pictures(made):
    checkpoint = made("0.5b, tied")[2]
    both = ask(checkpoint, "<image><image>", [(60, 40), (90, 80)])
    assert [image["tiles"] for image in both.images] == [1, 1] and both.vision_tokens == 20
    tiled = ask(checkpoint, "<image><image>", [(60, 40), (90, 80)], image_mode="anyres")
    assert min(image["tiles"] for image in tiled.images) > 1
    video = ask(checkpoint, "<image><video>", [(60, 40)], 2)
    assert [is_frame(picture) for picture in video.pictures] == [False, True, True] and video.images[0]["tiles"] > 1
    assert [image["tokens"] for image in video.images[1:]] == [4, 5] and checkpoint.config.image_token_index == IMAGE_ID
