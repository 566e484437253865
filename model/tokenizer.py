"""Converts text to ids and back (sentencepiece with added tokens; others: bpe.py); templates of the LLaVA families."""

import codecs
import hashlib
import re
import unicodedata
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import sentencepiece

from .config import InputError, making_sense_of, read_json

SPACE = "\u2581"  # sentencepiece's visible space


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before sentencepiece encodes the rest, and its flags in the checkpoint."""

    content: str
    id: int
    special: bool = False  # decodes to no text
    lstrip: bool = False  # includes the white space before it
    rstrip: bool = False  # includes the white space after it
    single_word: bool = False  # does not match inside a word
    normalized: bool = False  # is matched after the others, in the normalised text


FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


class Tokens:
    """What both tokenizers do with ids. A subclass has `added` {text: id}, `size` and `bytes_of(token)`."""

    def decode(self, ids):
        """Text of ids, without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self):
        """A streaming decoder with `push` and `flush`."""
        return Detokenizer(self)

    def unreachable_ids(self, vocab_size):
        """Ids below vocab_size that must never be sampled: padding rows of the embedding, without a token."""
        known = set(self.added.values())
        return [i for i in range(self.size, vocab_size) if i not in known]


class Tokenizer(Tokens):
    """Llama tokenizer of a checkpoint folder (tokenizer.model and any of the usual JSON files).

    Added tokens such as `<image>` are cut out of the text first; sentencepiece encodes the segments between them. The
    files decide whether each segment or only the first gets sentencepiece's dummy space, because published LLaVA
    checkpoints differ in that. If the files disagree, the result is that of transformers' AutoProcessor. InputError for
    files that are missing, malformed or not supported.
    """

    kind = "sentencepiece"

    def __init__(self, folder):
        folder = Path(folder)
        path = folder / "tokenizer.model"
        if not path.is_file():
            raise InputError(
                f"{folder} has no tokenizer.model, nor a tokenizer.json of Qwen2; add the checkpoint's tokenizer files"
            )
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as broken:
            raise InputError(f"{path} is not a sentencepiece model; fetch the file again") from broken
        self.size = len(self.sp)
        config, fast, plain, names = read_files(folder)
        with making_sense_of(f"{folder}/tokenizer_config.json, tokenizer.json or added_tokens.json"):
            tokens = added_tokens(config, fast, plain, named_texts(names))
            check_ids(tokens, self.size, self._piece_id, numbered=bool(fast))
            _check_pieces(fast, self.sp)
            self._prepends, self.prefix_every_segment, self.prefix_spares_spaces = _prefix_rule(config, fast)
            if self._prepends:
                _check_normalized(config, fast, self.size)
            self.strips_first_space = _strips_first_space(fast)
            control = [i for i in range(self.size) if self.sp.is_control(i) or self.sp.is_unknown(i)]
            found = {t.content: t for t in tokens}
            for i in control:
                text = self.sp.id_to_piece(i)
                found[text] = replace(found.get(text, AddedToken(text, i)), special=True)
            self.added = {text: token.id for text, token in found.items()}
            self.eos_id = self._named_id(names, "eos_token", self.sp.eos_id())
            self.bos_id, self.add_bos = _bos_rule(config, fast, self._named_id(names, "bos_token", self.sp.bos_id()))
        self._first = _Finder({text: token for text, token in found.items() if not token.normalized})
        self._second = _Finder({self._normal(text): token for text, token in found.items() if token.normalized})
        # with a `Prepend` normalizer, transformers decodes normalised tokens, special ones too, to their text
        self._spoken = {
            t.id: self._normal(t.content) if t.normalized else t.content
            for t in found.values()
            if t.id not in control and (not t.special or self._prepends and t.normalized)
        }
        self._silent = set(self.added.values()) - self._spoken.keys()
        self._newline = self.sp.encode("\n")

    def _named_id(self, names, name, default):
        """Id of a named token such as "bos_token": default if the files do not name it, -1 if they set it to null."""
        text = text_of(names.get(name))
        return default if name not in names else self.added.get(text, self.sp.piece_to_id(text) if text else -1)

    def _piece_id(self, text):
        """Id of the sentencepiece piece of this text; None if there is none."""
        piece = self.sp.piece_to_id(text)
        return piece if self.sp.id_to_piece(piece) == text else None

    def encode(self, text, bos=True, follows=False):
        """List of the token ids of text; BOS first if bos is True and the checkpoint uses one.

        follows: the text continues other text, so it gets neither BOS nor a dummy space.
        """
        ids = [self.bos_id] if bos and self.add_bos and not follows else []
        for start, part in self._first.cut(text):
            ids += [part.id] if isinstance(part, AddedToken) else self._segment(part, start, follows and start == 0)
        return ids

    def _segment(self, text, start, follows):
        """Ids of the text between two added tokens; start: its offset in the whole text."""
        ids, normal = [], self._normal(text)
        for begin, part in self._second.cut(normal.removeprefix(SPACE) if follows and self._prepends else normal):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            elif self._prepends or follows and begin == 0:  # the text already has its dummy space, or gets none
                ids += self._bare(part)
            else:
                ids += self._prefixed(part, start + begin)
        return ids

    def _normal(self, text):
        """The text after the `Prepend` normalizer, if there is one."""
        return SPACE + text.replace(" ", SPACE) if self._prepends else text

    def _prefixed(self, text, start):
        wanted = self.prefix_every_segment or start == 0
        if wanted and not (self.prefix_spares_spaces and text.startswith((" ", SPACE))):
            return self.sp.encode(text)
        return self._bare(text)

    def _bare(self, text):
        """Ids without a dummy space: encode a newline and the text, then drop the newline's ids."""
        return self.sp.encode("\n" + text)[len(self._newline) :]

    def bytes_of(self, token):
        """UTF-8 of a token, perhaps part of a character; empty for special and control tokens and unknown ids."""
        if token in self._silent or not (0 <= token < self.size or token in self._spoken):
            return b""
        if token < self.size and self.sp.is_byte(token):
            return bytes([int(self.sp.id_to_piece(token)[3:-1], 16)])  # spelled "<0xE2>"
        piece = self._spoken[token] if token in self._spoken else self.sp.id_to_piece(token)
        return piece.replace(SPACE, " ").encode()


