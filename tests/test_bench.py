"""tools/bench_kernels.py: it times what is right, refuses what is wrong, and writes what it measured."""

import csv
import json

import pytest

from tools import bench_kernels

SMALL = ["--shapes", "demo", "--tokens", "64", "--retention", "1", "0.3", "--rounds", "2"]
OWN = """
import torch
from kernels import ragged_decode as ours

def ragged_decode(q, k, v, kv_start, kv_len):
    return {result}
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The bandwidth is not measured anew each time."""
    monkeypatch.setattr(bench_kernels, "measure_bandwidth", lambda device: 1e10)


@pytest.mark.parametrize("op", bench_kernels.OPS)
def test_every_op_is_checked_and_timed(op, tmp_path, capsys):
    files = tmp_path / "a.json", tmp_path / "a.csv"
    assert bench_kernels.main([op, *SMALL, "--json", str(files[0]), "--csv", str(files[1])]) == 0
    data = json.loads(files[0].read_text())
    rows = data["rows"]
    with open(files[1], newline="") as f:
        assert [r["provider"] for r in csv.DictReader(f)] == [r["provider"] for r in rows]
    assert {r["op"] for r in rows} == {op} and all(r["right"] and r["us"] > 0 for r in rows)
    baselines = [r for r in rows if r["provider"] not in ("ours, torch", "sdpa, rectangle", "sdpa, padded + mask")]
    assert all(r["speed"] == 1 for r in baselines) and len(baselines) == len({r["case"] for r in rows})
    assert data["about"]["machine"] and data["about"]["bandwidth_GBps"] == 10
    assert capsys.readouterr().out.count("speed") == len(rows)


def test_ones_own_kernel_is_timed_beside_ours(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(OWN.format(result="ours(q, k, v, kv_start, kv_len)"))
    assert bench_kernels.main([*SMALL, "--kernel", str(tmp_path / "mine.py")]) == 0
    assert capsys.readouterr().out.count("  mine  ") == 3


def test_a_wrong_kernel_is_not_timed(tmp_path, capsys):
    once = "ours(q, k, v, kv_start, kv_len) if len(calls.append(1) or calls) < 20 else q"  # right, then lazy
    for result, said in (
        ("ours(q, k, v, kv_start, kv_len) + 1e-4", "WRONG RESULT"),
        ("ours(q, k, v, kv_start, kv_len - 1)", "WRONG RESULT"),
        ("q * float('nan')", "WRONG RESULT"),
        ("(q, q)", "WRONG RESULT"),
        ("ours(q, k)", "TypeError"),
        (once, "WRONG RESULT"),
    ):
        (tmp_path / "bad.py").write_text("calls = []\n" + OWN.format(result=result))
        assert bench_kernels.main([*SMALL, "--kernel", str(tmp_path / "bad.py")]) == 1
        out = capsys.readouterr().out
        assert out.count(said) >= 3 and "bad" not in [x.split()[0] for x in out.splitlines() if "us  " in x]


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["flash"], "flash"),
        (["--kernel", "/nowhere.py"], "/nowhere.py"),
        (["--kernel", __file__], "ragged_decode"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "foo"], "foo"),
        (["--json", "/nowhere/x.json"], "/nowhere/x.json"),
    ],
)
def test_what_cannot_be_timed_is_said(flags, word):
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.main(flags)
    assert str(stopped.value).startswith("error: ") and word in str(stopped.value)


@pytest.mark.parametrize("flags", ["--rounds 0", "--tokens 0", "--tokens -4", "--retention 7", "--retention 0"])
def test_numbers_out_of_range_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.main(flags.split())
    assert stopped.value.code == 2 and "out of range" in capsys.readouterr().err
