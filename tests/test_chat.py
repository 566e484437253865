"""Conversations: later turns in the cache of the earlier ones, and run.py without --prompt as a person meets it."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal, write_json
from safetensors.torch import save_file
from test_parity import noise
from test_tokenizer import CHAT_TEMPLATES, PREPEND

from model import Checkpoint, Generation, Sampling, load
from model.fast import FastStep
from model.llama import DecoderLayer
from model.tokenizer import TEMPLATES, Tokenizer, build_prompt
from tests.paths import DEMO_PICTURE, ROOT
from tests.terminal import Terminal

COUNT, SIGN = "How many objects are there?", "What does the sign say?"
FOUR, NET = "The picture has four objects.\n", "The sign says NET.\n"
PAIR = ROOT / "assets" / "pair-a.png"
DROPPED = "70 % of the vision tokens were dropped for an earlier question; /fresh"


# ---------------------------------------------------------------- prompts of later turns


def test_a_later_turn_of_each_template_is_this_string():
    later = {name: build_prompt("Why?", 1, name, system="Never again.", follows=True) for name in TEMPLATES}
    assert later == {
        "llava": " USER: <image>\nWhy? ASSISTANT:",
        "vicuna": "</s>USER: <image>\nWhy? ASSISTANT:",
        "llava_v1": "</s>USER: <image>\nWhy? ASSISTANT:",
        "mistral": "</s> [INST] <image>\nWhy? [/INST]",
        "onevision": "<|im_end|><|im_start|>user <image>\nWhy?<|im_end|><|im_start|>assistant\n",
        "chatml": "<|im_end|>\n<|im_start|>user\n<image>\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "raw": "<image>\nWhy?",
    }


@pytest.mark.parametrize("name", ["llava", "llava, unmarked", "mistral", "demo"])
def test_three_turns_are_what_the_published_chat_template_renders(name):
    pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def message(role, text, pictures=0):
        return {"role": role, "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}

    text, family = CHAT_TEMPLATES[name]
    messages = [message("user", "Why?", 1), message("assistant", "So."), message("user", "And this?", 2)]
    messages += [message("assistant", "Like that."), message("user", "Thanks?")]
    rendered = _compile_jinja_template(text).render(messages=messages, add_generation_prompt=True)
    if name == "demo":  # its own puts the end token behind an answer, where the family's has a space
        rendered = rendered.replace("</s>", " ")
    ours = build_prompt("Why?", 1, family) + " So." + build_prompt("And this?", 2, family, follows=True)
    assert ours + " Like that." + build_prompt("Thanks?", 0, family, follows=True) == rendered


@pytest.mark.parametrize("settings", [{"legacy": True}, {"legacy": False}, "prepend"], ids=str)
def test_text_that_follows_has_the_ids_that_it_has_inside_the_whole(tokenizer_folder, settings):
    folder = tokenizer_folder(**({"legacy": False} if settings == "prepend" else settings))
    if settings == "prepend":
        write_json(folder / "tokenizer.json", PREPEND)
    tokenizer, before = Tokenizer(folder), "USER: <image>\nhow many circles? ASSISTANT: four."
    for between in ("</s>USER: two?", " USER: two <image>\n circles?", "</s> [INST] <image>\n<image>\nq", "\nx", ""):
        assert tokenizer.encode(before) + tokenizer.encode(between, follows=True) == tokenizer.encode(before + between)


# ---------------------------------------------------------------- turns in one cache


@pytest.fixture(scope="module")
def without_end(make_checkpoint, tmp_path_factory):
    """Function (context in tokens) -> a checkpoint of random weights that never ends an answer by itself."""

    def make(context):
        folder = tmp_path_factory.mktemp("tiny")
        tensors = make_checkpoint(folder, text={"max_position_embeddings": context}, seed=3)
        tensors["language_model.lm_head.weight"][2] = 0  # of 448 random logits the best is above this one's
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture(scope="module")
def tiny_folder(without_end):
    """4 tokens per picture."""
    return without_end(512)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load(tiny_folder, "fp32")


@torch.inference_mode()
def of_one_prompt(asked, count):
    """Greedy ids behind asked.ids as one prompt: no cache, a whole pass for each."""
    model, device = asked.checkpoint.model, asked.checkpoint.device
    tokens, ids, new = asked.encode_images(), asked.ids, []
    never = torch.tensor(asked.checkpoint.never_ids, dtype=torch.long, device=device)
    while len(new) < count:
        x, _ = model.splice(ids + new, tokens)
        logits = model.language_model.logits(model.language_model.prefill(x[None])[0, -1])
        new.append(logits.index_fill(0, never, float("-inf")).argmax().item())
    return new


def answered(checkpoint, *question, limit=5, cancel=None, **options):
    """An answer of at most so many tokens, or one that is stopped after `cancel` of them."""
    asked = Generation(checkpoint, *question, sampling=Sampling(limit if cancel is None else 50), **options)
    for _ in asked:
        asked.cancelled = cancel is not None and len(asked.token_ids) >= cancel
    return asked


@pytest.mark.parametrize("way", ["length", "stop id", "cancelled"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_turns_give_the_ids_of_one_prompt_of_the_same_ids(tiny, template, way):
    """Three turns, pictures in the first and the last, however the answers before ended; arenas move at each turn."""
    question = "what <image> is this?", noise(40, 30)
    if way == "stop id":
        tiny = replace(tiny, stop_ids=(answered(tiny, *question, template=template).token_ids[3],))
    cancel = 3 if way == "cancelled" else None
    first = answered(tiny, *question, template=template, cancel=cancel)
    reason, unfed = {"length": ("length", 1), "stop id": ("stop", 0), "cancelled": ("interrupted", 1)}[way]
    assert first.finish_reason == reason and len(first.unfed) == unfed and 0 < len(first.token_ids) < 10
    second = answered(tiny, "how many?", before=first, cancel=cancel)
    between = tiny.tokenizer.encode(build_prompt("how many?", 0, template, follows=True), follows=True)
    assert second.ids == first.ids + first.token_ids + between and second.template == template
    cache, past = second.cache, int(second.cache.pos[0])
    third = answered(tiny, "red?", [noise(30, 50, seed=1), noise(28, 28, seed=2)], limit=12, before=second)
    assert third.cache is cache and second.cache is None
    said = third.token_ids + [*tiny.stop_ids] * (third.finish_reason == "stop")
    assert said == of_one_prompt(third, len(said)) and third.ids[: len(second.ids)] == second.ids
    assert int(cache.pos[0]) == third.prompt_tokens + len(said) - 1 > past
    assert cache.kv_len.unique().tolist() == [int(cache.pos[0])]
    assert third.vision_tokens == 12 and len(third.images) == 3 and third.kept == [12.0] * 2
    places = [i for i, token in enumerate(third.ids) if token == tiny.config.image_token_index]
    assert third.spans == [(i + 3 * n, i + 3 * n + 4) for n, i in enumerate(places)]


def test_a_cache_that_has_moved_on_is_not_fed_again(tiny):
    """It was interrupted between the question and the first token of the answer: the question is in the cache."""
    first = answered(tiny, "what?", noise(40, 30))
    cache = first.cache
    lost = Generation(tiny, "how many?", before=first)
    with torch.inference_mode():
        lost.prefill()
    first.cache = cache
    assert not first.goes_on
    second = answered(tiny, "red?", limit=8, before=first)  # processes everything again
    assert second.token_ids == of_one_prompt(second, 8) and second.cache is not cache and second.kept == [4.0] * 2


def test_tiles_may_come_in_a_later_turn(make_checkpoint, tmp_path):
    in_tiles = {"model_type": "llava_next", "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
    make_checkpoint(tmp_path, top=in_tiles)
    checkpoint = replace(load(tmp_path, "fp32"), stop_ids=())
    first = answered(checkpoint, "what?", noise(60, 20))
    second = answered(checkpoint, "and <image>?", noise(20, 70, seed=1), limit=8, before=first)
    assert second.token_ids == of_one_prompt(second, 8) and second.images[1]["tiles"] > 1
    assert [stop - start for start, stop in second.spans] == [image["tokens"] for image in second.images]


def test_what_was_dropped_stays_dropped_and_is_counted(demo):
    options = {"prune": "random:retention=0.3", "remember": True}
    first = answered(demo, COUNT, DEMO_PICTURE, **options)
    masks, past = first.masks, first.masks.shape[2]
    second = answered(demo, SIGN, [PAIR], before=first, **options)
    assert second.kept == [77 + 256.0] * 6 and abs(second.retention - 333 / 512) < 1e-9
    assert second.timing["prune"] == 0
    assert second.cache.kv_len.unique().tolist() == [int(second.cache.pos[0]) - (256 - 77)]
    assert torch.equal(second.masks[..., :past], masks) and second.masks[..., past:].all()
    assert second.masks.shape[2] == second.prompt_tokens
    again = second.again(None)
    "".join(again)
    assert again.retention == 1 and again.ids == second.ids


def turn_tokens(checkpoint, question):
    """Tokens of a later turn in the template of the tiny checkpoint."""
    return len(checkpoint.tokenizer.encode(f" USER: {question} ASSISTANT:", follows=True))


def test_what_cannot_follow_is_refused(tiny, demo):
    first = answered(tiny, "what?")
    assert "one checkpoint" in refusal(Generation, demo, "a?", before=first)
    assert "before is 'x'" in refusal(Generation, tiny, "a?", before="x")
    message, needed = refusal(Generation, tiny, "a " * 600, before=first), turn_tokens(tiny, "a " * 600)
    room = 512 - first.prompt_tokens - 5
    assert f"needs {needed} tokens, " in message and f"room for {room} of its 512; " in message and "/clear" in message
    assert first.goes_on  # and it can still be followed


def test_the_context_is_filled_to_its_last_token(tiny):
    first = answered(tiny, "what?")
    one, two = turn_tokens(tiny, "a"), turn_tokens(tiny, "a a")
    left = 512 - first.prompt_tokens - 5 - 3  # three for the answer
    question = " ".join(["a"] * (1 + (left - one) // (two - one)))
    second = answered(tiny, question, limit=50, before=first)
    assert second.finish_reason == "length" and 3 <= len(second.token_ids) == second.context_left < 6
    assert second.prompt_tokens + len(second.token_ids) == 512
    assert "room for 0 of its 512" in refusal(Generation, tiny, "b", before=second)
    assert two == one + 1  # the tokens of another "a"
    left = first.context_left - len(first.token_ids) - one
    assert Generation(tiny, "a" + " a" * (left - 1), before=first).context_left == 1
    assert "needs" in refusal(Generation, tiny, "a" + " a" * left, before=first)


# ---------------------------------------------------------------- commands, in this process


@pytest.fixture
def talk(cli, monkeypatch):
    """Function (lines, flags): a conversation on a terminal, with stdout in a file -> (exit code, stdout, stderr).

    An exception among the lines is raised where it would be typed; after the last line comes Ctrl-D.
    """

    def talk(lines, *flags):
        typed = iter([*lines, EOFError()])

        def readline():
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line + "\n"

        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=readline))
        monkeypatch.setattr("model.report.measure_bandwidth", lambda device: 1e9)  # which takes a second
        code, out, err = cli(*flags, "--device", "cpu")
        return code, out, re.sub("^(> )+", "", err, flags=re.M)  # without the prompts

    return talk


def test_questions_follow_each_other_and_pruning_is_said(talk):
    lines = [COUNT, SIGN, "/prune random", "/retention 0.3", COUNT, COUNT, COUNT, "/fresh", COUNT, "/fresh", "/show"]
    code, out, err = talk(lines, "--image", DEMO_PICTURE)
    assert code == 0 and out.startswith(FOUR + NET + FOUR) and out.count("\n") == 6
    assert "from the next question on: random, retention 0.3" in err
    assert err.count("processed again, because the pruning has changed") == 1 and err.count(DROPPED) == 1
    assert err.count("processed again, as /fresh asks") == 1
    assert err.index("pruning has changed") < err.index(DROPPED) < err.index("as /fresh asks")
    assert "of 256, layer by layer: 77 77 77 77 77 77\n" in err and "draws them" in err


def test_the_method_of_the_flags_holds_and_new_pictures_are_pruned(talk):
    flags = "--image", DEMO_PICTURE, "--prune", "random:seed=5", "--retention", "0.5"
    lines = [COUNT, "/retention 0.25", COUNT, f"/image {PAIR}", SIGN, "/show", "/prune none", SIGN]
    code, out, err = talk([*lines, "/show", "/retention 0.5"], *flags)
    assert code == 0 and out.count("\n") == 4
    assert "of 512, layer by layer: 128 128" in err and "so that random can prune the new pictures" in err
    assert "of 512, layer by layer: 512 512" in err and "no pruning" in err
    assert err.rstrip().endswith("no pruning method is set; give /prune METHOD first")


def test_the_same_method_again_is_no_change_and_the_one_in_use_is_shown(talk):
    """Nor is the one that is set before the first question."""
    spec = "/prune random:retention=0.3"
    _, _, err = talk([spec, COUNT, spec, "/retention 0.3", COUNT, "/prune", "/retention"], "--image", DEMO_PICTURE)
    assert "processed again" not in err and err.count("as before: random, retention 0.3\n") == 2
    assert err.count("in use: random, retention 0.3\n") == 2
    _, _, err = talk(["/prune", "/prune none", COUNT, "/prune none", COUNT], "--image", DEMO_PICTURE)
    assert "in use: no pruning\n" in err and "processed again" not in err


def test_pictures_are_added_and_taken_back(talk, tmp_path, monkeypatch, tiny_folder):
    """A path with spaces needs no quotes if it is the only one; one that is added twice is noted."""
    monkeypatch.chdir(tmp_path)
    for name in ("a b.png", "c.png"):
        noise(9, 9).save(name)
    lines = ["/image a b.png", "/image 'a b.png' c.png", "/image -", "what <image><image>?", "/show"]
    _, out, err = talk([*lines, "/image c.png", "/image -", "/image -"], "--model", tiny_folder, "-n", "3")
    assert re.findall("^(?:pictures for the next question: |note: (?=a)|error: )(.*)", err, re.M) == [
        "a b.png", "a b.png, a b.png, c.png",
        "a b.png was added more than once; /image - takes the last picture back", "a b.png, a b.png",
        "c.png; the earlier ones stay (without them: /clear all, then /image)", "none",
        "no picture waits for the next question; /image PATH adds one",
    ]  # fmt: skip
    assert out.count("\n") == 1 and "of 8, layer by layer: 8 8" in err
    assert "cut after 3 tokens; --max-new-tokens " in err


def test_mistakes_are_one_line_each_and_the_conversation_goes_on(talk, tiny_folder, tmp_path):
    (tmp_path / "no picture.png").write_bytes(b"text")
    utf8 = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    wrong = [
        "/", "/nope x", "/image", "/image /nowhere/x.png", f"/image '{tmp_path}/no picture.png'", "/image 'a",
        f"/image {tmp_path}/no picture.png", "/image a\0b", "/image - -", "/prune plphp:alpha=x", "/clear nothing",
        "/prune fastv:layer=99", "/retention 0.5", "/show", "/stats", "a" * 3000, "<image>?", "\udcff", utf8,
    ]  # fmt: skip
    lines = [*wrong, "  ", "", "what?", "/show", "/prune random", "/retention x", "/retention 1.5"]
    code, out, err = talk(lines, "--model", tiny_folder, "-n", "3")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out.count("\n")) == (0, 1) and len(errors) == len(wrong) + 3 and "Traceback" not in err
    assert all(";" in line or "," in line for line in errors), errors
    places = "the question has 1 <image>, and the number of new pictures is 0; add pictures with /image PATH, or leave"
    for words in ("no command /nope", "no picture at /nowhere", "UTF-8", "quotes", "the terminal", "/clear nothing"):
        assert words in err
    assert "no picture; add" in err and places in err


def test_retention_holds_for_every_method_that_follows(talk):
    """Except one whose SPEC sets its own budget, which is said."""
    lines = ["/retention 0.3", "/prune topk", "/prune random:keep_tokens=9", "/prune none", "/prune plphp:r=0.2"]
    _, _, err = talk([*lines, "/prune grid"], "--prune", "random:retention=0.9")
    without_effect = "retention 0.3 has no effect, because SPEC sets its own budget"
    assert re.findall(r"^(?:from the next question on: |note: (?=retention))(.*)", err, re.MULTILINE) == [
        "random, retention 0.3", "topk, retention 0.3", "random, keep_tokens 9", without_effect, "no pruning",
        "plphp, r 0.2", without_effect, "grid, retention 0.3",
    ]  # fmt: skip
    _, _, err = talk(["/prune topk:window=4", "/retention 0.4", "/prune grid"], "--prune", "grid", "--keep-tokens", "7")
    assert "topk, keep_tokens 7\n" in err and "topk, retention 0.4\n" in err and "grid, retention 0.4\n" in err


def test_retention_leaves_the_other_settings(talk):
    lines = ["/prune random:seed=5,keep_tokens=9", "/retention 0.4", COUNT, "/prune random:seed=5,retention=0.4", COUNT]
    _, out, _ = talk([*lines, "/prune random:seed=6,retention=0.4", COUNT], "--image", DEMO_PICTURE, "--json")
    kept = [json.loads(line)["prune"] for line in out.splitlines()]
    assert kept[0]["settings"] == kept[1]["settings"] != kept[2]["settings"]


def test_the_file_of_settings_is_named_once_for_each_change_of_method(talk):
    lines = ["/retention 0.3", COUNT, "/prune plphp", "/retention 0.4", "/prune topk", "/prune plphp", COUNT]
    _, _, err = talk(lines, "--image", DEMO_PICTURE, "--prune", "plphp")
    assert err.count("uses the settings in") == 2
    assert err.rindex("uses the settings in") < err.rindex("from the next question on: plphp, retention 0.4\n")


@pytest.mark.parametrize(
    ("flags", "said"), [((), "interrupted"), (("--prompt", "a?"), "interrupted; nothing was written")]
)
def test_ctrl_c_while_the_model_is_loading(talk, failing, flags, said):
    failing(Checkpoint, "read_weights", KeyboardInterrupt())
    assert talk([], *flags) == (130, "", f"error: {said}\n")


def test_clear_forgets_the_conversation_and_clear_all_its_pictures_too(talk):
    """Two pictures stay: one that was asked about, one still to be asked about."""
    lines = [COUNT, f"/image {PAIR}", "/CLEAR", COUNT, "/show", "/clear all", "/stats", f"/image {DEMO_PICTURE}"]
    code, out, err = talk([*lines, SIGN, "/stats"], "--image", DEMO_PICTURE)
    assert code == 0 and out.startswith(FOUR) and out.endswith(NET) and out.count("\n") == 3
    assert f"Ask a question about {DEMO_PICTURE}; /image PATH" in err
    assert f"new conversation about {DEMO_PICTURE}, {PAIR}\n" in err and "a KV head keeps, of 512" in err
    assert "new conversation, without pictures" in err and "no answer to report on" in err
    assert "1 picture, 256 vision tokens" in err


def test_the_note_about_a_missing_picture_comes_again_when_the_last_one_goes(talk):
    add = f"/image {DEMO_PICTURE}"
    lines = ["/clear all", add, COUNT, "/clear", "/clear all", "/clear all", add, add, "/image -", "/image -"]
    _, _, err = talk(lines)
    assert re.findall("new conversation, |for the next question: none|note: there is no picture", err) == [
        "note: there is no picture", "new conversation, ",
        "new conversation, ", "note: there is no picture", "new conversation, ",
        "for the next question: none", "note: there is no picture",
    ]  # fmt: skip


def test_a_file_is_no_question_and_no_command(talk):
    """Nor are words that name a command."""
    picture = f"'{DEMO_PICTURE}'"  # as a file manager drops it
    lines = [str(DEMO_PICTURE), f" {picture} ", DEMO_PICTURE.as_uri(), "quit", " help ", "exit"]
    code, out, err = talk([*lines, " /image " + picture, SIGN, "/help", "http://x.y", "http://x.y or z?"])
    assert code == 0 and out.startswith(NET) and err.count("commands begin with a slash") == 3
    assert out.count("\n") == 2 and err.count("nothing is downloaded") == 1
    assert err.count("is a file; add it as a picture with /image ") == 3 and "no command" not in err
    assert "/quit            leave" in err


def test_fresh_may_say_on_or_off(talk):
    _, _, err = talk(["/fresh on", "/fresh on", "/fresh off", "/fresh off", "/fresh", "/fresh", "/fresh of"])
    said = re.findall("each question (processes the whole conversation again|reuses the cache)", err)
    assert [words.startswith("processes") for words in said] == [True, True, False, False, True, False]
    assert err.rstrip().endswith("error: /fresh of is unknown; give /fresh on or /fresh off")


def test_show_draws_what_was_kept_and_for_which_question(talk, tmp_path, monkeypatch):
    """Of a later turn that is what the first question kept."""
    monkeypatch.chdir(tmp_path)
    lines = [COUNT, "/show a.png", SIGN, "/show later.html", "/prune none", SIGN, COUNT, "/show all.html"]
    wrong = ["/show nowhere/a.png", "/show x.gif", f"/show {DEMO_PICTURE}"]
    code, _, err = talk([*lines, *wrong], "--image", DEMO_PICTURE, "--prune", "topk", "--retention", "0.25")
    assert code == 0 and (tmp_path / "a.png").stat().st_size > 10_000
    assert err.count("which vision tokens each head kept") == 3 and err.count("layer by layer") == 3
    for words in ("nowhere/a.png cannot be written", "give a name that ends in .png or .html", "which this run reads"):
        assert re.search(f"^error: .*{words}", err, re.M)
    later, everything = ((tmp_path / name).read_text() for name in ("later.html", "all.html"))
    assert "25.0 %" in later and f"{COUNT} (asked later: {SIGN})" in later
    assert "asked later" not in everything and COUNT in everything and DEMO_PICTURE.stat().st_size > 1000


def test_stats_of_a_later_turn_count_only_what_it_read(talk):
    lines = [COUNT, "/stats", SIGN, "/stats", "/prune none", SIGN, f"/image {PAIR}", SIGN, "/stats"]
    _, _, err = talk(lines, "--image", DEMO_PICTURE, "--prune", "random", "--retention", "0.5")
    tables = err.split("load  ")[1:]
    done = [re.findall("^(vision|pruning) ", table, re.MULTILINE) for table in tables]
    assert done == [["vision", "pruning"], [], ["vision"]] and "1 picture, 256 vision tokens" in tables[2]
    first, second, _ = re.findall(r"^prefill .* ms  (.*) prompt tokens", err, re.MULTILINE)
    new, whole = map(int, second.split(" new of "))
    assert int(first) > 256 and whole > int(first) and 0 < new < 40


def test_each_turn_draws_its_own_numbers_and_the_seed_repeats_them(talk, tiny_folder, monkeypatch):
    flags = "--model", tiny_folder, "--temperature", "5", "--seed", "9", "-n", "12", "--template", "raw"
    first, again, other = (talk(["what?", "what?"], *flags, *more)[1] for more in ([], [], ["--seed", "8"]))
    assert first == again != other
    chosen, draw = [], torch.Tensor.exponential_

    def noted(tensor, *, generator):
        chosen.append(generator.initial_seed())
        return draw(tensor, generator=generator)

    monkeypatch.setattr(torch.Tensor, "exponential_", noted)
    talk(["what?", "what?", "/clear", "what?"], *flags, "--seed", 2**64 - 1)
    assert list(dict.fromkeys(chosen)) == [2**64 - 1, 0] and chosen[-1] == 2**64 - 1


def test_json_stop_system_and_no_stream_work_in_a_conversation(talk):
    code, out, err = talk([COUNT, SIGN], "--image", DEMO_PICTURE, "--json", "--stop", " objects")
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and first["text"] == "The picture has four" and second["text"] == "The sign says NET."
    assert second["prompt_tokens"] > first["prompt_tokens"] + first["new_tokens"] and second["vision_tokens"] == 256
    _, out, err = talk([COUNT], "--image", DEMO_PICTURE, "--no-stream", "--system", "Be brief.", "--stats")
    assert out == FOUR and "decode" in err


def interrupting(monkeypatch, owner, name, times=1):
    """Ctrl-C is pressed, so many times, at the third call of a function."""
    function, calls = getattr(owner, name), []

    def pressed(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, pressed)


@pytest.mark.parametrize("turn", [1, 2])
def test_ctrl_c_while_a_question_is_read_takes_it_back(talk, monkeypatch, turn):
    name, lines = ("prefill", [COUNT, COUNT, SIGN]) if turn == 1 else ("decode", [COUNT, SIGN, SIGN])
    interrupting(monkeypatch, DecoderLayer, name)
    handler = signal.getsignal(signal.SIGINT)
    code, out, err = talk(lines, "--image", DEMO_PICTURE)
    assert (code, out) == (0, "\n" + FOUR + NET if turn == 1 else FOUR + "\n" + NET)
    assert err.count("stopped; the question is dropped") == 1 and "processed again" not in err
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_stops_an_answer_between_two_tokens(talk, monkeypatch):
    interrupting(monkeypatch, FastStep, "__call__")
    code, out, err = talk([COUNT, SIGN], "--image", DEMO_PICTURE)
    assert (code, out) == (0, "The picture has four\n" + NET)
    assert "stopped; the conversation continues from the text so far" in err and "processed again" not in err


def test_a_second_ctrl_c_breaks_off_the_step_and_the_cache_is_not_trusted(talk, monkeypatch):
    interrupting(monkeypatch, FastStep, "__call__", times=2)
    code, out, err = talk([COUNT, "/stats", SIGN, COUNT], "--image", DEMO_PICTURE)
    assert (code, out) == (0, "The picture has\n" + NET + FOUR)
    assert err.count("because the last answer was interrupted") == 1 and "no answer to report on" in err


def test_what_fails_while_running_does_not_end_the_conversation(talk, failing):
    failing(DecoderLayer, "decode", RuntimeError("out of memory"), at=1)
    code, out, err = talk([COUNT, SIGN, SIGN], "--image", DEMO_PICTURE)
    assert (code, out) == (0, FOUR + NET) and err.count("error: out of memory") == 1
    failing(DecoderLayer, "decode", RuntimeError("out of memory"), at=1)
    with pytest.raises(RuntimeError):
        talk([COUNT, SIGN], "--image", DEMO_PICTURE, "--debug")


# ---------------------------------------------------------------- lines of stdin


@pytest.fixture
def lines(cli, stdin):
    """Function (bytes on stdin, flags) -> (exit code, stdout, stderr), about the demo's picture."""

    def lines(data, *flags):
        stdin(data)
        return cli("--image", DEMO_PICTURE, *flags)

    return lines


