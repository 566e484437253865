"""The evaluation: shortcuts against real generations, statistics against scipy, files after a kill."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import exit_code_of, refusal
from safetensors.torch import save_file

from model import Generation, Sampling, load
from model.pruning import make_method
from tests.given import given_view
from tests.paths import DEMO, DEMO_PICTURE
from tools import evaluate, scenes
from tools.evaluate import conversation, encode_scenes
from tools.evaluation import runs
from tools.evaluation.controls import Evidence, Like, ValuesDropped, neutral_rows, worth_of_rows
from tools.evaluation.paired import interval, mcnemar, resamples
from tools.evaluation.replay import along, asked_by, asked_with, compare, replay

# settings of plphp in the demo's folder, and the defaults of others
FULL = "dr=0.0,alpha=0.822,beta=0.7358,skip=0,group=mean,values=false,scope=image,query=lookahead,cover=0.5"
SPECS = (
    "random:retention=0.2", "plphp:r=0.6,dr=0.2", "plphp-ada:r=0.4", "snapkv:retention=0.4,values=true", "fastv",
    "pick-random:retention=0.3", "downsample:retention=0.6+topk:retention=0.5", "pick-grid+fastv",
)  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, "fp32")


@pytest.fixture
def mine(tmp_path):
    """SPEC of a method in a file that keeps everything."""
    (tmp_path / "mine.py").write_text("def keep(view):\n    return None\n")
    return f"{tmp_path / 'mine.py'}::keep"


def asked_about(demo, number, which, second=None):
    drawn, questions = evaluate.questions_of(evaluate.FIRST + number)
    ids, fed, targets = conversation(demo, questions[which], second and questions[second], len(drawn))
    asked = asked_with(demo, ids, encode_scenes(demo, drawn), fed, **evaluate.views_of(demo, drawn))
    asked.pick = evaluate.picker_of(demo, drawn)
    return asked, targets, drawn, questions


def table_of(out, columns=None):
    """Rows of the Markdown tables in a text, the first columns of each."""
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")][:columns] for line in lines]


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


@torch.inference_mode()
def test_a_dropped_value_leaves_the_keys_where_they_are(demo):
    asked, *_ = asked_about(demo, 3, 0)
    alike = evaluate.conditions(((0.7, 0.5), None), 6, (0.3,))
    names = "plphp, values dropped only", "random like plphp", "plphp rows+values", "plphp"
    made = [alike[f"{name}@0.3"](asked, None, 7) for name in names]
    plain, *logits = (replay(asked, [method])[0][0] for method in (None, *made))
    assert replay(asked, made)[1] == pytest.approx([1, 0.3, 0.3, 0.3], abs=0.15)
    assert torch.equal(logits[0][0], plain[0]) and not torch.allclose(logits[0][1:], plain[1:], atol=0.1)
    assert isinstance(made[0].rule, ValuesDropped)
    (cache, *_), (full, *_) = (asked.cache(method) for method in (made[0], None))
    keep = asked.cache(made[3])[1][3]
    rows, got = (
        torch.stack([c.v[3][s : s + n] for s, n in zip(c.kv_start[3], c.kv_len[3], strict=True)]) for c in (full, cache)
    )
    torch.testing.assert_close(got, rows * keep[..., None])


@torch.inference_mode()
def test_more_rows_and_what_ranks_instead(demo):
    """Rows from a file equal the model's own rows; all answer rows are hindsight; other prompts give other rankings."""
    made = evaluate.conditions(((1, 0), (1, 0)), 6, (0.3,), rows={"own": demo.lookahead})
    asked, _, drawn, questions = asked_about(demo, 0, 0)
    ids, *_ = conversation(demo, questions[0], None, 1)
    asked.others = evaluate.others_of(demo, ids, encode_scenes(demo, drawn), questions[1], evaluate.FIRST, 1)
    short, *_ = asked_about(demo, 0, next(i for i, q in enumerate(questions) if len(q.answer.split()) < 7))

    def kept(name, asked=asked):
        return torch.stack(asked.cache(made[f"{name}@0.3"](asked, None, 0))[1])

    assert kept("rows own").equal(kept("topk ahead")) and kept("rows own+grid").equal(kept("topk ahead+grid"))
    assert len(short.fed) <= 8 and kept("topk answer rows 1 to 8", short).equal(kept("hindsight", short))
    for name in ("topk ahead, another question", "topk ahead, another picture", "topk neutral rows"):
        assert not any(torch.equal(x, y) for x, y in zip(kept(name), kept("topk ahead"), strict=True)), name
    for name, same in (("another question", (False, True)), ("another picture", (True, False))):
        of, last = asked.others[name](), slice(-8, None)
        question = torch.equal(of.x[: of.tokens][last], asked.x[: asked.tokens][last])
        assert (question, torch.equal(of.x[5:100], asked.x[5:100])) == same
        spans = slice(*asked.spans[0]), slice(*of.spans[0])
        theirs = of.attention_of_rows(demo.lookahead, 3).view(4, 2, -1).mean(1)[:, spans[1]]
        assert torch.equal(worth_of_rows(asked, demo.lookahead, of)(3)[:, spans[0]], theirs)


