"""The evaluation: shortcuts against real generations, statistics against scipy, files after a kill."""

import dataclasses
import json
import multiprocessing
import re

import pytest
import torch
from safetensors.torch import save_file

from model import Generation, Sampling, load
from model.pruning import make_method
from model.report import step_bytes
from tests.given import given_view
from tests.paths import DEMO, DEMO_PICTURE, ROOT
from tools import evaluate, roofline, scenes
from tools.controls import Evidence, Like, ValuesDropped, neutral_rows, worth_of_rows
from tools.evaluate import conversation, encode_scenes
from tools.paired import interval, mcnemar, resamples
from tools.replay import along, asked_by, asked_with, compare, replay

FULL = "plphp:dr=0.0,alpha=0.822,beta=0.7358,skip=0,group=mean,values=false,scope=image,query=lookahead,cover=0.5"
SPECS = ("random:retention=0.2", "plphp:r=0.6,dr=0.2", "plphp-ada:r=0.4", "snapkv:retention=0.4,values=true", "fastv")


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, "fp32")


def held_out(number):
    """Pictures and questions of an evaluation scene."""
    return evaluate.held_out_questions(evaluate.FIRST + number, number % 5 == 4, False, 0)


def asked_about(demo, number, which, second=None):
    drawn, questions = held_out(number)
    ids, fed, targets = conversation(demo, questions[which], second and questions[second], len(drawn))
    return asked_with(demo, ids, encode_scenes(demo, drawn), fed), targets, drawn, questions


# ---------------------------------------------------------------- the evaluation measures what run.py does


@torch.inference_mode()
def test_exact_match_is_that_of_greedy_decoding(demo):
    """One joined batch fed the true answer, against a real run for every question and method."""
    seen = set()
    for number, which in ((0, 0), (0, 3), (1, 1), (4, 0)):  # the last is about two pictures
        asked, targets, drawn, questions = asked_about(demo, number, which)
        methods = [None, *map(make_method, SPECS)]
        logits, kept, _ = replay(asked, methods)
        right = (logits.argmax(-1) == torch.tensor(targets)).all(1).tolist()
        for spec, method, hit, share in zip(("none", *SPECS), methods, right, kept, strict=True):
            pictures = [scenes.draw_scene(s) for s in drawn]
            sampling = Sampling(max_new_tokens=len(targets))
            real = Generation(demo, questions[which].question, pictures, sampling, prune=method)
            assert ("".join(real) == questions[which].answer) == hit, (number, which, spec)
            assert sum(real.kept) / len(real.kept) / real.vision_tokens == pytest.approx(share), spec
            seen.add(hit)
    assert seen == {True, False}  # otherwise the test could not fail


@torch.inference_mode()
def test_a_second_question_meets_what_the_first_one_left(demo):
    """Fed in one piece after the pruned cache, against a cache pruned by a generation and decoded token by token."""
    outcomes, language = set(), demo.model.language_model
    for spec in ("random:retention=0.1", "plphp:r=0.9,dr=0.1", "random:retention=0.8"):
        method = make_method(spec)
        asked, targets, drawn, questions = asked_about(demo, 2, 3, second=4)
        rows = torch.tensor(targets) != evaluate.IGNORED
        answer = torch.tensor(targets)[rows].tolist()
        hit = replay(asked, [method])[0][0, rows].argmax(-1).tolist() == answer
        pictures = [scenes.draw_scene(s) for s in drawn]
        first = Generation(demo, questions[3].question, pictures, Sampling(max_new_tokens=1), prune=method)
        "".join(first)  # its cache holds only the prompt
        _, fed, _ = conversation(demo, questions[3], questions[4], len(drawn))
        x = language.model.embed_tokens(torch.tensor(fed[: len(fed) - len(answer) + 1]))
        ids = [language.logits(language.extend(x[None], first.cache)[0, -1]).argmax().item()]
        while ids[-1] not in demo.stop_ids and len(ids) < len(answer):
            x = language.model.embed_tokens(torch.tensor(ids[-1:]))
            ids.append(language.logits(language.decode(x, first.cache))[0].argmax().item())
        assert (ids == answer) == hit, spec
        outcomes.add(hit)
    assert outcomes == {True, False}