def test_each_line_of_stdin_is_a_question_of_its_own(lines):
    data = f"\ufeff{SIGN}\r\n\n  \n{COUNT}\n{SIGN}".encode()
    code, out, err = lines(data, "--prune", "random", "--retention", "0.9")
    assert (code, out) == (0, NET + FOUR + NET) and err.count("note: ") == 1
    said = "last answer: random kept 89.8 % of the vision tokens: KV cache "
    assert err.count(said) == err.count(" MB instead of ") == 1 and " MB" not in lines(data)[2]
    code, out, _ = lines(data, "--json")
    objects = list(map(json.loads, out.splitlines()))
    assert code == 0 and [o["text"] + "\n" for o in objects] == [NET, FOUR, NET]
    assert objects[0]["token_ids"] == objects[2]["token_ids"]


@pytest.mark.parametrize("command", ["/help", " /IMAGE x.png", "/quit", "/exit"])
def test_a_command_among_the_lines_is_no_question(lines, command):
    code, out, err = lines(f"{SIGN}\n{command}\n{SIGN}\n".encode())
    said = f"line 2 of stdin: {command.split()[0]} works only in a conversation on a terminal; leave the line out\n"
    assert (code, out) == (2, NET) and err.endswith("error: " + said)
    assert lines(b"/usr or /var?", "-n", "1")[0] == 0  # begins with no command


