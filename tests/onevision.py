"""A small LLaVA-OneVision: SigLIP without CLS, Qwen2, tiles whose map is shrunk, frames of a video."""

import json

from conftest import IMAGE_ID, PAD_ID, added_token, write_json

SIDE = 24  # pixels of a square: 6 x 6 patches of 4
VISION = {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": 4, "vision_use_head": False}
TEXT = {"model_type": "qwen2", "max_position_embeddings": 4096, "tie_word_embeddings": True}
TOP = {"video_token_index": PAD_ID, "tie_word_embeddings": True}


def make_onevision(make_hf_checkpoint, folder, text=None, vision=None, top=None, seed=0):
    """A checkpoint as `make_hf_checkpoint` writes it -> transformers' model. The token `<pad>` is `<video>`."""
    text, vision, top = TEXT | (text or {}), VISION | (vision or {}), TOP | (top or {})
    side = vision["image_size"]
    top["image_grid_pinpoints"] = [[side * a, side * b] for a in range(1, 7) for b in range(1, 7)]
    model = make_hf_checkpoint(folder, text, vision, top, seed, kind="LlavaOnevision")
    path = folder / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    raw["added_tokens_decoder"] = {str(IMAGE_ID): added_token("<image>"), str(PAD_ID): added_token("<video>")}
    write_json(path, {key: value for key, value in raw.items() if key != "pad_token"})
    numbers = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    kind = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": model.config.image_grid_pinpoints,
    }
    write_json(folder / "preprocessor_config.json", numbers | kind)
    return model
