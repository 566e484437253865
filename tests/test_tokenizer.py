"""Text to ids and back: equal to transformers' tokenizers, streamed without partial characters; prompt templates."""

import json
import random
import shutil

import chat_templates
import pytest
import sentencepiece
from conftest import IMAGE_ID, PAD_ID, PIECES, TOKENIZER_CONFIG, VOCAB, added_token, refusal, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import LlavaConfig, parse_config
from model.tokenizer import TEMPLATES, Detokenizer, Tokenizer, build_prompt, find_template
from tests.paths import DEMO

TEXTS = [
    "",
    "USER: <image>\nWhat's the content of the image?\nASSISTANT:",
    "A chat between a curious user and an assistant. USER: <image>\n<image>\nhow many? ASSISTANT:",
    "<image><image> above  <image>  b",
    " <image> <image> x",
    "<<image>>",
    "< image>",
    "  double  spaces  here ",
    " leading",
    "trailing ",
    " ",
    "\n\n\nnew\nlines\n",
    " \n \n",
    "tab\tand\r\nreturn",
    "héllo wörld ñ",
    "e\u0301 is not é",
    "mixed Ωμέγα и кириллица",
    "emoji 😀👩\u200d👩\u200d👧 ok",
    "ﬁ ligature ½ ①",
    "\u00a0no-break\u3000ideographic",
    "\u200bzero width",
    "a\x00b",
    "<0x0A> is text here",
    "a</s>b",
    "</s>USER: hi </s> no",
    "<s>x",
    "x<unk>y",
    "<pad>p",
]


# ---------------------------------------------------------------- encoding