@torch.inference_mode()
def test_neutral_rows_are_that_token_behind_the_prompt(demo):
    asked, *_ = asked_about(demo, 0, 0)
    token = demo.model.language_model.model.embed_tokens.weight[demo.tokenizer.encode(".")[-1]]
    x, wanted = torch.cat((asked.x[: asked.tokens], token.expand(8, -1))), []

    def look(layer, q, k, v, *_):
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


@torch.inference_mode()
def test_fitted_thresholds_divide_the_layers_into_thirds(demo):
    """Over all questions about singles and pairs, by prefill alone; the first thresholds were those of singles."""
    for lookahead in (None, demo.lookahead):
        found = []
        for scene in range(5):
            drawn, questions = evaluate.held_out_questions(scene, scene == 4, False, 0)
            tokens = encode_scenes(demo, drawn)
            for q in questions:
                ids, _, _ = conversation(demo, q, None, len(drawn))
                found += evaluate.gammas_of(asked_with(demo, ids, tokens, []), lookahead)
        alpha, beta = evaluate.thresholds(demo, lookahead, number=5)
        ordered = sorted(found)
        assert (alpha, beta) == (round(ordered[2 * len(found) // 3], 3), round(ordered[len(found) // 3], 3))


# ---------------------------------------------------------------- any checkpoint, without labels


def test_the_premise_is_a_table_of_what_is_found(demo, mine, capsys):
    question = "What does the sign say?"
    flags = ["--image", str(DEMO_PICTURE), "--prompt", question, "--retentions", "0.5", "0.1"]
    assert evaluate.main(["premise", *flags, "--methods", *evaluate.PREMISE, mine, "topk:retention=0.25"]) == 0
    out = capsys.readouterr().out
    head, *rows = table_of(out)
    told = "told what the answer attends to"
    assert head[3:] == [f"layer {i}" for i in range(6)] and "not a verdict" in out
    by_retention = [f"{name}, {f} asked for" for f in (0.5, 0.1) for name in (*evaluate.PREMISE, told)]
    assert [row[0] for row in rows] == [mine, "topk:retention=0.25", *by_retention]
    assert [int(row[1]) for row in rows] == [100, 25] + [50] * 7 + [10] * 7
    found = {row[0]: [int(x) for x in row[3:]] for row in rows}
    for f in (0.5, 0.1):
        best = found[f"{told}, {f} asked for"]
        assert all(a <= b for r in found if r.endswith(f"{f} asked for") for a, b in zip(found[r], best, strict=True))
    generation = Generation(demo, question, [DEMO_PICTURE])
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
        assert row["steps"] == len(full.token_ids) + 1  # it ends with the stop id, which counts
        real = Generation(*asked_of, prune=make_method(spec))
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


def test_fidelity_gives_a_method_with_its_own_budget_one_row(mine, capsys):
    specs = ["none", "random:keep_tokens=20", "plphp:r=0.4", mine, "random", "fastv"]
    asked = ["--image", str(DEMO_PICTURE), "--prompt", "What?", "--max-new-tokens", "2"]
    assert evaluate.main(["fidelity", *asked, "--methods", *specs, "--retentions", "0.5", "0.25"]) == 0
    out, err = capsys.readouterr()
    _, *rows = table_of(out, 3)
    assert out.endswith(f"\n\n`plphp:r=0.4` is `plphp:r=0.4,{FULL}`\n")  # with the settings in the demo's folder
    twice = [[name, f] for name in ("random", "fastv") for f in ("0.5", "0.25")]
    assert [row[:2] for row in rows] == [*([spec, ""] for spec in specs[:4]), *twice]
    assert [rows[i][2] for i in (0, 3, 4, 5, 6)] == ["100.0 %", "100.0 %", "50.0 %", "25.0 %", "66.7 %"]
    note, unpruned, *off = err.splitlines()
    assert note.startswith("plphp uses the settings in ") and unpruned.startswith("unpruned: ")
    assert [line.split(" of ")[0] for line in off] == ["note: fastv kept 66.7 %", "note: fastv kept 50.0 %"]


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
    assert interval(torch.ones(10), torch.arange(10), resamples(10)) == (1.0, 1.0, 1.0)


# ---------------------------------------------------------------- tables


def test_tables_say_what_the_answers_say(tmp_path, capsys):
    """Ten scenes with two questions each: random loses one long answer in five, plphp none. One of --methods has three
    budgets and misses one; another has its own."""
    head = {"mode": "accuracy", "weights": "0", "thresholds": [[0.7, 0.5], None]}
    kept = {"none": 1.0, "random@0.5": 0.5, "random@0.15": 0.148, "random like plphp@0.5": 0.5, "plphp@0.5": 0.5}
    kept |= {"given: m.py::narrow@0.5": 0.5, "given: m.py::narrow@0.15": 0.43, "given: topk:mass=0.9": 0.125}
    done = {}
    for scene in range(10):
        right = {"random@0.5": int(scene % 5 > 0), "random like plphp@0.5": 0, "given: m.py::narrow@0.5": 0}
        results = {k: [right.get(k, 1), 1.0, share, [share] * 6, [share] * 6] for k, share in kept.items()}
        short = {k: [0, 0.0, *result[2:]] for k, result in results.items()}
        done[scene] = [
            {"task": "list", "words": 9, "bytes": [1000, 3000], "results": results},
            {"task": "size", "words": 1, "bytes": [1000, 3000], "results": short},
        ]
    evaluate.summarise(head, done, tmp_path, "t")
    out, err = capsys.readouterr()
    assert (tmp_path / "t.md").read_text() == out[:-1] and (tmp_path / "t.png").stat().st_size > 10_000
    assert err == f"written: {', '.join(str(tmp_path / f't.{kind}') for kind in ('csv', 'md', 'png'))}\n"
    rows = table_of(out)
    whole, none = "100.0 (100–100)", "0.0 (0–0)"
    assert ["unpruned", whole, whole] in rows and ["given: `m.py::narrow`", none, f"{whole}, 43 % kept"] in rows
    assert ["given: `topk:mass=0.9`", "", f"{whole}, 12 % kept"] in rows  # at the nearest retention
    assert ["`plphp:query=last,cover=0,alpha=0.7,beta=0.5,skip=0,dr=0.3`, as published", whole, ""] in rows
    assert ["none", "", "100.0", whole, "50.0"] in [row[:5] for row in rows]
    pairs = {(row[0], row[1]): row[2:] for row in rows if " against " in row[0]}
    assert pairs["plphp against random like plphp", "0.5"] == ["+100.0", "+100.0 to +100.0", "10", "0", "0.002"]
    assert pairs["given: m.py::narrow against random", "0.5"][0] == "-80.0"
    assert pairs["given: topk:mass=0.9 against random", "0.15"][0] == "+0.0"
    assert ("given: m.py::narrow against random", "0.15") not in pairs  # not at equal bytes
    with open(tmp_path / "t.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["long"], row["short"], row["kv bytes"], row["kv bytes, all kept"]) == ("100.0", "0.0", "4000", "4000")
    assert "PLPHP with alpha 0.7, beta 0.5; weights 0" in out


def test_labels_of_the_table_can_be_given_to_prune():
    """Also with the demo's plphp.json they make the methods that were measured."""
    fitted = (0.85, 0.71), (0.82, 0.74)
    measured, compared = evaluate.conditions(fitted, 6, folder=DEMO), 0
    for name in evaluate.TABLE:
        spec = re.search("^`(.*)`", evaluate.label_of(name, fitted))
        for f in evaluate.RETENTIONS if spec and name != "fastv" else ():  # its label names no layer
            mine, theirs = make_method(spec[1], f, folder=DEMO), measured[f"{name}@{f}"](None, (), 0)
            same = {"seed": 0, "r": 0}  # each question has its own seed; retention replaces r
            assert mine.settings | same == theirs.settings | same and mine.name == theirs.name
            compared += 1
    assert compared == 3 * 17


def test_given_methods_are_named_by_the_settings_that_were_used():
    """A name in a table makes the method that was measured, also without the file in the checkpoint's folder."""
    for spec in ("plphp", "plphp-ada:cover=0", "plphp:query=last,window=3", "plphp:keep_tokens=7", "plphp:r=0.3"):
        name = evaluate.written_out(spec, DEMO)
        assert evaluate.budgets(name, evaluate.RETENTIONS) == evaluate.budgets(spec, evaluate.RETENTIONS)
        for f in evaluate.budgets(spec, evaluate.RETENTIONS):
            assert make_method(name, f).effective == make_method(spec, f, folder=DEMO).effective
    assert evaluate.written_out("topk", DEMO) == "topk" and evaluate.written_out("none", DEMO) == "none"


def test_the_table_has_its_rows_unless_others_are_named(tmp_path, capsys, monkeypatch):
    every = evaluate.conditions(((0.7, 0.5), (0.7, 0.5)), 6)
    assert all(evaluate.chosen(name, ["all"]) for name in every)
    assert [name for name in every if evaluate.chosen(name, ["topk@0.3"])] == ["none", "topk@0.3"]
    assert len([name for name in every if evaluate.chosen(name, evaluate.TABLE)]) == 60  # no fastv at 0.15
    monkeypatch.setattr(evaluate, "thresholds", lambda checkpoint, lookahead=None: (0.82, 0.74))  # not what it tests
    answers = tmp_path / "a.jsonl"
    flags = ["--questions", "1", "--workers", "1", "--retentions", "0.5", "--answers", str(answers)]
    assert evaluate.main(["accuracy", *flags]) == 0
    names = json.loads(answers.read_text().splitlines()[0])["conditions"]
    assert names == ["none", *(f"{name}@0.5" for name in evaluate.TABLE)] and "hindsight" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main(["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in evaluate.TABLE) and "0.5 0.3 0.15" in text


# ---------------------------------------------------------------- files


def test_a_run_goes_on_where_it_was_killed(tmp_path, mine, capsys):
    """A partial last line is redone, whole lines are not."""
    answers = tmp_path / "a.jsonl"
    words = "accuracy", "--questions", "9", "--workers", "1", "--answers", str(answers), "--methods", mine, "plphp:dr=0"
    only = "--only", "random", "shared", "topk"
    assert evaluate.main([*words, *only]) == 0
    table, whole = capsys.readouterr().out, answers.read_text().splitlines()
    assert len(whole) == 3 and json.loads(whole[0])["conditions"][0] == "none"
    rows = table_of(table, 3)
    assert [f"given: {mine}", "", "100.0"] in rows and [row[0] for row in rows].count("given: plphp:dr=0") == 3
    assert table.count(FULL) == 1 and table.endswith(f"\n\n`plphp:dr=0` is `plphp:{FULL}`\n\n")
    answers.write_text("\n".join(whole[:2]) + "\n" + whole[2][:100])
    assert evaluate.main([*words, *only]) == 0
    again = capsys.readouterr()
    assert answers.read_text().splitlines() == whole and again.out == table and "scenes: 1/1" in again.err
    assert "plphp uses the settings in " in again.err


def test_a_rerun_computes_only_what_is_new_or_changed(tmp_path, mine, capsys):
    """What a method author does: add a method, edit it, leave it out, take the edit back."""
    answers, file = tmp_path / "a.jsonl", tmp_path / "mine.py"
    flags = "accuracy", "--questions", "1", "--workers", "1", "--retentions", "0.5", "--answers", str(answers)

    def computed(*more):
        """Conditions that this run added to the file, and its tables."""
        before = len(answers.read_text().splitlines()) if answers.exists() else 0
        assert evaluate.main([*flags, *more]) == 0
        lines = map(json.loads, answers.read_text().splitlines()[before:])
        names = [name for line in lines if "scene" in line for name in line["questions"][0]["results"]]
        return names, table_of(capsys.readouterr().out)

    all_of_it, old = ("--only", "random", "grid", "--methods", "topk", mine), file.read_text()
    names, _ = computed("--only", "random", "grid", "--methods", mine)
    assert names == ["none", "random@0.5", "grid@0.5", f"given: {mine}"]
    names, tables = computed(*all_of_it)
    assert names == ["given: topk@0.5"]
    assert computed("--only", "grid")[0] == [] and computed(*all_of_it) == ([], tables)
    (tmp_path / "other.py").write_text("")  # beside it, but not named in it
    file.write_text("def keep(view):\n    return view.text.expand(view.kv_heads, -1)\n")
    assert computed(*all_of_it)[0] == [f"given: {mine}"]
    file.write_text(old)
    assert computed(*all_of_it) == ([], tables)
    answers.unlink()
    assert sorted(computed(*all_of_it)[1]) == sorted(tables)  # as if computed at once


HEAD = {
    "mode": "accuracy", "weights": "0", "thresholds": [[1, 0], None], "conditions": ["none", "grid@0.5"], "files": {},
}  # fmt: skip


def test_answers_of_another_run_are_refused_by_what_differs(tmp_path):
    path, head = tmp_path / "a.jsonl", HEAD | {"dtype": "fp32", "world": "0"}
    line = {"scene": 7, "questions": []}
    assert evaluate.open_answers(path, HEAD | {"mode": "second", "dtype": "fp32", "world": "0"}).values
    evaluate.open_answers(path, head).add(line)  # it held no answers
    others = head | {"conditions": ["none", "random@0.5"]}
    assert evaluate.open_answers(path, head).values == [head, line]
    assert evaluate.open_answers(path, others).values == [head, line, others]
    for other, words in (
        ({"weights": "1"}, "the model changed"), ({"mode": "second"}, "the stage changed"),
        ({"dtype": "bf16", "world": "1"}, "--dtype changed"), ({"world": "1"}, "the demo world changed"),
    ):  # fmt: skip
        said = refusal(evaluate.open_answers, path, head | other)
        assert said.startswith(words) and "or delete it" in said
    path.write_text(json.dumps(HEAD) + "\n" + json.dumps(line) + "\n")  # as the first files were
    assert evaluate.open_answers(path, head).values == [HEAD, line, head]
    assert "--dtype changed" in refusal(evaluate.open_answers, path, head | {"dtype": "bf16"})
    path.write_text("a letter\n")
    assert "not a file of answers" in refusal(evaluate.open_answers, path, head) and path.read_text() == "a letter\n"


def test_results_are_valid_while_what_they_depend_on_is():
    """Thresholds that are fitted, the file of a method or of rows, and settings in the checkpoint's folder."""
    files = {"m.py": "1", "am.py": "1", "r.safetensors": "1", "plphp.json": "1"}
    of = {  # condition: what changes it
        "none": None, "grid@0.5": None, "plphp@0.5": "thresholds", "random like plphp@0.5": "thresholds",
        "given: m.py::keep:part=3@0.5": "m.py", "given: am.py::keep": "am.py", "plphp as shipped@0.5": "plphp.json",
        "rows r.safetensors@0.5": "r.safetensors", "rows r.safetensors+grid@0.5": "r.safetensors",
    }  # fmt: skip
    head = HEAD | {"conditions": list(of), "files": files}
    line = {"scene": 7, "questions": [{"task": "list", "results": {name: [1] for name in of}}]}
    for change in (None, "thresholds", *files):
        now = head | ({"thresholds": [[2, 0], None]} if change == "thresholds" else {})
        now |= {"files": files | {change: "2"}} if change in files else {}
        assert evaluate.valid_answers([now, head, line], now)[7] == [
            {"task": "list", "results": {name: None if change and change == by else [1] for name, by in of.items()}}
        ]
    fewer, later = head | {"conditions": ["none", "more@0.5"]}, {"none": [1], "more@0.5": [2]}
    more = {"scene": 7, "questions": [{"task": "list", "results": {"more@0.5": [2]}}]}
    assert evaluate.valid_answers([head, line, fewer, more], fewer)[7] == [{"task": "list", "results": later}]


def test_files_that_answers_depend_on_are_told_apart(tmp_path):
    """By tensors, not by metadata, which safetensors may write in another order; methods by their path."""

    def written(folder, change, **about):
        folder.mkdir()
        tensors = {"a": torch.arange(4.0) + change, "b": torch.ones(2, dtype=torch.bfloat16)}
        save_file(tensors, folder / "m.safetensors", about)
        return evaluate.fingerprint(folder)

    same = [written(tmp_path / name, 0, note=name) for name in ("x", "y")]
    assert same[0] == same[1] != written(tmp_path / "z", 1)
    paths, found = [tmp_path / folder / "m.py" for folder in "xy"], []
    for path in paths:
        path.write_text("one")
    for path in (*paths, paths[0]):
        names = "none", "plphp as shipped@0.5", *(f"given: {path}::keep:part=3@0.5" for path in paths)
        found.append(evaluate.sources(names, DEMO))
        path.write_text("another")
    assert found[0].keys() == {"plphp.json", *map(str, paths)} and found[0] != found[1] != found[2] != found[0]
    path.write_text("import torch, helper")
    codes = [evaluate.code(path)]
    for name, text in (("helper", "from more import x"), ("more", "x = 1"), ("unused", "x = 1"), ("more", "x = 2")):
        path.with_name(f"{name}.py").write_text(text)
        codes.append(evaluate.code(path))
    assert codes[2] == codes[3] and len(set(codes)) == 4
    (own,) = evaluate.sources(["given: topk:window=3@0.5", "given: none", "topk@0.5"], DEMO)
    assert own.endswith("topk.py")  # a method of this repository
    both = evaluate.sources([f"given: pick-grid+{path}::keep@0.3", "given: pick-grid:retention=0.2+topk"], DEMO)
    assert [Path(file).name for file in both] == ["pick_grid.py", "m.py", "topk.py"]


def test_progress_comes_first_last_and_now_and_then(capsys, monkeypatch):
    now = iter([0, 4, 11, 12, 30])
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(now))
    assert list(runs.progress("abcd", "letters")) == list("abcd")
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "letters: 0/4", "letters: 2/4", "letters: 4/4",
    ]  # fmt: skip


# ---------------------------------------------------------------- errors

FAILING = """def keep(view):
    raise KeyError("no\\nkey")


def five(view):
    return 5
"""
ONE = ["--prompt", "What?", "--image", str(DEMO_PICTURE), "--max-new-tokens", "2"]


@pytest.mark.parametrize(
    ("words", "name", "code", "said"),
    [
        (["fidelity", *ONE], "five", 2, "mine.py::five returned int in layer 0; return torch.bool ("),
        (["premise", *ONE], "keep", 1, "mine.py::keep: KeyError in line 2: 'no\\nkey'"),
        (["accuracy", "--questions", "1", "--workers", "1", "--only", "none"], "keep", 1, "KeyError in line 2"),
    ],
)
def test_a_method_that_fails_is_one_line(words, name, code, said, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(FAILING)
    answers = ["--answers", str(tmp_path / "a.jsonl")] if words[0] == "accuracy" else []
    assert evaluate.main([*words, *answers, "--methods", f"{tmp_path / 'mine.py'}::{name}"]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("error: ") and said in err.splitlines()[-1]


def test_an_interrupted_run_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "choose_device", interrupted)
    assert evaluate.main(["accuracy"]) == 130 and "the same command resumes" in capsys.readouterr().err
    assert evaluate.main(["fidelity", *ONE]) == 130 and "nothing is kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "flags", "word"),
    [
        ("accuracy", ["--only", "me"], "'me'; give --methods FILE.py::NAME for your own, or all or some of none, 'plp"),
        ("accuracy", ["--questions", "0"], "--questions"),
        ("accuracy", ["--out", __file__], "is a file; give a folder"),
        ("second", ["--workers", "0"], "--workers"),
        ("accuracy", ["--retentions", "0.5", "2"], "2"),
        ("accuracy", ["--retentions", "nan"], "nan"),
        ("accuracy", ["--methods", "plphd"], "plphd"),
        ("accuracy", ["--methods", "fastv:layer=9"], "layer is 9"),
        ("accuracy", ["--methods", "/nowhere.py::mine"], "/nowhere.py"),
        ("accuracy", ["--image", "a.png"], "--image"),
        ("accuracy", ["--rows", "/nowhere.safetensors"], "/nowhere.safetensors"),
        ("second", ["--max-new-tokens", "8"], "--max-new-tokens"),
        ("second", ["--model", "/nowhere"], "/nowhere"),
        ("accuracy", ["--device", "cuda:99"], "cuda:99"),
        ("fidelity", [*ONE, "--only", "random"], "--only"),
        ("fidelity", [*ONE, "--batch", "0"], "--batch"),
        ("fidelity", ["--prompt", "What?"], "--image"),
        ("fidelity", [*ONE, "--image", "/nowhere.png"], "/nowhere.png"),
        ("fidelity", [*ONE, "--methods", "fastv:layer=9"], "layer is 9"),
        ("premise", [*ONE, "--batch", "3"], "--batch"),
        ("premise", [*ONE, "--max-new-tokens", "1"], "fewer than two"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(stage, flags, word, tmp_path, capsys):
    small = ["--answers", str(tmp_path / "a.jsonl"), "--questions", "1", "--workers", "1", "--only", "random"]
    words = [stage, *(small if stage in ("accuracy", "second") else []), *flags]  # of two equal flags the later counts
    assert exit_code_of(evaluate.main, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and word in line and not list(tmp_path.iterdir())