@torch.inference_mode()
def test_controls_keep_what_they_say(demo):
    asked, _, _, questions = asked_about(demo, 3, 0)
    evidence, start = questions[0].evidence, asked.spans[0][0]
    view = given_view(asked.spans, asked.tokens, 8, 4, 6, layer=2)
    columns = [start + p for p in evidence[0]]
    shown, hidden = (Evidence(evidence, 0.5, 7, anti).keep(view) for anti in (False, True))
    assert not shown.equal(Evidence(evidence, 0.5, 8).keep(view))  # other questions draw other numbers
    assert shown[:, columns].all() and not hidden[:, columns].any()
    assert shown[:, start : start + 256].sum(1).tolist() == hidden[:, start : start + 256].sum(1).tolist() == [128] * 4
    other = make_method("plphp-ada:r=0.3,dr=0.1").rule
    for shared in (False, True):
        like = Like(other, shared, 7).keep(view)
        assert torch.equal(like.sum(1), other.keep(view).sum(1)) and not like.equal(other.keep(view))
    for condition in ("random like plphp@0.3", "plphp rows+values@0.3"):
        kept = replay(asked, [evaluate.conditions(((0.7, 0.5), None), 6)[condition](asked, evidence, 7)])[1]
        assert kept == pytest.approx([0.3], abs=0.15)
    plain, dropped, cut = replay(asked, [None, values(0.0001), values(1.0)])[0]
    torch.testing.assert_close(cut, plain, rtol=1e-4, atol=1e-4)  # nothing dropped
    assert not torch.allclose(dropped[1:], plain[1:], atol=0.1) and torch.equal(dropped[0], plain[0])


def values(retention):
    method = make_method("random", retention)
    return dataclasses.replace(method, rule=ValuesDropped(method.rule))


@torch.inference_mode()
def test_a_dropped_value_leaves_the_keys_where_they_are(demo):
    asked, *_ = asked_about(demo, 3, 0)
    cache, *_ = asked.cache(values(0.25))
    full, *_ = asked.cache(None)
    keep = make_method("random", 0.25).keep(given_view(asked.spans, asked.tokens, 8, 4, 6, layer=3))
    rows = torch.stack([full.v[3][s : s + n] for s, n in zip(full.kv_start[3], full.kv_len[3], strict=True)])
    got = torch.stack([cache.v[3][s : s + n] for s, n in zip(cache.kv_start[3], cache.kv_len[3], strict=True)])
    torch.testing.assert_close(got, rows * keep[..., None])
    assert torch.equal(cache.kv_len, full.kv_len) and isinstance(values(0.25).rule, ValuesDropped)


@torch.inference_mode()
def test_more_rows_and_what_ranks_instead(demo):
    """Rows from a file equal the model's own rows; all answer rows are hindsight; other prompts give other rankings."""
    rows = {"own": demo.lookahead}
    made = evaluate.conditions(((1, 0), (1, 0)), 6, (0.3,), rows=rows)
    same = [("rows own", "topk ahead"), ("rows own+grid", "topk ahead+grid"), ("topk answer rows 1 to 8", "hindsight")]
    other = ["another question", "another picture"]
    names = [*sum(same, ()), *(f"topk ahead, {name}" for name in other), "topk neutral rows"]
    made = {name: made[f"{name}@0.3"] for name in names}
    asked, _, drawn, questions = asked_about(demo, 0, 0)
    image_tokens = encode_scenes(demo, drawn)
    ids, *_ = conversation(demo, questions[0], None, 1)
    asked.others = evaluate.others_of(demo, ids, image_tokens, questions[1], evaluate.FIRST, 1)
    short, *_ = asked_about(demo, 0, next(i for i, q in enumerate(questions) if len(q.answer.split()) < 7))
    kept = {name: asked.cache(make(asked, None, 0))[1] for name, make in made.items()}
    for a, b in same[:2]:
        assert all(torch.equal(x, y) for x, y in zip(kept[a], kept[b], strict=True)), a
    a, b = (short.cache(made[name](short, None, 0))[1] for name in same[2])
    assert len(short.fed) <= 8 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for name in (*(f"topk ahead, {name}" for name in other), "topk neutral rows"):
        assert not any(torch.equal(x, y) for x, y in zip(kept[name], kept["topk ahead"], strict=True)), name
    for name in other:
        of, last = asked.others[name](), slice(-8, None)
        question = torch.equal(of.x[: of.tokens][last], asked.x[: asked.tokens][last])
        picture = torch.equal(of.x[5:100], asked.x[5:100])
        assert (question, picture) == ((False, True) if name == other[0] else (True, False))
        spans = slice(*asked.spans[0]), slice(*of.spans[0])
        theirs = of.attention_of_rows(demo.lookahead, 3).view(4, 2, -1).mean(1)[:, spans[1]]
        assert torch.equal(worth_of_rows(asked, demo.lookahead, of)(3)[:, spans[0]], theirs)


