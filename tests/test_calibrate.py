"""Calibration: its settings keep the requested fraction, stay close to the unpruned model, and are read by run.py."""

import json
import shutil

import pytest
import torch
from conftest import exit_code_of

import run
from model import load
from model.pruning import make_method
from tests.paths import DEMO, DEMO_PICTURE
from tools import calibrate, scenes
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
    ],
)
def test_wrong_arguments_are_refused_in_one_line(flags, word, tmp_path, capsys):
    assert exit_code_of(calibrate.main, [*flags, "--out", str(tmp_path / "p.json")]) == 2
    out, err = capsys.readouterr()
    *said, line = err.splitlines()
    assert out == "" and said in ([], ["unpruned answers: 0/1"]) and line.startswith("error: ") and word in line
    assert not (tmp_path / "p.json").exists()


def test_the_demo_has_settings_of_its_own():
    method = make_method("plphp", folder=DEMO)
    assert method.settings == {**make_method("plphp").settings, **json.loads((DEMO / "plphp.json").read_text())}