def open_tokenizer(folder):
    """The tokenizer of a checkpoint folder: sentencepiece if it has a tokenizer.model, else Qwen2's tokenizer.json.

    The latter needs the package `tokenizers`. InputError as for the two classes.
    """
    from .bpe import ByteLevelTokenizer  # imports this module

    folder = Path(folder)
    if (folder / "tokenizer.model").is_file() or not (folder / "tokenizer.json").is_file():
        return Tokenizer(folder)
    return ByteLevelTokenizer(folder)


WHITE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")  # as in Unicode


class _Finder:
    """Finds added tokens in a text as the `tokenizers` library does."""

    def __init__(self, tokens):
        """tokens: {text to match: AddedToken}."""
        self.tokens = tokens
        # longest first, so that no token hides a longer one that starts with it
        longest = sorted(tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest)) or r"(?!)")

    def cut(self, text):
        """Yield (start, str or AddedToken) for each part of the text, in order."""
        done = 0
        for match in self.pattern.finditer(text):
            token, (start, stop) = self.tokens[match.group()], match.span()
            if token.single_word and (_in_word(text[start - 1 : start]) or _in_word(text[stop : stop + 1])):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip(WHITE)))
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip(WHITE))
            if done < start:
                yield done, text[done:start]
            if start < stop:  # False if this token is white space that the previous token already includes
                yield start, token
            done = stop
        if done < len(text):
            yield done, text[done:]