@torch.inference_mode()
def test_neutral_rows_are_that_token_behind_the_prompt(demo):
    asked, *_ = asked_about(demo, 0, 0)
    token = demo.model.language_model.model.embed_tokens.weight[demo.tokenizer.encode(".")[-1]]
    x, wanted = torch.cat((asked.x[: asked.tokens], token.expand(8, -1))), []

    def look(layer, q, k, v):
        q, k = q[0, :, -8:].double(), k[0].double().repeat_interleave(2, 0)
        scores = q @ k.transpose(1, 2) * 32**-0.5
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)[-8:]
        wanted.append(scores.masked_fill(future, float("-inf")).softmax(-1).mean(1)[:, : asked.tokens])
        return None, None

    demo.model.language_model.prefill(x[None], prune=look)
    neutral = neutral_rows(demo)
    for layer in range(6):
        got = asked.attention_of_rows(neutral, layer).double()
        torch.testing.assert_close(got, wanted[layer], rtol=1e-3, atol=1e-6)


def test_the_premise_takes_methods_with_a_budget_of_their_own(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def keep(view):\n    return None\n")
    flags = ["--image", str(DEMO_PICTURE), "--prompt", "What?", "--max-new-tokens", "2", "--retentions", "0.5"]
    evaluate.main(["premise", *flags, "--methods", "grid", f"{tmp_path / 'mine.py'}::keep", "topk:retention=0.25"])
    head, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [row[:2] for row in rows] == [
        ["mine.py::keep", "100"], ["topk:retention=0.25", "25"], ["grid, 0.5 asked for", "50"],
        ["told what the answer attends to, 0.5 asked for", "50"],
    ]  # fmt: skip
    assert head[3:] == [f"layer {i}" for i in range(6)]


def test_the_premise_is_a_table_of_what_is_found(demo, capsys):
    flags = ["--image", str(DEMO_PICTURE), "--prompt", "What does the sign say?", "--retentions", "0.5", "0.1"]
    evaluate.main(["premise", *flags])
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if "asked for |" in line]
    assert [r[0] for r in rows[:7]] == [
        "topk, 0.5 asked for", "topk:window=32, 0.5 asked for", "topk:window=32,values=true, 0.5 asked for",
        "topk:query=lookahead, 0.5 asked for", "random, 0.5 asked for", "grid, 0.5 asked for",
        "told what the answer attends to, 0.5 asked for",
    ]  # fmt: skip
    assert len(rows) == 14 and all(len(r) == 9 for r in rows) and "not a verdict" in out
    assert [int(r[1]) for r in rows] == [50] * 7 + [10] * 7
    found = {r[0]: [int(x) for x in r[3:]] for r in rows}
    for f in ("0.5", "0.1"):
        told = found[f"told what the answer attends to, {f} asked for"]
        assert all(a <= b for r in found if r.endswith(f"{f} asked for") for a, b in zip(found[r], told, strict=True))
    generation = Generation(demo, "What does the sign say?", [DEMO_PICTURE])
    "".join(generation)
    with torch.inference_mode():
        asked = asked_by(generation, generation.token_ids[:-1])
        (start, stop), keeps = asked.spans[0], asked.cache(make_method("topk", 0.1))[1]
        for layer, (keep, shown) in enumerate(zip(keeps, found["topk, 0.1 asked for"], strict=True)):
            attention = asked.attention_of_fed(layer)[:, start:stop]
            share = (attention * keep[:, start:stop]).sum() / attention.sum()
            assert abs(100 * share.item() - shown) <= 0.6


@torch.inference_mode()
def test_fidelity_diverges_where_two_real_answers_do(demo):
    asked_of = demo, "Describe the picture.", [DEMO_PICTURE]
    full = Generation(*asked_of)
    "".join(full)
    diverged, specs = set(), ("none", "random:retention=0.9", "plphp:r=0.3,dr=0", "shared:retention=0.1", "fastv")
    rows = along(full, [make_method(spec) for spec in specs], batch=2)
    for spec, row in zip(specs, rows, strict=True):
        method = make_method(spec)
        assert row["steps"] == len(full.token_ids) + 1  # it ends with the stop id, which counts
        real = Generation(*asked_of, prune=method)
        "".join(real)
        pairs = list(zip([*full.token_ids, 2], [*real.token_ids, 2], strict=False))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        assert row["diverges"] == first and (row["kl"].max() > 1e-5) == (spec != "none"), spec
        diverged.add(first is None)
    assert diverged == {True, False}