def transformers_tokenizer(folder, legacy):
    """LlamaTokenizer of transformers 5: a tokenizer.json with a Metaspace pre-tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    return transformers.LlamaTokenizer.from_pretrained(folder, legacy=legacy)


def sentencepiece_ids(folder, text, legacy):
    """The Llama tokenizer of transformers 4, built on the base class that transformers 5 still has.

    legacy: each segment gets the dummy space. Otherwise one visible space precedes the whole text, and is removed if an
    added token follows.
    """
    pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    from transformers.tokenization_utils_base import AddedToken
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    config = {k: v for k, v in TOKENIZER_CONFIG.items() if k.endswith("_token") and k != "add_bos_token"}
    added = {int(i): AddedToken(**token) for i, token in TOKENIZER_CONFIG["added_tokens_decoder"].items()}
    model = str(folder / "tokenizer.model")
    oracle = SentencePieceBackend(vocab_file=model, legacy=legacy, added_tokens_decoder=added, **config)
    starts_with_token = text.startswith(("<image>", "<pad>", "<s>", "</s>", "<unk>"))
    shown = text if legacy or not text or starts_with_token else "\u2581" + text
    return [1, *oracle.convert_tokens_to_ids(oracle.tokenize(shown))]


@pytest.fixture(scope="module", params=[True, False, None], ids=["legacy", "not legacy", "legacy by default"])
def without_json(request, tiny_tokenizer_dir, tmp_path_factory):
    """(folder, legacy) without tokenizer.json: the flag decides."""
    folder = tmp_path_factory.mktemp("plain") / "tokenizer"
    shutil.copytree(tiny_tokenizer_dir, folder)
    flag = {} if request.param is None else {"legacy": request.param}
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | flag)
    return folder, request.param is not False


def segments(text):
    for token in ("<pad>", "<s>", "</s>", "<unk>"):
        text = text.replace(token, "<image>")
    return text.split("<image>")


@pytest.mark.parametrize("text", TEXTS)
def test_ids_without_tokenizer_json_are_those_of_the_sentencepiece_tokenizer(without_json, text):
    """Of transformers 4, and of 5 except for segments that start with a space, where the two differ."""
    folder, legacy = without_json
    ids = Tokenizer(folder).encode(text)
    assert ids == sentencepiece_ids(folder, text, legacy)
    if not any(segment.startswith(" ") for segment in segments(text)):
        assert ids == transformers_tokenizer(folder, legacy).encode(text)


@pytest.fixture(scope="module", params=[True, False], ids=["always", "first"])
def with_json(request, tiny_tokenizer_dir, tmp_path_factory):
    """(folder, oracle) with the tokenizer.json of transformers; the flag in tokenizer_config.json contradicts it."""
    folder = tmp_path_factory.mktemp("json") / "tokenizer"
    shutil.copytree(tiny_tokenizer_dir, folder)
    oracle = transformers_tokenizer(tiny_tokenizer_dir, request.param)
    oracle.save_pretrained(folder)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | {"legacy": not request.param})
    pre = json.loads((folder / "tokenizer.json").read_text())["pre_tokenizer"]
    assert (pre["type"], pre["prepend_scheme"]) == ("Metaspace", "always" if request.param else "first")
    return folder, oracle


@pytest.mark.parametrize("text", [*TEXTS, "\u2581visible", "a<image>\u2581visible"])
def test_ids_with_tokenizer_json_are_those_of_llama_tokenizer(with_json, text):
    """And the texts of these ids."""
    folder, oracle = with_json
    tokenizer, ids = Tokenizer(folder), oracle.encode(text)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


STEPS = [
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
]
PREPEND = {"normalizer": {"type": "Sequence", "normalizers": STEPS}, "pre_tokenizer": None}


@pytest.fixture(scope="module", params=[PREPEND, PREPEND | {"normalizer": STEPS[0]}], ids=["sequence", "alone"])
def prepend_folder(request, tiny_tokenizer_dir, tmp_path_factory):
    """A hand-written tokenizer.json as in older conversions: a `Prepend` normalizer, no pre-tokenizer."""
    folder = tmp_path_factory.mktemp("prepend") / "tokenizer"
    shutil.copytree(tiny_tokenizer_dir, folder)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | {"legacy": False})  # tokenizer.json decides
    write_json(folder / "tokenizer.json", request.param)
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_a_prepend_normalizer_does_what_the_tokenizers_library_does_with_it(prepend_folder, with_json, text):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is the oracle of this test")
    file = json.loads((with_json[0] / "tokenizer.json").read_text()) | PREPEND
    oracle = tokenizers.Tokenizer.from_str(json.dumps(file))
    assert Tokenizer(prepend_folder).encode(text, bos=False) == oracle.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("json_says, config_says", [(True, False), (False, True), (True, True)])
def test_files_that_disagree_on_normalized_behind_a_prepend_normalizer_are_refused(
    tokenizer_folder, json_says, config_says
):
    decoder = with_tokens(added_token("<x>") | {"special": False, "normalized": config_says})
    folder = tokenizer_folder(added_tokens_decoder=decoder)
    added = [{"id": int(i), **entry} for i, entry in decoder.items()]
    added[-1]["normalized"] = json_says
    write_json(folder / "tokenizer.json", PREPEND | {"added_tokens": added})
    if json_says == config_says:
        assert "<x>" in Tokenizer(folder).added
    else:
        assert "normalized" in refusal(Tokenizer, folder)


def test_bos_is_added_unless_the_files_or_the_caller_say_no(tokenizer_folder):
    first = {flag: Tokenizer(tokenizer_folder(add_bos_token=flag)).encode("a")[0] for flag in (True, None, False)}
    assert first[True] == first[None] == 1 != first[False]
    assert Tokenizer(tokenizer_folder()).encode("a", bos=False)[0] != 1


def test_added_tokens_are_found_in_each_of_the_three_files(tokenizer_folder):
    entry = {"id": IMAGE_ID, "content": "<image>", "special": True}
    for name, content in (("added_tokens.json", {"<image>": IMAGE_ID}), ("tokenizer.json", {"added_tokens": [entry]})):
        folder = tokenizer_folder(added_tokens_decoder={})
        assert "<image>" not in Tokenizer(folder).added
        write_json(folder / name, content)
        assert Tokenizer(folder).encode("<image>", bos=False) == [IMAGE_ID]


# ---------------------------------------------------------------- added tokens and their flags

FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
CONTENTS = ["<x>", "<x>>", "<y z>", "abc", "é", "<|t|>", "2x", "<im", "what", "\u2581w"]
BETWEEN = [
    "a", "b", " ", "  ", "\n", "\t", "é", "_", "½", "x", "USER: ", "\u00a0", "日", "\u2581", "<", "what is ", "\u0301",
    "\x1d", "\u200d", ".", "<image>", "<s>",
]  # fmt: skip


def random_flags(rng):
    return {flag: rng.random() < 0.35 for flag in FLAGS}


def put_random_tokens(folder, rng, scheme):
    """Write added tokens with random flags into the files of a tokenizer; returns their texts."""
    fast = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if scheme == "prepend":
        fast |= PREPEND | {"normalizer": {"type": "Sequence", "normalizers": STEPS}}
    else:
        fast["pre_tokenizer"]["prepend_scheme"] = scheme
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    where = rng.choice(["tokenizer.json", "tokenizer_config.json", "both", "both with other flags"])
    if scheme == "prepend" and "other" in where:  # transformers is inconsistent about a leading space there
        where = "both"
    free, texts = PIECES + 2, rng.sample(CONTENTS, rng.randint(1, 4))
    for text in texts:
        i = pieces.piece_to_id(text)
        if pieces.id_to_piece(i) != text:
            i, free = free, free + 1
        flags = random_flags(rng)
        if where != "tokenizer_config.json":
            fast["added_tokens"].append({"id": i, "content": text} | flags)
        if where != "tokenizer.json":
            again = random_flags(rng) if "other" in where else flags
            config["added_tokens_decoder"][str(i)] = {"content": text} | again
    if rng.random() < 0.3:
        config["foo_token"] = texts[0]
    if where == "tokenizer.json" and rng.random() < 0.5:
        del config["added_tokens_decoder"]
    if rng.random() < 0.2:
        fast["decoder"]["decoders"] = [d for d in fast["decoder"]["decoders"] if d["type"] != "Strip"]
    write_json(folder / "tokenizer.json", fast)
    write_json(folder / "tokenizer_config.json", config)
    return texts


@pytest.mark.parametrize("scheme", ["first", "always", "prepend"])
@pytest.mark.parametrize("seed", range(12))
def test_added_tokens_are_those_of_auto_tokenizer_whatever_their_flags(tiny_tokenizer_dir, tmp_path, seed, scheme):
    """Ids of texts, and text of ids: a token that is not special stays in the answer."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    rng = random  # seeded by the test's id, which contains `seed` and `scheme`
    shutil.copytree(tiny_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    transformers_tokenizer(tiny_tokenizer_dir, True).save_pretrained(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(tmp_path / "config.json", {"model_type": "llava"})  # makes AutoTokenizer use tokenizer.json unchanged
    texts = put_random_tokens(tmp_path, rng, scheme)
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for _ in range(40):
        text = "".join(rng.choice([*texts, *texts, *BETWEEN]) for _ in range(rng.randint(0, 12)))
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        ids += [i for i in rng.choices(range(PIECES + 2 + len(texts)), k=5) if not ours.sp.is_byte(i % PIECES)]
        ids = [i for i in ids if i < len(theirs)]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids


SLOW_TEXTS = ["a <x> b", "<x>", "  <x>  ", "a<x><x>b", "a\n <x>\t b<image> <x>c", " <x>a", "a <image> <x>"]


def with_tokens(*tokens):
    """added_tokens_decoder with further tokens, numbered from PAD_ID + 1."""
    return TOKENIZER_CONFIG["added_tokens_decoder"] | {str(PAD_ID + 1 + i): token for i, token in enumerate(tokens)}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("strips", [(), ("lstrip",), ("rstrip",), ("lstrip", "rstrip")], ids=str)
def test_without_tokenizer_json_white_space_is_taken_as_the_sentencepiece_tokenizer_takes_it(
    tokenizer_folder, monkeypatch, strips, legacy
):
    decoder = with_tokens(added_token("<x>") | dict.fromkeys(strips, True))
    monkeypatch.setitem(TOKENIZER_CONFIG, "added_tokens_decoder", decoder)  # for the oracle too
    folder = tokenizer_folder(legacy=legacy)
    for text in SLOW_TEXTS:
        if legacy or not text.strip().startswith("<x>"):  # the display of a first space is not tested here
            assert Tokenizer(folder).encode(text) == sentencepiece_ids(folder, text, legacy), text


def test_a_token_that_is_not_special_stays_in_the_answer(tokenizer_folder):
    texts = {"<tool>": False, "<secret>": True, "\u2581two\u2581words": False}
    decoder = with_tokens(*(added_token(text) | {"special": special} for text, special in texts.items()))
    tokenizer = Tokenizer(tokenizer_folder(added_tokens_decoder=decoder))
    ids = [*tokenizer.encode("a"), PAD_ID + 1, PAD_ID + 2, PAD_ID + 3, PAD_ID]
    assert tokenizer.decode(ids) == "".join(streamed(tokenizer, ids)) == "a<tool> two words"


def test_without_tokenizer_json_an_id_may_leave_a_hole(tokenizer_folder):
    folder = tokenizer_folder(added_tokens_decoder=HOLE)
    assert Tokenizer(folder).encode("<x>", bos=False) == [PAD_ID + 2]  # like the sentencepiece tokenizer


def template_processing(*single):
    ids = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}, "<pad>": {"id": "<pad>", "ids": [PAD_ID]}}
    steps = [{"Sequence": {"id": "A"}} if s == "A" else {"SpecialToken": {"id": s}} for s in single]
    return {"type": "TemplateProcessing", "single": steps, "special_tokens": ids}


