"""The head diagnostics, on constructed attention."""

import csv

import pytest
import torch

from model import load
from tests.paths import DEMO, DEMO_PICTURE
from tools import show_heads
from tools.show_heads import measure

T, D, C = 40, 4, 6  # tokens, head channels, model channels


def planted(sink=None):
    """q (4, T, D), k and v (2, T, D), projection: uniform attention, except that query head 1 attends to the sink.

    The sink's value is zero in KV head 0, which query heads 0 and 1 read.
    """
    q, k, v = torch.zeros(4, T, D), torch.zeros(2, T, D), torch.randn(2, T, D)
    if sink is not None:
        q[1, :, 0], k[0, sink, 0], v[0, sink] = 100.0, 100.0, 0.0
    return q, k, v, torch.randn(C, 4 * D)


def test_even_attention_has_the_mass_of_a_harmonic_mean():
    heads = measure(*planted(), spans=[(10, 20)])
    mass = [sum(1 / (i + 1) for i in range(j, T)) / (T - j) for j in range(T)]
    assert heads.first.tolist() == pytest.approx([mass[0]] * 4, rel=1e-5)
    assert heads.where.tolist() == [0] * 4 and heads.most.equal(heads.first)
    assert heads.out.mean().item() == pytest.approx(1, rel=1e-5)


def test_a_parked_head_is_found():
    """A head with all attention on a zero value: its output is zero, and so is the share from the picture."""
    q, k, v, out = planted(sink=1)
    heads = measure(q, k, v, out, spans=[(10, 20)])
    assert heads.where[1] == 1 and heads.drain[1] == 0
    # all rows but the first see it
    assert heads.most[1] > 0.99 and heads.out[1] < 0.3 * heads.out[0] and heads.vision[1] < 1e-6
    other = measure(q, k, v, out, spans=[])
    assert other.vision.tolist() == [0] * 4


def test_sizes_are_measured_through_the_heads_own_projection():
    q, k, v, out = planted()
    plain = measure(q, k, v, out, spans=[(0, 20)])
    out = out.clone()
    out[:, 2 * D : 3 * D] *= 3  # query head 2, which reads KV head 1
    scaled = measure(q, k, v, out, spans=[(0, 20)])
    ratio = scaled.out / plain.out
    assert (ratio / ratio[0]).tolist() == pytest.approx([1, 1, 3, 1], rel=1e-4)
    assert torch.allclose(scaled.vision, plain.vision, rtol=1e-4)
    # the last rows after the picture, by hand in float64
    behind = torch.arange(20, T)
    whole = torch.stack([v[1, : i + 1].double().mean(0) for i in behind]) @ out[:, 2 * D : 3 * D].double().T
    seen = torch.stack([v[1, :20].double().sum(0) / (i + 1) for i in behind]) @ out[:, 2 * D : 3 * D].double().T
    share = (seen.norm(dim=1).mean() / whole.norm(dim=1).mean()).item()
    assert scaled.vision[2].item() == pytest.approx(share, rel=1e-4)


def test_the_measured_attention_is_the_models(tmp_path, capsys):
    """Figure and table of the demo; the last layer's state equals that of an ordinary prefill."""
    out, table = tmp_path / "a.png", tmp_path / "a.csv"
    asked = ["--image", str(DEMO_PICTURE), "--prompt", "What?", "--device", "cpu"]
    show_heads.main([*asked, "--out", str(out), "--csv", str(table)])
    assert out.stat().st_size > 20_000 and "of 48 heads dormant" in capsys.readouterr().out
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 48
    for layer in range(6):
        assert sum(float(r["out"]) for r in rows if int(r["layer"]) == layer) == pytest.approx(8, abs=1e-2)
    heads, peaks, tokens, spans = show_heads.diagnose(load(DEMO, "fp32"), "What?", [DEMO_PICTURE])
    assert len(peaks) == 6 and spans[0][1] - spans[0][0] == 256
    assert [f"{h:.4f}" for h in heads[3].first.tolist()] == [r["first"] for r in rows if r["layer"] == "3"]
    assert show_heads.main(["--prompt", "What?", "--image", "/nowhere.png"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "/nowhere.png" in line


def test_the_marks_are_explained_in_the_panel_that_has_them(tmp_path):
    heads = [measure(*planted(sink=1), spans=[(1, 3)])]
    figure = show_heads.draw(heads, [2.0], [(1, 3)], 0.3, tmp_path / "a.png")
    drawn = {axes.get_title(): axes for axes in figure.axes}
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    scales = [[label.get_text() for label in bar.get_yticklabels()] for bar in bars]
    assert len(scales) == 5 and all(labels[0] == "0" and labels[-1] for labels in scales)  # both ends are labelled
    for mark, words in (("v", "v: that token is one of a picture"), ("d", "d: dormant, below 0.3")):
        (axis,) = (axis for title, axis in drawn.items() if words in title)
        assert [text.get_text() for text in axis.texts if text.get_text()] == [mark]
