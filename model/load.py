"""From a folder of safetensors to a running model: nothing is downloaded, unpickled or guessed.

Weights are memory-mapped and handed to modules that were built on the meta device, tensor by tensor, so a checkpoint in
the wanted dtype costs no copy at all. Names are checked both ways before the first byte of a weight is read.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .config import InputError, LlavaConfig, making_sense_of, read_config, read_json
from .image import ImageSettings, read_image_settings
from .llava import Llava
from .tokenizer import Tokenizer, find_template

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A model with everything that is needed to ask it something.

    From open_checkpoint the model is without memory (on the meta device); read_weights fills it.
    """

    folder: Path
    config: LlavaConfig
    model: Llava
    keys: dict  # canonical name -> (file, name in the file, stored dtype)
    tokenizer: Tokenizer
    image_settings: ImageSettings
    template: str
    template_note: str  # how the template was found
    stop_ids: tuple

    @property
    def device(self):
        return self.model.language_model.model.norm.weight.device

    @property
    def dtype(self):
        return self.model.language_model.model.norm.weight.dtype

    def choose_dtype(self, name, device):
        """The torch dtype that `read_weights` comes to. InputError for one that it cannot use."""
        name, names = str(name).removeprefix("torch.").lower(), {**DTYPES, **FILE_DTYPES, "half": torch.float16}
        if name in names:
            return names[name]
        if name != "auto":
            raise InputError(f"dtype {name} cannot be used; use auto, fp32, bf16 or fp16")
        if torch.device(device).type != "cpu":
            stored = min(dtype for _, _, dtype in self.keys.values())
            return FILE_DTYPES.get(self.config.dtype, SAFETENSORS_DTYPES[stored])
        parameters = sum(p.numel() for p in self.model.parameters())
        # Windows does not say: assume a laptop
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 16e9
        return torch.float32 if 4 * parameters <= memory / 2 else torch.bfloat16

    def read_weights(self, dtype="auto", device="cpu"):
        """Give the model its weights: mapped from the files, cast and moved one tensor at a time. Returns self.

        dtype: "auto" | "bf16" | "fp16" | "fp32", torch's names ("float16") or torch's own (torch.float16). auto is the
        file's own dtype on CUDA; on a CPU fp32 if that fits in half of the memory, else bf16. device: see
        `choose_device`.
        """
        device = choose_device(device)
        dtype = self.choose_dtype(dtype, device)
        weights, by_file = {}, {}
        for name, (path, key, _) in self.keys.items():
            by_file.setdefault(path, []).append((name, key))
        for path, pairs in by_file.items():
            with _open(path) as file:
                for name, key in pairs:
                    weights[name] = file.get_tensor(key).to(device=device, dtype=dtype)
        self.model.load_state_dict(weights, strict=True, assign=True)
        mapped = device.type == "cpu" and any(
            SAFETENSORS_DTYPES[stored] == dtype for _, _, stored in self.keys.values()
        )
        if not mapped:  # a copy of what is mapped would be memory of its own
            self.model.language_model.arrange()
        self.model.requires_grad_(False)
        return self


def load(name, dtype="auto", device="cpu"):
    """Checkpoint, ready to be asked, from a folder or from an id that lies in the local Hugging Face cache.

    dtype and device: as in `Checkpoint.read_weights`. InputError for whatever cannot be used.
    """
    device = choose_device(device)  # before anything is read
    return open_checkpoint(name).read_weights(dtype, device)


def choose_device(name):
    """torch.device of "auto", "cpu", "cuda", "cuda:1", an index of CUDA or a torch.device; InputError if not there."""
    if isinstance(name, str) and name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if isinstance(name, bool) or not isinstance(name, str | int | torch.device):
            raise TypeError
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device {name} is none; use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name} is not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {name} is not available ({torch.cuda.device_count()} CUDA devices here); use cpu")
    return device


def open_checkpoint(name):
    """Checkpoint without its weights: all that can be refused is refused here, from headers and small files alone.

    InputError if anything is missing, unexpected, of the wrong shape or not understood.
    """
    folder = find_folder(name)
    config = read_config(folder)
    tokenizer = Tokenizer(folder)
    config = _with_image_token(config, tokenizer)
    model = empty_model(config)
    keys = match_keys(weight_files(folder), model)
    template, note = find_template(folder, config)
    settings = read_image_settings(folder, config.vision_config.image_size, config.image_grid_pinpoints)
    if any("mm_projector." in key for _, key, _ in keys.values()):  # names of the original code: so is its order
        settings = replace(settings, order="orig")
    return Checkpoint(folder, config, model, keys, tokenizer, settings, template, note, _stop_ids(folder, tokenizer))


# ---------------------------------------------------------------- finding files


def find_folder(name):
    """The folder of a checkpoint: a path as it is, `org/name` in the local Hugging Face cache."""
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, TypeError) as broken:  # a name too long for a path; ~nobody; None
        raise InputError(
            f"{str(name)[:80]} is no path ({broken}); give the folder of a llava-hf checkpoint"
        ) from broken
    if str(name).count("/") != 1 or folder.is_absolute() or str(name).startswith("."):
        raise InputError(
            f"no folder {name}; give the folder of a llava-hf checkpoint, or an id such as "
            "llava-hf/llava-1.5-7b-hf that is in the local cache"
        )
    cached = _hub_cache() / ("models--" + str(name).replace("/", "--"))
    revision = cached / "refs" / "main"
    snapshot = cached / "snapshots" / (revision.read_text().strip() if revision.is_file() else "")
    if not revision.is_file() or not snapshot.is_dir():
        raise InputError(
            f"{name} is neither a folder nor in the local cache ({cached}); nothing is ever downloaded here: "
            f"fetch it first, for example with `hf download {name}`"
        )
    return snapshot