def image_as(i):
    return {"added_tokens": [{"id": i, "content": "<image>", "special": True}]}


HOLE = with_tokens() | {str(PAD_ID + 2): added_token("<x>")}
MIXED = {  # a word of the error: tokenizer.json, settings of tokenizer_config.json
    "Lowercase": ({"normalizer": {"type": "Lowercase"}}, {}),
    "NFKC": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}}, {}),
    "ByteLevel": ({"pre_tokenizer": {"type": "ByteLevel"}}, {}),
    "Digits": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}]}}, {}),
    "split True": ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first", "split": True}}, {}),
    "'never'": ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never", "split": False}}, {}),
    "WordPiece": ({"decoder": {"type": "WordPiece"}}, {}),
    "a start token": ({"post_processor": {"type": "RobertaProcessing"}}, {}),
    "than a start token": ({"post_processor": template_processing("<s>", "A", "<pad>")}, {}),
    "add_eos_token": ({}, {"add_eos_token": True}),
    f"{PAD_ID + 2} instead of {PAD_ID + 1}": (image_as(IMAGE_ID), {"added_tokens_decoder": HOLE}),
    "300 instead of": (image_as(IMAGE_ID), {"added_tokens_decoder": with_tokens() | {"300": added_token("<x>")}}),
    f"'<image>' the ids {IMAGE_ID} and {PAD_ID + 1}": (
        {},
        {"added_tokens_decoder": with_tokens(added_token("<image>"))},
    ),
    f"'<image>' the ids {IMAGE_ID} and {PAD_ID}": (image_as(PAD_ID), {}),
}


