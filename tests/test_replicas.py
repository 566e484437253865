"""Several processes answer one file of questions: each question once, whoever is slow, fails or is killed."""

import json
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from test_parity import noise
from test_questions import QUESTIONS, read_lines, write_lines

from model import Batch, Generation, Sampling, load, questions
from model.replicas import Replicas
from tests.paths import DEMO_PICTURE, ROOT

RANKS = ROOT / "tests" / "ranks.py"


def replicas_of(size):
    """Replicas of one process each, all in this process."""
    store, mesh = dist.HashStore(), SimpleNamespace(device_type="cpu")
    return [Replicas(SimpleNamespace(store=store, rank=rank, size=size, mesh=mesh), 1) for rank in range(size)]


def run_ranks(folder, *cases):
    """Results of the cases of `ranks.py`."""
    (folder / "cases.json").write_text(json.dumps(cases, default=str))
    done = subprocess.run([sys.executable, RANKS, folder / "cases.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def errors(result):
    return [line for line in result["err"].splitlines() if line.startswith(("error:", "Traceback"))]


# ---------------------------------------------------------------- who answers what


def test_the_next_question_goes_to_the_replica_that_asks_first():
    first, second, third = (replica.take([5, 7, 8, 9, 11]) for replica in replicas_of(3))
    assert [next(second), next(first), next(second), next(second)] == [5, 7, 8, 9]
    assert next(third) == 11
    assert not [*first, *second, *third]


def test_messages_arrive_once_in_their_order_and_leave_the_store(monkeypatch):
    monkeypatch.setattr("model.replicas.POLL", 0)
    zero, one, two = replicas_of(3)
    keys = zero.store.num_keys()
    assert [*zero.receive()] == []
    for sender, number in ((one, 3), (two, 0), (one, 1)):
        sender.send(number, "a \ud800 b", {"error": None}, {"kept": 0.1 + 0.2})
    assert [*zero.receive()] == [[number, "a \ud800 b", {"error": None}, {"kept": 0.1 + 0.2}] for number in (3, 0, 1)]
    two.send("a note")
    assert [*zero.receive()] == [["a note"]] and [*zero.receive()] == []
    assert zero.store.num_keys() == keys + 1  # the counter


def test_only_the_first_process_of_a_replica_sends():
    mesh = {"tp": SimpleNamespace(get_group=lambda: None)}
    store = dist.HashStore()
    mesh = type("Mesh", (dict,), {"device_type": "cpu"})(mesh)
    four = [Replicas(SimpleNamespace(store=store, rank=rank, size=4, mesh=mesh), 2) for rank in range(4)]
    assert [replica.first for replica in four] == [True, False, True, False]
    assert {replica.said for replica in four} == {"2 replicas of 2 processes"}
    for replica in four:
        replica.send("note")
    assert [*four[0].receive()] == [["note"]] * 2


@pytest.fixture
def asked(tmp_path):
    """Nine questions that can be answered."""
    shutil.copy(DEMO_PICTURE, tmp_path)
    rows = [{"question_id": i, "image": "demo.png", "text": f"How many objects are there{'?' * i}"} for i in range(9)]
    return questions.read_questions(write_lines(tmp_path / "q.jsonl", rows))


def test_a_slow_question_holds_nobody_up_and_no_answer_back(tmp_path, demo, asked, monkeypatch, capsys):
    """While process 0 reads the picture of its first question, another process answers all others."""
    monkeypatch.setattr("model.replicas.POLL", 0)
    path, seen, advance = tmp_path / "a.jsonl", [], Batch.advance
    args = SimpleNamespace(keep_errors=False, batch=2)
    zero, one = replicas_of(2)

    def ask(question):
        return Generation(demo, question.text, [tmp_path / "demo.png"], Sampling(3))

    def slow(question):
        questions.help_out(asked, ask, args, one)
        monkeypatch.setattr(Batch, "advance", stepped)  # from here on, those of process 0
        return ask(question)

    def stepped(batch):
        seen.append([line["question_id"] for line in read_lines(path)])
        return advance(batch)

    with questions.open_answers(path) as file:
        answers = questions.Answers(file, {"model": "demo"})
        answers.write(asked[4], "before", {})
        wait = SimpleNamespace(warn=lambda: None)
        assert questions.run_file(asked, answers, slow, args, None, wait, zero) == 0
    assert [seen[0][0], *sorted(seen[0][1:])] == [4, 1, 2, 3, 5, 6, 7, 8]  # written before the first step
    lines = read_lines(path)
    assert [line["question_id"] for line in lines] == list(range(9))
    assert [line["prompt"] for line in lines] == [question.text for question in asked]
    assert lines[4]["text"] == "before" and lines[0]["text"].startswith("The picture")
    told = capsys.readouterr().err
    assert "8 questions in" in told and "by 2 replicas (" in told and "24 tokens), 1 already answered" in told


def test_process_0_waits_for_questions_that_others_have_taken(tmp_path, demo, asked, monkeypatch, capsys):
    monkeypatch.setattr("model.replicas.POLL", 0)
    zero, one = replicas_of(2)
    late = iter([lambda: one.send("a note"), lambda: one.send(0, "late", {}, {"failed": 1})])
    monkeypatch.setattr(questions.time, "sleep", lambda _: next(late)())  # time goes on only while process 0 waits
    path, args, wait = (
        tmp_path / "a.jsonl",
        SimpleNamespace(keep_errors=False, batch=3),
        SimpleNamespace(warn=lambda: None),
    )
    assert next(one.take([0, 1])) == 0
    with questions.open_answers(path) as file:
        answers = questions.Answers(file, {"model": "demo"})
        ask = lambda question: Generation(demo, question.text, (), Sampling(2))  # noqa: E731
        assert questions.run_file(asked[:2], answers, ask, args, None, wait, zero) == 0
    assert [line["text"] == "late" for line in read_lines(path)] == [True, False]
    told = capsys.readouterr().err
    assert "note: a note\n" in told and "2 questions in" in told and "1 could not be answered" in told


def test_notes_of_other_replicas_are_sent(demo, asked, monkeypatch, failing):
    monkeypatch.setattr("model.replicas.POLL", 0)
    zero, one = replicas_of(2)
    one.store.set("offer", "[0, 1, 2]")
    failing(Batch, "advance", MemoryError(), where=lambda batch: len(batch.running) > 1)
    args = SimpleNamespace(batch=2)
    questions.help_out(asked, lambda q: Generation(demo, q.text, (), Sampling(3)), args, one)
    messages = [*zero.receive()]
    assert "out of memory with 2 questions at once" in messages[0][0]
    assert sorted(number for number, *_ in messages[1:]) == [0, 1, 2]


def test_memory_that_runs_out_in_a_shared_model_ends_the_run(demo, asked, failing):
    """The other processes of the replica do not know of it, so trying again would divide the work on two questions."""
    failing(Batch, "advance", MemoryError("out of memory"), where=lambda batch: len(batch.running) > 1)
    replica = SimpleNamespace(shared=True, take=iter, agreed=lambda ask, question: ask(question))
    with pytest.raises(MemoryError):
        questions.answer_some(
            asked, [0, 1], lambda q: Generation(demo, q.text), SimpleNamespace(batch=2), print, print, replica
        )


# ---------------------------------------------------------------- processes


OTHER_PICTURE = """
import model.questions as q
path = q.local_path
q.local_path = lambda name: path("pair-a.png" if rank == 1 and name == "demo.png" else name)
"""
A_BUG = """
from model import Generation
prefill = Generation.prefill
def broken(self):
    if rank == 1:
        raise RuntimeError("a bug")
    return prefill(self)
Generation.prefill = broken
"""
LATE = """
import time, model.replicas as r
take = r.Replicas.take
def late(self, numbers):
    time.sleep(rank)  # process 0, which holds the store, has answered everything before
    yield from take(self, numbers)
r.Replicas.take = late
"""
OTHER_FILE = """
import model.questions as q
read = q.read_questions
q.read_questions = lambda *given: read(*given)[rank:]
"""
OTHER_MODEL = "import model.questions as q; q.named_model = lambda *_: str(rank)"
GONE = """
import os, time, model.processes as p
join = p.Team.join
def gone(self, flags):
    if rank == 1:
        time.sleep(1)  # process 0 waits to be connected
        os._exit(3)
    join(self, flags)
p.Team.join = gone
"""
ONE_FAILS = """
import model.batch, model.replicas
from model.config import InputError
def failing(*_):
    raise InputError("the mask is wrong; fix it")
if rank == 1:
    model.replicas.ALIKE, model.batch.Batch.add = 1, failing
"""
REFUSED = {  # words of the only line: (exit code, processes, hook, more flags)
    "a bug; run again with --debug": (1, 2, A_BUG),
    "the file of questions of process 1 differs from that of process 0; give": (2, 2, OTHER_FILE),
    "dtype or another setting of process 1 differs from that of process 0; give": (2, 2, OTHER_MODEL),
    "--tp 2 does not divide 3 processes; use": (2, 3, "", "--tp", "2"),
    "torchrun sends if another process ended": (3, 2, GONE),
    "failed where another went on: the mask is": (2, 2, ONE_FAILS, "--tp", "2", "--answers", "{folder}/one.jsonl"),
    "is not an answer of this program": (2, 2, "", "--answers", "{folder}/other.jsonl"),
}


@pytest.fixture
def case(make_checkpoint, tmp_path):
    """Function (number of processes, hook, more flags, name of the file of answers) -> a case of `ranks.py`."""
    for name in ("demo.png", "pair-a.png"):
        shutil.copy(ROOT / "assets" / name, tmp_path)
    (tmp_path / "broken.png").write_bytes(DEMO_PICTURE.read_bytes()[:300])
    write_lines(tmp_path / "q.jsonl", QUESTIONS)
    make_checkpoint(tmp_path / "model")
    argv = "--questions", tmp_path / "q.jsonl", "--model", tmp_path / "model", "-n", 3, "--batch", 2, "--dtype", "fp32"

    def case(size, hook="", *more, answers="a.jsonl"):
        return {"size": size, "hook": hook, "argv": [*map(str, argv), "--answers", f"{tmp_path}/{answers}", *more]}

    return case


def test_processes_answer_like_one(tmp_path, case, cli):
    """Replicas of one process and of two; one that sees other pictures; one that comes when all is done."""
    told = cli(*case(1, answers="whole.jsonl")["argv"])[2].splitlines()[-1]
    whole = (tmp_path / "whole.jsonl").read_bytes()
    half = "--tp", "2", "--num-chunks", "2", "--chunk-idx", "0"
    three, pair, mixed, late = run_ranks(
        tmp_path, case(3, answers="3.jsonl"), case(2, "", *half, answers="2.jsonl"),
        case(2, OTHER_PICTURE, *half, answers="mixed.jsonl"), case(2, LATE, answers="whole.jsonl"),
    )  # fmt: skip
    assert [r["codes"] for r in (three, pair, mixed, late)] == [[0] * 3, [0] * 2, [0] * 2, [0] * 2]
    assert "3 questions in" in late["err"] and "5 already answered" in late["err"]
    assert "8 questions in" in told and "; 3 could not be answered" in told
    said = three["err"].splitlines()[-1]  # the counts are those of all processes
    assert " s by 3 replicas (" in said and said.split(" per second, ")[1][:40] == told.split(" per second, ")[1][:40]
    assert "4 questions in" in pair["err"] and " s by 1 replica of 2 processes (" in pair["err"]
    assert (tmp_path / "3.jsonl").read_bytes() == whole
    assert (tmp_path / "2.jsonl").read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    for line, one in zip(read_lines(tmp_path / "mixed.jsonl"), read_lines(tmp_path / "2.jsonl"), strict=True):
        if "demo.png" in one["metadata"]["images"]:
            assert "error" not in one["metadata"] and "read different pictures" in line["metadata"]["error"]
        else:
            assert line == one


def test_processes_fail_in_one_line(tmp_path, case):
    (tmp_path / "other.jsonl").write_text("something else\n")
    cases = [case(n, hook, *(w.format(folder=tmp_path) for w in more)) for _, n, hook, *more in REFUSED.values()]
    for (words, (code, *_)), result in zip(REFUSED.items(), run_ranks(tmp_path, *cases), strict=True):
        assert code in result["codes"] and 0 not in result["codes"] and result["seconds"] < 20
        (line,) = errors(result)
        assert words in line, result


def test_20_kills_of_any_process_lose_nothing_and_repeat_nothing(make_checkpoint, tmp_path, pytestconfig, cli):
    """Four kills without --all. Two or three processes, sometimes as one replica; then one finishes the file."""
    kills, rng = 20 if pytestconfig.option.all else 4, random.Random(7)
    make_checkpoint(tmp_path / "model")
    for i in range(5):
        noise(30 + i, 40, seed=i).save(tmp_path / f"{i}.png")
    asked = [{"question_id": i, "image": f"{i % 5}.png", "text": f"what is there {i % 7} ?"} for i in range(9000)]
    write_lines(tmp_path / "q.jsonl", asked)
    path = tmp_path / "a.jsonl"
    argv = ["--questions", tmp_path / "q.jsonl", "--model", tmp_path / "model", "-n", 9, "--batch", 5]
    argv = [*map(str, argv), "--answers", str(path)]
    cases = []
    for i in range(kills):
        size = rng.choice((2, 3))
        delay = 0 if i % 5 == 4 else rng.uniform(0.01, 0.3)
        tp = ["--tp", "2"] if i % 5 == 3 else []
        size = 2 if tp else size
        cases.append({"size": size, "argv": argv + tp, "kill": [rng.randrange(size), delay]})
    for case, result in zip(cases, run_ranks(tmp_path, *cases), strict=True):
        assert result["codes"][case["kill"][0]] == -9 and 0 not in result["codes"], result
        assert result["seconds"] < 20 and len(errors(result)) <= 1, result
        assert all("another process ended" in line for line in errors(result))
    done = {line["question_id"] for line in read_whole_lines(path)}
    assert kills <= len(done) < 9000
    write_lines(tmp_path / "q.jsonl", left := asked[: max(done) + 1])
    assert cli(*argv)[0] == 0
    lines = read_lines(path)
    assert [line["question_id"] for line in lines] == [question["question_id"] for question in left]
    checkpoint = load(tmp_path / "model")
    for i in rng.sample(range(len(lines)), 8):
        alone = Generation(checkpoint, asked[i]["text"], [tmp_path / asked[i]["image"]], Sampling(9))
        assert lines[i]["text"] == "".join(alone) and lines[i]["prompt"] == asked[i]["text"]


def read_whole_lines(path):
    """The answers of a file whose last line may be partial."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
