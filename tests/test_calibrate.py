"""Calibration: its settings keep the requested fraction, stay close to the unpruned model, and are read by run.py."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import exit_code_of
from oracle import expanded, hf_pictures
from test_methods import pictures

import run
from model import Generation, Sampling, load
from model.api import change_budget
from model.pruning import make_method
from model.pruning.yopo import Yopo
from tests.paths import DEMO, DEMO_PICTURE
from tools import calibrate, scenes
from tools.evaluation.heads import ratios, table_of, threshold_of
from tools.train_demo import HELD_OUT, held_out_questions


def samples(checkpoint, numbers):
    found = []
    for number in numbers:
        drawn, questions = held_out_questions(number, False, False, 0)
        pictures = [scenes.draw_scene(s) for s in drawn]
        found += [calibrate.sample(checkpoint, q.question, pictures, 64) for q in questions[:3]]
    return found


@pytest.mark.parametrize("wanted", [0.5, pytest.param(0.3, marks=pytest.mark.thorough)])
@torch.inference_mode()
def test_a_proposal_holds_on_scenes_it_has_not_seen(tmp_path, wanted, capsys):
    """Within three points of the requested fraction; KL at most that of the default thresholds, which keep no less."""
    calibrate.main(["--scenes", "2", "--retention", str(wanted), "--out", str(tmp_path / "p.json")])
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "p.json").read_text())
    assert "median" in out and str(found) in out
    checkpoint = load(DEMO, "fp32")
    fresh = samples(checkpoint, range(HELD_OUT + 7000, HELD_OUT + 7004))
    fixed = next(calibrate.candidates(fresh, wanted))  # r is fitted to these scenes
    (ours, kept, _), (theirs, same, _) = calibrate.judge(fresh, "plphp", [found, fixed])
    assert abs(kept - wanted) <= 0.03 and same >= wanted - 0.02 and ours <= theirs


def test_fitted_thresholds_beat_unfitted_ones_at_the_same_bytes(tmp_path, capsys):
    """On the samples themselves, fitting only alpha, beta, r and dr; the unfitted setting is among those tried."""
    calibrate.main(["--scenes", "1", "--rates-only", "--out", str(tmp_path / "p.json")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("}") or "fitted" in line]
    best, unfitted = lines[0], next(line for line in lines if "fitted)" in line)
    assert float(best[0]) <= float(unfitted[0]) and abs(float(best[1]) - float(unfitted[1])) < 2.5  # KL, percent kept
    assert set(json.loads((tmp_path / "p.json").read_text())) == {"r", "dr", "alpha", "beta"}


def test_settings_are_ranked_by_kl_among_those_that_surely_keep_what_is_wanted():
    tried = [{"dr": dr} for dr in (0.3, 0.3, 0.3, 0.1, 0.0, 0.0)]
    results = [(0.1, 0.5, 0.02), (0.1, 0.53, 0.0), (0.20001, 0.5, 0.0), (0.20003, 0.49, 0.001), (0.3, 0.51, 0.0)]
    results += [(0.2, 0.47, 0.0), (0.05, 0.5, 0.0)]  # the last result is --retention without calibration
    assert calibrate.rank(tried, results, 0.5) == [3, 2, 4]
    ways = [{"dr": 0.1, "skip": 0}, {"dr": 0.0, "skip": 1}, {"dr": 0.0, "skip": 0}, {"dr": 0.0, "skip": 0}]
    assert calibrate.rank(ways, [(kl, 0.5, 0.0) for kl in (0.0001, 0.0002, 0.0004, 0.0003)], 0.5) == [3, 2, 1, 0]


def test_the_share_on_a_grid_is_the_best_over_all_budgets(monkeypatch, capsys):
    """Not the one that is best where little is dropped. r gives way to the retention; all other settings stay."""
    kls = {0.5: (0.1, 0.2, 0.3, 0.3), 0.3: (0.2, 0.2, 0.2, 0.2), 0.15: (4.0, 3.0, 2.0, 1.998)}  # 0.0007 is chance
    seen = []

    def judge(samples, method_name, tried):
        seen.extend(tried)
        return [(kls[t["retention"]][calibrate.COVERS.index(t["cover"])], t["retention"], 0.0) for t in tried]

    monkeypatch.setattr(calibrate, "judge", judge)
    found = {"r": 0.4, "dr": 0.1, "alpha": 0.8, "beta": 0.7, "skip": 0, "query": "lookahead", "cover": 0.0}
    assert calibrate.choose_cover([], "plphp", found) == 0.5
    assert all(t["dr"] == 0.1 and "r" not in t for t in seen) and len(seen) == 12
    assert "cover 0.5" in (out := capsys.readouterr().out) and "4.0000" in out.splitlines()[-1]


def test_r_is_solved_for_with_clamped_rates():
    """A layer far above alpha cannot keep more than everything, so r must exceed the plain mean."""
    gammas = [[0.9, 0.1]]
    r = calibrate.solve(gammas, 0, 2, alpha=0.5, beta=0.2, dr=0.3, retention=0.8)
    assert (min(1, r + 0.3) + max(0, r - 0.3)) / 2 == pytest.approx(0.8, abs=1e-3) and r > 0.85
    assert calibrate.solve(gammas, 1, 3, alpha=0.5, beta=0.2, dr=0.0, retention=0.5) == pytest.approx(0.25, abs=1e-3)


def test_run_takes_the_settings_of_the_models_folder(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    (folder / "plphp.json").write_text('{"r": 0.25, "dr": 0.0, "skip": 0}')
    asked = ["--model", str(folder), "--image", str(DEMO_PICTURE), "--prompt", "Count the objects.", "--json"]

    def settings(*flags):
        assert run.main([*asked, *flags]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["prune"], err

    found, err = settings("--prune", "plphp")
    assert found["kept_per_layer"] == [64] * 6 and "plphp.json" in err
    assert settings("--prune", "plphp", "--retention", "0.5")[0]["kept_per_layer"] == [128] * 6
    ada, err = settings("--prune", "plphp-ada", "--retention", "0.5")  # one file serves the family
    assert ada["retention_actual"] == 0.5 and "plphp.json" in err and "requested" not in err
    assert settings("--prune", "plphp:r=0.75", "--set", "skip=2")[0]["kept_per_layer"] == [256] * 2 + [192] * 4
    found, err = settings("--prune", "random")
    assert found["settings"]["retention"] == 0.5 and "plphp.json" not in err
    (folder / "plphp.json").write_text('{"speed": 1}')
    assert run.main([*asked, "--prune", "plphp"]) == 2 and "'speed'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--scenes", "1", "--retention", "0"], "--retention"),
        ([], "--image"),
        (["--scenes", "0"], "--scenes"),
        (["--scenes", "1", "--device", "cuda:99"], "cuda:99"),
        (["--image", "a.png", "--scenes", "2"], "--scenes"),
        (["--scenes", "2", "--prompt", "What?"], "--prompt"),
        (["--image", "/nowhere.png"], "/nowhere.png"),
        (["heads", "--scenes", "1", "--rates-only"], "--rates-only"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(flags, word, tmp_path, capsys):
    assert exit_code_of(calibrate.main, [*flags, "--out", str(tmp_path / "p.json")]) == 2
    out, err = capsys.readouterr()
    *said, line = err.splitlines()
    assert out == "" and said in ([], ["unpruned answers: 0/1"]) and line.startswith("error: ") and word in line
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("name", ["plphp", "yopo"])
def test_the_demo_has_settings_of_its_own(name):
    method = make_method(name, folder=DEMO)
    assert method.settings == {**make_method(name).settings, **json.loads((DEMO / f"{name}.json").read_text())}


# ---------------------------------------------------------------- YOPO's table


def test_a_wanted_fraction_replaces_the_threshold_of_the_models_folder():
    method = make_method("yopo", folder=DEMO)
    changed = change_budget(method, DEMO, {"retention": 0.25, "keep_tokens": None})
    assert changed.settings["heads"] == method.settings["heads"] and changed.rule.active(6, 4).sum() == 6
    assert make_method("yopo", 0.25, folder=DEMO).settings == changed.settings != method.settings
    assert make_method("yopo:threshold=5", folder=DEMO).rule.threshold == 5.0


@pytest.mark.parametrize("samples", [1, 2, 5, 10, 13])
def test_an_entry_above_the_threshold_means_more_than_two_fifths_of_the_votes(samples):
    """For thresholds at, below and above each ratio, with ties."""
    found = torch.randint(0, 9, (samples, 3, 4)).double()
    for threshold in [x / 2 for x in range(-1, 19)]:
        votes = (found > threshold).sum(0)
        assert (table_of(found) > threshold).equal(10 * votes > 4 * samples), threshold


def test_the_threshold_keeps_the_wanted_fraction():
    """24 KV heads, the first 4 always; the larger of the 2 query heads decides."""
    table = torch.rand(6, 8, dtype=torch.float64)
    for retention in (0.05, 0.17, 0.5, 0.52, 0.6, 0.98, 1.0):
        active = Yopo(heads=table.tolist(), threshold=threshold_of(table, 4, 1, retention)).active(6, 4)
        assert active.sum() == max(4, round(24 * retention))


def test_ratios_are_those_of_whole_matrices_of_attention(make_hf_checkpoint, tmp_path):
    """Of the rows after the pictures and of the answer's, each over the prompt's tokens."""
    hf = make_hf_checkpoint(tmp_path, {"num_hidden_layers": 3}, {"image_size": 56}, seed=3)
    checkpoint = dataclasses.replace(load(tmp_path, "fp32"), stop_ids=())
    asked = calibrate.sample(checkpoint, "what <image> is <image> left?", pictures(2), 6).asked
    generation = Generation(checkpoint, "what <image> is <image> left?", pictures(2), Sampling(6))
    "".join(generation)
    prompt = expanded(generation)
    hf.set_attn_implementation("eager")
    given = torch.tensor([prompt + generation.token_ids[:-1]])
    layers = hf(input_ids=given, **hf_pictures([generation]), output_attentions=True).attentions
    vision = torch.tensor([i == checkpoint.config.image_token_index for i in prompt])
    for row, attention in zip(ratios(asked), layers, strict=True):
        over_prompt = attention[0, :, generation.spans[-1][1] :, : len(prompt)].double()
        over_prompt /= over_prompt.sum(-1, keepdim=True)
        wanted = over_prompt[..., vision].sum((1, 2)) / over_prompt[..., ~vision].sum((1, 2))
        assert torch.allclose(row, wanted, rtol=1e-4)


def test_the_command_finds_a_table_that_run_takes(tmp_path, capsys):
    """The heads that look least are dropped, half of all, in a copy of the demo without its own file."""
    folder = shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("yopo.json"))
    asked = ["--model", str(folder), "--image", str(DEMO_PICTURE), "--prompt", "What?", "-n", "2", "--json"]
    assert run.main([*asked, "--prune", "yopo"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: method yopo: ") and "tools/calibrate.py heads" in error
    calibrate.main(["heads", "--model", str(folder), "--scenes", "1", "--out", str(folder / "yopo.json")])
    found = json.loads((folder / "yopo.json").read_text())
    assert capsys.readouterr().out.count("%  {") == 8 and [len(row) for row in found["heads"]] == [8] * 6
    assert run.main([*asked, "--prune", "yopo"]) == 0
    prune = json.loads(capsys.readouterr().out)["prune"]
    assert prune["retention_actual"] == 0.5 and prune["kept_per_layer"][0] == 256
    assert run.main([*asked, "--prune", "yopo", "--retention", "0.25"]) == 0
    assert json.loads(capsys.readouterr().out)["prune"]["retention_actual"] == 0.25
