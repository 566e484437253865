"""Qwen2's byte-level tokenizer: equal to transformers' on the same folder, or refused; streamed in whole characters."""

import contextlib
import json
import random
import shutil
import sys
from collections import namedtuple

import pytest
from conftest import TEXT, refusal, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Generation, Sampling, load
from model.bpe import ByteLevelTokenizer
from model.config import InputError
from model.tokenizer import Tokenizer, build_prompt, open_tokenizer
from tools import verify_checkpoint
from tools.byte_level import PLAIN, TOKENS, write_byte_level

# ---------------------------------------------------------------- texts and folders

SCRIPTS = (  # ranges of code points, ends included
    (0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xFFF), (0x10A0, 0x139F),
    (0x1780, 0x17FF), (0x1E00, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0x33FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7FF),
    (0xF900, 0xFDFF), (0xFE00, 0xFFFD), (0x10000, 0x10FFF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2FA1F),
    (0xE000, 0xE0FF), (0x0, 0xD7FF), (0xE000, 0x10FFFF),
)  # fmt: skip
SNIPPETS = (
    *TOKENS, "<|im_start|>user\n", "<|im_end|>\n", "<|im_", "im_start|>", "<|", "|>", "<image", "image>", "<image>",
    "<|im_start|", "don't", "I'LL we've 'S'D", "he'll", "'tis", "2024", "3.14159", "12,345", "٣٤", "½", "a1b2", "  ",
    "\n\n\n", " \n ", "\t\t", "\r\n", "     x", "\u00a0 ", "\u3000", "\x00", "\x07\x1b[0m", "\x7f\x85", "\u200b\ufeff",
    "e\u0301", "a\u0323\u0307", "A\u030a", "\u1100\u1161\u11a8", "\u0301 alone", "ﬁ", "\u212b\u2126", "\u0958",
    "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "👍🏽", "🇩🇪🇫🇷", "1\ufe0f\u20e3", "the picture", " circle", "USER: ", "naïve",
    "日本語", "картинка", "שלום", "हिन्दी", "ภาษาไทย", "<unused-300>", "Ġ", "Ċ", "é",
)  # fmt: skip


def random_text():
    """Up to 16 parts; the random module is seeded by the test's id."""

    def part():
        if random.random() < 0.5:
            return random.choice(SNIPPETS)
        first, last = random.choice(SCRIPTS)
        return "".join(chr(random.randint(first, last)) for _ in range(random.randint(1, 6)))

    return "".join(part() + random.choice(("", "", " ", "\n")) for _ in range(random.randint(0, 16)))


def theirs(folder, kind="llava_onevision"):
    """transformers' tokenizer of a folder whose config.json has this model_type."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    write_json(folder / "config.json", {"model_type": kind})
    return transformers.AutoTokenizer.from_pretrained(folder)


def edit(path, change):
    """change: function (content of a JSON file) that alters it or returns another."""
    value = json.loads(path.read_text())
    write_json(path, change(value) or value)


@pytest.fixture
def folder(byte_level_dir, tmp_path):
    """A copy of the byte-level tokenizer's folder."""
    return shutil.copytree(byte_level_dir, tmp_path / "tokenizer")


def without_decoder(folder):
    """As copies from before 2023: added_tokens.json instead of added_tokens_decoder."""
    edit(folder / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder") and None)


def only_fast(folder):
    """tokenizer.json has everything, tokenizer_config.json only names."""
    without_decoder(folder)
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").unlink()


def of_five(folder):
    """What transformers 5 writes."""
    saved = theirs(folder)
    for path in folder.iterdir():
        path.unlink()
    saved.save_pretrained(folder)


def backend_class(folder):
    edit(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class="PreTrainedTokenizerFast"))


def old_merges(folder):
    """Merges as strings, before tokenizers 0.20."""
    edit(folder / "tokenizer.json", lambda f: f["model"].update(merges=[" ".join(m) for m in f["model"]["merges"]]))


