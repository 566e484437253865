"""Files of questions: LLaVA's format in and out, nothing lost or said twice whatever happens, POPE by its rule."""

import json

import pytest

import run
from model import Generation, Sampling, load
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
    {"question_id": 7, "image": "demo.png", "text": "Spell the word on the sign."},  # an id may come again
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
    """The one line with which run.py refuses."""
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
    assert "no picture" in errors[3] and "2 <image> for 1" in errors[4] and "broken" in errors[5]
    assert "2312 tokens" in errors[7].replace(",", "") or "context" in errors[7]
    assert [bool(error) for error in errors.values()] == [False, False, False, True, True, True, False, True]
    assert all((line["text"] == "") == bool(errors[i]) for i, line in enumerate(lines))
    checkpoint = load(run.DEMO)
    for i in (0, 1, 6):
        images = QUESTIONS[i]["image"]
        images = [images] if isinstance(images, str) else images
        alone = Generation(checkpoint, QUESTIONS[i]["text"], [folder / p for p in images], Sampling(24))
        assert lines[i]["text"] == "".join(alone)
        about = lines[i]["metadata"]
        assert about["finish_reason"] == alone.finish_reason and about["kv_bytes_held"] == alone.bytes_held
        assert (about["vision_tokens"], about["new_tokens"]) == (256 * len(images), len(alone.token_ids))


def test_the_flags_of_one_answer_hold_for_all(folder, capsys):
    extra = [{}, *({"image": nothing} for nothing in (None, "", [])), {"images": []}, {"image_path": None}]
    extra += [{"has_image": False}, {"num_images": 0}]
    write_lines(folder / "q.jsonl", [{"question_id": i, "text": "What?"} | more for i, more in enumerate(extra)])
    assert inside(capsys, *flags(folder, "-n", 2))[0] == 0
    lines = read_lines(folder / "a.jsonl")
    assert [line["metadata"]["vision_tokens"] for line in lines] == [0] * len(extra)


# ---------------------------------------------------------------- POPE


def by_llavas_rule(text):
    """LLaVA's reading of an answer, step by step."""
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
    write_lines(tmp_path / "a.jsonl", answers[::-1])  # the order of the answers does not matter
    argv = ["--questions", str(tmp_path / "q.jsonl"), "--answers", str(tmp_path / "a.jsonl")]
    assert score_pope.main([*argv, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == ["adversarial", "random", "all"]
    assert [scores["all"][k] for k in ("TP", "FP", "TN", "FN")] == [2, 1, 3, 2]
    assert scores["all"]["accuracy"] == 5 / 8 and scores["all"]["precision"] == 2 / 3 and scores["all"]["recall"] == 0.5
    assert scores["all"]["F1"] == pytest.approx(4 / 7) and scores["all"]["yes"] == 3 / 8
    assert scores["adversarial"]["recall"] == 1.0 and scores["random"]["precision"] == 1.0
    for kind in ("adversarial", "random"):  # labels in files of their own, as POPE has them
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
    ]  # fmt: skip  an error before or behind the answer that made it good does not count, nor one that came twice
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
    """Files of one question with one thing wrong."""
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
    if what in ("labels", "that of its label"):
        rows = [{"label": "yes", "text": "Is there a cat?"}] * (2 if what == "labels" else 1)
        write_lines(tmp_path / "coco_pope_random.json", rows)


WRONG = ["no answer", "two answers", "label", "JSON", "labels", "that of its label", "question_id", "text", "category"]


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
