"""Files of questions: LLaVA's format in and out, no answer lost or repeated after interruptions, POPE by its rule."""

import base64
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from test_parity import noise

import model.generate
import run
from model import Generation, Sampling, load
from tests.paths import DEMO as DEMO_MODEL
from tests.paths import ROOT
from tools import score_pope

DEMO = ROOT / "assets" / "demo.png"
KEYS = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path):
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


QUESTIONS = [
    {"question_id": 7, "image": "demo.png", "text": "How many objects are there?", "category": "x"},
    {"question_id": "b", "image": ["demo.png", "demo.png"], "text": "<image> and <image>: what is the difference?"},
    {"question_id": 3, "text": "What colour is a circle?"},
    {"question_id": 4, "image": "missing.png", "text": "What is this?"},
    {"question_id": 5, "image": "demo.png", "text": "One <image> and one <image>?"},
    {"question_id": 6, "image": "broken.png", "text": "What is this?"},
    {"question_id": 7, "image": "demo.png", "text": "Spell the word on the sign."},  # ids may repeat
    {"question_id": 8, "image": ["demo.png"] * 9, "text": "Too many?"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "demo.png").write_bytes(DEMO.read_bytes())
    (tmp_path / "broken.png").write_bytes(DEMO.read_bytes()[:300])
    write_lines(tmp_path / "q.jsonl", QUESTIONS)
    return tmp_path


def flags(folder, *extra):
    return ["--questions", str(folder / "q.jsonl"), "--answers", str(folder / "a.jsonl"), *extra]


def inside(capsys, *argv):
    """(exit code, stdout, stderr) of run.main."""
    try:
        code = run.main([str(word) for word in argv])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *argv):
    """The single error line of run.py."""
    code, out, err = inside(capsys, *argv)
    assert code == 2 and out == "" and err.count("error: ") == 1 and err.endswith("\n"), (code, out, err)
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and ";" in line
    return line


# ---------------------------------------------------------------- answering


@pytest.mark.parametrize("batch", [1, 3])
def test_every_question_has_its_line_in_order_and_bad_ones_say_why(folder, capsys, batch):
    code, out, err = inside(capsys, *flags(folder, "--batch", batch, "-n", 24))
    assert (code, out) == (0, "") and "8 questions in" in err and "4 could not be answered" in err
    lines = read_lines(folder / "a.jsonl")
    assert [(line["question_id"], line["prompt"]) for line in lines] == [
        (q["question_id"], q["text"]) for q in QUESTIONS
    ]
    assert all(list(line) == KEYS for line in lines) and len({line["answer_id"] for line in lines}) == 8
    assert {line["model_id"] for line in lines} == {"demo"}
    errors = {i: line["metadata"].get("error", "") for i, line in enumerate(lines)}
    assert (
        "no picture" in errors[3]
        and "2 <image>, and the number of pictures is 1" in errors[4]
        and "broken" in errors[5]
    )
    assert "2312 tokens" in errors[7].replace(",", "") or "context" in errors[7]
    assert [bool(error) for error in errors.values()] == [False, False, False, True, True, True, False, True]
    assert all((line["text"] == "") == bool(errors[i]) for i, line in enumerate(lines))
    checkpoint = load(DEMO_MODEL, "auto", "auto")  # like run.py
    for i in (0, 1, 6):
        images = QUESTIONS[i]["image"]
        images = [images] if isinstance(images, str) else images
        alone = Generation(checkpoint, QUESTIONS[i]["text"], [folder / p for p in images], Sampling(24))
        assert lines[i]["text"] == "".join(alone)
        about = lines[i]["metadata"]
        assert about["finish_reason"] == alone.finish_reason and about["kv_bytes_held"] == alone.bytes_held
        assert (about["vision_tokens"], about["new_tokens"]) == (256 * len(images), len(alone.token_ids))


def test_the_flags_of_one_answer_hold_for_all(folder, capsys):
    extra = ["--prune", "plphp", "--retention", "0.5", "-n", "2", "--image-folder", folder]
    assert inside(capsys, *flags(folder, *extra))[0] == 0
    first = read_lines(folder / "a.jsonl")[0]
    settings = first["metadata"]["settings"]
    assert settings["prune"] == "plphp" and settings["max_new_tokens"] == 2 and first["metadata"]["new_tokens"] == 2
    assert first["metadata"]["kv_bytes_held"] < 269 * 2 * 4 * 32 * 4 * 6  # of a prompt with a picture