@pytest.mark.parametrize("word", MIXED)
def test_files_that_disagree_or_are_not_computed_are_refused(tokenizer_folder, word):
    fast, config = MIXED[word]
    folder = tokenizer_folder(**config)
    write_json(folder / "tokenizer.json", fast)
    assert word in refusal(Tokenizer, folder)


def test_a_tokenizer_json_of_other_pieces_is_refused(tokenizer_folder):
    folder = tokenizer_folder()
    vocabulary = {Tokenizer(folder).sp.id_to_piece(i): i for i in range(PIECES)}
    write_json(folder / "tokenizer.json", {"model": {"vocab": vocabulary}})
    assert Tokenizer(folder).encode("a")
    a, b = list(vocabulary)[300:302]
    write_json(folder / "tokenizer.json", {"model": {"vocab": vocabulary | {a: 301, b: 300}}})
    assert "different pieces" in refusal(Tokenizer, folder)


def test_what_tokenizer_json_puts_around_a_prompt_goes_before_the_flag(tokenizer_folder):
    folder = tokenizer_folder(add_bos_token=False)
    for single, first in ((("<s>", "A"), [1]), (("<pad>", "A"), [PAD_ID]), (("A",), [])):
        write_json(folder / "tokenizer.json", {"post_processor": template_processing(*single)})
        tokenizer = Tokenizer(folder)
        assert tokenizer.encode("a") == first + tokenizer.encode("a", bos=False)


def test_bos_and_eos_are_the_tokens_of_these_names(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder(bos_token="<pad>", eos_token={"content": "<image>"}))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (PAD_ID, IMAGE_ID) and tokenizer.encode("a")[0] == PAD_ID