def test_an_answer_is_one_line_whatever_is_in_it(lines, monkeypatch):
    monkeypatch.setattr("model.tokenizer.Detokenizer.push", lambda *_: " a\nb\r\u2028  c")
    assert lines(b"what?\nwhat?\n", "-n", "1")[:2] == (0, "a b c\na b c\n")


@pytest.mark.parametrize(
    ("bad", "words"), [(b"a\xff\n", "UTF-8"), (b"a " * 3000 + b"\n", "2048"), (b"<image><image>\n", "2 <image>")]
)
def test_a_bad_line_is_named_and_ends_it(lines, bad, words):
    code, out, err = lines(SIGN.encode() + b"\n\n" + bad + SIGN.encode())
    assert (code, out) == (2, NET) and "error: line 3 of stdin: " in err and words in err and ";" in err


@pytest.mark.parametrize(
    ("data", "flags", "words"),
    [
        (b"", "", "stdin is empty; give --prompt, --questions"),
        (b"\n \n\t\r\n", "", "stdin is empty"),
        (None, "", "stdin is empty"),
        (b"what?", "--image -", "only one thing"),
        (b"what?", "--compare --prune random", "needs --prompt"),
        (b"what?", "--batch 2", "--questions"),
    ],
)
def test_flags_that_have_no_place_without_a_prompt(refused, stdin, data, flags, words):
    """Nor has a stdin without a line."""
    stdin(data)
    assert words in refused("--image", DEMO_PICTURE, *flags.split())


