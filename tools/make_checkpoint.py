"""Write a LLaVA checkpoint with random weights (1.5, NeXT, OneVision), in the layout of the published llava-hf folders.

    python tools/make_checkpoint.py /tmp/llava-7b --shape llava-1.5-7b --dtype bf16     # 14 GB
    python tools/make_checkpoint.py /tmp/llava-tiny --shape tiny                        # half a megabyte

For testing loading and measuring speed: its answers are nonsense, its time and memory those of the real model. Its
small tokenizer has a few words and falls back to bytes; transformers cannot read that of LLaVA-1.5 and NeXT, because it
numbers added tokens without the gap after a small vocabulary. Memory needed: one shard.
"""

import io
import math
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.byte_level import TOKENS, write_byte_level  # noqa: E402
from tools.command import as_command, exit_code, flags, number, write_json  # noqa: E402
from tools.shapes import SHAPES, TIED  # noqa: E402
from tools.verify_checkpoint import gigabytes  # noqa: E402

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(argv=None):
    parser = flags(__doc__)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; it must be empty or not exist")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp16", help="default fp16, as published")
    parser.add_argument("--seed", type=int, default=0)
    above_0 = number(float, 0, open_low=True)
    parser.add_argument("--shard-gb", type=above_0, default=5.0, metavar="GB", help="limit of a file (default 5)")
    args = parser.parse_args(argv)
    return exit_code(make, args.out, args.shape, args.dtype, args.seed, args.shard_gb)


def make(folder, shape, dtype="fp16", seed=0, shard_gb=5.0):
    """Write the whole folder. Raises InputError before writing anything if it cannot."""
    from model.checkpoint import DTYPES, empty_model
    from model.config import parse_config

    raw = config_json(shape, dtype)
    shapes = {name: tuple(p.shape) for name, p in empty_model(parse_config(raw)).state_dict().items()}
    sizes = {name: math.prod(s) * DTYPES[dtype].itemsize for name, s in shapes.items()}
    prepare(folder, sum(sizes.values()))
    write_small_files(folder, raw)
    shards = plan(sizes, shard_gb * 1e9)
    write_weights(folder, shards, shapes, DTYPES[dtype], seed)
    print(f"{folder}: {sum(map(math.prod, shapes.values())):,} parameters, {gigabytes(sum(sizes.values()))}")


def prepare(folder, size):
    """Create the folder; InputError if it is not empty or has no space for `size` bytes of weights."""
    from model.config import InputError

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; give a new one")
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size + 2**26:  # the rest of the folder is small
        raise InputError(
            f"{folder} needs {gigabytes(size)} and its disk has {gigabytes(free)} free; give another place"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        raise InputError(f"cannot create {folder} ({wrong}); give another place") from wrong


# ---------------------------------------------------------------- the small files


def config_json(shape, dtype):
    """config.json, with only the fields that the published ones have."""
    text, vision, image = SHAPES[shape]
    if "onevision" in shape:
        return onevision_json(shape, dtype)
    side, kind = vision["image_size"], "LlavaNext" if "next" in shape else "Llava"
    config = {
        "architectures": [f"{kind}ForConditionalGeneration"], "ignore_index": -100, "image_token_index": image,
        "model_type": "llava", "pad_token_id": image + 1, "projector_hidden_act": "gelu",
        "text_config": {**text, "torch_dtype": DTYPE_NAMES[dtype]}, "tie_word_embeddings": False,
        "torch_dtype": DTYPE_NAMES[dtype], "vision_config": vision, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }  # fmt: skip
    if kind == "Llava":
        return config
    canvases = [[a * side, b * side] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]  # (height, width)
    tiles = {"image_grid_pinpoints": canvases, "use_image_newline_parameter": True}
    return {**config, "model_type": "llava_next", **tiles}


def onevision_json(shape, dtype):
    """config.json of a LLaVA-OneVision, as in llava-hf/llava-onevision-qwen2-*-hf."""
    text, vision, image = SHAPES[shape]
    side, qwen = vision["image_size"], {key: value for key, value in text.items() if key != "attention_bias"}
    common = {"tie_word_embeddings": shape in TIED, "torch_dtype": DTYPE_NAMES[dtype]}
    return {
        **common, "architectures": ["LlavaOnevisionForConditionalGeneration"], "ignore_index": -100,
        "image_grid_pinpoints": [[side * a, side * b] for a in range(1, 7) for b in range(1, 7)],
        "image_token_index": image, "model_type": "llava_onevision", "projector_hidden_act": "gelu",
        "text_config": {**qwen, **common, "use_sliding_window": False}, "use_image_newline_parameter": True,
        "video_token_index": image + 1, "vision_aspect_ratio": "anyres_max_9", "vision_config": vision,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    }  # fmt: skip


def onevision_preprocessor_json(side, canvases):
    """preprocessor_config.json of a LLaVA-OneVision: squashed squares, SigLIP's normalisation."""
    return {
        "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
        "image_grid_pinpoints": canvases, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor",
        "resample": 3, "rescale_factor": 1 / 255, "size": {"height": side, "width": side},
    }  # fmt: skip


def preprocessor_json(side):
    """preprocessor_config.json: shortest edge to `side`, centre crop, CLIP's normalisation."""
    from model.image import CLIP_MEAN, CLIP_STD

    return {
        "crop_size": {"height": side, "width": side}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor", "image_std": list(CLIP_STD), "processor_class": "LlavaProcessor",
        "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": side},
    }  # fmt: skip


