"""Write a LLaVA-1.5 or LLaVA-NeXT checkpoint with random weights, in the layout of the published llava-hf folders.

    python tools/make_checkpoint.py /tmp/llava-7b --shape llava-1.5-7b --dtype bf16     # 14 GB
    python tools/make_checkpoint.py /tmp/llava-tiny --shape tiny                        # half a megabyte

For testing loading and measuring speed: its answers are nonsense, its time and memory those of the real model. Its
small tokenizer has a few words and falls back to bytes. --tokenizer copies the files of a real one; transformers needs
that, because it numbers added tokens without the gap after a small vocabulary. Memory needed: one shard.
"""

import argparse
import io
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.console import as_command  # noqa: E402
from model.flags import Parser  # noqa: E402
from tools.verify_checkpoint import exit_code, gigabytes  # noqa: E402

# Only fields that differ from the class defaults, as in the published files; the defaults are the 7B text model.
_TEXT = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
_WIDE = {
    "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40,
}  # fmt: skip
_CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_TINY_TEXT = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "vocab_size": 512,
}  # fmt: skip
_TINY_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 32,
}  # fmt: skip
_MISTRAL = {
    "model_type": "mistral", "intermediate_size": 14336, "max_position_embeddings": 32768, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32064,
}  # fmt: skip
_TINY_LONG = {**_TINY_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 4096}
SHAPES = {  # name: (text_config, vision_config, id of <image>; <pad> is the next one)
    "llava-1.5-7b": (_TEXT, _CLIP_L_336, 32000),
    "llava-1.5-13b": ({**_TEXT, **_WIDE}, _CLIP_L_336, 32000),
    "next-vicuna-7b": (_TEXT, _CLIP_L_336, 32000),
    "next-vicuna-13b": ({**_TEXT, **_WIDE}, _CLIP_L_336, 32000),
    "next-mistral-7b": (_MISTRAL, _CLIP_L_336, 32000),
    "tiny": (_TINY_TEXT, _TINY_VISION, 510),
    "tiny-next": (_TINY_LONG, {**_TINY_VISION, "image_size": 56}, 510),
}
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; it must be empty or not exist")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp16", help="default fp16, as published")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="largest size of a weight file (default 5)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="copy the tokenizer files of this folder")
    args = parser.parse_args(argv)
    if not 0 < args.shard_gb < math.inf:
        parser.error(f"--shard-gb {args.shard_gb:g} must be above 0")
    return exit_code(lambda: make(args.out, args.shape, args.dtype, args.seed, args.shard_gb, args.tokenizer))


def make(folder, shape, dtype="fp16", seed=0, shard_gb=5.0, tokenizer=None):
    """Write the whole folder. Raises InputError before writing anything if it cannot."""
    from model.checkpoint import DTYPES, empty_model
    from model.config import parse_config

    added = added_tokens(shape, tokenizer)
    raw = config_json(shape, dtype, added)
    shapes = {name: tuple(p.shape) for name, p in empty_model(parse_config(raw)).state_dict().items()}
    sizes = {name: math.prod(s) * DTYPES[dtype].itemsize for name, s in shapes.items()}
    prepare(folder, sum(sizes.values()))
    write_small_files(folder, raw, tokenizer, added)
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


def config_json(shape, dtype, added):
    """config.json, with only the fields that the published ones have."""
    text, vision, _ = SHAPES[shape]
    kind = next_json(vision["image_size"]) if "next" in shape else LLAVA
    return {
        **kind,
        "ignore_index": -100,
        "image_token_index": added["<image>"],
        "pad_token_id": added["<pad>"],
        "projector_hidden_act": "gelu",
        "text_config": {**text, "torch_dtype": DTYPE_NAMES[dtype]},
        "tie_word_embeddings": False,
        "torch_dtype": DTYPE_NAMES[dtype],
        "vision_config": vision,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}


def next_json(side):
    """Fields that only LLaVA-NeXT has: the class, and the canvases that tiles are cut from, (height, width)."""
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": [[a * side, b * side] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))],
        "model_type": "llava_next",
        "use_image_newline_parameter": True,
    }


def preprocessor_json(side):
    """preprocessor_config.json: shortest edge to `side`, centre crop, CLIP's normalisation."""
    from model.image import CLIP_MEAN, CLIP_STD

    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "processor_class": "LlavaProcessor",
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }


def write_small_files(folder, raw, tokenizer, added):
    """Write every file except the weights."""
    write_json(folder / "config.json", raw)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": added["<pad>"]}
    write_json(folder / "generation_config.json", generation)
    preprocessor = preprocessor_json(raw["vision_config"]["image_size"])
    if "image_grid_pinpoints" in raw:
        preprocessor |= {"image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"}
        preprocessor |= {"image_grid_pinpoints": raw["image_grid_pinpoints"], "do_pad": True}
    write_json(folder / "preprocessor_config.json", preprocessor)
    if tokenizer is None:
        write_tokenizer(folder, added, raw["text_config"]["max_position_embeddings"])
    else:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- tokenizer

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
WORDS = (
    "USER ASSISTANT a the what is are there in this that picture image of and or to red blue green yellow white black "
    "square circle triangle left right above below describe answer question how many one two three four yes no not it"
)
PIECES = 400  # 3 control pieces, 256 bytes, then words; ids from here up to <image> are unused


def added_tokens(shape, tokenizer):
    """{text: id} of `<image>` and `<pad>`, from the shape or from the given tokenizer folder."""
    from model.config import InputError
    from model.tokenizer import Tokenizer

    text, _, image = SHAPES[shape]
    added = {"<image>": image, "<pad>": image + 1}
    if tokenizer is None:
        return added
    given = Tokenizer(tokenizer)
    if "<image>" not in given.added:
        raise InputError(f"the tokenizer of {tokenizer} has no <image> token; use one of a llava-hf checkpoint")
    if len(given.sp) > text["vocab_size"]:
        raise InputError(
            f"the tokenizer of {tokenizer} has {len(given.sp)} pieces for the {text['vocab_size']} rows of {shape}; "
            "use another shape or tokenizer"
        )
    return {name: given.added.get(name, default) for name, default in added.items()}


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
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": text, **flags} for text, i in tokens.items()},
        "legacy": True,  # a dummy space before every segment, as in the published llava-1.5 files
        "model_max_length": length,
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "LlamaTokenizer",
        **names,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", names)
    write_json(folder / "added_tokens.json", added)


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
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weights = {name: random_tensor(name, shapes[name], dtype, generator) for name in names}
        save_file(weights, folder / (file + ".tmp"), metadata={"format": "pt"})
        os.replace(folder / (file + ".tmp"), folder / file)
        weight_map.update(dict.fromkeys(names, file))
        total += sum(t.nbytes for t in weights.values())
        del weights  # free them before the next shard is made
        print(f"{file}: {gigabytes(total)} written, {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


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
