"""tools/bench_prefill.py: tokens, operations and ratios of small prefills; the times themselves are not checked."""

import json

import pytest

from tools import bench_prefill
from tools.shapes import text_config


@pytest.fixture
def rows(tmp_path, capsys):
    """The rows of a run over these methods, by name."""

    def run(*prune, more=()):
        file = tmp_path / "times.json"
        code = bench_prefill.main(
            ["--shape", "tiny-next", "--rounds", "2", "--device", "cpu", "--json", str(file), *more, "--prune", *prune]
        )
        found = json.loads(file.read_text())["rows"]
        return code, {row["prune"]: row for row in found}, capsys.readouterr().out

    return run


def test_ceilings_are_ratios_of_operations(rows):
    code, found, printed = rows("pick-grid@0.25", "fastv@0.25", "plphp:dr=0,skip=0@0.25")
    assert code == 0 and len(printed.splitlines()) == 6
    none, grid, fastv, plphp = found.values()
    vision = 16 + 8 * 9  # 4 x 4 patches, and 8 rows of 8 and a newline
    assert none["ceiling"] == plphp["ceiling"] == 1 and none["speedup"] == 1
    assert none["tokens"] == fastv["tokens"] == plphp["tokens"] > vision
    text = none["tokens"] - vision
    assert grid["tokens"] == text + 16 // 4 + 64 // 4
    c = text_config("tiny-next")

    def flops(*tokens):  # of each layer: projections and MLP, then causal attention
        weights = 4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size
        weights -= 2 * c.hidden_size * (c.hidden_size - c.num_key_value_heads * c.head_dim)
        head = 2 * c.hidden_size * c.vocab_size
        return sum(2 * n * weights + 2 * n * n * c.hidden_size for n in tokens) + head

    assert grid["ceiling"] == pytest.approx(flops(*[none["tokens"]] * 2) / flops(*[grid["tokens"]] * 2))
    assert fastv["flops"] == flops(none["tokens"], none["tokens"])  # of two layers, it drops from the third on
    for row in found.values():
        assert row["low"] <= row["speedup"] <= row["high"] and row["share"] == row["speedup"] / row["ceiling"]
    assert grid["kv_bytes"] / none["kv_bytes"] == grid["tokens"] / none["tokens"]
    assert plphp["kv_bytes"] / none["kv_bytes"] == (text + vision // 4) / (text + vision)


def test_the_ceiling_of_sparse_attention_saves_its_square(rows):
    """Half of the tokens attend to each other; all go through the projections and the MLP."""
    code, found, printed = rows("zipvl@0.5", "zipvl:tau=1", more=["--pictures", "2", "--clock", "processor"])
    none, zipvl, whole = found.values()
    assert code == 0 and "of gain" in printed and whole["ceiling"] == 1 and whole["gain"] is None
    assert zipvl["tokens"] == none["tokens"] > 2 * 88
    flat = rows("plphp:dr=0@0.5", more=["--noise", "672x336"])[1]["none"]["tokens"]
    assert flat < rows("plphp:dr=0@0.5")[1]["none"]["tokens"] < none["tokens"] - 88
    c, n = text_config("tiny-next"), none["tokens"]
    few = n - 88  # two pictures of 88 tokens; text takes part
    saved = 2 * 2 * (n * n - few * few) * c.hidden_size  # in two layers
    assert none["flops"] - zipvl["flops"] == pytest.approx(saved)
    assert zipvl["gain"] == (zipvl["speedup"] - 1) / (zipvl["ceiling"] - 1)
    assert all(row["vision"] > 0 and row["prefill"] > 0 for row in found.values())
    assert zipvl["kv_bytes"] / none["kv_bytes"] == few / n


def test_a_method_that_breaks_leaves_the_others(rows, tmp_path):
    (tmp_path / "own.py").write_text("def broken(picture): 1 / 0\nclass Broken:\n    pick = staticmethod(broken)\n")
    code, found, printed = rows(f"{tmp_path}/own.py::Broken", "pick-grid@0.5")
    assert code == 1 and "ZeroDivisionError" in printed
    assert [row["right"] for row in found.values()] == [True, None, True]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prune", "nosuch"], "nosuch"),
        (["--prune", "pick-grid@2"], "retention"),
        (["--model", "demo"], "give one of them"),
        (["--json", "/nonexistent/x.json"], "cannot write the output"),
        (["--image", "/nonexistent.png"], "nonexistent.png"),
        (["--noise", "672"], "WIDTHxHEIGHT"),
        (["--noise", "0x672"], "WIDTHxHEIGHT"),
        (["--pictures", "0"], "--pictures"),
    ],
)
def test_bad_flags_are_one_line(flags, said, capsys):
    try:
        code = bench_prefill.main(["--shape", "tiny", "--device", "cpu", *flags])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and said in err and err.startswith("error: ")
