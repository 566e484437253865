"""LLaVA-NeXT: tiles, their tokens and the model against transformers; the original code's tile order by hand."""

import math
import types
from dataclasses import replace

import pytest
import torch
from conftest import TEXT, VISION, preprocess, refusal
from oracle import expanded, hf_pictures, masked_ids
from safetensors.torch import load_file, save_file
from test_checkpoint import LAYOUTS
from test_methods import RULES, by_hand
from test_parity import float64_twin, noise

from model import Generation, Sampling, load, open_checkpoint
from model.config import PINPOINTS, parse_config
from model.image import ImageSettings
from model.layout import choose_canvas, kept_of_tiles, layout_of
from model.pruning import make_method
from tests.seeds import python_random

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

SIDE = 28  # of a tile in the small models: 2 x 2 patches of 14
SMALL = tuple((a * SIDE // 336, b * SIDE // 336) for a, b in PINPOINTS)
SETTINGS = ImageSettings(336, "anyres", pinpoints=PINPOINTS)
EXTREMES = [
    (1, 1), (336, 336), (335, 337), (337, 335), (300, 100), (100, 300), (386, 8), (8, 386), (640, 480), (480, 640),
    (1, 4000), (4000, 1), (1024, 1024), (1920, 1080), (2000, 500), (672, 672), (673, 671), (10000, 3), (336, 672),
    (1008, 336),
]  # fmt: skip


def random_sizes(count, largest=2500, seed=0):
    rng = python_random(seed)
    return [(rng.randint(1, largest), rng.randint(1, largest)) for _ in range(count)]


# ---------------------------------------------------------------- how many tokens


def counted(size, order, patches=24):
    """Tokens of a picture (width, height) at 336 pixels per tile."""
    return layout_of(size, replace(SETTINGS, order=order), patches, 0).tokens


@pytest.mark.parametrize(
    ("size", "tokens"),  # published for llava-v1.6 at 336 pixels, or computed from its code
    [((640, 480), 2340), ((480, 640), 2352), ((1024, 1024), 2928), ((1920, 1080), 1948), ((2000, 500), 1890),
     ((336, 336), 1176), ((386, 8), 576)],
)  # fmt: skip
def test_token_counts_of_known_sizes(size, tokens):
    assert counted(size, "hf") == tokens


def test_token_counts_of_520_sizes_are_those_of_the_processor_and_of_the_model_of_transformers():
    from transformers.models.llava_next import modeling_llava_next as theirs
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    pinpoints = [list(pair) for pair in PINPOINTS]
    processor = types.SimpleNamespace(
        image_processor=types.SimpleNamespace(image_grid_pinpoints=pinpoints), patch_size=14,
        num_additional_image_tokens=1, _get_unpadded_features=LlavaNextProcessor._get_unpadded_features.__get__(0),
    )  # fmt: skip
    for wide, high in random_sizes(500) + EXTREMES:
        said = LlavaNextProcessor._get_number_of_features(processor, high, wide, 336, 336) - 1
        rows, columns = theirs.get_anyres_image_grid_shape((high, wide), pinpoints, 336)
        seen = theirs.unpad_image(torch.empty(1, 24 * rows, 24 * columns), (high, wide))
        assert counted((wide, high), "hf") == said == 576 + seen.shape[1] * (seen.shape[2] + 1), (wide, high)


def by_the_original_rule(size, pinpoints):
    """The steps of the published code: pairs are (width, height), and the first of equally good ones wins."""
    best, most, least = None, 0, float("inf")
    for wide, high in pinpoints:
        scale = min(wide / size[0], high / size[1])
        seen = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        waste = wide * high - seen
        if seen > most or (seen == most and waste < least):
            best, most, least = (wide, high), seen, waste
    return best


def test_the_two_dialects_differ_for_small_pictures_only():
    differing = set()
    for size in random_sizes(300) + random_sizes(300, 336) + EXTREMES:
        own = choose_canvas(size, PINPOINTS, "orig")
        assert own == by_the_original_rule(size, PINPOINTS), size
        if own != choose_canvas(size, PINPOINTS, "hf"):
            differing.add(size)
    assert (300, 100) in differing and (counted((300, 100), "orig"), counted((300, 100), "hf")) == (776, 1360)
    assert max(max(size) for size in differing if min(size) > 4) < 345  # except very thin ones


def test_what_is_kept_of_the_tiles_is_rounded_by_one_dialect_only():
    """int(h * W / w) of a float slightly below an integer: HF rounds it first."""
    found = []
    for wide in range(1, 600):
        for high in range(1, 600):
            grid = (2, 2)
            if kept_of_tiles(grid, 24, (wide, high), "hf") != kept_of_tiles(grid, 24, (wide, high), "orig"):
                found.append((wide, high))
    assert found and len(found) < 600
    for size in found[:20]:
        wider = size[0] > size[1]
        exact = 48 * min(size) / max(size)
        assert abs(exact - round(exact)) < 1e-7, size
        rows, columns = kept_of_tiles((2, 2), 24, size, "hf")
        part = rows if wider else columns
        assert 0 <= (part.stop - part.start) - round(exact) <= 1  # an odd border is larger at the end


# ---------------------------------------------------------------- pixels


def hf_tiles(image, side, pinpoints):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_grid_pinpoints=[list(pair) for pair in pinpoints],
    )  # fmt: skip
    return processor(image, return_tensors="pt")["pixel_values"][0]


def test_pixels_of_tiles_equal_the_pillow_processor_of_transformers():
    settings = ImageSettings(SIDE, "anyres", pinpoints=SMALL)
    sizes = [(a, b) for a, b in EXTREMES if max(a, b) < 700] + random_sizes(60, 160, seed=1)
    for seed, size in enumerate(sizes):
        image = noise(*size, seed=seed)
        torch.testing.assert_close(preprocess(image, settings), hf_tiles(image, SIDE, SMALL), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- the model

CASES = {  # (text, vision, prompt, sizes of the pictures)
    "mha, one picture": ({"num_key_value_heads": 4}, {}, "what is <image> there?", [(50, 31)]),
    "gqa, two pictures": ({}, {}, "<image> above <image>\nyes or no?", [(90, 33), (30, 75)]),
    "mistral, three pictures": (
        {"model_type": "mistral", "num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": None,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "num_hidden_layers": 3},
        {}, "<image> left of <image> right of <image>?", [(20, 20), (200, 16), (61, 64)],
    ),
    "a window that is never left, 16 patches": (
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 400}, {"image_size": 56},
        "<image> how many red circles?", [(150, 120)],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(make_hf_checkpoint, tmp_path_factory):
    """Function (case) -> (transformers' model, folder, our generation of up to 32 ids), made once per case."""
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("next")
            text, vision, prompt, sizes = CASES[case]
            made[case] = (
                make_next(make_hf_checkpoint, folder, text, vision),
                folder,
                ask(load(folder, "fp32"), prompt, sizes),
            )
        return made[case]

    return get


def make_next(make_hf_checkpoint, folder, text=None, vision=None, seed=5):
    side = (vision or {}).get("image_size", SIDE)
    top = {"image_grid_pinpoints": [[a * side // 336, b * side // 336] for a, b in PINPOINTS]}
    return make_hf_checkpoint(folder, {"model_type": "llama"} | (text or {}), vision, top, seed=seed, kind="LlavaNext")


def ask(checkpoint, prompt, sizes, **options):
    pictures = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    options = {"sampling": Sampling(max_new_tokens=32), "template": "raw"} | options
    return Generation(replace(checkpoint, stop_ids=()), prompt, pictures, **options)


def assert_as_exact_as_transformers(hf, asked):
    """Logits at all positions against a float64 twin, and the pictures' spans."""
    model = asked.checkpoint.model
    x, spans = model.splice(asked.ids, asked.encode_images())
    ours = model.language_model.logits(model.language_model.prefill(x[None]))[0]
    inputs = {"input_ids": torch.tensor([expanded(asked)])} | hf_pictures([asked])
    theirs = hf(**inputs).logits[0]
    inputs |= {name: inputs[name].double() for name in ("pixel_values", "pixel_values_videos") if name in inputs}
    exact = float64_twin(hf)(**inputs).logits[0]
    assert exact.dtype == torch.float64 and ours.shape == exact.shape and exact.std() > 0.5
    two_ulp = 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + two_ulp
    assert [stop - start for start, stop in spans] == [image["tokens"] for image in asked.images]
    assert len(x) == asked.prompt_tokens and asked.vision_tokens == sum(image["tokens"] for image in asked.images)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_at_all_positions_are_as_exact_as_transformers(pair, case):
    hf, _, asked = pair(case)
    assert_as_exact_as_transformers(hf, asked)


@pytest.mark.parametrize("case", CASES)
def test_32_greedy_ids_are_those_of_transformers(pair, case):
    hf, _, asked = pair(case)
    "".join(asked)
    theirs = hf.generate(
        input_ids=torch.tensor([expanded(asked)]), **hf_pictures([asked]), do_sample=False, max_new_tokens=32,
        suppress_tokens=asked.checkpoint.never_ids, eos_token_id=None,
    )  # fmt: skip
    assert asked.token_ids == theirs[0, -32:].tolist() and len(set(asked.token_ids)) > 3


@pytest.mark.parametrize("spec", ["plphp", "plphp-ada"])
def test_plphp_keeps_the_sets_and_says_the_ids_of_transformers_with_masks(make_hf_checkpoint, tmp_path, spec):
    make_next(make_hf_checkpoint, tmp_path, {"num_hidden_layers": 4}, {"image_size": 56}, seed=3)
    pictures = [(150, 120), (40, 90)]
    asked = ask(load(tmp_path, "fp32"), "what is <image> and <image>?", pictures, prune=make_method(spec))
    asked.sampling = Sampling(max_new_tokens=24)
    "".join(asked)
    choose = by_hand(RULES[spec,][2], None, asked.spans, 2)
    ids, kept = masked_ids(tmp_path, asked, choose, 24)
    assert asked.token_ids == ids and not all(k.all() for k in kept)
    lengths = torch.stack([k.sum(1) for k in kept]) + 24 - 1
    assert torch.equal(asked.cache.kv_len.long(), lengths)


@pytest.mark.parametrize("name", ["grid", "objects"])
def test_blind_methods_know_the_tiles(make_hf_checkpoint, tmp_path, name):
    """Every vision token has a place and a contrast, and each picture keeps its rounded share."""
    make_next(make_hf_checkpoint, tmp_path, {"num_hidden_layers": 2}, {"image_size": 56}, seed=3)
    sizes = [(150, 120), (40, 90), (300, 40)]
    asked = ask(load(tmp_path, "fp32"), "<image><image><image>", sizes, prune=name, sampling=Sampling(max_new_tokens=2))
    "".join(asked)
    tokens = [image["tokens"] for image in asked.images]
    assert [len(p) for p in asked.places] == [len(c) for c in asked.contrast] == tokens and len(set(tokens)) > 1
    assert all(len({tuple(p) for p in places.tolist()}) == len(places) for places in asked.places)  # all places differ
    assert asked.kept == [sum(math.floor(0.5 * n + 0.5) for n in tokens)] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_key_layout_gives_the_same_ids(pair, tmp_path, layout):
    _, folder, asked = pair("gqa, two pictures")
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    published = {c: load_file(path)[key] for c, (path, key, _) in open_checkpoint(folder).keys.items()}
    save_file({LAYOUTS[layout](k): t for k, t in published.items()}, tmp_path / "model.safetensors")
    checkpoint = load(tmp_path, "fp32")
    again = ask(checkpoint, CASES["gqa, two pictures"][2], CASES["gqa, two pictures"][3], anyres_order="hf")
    assert "".join(again) == "".join(asked) and again.token_ids == asked.token_ids
    # names and tile order of the original code
    assert checkpoint.image_settings.order == ("orig" if layout.startswith("E") else "hf")


def test_the_order_changes_what_a_small_picture_becomes(pair):
    _, _, asked = pair("gqa, two pictures")
    hf, orig = (ask(asked.checkpoint, "what?", [(25, 9)], anyres_order=order) for order in ("hf", "orig"))
    assert hf.images[0]["tiles"] == orig.images[0]["tiles"] == 3 and hf.vision_tokens > orig.vision_tokens
    assert "".join(hf) != "".join(orig)


@pytest.mark.parametrize("size", [(97, 2), (2, 97), (1, 1), (33, 32)])
def test_extreme_pictures_are_answered_with_the_tokens_that_were_counted(pair, size):
    _, _, asked = pair("gqa, two pictures")
    extreme = ask(asked.checkpoint, "what?", [size], sampling=Sampling(max_new_tokens=2))
    "".join(extreme)
    ((start, stop),) = extreme.spans
    assert stop - start == extreme.vision_tokens == extreme.images[0]["tokens"]


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_without_tiles_a_picture_is_one_square_and_has_no_newline(pair, mode):
    _, _, asked = pair("gqa, two pictures")
    square = ask(asked.checkpoint, "what?", [(50, 31)], image_mode=mode)
    assert square.images[0]["tiles"] == 1 and square.vision_tokens == 4 and len("".join(square)) > 0


# ---------------------------------------------------------------- configs and rejections


def test_sparse_configs_resolve_to_the_published_shapes():
    top = {"model_type": "llava_next", "text_config": {"model_type": "mistral", "vocab_size": 32064}}
    config = parse_config(top)
    text = config.text_config
    assert (text.hidden_size, text.intermediate_size, text.num_key_value_heads, text.head_dim) == (4096, 14336, 8, 128)
    assert config.image_grid_pinpoints == PINPOINTS and config.vision_config.image_size == 336
    assert text.sliding_window == text.context == 4096  # the class default, unless the file says null
    open_window = parse_config(top | {"text_config": {"model_type": "mistral", "sliding_window": None}}).text_config
    assert open_window.context == 131072
    llama = parse_config({"model_type": "llava_next", "text_config": {"sliding_window": 7}}).text_config
    assert llama.sliding_window is None and llama.num_key_value_heads == 32 and llama.context == 2048


def test_beyond_a_sliding_window_is_refused_with_the_numbers(make_checkpoint, tmp_path):
    make_checkpoint(tmp_path, text={"model_type": "mistral", "sliding_window": 20})
    checkpoint = load(tmp_path, "fp32")
    message = refusal(Generation, checkpoint, "what is the content of this picture? " * 2, [noise(30, 30)])
    assert "sliding window" in message and "20" in message and "512" in message


def test_tiles_of_a_model_without_them_are_refused(make_checkpoint, tmp_path):
    make_checkpoint(tmp_path)
    assert "LLaVA-NeXT" in refusal(Generation, load(tmp_path), "what?", [noise(30, 30)], image_mode="anyres")


def test_a_missing_newline_is_missed(make_checkpoint, tmp_path):
    tensors = make_checkpoint(tmp_path, top={"model_type": "llava_next", "image_grid_pinpoints": [[28, 56]]})
    assert tensors.pop("image_newline").shape == (TEXT["hidden_size"],) and VISION["image_size"] == SIDE
    save_file(tensors, tmp_path / "model.safetensors")
    assert "image_newline" in refusal(open_checkpoint, tmp_path)
