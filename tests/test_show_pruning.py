"""The tool that draws what heads kept: gamma with PLPHP's thresholds, two questions, its errors."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from kernels import window_scores
from model import Generation, Sampling, load
from model.pruning import make_method
from model.show import CELL, GAP, SMALL, WIDTH, _bars, _counts
from tests.paths import DEMO, DEMO_PICTURE
from tools import show_pruning
from tools.evaluation.replay import asked_by
from tools.show_pruning import look


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, "fp32")


def test_what_is_shown_is_what_run_py_keeps(demo):
    method = make_method("plphp-ada:r=0.3,dr=0.1")
    shown = look(demo, "Count the objects.", [DEMO_PICTURE], method)
    generation = Generation(demo, "Count the objects.", [DEMO_PICTURE], Sampling(1), prune=method)
    "".join(generation)
    assert shown.keep.shape == (6, 4, 256)
    assert [k.sum().item() / 4 for k in shown.keep] == pytest.approx(generation.kept)
    assert shown.bytes_held == generation.bytes_held and shown.keep[2].sum(1).unique().numel() > 1
    asked = asked_by(generation, [])
    (start, stop) = asked.spans[0]
    gammas = [window_scores(q[0, :, -1:], k[0])[:, start:stop].sum(1).mean().item() for q, k, *_ in asked.layers]
    assert shown.gammas == pytest.approx(gammas, abs=1e-5) and shown.thresholds == (0.25, 0.1)
    assert shown.rows == "the last prompt row"


def test_bars_end_at_gamma_and_lines_stand_at_the_thresholds(demo):
    shown = look(demo, "Count the objects.", [DEMO_PICTURE], make_method("plphp:alpha=0.7,beta=0.3"))
    shown.gammas = [0.5] * 6  # balanced, grey
    block = _counts(shown)
    pixels = torch.frombuffer(bytearray(block.tobytes()), dtype=torch.uint8).view(block.height, block.width, 3)
    left, bottom = CELL + GAP, block.height
    row = next(y for y in range(bottom) if pixels[y, left + 2].tolist() == [0x77] * 3)  # the first bar
    grey = (pixels[row + 1, left:] == 0x77).all(1).nonzero().flatten()
    black = (pixels[row + 1, left:] == 0).all(1).nonzero().flatten()
    assert abs(grey.max().item() - 0.5 * CELL) <= 1
    assert all((black - value * CELL).abs().min() <= 1 for value in (0.3, 0.7)) and len(black) <= 4


def test_labels_of_bars_are_read_on_one_ground(demo, monkeypatch):
    """White only inside a bar that is long enough, else black on white, and always within the frame."""
    shown = look(demo, "Count the objects.", [DEMO_PICTURE], make_method("plphp:alpha=0.7,beta=0.65"))
    shown.gammas = [0.63, 0.05, 0.95, 0.99, 0.5, 0.66]
    page, labels = Image.new("RGB", (CELL, 600), "white"), []
    pen = ImageDraw.Draw(page)
    monkeypatch.setattr(pen, "text", lambda at, text, ink, *_, **__: labels.append((at[0], text, ink)))
    _bars(pen, shown, 0, 100, 600)
    for gamma, (x, text, ink) in zip(shown.gammas, labels, strict=True):
        end = x + ImageFont.load_default(SMALL).getlength(text)
        assert x > 0 and end < CELL and (end < gamma * CELL if ink == "white" else True), text
    inks = [ink for *_, ink in labels]
    assert inks[:2] == ["black", "black"] and inks[3] == "white"


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--prompt=", "the question is empty"),
        ("--second=", "--second is empty"),
        ("--second= ", "--second is empty"),
        ("--image=/nowhere.png", "/nowhere.png"),
        ("--layers=6", "--layers"),
        ("--heads=-1", "--heads"),
        ("--prune=none", "none"),
        ("--prune=plphd", "plphd"),
        ("--retention=2", "2"),
        ("--out=/nowhere/a.png", "/nowhere"),
        ("--out=a.pdf", "a.pdf"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(flag, word, tmp_path, capsys):
    asked = ["--image", str(DEMO_PICTURE), "--prompt", "What?", "--out", str(tmp_path / "a.png")]
    assert show_pruning.main([*asked, flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and word in line


def test_picture_and_page_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["--image", str(DEMO_PICTURE), "--prompt", "What?", "--second", "Why?", "--prune", "random"]
    show_pruning.main([*asked, "--html", "kept.html"])
    assert [file.name for file in tmp_path.iterdir()] == ["kept.html"]  # no picture unless asked for
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', Path("kept.html").read_text(), flags=re.S)[1])
    assert [q["prompt"] for q in data["questions"]] == ["What?", "Why?"] and len(data["questions"][0]["gammas"]) == 6
    show_pruning.main(asked)
    show_pruning.main([*asked, "--layers", "0", "--heads", "1", "--out", "one.png", "--html", "kept.html"])
    assert capsys.readouterr().err.split() == ["kept.html", "kept.png", "one.png", "kept.html"]
    assert Image.open("kept.png").width == WIDTH
    assert Image.open("one.png").height < Image.open("kept.png").height - 2 * 300
