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
    from model.checkpoint import find_folder, open_checkpoint, read_config, weight_files
    from model.tokenizer import Tokenizer

    folder = find_folder(name)
    row("folder", folder)
    config = read_config(folder)
    show_config(config)
    tokenizer = Tokenizer(folder)
    show_tokenizer(tokenizer, config)
    files = weight_files(folder)
    for path in files:
        row("file", f"{gigabytes(path.stat().st_size)}  {path.name}")
    show_checked(open_checkpoint(folder))  # the same checks as load(), without reading weights
    if sha256:
        for path in files:
            row("sha256", f"{digest(path)}  {path.name}")
    print("all fine", flush=True)


def row(label, *lines):
    """Print lines, the first one after the label."""
    for line in lines:
        print(f"{label:<12}{line}", flush=True)
        label = ""


def gigabytes(size):
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


# ---------------------------------------------------------------- config.json


def show_config(config):
    """Print the dimensions, defaults filled in."""
    v, t = config.vision_config, config.text_config
    layers = ", ".join(map(str, config.feature_layers))
    canvases = ", ".join(f"{a} x {b}" for a, b in config.image_grid_pinpoints or ())
    row(
        "vision",
        f"{v.num_hidden_layers} layers, {v.hidden_size} wide (MLP {v.intermediate_size})",
        f"{v.num_attention_heads} heads, {v.image_size} px in patches of {v.patch_size}, {v.hidden_act}",
        f"features of layer {config.vision_feature_layer}, the output of layer {layers}",
        f"strategy {config.vision_feature_select_strategy}: {config.image_tokens} tokens per "
        f"{'square' if config.image_grid_pinpoints else 'picture'}",
        *([f"tiles from canvases of {canvases}"] if canvases else []),
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

VICUNA_PIECES = 32000
IMAGE_ID = 32000  # `<image>` in the golden ids; a checkpoint may use another id
GOLDEN_PROMPT = "USER: <image>\nWhat's the content of the image?\nASSISTANT:"

# Ids of GOLDEN_PROMPT in Vicuna's tokenizer. 29871 is sentencepiece's dummy space as a separate token. Published files
# disagree on whether the text after `<image>` gets one. The longer list is the one vLLM documents for llava-1.5-7b-hf;
# the other omits that space, like the start of the prompt on vLLM's page of the v1.6 models.
_UNTIL_IMAGE = (1, 3148, 1001, 29901, 29871, IMAGE_ID)
_BEHIND_IMAGE = (13, 5618, 29915, 29879, 278, 2793, 310, 278, 1967, 29973, 13, 22933, 9047, 13566, 29901)
GOLDEN_IDS = {
    "a space before every segment, as llava-1.5-7b-hf": (*_UNTIL_IMAGE, 29871, *_BEHIND_IMAGE),
    "a space before the first segment only, as the v1.6 Vicuna files": (*_UNTIL_IMAGE, *_BEHIND_IMAGE),
}


def show_tokenizer(tokenizer, config):
    """Print size, added tokens and the dummy-space rule, and compare with the known ids of Vicuna's tokenizer."""
    from model.config import InputError

    pieces = len(tokenizer.sp)
    row("tokenizer", f"{pieces} sentencepiece pieces, BOS {tokenizer.bos_id if tokenizer.add_bos else 'not added'}")
    image, said = tokenizer.added.get("<image>"), config.image_token_index
    if image is None:
        raise InputError("the tokenizer has no <image> token; use the tokenizer files of a llava-hf checkpoint")
    row("", f"<image> is {image}" + ("" if image == said else f" (config.json says {said}; the tokenizer decides)"))
    row("prefix", prefix_rule(tokenizer))
    row("golden ids", golden_note(lambda text: [IMAGE_ID if i == image else i for i in tokenizer.encode(text)], pieces))


def prefix_rule(tokenizer):
    """Where the dummy space goes, in words."""
    where = "before every segment" if tokenizer.prefix_every_segment else "before the first segment only"
    return f"dummy space {where}" + (", unless it has a space already" if tokenizer.prefix_spares_spaces else "")


def golden_note(encode, pieces):
    """Which known behaviour encode (text -> ids) has; InputError if it has Vicuna's size but neither of its outputs."""
    from model.config import InputError

    if pieces != VICUNA_PIECES:
        return f"not a Vicuna tokenizer ({pieces} pieces, not {VICUNA_PIECES}): no golden ids"
    ids = tuple(encode(GOLDEN_PROMPT))
    for behaviour, golden in GOLDEN_IDS.items():
        if ids == golden:
            return f"match: {behaviour}"
    raise InputError(
        f"the tokenizer has Vicuna's size but not its ids ({difference(ids)}); download the tokenizer files again"
    )


def difference(ids):
    """Where ids first differ from the nearer golden sequence, in words."""

    def agreement(golden):
        pairs = enumerate(zip(ids, golden, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(golden)))

    golden = max(GOLDEN_IDS.values(), key=agreement)
    at = agreement(golden)
    got, wanted = (str(s[at]) if at < len(s) else "the end" for s in (ids, golden))
    return f"id number {at + 1} is {got} instead of {wanted}"


# ---------------------------------------------------------------- weights


def show_checked(checkpoint):
    """Print what else `open_checkpoint` found. It has already checked names and shapes."""
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


def digest(path, chunk=2**24):
    """SHA-256 of a file in hex. Prints a line on stderr every 2 GB, because the files of a 7B model take a minute."""
    hashed, done, size = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while block := file.read(chunk):
            hashed.update(block)
            done += len(block)
            if done == size or done // 2e9 > (done - len(block)) // 2e9:
                print(f"sha256 {path.name}: {gigabytes(done)} of {gigabytes(size)}", file=sys.stderr, flush=True)
    return hashed.hexdigest()


if __name__ == "__main__":
    sys.exit(as_command(main))