def further_tokens(folder):
    """Added tokens with flags, not all special, in both files."""
    more = {"<tool>": {}, "e\u0301z": {"normalized": True}, "日本": {"single_word": True}, "<y>": {"lstrip": True}}
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) + len(TOKENS)
    added = {str(size + i): PLAIN | {"content": t, "special": False} | f for i, (t, f) in enumerate(more.items())}
    edit(folder / "tokenizer_config.json", lambda config: config["added_tokens_decoder"].update(added))
    listed = [token | {"id": int(i)} for i, token in added.items()]
    edit(folder / "tokenizer.json", lambda fast: fast["added_tokens"].extend(listed))


LAYOUTS = (None, without_decoder, only_fast, of_five, backend_class, old_merges, further_tokens)


# ---------------------------------------------------------------- as transformers


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__ if layout else "published")
def test_a_thousand_texts_have_the_ids_and_texts_of_transformers(folder, layout):
    if layout:
        layout(folder)
    oracle, ours = theirs(folder), open_tokenizer(folder)
    assert isinstance(ours, ByteLevelTokenizer) and len(oracle) == ours.size + len(ours.added)
    assert type(oracle).__name__ == ("TokenizersBackend" if layout is backend_class else "Qwen2Tokenizer")
    for _ in range(1000):
        text = random_text() + random.choice(("", "<tool>", " 日本 ", "e\u0301z", "a <y>"))
        ids = oracle.encode(text)
        assert ours.encode(text) == ours.encode(text, follows=True) == ids, ascii(text)
        ids = ids + random.choices(range(len(oracle)), k=6)
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True), ascii(text)


def test_ids_below_the_added_tokens_can_be_filled(tmp_path):
    """As in a checkpoint with the shape of a published one: `<image>` has its id there."""
    write_byte_level(tmp_path, ["the picture shows a red circle"] * 3, 300, first=151643)
    oracle, ours = theirs(tmp_path), open_tokenizer(tmp_path)
    assert ours.added == dict(zip(TOKENS, range(151643, 151648), strict=True)) and ours.size == 151643
    assert ours.unreachable_ids(152000) == list(range(151648, 152000)) and ours.eos_id == 151645
    for text in (random_text() for _ in range(20)):
        ids = ours.encode(text)
        assert ids == oracle.encode(text) and all(i < 300 or i >= 151643 for i in ids)


def tokens_of(config):
    return config["added_tokens_decoder"].values()


def steps(fast):
    return fast["pre_tokenizer"]["pretokenizers"]


def hole(fast):
    """Remove the piece 7."""
    vocabulary = {piece: i for piece, i in fast["model"]["vocab"].items() if i != 7}
    fast["model"] |= {"vocab": vocabulary, "merges": []}


def one_more(fast):
    fast["added_tokens"].append({"content": "<z>", "id": fast["added_tokens"][-1]["id"] + 1, **PLAIN})


def starts(fast):
    """A post-processor that begins every prompt with <|im_end|>."""
    text, pair = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    first = {"<|im_end|>": {"id": "<|im_end|>", "ids": [502], "tokens": ["<|im_end|>"]}}
    single = [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, text]
    rule = {"type": "TemplateProcessing", "single": single, "pair": [text, pair], "special_tokens": first}
    fast["post_processor"] = rule


CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PAD = {"strategy": {"Fixed": 30}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
NFC = {"type": "NFC"}
# Changes of each file. They leave a folder that transformers reads, perhaps differently by the class that it chooses
CONFIG = {
    "prefix": lambda c: c.update(add_prefix_space=True),
    "split special": lambda c: c.update(split_special_tokens=True),
    "class": lambda c: c.update(tokenizer_class="PreTrainedTokenizerFast"),
    "no class": lambda c: c.pop("tokenizer_class") and None,
    "GPT-2": lambda c: c.update(tokenizer_class="GPT2Tokenizer"),
    "unknown name": lambda c: c.update(unk_token="<unknown>"),
    "no names": lambda c: {key: value for key, value in c.items() if not key.endswith("_token")},
    "BOS": lambda c: c.update(bos_token="<|endoftext|>", add_bos_token=True),
    "named piece": lambda c: c.update(pad_token="the"),
    "extra": lambda c: c.update(extra_special_tokens={"image_token": "<image>"}),
    "more extra": lambda c: c.update(additional_special_tokens=["<|new|>"]),
    "fewer": lambda c: c["added_tokens_decoder"].popitem() and None,
    "flag there": lambda c: next(iter(tokens_of(c))).update(lstrip=True),
    "not special there": lambda c: [token.update(special=False) for token in tokens_of(c)] and None,
    "no decoder": lambda c: c.pop("added_tokens_decoder") and None,
}
FAST = {
    "flag here": lambda f: f["added_tokens"][3].update(rstrip=True),
    "not special here": lambda f: [token.update(special=False) for token in f["added_tokens"]] and None,
    "normalized": lambda f: f["added_tokens"][1].update(normalized=True),
    "no tokens here": lambda f: f.update(added_tokens=[]),
    "one more here": one_more,
    "BOS here": starts,
    "no post-processor": lambda f: f.update(post_processor=None),
    "NFKC": lambda f: f.update(normalizer={"type": "NFKC"}),
    "no normalizer": lambda f: f.update(normalizer=None),
    "normalizers": lambda f: f.update(normalizer={"type": "Sequence", "normalizers": [NFC]}),
    "prefix here": lambda f: steps(f)[1].update(add_prefix_space=True),
    "digits in threes": lambda f: steps(f)[0].update(pattern={"Regex": r"\p{N}{1,3}"}),
    "no decoder here": lambda f: f.update(decoder=None),
    "ignores merges": lambda f: f["model"].update(ignore_merges=True),
    "suffix": lambda f: f["model"].update(end_of_word_suffix="x", merges=[]),
    "truncation": lambda f: f.update(truncation=CUT),
    "padding": lambda f: f.update(padding=PAD | {"pad_token": "!"}),
    "no piece 7": hole,
}
NAMES = {
    "more names": lambda n: n.update(cls_token="<image>", eos_token={"content": "<video>"} | PLAIN),
    "names with flags": lambda n: n.update(eos_token={"content": "<|im_end|>", "lstrip": True}),
}
CHANGES = {
    **{name: ("tokenizer_config.json", change) for name, change in CONFIG.items()},
    **{name: ("tokenizer.json", change) for name, change in FAST.items()},
    **{name: ("special_tokens_map.json", change) for name, change in NAMES.items()},
    "other ids": ("added_tokens.json", lambda added: {text: i + 1 for text, i in added.items()}),
}
ACCEPTED = {
    "class", "no class", "no names", "BOS", "extra", "no decoder", "no tokens here", "no post-processor", "normalizers",
    "truncation", "padding", "other ids", "more names", "names with flags",
}  # fmt: skip


def same_or_refused(folder, kind):
    """Whether the folder is read. If so, ids and texts are those of transformers for a config.json of this kind."""
    try:
        ours = open_tokenizer(folder)
    except InputError:
        refusal(open_tokenizer, folder)
        return False
    oracle = theirs(folder, kind)
    assert len(oracle) == ours.size + len(set(ours.added.values()) - set(range(ours.size)))
    if "eos_token" in json.loads((folder / "tokenizer_config.json").read_text()):
        assert ours.eos_id == oracle.eos_token_id
    for text in (random_text() + "a <image> b<z>" for _ in range(30)):
        ids = oracle.encode(text)
        assert ours.encode(text) == ids, ascii(text)
        ids = ids + random.choices(range(len(oracle)), k=6)
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True), ascii(text)
    return True