def _in_word(character):
    """True if it is a word character in Unicode: a letter, mark, digit or connector."""
    return bool(character) and (
        unicodedata.category(character) in ("Nd", "Nl", "Pc")
        or unicodedata.category(character)[0] in "LM"
        or character in "\u200c\u200d"
    )


class Detokenizer:
    """Streaming decoder: takes ids one at a time, returns text as soon as later ids cannot change it.

    Bytes are held back until they form whole UTF-8 characters; invalid ones become U+FFFD.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True

    def push(self, token):
        """The text that can be shown after one more id; empty for special and control tokens."""
        data = self.tokenizer.bytes_of(token)
        if not data:
            return ""
        if self._at_start and self.tokenizer.strips_first_space:
            data, self._at_start = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self):
        """The replacement for an incomplete character at the end, if any."""
        return self._utf8.decode(b"", final=True)


# ---------------------------------------------------------------- the checkpoint's files

ADVICE = "use the tokenizer files of one checkpoint"


def read_files(folder):
    """Contents of tokenizer_config.json, tokenizer.json and added_tokens.json, and of the settings that name tokens."""
    config, fast, plain, names = (
        read_json(folder / name) or {}
        for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json", "special_tokens_map.json")
    )
    if config.get("added_tokens_decoder"):  # it overrides these two files
        plain, names = {}, {}
    return config, fast, plain, config | names


def text_of(entry):
    """The text of a token given as a string or as a dict; None if there is none."""
    return entry.get("content") if isinstance(entry, dict) else entry


def named_texts(names):
    """Texts of the named tokens: "bos_token", "image_token", ..."""
    named = {key: value for key, value in names.items() if key.endswith("_token") and not isinstance(value, bool)}
    extra = names.get("extra_special_tokens")
    return {text_of(v) for v in (*named.values(), *(extra.values() if isinstance(extra, dict) else ()))} - {None}


def added_tokens(config, fast, plain, named):
    """The added tokens, one AddedToken per (text, id).

    As in transformers, flags in tokenizer_config.json override those in tokenizer.json; a token is special if either
    file says so. added_tokens.json has only texts and ids.
    """
    again = config.get("added_tokens_decoder") or {}
    files = (  # entries, and the texts that are special whatever their flag
        ([{"content": text, "id": i, "special": text in named} for text, i in plain.items()], named),
        (fast.get("added_tokens") or [], () if again else named),
        ([entry | {"id": i} for i, entry in again.items()], named),
    )
    found = {}
    for entries, always in files:
        for entry in entries:
            key = text, i = entry["content"], int(entry["id"])
            special = bool(entry.get("special") or text in always or (key in found and found[key].special))
            given = {flag: bool(entry[flag]) for flag in FLAGS if flag in entry}
            flags = {"normalized": not entry.get("special"), **given, "special": special}  # as transformers' defaults
            found[key] = AddedToken(text, i, **flags)
    return [token for token in found.values() if token.content]


def _check_normalized(config, fast, pieces):
    """InputError if the files disagree on `normalized` of an added token that can occur in an answer.

    With a `Prepend` normalizer, transformers would then decode it to text that is in neither file.
    """
    again = {entry["content"]: entry for entry in (config.get("added_tokens_decoder") or {}).values()}
    for entry in fast.get("added_tokens") or []:
        text, flag = entry["content"], bool(entry.get("normalized"))
        shown = entry["id"] >= pieces and text not in (IMAGE, "<pad>")
        if shown and bool(again.get(text, {}).get("normalized", flag)) != flag:
            raise InputError(f"tokenizer.json and tokenizer_config.json disagree on `normalized` of {text!r}; {ADVICE}")


def check_ids(tokens, pieces, piece_id, numbered):
    """InputError unless each token has exactly one id, the one that transformers assigns.

    pieces: number of pieces; piece_id: function (text) -> id of the piece, or None. A piece keeps its own id. Other
    tokens are numbered from the last piece on (if there is a tokenizer.json), or have any id after the pieces.
    """
    ids, new = {}, 0
    for text, i in sorted(((token.content, token.id) for token in tokens), key=itemgetter(1)):
        if ids.setdefault(text, i) != i:
            raise InputError(f"the tokenizer's files give {text!r} the ids {ids[text]} and {i}; {ADVICE}")
        piece = piece_id(text)
        expected = pieces + new if piece is None else piece
        new += piece is None
        if i != expected and (numbered or piece is not None or i < pieces):
            raise InputError(f"the added token {text!r} has the id {i} instead of {expected}; {ADVICE}")


def _check_pieces(fast, sp):
    """InputError if tokenizer.json has other pieces than tokenizer.model."""
    vocabulary = (fast.get("model") or {}).get("vocab")
    if isinstance(vocabulary, dict) and any(vocabulary.get(sp.id_to_piece(i)) != i for i in range(len(sp))):
        raise InputError(f"tokenizer.json and tokenizer.model have different pieces; {ADVICE}")


def _steps(part, inner, known):
    """The steps of a part of tokenizer.json, a single one or a Sequence. InputError unless their types are known."""
    part = part or {}
    steps = part.get(inner) or [] if part.get("type") == "Sequence" else [part] if part else []
    for step in steps:
        if step.get("type") not in known:
            raise InputError(
                f"tokenizer.json has a step {step.get('type')!r}; here only {', '.join(known)} are supported"
            )
    return steps


def _prefix_rule(config, fast):
    """(prepends, every, spares): where sentencepiece's dummy space is added.

    prepends: a normalizer adds it to every segment. every: it is added to every segment, not only at the start of the
    text. spares: it is not added to a segment that starts with a space. tokenizer.json, if it exists, decides by a
    `Prepend` normalizer or the scheme of a `Metaspace` pre-tokenizer; otherwise the `legacy` flag, by default true.
    """
    normalizers = _steps(fast.get("normalizer"), "normalizers", ("Prepend", "Replace"))
    pre = _steps(fast.get("pre_tokenizer"), "pretokenizers", ("Metaspace",))
    if any(step["type"] == "Prepend" for step in normalizers):
        return True, True, False
    for step in pre:
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        if scheme not in ("always", "first") or step.get("split") is not False:
            raise InputError(
                f"tokenizer.json has prepend_scheme {scheme!r} and split {step.get('split', True)}; "
                "only always or first and split false are supported"
            )
        return False, scheme == "always", True
    return False, config.get("legacy") is not False, False


def _strips_first_space(fast):
    """True if decoding drops a leading space: always, unless tokenizer.json has a decoder without that step."""
    steps = _steps(fast.get("decoder"), "decoders", ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"))
    return not steps or any(step["type"] in ("Strip", "Metaspace") for step in steps)


def _bos_rule(config, fast, bos):
    """(BOS id, whether a prompt starts with it), from tokenizer.json's post-processor, else from `add_bos_token`."""
    if "post_processor" not in fast:
        if config.get("add_eos_token"):
            raise InputError("tokenizer_config.json appends an end token to the prompt; set add_eos_token to false")
        return bos, config.get("add_bos_token") is not False and bos >= 0
    rule = fast["post_processor"]
    if rule is None:
        return bos, False
    single = [next(iter(step.items())) for step in rule["single"]] if rule["type"] == "TemplateProcessing" else []
    kinds = [kind for kind, _ in single]
    if kinds not in (["SpecialToken", "Sequence"], ["Sequence"]):
        raise InputError("tokenizer.json adds more to a prompt than a start token; use the tokenizer of another copy")
    if kinds == ["Sequence"]:
        return bos, False
    (first,) = rule["special_tokens"][single[0][1]["id"]]["ids"]
    return first, True