def write_small_files(folder, raw):
    """Write every file except the weights."""
    write_published(folder / "config.json", raw)
    side, length = raw["vision_config"]["image_size"], raw["text_config"]["max_position_embeddings"]
    if raw["model_type"] == "llava_onevision":
        write_small_onevision_files(folder, raw, side, length)
        return
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": raw["pad_token_id"]}
    write_published(folder / "generation_config.json", generation)
    preprocessor = preprocessor_json(side)
    if "image_grid_pinpoints" in raw:
        preprocessor |= {"image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"}
        preprocessor |= {"image_grid_pinpoints": raw["image_grid_pinpoints"], "do_pad": True}
    write_published(folder / "preprocessor_config.json", preprocessor)
    added = {"<image>": raw["image_token_index"], "<pad>": raw["pad_token_id"]}
    write_tokenizer(folder, added, length)


def write_small_onevision_files(folder, raw, side, length):
    """As `write_small_files`, for a LLaVA-OneVision: a byte-level tokenizer, the family's chat template."""
    first = raw["image_token_index"] - TOKENS.index("<image>")
    write_byte_level(folder, [WORDS], PIECES, first, length)
    ids = {text: first + i for i, text in enumerate(TOKENS)}
    generation = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    write_published(folder / "generation_config.json", generation)
    preprocessor = onevision_preprocessor_json(side, raw["image_grid_pinpoints"])
    write_published(folder / "preprocessor_config.json", preprocessor)
    write_published(folder / "chat_template.json", {"chat_template": ONEVISION_CHAT})


def write_published(path, value):
    write_json(path, value, indent=2, sort_keys=True)


# ---------------------------------------------------------------- tokenizer

_EACH = "{%% for content in message['content'] | selectattr('type', 'equalto', '%s') %%}"
_TEXTS = _EACH % "text"
ONEVISION_CHAT = (  # the text of llava-hf/llava-onevision-qwen2-*-hf, which `find_template` recognises
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    + (_EACH % "image" + "{{ '<image>' }}{% endfor %}")
    + (_EACH % "video" + "{{ '<video>' }}{% endfor %}")
    + ("{% if message['role'] != 'assistant' %}" + _TEXTS + "{{ '\n' + content['text'] }}{% endfor %}{% else %}")
    + (_TEXTS + "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}")
    + "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    "USER ASSISTANT a the what is are there in this that picture image of and or to red blue green yellow white black "
    "square circle triangle left right above below describe answer question how many one two three four yes no not it"
)
PIECES = 400  # 3 control pieces, 256 bytes, then words; ids from here up to <image> are unused


def write_tokenizer(folder, added, length):
    """Write a sentencepiece BPE of PIECES pieces with byte fallback, trained on WORDS, and its JSON files."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS]), model_writer=model, model_type="bpe", vocab_size=PIECES, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, **added}
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {
        **names, "add_bos_token": True, "add_eos_token": False, "model_max_length": length,
        "added_tokens_decoder": {str(i): {"content": text, **flags} for text, i in tokens.items()},
        "legacy": True,  # a dummy space before every segment, as in the published llava-1.5 files
        "processor_class": "LlavaProcessor", "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    write_published(folder / "tokenizer_config.json", settings)
    write_published(folder / "special_tokens_map.json", names)
    write_published(folder / "added_tokens.json", added)


# ---------------------------------------------------------------- weights


def plan(sizes, limit):
    """Split names, in order, into lists of at most `limit` bytes; a larger tensor gets its own: [[name, ...], ...]."""
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_weights(folder, shards, shapes, dtype, seed):
    """Write one file per shard, then the index, so that an interrupted run never looks complete."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weight_map, total, start = {}, 0, time.time()
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        weights = {name: random_tensor(name, shapes[name], dtype, generator) for name in names}
        save_file(weights, folder / (file + ".tmp"), metadata={"format": "pt"})
        os.replace(folder / (file + ".tmp"), folder / file)
        weight_map.update(dict.fromkeys(names, file))
        total += sum(t.nbytes for t in weights.values())
        del weights  # free them before the next shard is made
        print(f"{file}: {gigabytes(total)} written, {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_published(folder / "model.safetensors.index.json", index)


def random_tensor(name, shape, dtype, generator):
    """Identity norms, zero biases; other weights are normal with standard deviation 0.02."""
    import torch

    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=dtype)
    if "norm" in name:  # layer_norm1, input_layernorm, pre_layrnorm, model.norm
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(std=0.02, generator=generator)


if __name__ == "__main__":
    sys.exit(as_command(main))
