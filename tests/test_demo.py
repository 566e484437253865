"""The shipped model is a standard llava-hf folder: transformers loads it unchanged and answers the same."""

import json

import pytest
import torch
from PIL import Image

from model import Generation, load
from tests.paths import DEMO, DEMO_PICTURE
from tools import scenes

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")


@pytest.fixture(scope="module")
def hf():
    load_hf = transformers.LlavaForConditionalGeneration.from_pretrained
    model, report = load_hf(DEMO, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    return transformers.AutoProcessor.from_pretrained(DEMO, backend="pil")


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, "fp32")


@pytest.mark.parametrize(
    ("count", "question"),
    [
        (1, "Describe the picture."),
        (1, "What does the sign say?"),
        (1, "List the objects row by row."),
        (1, "Is there a red cross?"),
        (2, "Compare the two pictures."),
        (2, "Which picture has more objects?"),
    ],
)
@torch.inference_mode()
def test_transformers_answers_with_the_same_ids(hf, processor, demo, count, question):
    pair, _ = scenes.sample(10**9 + 8, (), pair=True)
    pictures = [Image.open(DEMO_PICTURE)] if count == 1 else [scenes.draw_scene(s, 448) for s in pair]
    content = [{"type": "image"}] * count + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    generation = Generation(demo, question, pictures)
    answer = "".join(generation)
    # the prompt, vision tokens included
    image, tokens = demo.config.image_token_index, demo.config.image_tokens
    assert inputs["input_ids"][0].tolist() == [i for t in generation.ids for i in [t] * (tokens if t == image else 1)]
    torch.testing.assert_close(torch.stack(generation.pixels), inputs["pixel_values"], rtol=0, atol=1e-6)
    said = hf.generate(**inputs, do_sample=False, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :].tolist()
    assert said == [*generation.token_ids, demo.stop_ids[0]]
    assert processor.decode(said, skip_special_tokens=True).strip() == answer


def test_the_demo_is_right_about_its_picture(demo):
    (scene,), questions = scenes.sample(1000003627)
    assert scenes.draw_scene(scene, 448).tobytes() == Image.open(DEMO_PICTURE).convert("RGB").tobytes()
    for q in questions:
        assert "".join(Generation(demo, q.question, [str(DEMO_PICTURE)])) == q.answer


def test_config_says_what_the_weights_are():
    from safetensors import safe_open

    with safe_open(DEMO / "model.safetensors", framework="pt") as f:
        names = set(f.keys())
        assert {f.get_slice(n).get_dtype() for n in names} == {"BF16"}
    assert "language_model.lm_head.weight" in names and "vision_tower.vision_model.post_layernorm.weight" in names
    assert json.loads((DEMO / "config.json").read_text())["torch_dtype"] == "bfloat16"