def test_rows_of_the_embedding_that_stand_for_nothing_are_known(tiny_tokenizer_dir):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    assert tokenizer.unreachable_ids(VOCAB) == list(range(PAD_ID + 1, VOCAB))
    assert tokenizer.unreachable_ids(PIECES) == []


def test_a_folder_without_a_sentencepiece_model_is_refused(tiny_tokenizer_dir, tmp_path):
    assert "tokenizer.model" in refusal(Tokenizer, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    assert "tokenizer.model" in refusal(Tokenizer, tmp_path)


# ---------------------------------------------------------------- decoding


def plain_decode(sp, ids):
    """Bytes of all pieces in a row, without one leading space, read as UTF-8."""
    data = b""
    for i in ids:
        if i < PIECES and not sp.is_control(i) and not sp.is_unknown(i):
            piece = sp.id_to_piece(i)
            data += bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else piece.replace("\u2581", " ").encode()
    return data.removeprefix(b" ").decode("utf-8", errors="replace")


def streamed(tokenizer, ids):
    stream = Detokenizer(tokenizer)
    return [*map(stream.push, ids), stream.flush()]


ANY_IDS = st.lists(st.integers(0, VOCAB + 3), max_size=24)
BYTE_IDS = st.lists(st.integers(3, 258), max_size=12)  # mostly invalid UTF-8
CHARACTERS = st.text(st.sampled_from("aé😀日 ½\u200d\n."), max_size=12)


@settings(max_examples=300)
@given(ids=st.one_of(ANY_IDS, BYTE_IDS, st.tuples(BYTE_IDS, ANY_IDS).map(lambda two: two[0] + two[1])))
def test_streamed_pieces_join_to_the_decoding_whatever_the_ids(tiny_tokenizer_dir, ids):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == plain_decode(tokenizer.sp, ids)


@settings(max_examples=200)
@given(text=CHARACTERS)
def test_streaming_never_shows_half_a_character(tiny_tokenizer_dir, text):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    ids, shown = tokenizer.encode(text), ""
    stream = Detokenizer(tokenizer)
    for i in ids:
        shown += stream.push(i)
        assert text.startswith(shown)  # always a prefix of the final text, so never U+FFFD
    assert shown == text and stream.flush() == ""


def test_text_is_shown_as_soon_as_it_is_certain(tiny_tokenizer_dir):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    assert streamed(tokenizer, tokenizer.encode("a 😀", bos=False)) == ["a", " ", "", "", "", "😀", ""]
    byte = {value: tokenizer.sp.piece_to_id(f"<0x{value:02X}>") for value in range(256)}
    assert streamed(tokenizer, [byte[0xE2], byte[0x82]]) == ["", "", "\ufffd"]  # the end interrupts the character
    assert "".join(streamed(tokenizer, [byte[0xFF], byte[0x41]])) == "\ufffdA"


# ---------------------------------------------------------------- templates

CHAT = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions. "
)
VICUNA, LLAVA_V1 = CHAT.format("user"), CHAT.format("human")
ONEVISION = "<|im_start|>user <image>\nWhy?<|im_end|><|im_start|>assistant\n"
CHATML = "<|im_start|>user\n<image>\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "template, system, want",
    [
        ("llava", None, "USER: <image>\nWhy? ASSISTANT:"),
        ("llava", "Be brief.", "Be brief. USER: <image>\nWhy? ASSISTANT:"),
        ("vicuna", None, VICUNA + "USER: <image>\nWhy? ASSISTANT:"),
        ("vicuna", "Be brief.", "Be brief. USER: <image>\nWhy? ASSISTANT:"),
        ("vicuna", "", "USER: <image>\nWhy? ASSISTANT:"),
        ("llava_v1", None, LLAVA_V1 + "USER: <image>\nWhy? ASSISTANT:"),
        ("mistral", None, "[INST] <image>\nWhy? [/INST]"),
        ("mistral", "Be brief.", "[INST] Be brief. <image>\nWhy? [/INST]"),
        ("onevision", None, ONEVISION),
        ("onevision", "Be brief.", "<|im_start|>system \nBe brief.<|im_end|>" + ONEVISION),
        ("chatml", None, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML),
        ("chatml", "Be brief.", "<|im_start|>system\nBe brief.<|im_end|>\n" + CHATML),
        ("chatml", "", CHATML),
        ("raw", None, "<image>\nWhy?"),
    ],
)
def test_each_template_is_this_string(template, system, want):
    assert build_prompt("Why?", 1, template, system) == want


