"""tools/figures.py: what is drawn, and that each line can be named."""

import csv
import io
import re

import pytest
from matplotlib.text import Text

from tests.paths import ROOT
from tools import evaluate, figures, tables


def results(name):
    with open(ROOT / "benchmarks" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def written(axes):
    """{label without line breaks and spaces: its colour} of the labels at the ends of lines."""
    return {"".join(text.get_text().split()): text.get_color() for text in axes.texts}


def named(axes):
    """Label -> colour of the lines with a label."""
    return {"".join(c.get_label().split()): c.lines[0].get_color() for c in axes.containers}


@pytest.mark.parametrize("name", ["pruning-accuracy", "pruning-second", "witness"])
def test_every_row_of_the_table_is_a_line_and_labels_are_the_names_of_the_table(name):
    if name == "witness":
        table, axes = tables.witness(), figures.witness(results(name)).axes[0]
    else:
        table, axes = evaluate.short(results(name)), figures.pruning(results(name)).axes[0]
    rows = {"".join(line.split("|")[1].replace("`", "").split()) for line in table.splitlines()[2:]}
    grey = [line for line in axes.lines if line.get_label().startswith("_") and line.get_color() == "0.75"]
    assert named(axes) == written(axes) and written(axes).keys() <= rows
    assert len(grey) + len(written(axes)) == len(rows) and len(set(written(axes).values())) == len(written(axes)) >= 7
    assert "thin grey: the other rows of the table" in axes.get_title()


def test_labels_stand_apart_at_the_ends_of_their_lines():
    rows = results("pruning-accuracy")
    page = figures.pruning(rows)
    page.savefig(io.BytesIO())  # which arranges it
    (axes,) = page.axes
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)  # without its line
    assert all(below.y1 <= above.y0 for below, above in zip(boxes, boxes[1:], strict=False))
    assert all(axes.bbox.x1 < box.x0 and box.x1 <= page.bbox.x1 and box.y1 <= page.bbox.y1 for box in boxes)
    ends = {text.get_text(): text.xy for text in axes.texts}
    (last,) = [row for row in rows if (row["method"], row["retention"]) == ("random", "0.15")]
    assert ends["random"] == pytest.approx((float(last["kept"]), 100 - float(last["long"])))


def test_wrong_answers_are_drawn_and_none_at_all_too():
    row = {"label": "`grid`", "method": "grid", "kept": "50", "long": "100.0", "long low": "90.0", "long high": "100.0"}
    full = row | {"label": "unpruned", "method": "none", "kept": "100"}
    own = row | {"label": "`m.py::keep`", "method": "given: m.py::keep", "long": "70.0", "long low": "60.0"}
    (axes,) = figures.pruning([full, row, own]).axes
    assert written(axes).keys() == {"unpruned", "grid", "m.py::keep"}
    points = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert points["grid"] == [[50, 0]] and points["m.py::keep"] == [[50, 30]]
    (span,) = next(c for c in axes.containers if c.get_label() == "m.py::keep").lines[2][0].get_segments()
    assert span[:, 1].tolist() == [0, 40] and axes.get_ylim()[0] == 0 and "thin grey" not in axes.get_title()


def test_each_kind_of_the_training_has_a_row_the_earliest_learned_above(tmp_path):
    for stage, kinds in (("tower", "late,early"), ("decoder", "never,soon,first")):
        (tmp_path / f"{stage}.csv").write_text(f"step,seconds,loss,{kinds}\n0,1,9,0,0{',0' * (stage == 'decoder')}\n")
    with open(tmp_path / "tower.csv", "a") as file:
        file.write("50,2,8,0.5,1\n100,3,7,1,1\n")
    with open(tmp_path / "decoder.csv", "a") as file:
        file.write("50,2,8,,0.5,0.95\n100,3,7,0.1,1,1\n")
    tower, decoder, scale = figures.training(tmp_path).axes
    rows = [[label.get_text() for label in axes.get_yticklabels()] for axes in (tower, decoder)]
    assert rows == [["early", "late"], ["first", "soon", "never"]]
    assert tower.images[0].get_array().tolist() == [[0, 100, 100], [0, 50, 100]]
    assert decoder.images[0].get_array().mask.tolist()[2] == [False, True, False]  # not asked: no colour
    assert re.search("%", scale.get_ylabel()) and [t.get_text() for t in scale.get_yticklabels()][-1] == "100"


def test_the_figures_of_pruning_are_redrawn_by_a_command(tmp_path):
    tables.main(["--figures", str(tmp_path / "out")])
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == sorted(tables.FIGURES)