def _hub_cache():
    """Where Hugging Face tools keep snapshots, by their own order of precedence."""
    env = os.environ
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if env.get(variable):
            return Path(env[variable]).expanduser()
    if env.get("HF_HOME"):
        return Path(env["HF_HOME"]).expanduser() / "hub"
    return Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def weight_files(folder):
    """The safetensors files of a folder: those of the index, else model.safetensors, else all there are."""
    folder = Path(folder)
    index = read_json(folder / "model.safetensors.index.json")
    if index is not None:
        with making_sense_of(folder / "model.safetensors.index.json"):
            names = sorted(set(index["weight_map"].values()))
        if not names:
            raise InputError(f"{folder}/model.safetensors.index.json lists no files; fetch it again")
        for name in names:
            # a name with a path in it could reach any file of this machine
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(
                    f"the index of {folder} points outside the folder ({name}); do not use this checkpoint"
                )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(names)} weight files are missing in {folder} ({_some(missing)}); fetch them"
            )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise InputError(
                f"{folder} holds only pickled weights ({_some(pickles)}), which can run code when loaded; use "
                "the safetensors conversion (llava-hf/...)"
            )
        raise InputError(f"{folder} holds no *.safetensors; give the folder of a llava-hf checkpoint")
    return files


# ---------------------------------------------------------------- names

DROPPED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # constants that old files store


def canonical_key(key):
    """A tensor's name in this project, which is the name in the published llava-hf files; None for what is dropped.

    Five layouts are in use: the published one, the in-memory ones of transformers 4.52 to 4.57 and of 5 (both with
    `model.` in front, the latter without `vision_model.`), what transformers 5 writes, and that of the original code.
    """
    if key.endswith(DROPPED):
        return None
    for inner in ("language_model.", "vision_tower.", "multi_modal_projector.", "mm_projector.", "image_newline"):
        if key.startswith("model." + inner):
            key = key.removeprefix("model.")
    if key.startswith("language_model."):
        if not key.startswith(("language_model.model.", "language_model.lm_head.")):
            key = "language_model.model." + key.removeprefix("language_model.")
    elif key.startswith("vision_tower."):
        rest = key.removeprefix("vision_tower.").removeprefix("vision_tower.").removeprefix("vision_model.")
        key = "vision_tower.vision_model." + rest
    elif key.startswith("mm_projector."):
        number = {"0": "linear_1", "2": "linear_2"}
        part, _, rest = key.removeprefix("mm_projector.").partition(".")
        key = f"multi_modal_projector.{number.get(part, part)}.{rest}"
    elif key.startswith(("lm_head.", "model.embed_tokens.", "model.layers.", "model.norm.")):
        key = "language_model." + key
    return key


def match_keys(files, model):
    """{canonical name: (file, name in the file, dtype)}; names and shapes are checked both ways, from headers alone."""
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    found, shapes = {}, {}
    for path in files:
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118 (the handle is no dict)
                name = canonical_key(key)
                if name is None or (tied and name == "language_model.lm_head.weight"):
                    continue
                if name in found:
                    raise InputError(
                        f"{path.parent} stores {name} twice ({found[name][0].name} and {path.name}); keep one"
                    )
                piece = file.get_slice(key)
                found[name], shapes[name] = (path, key, piece.get_dtype()), tuple(piece.get_shape())
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        words = [
            f"{len(names)} tensors {how} ({_some(names)})"
            for names, how in ((missing, "missing"), (unexpected, "unexpected"))
            if names
        ]
        raise InputError(
            f"the weights in {files[0].parent} do not fit config.json: {', '.join(words)}; use the files of one "
            "checkpoint"
        )
    for path, key, dtype in found.values():
        if dtype not in SAFETENSORS_DTYPES:
            raise InputError(
                f"{key} in {path.name} is stored as {dtype}; only F32, BF16 and F16 can be read, use another copy"
            )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise InputError(
                f"{name} in {found[name][0].name} has shape {list(shapes[name])} where config.json means "
                f"{list(shape)}; use the files of one checkpoint"
            )
    return found


def _open(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as broken:
        raise InputError(f"{path} is truncated or no safetensors file ({broken}); fetch it again") from broken


def _some(names):
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---------------------------------------------------------------- weights


def empty_model(config):
    """The module tree without memory: every parameter on the meta device."""
    with torch.device("meta"):
        return Llava(config).eval().requires_grad_(False)


# ---------------------------------------------------------------- small things beside the weights


def _with_image_token(config, tokenizer):
    """The tokenizer has the last word on which id `<image>` is."""
    found = tokenizer.added.get("<image>")
    if found is None:
        raise InputError("the tokenizer has no <image> token; use the tokenizer files of a llava-hf checkpoint")
    pieces, rows = len(tokenizer.sp), config.text_config.vocab_size
    if pieces > rows:
        raise InputError(f"the tokenizer has {pieces} pieces and the model {rows}; use the files of one checkpoint")
    return config if found == config.image_token_index else replace(config, image_token_index=found)


def _stop_ids(folder, tokenizer):
    """Ids that end an answer: generation_config.json's, else the tokenizer's end of sequence."""
    path = folder / "generation_config.json"
    with making_sense_of(path):
        eos = (read_json(path) or {}).get("eos_token_id")
        eos = tokenizer.eos_id if eos is None else eos
        eos = tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(isinstance(i, int) for i in eos):
            raise ValueError(f"eos_token_id is {eos}")
        return eos