# ---------------------------------------------------------------- templates

IMAGE, VIDEO = "<image>", "<video>"
_ASSISTANT_TEXT = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {whose} questions."
)

# The text before the first turn; the rest is the same for the first three families. The space before ASSISTANT
# matters, and so does its absence after the colon: both change greedy output.
SYSTEM_TEXT = {
    "llava": "",  # the llava-hf 1.5 conversions
    "vicuna": _ASSISTANT_TEXT.format(who="user", whose="user's"),  # LLaVA's evaluation scripts (vicuna_v1)
    "llava_v1": _ASSISTANT_TEXT.format(who="human", whose="human's"),  # LLaVA's command line
    "chatml": "You are a helpful assistant.",  # qwen_1_5 in LLaVA-NeXT's code, which trained LLaVA-OneVision
}
TEMPLATES = ("llava", "vicuna", "llava_v1", "mistral", "onevision", "chatml", "raw")
# Text between an answer and the next question. For llava, mistral and onevision it is that of the published chat
# templates, for the others that of LLaVA's training.
BETWEEN = {
    "llava": " ", "vicuna": "</s>", "llava_v1": "</s>", "mistral": "</s> ", "onevision": "<|im_end|>",
    "chatml": "<|im_end|>\n", "raw": "",
}  # fmt: skip


