"""Check a LLaVA checkpoint without reading its weights: config, tokenizer, then every tensor's name and shape.

    python tools/verify_checkpoint.py DIR
    python tools/verify_checkpoint.py llava-hf/llava-1.5-7b-hf --sha256     # an id in the local Hugging Face cache

Takes seconds for any size, because it reads only the headers of the weight files; --sha256 reads them whole. A
checkpoint that passes also loads. Exit codes: 0 all fine; 2 a fault, named in one line on stderr.
"""

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.command import as_command, exit_code, flags  # noqa: E402


def main(argv=None):
    parser = flags(__doc__)
    parser.add_argument("checkpoint", metavar="DIR|ID", help="folder, or id in the local Hugging Face cache")
    parser.add_argument("--sha256", action="store_true", help="also print the SHA-256 of each weight file")
    args = parser.parse_args(argv)
    return exit_code(verify, args.checkpoint, args.sha256)


def verify(name, sha256=False):
    """Print a checkpoint's contents; InputError at the first fault that load() would reject."""
    from model.checkpoint import open_checkpoint, weight_files
    from model.config import read_config

    checkpoint = open_checkpoint(name)  # the same checks as load(), without reading weights
    row("folder", checkpoint.folder)
    show_config(checkpoint.config)
    show_tokenizer(checkpoint.tokenizer, read_config(checkpoint.folder).image_token_index)
    show_rest(checkpoint)
    for path in weight_files(checkpoint.folder):
        row("file", f"{gigabytes(path.stat().st_size)}  {path.name}")
        if sha256:
            print(f"sha256 of {path.name} ...", file=sys.stderr, flush=True)  # a 7B model takes a minute
            with open(path, "rb") as file:
                row("sha256", f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}")
    print("all fine", flush=True)


def row(label, *lines):
    """Print lines, the first one after the label."""
    for line in lines:
        print(f"{label:<12}{line}", flush=True)
        label = ""


def gigabytes(size):
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def show_config(config):
    """Print the dimensions, defaults filled in."""
    v, t = config.vision_config, config.text_config
    layers = ", ".join(map(str, config.feature_layers))
    sizes = [f"{a} x {b}" for a, b in config.image_grid_pinpoints or ()]
    canvases = ", ".join(sizes) if len(sizes) < 9 else f"{len(sizes)} sizes, {sizes[0]} to {sizes[-1]}"
    shrunk = f", shrunk to the tokens of about {config.max_tiles} tiles" if config.max_tiles else ""
    row(
        "vision",
        f"{v.num_hidden_layers} layers, {v.hidden_size} wide (MLP {v.intermediate_size})",
        f"{v.num_attention_heads} heads, {v.image_size} px in patches of {v.patch_size}, {v.hidden_act}",
        f"features of layer {config.vision_feature_layer}, the output of layer {layers}",
        f"strategy {config.vision_feature_select_strategy}: {config.image_tokens} tokens per "
        f"{'square' if canvases else 'picture'}",
        *([f"tiles from canvases of {canvases}{shrunk}"] if canvases else []),
    )
    row(
        "text",
        f"{t.num_hidden_layers} layers, {t.hidden_size} wide (MLP {t.intermediate_size})",
        f"{t.num_attention_heads} query heads over {t.num_key_value_heads} KV heads of {t.head_dim}",
        f"vocabulary {t.vocab_size}{', head tied to it' if config.tie_word_embeddings else ''}",
        f"context {t.context}, RoPE theta {t.rope_theta}, RMSNorm eps {t.rms_norm_eps}",
    )
    row("dtype", f"{config.dtype or 'not stated'} (in config.json)")


# ---------------------------------------------------------------- tokenizer

VICUNA_PIECES, QWEN2_PIECES = 32000, 151643
IMAGE_ID, QWEN2_IMAGE_ID = 32000, 151646  # `<image>` in the golden ids; a checkpoint may use another id
GOLDEN_PROMPT = "USER: <image>\nWhat's the content of the image?\nASSISTANT:"