def test_nan_is_no_agreement():
    full = torch.randn(3, 7)
    full[:, 2] = float("-inf")  # an id that is never generated
    broken = full.clone()
    broken[1] = float("nan")
    ids = full.argmax(-1).tolist()
    assert compare(full, full, ids)["kl"].tolist() == [0, 0, 0] and compare(full, full, ids)["same"] == 1
    assert compare(full, broken, ids)["kl"].isnan().tolist() == [False, True, False]


def test_fidelity_of_any_checkpoint(capsys):
    flags = ["--image", str(DEMO_PICTURE), "--prompt", "Count the objects.", "--methods", "random", "plphp:dr=0.1"]
    evaluate.main(["fidelity", *flags, "--retentions", "0.9", "0.05"])
    out, err = capsys.readouterr()
    assert (
        out.count("| random | 0.9 | 89.8 %") == 1 and out.count("\n|") == 6 and "unpruned: The picture has four" in err
    )


def test_fidelity_gives_a_method_with_its_own_budget_one_row(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def keep(view):\n    return None\n")
    mine = f"{tmp_path / 'mine.py'}::keep"
    specs = ["none", "random:keep_tokens=20", "plphp:r=0.4", mine, "random"]
    asked = ["--image", str(DEMO_PICTURE), "--prompt", "What?", "--max-new-tokens", "2"]
    evaluate.main(["fidelity", *asked, "--methods", *specs, "--retentions", "0.5", "0.25"])
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[:2] for row in rows] == [
        ["| none", ""], ["| random:keep_tokens=20", ""], [f"| {FULL.replace('plphp:', 'plphp:r=0.4,')}", ""],
        ["| mine.py::keep", ""], ["| random", "0.5"], ["| random", "0.25"],
    ]  # fmt: skip
    assert [rows[i][2] for i in (0, 3, 4, 5)] == ["100.0 %", "100.0 %", "50.0 %", "25.0 %"]


# ---------------------------------------------------------------- statistics


def test_mcnemar_is_the_binomial_test():
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle here")
    for n in (1, 7, 200, 4000):
        a, b = torch.rand(n) < 0.5, torch.rand(n) < 0.55
        only_a, only_b, p = mcnemar(a, b)
        assert p == pytest.approx(stats.binomtest(only_a, max(1, only_a + only_b)).pvalue if only_a + only_b else 1.0)
        assert (only_a, only_b) == (int((a & ~b).sum()), int((~a & b).sum()))
    assert mcnemar(a, a) == (0, 0, 1.0)


def test_intervals_draw_whole_groups():
    """Eight copies of each answer are one observation: the interval must not shrink."""
    values = (torch.rand(400) < 0.3).float()
    weights = resamples(400)
    mean, low, high = interval(values, torch.arange(400), weights)
    error = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert mean == pytest.approx(values.mean().item()) and low < mean < high
    assert high - low == pytest.approx(2 * error, rel=0.15)
    copies = values.repeat_interleave(8), torch.arange(400).repeat_interleave(8)
    assert interval(*copies, weights)[1:] == (low, high)
    same = interval(torch.ones(10), torch.arange(10), resamples(10))
    assert same == (1.0, 1.0, 1.0)