def build_prompt(question, images, template, system=None, follows=False, videos=0):
    """The text to encode: the question in its template, with an `<image>` per picture and a `<video>` per video.

    images, videos: their numbers. If the question has no `<image>`, all pictures come first, and then the videos if it
    has no `<video>`, with a newline behind each or, for onevision, one behind all; otherwise the counts must match.
    template "raw" leaves the question verbatim. follows: a later turn of a conversation, to be appended to an answer;
    the system text is ignored. InputError for counts that differ, or for `<image>` in the system text.
    """
    place = next((place for place in (IMAGE, VIDEO) if place in (system or "")), None)
    if place == IMAGE or place and videos:
        raise InputError(f"the system text contains {place}; place pictures in the prompt")
    first = [IMAGE] * _unplaced(question, IMAGE, images, "picture")
    if videos:  # without one, `<video>` is text for some tokenizers
        first += [VIDEO] * _unplaced(question, VIDEO, videos, "video")
    if template != "onevision":
        question = "".join(place + "\n" for place in first) + question
    elif first or not question.startswith((IMAGE, VIDEO)):
        question = "".join(first) + "\n" + question
    if template == "raw":
        return question
    between = BETWEEN[template] if follows else ""
    system = "" if follows else SYSTEM_TEXT.get(template) if system is None else system
    if template == "onevision":
        system = f"<|im_start|>system \n{system}<|im_end|>" if system else ""
        return f"{between}{system}<|im_start|>user {question}<|im_end|><|im_start|>assistant\n"
    if template == "chatml":
        system = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return f"{between}{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    system = system + " " if system else ""
    if template == "mistral":  # it has no slot for a system text
        return f"{between}[INST] {system}{question} [/INST]"
    return f"{between}{system}USER: {question} ASSISTANT:"


def _unplaced(question, place, number, what):
    """How many pictures or videos the question does not place: all or none. InputError for another number in it."""
    found = question.count(place)
    if found and found != number:
        raise InputError(
            f"the prompt has {found} {place}, and the number of {what}s is {number}; "
            f"give one {what} for each, or leave {place} out of the prompt"
        )
    return 0 if found else number