# Ids of GOLDEN_PROMPT in Vicuna's tokenizer. 29871 is sentencepiece's dummy space as a separate token. Published files
# disagree on whether the text after `<image>` gets one. The longer list is the one vLLM documents for llava-1.5-7b-hf;
# the other omits that space, like the start of the prompt on vLLM's page of the v1.6 models.
_UNTIL_IMAGE = (1, 3148, 1001, 29901, 29871, IMAGE_ID)
_BEHIND_IMAGE = (13, 5618, 29915, 29879, 278, 2793, 310, 278, 1967, 29973, 13, 22933, 9047, 13566, 29901)
GOLDEN_IDS = {
    (*_UNTIL_IMAGE, 29871, *_BEHIND_IMAGE): "a space before every segment, as llava-1.5-7b-hf",
    (*_UNTIL_IMAGE, *_BEHIND_IMAGE): "a space before the first segment only, as the v1.6 Vicuna files",
}
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_ONEVISION = "<|im_start|>user <image>\nWhat is the content of this image?<|im_end|><|im_start|>assistant\n"
QWEN2_IDS = {
    _SYSTEM: (151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198),  # many model logs
    # vLLM's test of the processor of llava-onevision-qwen2-0.5b-ov-hf
    _ONEVISION: (
        151644, 872, 220, QWEN2_IMAGE_ID, 198, 3838, 374, 279, 2213, 315, 419, 2168, 30, 151645, 151644, 77091, 198,
    ),
}  # fmt: skip


def show_tokenizer(tokenizer, said):
    """Print size, the image token (said: its id in config.json) and the dummy-space rule; compare with golden ids."""
    image, pieces = tokenizer.added["<image>"], tokenizer.size
    row("tokenizer", f"{pieces} {tokenizer.kind} pieces, BOS {tokenizer.bos_id if tokenizer.add_bos else 'not added'}")
    row("", f"<image> is {image}" + ("" if image == said else f" (config.json says {said}; the tokenizer decides)"))
    if tokenizer.kind != "sentencepiece":
        row("golden ids", qwen2_note(tokenizer, image))
        return
    where = "before every segment" if tokenizer.prefix_every_segment else "before the first segment only"
    unless = ", unless it has a space already" if tokenizer.prefix_spares_spaces else ""
    row("prefix", f"dummy space {where}{unless}")
    ids = tuple(IMAGE_ID if i == image else i for i in tokenizer.encode(GOLDEN_PROMPT))
    row("golden ids", golden_note(ids, pieces))


def golden_note(ids, pieces):
    """Which known behaviour gives these ids for GOLDEN_PROMPT; InputError for Vicuna's size with other ids."""
    from model.config import InputError

    if pieces != VICUNA_PIECES:
        return f"not a Vicuna tokenizer ({pieces} pieces, not {VICUNA_PIECES}): no golden ids"
    if ids not in GOLDEN_IDS:
        raise InputError(
            f"the tokenizer has Vicuna's size but other ids ({list(ids)}); download the tokenizer files again"
        )
    return f"match: {GOLDEN_IDS[ids]}"


def qwen2_note(tokenizer, image):
    """Whether Qwen2's golden ids are those of its prompts; InputError for Qwen2's size with other ids."""
    from model.config import InputError

    if tokenizer.size != QWEN2_PIECES:
        return f"not Qwen2's vocabulary ({tokenizer.size} pieces, not {QWEN2_PIECES}): no golden ids"
    for prompt, known in QWEN2_IDS.items():
        ids = [QWEN2_IMAGE_ID if i == image else i for i in tokenizer.encode(prompt)]
        if ids != list(known):
            raise InputError(
                f"the tokenizer has Qwen2's size but other ids ({ids}); download the tokenizer files again"
            )
    return f"match: Qwen2's ids of {len(QWEN2_IDS)} prompts"


# ---------------------------------------------------------------- weights


def show_rest(checkpoint):
    """Print what `open_checkpoint` found in the other files."""
    stored = sorted({dtype for _, _, dtype in checkpoint.keys.values()})
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    row(
        "weights",
        f"{len(checkpoint.keys)} tensors, all names and shapes fit",
        f"{parameters:,} parameters, stored as {', '.join(stored)}",
    )
    row("template", f"{checkpoint.template} ({checkpoint.template_note})")
    row("pictures", f"{checkpoint.image_settings.mode} to {checkpoint.image_settings.size} px")
    row("stop ids", ", ".join(map(str, checkpoint.stop_ids)))
    for note in checkpoint.notes:
        row("note", note)


if __name__ == "__main__":
    sys.exit(as_command(main))
