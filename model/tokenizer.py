"""Text to ids and back: a sentencepiece model plus added tokens, and the prompt templates of the LLaVA families."""

import codecs
import re
from pathlib import Path

import sentencepiece

from .config import InputError, making_sense_of, read_json

SPACE = "\u2581"  # sentencepiece's visible space


class Tokenizer:
    """Llama tokenizer of a checkpoint folder (tokenizer.model and whichever JSON files lie beside it).

    Added tokens such as `<image>` are cut out of the text first; sentencepiece sees the segments between them. Whether
    each segment or only the first gets sentencepiece's dummy space is decided from the files, because published LLaVA
    checkpoints differ in exactly that.
    """

    def __init__(self, folder):
        folder = Path(folder)
        path = folder / "tokenizer.model"
        if not path.is_file():
            raise InputError(f"{folder} has no tokenizer.model; only sentencepiece tokenizers can be read")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as broken:
            raise InputError(f"{path} is not a sentencepiece model; fetch the file again") from broken
        config, fast, plain = (
            read_json(folder / name) or {} for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json")
        )
        with making_sense_of(f"{folder}/tokenizer_config.json, tokenizer.json or added_tokens.json"):
            self.added = _added_tokens(config, fast, plain)  # text -> id
            self.prefix_every_segment, self.prefix_spares_spaces = _prefix_rule(config, fast)
        self.bos_id, self.eos_id = self.sp.bos_id(), self.sp.eos_id()
        self.add_bos = config.get("add_bos_token") is not False and self.bos_id >= 0
        control = [i for i in range(len(self.sp)) if self.sp.is_control(i) or self.sp.is_unknown(i)]
        self.added = {**{self.sp.id_to_piece(i): i for i in control}, **self.added}
        # longest first, so that no token hides a longer one that starts with it
        texts = sorted(self.added, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        self._silent = set(self.added.values())
        self._newline = self.sp.encode("\n")

    def encode(self, text, bos=True):
        """Token ids of text; BOS in front if asked for and if the checkpoint uses one."""
        ids = [self.bos_id] if bos and self.add_bos else []
        start = 0
        for match in self._cut.finditer(text):
            ids += self._segment(text[start : match.start()], start)
            ids.append(self.added[match.group()])
            start = match.end()
        return ids + self._segment(text[start:], start)

    def _segment(self, text, start):
        if not text:
            return []
        wanted = self.prefix_every_segment or start == 0
        if wanted and not (self.prefix_spares_spaces and text.startswith((" ", SPACE))):
            return self.sp.encode(text)
        # without the dummy space: encode behind a newline, then drop what the newline became
        return self.sp.encode("\n" + text)[len(self._newline) :]

    def decode(self, ids):
        """Text of ids; added and control tokens leave no trace, one leading space is dropped."""
        stream = Detokenizer(self)
        return "".join([*map(stream.push, ids), stream.flush()])

    def unreachable_ids(self, vocab_size):
        """Ids below vocab_size that a model must never say: padding rows of the embedding that stand for nothing."""
        return [i for i in range(len(self.sp), vocab_size) if i not in self._silent]


class Detokenizer:
    """Ids one at a time -> text as soon as it is certain.

    Byte pieces are held back until they are whole UTF-8 characters; what can never become one turns into U+FFFD.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True

    def push(self, token):
        """Text that one more id makes certain; empty for added and control tokens."""
        sp = self.tokenizer.sp
        if token in self.tokenizer._silent or not 0 <= token < len(sp):
            return ""
        piece = sp.id_to_piece(token)
        # a byte piece is spelled "<0xE2>"
        data = bytes([int(piece[3:-1], 16)]) if sp.is_byte(token) else piece.replace(SPACE, " ").encode()
        if self._at_start:
            data, self._at_start = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self):
        """What is left of an incomplete character."""
        return self._utf8.decode(b"", final=True)


def _added_tokens(config, fast, plain):
    """Added tokens {text: id} from the three places where checkpoints keep them."""
    added = {text: int(i) for text, i in plain.items()}  # added_tokens.json
    added.update({entry["content"]: int(i) for i, entry in (config.get("added_tokens_decoder") or {}).items()})
    added.update({entry["content"]: int(entry["id"]) for entry in fast.get("added_tokens") or []})
    return {text: i for text, i in added.items() if text}


def _prefix_rule(config, fast):
    """(every, spares): how sentencepiece's dummy space is put before a segment.

    every: before each segment, not only at the start of the text. spares: not where the segment has a space already.
    The fast tokenizer's file decides if there is one (a `Prepend` normalizer, or a `Metaspace` pre-tokenizer with its
    scheme), else the `legacy` flag, whose absence means true.
    """
    normalizer, pre = fast.get("normalizer") or {}, fast.get("pre_tokenizer") or {}
    for part in (normalizer, *(normalizer.get("normalizers") or [])):
        if part.get("type") == "Prepend":
            return True, False
    for part in (pre, *(pre.get("pretokenizers") or [])):
        if part.get("type") == "Metaspace":
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            if scheme not in ("always", "first"):
                raise InputError(f"tokenizer.json asks for prepend_scheme {scheme!r}; only always and first are known")
            return scheme == "always", True
    return config.get("legacy") is not False, False


# ---------------------------------------------------------------- templates

IMAGE = "<image>"
_ASSISTANT_TEXT = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {whose} questions."
)

# What stands before the first turn; these three go on with the same words. The space before ASSISTANT and none
# behind the colon change greedy output.
SYSTEM_TEXT = {
    "llava": "",  # the llava-hf 1.5 conversions
    "vicuna": _ASSISTANT_TEXT.format(who="user", whose="user's"),  # LLaVA's evaluation scripts (vicuna_v1)
    "llava_v1": _ASSISTANT_TEXT.format(who="human", whose="human's"),  # LLaVA's command line
}
TEMPLATES = (*SYSTEM_TEXT, "mistral", "raw")


def build_prompt(question, images, template, system=None):
    """The text to encode: question in its template, one `<image>` for each of `images` pictures.

    Without `<image>` in the question all pictures come first, one `<image>` and newline each; with it the number must
    match. template "raw" takes the question verbatim.
    """
    found = question.count(IMAGE)
    if IMAGE in (system or ""):
        raise InputError(f"the system text has {IMAGE} in it; place pictures in the prompt")
    if found and found != images:
        raise InputError(
            f"the prompt has {found} {IMAGE} for {images} --image; "
            f"give one picture for each, or leave {IMAGE} out of the prompt"
        )
    if not found:
        question = (IMAGE + "\n") * images + question
    if template == "raw":
        return question
    if template == "mistral":  # it has no place of its own for a system text
        return f"[INST] {system + ' ' if system else ''}{question} [/INST]"
    system = SYSTEM_TEXT[template] if system is None else system
    return f"{system + ' ' if system else ''}USER: {question} ASSISTANT:"


def find_template(folder, config):
    """(template, note): the family of the checkpoint's own chat template; the note says how it was found.

    Chat templates are programs from files one need not trust: they are recognised, never run. Without one, config (a
    LlavaConfig) tells the family.
    """
    text = _chat_template(Path(folder))
    fallback = "llava"  # LLaVA-1.5
    if config.text_config.model_type == "mistral":
        fallback = "mistral"
    elif config.image_grid_pinpoints:  # LLaVA-NeXT with Vicuna
        fallback = "llava_v1"
    if text is None:
        return fallback, "no chat template in the folder"
    if "[INST]" in text:
        return "mistral", "from the chat template"
    if "curious human" in text:
        return "llava_v1", "from the chat template"
    if "curious user" in text:
        return "vicuna", "from the chat template"
    if "ASSISTANT:" in text:
        return "llava", "from the chat template"
    return fallback, "chat template not recognised"


def _chat_template(folder):
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if name.endswith(".jinja"):
            if (folder / name).is_file():
                return (folder / name).read_text(encoding="utf-8", errors="replace")
        else:
            text = (read_json(folder / name) or {}).get("chat_template")
            if text:
                return text if isinstance(text, str) else str(text)
    return None