def test_tables_say_what_the_answers_say(tmp_path, capsys):
    """Ten scenes with two questions each: random loses one long answer in five, plphp none."""
    head = {"mode": "accuracy", "weights": "0", "thresholds": [[0.7, 0.5], None]}
    done = {}
    for scene in range(10):
        outcome = {"none": 1, "random@0.5": int(scene % 5 > 0), "random like plphp@0.5": 0, "plphp@0.5": 1}
        outcome |= {"given: my_file.py::keep@0.5": 0, "given: topk:mass=0.9": 1}
        results = {k: [v, float(v), 0.5, [0.5] * 6, [0.5] * 6] for k, v in outcome.items()}
        short, size = {k: [0, 0.0, 0.5, [0.5] * 6, [0.5] * 6] for k in outcome}, [1000, 3000]
        done[scene] = [
            {"task": "list", "words": 9, "bytes": size, "results": results},
            {"task": "size", "words": 1, "bytes": size, "results": short},
        ]
    evaluate.summarise(head, done, tmp_path, "t")
    text = (tmp_path / "t.md").read_text()
    assert "`my_file.py::keep`" in text and "| given: my_file.py::keep | 0.5 |" in text
    assert "| given: my_file.py::keep against random | 0.5 | -80.0 |" in text
    assert "| given: topk:mass=0.9 against random | 0.5 | +20.0 |" in text  # at the nearest retention
    assert "| none |  | 50.0 | 100.0 (100–100) | 50.0 |" in text and "| random | 0.5 | 50.0 | 80.0 (" in text
    assert "| unpruned | 100.0 (100–100) |" in text
    assert "| plphp against random like plphp | 0.5 | +100.0 | +100.0 to +100.0 | 10 | 0 | 0.002 |" in text
    assert text == capsys.readouterr().out.rstrip("\n") + "\n" and (tmp_path / "t.png").stat().st_size > 10_000
    rows = (tmp_path / "t.csv").read_text().splitlines()
    columns = rows[0].split(",")
    assert rows[1].split(",")[columns.index("long")] == "100.0" and rows[1].split(",")[columns.index("short")] == "0.0"
    assert "`plphp:query=last,cover=0,alpha=0.7,beta=0.5,skip=0,dr=0.3`, as published" in text
    assert len(rows) == 7 and "loss low" in rows[0] and rows[1].split(",")[3:5] == ["2500", "4000"]  # bytes


def test_the_first_table_says_what_was_kept_where_it_differs(tmp_path, capsys):
    """narrow keeps 43 % at all retentions; keep has one budget, 12.5 %, and one column."""
    head = {"mode": "accuracy", "weights": "0", "thresholds": [[1, 0], None]}
    kept = {"none": 1.0, "random@0.5": 0.5, "random@0.15": 0.148, "given: a/m.py::narrow@0.5": 0.43}
    kept |= {"given: a/m.py::narrow@0.15": 0.43, "given: a/m.py::keep": 0.125, "given: topk@0.15": 0.17}
    results = {name: [1, 1.0, share, [0.5], [0.5]] for name, share in kept.items()}
    done = {n: [{"task": "list", "words": 9, "bytes": [1000, 3000], "results": results}] for n in range(3)}
    labels = {f"a/m.py::{name}": f"m.py::{name}" for name in ("narrow", "keep")}
    made = {name: lambda *_: make_method("grid", 0.5) for name in kept}
    evaluate.summarise(head, done, tmp_path, "t", labels, made)
    out, err = capsys.readouterr()
    cell = "100.0 (100–100)"
    lines = out.splitlines()
    assert f"| `m.py::narrow` | {cell}, 43 % kept | {cell}, 43 % kept |" in lines
    assert f"| `m.py::keep` |  | {cell}, 12 % kept |" in lines and f"| `topk` |  | {cell} |" in lines
    assert f"| unpruned | {cell} | {cell} |" in lines and "PLPHP" not in out
    pairs = [line.split(" | ")[:2] for line in lines if " against " in line]
    assert pairs == [["| given: m.py::keep against random", "0.15"], ["| given: topk against random", "0.15"]]
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    note = "note: m.py::narrow kept 43.0 % of the vision tokens instead of"
    assert notes == [f"{note} 50.0 %", f"{note} 15.0 %"]
    assert err.splitlines()[-1] == f"written: {', '.join(str(tmp_path / f't.{kind}') for kind in ('csv', 'md', 'png'))}"


