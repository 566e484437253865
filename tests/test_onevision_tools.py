"""The tools and drawings on a LLaVA-OneVision of random weights: tiles whose map shrinks, several pictures, frames."""

import csv
import json
import re
import shutil

import pytest
from test_evaluate import table_of
from test_frames import NAMES, files, folder  # noqa: F401  fixtures
from test_parity import noise

from model import Generation, Sampling, load
from model.pruning import make_method
from model.show import Shown
from tools import calibrate, evaluate, show_heads, show_pruning, train_lookahead

ASKED = ["--image", "large.png", "--prompt", "what is this?"]
WHOLE, MAP = 9, (9, 9)  # tokens of the square and of the shrunk map of 4 x 4 tiles, which has a newline for each row


@pytest.fixture
def model(folder, files):  # noqa: F811
    """A copy of the folder whose pictures may have 16 tiles, in fp32; large.png in the working folder has them."""
    copied = files / "model"
    shutil.copytree(folder, copied)
    canvases = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    for name in ("config.json", "preprocessor_config.json"):
        raw = json.loads((copied / name).read_text())
        (copied / name).write_text(json.dumps(raw | {"image_grid_pinpoints": canvases}))
    noise(112, 112, seed=1).save("large.png")
    return copied


def ran(tool, model, *flags):
    assert not tool.main([*flags, "--model", str(model), "--dtype", "fp32"])  # 0 or None


def test_look_ahead_rows_are_trained_and_rank(model, cli):
    lines = [{"question_id": i, "image": NAMES if i % 4 else "large.png", "text": f"what {i}?"} for i in range(12)]
    (model.parent / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = [
        "--questions",
        "q.jsonl",
        "--steps",
        "1",
        "--report",
        "1",
        "--batch",
        "2",
        "--rank",
        "2",
        "--held-out",
        "1",
    ]
    ran(train_lookahead, model, *flags, "--max-new-tokens", "3", "--run", "run")
    (row,) = csv.DictReader((model.parent / "run" / "lookahead.csv").read_text().splitlines())
    assert float(row["own"]) == 1 and float(row["held-out kl"]) > 0 and 0 < float(row["best@0.5"]) <= 1
    shutil.copy("run/lookahead.safetensors", model)
    code, out, err = cli("--model", model, *ASKED, "-n", 2, "--prune", "topk:query=lookahead,retention=0.5", "--json")
    assert code == 0 and json.loads(out)["prune"]["retention_actual"] == pytest.approx(0.5, abs=0.01), err


def test_premise_and_fidelity_measure(model, capsys):
    methods = ["--methods", "topk", "random", "--retentions", "0.3", "--max-new-tokens", "4"]
    ran(evaluate, model, "premise", *ASKED, *methods)
    _, *rows = table_of(capsys.readouterr().out)
    assert [int(row[1]) for row in rows] == [30] * 3 and all(0 < int(row[2]) <= 100 for row in rows)
    assert int(rows[1][2]) < int(rows[2][2])  # told what the answer attends to, a method finds more than at random
    ran(evaluate, model, "fidelity", *ASKED, "--methods", "none", *methods[1:])
    _, *rows = table_of(capsys.readouterr().out, 3)
    assert [row[2] for row in rows] == ["100.0 %", "30.3 %", "30.3 %"]  # 30 of 99


@pytest.mark.parametrize(("stage", "name"), [("plphp", "plphp"), ("schedule", "g-search"), ("heads", "yopo")])
def test_calibrated_settings_are_those_of_the_checkpoint(model, stage, name, monkeypatch, capsys):
    if stage == "schedule":
        shapes = calibrate.shapes
        monkeypatch.setattr(calibrate, "shapes", lambda *given: list(shapes(*given))[-2:])
    ran(calibrate, model, stage, *ASKED, "--max-new-tokens", "3", "--out", str(model / f"{name}.json"))
    found, checkpoint = json.loads((model / f"{name}.json").read_text()), load(model, "fp32")
    method = make_method(name, folder=checkpoint.folder)
    assert found and all(method.settings[key] == value for key, value in found.items())
    asked = Generation(checkpoint, "what is this?", "large.png", Sampling(2), prune=method)
    "".join(asked)
    assert 0 < asked.retention < 1


def test_heads_and_kept_tokens_are_drawn(model, capsys):
    ran(show_heads, model, *ASKED, "--out", "heads.png", "--csv", "heads.csv")
    rows = list(csv.DictReader((model.parent / "heads.csv").read_text().splitlines()))
    heads = load(model, "fp32").config.text_config.num_attention_heads
    assert len(rows) == 3 * heads and (model.parent / "heads.png").exists()
    ran(show_pruning, model, *ASKED, "--prune", "topk:retention=0.3", "--out", "kept.png", "--html", "kept.html")
    page = page_of("kept.html", model)
    assert [(area["name"], area["shape"]) for area in page["areas"]] == [("whole", [3, 3]), ("tiles", [*MAP])]
    tokens = WHOLE + MAP[0] * (MAP[1] + 1)
    assert page["tokens"] == tokens and len(page["questions"][0]["gammas"]) == 3
    assert {count for counts in page["questions"][0]["counts"] for count in counts} == {round(0.3 * tokens)}
    assert (model.parent / "kept.png").exists()


def page_of(name, model):
    text = (model.parent / name).read_text()
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, flags=re.S)[1])


def test_run_py_draws_frames_and_pictures_by_their_own_numbers(model, cli):
    flags = "--image", "a.png", "b.png", "--frames", *NAMES, "--prune", "plphp", "-n", 2, "--show", "kept.html"
    code, out, err = cli("--model", model, "--prompt", "<image> <video> <image>?", *flags, "--compare", "--json")
    assert code == 0 and json.loads(out)["vision_tokens"] == 10 + 4 + 4 + 5 + 10, err
    areas = page_of("kept.html", model)["areas"]
    frames = [(f"frame {i}", [2, 2]) for i in (1, 2, 3)]
    assert [(a["name"], a["shape"]) for a in areas] == [("picture 1", [3, 3]), *frames, ("picture 2", [3, 3])]
    alone = Generation(load(model, "fp32"), "what?", frames="a.png", prune="topk", sampling=Sampling(1), remember=True)
    "".join(alone)
    assert [area.name for area in Shown.of(alone).areas] == [""]
