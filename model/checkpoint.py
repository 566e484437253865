"""Load a model from a folder of safetensors. Nothing is downloaded or unpickled.

Weights are memory-mapped and assigned, tensor by tensor, to modules built on the meta device, so on a CPU a checkpoint
in the requested dtype is not copied. Missing and unexpected names are errors before the first weight is read.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .api import PruneLike, choose_method, off_budget
from .bpe import ByteLevelTokenizer
from .config import InputError, LlavaConfig, making_sense_of, read_config, read_json
from .fast import FastStep, arrange
from .image import ImageSettings, Pictures, frame_settings, image_processor_file, read_image_settings
from .llava import Llava
from .lookahead import FILE, Lookahead, fill_lookahead, open_lookahead
from .share import WHOLE, Whole
from .tokenizer import IMAGE, VIDEO, Tokenizer, find_template, open_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A model with its tokenizer and settings.

    `open_checkpoint` returns it without weights (on the meta device); `read_weights` loads them.
    """

    folder: Path
    config: LlavaConfig
    model: Llava
    keys: dict[str, tuple[Path, str, str]]  # canonical name -> (file, name in the file, stored dtype)
    tokenizer: Tokenizer | ByteLevelTokenizer
    image_settings: ImageSettings
    template: str
    template_note: str  # how the template was found
    stop_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()  # one line each: unused files and settings, and which of two files is used
    lookahead: Lookahead | None = None  # look-ahead rows, if the folder has them
    step: Callable = FastStep  # (language, cache, compile) -> a decode step; or `model.generate.plain_step`
    share: Whole = WHOLE  # what this process has of the language model, see `model.parallel.split`

    @property
    def frame_settings(self) -> ImageSettings:
        """How the frames of a video become pixel values. InputError for settings that are not supported."""
        return frame_settings(self.folder, self.image_settings)

    def __repr__(self) -> str:
        """One line; the fields have thousands of names."""
        count = sum(p.numel() for p in self.model.parameters())
        return f"<Checkpoint {self.folder}: {count:,} parameters in {self.dtype} on {self.device}>"

    @property
    def never_ids(self) -> list[int]:
        """Ids that must not be generated: embedding rows without a token, `<image>`, `<video>` and `<pad>`."""
        size, added = self.config.text_config.vocab_size, self.tokenizer.added
        ids = self.tokenizer.unreachable_ids(size) + [added[t] for t in (IMAGE, VIDEO, "<pad>") if t in added]
        return [i for i in ids if i < size and i not in self.stop_ids]

    def ask(
        self,
        prompt: str,
        images: Pictures = (),
        *,
        frames: Pictures = (),
        prune: PruneLike = None,
        retention: float | None = None,
        keep_tokens: int | None = None,
        settings: dict[str, Any] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        system: str | None = None,
        template: str = "auto",
        image_mode: str = "auto",
    ) -> str:
        """The whole answer.

        prompt: the question; `<image>` in it places the pictures, otherwise they come first.
        images: one picture or a list of them: paths, PIL images, arrays and more, see `model.PictureLike`.
        frames: those of a video, likewise, for LLaVA-OneVision; a single file of several (GIF, TIFF) gives all of them.
            `<video>` in the prompt places them, otherwise they come after the pictures.
        prune: a method of `run.py --list-methods`, a SPEC such as "topk:window=4", "FILE.py::NAME", a function,
            class or instance as in `model.pruning`, or None to keep all tokens.
        retention: fraction of the vision tokens to keep, above 0 and up to 1; or keep_tokens: vision tokens that each
            KV head keeps of each picture. settings: further settings of the method, {name: value}.
        max_new_tokens, temperature, top_p, top_k, seed, stop: see `model.Sampling`; the default is greedy.
        system: system text, None for the template's; template: "auto", "llava", "vicuna", "llava_v1", "mistral",
            "onevision", "chatml" or "raw"; image_mode: "auto", "pad", "crop", "squash" or "anyres".

        InputError, a ValueError with a one-line message, for invalid input, before computing starts. RuntimeError if
        the model produces NaN or memory runs out.
        """
        return "".join(
            self.stream(
                prompt, images, frames=frames, prune=prune, retention=retention, keep_tokens=keep_tokens,
                settings=settings, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                seed=seed, stop=stop, system=system, template=template, image_mode=image_mode,
            )
        )  # fmt: skip

    def stream(
        self,
        prompt: str,
        images: Pictures = (),
        *,
        frames: Pictures = (),
        prune: PruneLike = None,
        retention: float | None = None,
        keep_tokens: int | None = None,
        settings: dict[str, Any] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        system: str | None = None,
        template: str = "auto",
        image_mode: str = "auto",
    ) -> Iterator[str]:
        """Yields the answer in pieces as it is generated. Arguments and errors as in `ask`; InputError at the call."""
        from .generate import Generation  # imports this module
        from .sampling import Sampling

        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, stop)
        method = choose_method(prune, self.folder, retention, keep_tokens, settings or {})
        generation = Generation(self, prompt, images, sampling, template, image_mode, system, method, frames=frames)
        for note in generation.notes:
            _warn(note)

        def pieces():
            yield from generation
            off = off_budget(generation.prune, generation.retention, generation.wanted)
            if off and generation.vision_tokens:
                _warn(off)

        return pieces()

    def ask_many(
        self,
        questions: Sequence[str | tuple[str, Pictures] | tuple[str, Pictures, Pictures]],
        *,
        batch: int = 8,
        prune: PruneLike = None,
        retention: float | None = None,
        keep_tokens: int | None = None,
        settings: dict[str, Any] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        system: str | None = None,
        template: str = "auto",
        image_mode: str = "auto",
    ) -> list[str | Exception]:
        """The answers to several questions, in their order; `batch` of them (1 or more) are decoded together.

        questions: prompts, pairs (prompt, images) or triples (prompt, images, frames). The other arguments are as in
            `ask` and apply to all questions.

        A question that cannot be answered does not stop the others: its place in the list holds the InputError, or the
        RuntimeError if the model produced NaN. Errors in other arguments and lack of memory are raised.
        """
        from .batch import answer_together
        from .generate import Generation
        from .sampling import Sampling

        if not isinstance(questions, list | tuple):
            raise InputError(f"questions is {str(questions)[:80]!r}; give a list of strings or pairs (text, pictures)")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise InputError(f"batch is {batch!r}; give a whole number of 1 or more")
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, stop)
        method = choose_method(prune, self.folder, retention, keep_tokens, settings or {})
        how = sampling, template, image_mode, system, method
        Generation(self, "?", (), *how)  # invalid arguments would fail for every question

        def begin(question):
            parts = (question, ()) if isinstance(question, str) else question
            if isinstance(question, str) and os.path.isfile(question):
                raise InputError(f"the question {question[:80]!r} is a file; give a list of pairs (text, pictures)")
            if not isinstance(parts, tuple | list) or len(parts) not in (2, 3):
                raise InputError(
                    f"a question is {str(question)[:80]!r}; give a text or a pair (text, pictures), or a triple "
                    "(text, pictures, frames)"
                )
            text, images, *frames = parts
            return Generation(self, text, images, *how, frames=frames[0] if frames else ())

        return answer_together(begin, questions, batch)

    @property
    def device(self) -> torch.device:
        """Of the weights; meta before `read_weights`."""
        return self.model.language_model.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, after `read_weights`."""
        return self.model.language_model.model.norm.weight.dtype

    def choose_dtype(self, name: str | torch.dtype, device: str | torch.device) -> torch.dtype:
        """The torch dtype that `read_weights` would use. InputError for names that are not supported."""
        name, names = str(name).removeprefix("torch.").lower(), {**DTYPES, **FILE_DTYPES, "half": torch.float16}
        if name in names:
            return names[name]
        if name != "auto":
            raise InputError(f"dtype {name} cannot be used; use auto, fp32, bf16 or fp16")
        if torch.device(device).type != "cpu":
            stored = min(dtype for _, _, dtype in self.keys.values())
            return FILE_DTYPES.get(self.config.dtype, SAFETENSORS_DTYPES[stored])
        parameters = sum(self.share.size(name, p) for name, p in self.model.named_parameters())
        # os.sysconf does not exist on Windows: assume 16 GB
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 16e9
        return torch.float32 if 4 * parameters <= memory / 2 else torch.bfloat16

    def read_weights(self, dtype: str | torch.dtype = "auto", device: str | int | torch.device = "cpu") -> "Checkpoint":
        """Load the weights: mapped from the files, cast and moved one tensor at a time. Returns self.

        dtype: "auto" | "bf16" | "fp16" | "fp32", torch's names ("float16") or torch's own (torch.float16). auto is the
        file's own dtype on CUDA; on a CPU fp32 if that fits in half of the memory, else bf16. device: see
        `choose_device`. InputError for these, or if the look-ahead rows belong to other weights.
        """
        device = choose_device(device)
        dtype = self.choose_dtype(dtype, device)
        weights = {}
        for path in sorted({path for path, _, _ in self.keys.values()}):
            with _open(path) as file:
                for name, (place, key, _) in self.keys.items():
                    if place == path:
                        weights[name] = self.share.read(name, file, key, device=device, dtype=dtype)
        self.model.load_state_dict(weights, strict=True, assign=True)
        del weights  # `arrange` copies layer by layer; no other reference may keep the old weights alive
        mapped = device.type == "cpu" and dtype in {SAFETENSORS_DTYPES[stored] for _, _, stored in self.keys.values()}
        if not mapped:  # a copy of mapped weights would use additional memory
            arrange(self.model.language_model)
        self.model.requires_grad_(False)
        if self.lookahead is not None:
            fill_lookahead(self.lookahead, self.folder / FILE, self.model.language_model, self.share)
        return self


def _warn(note):
    """Warn, naming the line outside this file that is running."""
    frame, level = sys._getframe(), 1
    while frame.f_code.co_filename == __file__:
        frame, level = frame.f_back, level + 1
    warnings.warn(note, stacklevel=level)


def load(name: str | Path, dtype: str | torch.dtype = "auto", device: str | int | torch.device = "cpu") -> Checkpoint:
    """A Checkpoint with its weights, from a folder or from an id in the local Hugging Face cache.

    dtype and device: as in `Checkpoint.read_weights`. InputError for anything that cannot be used.
    """
    device = choose_device(device)  # before anything is read
    return open_checkpoint(name).read_weights(dtype, device)


def choose_device(name: str | int | torch.device) -> torch.device:
    """The torch.device for "auto", "cpu", "cuda", "cuda:1", a CUDA index or a torch.device.

    InputError if the device is unknown or not available.
    """
    if isinstance(name, str) and name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name} is unknown or not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device {name} is not available ({torch.cuda.device_count()} CUDA devices here); use cpu")
    return device


def open_checkpoint(name: str | Path) -> Checkpoint:
    """A Checkpoint without its weights. Config, tokenizer and all tensors' names, shapes and dtypes are checked here,
    from headers and small files only. InputError if anything is missing, unexpected or not supported.
    """
    folder = find_folder(name)
    config = read_config(folder)
    tokenizer = open_tokenizer(folder)
    config = _with_image_token(config, tokenizer)
    files = weight_files(folder)
    stored = stored_tensors(files)
    _refuse_quantised(stored)
    config, stored, notes = settle_head(config, stored)
    model = empty_model(config)
    keys = match_keys(folder, stored, model)
    template, note = find_template(folder, config)
    settings = read_image_settings(folder, config)
    if any("mm_projector." in key for _, key, _ in keys.values()):  # names of the original code
        settings = replace(settings, order="orig")
    lookahead = open_lookahead(folder / FILE, model.language_model) if (folder / FILE).is_file() else None
    stop_ids, ignored = read_generation_settings(folder, tokenizer, config.text_config.vocab_size)
    notes = (*_notes_on_files(folder), *notes, *ignored)
    return Checkpoint(
        folder, config, model, keys, tokenizer, settings, template, note, stop_ids, notes, lookahead
    )  # fmt: skip


# ---------------------------------------------------------------- finding files


def find_folder(name):
    """The folder of a checkpoint, given as a path or as `org/name` in the local Hugging Face cache; or InputError."""
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        if folder.is_file():
            raise InputError(f"{str(name)[:200]} is a file; give the folder that holds it")
    except (OSError, RuntimeError, TypeError) as broken:  # a name too long for a path; ~nobody; None
        raise InputError(
            f"{str(name)[:80]} is not a path ({broken}); give the folder of a llava-hf checkpoint"
        ) from broken
    cached = _hub_cache() / ("models--" + str(name).replace("/", "--"))
    revision = cached / "refs" / "main"
    is_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name))
    if is_id and revision.is_file():
        snapshot = cached / "snapshots" / revision.read_text().strip()
        if snapshot.is_dir():
            return snapshot
    raise InputError(
        f"no folder {name}, and no snapshot in the local cache ({cached}); nothing is downloaded here: give the folder "
        f"of a llava-hf checkpoint, or fetch one with `hf download {name if is_id else 'llava-hf/llava-1.5-7b-hf'}`"
    )


def _hub_cache():
    """The folder in which Hugging Face tools keep snapshots, by their order of precedence."""
    env = os.environ
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub").expanduser()


WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder):
    """The weight files of a folder: model.safetensors, else those in the index, else all *.safetensors except adapters
    and look-ahead rows. InputError if there are none or some are missing."""
    folder = Path(folder)
    if (folder / WHOLE).is_file():  # as in transformers, an index next to it is ignored
        return [folder / WHOLE]
    names = _indexed_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} weight files are missing in {folder} ({_some(missing)}); fetch them"
        )
    files = [folder / name for name in names] or sorted(
        file for file in folder.glob("*.safetensors") if file.name != FILE and not file.name.startswith("adapter_")
    )
    if not files:
        held = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        raise InputError(
            f"{folder} has no *.safetensors with a whole model, only {_some(held) or 'other files'}; use a llava-hf "
            "checkpoint (an adapter must be merged into its model, and pickled weights can run code when loaded)"
        )
    return files


def _indexed_names(folder):
    """Names of the files in the index of a folder, sorted; none without an index."""
    index = read_json(folder / INDEX)
    if index is None:
        return []
    with making_sense_of(folder / INDEX):
        names = sorted(set(index["weight_map"].values()))
    if not names:
        raise InputError(f"{folder}/{INDEX} lists no files; fetch it again")
    for name in names:
        # a name with a path in it could reach any file of this machine
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"the index of {folder} points outside the folder ({name}); do not use this checkpoint")
    return names


def _notes_on_files(folder):
    """Notes on files and settings of the folder that are not used, one line each."""
    notes = []
    if (folder / WHOLE).is_file() and (folder / INDEX).is_file():
        named = None
        with suppress(InputError):  # a broken index
            named = _indexed_names(folder)
        if named != [WHOLE]:
            notes.append(f"{WHOLE} is read; {INDEX} and its files are not")
    if (folder / "adapter_config.json").is_file():
        notes.append("adapter_config.json: the adapter is not applied; merge it into the weights to use it")
    path, nested = image_processor_file(folder)
    old = read_json(folder / "preprocessor_config.json") or {}
    differ = [k for k in nested if k in old and old[k] != nested[k] and k != "image_processor_type"]
    if differ:
        notes.append(f"preprocessor_config.json and {path.name} differ in {_some(differ)}; the latter is used")
    return notes


# ---------------------------------------------------------------- names

# constants that old files store, and SigLIP's pooling head, which LLaVA does not use
DROPPED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$|vision_tower\.(vision_model\.)?head\.")
RENAMED = (  # (pattern, replacement), applied in this order
    (r"^model\.(?=(language_model|vision_tower|multi_modal_projector|mm_projector)\.|image_newline)", ""),
    (r"^language_model\.(?!(model|lm_head)\.)", "language_model.model."),
    (r"^(?=lm_head\.|model\.(embed_tokens|layers|norm)\.)", "language_model."),
    (r"^vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower.vision_model."),
    (r"^mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^mm_projector\.2\.", "multi_modal_projector.linear_2."),
)


def canonical_key(key):
    """A tensor's name in this project, which is its name in the published llava-hf files; None for dropped ones.

    Five naming schemes are in use: the published one, the in-memory ones of transformers 4.52 to 4.57 and of 5 (both
    start with `model.`, the latter without `vision_model.`), that of transformers 5's files, and the original code's.
    """
    if DROPPED.search(key):
        return None
    for pattern, replacement in RENAMED:
        key = re.sub(pattern, replacement, key)
    return key


HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def stored_tensors(files):
    """{canonical name: (file, name in the file, dtype, shape)} from headers only. InputError if one is stored twice."""
    found = {}
    for path in files:
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118 (the handle is not a dict)
                name = canonical_key(key)
                if name is None:
                    continue
                if name in found:
                    raise InputError(
                        f"{path.parent} stores {name} twice ({found[name][0].name} and {path.name}); keep one"
                    )
                piece = file.get_slice(key)
                found[name] = path, key, piece.get_dtype(), tuple(piece.get_shape())
    return found


def settle_head(config, stored):
    """(config, stored, notes) in which `tie_word_embeddings` matches the stored tensors, as in transformers.

    If the config ties the output head to the embedding but the file stores a head too, the two are compared; a
    different head is used untied. The file may store either tensor of a tied pair.
    """
    if not config.tie_word_embeddings or HEAD not in stored:
        return config, stored, ()
    rest = {name: where for name, where in stored.items() if name != HEAD}
    if EMBEDDING not in stored:
        return config, rest | {EMBEDDING: stored[HEAD]}, ()
    if _same_values(stored[HEAD], stored[EMBEDDING]):
        return config, rest, ()
    note = "config.json ties the head to the embedding, but the file holds another head, which is used"
    return replace(config, tie_word_embeddings=False), stored, (note,)


def _same_values(*stored):
    """True if two stored tensors hold the same numbers."""
    if stored[0][3] != stored[1][3]:
        return False
    tensors = []
    for path, key, _, _ in stored:
        with _open(path) as file:
            tensors.append(file.get_tensor(key))
    dtype = torch.promote_types(*(t.dtype for t in tensors))
    return torch.equal(*(t.to(dtype) for t in tensors))


def match_keys(folder, stored, model):
    """{canonical name: (file, name in the file, dtype)}, from headers. InputError unless all names and shapes match."""
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    missing, unexpected = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unexpected:
        lists = ("missing", missing), ("unexpected", unexpected)
        words = ", ".join(f"{len(names)} tensors {how} ({_some(names)})" for how, names in lists if names)
        raise InputError(f"the weights in {folder} do not fit config.json: {words}; use the files of one checkpoint")
    for name, (path, key, dtype, found) in stored.items():
        if dtype not in SAFETENSORS_DTYPES:
            raise InputError(
                f"{key} in {path.name} is stored as {dtype}; only F32, BF16 and F16 can be read, use another copy"
            )
        if found != wanted[name]:
            raise InputError(
                f"{name} in {path.name} has shape {list(found)}, but config.json implies {list(wanted[name])}; "
                "use the files of one checkpoint"
            )
    return {name: (path, key, dtype) for name, (path, key, dtype, _) in stored.items()}


# Ends of the names of tensors that quantising tools write (AWQ, GPTQ, bitsandbytes, compressed-tensors, FP8, MLX, HQQ)
QUANTISED = (
    ".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".bitsandbytes__nf4", ".bitsandbytes__fp4", ".SCB",
    ".weight_format", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".input_scale", ".scales", ".W_q",
)  # fmt: skip


def _refuse_quantised(stored):
    """InputError if weights are quantised: stored with a tool's scales, or in 8 bits or less."""
    for name, (path, key, dtype, _) in stored.items():
        if name.endswith(QUANTISED) or dtype.startswith(("I8", "U8", "F8", "F6_", "F4")):
            raise InputError(
                f"the weights are quantised ({path.name} holds {key}, stored as {dtype}); "
                "use an unquantised copy in F32, BF16 or F16"
            )