def test_lines_into_head():
    command = f"printf '{COUNT}\\n{SIGN}\\n' | {sys.executable} {ROOT}/run.py --image {DEMO_PICTURE} | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, FOUR) and "Traceback" not in done.stderr


# ---------------------------------------------------------------- on a terminal


@pytest.fixture(scope="module")
def endless(without_end):
    """Flags of answers that are over only when they are stopped."""
    return ["--model", without_end(10**7), "--max-new-tokens", 10**6]


def test_terminal_picture_by_image_wrong_path_unknown_command_clear():
    with Terminal() as t:
        assert "/help lists the commands" in t.introduction
        assert t.enter("/image /nowhere/x.png") == "error: no picture at /nowhere/x.png; check the path\n"
        assert t.enter("/picture x.png") == "error: there is no command /picture; /help lists them\n"
        assert str(DEMO_PICTURE) in t.enter(f"/image {DEMO_PICTURE}")
        assert t.enter(SIGN) == NET and "new conversation" in t.enter("/clear")
        assert t.enter("/stats").startswith("error: ")
        assert t.leave("\x04") == 0


def test_terminal_pruning_and_what_it_dropped():
    with Terminal("--image", DEMO_PICTURE, "--prune", "random", "--retention", "0.3") as t:
        t.enter(COUNT)
        assert DROPPED in t.enter(SIGN) and DROPPED not in t.enter(SIGN)
        assert "again" in t.enter("/fresh") and "as /fresh asks" in t.enter(COUNT)
        assert t.leave("/quit\n") == 0


