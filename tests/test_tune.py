"""kernels/tiles.py and `bench_kernels.py --tune`: which tiles the decode kernels use, and how they are measured."""

import json
import math

import pytest
import torch

from kernels.tiles import CHOICES, TUNED, chosen, entry, read, tiles
from tests.conftest import exit_code_of
from tests.paths import ROOT
from tools import bench_kernels, harness, problems, tune

CUDA = torch.cuda.is_available()
TINY = ["--tune", "--shapes", "demo", "--mbytes", "0.01", "0.05", "--rounds", "2", "--copies", "1", "--device", "cpu"]
NAME = "DP 32, M 16, 4 bytes"  # the entry of the demo in fp32


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ((1, 128, 2), {"M": 1, "DP": 128, "BN": 64, "BS": 64}),
        ((7, 128, 2), {"M": 8, "DP": 128, "BN": 64, "BS": 64}),
        ((7, 64, 2), {"M": 8, "DP": 64, "BN": 64, "BS": 64}),
        ((4, 64, 2), {"M": 4, "DP": 64, "BN": 128, "BS": 64}),
        ((17, 128, 2), {"M": 32, "DP": 128, "BN": 64, "BS": 32}),
        ((2, 32, 4), {"M": 16, "DP": 32, "BN": 64, "BS": 64}),
        ((300, 256, 4), {"M": 16, "DP": 256, "BN": 16, "BS": 64}),
        ((4, 72, 2), {"M": 4, "DP": 128, "BN": 64, "BS": 64}),
        ((4, 8, 2), {"M": 16, "DP": 16, "BN": 128, "BS": 64}),
    ],
)
def test_the_formula(case, wanted):
    assert tiles(*case) == wanted
    for arch, stages in (("cpu", 2), ("sm_80", 2), ("sm_90", 3), ("sm_100", 3), ("sm_120", 2), ("gfx942", 2)):
        assert chosen(*case, arch, {}) == wanted | {"num_warps": 4, "num_stages": stages}


def test_an_entry_overrides_the_formula_only_where_it_was_measured():
    table = {"sm_90": {"about": "", "tiles": {"DP 128, M 4, 2 bytes": {"BN": 32, "num_warps": 2}}}}
    assert chosen(3, 96, 2, "sm_90", table) == chosen(3, 96, 2, "sm_90", {}) | {"BN": 32, "num_warps": 2}
    for case in ((3, 96, 2, "sm_80"), (3, 96, 4, "sm_90"), (1, 96, 2, "sm_90"), (3, 64, 2, "sm_90")):
        assert chosen(*case, table) == chosen(*case, {})
    coded = chosen(3, 96, 2, "sm_90", table, coded=True)  # K and V in 8 bits were not measured
    assert coded == chosen(3, 96, 2, "sm_90", {})


def test_the_shipped_table_is_valid_and_is_the_default():
    for arch, found in read(TUNED).items():
        assert found["about"] and arch.startswith(("sm_", "gfx"))
        assert all(values for values in found["tiles"].values())
    assert chosen(4, 128, 2, "sm_90") == chosen(4, 128, 2, "sm_90", read(TUNED))


@pytest.mark.parametrize("values", [{"M": 4}, {"BN": 0}, {"BN": "64"}])
def test_a_table_with_anything_else_is_refused(values, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"sm_90": {"about": "", "tiles": {NAME: values}}}))
    with pytest.raises(ValueError, match="sm_90, DP 32, M 16, 4 bytes is .*; give positive numbers for BN, num_stages"):
        read(tmp_path / "t.json")


