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

from model import Batch, Generation, Sampling, load
from tests.paths import DEMO, DEMO_PICTURE, ROOT
from tools import score_pope

KEYS = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
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


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path):
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def folder(tmp_path):
    shutil.copy(DEMO_PICTURE, tmp_path)
    (tmp_path / "broken.png").write_bytes(DEMO_PICTURE.read_bytes()[:300])
    write_lines(tmp_path / "q.jsonl", QUESTIONS)
    return tmp_path


@pytest.fixture
def file(folder):
    """The file of answers."""
    return folder / "a.jsonl"


@pytest.fixture
def answer(folder, file, cli):
    """Function (flags, expected exit code) -> stderr of a run over the folder's questions, three tokens each."""

    def answer(*flags, code=0):
        ended, out, err = cli("--questions", folder / "q.jsonl", "--answers", file, "-n", 3, *flags)
        assert (ended, out) == (code, ""), err
        return err

    return answer


@pytest.fixture
def refuses(folder, file, refused):
    """Function (flags) -> the error of a run over the folder's questions."""
    return lambda *flags: refused("--questions", folder / "q.jsonl", "--answers", file, "-n", 3, *flags)


@pytest.fixture
def whole(answer, file):
    """Bytes of the finished file of answers."""
    answer()
    return file.read_bytes()


# ---------------------------------------------------------------- answering


@pytest.mark.parametrize("batch", [1, 3])
def test_every_question_has_its_line_in_order_and_bad_ones_say_why(folder, file, answer, demo, batch):
    err = answer("--batch", batch, "-n", 24)
    assert "8 questions in" in err and "4 could not be answered" in err
    lines = read_lines(file)
    asked = [(q["question_id"], q["text"]) for q in QUESTIONS]
    assert [(line["question_id"], line["prompt"]) for line in lines] == asked
    assert all(list(line) == KEYS for line in lines) and len({line["answer_id"] for line in lines}) == 8
    assert {line["model_id"] for line in lines} == {"demo"}
    errors = {i: line["metadata"].get("error") for i, line in enumerate(lines)}
    wrong = {3: "no picture", 4: "2 <image>, and the number of pictures is 1", 5: "broken", 7: "context"}
    assert all(wrong[i] in error if i in wrong else error is None for i, error in errors.items())
    assert all((line["text"] == "") == (i in wrong) for i, line in enumerate(lines))
    for i in (0, 1, 6):
        names = QUESTIONS[i]["image"]
        names = [names] if isinstance(names, str) else names
        alone = Generation(demo, QUESTIONS[i]["text"], [folder / name for name in names], Sampling(24))
        assert lines[i]["text"] == "".join(alone)
        about = lines[i]["metadata"]
        assert about["finish_reason"] == alone.finish_reason and about["kv_bytes_held"] == alone.bytes_held
        assert (about["vision_tokens"], about["new_tokens"]) == (256 * len(names), len(alone.token_ids))


def test_the_flags_of_one_answer_hold_for_all(folder, file, answer):
    answer("--prune", "plphp", "--retention", "0.5", "-n", "2", "--image-folder", folder)
    about = read_lines(file)[0]["metadata"]
    assert about["settings"]["prune"] == "plphp" and about["settings"]["max_new_tokens"] == about["new_tokens"] == 2
    assert about["kv_bytes_held"] < 269 * 2 * 4 * 32 * 4 * 6  # of a prompt with a picture