def test_terminal_ctrl_c_stops_each_answer_and_one_more_leaves(endless):
    with Terminal(*endless) as t:
        for question in ("what is this?", "and this?", "how many?"):
            t.begin(question)
            t.type("\x03")
            t.wait_for("stopped; the conversation continues from the text so far\n> ")
        assert "processed again" not in t.everything and "error" not in t.everything
        assert t.leave("\x03", again="\x03") == 130


def test_terminal_resized_at_the_prompt_and_during_an_answer(endless):
    with Terminal(*endless) as t:
        t.resize(10, 33)
        t.type("what is ")
        t.resize(50, 200)
        t.begin("this?")
        t.resize(24, 80)
        t.wait_more(50)
        t.type("\x03")
        t.wait_for("stopped; ")
        t.wait_for("> ")
        assert t.leave("\x04") == 0 and "error" not in t.everything


def test_terminal_ctrl_c_clears_a_line_and_leaves_at_an_empty_one():
    with Terminal() as t:
        t.type("half a line")
        t.wait_for("half a line")
        t.type("\x03")
        t.wait_for("\n> ", again="\x03")
        assert t.enter("/retention") == "in use: no pruning\n"
        assert t.leave("\x03", again="\x03") == 130


def test_terminal_full_context(tiny_folder):
    with Terminal("--model", tiny_folder, "-n", "600") as t:
        assert "the context of 512 tokens is full; /clear starts a new conversation" in t.enter("what?")
        refused = t.enter("and?")
        assert refused.startswith("error: this question needs ") and "room for 0 of its 512; start a new" in refused
        t.enter("/clear")
        assert "error" not in t.enter("what?") and t.leave("\x04") == 0