@torch.inference_mode()
def test_fitted_thresholds_divide_the_layers_into_thirds(demo):
    """Over all questions about singles and pairs, by prefill alone; the first thresholds were those of singles."""
    for lookahead in (None, demo.lookahead):
        found = []
        for scene in range(5):
            drawn, questions = evaluate.held_out_questions(scene, scene % 5 == 4, False, 0)
            tokens = evaluate.encode_scenes(demo, drawn)
            for q in questions:
                ids, _, _ = conversation(demo, q, None, len(drawn))
                found += evaluate.gammas_of(evaluate.asked_with(demo, ids, tokens, []), lookahead)
        alpha, beta = evaluate.thresholds(demo, lookahead, number=5)
        ordered = sorted(found)
        assert (alpha, beta) == (round(ordered[2 * len(found) // 3], 3), round(ordered[len(found) // 3], 3))


def test_the_fingerprint_is_that_of_the_tensors(tmp_path):
    """Not of the metadata, which safetensors may write in another order."""

    def written(folder, change, **about):
        folder.mkdir()
        save_file(
            {"a": torch.arange(4.0) + change, "b": torch.ones(2, dtype=torch.bfloat16)}, folder / "m.safetensors", about
        )
        return evaluate.fingerprint(folder)

    same = [written(tmp_path / name, 0, note=name) for name in ("x", "y")]
    assert same[0] == same[1] != written(tmp_path / "z", 1)


# ---------------------------------------------------------------- files


def test_a_run_goes_on_where_it_was_killed(tmp_path, capsys):
    """A partial last line is redone, whole lines are not; lines of other conditions are rejected."""
    answers = tmp_path / "a.jsonl"
    (tmp_path / "mine.py").write_text("def all_of_it(view):\n    return None\n")
    mine = f"{tmp_path / 'mine.py'}::all_of_it"
    words = "accuracy", "--questions", "9", "--workers", "1", "--answers", str(answers), "--methods", mine, "plphp:dr=0"
    only = "--only", "random", "shared"
    evaluate.main([*words, *only, "uniform"])
    table, whole = capsys.readouterr().out, answers.read_text().splitlines()
    assert len(whole) == 3 and "| shared | 0.3 |" in table and (tmp_path / "pruning-accuracy.csv").exists()
    assert "| topk | 0.15 |" in table and "| given: mine.py::all_of_it |  | 100.0 |" in table
    assert table.count(f"| given: {FULL} | 0.") == 3
    answers.write_text("\n".join(whole[:2]) + "\n" + whole[2][:100])
    evaluate.main([*words, *only, "uniform"])
    again = capsys.readouterr()
    assert answers.read_text().splitlines() == whole and again.out == table and "1/1 scenes" in again.err
    assert "plphp:dr=0 uses the settings in " in again.err and str(tmp_path / "pruning-accuracy.md") in again.err
    assert json.loads(whole[0])["conditions"][0] == "none"
    (tmp_path / "mine.py").write_text("def all_of_it(view):\n    return None  # changed\n")
    differing = ("with topk", [*words, *only]), (f"({tmp_path / 'mine.py'} has changed)", [*words, *only, "uniform"])
    for what, other in differing:
        with pytest.raises(SystemExit) as left:
            evaluate.main(other)
        err = capsys.readouterr().err
        assert left.value.code == 2 and err.splitlines()[-1].startswith("error: ") and what in err


HEAD = {
    "mode": "accuracy", "weights": "0", "thresholds": [[1, 0], None], "conditions": ["none", "grid@0.5"], "files": {},
}  # fmt: skip


def test_answers_of_another_run_are_refused_by_what_differs(tmp_path):
    path = tmp_path / "a.jsonl"
    assert evaluate.open_answers(path, HEAD) == {}
    changed = HEAD | {"files": {"mine.py": "1"}}
    assert evaluate.open_answers(path, changed) == {} and json.loads(path.read_text()) == changed  # held no answers
    with open(path, "a") as file:
        file.write('{"scene": 7, "questions": []}\n')
    assert evaluate.open_answers(path, changed) == {7: []}
    for other, words in (
        ({"weights": "1"}, "other weights"), ({"thresholds": [[2, 0], None]}, "other thresholds"),
        ({"mode": "second"}, "of accuracy"), ({"files": {"mine.py": "2"}}, "mine.py has changed"),
        ({"conditions": ["none", "random@0.5"]}, "without random; with grid"),
        ({"conditions": ["none", "grid@0.5", "grid@0.3"]}, "without grid@0.3)"),
        ({"conditions": ["grid@0.5", "none"]}, "another order"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="delete the file") as refused:
            evaluate.open_answers(path, changed | other)
        assert words in str(refused.value)
    path.write_text("a letter\n")
    with pytest.raises(ValueError, match="not a file of answers"):
        evaluate.open_answers(path, HEAD)
    assert path.read_text() == "a letter\n"


def test_labels_of_the_table_can_be_given_to_prune():
    """The methods that they make are those that were measured, also with the demo's plphp.json."""
    fitted = (0.85, 0.71), (0.82, 0.74)
    measured, compared = evaluate.conditions(fitted, 6, folder=DEMO), 0
    for name in evaluate.TABLE:
        label = evaluate.label_of(name, fitted)
        spec = re.search("^`(.*)`", label)
        if spec and name != "fastv":  # its label names no layer
            mine, theirs = make_method(spec[1], 0.5, folder=DEMO), measured[f"{name}@0.5"](None, (), 0)
            same = {"seed": 0, "r": 0}  # each question has its own seed; retention replaces r
            assert mine.settings | same == theirs.settings | same and mine.name == theirs.name
            compared += 1
    assert compared == 17


def test_labels_tell_methods_apart(tmp_path):
    files = [tmp_path / folder / "m.py" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("def keep(view, *, part=3):\n    return None\n")
    one, two = (f"{file}::keep" for file in files)
    assert evaluate.label_specs([one, "topk", "plphp"], DEMO, ["random"]) == {
        one: "m.py::keep", "topk": "topk", "plphp": FULL,  # the demo's plphp.json
    }  # fmt: skip
    assert evaluate.label_specs([one, two, f"{two}:part=4"], DEMO) == {
        one: one, two: two, f"{two}:part=4": "m.py::keep:part=4",
    }  # fmt: skip
    taken = evaluate.taken_labels(["none", "random@0.5", "given: topk@0.5"], ((1, 0), None))
    assert sorted(taken) == ["random", "unpruned"]
    labels = evaluate.label_specs(["random"], DEMO, taken)  # the table draws another seed for each question
    assert labels == {"random": "random:pooled=false,shared=false,scope=image,seed=0"}


# ---------------------------------------------------------------- methods of a file that fail

FAILING = """def keep(view, *, part=3):
    if view.layer == 2:
        raise KeyError("no\\nkey")


def refuse(view):
    raise ValueError("not me")


def five(view):
    return 5
"""
FAULTS = {
    "keep": [1, "mine.py::keep: KeyError in line 3: 'no\\nkey'"],
    "refuse": [1, "mine.py::refuse: ValueError in line 7: not me"],
    "five": [2, "mine.py::five returned int; return bool"],
}


def in_one_line(words, name, folder, capsys):
    """Run a command with a method of FAILING: the exit code of FAULTS, and the error is the last line."""
    (folder / "mine.py").write_text(FAILING)
    with pytest.raises(SystemExit) as left:
        evaluate.main([*words, "--methods", f"{folder / 'mine.py'}::{name}"])
    err = capsys.readouterr().err
    line = err.splitlines()[-1]
    code, words = FAULTS[name]
    assert left.value.code == code and "Traceback" not in err and line.startswith("error: ") and words in line


@pytest.mark.parametrize(("stage", "name"), [("fidelity", "refuse"), ("fidelity", "five"), ("premise", "keep")])
def test_a_method_that_fails_is_one_line(stage, name, tmp_path, capsys):
    words = [stage, "--image", str(DEMO_PICTURE), "--prompt", "What?", "--max-new-tokens", "2"]
    in_one_line(words, name, tmp_path, capsys)


def test_a_method_that_fails_in_a_worker_is_one_line(tmp_path, capsys):
    words = ["accuracy", "--questions", "1", "--workers", "1", "--only", "none", "--answers", str(tmp_path / "a.jsonl")]
    in_one_line(words, "keep", tmp_path, capsys)


def test_progress_is_said_while_an_answer_takes_long(capsys):
    class Slow:
        left = [TimeoutError, 1, TimeoutError, 2]

        def next(self, timeout):
            answer = self.left.pop(0)
            if answer is TimeoutError:
                raise multiprocessing.TimeoutError
            return answer

    assert list(evaluate.with_progress(Slow(), 2, "accuracy", every=1000)) == [1, 2]
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "accuracy: 0/2 scenes", "accuracy: 1/2 scenes", "accuracy: 2/2 scenes",
    ]  # fmt: skip


def test_help_lists_the_names(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in evaluate.TABLE) and "0.5 0.3 0.15" in text


def test_the_table_has_its_rows_unless_others_are_named():
    every = evaluate.conditions(((0.7, 0.5), (0.7, 0.5)), 6)
    names = [name for name in every if evaluate.chosen(name, evaluate.TABLE)]
    assert {evaluate.parts(name)[0] for name in names} == {"none", *evaluate.TABLE} and len(names) == 60
    assert all(evaluate.chosen(name, ["all"]) for name in every)
    assert [name for name in every if evaluate.chosen(name, ["topk@0.3"])] == ["none", "topk@0.3"]


def test_a_run_without_only_has_the_rows_of_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "thresholds", lambda checkpoint, lookahead=None: (0.82, 0.74))  # not what it tests
    answers = tmp_path / "a.jsonl"
    evaluate.main(["accuracy", "--questions", "1", "--workers", "1", "--retentions", "0.5", "--answers", str(answers)])
    names = json.loads(answers.read_text().splitlines()[0])["conditions"]
    assert names == ["none", *(f"{name}@0.5" for name in evaluate.TABLE)] and "hindsight" in capsys.readouterr().out


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / folder / "m.py" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text("def keep(view):\n    return None\n")
    specs, found = [f"{path}::keep" for path in paths], []
    for changed in (None, *paths):
        if changed:
            changed.write_text(changed.read_text() + "# changed\n")
        found.append(evaluate.sources(specs, DEMO))
    assert found[0].keys() >= set(map(str, paths))
    assert found[0] != found[1] != found[2]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["accuracy", "--only", "magic"], "hindsight"),
        (["accuracy", "--only", "random", "grids"], "'grids'"),
        (["accuracy", "--questions", "0"], "--questions"),
        (["accuracy", "--questions", "-5"], "--questions"),
        (["second", "--workers", "0"], "--workers"),
        (["accuracy", "--retentions", "0.5", "2"], "2"),
        (["accuracy", "--retentions", "nan"], "nan"),
        (["accuracy", "--methods", "plphd"], "plphd"),
        (["accuracy", "--methods", "fastv:layer=9"], "layer is 9"),
        (["accuracy", "--methods", "/nowhere.py::mine"], "/nowhere.py"),
        (["accuracy", "--image", "a.png"], "--image"),
        (["accuracy", "--max-new-tokens", "8"], "--max-new-tokens"),
        (["second", "--backend", "torch"], "--backend"),
        (["fidelity", "--only", "random"], "--only"),
        (["fidelity", "--questions", "9"], "--questions"),
        (["fidelity", "--batch", "0", "--image", "a.png", "--prompt", "What?"], "--batch"),
        (["second", "--model", "/nowhere"], "/nowhere"),
        (["accuracy", "--device", "cuda:99"], "cuda:99"),
        (["fidelity", "--prompt", "What?"], "--image"),
        (["premise", "--prompt", "What?"], "--image"),
        (["premise", "--prompt", "What?", "--image", str(DEMO_PICTURE), "--batch", "3"], "--batch"),
        (["premise", "--prompt", "What?", "--image", str(DEMO_PICTURE), "--max-new-tokens", "1"], "fewer than two"),
        (["accuracy", "--rows", "/nowhere.safetensors"], "/nowhere.safetensors"),
        (["fidelity", "--prompt", "What?", "--image", "/nowhere.png"], "/nowhere.png"),
        (["fidelity", "--prompt", "What?", "--image", str(DEMO_PICTURE), "--methods", "plphd"], "plphd"),
        (["fidelity", "--prompt", "What?", "--image", str(DEMO_PICTURE), "--retentions", "2"], "2"),
        (["fidelity", "--prompt", "What?", "--image", str(DEMO_PICTURE), "--methods", "fastv:layer=9"], "layer is 9"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(flags, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        small = {"--answers": str(tmp_path / "a.jsonl"), "--questions": "1", "--workers": "1", "--only": "random"}
        own = [] if flags[0] in ("fidelity", "premise") else [w for pair in small.items() for w in pair]
        evaluate.main([flags[0], *own, *flags[1:]])  # of two, the later flag counts
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and line.startswith("error: ") and word in line and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- ceilings


def test_ceilings_count_the_bytes_that_a_step_reads(demo):
    """The arithmetic from shapes against the parameters of a loaded model."""
    shape = next(s for s in roofline.SHAPES if s.name == "the demo model")
    kv = 2 * 6 * 4 * 32 * 4 * (shape.vision + shape.text)  # bytes of fp32 K and V
    assert roofline.step_bytes(shape, bytes_per_number=4) == step_bytes(demo, kv)
    assert roofline.ceiling(shape, 8, 1.0) == 1 and roofline.ceiling(shape, 8, 0.1) > roofline.ceiling(shape, 1, 0.1)


def test_the_ceilings_of_the_readme_are_the_arithmetic():
    assert roofline.table([1, 8, 32], [0.5, 0.2]) in (ROOT / "benchmarks" / "README.md").read_text()