@pytest.mark.parametrize("chunks", [1, 3, 5, 11])
def test_chunks_are_those_of_llava_and_cover_everything_once(folder, answer, chunks):
    size, seen = -(-len(QUESTIONS) // chunks), []
    for i in range(chunks):
        answers = folder / "out" / f"{i}.jsonl"  # creates the folder
        answer("--answers", answers, "-n", 1, "--num-chunks", chunks, "--chunk-idx", i)
        part = [line["prompt"] for line in read_lines(answers)]
        assert part == [q["text"] for q in QUESTIONS[i * size : (i + 1) * size]]
        seen += part
    assert len(seen) == len(QUESTIONS)


def test_answers_of_one_token_are_written_as_they_come(folder, file, answer, monkeypatch):
    """They need no decode step; at most one batch of them waits to be written."""
    write_lines(folder / "q.jsonl", [QUESTIONS[0] | {"question_id": i} for i in range(9)])
    seen, add = [], Batch.add

    def counted(batch, generation):
        seen.append(file.read_bytes().count(b"\n"))
        add(batch, generation)

    monkeypatch.setattr(Batch, "add", counted)
    answer("-n", 1, "--batch", 2)
    assert seen == [0, 0, 2, 2, 4, 4, 6, 6, 8]


def test_pictures_may_be_named_in_other_ways(folder, cli, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    uri = "data:image/png;base64," + base64.b64encode(DEMO_PICTURE.read_bytes()).decode()
    shutil.copy("demo.png", "-")
    names = ["demo.png", uri, "~/demo.png", f"file://{folder}/demo.png", str(folder / "demo.png"), ["demo.png"], "-"]
    bad = {
        "HTTPS://example.com/x.png": "nothing is downloaded", "file://elsewhere/demo.png": "write file:///",
        "a\0b.png": "NUL", "no.png": "no picture", ".": "folder",
    }  # fmt: skip
    asked = [QUESTIONS[0] | {"question_id": i, "image": name} for i, name in enumerate([*names, *bad])]
    write_lines(folder / "q.jsonl", asked)
    # without --image-folder, and with a relative path to the questions
    flags = "--questions", "q.jsonl", "--answers", "a.jsonl", "-n", "3"
    assert cli(*flags)[0] == 0
    lines = read_lines(folder / "a.jsonl")
    assert {line["text"] for line in lines[:7]} == {lines[0]["text"]} and lines[0]["text"]
    assert all("error" not in line["metadata"] for line in lines[:7])
    assert len(lines[1]["metadata"]["images"][0]) < 100 and lines[1]["metadata"]["images"][0].startswith("data:image/")
    for line, words in zip(lines[7:], bad.values(), strict=True):
        assert words in line["metadata"]["error"] and ";" in line["metadata"]["error"]
    _, _, err = cli(*flags, "--keep-errors")
    assert "0 questions in" in err and "7 already answered" in err


def test_a_line_may_say_that_it_has_no_picture(folder, file, answer):
    none = [{}, *({"image": nothing} for nothing in (None, "", [])), {"images": []}, {"image_path": None}]
    none += [{"has_image": False}, {"num_images": 0}, {"hint": "Is it like photo.jpg?"}, {"format": ".png"}]
    write_lines(folder / "q.jsonl", [{"question_id": i, "text": "What?"} | more for i, more in enumerate(none)])
    answer()
    assert [line["metadata"]["vision_tokens"] for line in read_lines(file)] == [0] * len(none)


# ---------------------------------------------------------------- resuming


def test_questions_with_one_id_keep_their_own_answers_and_are_noted(folder, file, answer):
    """Two texts and two pictures, and one question twice, all with one id; each answer is missing once."""
    texts = "How many objects are there?", "What does the sign say?"
    asked = [{"question_id": 7, "image": name, "text": text} for name in ("demo.png", "pair-a.png") for text in texts]
    shutil.copy(ROOT / "assets" / "pair-a.png", folder)
    write_lines(folder / "q.jsonl", [*asked, asked[0]])
    note = "note: 1 of the question_ids belong to several questions, the first is 7; answers are also told apart by"
    assert answer("-n", 9).count(note) == 1
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 5 and len({json.loads(line)["text"] for line in lines}) == 4
    for missing in range(len(lines)):
        file.write_bytes(b"".join(reversed(lines[:missing] + lines[missing + 1 :])))
        answer("-n", 9)
        assert file.read_bytes() == whole
    write_lines(folder / "q.jsonl", asked[:1] + [asked[1] | {"question_id": "7"}])  # a string is another id
    assert "question_ids" not in answer("--answers", folder / "b.jsonl")


def test_a_second_run_answers_only_what_is_missing(file, answer, whole):
    err = answer()  # retries the failed ones, which fail again
    assert "4 questions in" in err and "4 already answered" in err and "4 could not be" in err
    assert file.read_bytes() == whole
    err = answer("--keep-errors")
    assert "0 questions in" in err and "4 already answered" in err and "4 questions that" in err
    assert file.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    # three lines; a partial line behind six; the later of the two questions with id 7; no line end, as editors do
    for left in (b"".join(lines[:3]), b"".join(lines[:6]) + lines[6][:40], lines[6], whole[:-1]):
        file.write_bytes(left)
        answer()
        assert file.read_bytes() == whole


def test_a_damaged_last_line_with_its_line_end_is_refused_and_kept(file, refuses, whole):
    file.write_bytes(damaged := whole[:-20] + b"\n")  # no kill leaves a line end there, but an editor may
    assert "is not an answer of this program" in refuses()
    assert file.read_bytes() == damaged


def test_what_could_not_be_answered_is_asked_again(folder, file, answer, whole):
    before = read_lines(file)
    shutil.copy(DEMO_PICTURE, folder / "missing.png")
    answer("--keep-errors")
    assert file.read_bytes() == whole
    assert "4 questions that could not be answered before are tried again; --keep-errors" in answer()
    after = read_lines(file)
    assert "error" in before[3]["metadata"] and "error" not in after[3]["metadata"] and after[3]["text"]
    assert after[:3] + after[4:] == before[:3] + before[4:] and after[3]["question_id"] == 4


def test_settings_of_failures_do_not_bind(folder, file, answer, refuses):
    write_lines(folder / "q.jsonl", QUESTIONS[:1] + QUESTIONS[6:7])
    (folder / "empty").mkdir()
    assert "2 could not be answered" in answer("--image-folder", folder / "empty")
    assert "could not be answered before are tried again" in answer("--image-folder", folder)
    assert [line["metadata"]["settings"]["image_folder"] for line in read_lines(file)] == [str(folder)] * 2
    assert all(line["text"] for line in read_lines(file)) and "image_folder" in refuses("--image-folder", ROOT)


def test_a_retry_that_was_killed_leaves_one_line_for_each_question(file, answer, whole):
    """Until the run ends, the file holds both an error and the answer that replaces it."""
    lines = whole.splitlines(keepends=True)
    good = json.loads(lines[3])
    del good["metadata"]["error"]
    good = json.dumps(good | {"text": "the answer"}).encode() + b"\n"
    file.write_bytes(whole + good)
    for _ in range(2):
        assert "0 questions in" in answer("--keep-errors")
        assert file.read_bytes() == b"".join([*lines[:3], good, *lines[4:]])


@pytest.mark.parametrize("moment", ["fsync", "copymode", "replace"])
@pytest.mark.parametrize("cause", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
def test_putting_the_lines_in_order_loses_nothing(folder, file, answer, whole, failing, monkeypatch, moment, cause):
    moved = b"".join(whole.splitlines(keepends=True)[::-1])
    file.write_bytes(moved)
    files, full = sorted(folder.iterdir()), isinstance(cause, OSError)
    failing(shutil if moment == "copymode" else os, moment, cause)
    assert ("not in the order" in answer("--keep-errors", code=0 if full else 130)) == full
    assert file.read_bytes() == moved and sorted(folder.iterdir()) == files
    monkeypatch.undo()
    file.chmod(0o600)
    answer("--keep-errors")
    assert file.read_bytes() == whole and file.stat().st_mode & 0o777 == 0o600


def test_a_question_inserted_in_front_is_answered_in_front(folder, file, answer):
    write_lines(folder / "q.jsonl", QUESTIONS[1:3])
    answer()
    elsewhere = file.rename(folder / "elsewhere.jsonl")
    file.symlink_to(elsewhere)  # a link stays a link
    write_lines(folder / "q.jsonl", QUESTIONS[:3])
    assert "1 question in" in answer() and file.is_symlink()
    assert [line["question_id"] for line in read_lines(elsewhere)] == [7, "b", 3]


HALF = b'{"question_id": 4, "prompt": "Wh'


@pytest.mark.parametrize(
    "tail", [b"\0" * 70, b"\n\n", b" \r\n\t\n", HALF + b"\0" * 9, b"\0\0\n\0", b"\n" + HALF], ids=repr
)
def test_what_a_power_cut_leaves_behind_is_cut_off(folder, file, answer, tail):
    write_lines(folder / "q.jsonl", QUESTIONS[:3])
    answer()
    whole = file.read_bytes()
    first, second, third = whole.splitlines(keepends=True)
    windows = b"\xef\xbb\xbf" + whole.replace(b"\n", b"\r\n") + b"\0\0"  # from an editor
    for left in (first + second + tail, first + tail, tail, windows, first + b"\0\0" + second + third):
        file.write_bytes(left)
        answer()
        assert file.read_bytes() == whole, left


@pytest.mark.parametrize("changed", ["-n 4", "--prune plphp", "--temperature 0.5", "--seed 1", "--kv-dtype int8"])
def test_answers_of_other_settings_are_not_continued(file, refuses, whole, changed):
    line = refuses(*changed.split())
    assert "line 1 of" in line and "not" in line and file.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n", b"hello", b'{"a": 1}\n', b'{"question_id": 1}\n', b"\xff\xfe\n", b"[1]\n",
        b'{"question_id": 5, "mine": "precious"}',  # no line end, as an editor leaves it
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_left_alone(file, refuses, content):
    file.write_bytes(content)
    refuses()
    assert file.read_bytes() == content


def test_answers_go_to_a_regular_file(folder, refuses):
    os.mkfifo(folder / "fifo")
    held = os.open(folder / "fifo", os.O_RDWR)  # so that opening it does not block
    for target in ("/dev/null", folder / "fifo"):
        assert "not a regular file" in refuses("--answers", target)
    os.close(held)


def test_answers_to_other_pictures_do_not_count(folder, file, answer, refuses):
    write_lines(folder / "q.jsonl", QUESTIONS[:1])
    answer()
    shutil.copy(ROOT / "assets" / "pair-a.png", folder / "other.png")
    write_lines(folder / "q.jsonl", [QUESTIONS[0] | {"image": "other.png"}])
    err = answer()
    assert "1 question in" in err and "note: 1 answers" in err
    images = [line["metadata"]["images"] for line in read_lines(file)]
    assert images == [["other.png"], ["demo.png"]]  # answers to other questions come last
    assert "image_folder" in refuses("--image-folder", ROOT / "assets")


def test_the_same_files_from_another_directory_are_the_same(folder, file, cli, refused, monkeypatch):
    shutil.copytree(DEMO, folder / "model")
    (folder / "mine.py").write_text("def keep(view, *, window=1):\n    return None\n")
    write_lines(folder / "q.jsonl", QUESTIONS[:2])
    for name in (".", folder.name, f"./{folder.name}/../{folder.name}"):
        monkeypatch.chdir(folder if name == "." else folder.parent)
        words = f"--questions {name}/q.jsonl --answers {name}/a.jsonl --image-folder {name} --model {name}/model -n 3"
        code, _, err = cli(*words.split(), "--prune", f"{name}/mine.py::keep")
        assert code == 0 and f"{2 if name == '.' else 0} questions in" in err, err
    monkeypatch.chdir(folder)
    words = ["--questions", "q.jsonl", "--answers", "a.jsonl", "--model", "model", "-n", 3, "--prune", "mine.py::keep"]
    assert "0 questions in" in cli(*words)[2]
    assert "prune" in refused(*words[:-2]) and "image_folder" in refused(*words, "--image-folder", ROOT / "assets")


def test_two_runs_do_not_write_one_file(file, refuses):
    fcntl = pytest.importorskip("fcntl", reason="this system has no file locks")
    with open(file, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another run" in (line := refuses()) and "or its disk has no file locks" in line


# ---------------------------------------------------------------- failures


def test_broken_logits_of_one_question_are_recorded(file, answer, monkeypatch):
    take = Generation.take
    monkeypatch.setattr(Generation, "take", lambda g, token: take(g, -1 if "Spell" in g.prompt else token))
    answer("--batch", 3)
    errors = [line["metadata"].get("error", "") for line in read_lines(file)]
    assert "NaN" in errors[6] and not errors[0] and len(errors) == 8


@pytest.mark.parametrize("batch", [1, 3])
def test_out_of_memory_in_one_prompt_is_its_error(file, answer, whole, failing, monkeypatch, batch):
    """It does not fit alone either; the other questions of its batch are answered normally."""
    file.unlink()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    failing(Generation, "prefill", error, where=lambda generation: len(generation.images) == 2)
    err = answer("--batch", batch)
    lines, wanted = read_lines(file), [json.loads(line) for line in whole.splitlines()]
    assert "5 could not be answered" in err and err.count("lower --batch") == (batch > 1)
    assert "out of memory" in lines[1]["metadata"]["error"] and lines[1]["text"] == ""
    assert lines[:1] + lines[2:] == wanted[:1] + wanted[2:]
    monkeypatch.undo()
    answer()  # with more memory
    assert file.read_bytes() == whole


def test_a_batch_that_does_not_fit_is_asked_one_by_one(file, answer, whole, failing):
    file.unlink()
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
    failing(Batch, "advance", error, where=lambda batch: len(batch.running) > 1)
    err = answer("--batch", 4)
    assert file.read_bytes() == whole
    assert err.count("lower --batch") == 1  # once for each of the four questions that can be answered


def test_another_failure_ends_the_run(file, answer, failing):
    failing(Generation, "prefill", RuntimeError("a bug"))
    assert "a bug" in answer(code=1) and read_lines(file) == []


def test_ctrl_c_keeps_what_is_answered(file, answer, failing):
    failing(Batch, "advance", KeyboardInterrupt(), at=4)
    assert "interrupted" in answer(code=130) and 0 < len(read_lines(file)) < 8
    answer()
    assert len(read_lines(file)) == 8


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


def test_20_kills_lose_nothing_and_repeat_nothing(make_checkpoint, folder, file, answer, pytestconfig):
    """Six kills without --all."""
    kills = "20" if pytestconfig.option.all else "6"
    make_checkpoint(folder / "model")
    for i in range(5):
        noise(30 + i, 40, seed=i).save(folder / f"{i}.png")
    asked = [{"question_id": i, "image": f"{i % 5}.png", "text": f"what is there {i % 7} ?"} for i in range(3000)]
    write_lines(folder / "q.jsonl", asked)
    flags = ["--model", folder / "model", "-n", 9, "--batch", 5]
    argv = map(str, ["--questions", folder / "q.jsonl", "--answers", file, *flags])
    done = subprocess.run([sys.executable, "-c", KILLER, kills, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == kills, done.stderr[-2000:]
    before = file.read_bytes().count(b"\n")
    assert 0 < before < 3000
    write_lines(folder / "q.jsonl", asked[: before + 40])  # only the resumption matters
    answer(*flags)
    lines = read_lines(file)
    assert [line["question_id"] for line in lines] == list(range(before + 40))
    checkpoint = load(folder / "model")
    for i in (0, 1, before // 2, before - 1, before + 39):
        alone = Generation(checkpoint, asked[i]["text"], [folder / asked[i]["image"]], Sampling(9))
        assert lines[i]["text"] == "".join(alone)


# ---------------------------------------------------------------- errors

MALFORMED = {  # words of the error: a line, and what may stand in the place of its ?
    "not JSON": ("?", ["{", "nonsense", "[" * 100000, '{"question_id": %s, "text": "x"}' % ("9" * 5000)]),
    "no question_id that is": ('{"question_id": ?, "text": "x"}', ["1.5", "true", "NaN", "null", "[1]"]),
    "has no question_id": ("?", ["[1]", '{"text": "x"}']),
    "no text, which": ('{"question_id": 1, "text": ?, "image": "demo.png"}', ['""', '" "', r'" \n"', "5", "null"]),
    "the image in": ('{"question_id": 1, "text": "x", "image": ?}', ["5", "[5]", "false", "NaN", '{"url": "a"}']),
    "not valid Unicode": ('{"question_id": 1, "text": ?}', [r'"half \ud800 of it"']),
}
OTHER_NAMES = {  # of a picture
    "images": ["a.png"], "image_path": "a.png", "image_file": "a", "Image": "a", "img": "a", "file": "a.avif",
    "src": "data:image/png;base64,AAAA", "media": {"path": "a.jpg?x=1"}, "image_url": {"url": "a"}, "picture": "a",
    "messages": [{"content": [{"type": "image", "image": "a"}]}], "image_id": 17, "file_name": "a.JPG",
    "files": ["a.png"],
}  # fmt: skip


def test_a_malformed_line_is_named_by_its_number(folder, file, refuses):
    wrong = [(line.replace("?", value), words) for words, (line, values) in MALFORMED.items() for value in values]
    for i, (key, value) in enumerate(OTHER_NAMES.items()):
        nothing = [{}, {"image": None}, {"image": []}][i % 3]
        wrong.append((json.dumps({"question_id": 1, "text": "x"} | nothing | {key: value}), f"has '{key}' and no"))
    for line, words in wrong:
        write_lines(folder / "q.jsonl", QUESTIONS)
        with open(folder / "q.jsonl", "a") as questions:
            questions.write(f"\n{line}\n")
        message = refuses()
        assert f"line {len(QUESTIONS) + 2} of" in message and words in message, line
    assert not file.exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--questions {q}", "--prompt x --answers {a}", "--prompt x --batch 2", "--answers {a}",
        "--questions {q} --answers {q}", "--questions {q} --answers {q}/x.jsonl", "--questions {q} --answers=",
        "--questions {q}.none --answers {a}", "--questions= --answers {a}",
        *(f"--questions {{q}} --answers {{a}} {more}" for more in (
            "--prompt x", "--image assets/demo.png", "--frames assets/demo.png",
            "--json", "--num-chunks 3", "--num-chunks 3 --chunk-idx 3",
            "--batch 0", "--image-folder {q}", "--image-mode anyres", "--anyres-order orig", "--show kept.png",
        )),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense_are_refused(folder, file, refused, flags):
    refused(*flags.format(q=folder / "q.jsonl", a=file).split())
    assert not file.exists()


def test_other_forms_of_a_question_file(folder, answer, refuses):
    questions, text = folder / "q.jsonl", (folder / "q.jsonl").read_text()
    for content, words in (
        (b"", "no questions"), (b"\n \n", "no questions"), (b"\xff\xfe\x00", "UTF-"), (text.encode("utf-16"), "UTF-16"),
        (json.dumps(QUESTIONS, indent=1).encode(), "JSON array; give JSONL"),
        (json.dumps(QUESTIONS[0], indent=1).encode(), "line 1 of"),
    ):  # fmt: skip
        questions.write_bytes(content)
        assert words in refuses()
    for number, data in enumerate((text, "\ufeff" + text.replace("\n", "\r\n"))):
        questions.write_bytes(data.encode())
        answer("--answers", folder / f"{number}.jsonl")
    assert (folder / "0.jsonl").read_bytes() == (folder / "1.jsonl").read_bytes()


# ---------------------------------------------------------------- POPE


def by_llavas_rule(text):
    """LLaVA's rule for an answer, step by step."""
    if text.find(".") != -1:
        text = text.split(".")[0]
    words = text.replace(",", "").split(" ")
    return "no" if "No" in words or "not" in words or "no" in words else "yes"


SAYINGS = {
    "Yes": 1, "No": 0, "no": 0, "Yes, there is.": 1, "There is not a dog.": 0, "Nothing there": 1, "No, it is": 0,
    "Yes. No.": 1, "NO": 1, "": 1, "There is no, dog": 0, "I see none": 1, "not,": 0, "a.no": 1,
    "Yes. There is no other": 1, "\nno": 1,
}  # fmt: skip


def test_answers_are_read_by_llavas_rule():
    for text, yes in SAYINGS.items():
        assert score_pope.is_yes(text) == bool(yes) == (by_llavas_rule(text) == "yes"), text


@pytest.fixture
def score(tmp_path, capsys):
    """Function (questions, answers or the text of their file, flags) -> (exit code, stdout, stderr) of score_pope."""

    def score(questions, answers, *flags):
        write_lines(tmp_path / "q.jsonl", questions)
        write_lines(tmp_path / "a.jsonl", [] if isinstance(answers, str) else answers)
        if isinstance(answers, str):
            (tmp_path / "a.jsonl").write_text(answers)
        try:
            code = score_pope.main(["--questions", f"{tmp_path}/q.jsonl", "--answers", f"{tmp_path}/a.jsonl", *flags])
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return score


def test_scores_of_known_counts(tmp_path, score):
    said = ["yes", "yes", "no", "no", "yes", "no", "no", "no"]
    real = ["yes", "no", "no", "no", "yes", "yes", "no", "yes"]
    kinds = ["adversarial"] * 4 + ["random"] * 4
    questions = [
        {"question_id": i, "text": f"Is there {i}?\nAnswer shortly.", "category": k, "label": r}
        for i, (k, r) in enumerate(zip(kinds, real, strict=True))
    ]
    answers = [{"question_id": i, "text": s} for i, s in enumerate(said)][::-1]  # their order is irrelevant
    code, out, _ = score(questions, answers, "--json")
    scores = json.loads(out)
    assert code == 0 and list(scores) == ["adversarial", "random", "all"]
    counts = {"TP": 2, "FP": 1, "TN": 3, "FN": 2, "accuracy": 5 / 8, "precision": 2 / 3, "recall": 0.5, "yes": 3 / 8}
    assert counts.items() <= scores["all"].items() and scores["all"]["F1"] == pytest.approx(4 / 7)
    assert scores["adversarial"]["recall"] == 1.0 and scores["random"]["precision"] == 1.0
    for kind in ("adversarial", "random"):  # labels in separate files, as POPE has them
        rows = [{"label": q.pop("label"), "text": q["text"].split("\n")[0]} for q in questions if q["category"] == kind]
        write_lines(tmp_path / f"coco_pope_{kind}.json", rows)
    assert score(questions, answers, "--annotations", str(tmp_path), "--json")[:2] == (0, out)
    _, table, _ = score(questions, answers, "--annotations", str(tmp_path))
    assert table.splitlines()[-1].split() == [
        "all", "2", "1", "3", "2", "0.6250", "0.6667", "0.5000", "0.5714", "0.3750",
    ]  # fmt: skip


def test_what_could_not_be_answered_is_no_yes(score):
    real, kinds = ["yes", "no", "yes", "no"], ["x", "x", "y", "y"]
    rows = zip(kinds, real, strict=True)
    questions = [{"question_id": i, "text": "?", "category": k, "label": r} for i, (k, r) in enumerate(rows)]
    missing = {"text": "", "metadata": {"error": "no picture"}}
    answers = [{"question_id": 0, "text": "yes", "metadata": {}}, {"question_id": 3, "text": "no", "metadata": None}]
    # errors before or after an answer to the same question do not count
    answers = [
        *({"question_id": i} | missing for i in (1, 2)),
        *answers,
        *({"question_id": i} | missing for i in (3, 2)),
    ]
    code, out, err = score(questions, answers, "--json")
    counts = {"TP": 1, "FP": 0, "TN": 1, "FN": 0, "errors": 2, "accuracy": 1.0}
    assert code == 0 and counts.items() <= json.loads(out)["all"].items()
    assert "2 questions could not be answered" in err and err.count("\n") == 1
    table = [line.split() for line in score(questions, answers)[1].splitlines()]
    assert table[0][-1] == "errors" and [row[-1] for row in table[1:]] == ["1", "1", "2"]
    code, _, err = score(questions, [{"question_id": i} | missing for i in range(4)])
    assert code == 2 and "no question could be answered" in err


DOG = {"question_id": 1, "text": "Is there a dog?", "category": "random", "label": "yes"}
SAID = {"question_id": 1, "text": "yes"}
CAT = {"label": "yes", "text": "Is there a cat?"}


@pytest.mark.parametrize(
    ("words", "questions", "answers", "labels"),
    [
        ("no answer", [DOG], [SAID | {"question_id": 9}], []),
        ("two answers", [DOG], [SAID, SAID], []),
        ("label", [DOG | {"label": "maybe"}], [SAID], []),
        ("question_id", [DOG], [{"text": "yes"}], []),
        ("text", [DOG], [SAID | {"text": 5}], []),
        ("category", [DOG | {"category": ["x"]}], [SAID], []),
        ("total", [DOG, DOG | {"question_id": 2, "category": "all"}], [SAID, SAID | {"question_id": 2}], []),
        ("is empty", [], [SAID], []),
        ("JSON", [DOG], json.dumps(SAID) + "\n{\n", []),
        ("labels", [DOG], [SAID], [CAT, CAT]),
        ("match its label", [DOG], [SAID], [CAT]),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, score, words, questions, answers, labels):
    write_lines(tmp_path / "coco_pope_random.json", labels)
    code, _, err = score(questions, answers, *(["--annotations", str(tmp_path)] if labels else []))
    assert code == 2 and len(err.splitlines()) == 1 and words in err


def test_an_answer_file_of_run_py_can_be_scored(folder, file, answer, score):
    labels = [q | {"label": "yes"} for q in QUESTIONS[:1] + QUESTIONS[2:3]]
    write_lines(folder / "q.jsonl", labels)
    answer()
    code, out, _ = score(labels, read_lines(file))
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["category", "x", "(none)", "all"]