def test_terminal_with_stdout_in_a_file_has_the_answers_only(tmp_path):
    """Ctrl-C clears a line there too."""
    with open(tmp_path / "answers", "w") as file, Terminal("--image", DEMO_PICTURE, stdout=file) as t:
        t.type("half a line")
        t.wait_for("half a line")
        t.type("\x03")
        t.wait_for("\n> ")
        t.enter(COUNT), t.enter(SIGN)  # the next Ctrl-C clears a line again
        t.type("half\x03")
        t.wait_for("\n> ")
        assert t.leave("\x03") == 130
    assert (tmp_path / "answers").read_text() == FOUR + NET


def test_terminal_two_pictures_and_two_drawings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # short paths: readline scrolls long lines
    for path in (DEMO_PICTURE, PAIR):
        shutil.copy(path, tmp_path)
    with Terminal("--prune", "topk", "--retention", "0.5") as t:
        assert t.enter("/image de\t") == "pictures for the next question: demo.png\n"  # Tab completes a path
        assert t.enter("/image pair-a.png") == "pictures for the next question: demo.png, pair-a.png\n"
        assert t.enter("What is in <image>?").startswith("error: the question has 1 <image>, and the number of new pic")
        t.enter("How do <image> and <image> differ?")
        for name in ("kept.png", "kept.html"):
            assert f"{name}: which vision tokens each head kept\n" in t.enter(f"/show {name}")
            assert (tmp_path / name).stat().st_size > 10_000
        assert t.enter("/retention 0.25") == "from the next question on: topk, retention 0.25\n"
        assert t.enter("/prune grid") == "from the next question on: grid, retention 0.25\n"
        assert "processed again, because the pruning has changed" in t.enter(SIGN)
        assert t.leave("/quit\n") == 0


