"""Converts text to ids and back with Qwen2's byte-level BPE, through the optional package `tokenizers`."""

import json
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path

from .config import InputError, making_sense_of
from .tokenizer import ADVICE, FLAGS, Tokens, added_tokens, check_ids, named_texts, read_files, text_of

# Where Qwen2 cuts text before BPE: contractions, words, single digits, other characters, line breaks, white space
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What transformers makes of the files, whatever they say: the parts of tokenizer.json and the settings that matter
STEPS = {
    "normalizer": [{"type": "NFC"}],
    "pre_tokenizer": [
        {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
    "decoder": [{"type": "ByteLevel"}],
    "model": [{"type": "BPE"}],
}
INNER = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
MODEL_SETTINGS = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip
CONFIG_SETTINGS = (
    "add_prefix_space",
    "split_special_tokens",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)
CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
DEFAULT = "<|endoftext|>"  # eos_token, pad_token and unk_token of transformers' Qwen2Tokenizer

# The character that stands for each byte in a piece: itself if printable, else the next one from U+0100 on (GPT-2)
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = {chr(byte): byte for byte in _PRINTABLE}
BYTES |= {chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))}


class ByteLevelTokenizer(Tokens):
    """Qwen2's tokenizer of a checkpoint folder: tokenizer.json and any of the usual JSON files.

    Used like `tokenizer.Tokenizer`. Ids and texts are those of transformers' AutoTokenizer; InputError for files of
    which it would make something else, for malformed ones, and without the package `tokenizers`.
    """

    kind, strips_first_space, bos_id, add_bos = "byte-level BPE", False, -1, False

    def __init__(self, folder):
        folder = Path(folder)
        config, fast, plain, names = read_files(folder)
        with making_sense_of(f"{folder}/tokenizer_config.json, tokenizer.json or added_tokens.json"):
            _check_steps(config, fast)
            if fast.get("padding") and "pad_token" not in names:  # transformers takes its token for a special one
                raise InputError(f"tokenizer.json sets padding, and no file names a pad_token; {ADVICE}")
            if _class(config).startswith("Qwen2"):
                names = dict.fromkeys(("eos_token", "pad_token", "unk_token"), DEFAULT) | names
            lists = (names.get(key) for key in ("additional_special_tokens", "extra_special_tokens"))
            named = named_texts(names) | {text_of(t) for found in lists if isinstance(found, list) for t in found}
            pieces = fast["model"]["vocab"]
            self.size = len(pieces)
            if set(pieces.values()) != set(range(self.size)):
                raise InputError(f"tokenizer.json has {self.size} pieces, but not with the ids from 0 on; {ADVICE}")
            tokens = sorted(added_tokens(config, fast, plain, named), key=attrgetter("id"))
            check_ids(tokens, self.size, pieces.get, numbered=True)
            _check_added(config, fast, tokens, named)
        self.added = {token.content: token.id for token in tokens}
        self.eos_id = self.added.get(text_of(names.get("eos_token")), -1)
        self._silent = {token.id for token in tokens if token.special}
        listed = {"added_tokens": [asdict(token) for token in tokens]}
        unused = dict.fromkeys(("post_processor", "truncation", "padding"))
        self._backend = _backend(folder, fast | listed | unused)

    def encode(self, text, bos=True, follows=False):
        """List of the token ids of text. Qwen2 has no BOS and no dummy space, so bos and follows change nothing."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def bytes_of(self, token):
        """UTF-8 of a token, perhaps part of a character; empty for special tokens and ids without a token."""
        piece = None if token in self._silent else self._backend.id_to_token(token)
        if piece is None:
            return b""
        return bytes(BYTES[c] for c in piece) if BYTES.keys() >= set(piece) else piece.encode()


def _backend(folder, fast):
    """The `tokenizers.Tokenizer` of the content of a tokenizer.json."""
    try:
        from tokenizers import Tokenizer
    except ImportError as missing:
        raise InputError(f"{folder} has Qwen2's tokenizer, which needs a package; pip install tokenizers") from missing
    try:
        return Tokenizer.from_str(json.dumps(fast))
    except Exception as broken:  # the library raises no other class
        what = " ".join(str(broken).split())[:200]
        raise InputError(f"{folder}/tokenizer.json does not make sense ({what}); fetch the file again") from broken


def _class(config):
    return config.get("tokenizer_class") or CLASSES[0]


def _check_steps(config, fast):
    """InputError unless the files describe Qwen2's steps, which are all that transformers' Qwen2Tokenizer has."""
    for part, wanted in STEPS.items():
        given = fast.get(part) or {}
        steps = given.get(INNER[part], []) if given.get("type") == "Sequence" else [given]
        if len(steps) != len(wanted) or any(
            step.get(key) != value for step, known in zip(steps, wanted, strict=True) for key, value in known.items()
        ):
            raise InputError(
                f"tokenizer.json has another {part} than Qwen2's; without a tokenizer.model only Qwen2's "
                "byte-level BPE is supported"
            )
    asked = [name for name in MODEL_SETTINGS if fast["model"].get(name)]
    asked += [name for name in CONFIG_SETTINGS if config.get(name)]
    if asked:
        raise InputError(f"the tokenizer's files set {asked[0]}, which Qwen2's do not; {ADVICE}")
    if _class(config) not in CLASSES:
        raise InputError(f"tokenizer_class is {_class(config)}, and tokenizer.json is Qwen2's; {ADVICE}")
    rule = fast.get("post_processor") or {"type": "ByteLevel"}
    single = rule.get("single", [{}]) if rule["type"] == "TemplateProcessing" else [{}]
    if rule["type"] != "ByteLevel" and any("Sequence" not in step for step in single):
        raise InputError(f"tokenizer.json adds tokens to a prompt, which Qwen2's does not; {ADVICE}")


def _check_added(config, fast, tokens, named):
    """InputError for added tokens that the classes of transformers read differently.

    With added_tokens_decoder in tokenizer_config.json, its Qwen2Tokenizer ignores those of tokenizer.json. It adds the
    named tokens again, special and without other flags; another class leaves them as they are.
    """

    def flags(entry):  # with transformers' defaults
        return {flag: bool(entry.get(flag, flag == "normalized" and not entry.get("special"))) for flag in FLAGS}

    again = {entry["content"]: entry for entry in (config.get("added_tokens_decoder") or {}).values()}
    first = {entry["content"]: entry for entry in fast.get("added_tokens") or []}
    for text in first if again else ():
        if text not in again or flags(first[text]) != flags(again[text]):
            raise InputError(f"tokenizer.json and tokenizer_config.json disagree on the token {text!r}; {ADVICE}")
    for text in sorted((named | {token.content for token in tokens}) - (first | again).keys()):
        raise InputError(f"the tokenizer's files name a token {text!r} and do not define its flags; {ADVICE}")
    for text in sorted(named):
        if flags((first | again)[text]) != dict.fromkeys(FLAGS, False) | {"special": True}:
            raise InputError(f"the tokenizer's files give the token {text!r} flags that Qwen2's do not; {ADVICE}")