def _open(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as broken:
        raise InputError(f"{path} cannot be read as a safetensors file ({broken}); fetch it again") from broken


def _some(names):
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def empty_model(config):
    """The module tree without weights: every parameter is on the meta device."""
    with torch.device("meta"):
        return Llava(config).eval().requires_grad_(False)


# ---------------------------------------------------------------- other files of the folder


def _with_image_token(config, tokenizer):
    """config with the tokenizer's ids of `<image>` and `<video>`. InputError if it does not fit the embedding."""
    found = tokenizer.added.get("<image>")
    if found is None:
        raise InputError("the tokenizer has no <image> token; use the tokenizer files of a llava-hf checkpoint")
    pieces, rows = tokenizer.size, config.text_config.vocab_size
    beyond = [f"{text!r} {i}" for text, i in tokenizer.added.items() if i >= rows]
    if pieces > rows or beyond:
        what = f"{pieces} pieces and the model {rows}" if pieces > rows else f"{_some(beyond)} beyond the {rows} rows"
        raise InputError(f"the tokenizer has {what} of the embedding; use the files of one checkpoint")
    video = tokenizer.added.get("<video>") if config.max_tiles else None
    return replace(config, image_token_index=found, video_token_index=video)


# Settings of transformers' `generate` and the values, besides null, that have no effect; then those for sampling only
GENERATION = {
    "do_sample": False, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "force_words_ids": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None,
    "exponential_decay_length_penalty": None, "guidance_scale": 1.0, "num_beams": 1, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "length_penalty": 1.0, "early_stopping": False, "penalty_alpha": 0, "min_length": 0,
    "min_new_tokens": 0, "max_length": 20, "max_new_tokens": None, "max_time": None, "num_return_sequences": 1,
    "stop_strings": None, "renormalize_logits": False, "remove_invalid_values": False, "watermarking_config": None,
    "dola_layers": None, "token_healing": False, "constraints": None,
}  # fmt: skip
SAMPLING = {
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}  # fmt: skip


def read_generation_settings(folder, tokenizer, vocabulary):
    """(stop ids, notes): the ids that end an answer, and one line about settings that are not supported.

    vocabulary: rows of the embedding. InputError for stop ids outside them, which would never end an answer.

    They come from generation_config.json or, without it, from config.json and then its text_config, as in transformers;
    if none has eos_token_id, the tokenizer's end-of-sequence token ends an answer.
    """
    path = folder / "generation_config.json"
    raw = read_json(path)
    if raw is None:
        path = folder / "config.json"
        top = read_json(path)
        raw = {**(top.get("text_config") or {}), **{key: value for key, value in top.items() if value is not None}}
    eos = raw.get("eos_token_id")
    eos = tokenizer.eos_id if eos is None else eos
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    if not eos or not all(type(i) is int and 0 <= i < vocabulary for i in eos):
        raise InputError(
            f"{path} has eos_token_id {list(eos)}, not ids from 0 to {vocabulary - 1}; take the original file"
        )
    neutral = GENERATION | (SAMPLING if raw.get("do_sample") else {})
    asked = [f"{name} {raw[name]}" for name in neutral if raw.get(name) not in (None, [], neutral[name])]
    if not asked:
        return eos, ()
    return eos, (f"{path.name} asks for {_some(asked)}, which is ignored; see --temperature and the flags next to it",)