# `_fingerprint` of each known chat template -> family. Comments: what it renders for a question with one picture
KNOWN_TEMPLATES = {
    # "USER: <image>\nQ ASSISTANT:", llava-1.5-*-hf and llava-v1.6-vicuna-*-hf, with and without `generation` tags
    "19a8f55284b8d7469ebbf822a120f01b83e82ab5220ca90dc0423e6318e734e1": "llava",
    "f743677a293acc6d51108c4825e1ea26ca73621be042bdd55703678bec21b1b0": "llava",
    # "[INST] <image>\nQ [/INST]", llava-v1.6-mistral-7b-hf; two spellings of </s> after an answer
    "ef350bbf817df2e8ceeff130e369858185b382ec436fef5a693c7612de7c3794": "mistral",
    "937ee8700b6ef6cef87ac884dee13d2de9f5cbe2fdaea851b47b2226f6da49fe": "mistral",
    # "[INST] Q [/INST]", Mistral-7B-Instruct-v0.2, in the tokenizer_config.json of copies with that language model
    "0ee0ad349d84978ea58676fc5aed83e8031e094ca1c8f767b4eed228ed63be66": "mistral",
    # "<|im_start|>user <image>\nQ<|im_end|><|im_start|>assistant\n", llava-onevision-qwen2-*-hf: with and without
    # `generation` tags; the same without videos
    "4c924ed74ec0af9d866cf6b85a8945834e493911439a3cfc0cbd31503c34dbf2": "onevision",
    "71a5e241dd24523e915f049396572f473da82be65c021b734a5693240874f7bd": "onevision",
    "c5332fdffa5d3d37b65eec16b413f5c6542421e9155d7401d091f0252fdde015": "onevision",
    "11362f7a9ecccb58c5d370200acd07b57e1513cc65a5a5bf072b1b2611d05943": "onevision",
    # "<|im_start|>system\n...<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", Qwen2-*-Instruct, in
    # the tokenizer_config.json of copies with that language model
    "f878e61991818cac5f4fe7c15af67846b0c39f4ef7aa74b7fee51b3e6e99e513": "chatml",
    # "USER: <image>\nQ ASSISTANT:", the demo model of this repository
    "587e1951163fb24a1dd8a1b5c0681cc995cc09e905b1c05b4b380372753f726f": "llava",
}


def find_template(folder, config):
    """(template, note): the family of the checkpoint's chat template, and how it was found.

    Chat templates are programs from untrusted files, so none is run: the known ones are recognised by their text.
    Without a known template, config (a LlavaConfig) decides the family.
    """
    text = _chat_template(Path(folder))
    family = "llava"  # LLaVA-1.5
    if config.text_config.model_type == "mistral":
        family = "mistral"
    elif config.text_config.model_type == "qwen2":  # LLaVA-OneVision
        family = "chatml"
    elif config.image_grid_pinpoints:  # LLaVA-NeXT with Vicuna
        family = "llava_v1"
    if text is None:
        return family, "no chat template in the folder"
    known = KNOWN_TEMPLATES.get(_fingerprint(text))
    if known is None:
        return family, f"chat template not recognised; choose with --template: {', '.join(TEMPLATES)}"
    return known, "from the chat template"


def _chat_template(folder):
    """The text of the chat template that transformers would use; None if the folder has none."""
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        path, text = folder / name, None
        if name.endswith(".json"):
            text = (read_json(path) or {}).get("chat_template")
        elif path.is_file():
            text = path.read_text("utf-8", "replace")
        if isinstance(text, list):  # [{"name": ..., "template": ...}]
            with making_sense_of(path):
                text = {entry["name"]: entry["template"] for entry in text}
        if text:
            return str(text.get("default", text) if isinstance(text, dict) else text)
    return None


def _fingerprint(template):
    """SHA-256 of a Jinja template without the parts that do not change its output: comments and some white space."""
    # tags match first, so that a string in a tag keeps what looks like a comment
    text = template.replace("\r\n", "\n").removesuffix("\n")
    text = re.sub(r"(\{[%{].*?[%}]\})|\{#.*?#\}", lambda found: found[1] or "", text, flags=re.S)
    text = re.sub(r"(?<=-[%}]\})\s+|\s+(?=\{[%{]-)", "", text)  # a minus at a tag strips white space
    text = re.sub(r"(?<=%\})\n(?:[ \t]*(?=\{%))?", "", text)  # the newline after a block tag

    def inside(tag):  # drop white space outside strings; in a string, \n is a line break
        return re.sub(r"""('[^']*'|"[^"]*")|\s""", lambda part: (part[1] or "").replace("\\n", "\n"), tag[0])

    text = re.sub(r"\{[%{].*?[%}]\}", inside, text, flags=re.S)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