@pytest.mark.parametrize("chunks", [1, 3, 5, 11])
def test_chunks_are_those_of_llava_and_cover_everything_once(folder, capsys, chunks):
    seen = []
    for i in range(chunks):
        answers = folder / "out" / f"{i}.jsonl"  # creates the folder
        extra = ["--answers", answers, "-n", 1, "--num-chunks", chunks, "--chunk-idx", i]
        code, _, err = inside(capsys, *flags(folder, *extra))
        assert code == 0, err
        part = [(line["question_id"], line["prompt"]) for line in read_lines(answers)]
        size = -(-len(QUESTIONS) // chunks)
        assert part == [(q["question_id"], q["text"]) for q in QUESTIONS[i * size : (i + 1) * size]]
        seen += part
    assert len(seen) == len(QUESTIONS)


# ---------------------------------------------------------------- resuming


def test_questions_with_one_id_keep_their_own_answers_and_are_noted(folder, capsys):
    """Two texts and two pictures, and one question twice, all with one id; each answer is missing once."""
    asked = [
        {"question_id": 7, "image": name, "text": text}
        for name in ("demo.png", "pair-a.png")
        for text in ("How many objects are there?", "What does the sign say?")
    ]
    asked.append(asked[0])
    shutil.copy(ROOT / "assets" / "pair-a.png", folder)
    write_lines(folder / "q.jsonl", asked)
    note = "note: 1 of the question_ids belong to several questions, the first is 7; answers are also told apart by"
    code, _, err = inside(capsys, *flags(folder))
    assert code == 0 and err.count(note) == 1
    whole = (folder / "a.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 5 and len({json.loads(line)["text"] for line in lines}) == 4
    for missing in range(len(lines)):
        left = lines[:missing] + lines[missing + 1 :]
        (folder / "a.jsonl").write_bytes(b"".join(reversed(left)))
        assert inside(capsys, *flags(folder))[0] == 0 and (folder / "a.jsonl").read_bytes() == whole
    write_lines(folder / "q.jsonl", asked[:1] + [asked[1] | {"question_id": "7"}])  # a string is another id
    assert "question_ids" not in inside(capsys, *flags(folder, "--answers", folder / "b.jsonl"))[2]


def test_a_second_run_answers_only_what_is_missing(folder, capsys):
    inside(capsys, *flags(folder, "-n", 3))
    whole = (folder / "a.jsonl").read_bytes()
    code, _, err = inside(capsys, *flags(folder, "-n", 3))  # retries the failed ones, which fail again
    assert code == 0 and "4 questions in" in err and "4 already answered" in err and "4 could not be" in err
    assert (folder / "a.jsonl").read_bytes() == whole
    code, _, err = inside(capsys, *flags(folder, "-n", 3, "--keep-errors"))
    assert code == 0 and "0 questions in" in err and "4 already answered" in err and "4 questions that" in err
    assert (folder / "a.jsonl").read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    (folder / "a.jsonl").write_bytes(b"".join(lines[:3]))
    inside(capsys, *flags(folder, "-n", 3))
    assert (folder / "a.jsonl").read_bytes() == whole
    (folder / "a.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:40])  # a partial line
    inside(capsys, *flags(folder, "-n", 3))
    assert (folder / "a.jsonl").read_bytes() == whole
    (folder / "a.jsonl").write_bytes(lines[6])  # the later of the two questions with id 7
    inside(capsys, *flags(folder, "-n", 3))
    assert (folder / "a.jsonl").read_bytes() == whole


def test_what_could_not_be_answered_is_asked_again(folder, capsys):
    inside(capsys, *flags(folder, "-n", 3))
    before = read_lines(folder / "a.jsonl")
    (folder / "missing.png").write_bytes(DEMO.read_bytes())
    code, _, err = inside(capsys, *flags(folder, "-n", 3, "--keep-errors"))
    assert code == 0 and read_lines(folder / "a.jsonl") == before
    code, _, err = inside(capsys, *flags(folder, "-n", 3))
    assert code == 0 and "4 questions that could not be answered before are tried again; --keep-errors" in err
    after = read_lines(folder / "a.jsonl")
    assert [line["question_id"] for line in after] == [question["question_id"] for question in QUESTIONS]
    assert "error" in before[3]["metadata"] and "error" not in after[3]["metadata"] and after[3]["text"]
    assert [line for i, line in enumerate(after) if i != 3] == [line for i, line in enumerate(before) if i != 3]


def test_a_retry_that_was_killed_leaves_one_line_for_each_question(folder, capsys):
    """Until the run ends, the file holds both an error and the answer that replaces it."""
    inside(capsys, *flags(folder, "-n", 3))
    whole = (folder / "a.jsonl").read_bytes()
    good = json.loads(whole.splitlines()[3])
    del good["metadata"]["error"]
    good = json.dumps(good | {"text": "the answer"}).encode() + b"\n"
    (folder / "a.jsonl").write_bytes(whole + good)
    for _ in range(2):
        code, _, err = inside(capsys, *flags(folder, "-n", 3, "--keep-errors"))
        assert code == 0 and "0 questions in" in err
        lines = whole.splitlines(keepends=True)
        assert (folder / "a.jsonl").read_bytes() == b"".join([*lines[:3], good, *lines[4:]])


@pytest.mark.parametrize("moment", ["fsync", "copymode", "replace"])
@pytest.mark.parametrize("cause", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
def test_putting_the_lines_in_order_loses_nothing(folder, capsys, monkeypatch, moment, cause):
    inside(capsys, *flags(folder, "-n", 3))
    whole = (folder / "a.jsonl").read_bytes()
    moved = b"".join(whole.splitlines(keepends=True)[::-1])
    (folder / "a.jsonl").write_bytes(moved)
    files = sorted(folder.iterdir())

    def broken(*_):
        raise cause

    monkeypatch.setattr(shutil if moment == "copymode" else os, moment, broken)
    code, _, err = inside(capsys, *flags(folder, "-n", 3, "--keep-errors"))
    assert (code, "not in the order" in err) == ((0, True) if isinstance(cause, OSError) else (130, False))
    assert (folder / "a.jsonl").read_bytes() == moved and sorted(folder.iterdir()) == files
    monkeypatch.undo()
    os.chmod(folder / "a.jsonl", 0o600)
    code, _, err = inside(capsys, *flags(folder, "-n", 3, "--keep-errors"))
    assert code == 0 and "in the order of the questions" in err
    assert (folder / "a.jsonl").read_bytes() == whole and (folder / "a.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_question_inserted_in_front_is_answered_in_front(folder, capsys):
    write_lines(folder / "q.jsonl", QUESTIONS[1:3])
    inside(capsys, *flags(folder, "-n", 3))
    os.rename(folder / "a.jsonl", folder / "elsewhere.jsonl")
    os.symlink(folder / "elsewhere.jsonl", folder / "a.jsonl")  # a link stays a link
    write_lines(folder / "q.jsonl", QUESTIONS[:3])
    code, _, err = inside(capsys, *flags(folder, "-n", 3))
    assert code == 0 and "1 question in" in err and (folder / "a.jsonl").is_symlink()
    assert [line["question_id"] for line in read_lines(folder / "elsewhere.jsonl")] == [7, "b", 3]


HALF = b'{"question_id": 4, "prompt": "Wh'


@pytest.mark.parametrize(
    "tail", [b"\0" * 70, b"\n\n", b" \r\n\t\n", HALF + b"\0" * 9, b"\0\0\n\0", b"\n" + HALF], ids=repr
)
def test_what_a_power_cut_leaves_behind_is_cut_off(folder, capsys, tail):
    write_lines(folder / "q.jsonl", QUESTIONS[:3])
    inside(capsys, *flags(folder, "-n", 3))
    whole = (folder / "a.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (2, 1, 0):
        (folder / "a.jsonl").write_bytes(b"".join(lines[:kept]) + tail)
        code, _, err = inside(capsys, *flags(folder, "-n", 3))
        assert code == 0 and (folder / "a.jsonl").read_bytes() == whole, err
    # an editor's line ends and byte-order mark; NULs before a later line
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n") + b"\0\0")
    assert inside(capsys, *flags(folder, "-n", 3))[0] == 0 and (folder / "a.jsonl").read_bytes() == whole
    (folder / "a.jsonl").write_bytes(lines[0] + b"\0\0" + lines[1] + lines[2])
    assert inside(capsys, *flags(folder, "-n", 3))[0] == 0 and (folder / "a.jsonl").read_bytes() == whole


@pytest.mark.parametrize("changed", [["-n", "4"], ["--prune", "plphp"], ["--temperature", "0.5"], ["--seed", "1"]])
def test_answers_of_other_settings_are_not_continued(folder, capsys, changed):
    inside(capsys, *flags(folder, "-n", 3))
    whole = (folder / "a.jsonl").read_bytes()
    line = refused(capsys, *flags(folder, "-n", 3, *changed))
    assert "line 1 of" in line and "not" in line
    assert (folder / "a.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "content", [b"hello\n", b"hello", b'{"a": 1}\n', b'{"question_id": 1}\n', b"\xff\xfe\n", b"[1]\n"]
)
def test_a_file_of_something_else_is_left_alone(folder, capsys, content):
    (folder / "a.jsonl").write_bytes(content)
    refused(capsys, *flags(folder))
    assert (folder / "a.jsonl").read_bytes() == content


@pytest.mark.parametrize("target", ["/dev/null", "fifo"])
def test_answers_go_to_a_regular_file(folder, capsys, target):
    if target == "fifo":
        target = folder / "fifo"
        os.mkfifo(target)
        held = os.open(target, os.O_RDWR)  # so that opening it does not block
    code, _, err = inside(capsys, *flags(folder, "--answers", target))
    assert code == 2 and "not a regular file" in err.splitlines()[-1]
    if target != "/dev/null":
        os.close(held)


def test_a_whole_line_of_something_else_is_never_cut_off(folder, capsys):
    foreign = b'{"question_id": 5, "mine": "precious"}'  # no line end, as an editor leaves it
    (folder / "a.jsonl").write_bytes(foreign)
    refused(capsys, *flags(folder))
    assert (folder / "a.jsonl").read_bytes() == foreign
    (folder / "a.jsonl").unlink()
    inside(capsys, *flags(folder, "-n", 3))
    whole = (folder / "a.jsonl").read_bytes()
    (folder / "a.jsonl").write_bytes(whole[:-1])  # an answer file without its last line end
    assert inside(capsys, *flags(folder, "-n", 3))[0] == 0
    assert (folder / "a.jsonl").read_bytes() == whole


def test_answers_to_other_pictures_do_not_count(folder, capsys):
    write_lines(folder / "q.jsonl", QUESTIONS[:1])
    inside(capsys, *flags(folder, "-n", 3))
    (folder / "other.png").write_bytes((ROOT / "assets" / "pair-a.png").read_bytes())
    write_lines(folder / "q.jsonl", [QUESTIONS[0] | {"image": "other.png"}])
    code, _, err = inside(capsys, *flags(folder, "-n", 3))
    assert code == 0 and "1 question in" in err and "note: 1 answers" in err
    images = [line["metadata"]["images"] for line in read_lines(folder / "a.jsonl")]
    assert images == [["other.png"], ["demo.png"]]  # answers to other questions come last
    assert "image_folder" in refused(capsys, *flags(folder, "-n", 3, "--image-folder", ROOT / "assets"))


def test_answers_of_one_token_are_written_as_they_come(folder, capsys, monkeypatch):
    """They need no decode step; at most one batch of them waits to be written."""
    write_lines(folder / "q.jsonl", [QUESTIONS[0] | {"question_id": i} for i in range(9)])
    seen, add = [], model.Batch.add

    def counted(batch, generation):
        seen.append((folder / "a.jsonl").read_bytes().count(b"\n"))
        add(batch, generation)

    monkeypatch.setattr(model.Batch, "add", counted)
    assert inside(capsys, *flags(folder, "-n", 1, "--batch", 2))[0] == 0
    assert seen == [0, 0, 2, 2, 4, 4, 6, 6, 8]


def test_broken_logits_of_one_question_are_recorded(folder, capsys, monkeypatch):
    take = model.generate.Generation.take

    def broken(generation, token):
        return take(generation, -1 if "Spell" in str(generation.text_asked) else token)

    init = model.generate.Generation.__init__

    def remember(generation, checkpoint, prompt, *rest, **options):
        init(generation, checkpoint, prompt, *rest, **options)
        generation.text_asked = prompt

    monkeypatch.setattr(model.generate.Generation, "__init__", remember)
    monkeypatch.setattr(model.generate.Generation, "take", broken)
    assert inside(capsys, *flags(folder, "-n", 3, "--batch", 3))[0] == 0
    errors = [line["metadata"].get("error", "") for line in read_lines(folder / "a.jsonl")]
    assert "NaN" in errors[6] and not errors[0] and len(errors) == 8


@pytest.mark.parametrize("batch", [1, 3])
def test_out_of_memory_in_one_prompt_is_its_error(folder, capsys, monkeypatch, batch):
    """It does not fit alone either; the other questions of its batch are answered normally."""
    inside(capsys, *flags(folder, "-n", 3, "--batch", batch))
    whole = read_lines(folder / "a.jsonl")
    os.unlink(folder / "a.jsonl")
    prefill = model.generate.Generation.prefill

    def out_of_memory(generation):
        if len(generation.images) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return prefill(generation)

    monkeypatch.setattr(model.generate.Generation, "prefill", out_of_memory)
    code, _, err = inside(capsys, *flags(folder, "-n", 3, "--batch", batch))
    lines = read_lines(folder / "a.jsonl")
    assert code == 0 and "5 could not be answered" in err and err.count("lower --batch") == (batch > 1)
    assert "out of memory" in lines[1]["metadata"]["error"] and lines[1]["text"] == ""
    assert lines[:1] + lines[2:] == whole[:1] + whole[2:]
    monkeypatch.undo()
    assert inside(capsys, *flags(folder, "-n", 3))[0] == 0  # with more memory the next run answers it
    assert read_lines(folder / "a.jsonl") == whole


def test_a_batch_that_does_not_fit_is_asked_one_by_one(folder, capsys, monkeypatch):
    inside(capsys, *flags(folder, "-n", 3))
    whole = (folder / "a.jsonl").read_bytes()
    os.unlink(folder / "a.jsonl")
    advance, sizes = model.Batch.advance, []

    def out_of_memory(batch):
        sizes.append(len(batch.running))
        if len(batch.running) > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
        return advance(batch)

    monkeypatch.setattr(model.Batch, "advance", out_of_memory)
    code, _, err = inside(capsys, *flags(folder, "-n", 3, "--batch", 4))
    assert code == 0 and max(sizes) > 1 and (folder / "a.jsonl").read_bytes() == whole
    assert err.count("lower --batch") == 1  # once for each of the four questions that can be answered


def test_another_failure_ends_the_run(folder, capsys, monkeypatch):
    def broken(generation):
        raise RuntimeError("a bug")

    monkeypatch.setattr(model.generate.Generation, "prefill", broken)
    code, _, err = inside(capsys, *flags(folder, "-n", 3))
    assert code == 1 and "a bug" in err and read_lines(folder / "a.jsonl") == []


def test_pictures_may_be_named_in_other_ways(folder, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    uri = "data:image/png;base64," + base64.b64encode(DEMO.read_bytes()).decode()
    (folder / "-").write_bytes(DEMO.read_bytes())
    names = ["demo.png", uri, "~/demo.png", f"file://{folder}/demo.png", str(folder / "demo.png"), ["demo.png"], "-"]
    asked = [QUESTIONS[0] | {"question_id": i, "image": name} for i, name in enumerate(names)]
    bad = ["HTTPS://example.com/x.png", "file://elsewhere/demo.png", "a\0b.png", "no.png", "."]
    asked += [QUESTIONS[0] | {"question_id": name, "image": name} for name in bad]
    write_lines(folder / "q.jsonl", asked)
    # without --image-folder, and with a relative path to the questions
    inside(capsys, "--questions", "q.jsonl", "--answers", "a.jsonl", "-n", 3)
    lines = read_lines(folder / "a.jsonl")
    assert {line["text"] for line in lines[:7]} == {lines[0]["text"]} and lines[0]["text"]
    assert all("error" not in line["metadata"] for line in lines[:7])
    assert len(lines[1]["metadata"]["images"][0]) < 100 and lines[1]["metadata"]["images"][0].startswith("data:image/")
    errors = [line["metadata"]["error"] for line in lines[7:]]
    words = ["nothing is downloaded", "another machine", "NUL", "no picture", "folder"]
    for error, word in zip(errors, words, strict=True):
        assert word in error and ";" in error
    _, _, err = inside(capsys, "--questions", "q.jsonl", "--answers", "a.jsonl", "-n", 3, "--keep-errors")
    assert "0 questions in" in err and "7 already answered" in err


def test_the_same_files_from_another_directory_are_the_same(folder, capsys, monkeypatch):
    shutil.copytree(DEMO_MODEL, folder / "model")
    (folder / "mine.py").write_text("def keep(view, *, window=1):\n    return None\n")
    write_lines(folder / "q.jsonl", QUESTIONS[:2])
    for name in (".", folder.name, f"./{folder.name}/../{folder.name}"):
        monkeypatch.chdir(folder if name == "." else folder.parent)
        words = f"--questions {name}/q.jsonl --answers {name}/a.jsonl --image-folder {name} --model {name}/model -n 3"
        code, _, err = inside(capsys, *words.split(), "--prune", f"{name}/mine.py::keep")
        assert code == 0 and f"{2 if name == '.' else 0} questions in" in err, err
    monkeypatch.chdir(folder)
    words = "--questions q.jsonl --answers a.jsonl --model model -n 3 --prune mine.py::keep"
    assert "0 questions in" in inside(capsys, *words.split())[2]
    assert "prune" in refused(capsys, *words.split()[:-2])
    assert "image_folder" in refused(capsys, *words.split(), "--image-folder", ROOT / "assets")


def test_two_runs_do_not_write_one_file(folder, capsys):
    fcntl = pytest.importorskip("fcntl", reason="this system has no file locks")
    with open(folder / "a.jsonl", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another run" in refused(capsys, *flags(folder))


def test_ctrl_c_keeps_what_is_answered(folder, capsys, monkeypatch):
    from model import Batch

    advance, calls = Batch.advance, []

    def interrupted(batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return advance(batch)

    monkeypatch.setattr(Batch, "advance", interrupted)
    code, _, err = inside(capsys, *flags(folder, "-n", 2))
    assert code == 130 and "interrupted" in err and 0 < len(read_lines(folder / "a.jsonl")) < 8
    monkeypatch.undo()
    assert inside(capsys, *flags(folder, "-n", 2))[0] == 0
    assert len(read_lines(folder / "a.jsonl")) == 8


# Fork children from one process that has imported torch; each child answers and is killed.
KILLER = """
import os, random, signal, sys, time
os.environ["OMP_NUM_THREADS"] = "1"
import torch, run, model.questions, model.report, model, model.pruning
torch.set_num_threads(1)
rng, kills, wanted, argv = random.Random(5), 0, int(sys.argv[1]), sys.argv[2:]
path = argv[argv.index("--answers") + 1]
size = lambda: os.path.getsize(path) if os.path.exists(path) else 0
while kills < wanted:
    before, child, start = size(), os.fork(), time.time()
    if child == 0:
        os._exit(run.main(argv))
    early = kills % 3 == 2  # every third time perhaps before the first line
    while not (early and rng.random() > 0.999) and size() == before and time.time() < start + 60:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    kills += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status):
        sys.exit(f"finished after {kills} kills; give it more to do")
print(kills)
"""


def test_20_kills_lose_nothing_and_repeat_nothing(make_checkpoint, tmp_path, pytestconfig):
    """Six kills without --all."""
    kills = 20 if pytestconfig.option.all else 6
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    make_checkpoint(tmp_path / "model")
    for i in range(5):
        noise(30 + i, 40, seed=i).save(tmp_path / f"{i}.png")
    asked = [{"question_id": i, "image": f"{i % 5}.png", "text": f"what is there {i % 7} ?"} for i in range(3000)]
    write_lines(tmp_path / "q.jsonl", asked)
    argv = [*flags(tmp_path, "--model", tmp_path / "model", "-n", 9, "--batch", 5)]
    argv = [str(word) for word in argv]
    done = subprocess.run([sys.executable, "-c", KILLER, str(kills), *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(kills), done.stderr[-2000:]
    before = (tmp_path / "a.jsonl").read_bytes()
    assert 0 < before.count(b"\n") < 3000
    # shorten the rest: only the resumption matters
    left = write_lines(tmp_path / "q.jsonl", asked[: before.count(b"\n") + 40])
    done = subprocess.run([sys.executable, "run.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = read_lines(tmp_path / "a.jsonl")
    assert [line["question_id"] for line in lines] == list(range(len(read_lines(left))))
    checkpoint = load(tmp_path / "model")
    for i in (0, 1, len(lines) // 2, len(lines) - 41, len(lines) - 1):
        alone = Generation(checkpoint, asked[i]["text"], [tmp_path / asked[i]["image"]], Sampling(9))
        assert lines[i]["text"] == "".join(alone)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not JSON"),
        ("nonsense", "not JSON"),
        ("[1]", "question_id"),
        ('{"text": "x"}', "question_id"),
        ('{"question_id": 1.5, "text": "x"}', "question_id"),
        ('{"question_id": 1}', "text"),
        ('{"question_id": 1, "text": " "}', "text"),
        ('{"question_id": 1, "text": 5}', "text"),
        ('{"question_id": 1, "text": "x", "image": 5}', "image"),
        ('{"question_id": 1, "text": "x", "image": [5]}', "image"),
        ("[" * 100000, "not JSON"),
        ('{"question_id": true, "text": "x"}', "question_id"),
        ('{"question_id": 1, "text": "x", "image": false}', "image"),
        ('{"question_id": 1, "text": "half \\ud800 of it"}', "Unicode"),
        ('{"question_id": 1, "text": "", "image": "demo.png"}', "text"),
        ('{"question_id": 1, "text": " \\n", "image": "demo.png"}', "text"),
        ('{"question_id": NaN, "text": "x"}', "question_id"),
        ('{"question_id": null, "text": "x"}', "question_id"),
        ('{"question_id": [1], "text": "x"}', "question_id"),
        ('{"question_id": %s, "text": "x"}' % ("9" * 5000), "not JSON"),
        ('{"question_id": 1, "text": "x", "image": NaN}', "image"),
        ('{"question_id": 1, "text": "x", "image": {"url": "a.png"}}', "image"),
        ('{"question_id": 1, "text": "x", "images": ["a.png"]}', "'images'"),
        ('{"question_id": 1, "text": "x", "image": null, "image_path": "a.png"}', "'image_path'"),
        ('{"question_id": 1, "text": "x", "image": [], "image_file": "a"}', "'image_file'"),
        ('{"question_id": 1, "text": "x", "Image": "a"}', "'Image'"),
        ('{"question_id": 1, "text": "x", "img": "a"}', "'img'"),
        ('{"question_id": 1, "text": "x", "file": "a.avif"}', "'file'"),
        ('{"question_id": 1, "text": "x", "src": "data:image/png;base64,AAAA"}', "'src'"),
        ('{"question_id": 1, "text": "x", "media": {"path": "a.jpg?x=1"}}', "'media'"),
        ('{"question_id": 1, "text": "x", "messages": [{"content": [{"type": "image", "image": "a"}]}]}', "'messages'"),
        ('{"question_id": 1, "text": "x", "image_url": {"url": "a"}}', "'image_url'"),
        ('{"question_id": 1, "text": "x", "picture": "a"}', "'picture'"),
        ('{"question_id": 1, "text": "x", "image_id": 17}', "'image_id'"),
        ('{"question_id": 1, "text": "x", "file_name": "a.JPG"}', "'file_name'"),
        ('{"question_id": 1, "text": "x", "files": ["a.png"]}', "'files'"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(folder, capsys, line, word):
    with open(folder / "q.jsonl", "a") as file:
        file.write(f"\n{line}\n")
    message = refused(capsys, *flags(folder))
    assert f"line {len(QUESTIONS) + 2} of" in message and word in message
    assert not (folder / "a.jsonl").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["--questions", "{q}"],
        ["--questions", "{q}", "--answers", "{a}", "--prompt", "x"],
        ["--questions", "{q}", "--answers", "{a}", "--image", "assets/demo.png"],
        ["--questions", "{q}", "--answers", "{a}", "--json"],
        ["--questions", "{q}", "--answers", "{a}", "--num-chunks", "3"],
        ["--questions", "{q}", "--answers", "{a}", "--num-chunks", "3", "--chunk-idx", "3"],
        ["--questions", "{q}", "--answers", "{a}", "--batch", "0"],
        ["--questions", "{q}", "--answers", "{q}"],
        ["--questions", "{q}", "--answers", "{q}/x.jsonl"],
        ["--questions", "{q}.none", "--answers", "{a}"],
        ["--questions", "{q}", "--answers", "{a}", "--image-folder", "{q}"],
        ["--questions", "{q}", "--answers", "{a}", "--image-mode", "anyres"],
        ["--questions", "{q}", "--answers", "{a}", "--anyres-order", "orig"],
        ["--questions", "{q}", "--answers", ""],
        ["--prompt", "x", "--answers", "{a}"],
        ["--prompt", "x", "--batch", "2"],
        [],
    ],
)
def test_flags_that_make_no_sense_are_refused(folder, capsys, argv):
    refused(capsys, *(word.format(q=folder / "q.jsonl", a=folder / "a.jsonl") for word in argv))
    assert not (folder / "a.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_file_without_questions_is_refused(folder, capsys, content):
    (folder / "q.jsonl").write_bytes(content)
    refused(capsys, *flags(folder))


def test_other_forms_of_a_question_file(folder, capsys):
    (folder / "q.jsonl").write_text(json.dumps(QUESTIONS, indent=1))
    assert "JSON array; give JSONL" in refused(capsys, *flags(folder))
    (folder / "q.jsonl").write_text(json.dumps(QUESTIONS[0], indent=1))
    assert "line 1 of" in (line := refused(capsys, *flags(folder))) and "one object on each line" in line
    text = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (folder / "q.jsonl").write_bytes(text.encode("utf-16"))
    assert "UTF-16" in refused(capsys, *flags(folder))
    for number, data in enumerate((text.encode(), ("\ufeff" + text.replace("\n", "\r\n")).encode())):
        (folder / "q.jsonl").write_bytes(data)
        assert inside(capsys, *flags(folder, "-n", 1, "--answers", folder / f"{number}.jsonl"))[0] == 0
    assert (folder / "0.jsonl").read_bytes() == (folder / "1.jsonl").read_bytes()


def test_a_line_may_say_that_it_has_no_picture(folder, capsys):
    none = [{}, *({"image": nothing} for nothing in (None, "", [])), {"images": []}, {"image_path": None}]
    none += [{"has_image": False}, {"num_images": 0}]
    write_lines(folder / "q.jsonl", [{"question_id": i, "text": "What?"} | more for i, more in enumerate(none)])
    assert inside(capsys, *flags(folder, "-n", 2))[0] == 0
    lines = read_lines(folder / "a.jsonl")
    assert [line["metadata"]["vision_tokens"] for line in lines] == [0] * len(none)


# ---------------------------------------------------------------- POPE


def by_llavas_rule(text):
    """LLaVA's rule for an answer, step by step."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    words = text.replace(",", "").split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


SAYINGS = [
    ("Yes", 1), ("No", 0), ("no", 0), ("Yes, there is.", 1), ("There is not a dog.", 0), ("Nothing there", 1),
    ("No, it is", 0), ("Yes. No.", 1), ("NO", 1), ("", 1), ("There is no, dog", 0), ("I see none", 1), ("not,", 0),
    ("a.no", 1), ("Yes. There is no other", 1), ("\nno", 1),
]  # fmt: skip


def test_answers_are_read_by_llavas_rule():
    for text, yes in SAYINGS:
        assert score_pope.is_yes(text) == bool(yes) == (by_llavas_rule(text) == "yes"), text


def test_scores_of_known_counts(tmp_path, capsys):
    said = ["yes", "yes", "no", "no", "yes", "no", "no", "no"]
    real = ["yes", "no", "no", "no", "yes", "yes", "no", "yes"]
    kinds = ["adversarial"] * 4 + ["random"] * 4
    questions = [
        {"question_id": i, "text": f"Is there {i}?\nAnswer shortly.", "category": k, "label": r}
        for i, (k, r) in enumerate(zip(kinds, real, strict=True))
    ]
    write_lines(tmp_path / "q.jsonl", questions)
    answers = [{"question_id": i, "text": s} for i, s in enumerate(said)]
    write_lines(tmp_path / "a.jsonl", answers[::-1])  # the order of the answers is irrelevant
    argv = ["--questions", str(tmp_path / "q.jsonl"), "--answers", str(tmp_path / "a.jsonl")]
    assert score_pope.main([*argv, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == ["adversarial", "random", "all"]
    assert [scores["all"][k] for k in ("TP", "FP", "TN", "FN")] == [2, 1, 3, 2]
    assert scores["all"]["accuracy"] == 5 / 8 and scores["all"]["precision"] == 2 / 3 and scores["all"]["recall"] == 0.5
    assert scores["all"]["F1"] == pytest.approx(4 / 7) and scores["all"]["yes"] == 3 / 8
    assert scores["adversarial"]["recall"] == 1.0 and scores["random"]["precision"] == 1.0
    for kind in ("adversarial", "random"):  # labels in separate files, as POPE has them
        rows = [{"label": q.pop("label"), "text": q["text"].split("\n")[0]} for q in questions if q["category"] == kind]
        write_lines(tmp_path / f"coco_pope_{kind}.json", rows)
    write_lines(tmp_path / "q.jsonl", questions)
    assert score_pope.main([*argv, "--annotations", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == scores
    assert score_pope.main([*argv, "--annotations", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "all", "2", "1", "3", "2", "0.6250", "0.6667", "0.5000", "0.5714", "0.3750",
    ]  # fmt: skip


def test_what_could_not_be_answered_is_no_yes(tmp_path, capsys):
    real, kinds = ["yes", "no", "yes", "no"], ["x", "x", "y", "y"]
    rows = zip(kinds, real, strict=True)
    questions = [{"question_id": i, "text": "?", "category": k, "label": r} for i, (k, r) in enumerate(rows)]
    missing = {"text": "", "metadata": {"error": "no picture"}}
    answers = [
        {"question_id": 0, "text": "yes", "metadata": {}},
        {"question_id": 1} | missing,
        {"question_id": 2} | missing,
        {"question_id": 3, "text": "no", "metadata": None},
        {"question_id": 3} | missing,
        {"question_id": 2} | missing,
    ]  # fmt: skip  errors before or after an answer to the same question do not count
    write_lines(tmp_path / "q.jsonl", questions)
    write_lines(tmp_path / "a.jsonl", answers)
    argv = ["--questions", str(tmp_path / "q.jsonl"), "--answers", str(tmp_path / "a.jsonl")]
    assert score_pope.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    total = json.loads(out)["all"]
    assert [total[k] for k in ("TP", "FP", "TN", "FN", "errors")] == [1, 0, 1, 0, 2] and total["accuracy"] == 1.0
    assert "2 questions could not be answered" in err and err.count("\n") == 1
    assert score_pope.main(argv) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0][-1] == "errors" and [row[-1] for row in table[1:]] == ["1", "1", "2"]
    write_lines(tmp_path / "a.jsonl", [{"question_id": i} | missing for i in range(4)])
    with pytest.raises(SystemExit):
        score_pope.main(argv)
    assert "no question could be answered" in capsys.readouterr().err


def spoil(tmp_path, what):
    """Files of one question with one fault."""
    question = {"question_id": 1, "text": "Is there a dog?", "category": "random", "label": "yes"}
    questions, answers = [question], [{"question_id": 1, "text": "yes"}]
    if what == "no answer":
        answers[0]["question_id"] = 9
    if what == "two answers":
        answers *= 2
    if what == "label":
        question["label"] = "maybe"
    if what == "question_id":
        answers = [{"text": "yes"}]
    if what == "text":
        answers = [{"question_id": 1, "text": 5}]
    if what == "category":
        question["category"] = ["x"]
    if what == "total":
        questions = [question, question | {"question_id": 2, "category": "all"}]
        answers += [{"question_id": 2, "text": "no"}]
    if what == "is empty":
        questions = []
    write_lines(tmp_path / "q.jsonl", questions)
    write_lines(tmp_path / "a.jsonl", answers)
    if what == "JSON":
        (tmp_path / "a.jsonl").write_text('{"question_id": 1, "text": "yes"}\n{\n')
    if what in ("labels", "match its label"):
        rows = [{"label": "yes", "text": "Is there a cat?"}] * (2 if what == "labels" else 1)
        write_lines(tmp_path / "coco_pope_random.json", rows)


WRONG = ["no answer", "two answers", "label", "JSON", "labels", "match its label", "question_id", "text", "category"]


@pytest.mark.parametrize("what", [*WRONG, "total", "is empty"])
def test_files_that_do_not_belong_together_are_refused(tmp_path, capsys, what):
    spoil(tmp_path, what)
    argv = ["--questions", str(tmp_path / "q.jsonl"), "--answers", str(tmp_path / "a.jsonl")]
    extra = ["--annotations", str(tmp_path)] if (tmp_path / "coco_pope_random.json").exists() else []
    with pytest.raises(SystemExit) as left:
        score_pope.main([*argv, *extra])
    err = capsys.readouterr().err
    assert left.value.code == 2 and len(err.splitlines()) == 1 and what in err


def test_an_answer_file_of_run_py_can_be_scored(folder, capsys):
    labels = [q | {"label": "yes"} for q in QUESTIONS[:1] + QUESTIONS[2:3]]
    write_lines(folder / "q.jsonl", labels)
    inside(capsys, *flags(folder, "-n", 4))
    assert score_pope.main(["--questions", str(folder / "q.jsonl"), "--answers", str(folder / "a.jsonl")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["category", "x", "(none)", "all"]