def test_terminal_an_impatient_beginner():
    """Types ahead, lines without meaning, Ctrl-D in the middle of a line, and looks up the last question."""
    with Terminal("--image", DEMO_PICTURE, until="") as t:
        t.type(f"\n   \n{SIGN}\n")  # before the prompt is there
        # arrow up repeats the last question
        for keys, answer in (("", NET), ("How many\x04 objects are there?\n", FOUR), ("\x1b[A\n", FOUR)):
            t.type(keys)
            t.wait_for(answer)
            t.wait_for("> ")
        assert t.enter("hep") != "" and t.enter("/hepl") == "error: there is no command /hepl; /help lists them\n"
        t.type("/" + "q" * 5000 + "\n")
        assert t.wait_for("q; /help lists them\n").count("no command /" + "q" * 39) == 1
        t.wait_for("> ")
        assert "error" not in t.enter("Wie viele Dinge? äöü 日本語 🙂") and t.leave("\x04") == 0


def test_terminal_with_stdout_into_head():
    """head ends after the first answer, and the conversation ends, quietly, with the second."""
    head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with head, Terminal("--image", DEMO_PICTURE, stdout=head.stdin) as t:
        head.stdin.close()
        t.enter(COUNT)
        assert head.stdout.read() == FOUR and head.wait() == 0
        assert t.leave(SIGN + "\n") == 0 and t.everything.endswith(f"> {SIGN}\n")