@pytest.mark.parametrize(
    "question, images, want",
    [
        ("Why?", 0, "Why?"),
        ("Why?", 2, "<image>\n<image>\nWhy?"),
        ("<image>\nWhy?", 1, "<image>\nWhy?"),
        ("Is <image> like <image>?", 2, "Is <image> like <image>?"),
        ("", 1, "<image>\n"),
    ],
)
def test_pictures_come_first_unless_the_prompt_places_them(question, images, want):
    assert build_prompt(question, images, "raw") == want
    assert build_prompt(question, images, "llava") == f"USER: {want} ASSISTANT:"


@pytest.mark.parametrize("pictures", ["<image>", "<image><image>", "<video>"])
def test_a_picture_placed_first_is_where_onevision_puts_it(pictures):
    images, videos = pictures.count("<image>"), pictures.count("<video>")
    wanted = f"<|im_start|>user {pictures}\nWhy?<|im_end|><|im_start|>assistant\n"
    for question in (f"{pictures}\nWhy?", "Why?"):
        assert build_prompt(question, images, "onevision", videos=videos) == wanted


@pytest.mark.parametrize("question, images", [("<image> a", 0), ("<image> a", 2), ("<image> <image>", 1)])
def test_a_count_that_does_not_match_is_refused_with_both_numbers(question, images):
    for template in TEMPLATES:
        message = refusal(build_prompt, question, images, template)
        assert f"has {question.count('<image>')} <image>, and the number of pictures is {images};" in message


CHAT_TEMPLATES = {  # published text: the template family that renders the same prompt
    "llava": (chat_templates.LLAVA, "llava"),
    "llava, unmarked": (chat_templates.LLAVA_UNMARKED, "llava"),
    "mistral": (chat_templates.MISTRAL, "mistral"),
    "mistral, old": (chat_templates.MISTRAL_OLD, "mistral"),
    "instruct": (chat_templates.INSTRUCT, "mistral"),
    "demo": ((DEMO / "chat_template.jinja").read_text(), "llava"),
    "onevision": (chat_templates.ONEVISION, "onevision"),
    "onevision, unmarked": (chat_templates.ONEVISION_UNMARKED, "onevision"),
    "onevision, pictures": (chat_templates.ONEVISION_PICTURES, "onevision"),
    "onevision, first": (chat_templates.ONEVISION_FIRST, "onevision"),
    "Qwen2": (chat_templates.CHATML, "chatml"),
}


def rendered(template, question, pictures):
    """The prompt that transformers renders, without the start token that the tokenizer adds anyway."""
    pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    from transformers.utils.chat_template_utils import _compile_jinja_template

    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    if "message['content'] +" in template:  # a language model's template: content is a string
        content = "<image>\n" * pictures + question
    messages = [{"role": "user", "content": content}]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    made = _compile_jinja_template(template).render(messages=messages, add_generation_prompt=True, **tokens)
    return made.removeprefix("<s>")


@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_known_chat_template_renders_what_its_family_builds(name, pictures):
    text, family = CHAT_TEMPLATES[name]
    assert rendered(text, "Why  so?\nSay it.", pictures) == build_prompt("Why  so?\nSay it.", pictures, family)