@pytest.mark.parametrize("kind", ["llava_onevision", "llava_next"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_files_are_read_as_by_transformers_or_refused(folder, change, kind):
    """Whichever class transformers chooses: Qwen2Tokenizer for llava_onevision, TokenizersBackend for llava_next."""
    edit(folder / CHANGES[change][0], CHANGES[change][1])
    assert same_or_refused(folder, kind) == (change in ACCEPTED)


@pytest.mark.parametrize("seed", range(30))
def test_files_with_several_changes_are_read_as_by_transformers_or_refused(folder, seed):
    for name in random.sample(sorted(ACCEPTED | {"fewer", "not special here"}), 3):
        with contextlib.suppress(KeyError, IndexError):  # a change before this one removed what it changes
            edit(folder / CHANGES[name][0], CHANGES[name][1])
    same_or_refused(folder, random.choice(["llava_onevision", "llava_next"]))


def test_without_the_package_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert refusal(open_tokenizer, folder).endswith("; pip install tokenizers")


def test_a_tokenizer_model_counts_before_tokenizer_json(folder, tokenizer_folder):
    assert isinstance(open_tokenizer(tokenizer_folder()), Tokenizer)
    shutil.copy(tokenizer_folder() / "tokenizer.model", folder)
    assert "'<|endoftext|>' has the id 500 instead of" in refusal(open_tokenizer, folder)  # files of two tokenizers


@pytest.mark.parametrize("broken", [{"merges": [["a"]]}, {"vocab": [1]}, {"merges": None}], ids=str)
def test_a_malformed_tokenizer_json_is_refused(folder, broken):
    edit(folder / "tokenizer.json", lambda fast: fast["model"].update(broken))
    assert "does not make sense" in refusal(open_tokenizer, folder)


# ---------------------------------------------------------------- decoding

VOCAB = 512  # rows of the embedding: pieces, added tokens, padding
ANY_IDS = st.lists(st.integers(0, VOCAB + 3), max_size=24)
BYTE_IDS = st.lists(st.integers(0, 255), max_size=12)  # mostly invalid UTF-8
CHARACTERS = st.text(st.sampled_from("aé😀日 ½\u200d\n.👍🏽"), max_size=12)


@settings(max_examples=300)
@given(ids=st.one_of(ANY_IDS, BYTE_IDS, st.tuples(BYTE_IDS, ANY_IDS).map(lambda two: two[0] + two[1])))
def test_streamed_pieces_join_to_the_decoding_of_the_library_whatever_the_ids(byte_level_dir, ids):
    from tokenizers import Tokenizer as Library

    tokenizer = ByteLevelTokenizer(byte_level_dir)
    stream = tokenizer.stream()
    pieces = [*map(stream.push, ids), stream.flush()]
    whole = Library.from_file(str(byte_level_dir / "tokenizer.json")).decode(ids, skip_special_tokens=True)
    assert "".join(pieces) == tokenizer.decode(ids) == whole
    for i in range(len(pieces)):  # what is shown stays: a later id never changes it
        assert whole.startswith("".join(pieces[:i]))


@settings(max_examples=200)
@given(text=CHARACTERS)
def test_streaming_never_shows_half_a_character(byte_level_dir, text):
    tokenizer, shown = ByteLevelTokenizer(byte_level_dir), ""
    stream = tokenizer.stream()
    for i in tokenizer.encode(text):
        shown += stream.push(i)
        assert text.startswith(shown)  # always a prefix of the final text, so never U+FFFD
    assert shown == text and stream.flush() == ""


def test_text_is_shown_as_soon_as_it_is_certain(byte_level_dir):
    tokenizer = ByteLevelTokenizer(byte_level_dir)
    a, kiss, end = tokenizer.encode("a"), tokenizer.encode("💋"), tokenizer.encode("<|im_end|>")
    stream = tokenizer.stream()
    assert [stream.push(i) for i in a + kiss + end] == ["a"] + [""] * (len(kiss) - 1) + ["💋", ""] and len(kiss) > 1
    assert [stream.push(i) for i in kiss[:-1]] == [""] * (len(kiss) - 1) and stream.flush() == "\ufffd"


# ---------------------------------------------------------------- in a checkpoint


@pytest.fixture
def checkpoint(make_checkpoint, byte_level_dir, tmp_path):
    """A random LLaVA-1.5 with this tokenizer."""
    ids = ByteLevelTokenizer(byte_level_dir)
    make_checkpoint(tmp_path, TEXT | {"vocab_size": VOCAB}, top={"image_token_index": ids.added["<image>"]})
    (tmp_path / "tokenizer.model").unlink()
    shutil.copytree(byte_level_dir, tmp_path, dirs_exist_ok=True)
    return load(tmp_path)


def test_a_checkpoint_answers_in_turns_and_stops_at_im_end(checkpoint):
    added, size = checkpoint.tokenizer.added, checkpoint.tokenizer.size
    assert checkpoint.stop_ids == (added["<|im_end|>"],)
    never = {added["<image>"], added["<video>"], *range(size + len(TOKENS), VOCAB)}
    assert set(checkpoint.never_ids) == never
    first = Generation(checkpoint, "what is this?", sampling=Sampling(12), template="chatml")
    assert "".join(first) == first.text == checkpoint.tokenizer.decode(first.token_ids)
    second = Generation(checkpoint, "how many?", sampling=Sampling(3), before=first)
    between = build_prompt("how many?", 0, "chatml", follows=True)
    assert second.ids == first.ids + first.token_ids + checkpoint.tokenizer.encode(between)
    assert second.ids[-len(between) :].count(added["<|im_end|>"]) >= 2  # ends the answer and the question


@pytest.mark.parametrize("template", ["onevision", "chatml"])
def test_text_that_follows_has_the_ids_that_it_has_inside_the_whole(byte_level_dir, template):
    tokenizer = ByteLevelTokenizer(byte_level_dir)
    for answer in ("four", "four ", "", "four.\n", "e"):
        before, after = build_prompt("so?", 1, template) + answer, build_prompt("and?", 0, template, follows=True)
        assert tokenizer.encode(before) + tokenizer.encode(after, follows=True) == tokenizer.encode(before + after)


# ---------------------------------------------------------------- golden ids

SYSTEM_PROMPT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
SYSTEM_IDS = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]
PICTURE_PROMPT = "<|im_start|>user <image>\nWhat is the content of this image?<|im_end|><|im_start|>assistant\n"
PICTURE_IDS = [151644, 872, 220, 151646, 198, 3838, 374, 279, 2213, 315, 419, 2168, 30, 151645, 151644, 77091, 198]


def show_tokenizer(ids, size=151643, image=151646):
    """verify_checkpoint's output for a tokenizer that returns these ids: {prompt: ids}."""
    tokenizer = namedtuple("tokenizer", "kind size bos_id add_bos added encode")
    shown = tokenizer("byte-level BPE", size, -1, False, {"<image>": image}, ids.get)
    verify_checkpoint.show_tokenizer(shown, 151646)


def test_golden_ids_are_recognised(capsys):
    known = {SYSTEM_PROMPT: SYSTEM_IDS, PICTURE_PROMPT: PICTURE_IDS}
    other = known | {PICTURE_PROMPT: [151700 if i == 151646 else i for i in PICTURE_IDS]}
    for arguments, words in (
        ((known,), "151643 byte-level BPE pieces, BOS not added"),
        ((known,), "match: Qwen2's ids of 2 prompts"),
        ((other, 151643, 151700), "<image> is 151700 (config.json says 151646; the tokenizer decides)"),
        (({}, 500), "not Qwen2's vocabulary (500 pieces, not 151643): no golden ids"),
    ):
        show_tokenizer(*arguments)
        out = capsys.readouterr().out
        assert words in out and ("match: " in out) == (arguments[0] != {})
    for prompt, wrong in ((SYSTEM_PROMPT, SYSTEM_IDS[:-1]), (PICTURE_PROMPT, [*PICTURE_IDS[:2], 7, *PICTURE_IDS[3:]])):
        with pytest.raises(InputError, match="Qwen2's size but other ids .*; "):
            show_tokenizer(known | {prompt: wrong})