# ---------------------------------------------------------------- the measurement


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(harness, "measure_bandwidth", lambda device: 1e10)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--tune"], "--tune needs a GPU"),
        (["--tune", "decode"], "--tune does not use ops"),
        (["--tune", "--preset", "smoke"], "--tune does not use preset"),
        (["--out", "t.json"], "--out is the table of --tune"),
    ],
)
def test_mistakes_are_one_line(flags, told, monkeypatch, capsys):
    monkeypatch.setattr(tune, "interpreted", lambda: False)
    before = TUNED.read_bytes()
    assert exit_code_of(bench_kernels.main, [*flags, "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {told}") and "; " in line and TUNED.read_bytes() == before


needs_interpreter = pytest.mark.skipif(CUDA, reason="conftest.py sets the interpreter only without CUDA")


@needs_interpreter
@pytest.mark.parametrize("out", [[], ["--out", str(ROOT / "kernels" / "tuned.json")]])
def test_a_rehearsal_does_not_write_the_shipped_table(out, capsys):
    before = TUNED.read_bytes()
    assert bench_kernels.main([*TINY, *out]) == 2
    assert "times of the interpreter must not be shipped; " in capsys.readouterr().err and TUNED.read_bytes() == before


@pytest.fixture
def clock(monkeypatch):
    """Function ({BN: seconds}): from now on a call with this BN takes so long. Rounds and sizes are equal."""

    def clock(seconds):
        def timer(calls, device):
            return lambda: seconds[calls[0].keywords["tile"]["BN"]], False

        monkeypatch.setattr(harness, "timer", timer)

    return clock


def tuned(folder, *flags):
    """The table and the rows of a rehearsal."""
    where = ["--out", str(folder / "t.json"), "--json", str(folder / "rows.json")]
    assert bench_kernels.main([*TINY, *where, *flags]) == 0
    return json.loads((folder / "t.json").read_text()), json.loads((folder / "rows.json").read_text())["rows"]


@needs_interpreter
def test_the_fastest_correct_tile_is_written(tmp_path, clock, capsys):
    before = TUNED.read_bytes()
    clock({64: 1.0, 32: 0.9, 16: 0.8})
    table, rows = tuned(tmp_path)
    assert table["cpu"]["tiles"] == {NAME: {"BN": 16}} and "triton" in table["cpu"]["about"]
    assert [row["tile"] for row in rows] == [f"BN {n}, 2 stages, 4 warps" for n in (64, 16, 32)]
    assert [row["bits"] for row in rows] == [True, False, False]  # other slots per tile round differently
    assert all(row["right"] and row["us 1"] == 1e6 * s for row, s in zip(rows, (1.0, 0.8, 0.9), strict=True))
    told = capsys.readouterr().out
    assert told.count("the formula\n") == 1 and "BN 16, 2 stages, 4 warps" in told and told.count(", chosen") == 1
    assert TUNED.read_bytes() == before
    assert chosen(2, 32, 4, "cpu", table)["BN"] == 16
    clock({64: 1.0, 32: 1.1, 16: 0.99})  # a gain of 1 %: the entry is removed again
    assert tuned(tmp_path)[0]["cpu"]["tiles"] == {}


@needs_interpreter
def test_a_wrong_tile_is_not_timed(tmp_path, clock, monkeypatch):
    step, two = tune.step, tune.in_two_launches
    monkeypatch.setattr(tune, "step", lambda *given, tile: step(*given, tile=tile) * (1.1 if tile["BN"] == 16 else 1))
    clock({64: 1.0, 32: 0.9, 16: 0.1})
    table, rows = tuned(tmp_path)
    assert table["cpu"]["tiles"] == {NAME: {"BN": 32}}
    assert [row["right"] for row in rows] == [True, False, True] and rows[1]["why"].startswith("off by")
    assert "us 0" not in rows[1]
    monkeypatch.setattr(tune, "step", step)
    assert two(next(problems.layers(*LAYERS)), chosen(2, 32, 4, "cpu", {}), SETTING) is None
    monkeypatch.setattr("kernels.ragged_decode_triton.attend", lambda q, *given, tile: (0 * q, None))
    table, rows = tuned(tmp_path)  # right as a step, wrong in two launches
    assert table["cpu"]["tiles"] == {} and [row["why"] for row in rows if not row["right"]][0].startswith("in two")


@needs_interpreter
def test_tiles_without_room_are_skipped_and_a_formula_that_fails_ends_it(tmp_path, clock, monkeypatch, capsys):
    step = tune.step

    def cramped(*given, tile):
        if tile["BN"] in full:
            raise type("OutOfResources", (Exception,), {})("shared memory, Required: 300000")
        return step(*given, tile=tile)

    monkeypatch.setattr(tune, "step", cramped)
    clock({64: 1.0, 32: 0.9, 16: 0.8})
    full = {16}
    table, rows = tuned(tmp_path)
    assert table["cpu"]["tiles"] == {NAME: {"BN": 32}} and [row["right"] for row in rows] == [True, None, True]
    assert "not timed: OutOfResources: shared memory" in capsys.readouterr().out
    full = {64}
    assert bench_kernels.main([*TINY, "--out", str(tmp_path / "t.json")]) == 2
    assert "error: the formula's tile fails (OutOfResources: " in capsys.readouterr().err


(ARGS,) = bench_kernels.parsed(TINY)
LAYERS, SETTING = (ARGS, 4), problems.Setting(torch.float32, torch.device("cpu"), {}, 1, 1)


def test_a_win_must_hold_in_both_halves_of_the_rounds():
    assert tune.winner({"a": (1.5, 1.5, 1.01), "b": (1.03, 1.03, 1.03), "c": (1.05, 1.04, 1.06), "d": (1, 1, 1)}) == "c"
    assert tune.winner({"a": (1.5, 1.5, 1.01), "d": (1, 1, 1)}) is None
    formula = [[8.0, 8.0, 8.0, 8.0], [2.0, 2.0, 2.0, 2.0]]  # two sizes, four rounds
    candidate = [[2.0, 2.0, 8.0, 8.0], [2.0, 2.0, 2.0, 2.0]]
    whole, first, second = tune.speeds(candidate, formula)
    assert (first, second) == (2.0, 1.0) and math.isclose(whole, 1.5)
    assert tune.speeds([[4.0]], [[8.0]]) == [2.0, 2.0, 2.0]


def test_the_grid_has_the_formula_first_and_each_tile_once():
    formula = chosen(4, 128, 2, "sm_90", {})
    found = tune.candidates(formula, tune.GRID)
    assert next(iter(found.values())) == formula and len(found) == 27
    assert all(tile.keys() == formula.keys() and tile["M"] == formula["M"] for tile in found.values())
    assert len({tuple(tile[key] for key in CHOICES) for tile in found.values()}) == 27
    assert len(tune.candidates(chosen(4, 256, 4, "sm_90", {}), tune.GRID)) == 28  # 16 slots are not in the grid


def test_other_entries_of_the_table_stay():
    formula = chosen(4, 128, 2, "sm_90", {})
    name, table = entry(formula, 2), {"sm_80": {"about": "x", "tiles": {"a": {"BN": 16}}}}
    table = tune.merged(table, "sm_90", "y", name, formula | {"BN": 32, "num_warps": 2}, formula)
    assert table["sm_80"]["tiles"] and table["sm_90"] == {"about": "y", "tiles": {name: {"BN": 32, "num_warps": 2}}}
    table = tune.merged(table, "sm_90", "z", "other", formula | {"num_stages": 4}, formula)
    assert table["sm_90"]["tiles"] == {name: {"BN": 32, "num_warps": 2}, "other": {"num_stages": 4}}
    assert tune.merged(table, "sm_90", "z", name, formula, formula)["sm_90"]["tiles"] == {"other": {"num_stages": 4}}