SPELLINGS = {  # rewordings that do not change the output
    "as published": lambda text: text,
    "line breaks escaped": lambda text: text.replace("\n' ", "\\n' ").replace("'\n", "'\\n"),
    "a line break at the end": lambda text: text + "\n",
    "Windows": lambda text: text.replace("\n", "\r\n"),
    "a line for each tag": lambda text: text.replace("%}{%", "%}\n    {%"),
    "other comments": lambda text: text.replace("{# Render all images first #}", "{# pictures #}"),
    "wide tags": lambda text: text.replace("{% ", "{%   ").replace(" %}", "\n%}"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_chat_template_is_recognised_in_other_spellings(tmp_path, name, spelling):
    text, family = CHAT_TEMPLATES[name]
    changed = SPELLINGS[spelling](text)
    assert rendered(changed, "Why?", 1) == rendered(text, "Why?", 1)
    (tmp_path / "chat_template.jinja").write_bytes(changed.encode())
    assert find_template(tmp_path, LLAVA) == (family, "from the chat template")


LOST = {  # changes that alter the prompt; the old rules ignored all of them
    "a system sentence": lambda text: "Answer in French. " + text,
    "a sentence of vicuna's": lambda text: VICUNA + text,
    "a sentence behind": lambda text: text + " Be brief.",
    "a space": lambda text: text.replace("{% for", " {% for", 1),
    "a word": lambda text: text.replace("USER", "HUMAN").replace("message", "messag3", 1).replace("INST", "ASK"),
    "a space for a line break": lambda text: text.replace("<image>\\n", "<image> ").replace("<image>\n", "<image> "),
    "a sentence between strings that look like a comment": lambda text: text + "{{ '{#' }}Be brief.{{ '#}' }}",
    "a system turn": lambda text: "{% set messages = [{'role': 'system', 'content': 'Be brief.'}] + messages %}" + text,
}


@pytest.mark.parametrize("change", LOST)
@pytest.mark.parametrize("name", ["llava", "mistral", "demo"])
def test_a_chat_template_with_any_other_text_is_not_recognised(tmp_path, name, change):
    changed = LOST[change](CHAT_TEMPLATES[name][0])
    assert changed != CHAT_TEMPLATES[name][0]
    (tmp_path / "chat_template.jinja").write_text(changed)
    note = find_template(tmp_path, LLAVA)[1]
    assert "not recognised" in note and "--template" in note


PLACES = ["processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"]


def put_template(folder, place, text):
    if place.endswith(".jinja"):
        (folder / place).write_text(text)
    else:
        old = json.loads((folder / place).read_text()) if (folder / place).exists() else {}
        write_json(folder / place, old | {"chat_template": text})


LLAVA, QWEN2 = LlavaConfig(), parse_config({"model_type": "llava_onevision"})
NEXT = {
    kind: parse_config({"model_type": "llava_next", "text_config": {"model_type": kind}})
    for kind in ("llama", "mistral")
}


@pytest.mark.parametrize("first", range(4))
def test_of_several_chat_templates_the_one_of_transformers_counts(tmp_path, first):
    """In the order of PLACES; the last is that of a bare tokenizer, which transformers' processor does not read."""
    for file in DEMO.iterdir():
        if file.suffix in (".json", ".model"):
            shutil.copy(file, tmp_path)
    put_template(tmp_path, PLACES[first], chat_templates.MISTRAL)
    assert find_template(tmp_path, LLAVA) == ("mistral", "from the chat template")
    for place in PLACES[first + 1 :]:
        put_template(tmp_path, place, chat_templates.LLAVA)
    assert find_template(tmp_path, LLAVA)[0] == "mistral"
    if first < 3:
        transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
        assert transformers.AutoProcessor.from_pretrained(tmp_path).chat_template == chat_templates.MISTRAL


def test_of_several_named_chat_templates_the_default_counts(tmp_path):
    named = {"default": chat_templates.LLAVA, "tool_use": chat_templates.MISTRAL}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    for value in (named, listed):
        write_json(tmp_path / "tokenizer_config.json", {"chat_template": value})
        assert find_template(tmp_path, NEXT["mistral"])[0] == "llava"


@pytest.mark.parametrize(
    ("config", "family"),
    [(LLAVA, "llava"), (NEXT["llama"], "llava_v1"), (NEXT["mistral"], "mistral"), (QWEN2, "chatml")],
)
def test_no_or_an_unknown_chat_template_means_that_of_the_family_and_is_said(tmp_path, config, family):
    nothing = find_template(tmp_path, config)
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>user {{ messages[0].content }}")
    unknown = find_template(tmp_path, config)
    assert nothing[0] == unknown[0] == family and "no chat template" in nothing[1] and "not recognised" in unknown[1]


def test_a_chat_template_is_never_run(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{% raise %} ASSISTANT:"
    )
    template, note = find_template(tmp_path, LLAVA)
    assert template == "llava" and "not recognised" in note
