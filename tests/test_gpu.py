"""tools/gpu.py: stages that run one by one, resume and fail alone; the report; the commands of each stage."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.conftest import exit_code_of
from tests.paths import ROOT
from tools import bench_decode, bench_kernels, bench_prefill, gpu, gpu_report, inspect_kernels
from tools.gpu_stages import STAGES, Stage, commands

SECTIONS = [
    "Ceilings", "Speed over", "Whole answers", "Prefill with fewer vision tokens before the language model",
    "Tiles chosen by `--tune`", "Targets", "Failures",
]  # fmt: skip
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without CUDA")


def sections(page):
    """{title: text} of a report."""
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page, flags=re.M | re.S))


def rehearse(folder, *flags):
    """(exit code, report) of gpu.py --rehearse."""
    code = exit_code_of(gpu.main, ["--rehearse", "--out", str(folder), *flags])
    return code, (folder / "report.md").read_text()


# ---------------------------------------------------------------- a rehearsal


@NO_CUDA
@pytest.mark.thorough
def test_every_stage_can_be_rehearsed(tmp_path):
    code, page = rehearse(tmp_path)
    assert code == 0, page
    found = sections(page)
    assert list(found) == SECTIONS and found["Failures"].strip() == "None."
    assert page.startswith("# Rehearsal: times mean nothing")
    assert "| cpu | " in found["Tiles chosen by `--tune`"] and "bandwidth: " in found["Ceilings"]
    assert found["Whole answers"].count("| 2x24,8+8 | ") == 2 and "demo x 4" in found["Ceilings"]
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {f"{name}.{kind}" for name in STAGES for kind in ("log", "status.json")}
    assert written >= {"tests.xml", "model.xml", "tuned.json", "compile.json", "decode.json", "pictures.json"}
    assert "prefill.json" in written and "| pick-grid@0.25 |" in page


@NO_CUDA
def test_a_stage_runs_alone(tmp_path):
    before = (ROOT / "kernels" / "tuned.json").read_bytes()
    code, page = rehearse(tmp_path, "--stage", "kernels")
    found = sections(page)
    assert code == 0 and list(found) == SECTIONS
    assert "| demo, " in found["Ceilings"] and "sdpa, all tokens" in found["Speed over"]
    assert "- tune: not run" in found["Failures"] and "kernels:" not in found["Failures"]
    assert found["Whole answers"].strip() == "Not measured." and "met" not in found["Targets"].split()
    assert "(int8)" in found["Ceilings"]
    assert (ROOT / "kernels" / "tuned.json").read_bytes() == before


# ---------------------------------------------------------------- stages


@pytest.fixture
def stages(monkeypatch):
    """Function ({name: Python code or (code, seconds)}): these are the stages."""

    def stages(**codes):
        pairs = {name: code if isinstance(code, tuple) else (code, 60) for name, code in codes.items()}
        made = {name: Stage("a test", limit, "", f'PYTHON -c "{code}"') for name, (code, limit) in pairs.items()}
        monkeypatch.setattr(gpu, "STAGES", made)

    return stages


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(stages, tmp_path, capsys):
    hang = "import signal, time; signal.signal(signal.SIGINT, lambda *_: print(7 * 6) or exit()); time.sleep(60)"
    stages(first="print(1)", second="import sys; print(2); sys.exit('on purpose')", third=(hang, 3), last="print(4)")
    code, page = rehearse(tmp_path)
    failures = sections(page)["Failures"]
    assert code == 1 and "second: exit code 1" in failures and "on purpose" in failures
    assert "third: time limit of 3 s" in failures and "42" in failures  # it could finish its output
    assert "first" not in failures and "last" not in failures
    assert (tmp_path / "last.log").read_text().endswith("4\n")
    told = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in told if " of 4: " in line] == [
        "1 of 4: first", "2 of 4: second", "3 of 4: third", "4 of 4: last"
    ]  # fmt: skip


def test_a_rerun_continues(stages, tmp_path, capsys):
    stages(good=f"open('{tmp_path}/good', 'a').write('x')", bad="1 / 0")
    assert rehearse(tmp_path)[0] == 1
    stages(good=f"open('{tmp_path}/good', 'a').write('x')", bad="pass")
    code, page = rehearse(tmp_path)
    assert (
        code == 0
        and (tmp_path / "good").read_text() == "x"
        and "1 of 2: good, a test: done before" in (capsys.readouterr().err)
    )
    assert sections(page)["Failures"].strip() == "None."
    assert rehearse(tmp_path, "--stage", "good", "--again")[0] == 0 and (tmp_path / "good").read_text() == "xx"
    assert rehearse(tmp_path, "--stage")[0] == 0 and (tmp_path / "good").read_text() == "xx"  # only the report
    assert not gpu.passed("good", tmp_path, rehearse=False)  # a rehearsal does not count on a GPU


def test_all_commands_of_a_stage_run_and_the_first_error_counts(monkeypatch, tmp_path):
    lines = 'PYTHON -c "raise SystemExit(3)"\nPYTHON -c "print(5)"'
    monkeypatch.setattr(gpu, "STAGES", {"both": Stage("a test", 60, "", lines)})
    code, page = rehearse(tmp_path)
    assert code == 1 and "both: exit code 3" in page and (tmp_path / "both.log").read_text().endswith("5\n")


def test_ctrl_c_ends_the_command_of_the_stage(tmp_path):
    """The command of the stage sends it to gpu.py, as a terminal would."""
    stage = "import os, signal, time; print(os.getpid()); os.kill(os.getppid(), signal.SIGINT); time.sleep(50)"
    code = (
        "from tools import gpu; from tools.gpu_stages import Stage\n"
        f"gpu.STAGES = {{'long': Stage('', 60, '', 'PYTHON -c \"{stage}\"')}}\n"
        f"raise SystemExit(gpu.main(['--rehearse', '--out', '{tmp_path}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert done.returncode == 130 and "the same command continues with this stage" in done.stderr
    assert not (tmp_path / "long.status.json").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "long.log").read_text().splitlines()[1]), 0)


@NO_CUDA
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "no GPU is available; "),
        (["--stage", "compile"], "stage compile is only rehearsed; "),
        (["--stage", "nothing"], "use tests, smoke, kernels"),
    ],
)
def test_mistakes_are_one_line(flags, told, tmp_path, capsys):
    assert exit_code_of(gpu.main, [*flags, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the commands


def test_the_commands_for_a_gpu_are_valid(capsys):
    """A mistake in one would be noticed only when a GPU is there."""
    written = []
    for name, stage in STAGES.items():
        assert stage.seconds < 9 * 60
        for tool, *words in (line[1:] if line[0] == sys.executable else line for line in commands(stage, "OUT", False)):
            if tool == "tools/bench_kernels.py":
                bench_kernels.parsed(words)
            elif tool == "tools/bench_decode.py":
                args = bench_decode.parser().parse_args(words)
                assert list(bench_decode.workloads(args.workloads, 576, None))
            elif tool == "tools/bench_prefill.py":
                bench_prefill.parser().parse_args(words)
            elif tool == "-m":
                assert all((ROOT / word.partition("::")[0]).is_file() for word in words if word.startswith("tests/"))
            else:
                assert [tool, *words] == ["cp", "OUT/tuned.json", "kernels/tuned.json"]
            written += [value for flag, value in itertools.pairwise(words) if flag in ("--json", "--junitxml", "--out")]
        assert commands(stage, "OUT", True)
        if name != "compile":
            assert commands(stage, "OUT", False)
    assert len(written) == len(set(written)) and all(path.startswith("OUT/") for path in written)
    assert gpu.main(["--list"]) == 0
    told = capsys.readouterr().out
    assert all(f"{name}: " in told for name in STAGES if name != "compile") and "compile" not in told
    assert "sm_90" in inspect_kernels.ARCHS


@pytest.mark.parametrize("given", ["python3", None])
def test_make_gpu_installs_nothing_if_an_interpreter_is_given(given):
    """With PYTHON=... as a flag of make or in the environment; otherwise it makes the environment of the tests."""
    of_make = {"PYTHON", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL"}  # of a `make test` around this test
    environment = {name: value for name, value in os.environ.items() if name not in of_make}
    words = ["make", "--no-print-directory", "--dry-run", "--always-make", "gpu", "ARGS=--list"]
    done = subprocess.run(words + ([f"PYTHON={given}"] if given else []), cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    if given:
        assert done.stdout == "python3 tools/gpu.py --list\n"
    else:
        assert "pip install" in done.stdout and done.stdout.endswith(".venv/bin/python tools/gpu.py --list\n")


# ---------------------------------------------------------------- the report


def h200():
    return json.loads((ROOT / "benchmarks" / "kernels-h200.json").read_text())


def verdicts(page):
    """{target: (worst, verdict)}"""
    lines = [line.strip("| ").split(" | ") for line in sections(page)["Targets"].splitlines() if "|" in line]
    return {line[0]: tuple(line[2:]) for line in lines[2:]}


def test_the_targets_are_those_of_the_notes(tmp_path):
    """From the committed results of an H200, whose verdicts kernels/NOTES.md lists."""
    (tmp_path / "kernels.json").write_text(json.dumps(h200()))
    decode = (ROOT / "benchmarks" / "decode-7b-h200.json").read_text()
    (tmp_path / "decode.json").write_text(decode)
    tests = "".join(f'<testcase classname="tests.a" name="test_{name}[1]"/>' for name in gpu_report.BITS)
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{tests}</testsuite></testsuites>")
    page = gpu_report.report(tmp_path, [])
    assert verdicts(page) == {
        "4 MB, 8 KV heads, append included": ("9.33 us", "**missed by 17%**"),
        "17 MB, 8 KV heads, append included": ("14.4 us", "**missed by 44%**"),
        "65 MB, 8 KV heads, append included": ("25.4 us", "**missed by 16%**"),
        "share of the bandwidth at 65 MB": ("58.3 %", "**missed by 3%**"),
        "share of the bandwidth at 130 MB": ("68.4 %", "**missed by 14%**"),
        "share of the bandwidth at 512 MB": ("87.8 %", "**missed by 2%**"),
        "longest head 8 times the mean, over equal heads": ("1.17x", "**missed by 6%**"),
        "over AdaKV's copy per step": ("3.42x", "**missed by 32%**"),
        "over varlen attention, heads as batch": ("2.29x", "met"),
        "over SDPA on all tokens, a fifth kept of 130 MB or more": ("3.65x", "met"),
        "allocations and waits per decode step": ("0", "met"),
        "tests of bits: replays, order of the work, neighbours: failed": ("0", "met"),
    }
    found = sections(page)
    assert "NVIDIA H200" in page and "4386.2 GB/s" in found["Ceilings"]
    assert "| gqa8, 4885 tokens, 0.2 kept, plphp | 4.01 | 9.3 | 10% |  |  |" in found["Ceilings"]
    assert "| one-b32 | plphp:dr=0@0.3 | 6.86 | 60% | 1.40 (1.36) | 2.64 | 0.47 |" in found["Whole answers"]
    assert found["Failures"].strip() == "None." and found["Tiles chosen by `--tune`"].strip() == "Not measured."


def test_what_was_not_measured_has_no_unit(tmp_path):
    page = gpu_report.report(tmp_path, ["kernels"])
    found = sections(page)
    assert "Measured bandwidth: not measured. The" in found["Ceilings"] and "GB/s" not in page
    assert "Not measured; the worst" in found["Targets"] and "kernels.json" not in found["Targets"]
    assert {verdict for _, verdict in verdicts(page).values()} == {"not measured"}
    (tmp_path / "decode.json").write_text('{"about": {"bandwidth_GBps": 12.5}, "rows": []}')  # only that stage ran
    assert "Measured bandwidth: 12.5 GB/s. " in gpu_report.report(tmp_path, [])


def test_times_in_8_bits_are_not_taken_for_those_in_16(tmp_path):
    data = h200()
    coded = [row | {"provider": "ours, triton, int8", "us": 2 * row["us"], "GBps": row["GBps"] / 4}
             for row in data["rows"] if row["right"] and row["provider"] == "ours, triton" and row["GBps"]]  # fmt: skip
    data["rows"] += coded
    (tmp_path / "kernels.json").write_text(json.dumps(data))
    page = gpu_report.report(tmp_path, [])
    assert verdicts(page)["4 MB, 8 KV heads, append included"] == ("9.33 us", "**missed by 17%**")
    lines = sections(page)["Ceilings"].splitlines()
    assert "| gqa8, 4885 tokens, 0.2 kept, plphp | 4.01 | 9.3 | 10% |  |  |" in lines
    assert "| gqa8, 4885 tokens, 0.2 kept, plphp (int8) | 2 | 18.7 | 10% |  |  |" in lines


def test_after_tuning_the_tuned_times_count(tmp_path):
    before, after = h200(), h200()
    for row in after["rows"]:
        if row["right"] and row["provider"] == "ours, triton":
            row["us"] /= 2
    (tmp_path / "kernels.json").write_text(json.dumps(before))
    (tmp_path / "tuned-kernels.json").write_text(json.dumps(after))
    tiles = {"sm_90": {"about": "", "tiles": {"DP 128, M 4, 2 bytes": {"BN": 32}}}, "sm_80": {"about": "", "tiles": {}}}
    (tmp_path / "tuned.json").write_text(json.dumps(tiles))
    page = gpu_report.report(tmp_path, [])
    assert verdicts(page)["4 MB, 8 KV heads, append included"] == ("4.67 us", "met")
    found = sections(page)
    assert "| gqa8, 4885 tokens, 0.2 kept, plphp | 4.01 | 9.3 | 10% | 4.7 | 10% |" in found["Ceilings"]
    assert "| sm_90 | DP 128, M 4, 2 bytes | {'BN': 32} |" in found["Tiles chosen by `--tune`"]
    assert "| sm_80 | all | nothing |" in found["Tiles chosen by `--tune`"]


def test_failures_of_tests_and_wrong_results_are_listed(tmp_path):
    rows = h200()["rows"]
    ours = next(i for i, row in enumerate(rows) if row["provider"] == "ours, triton")
    rows[ours] = rows[ours] | {"right": False, "why": "off by 1"}
    (tmp_path / "kernels.json").write_text(json.dumps(h200() | {"rows": rows}))
    (tmp_path / "decode.json").write_text('{"rows": [')  # its stage was killed while it wrote
    (tmp_path / "model.xml").write_text("<testsuites>")
    bad = f'<testcase classname="tests.t" name="test_{gpu_report.BITS[0]}"><failure/></testcase>'
    skipped = '<testcase classname="tests.t" name="test_other"><skipped/></testcase>'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{bad}{skipped}</testsuite></testsuites>")
    page = gpu_report.report(tmp_path, ["kernels", "tune"])
    failures = sections(page)["Failures"]
    assert "- kernels: not run" in failures and "kernels.json: ours, triton, 7b, 1220 tokens" in failures
    assert "off by 1" in failures and f"1 of 2 tests failed: t::test_{gpu_report.BITS[0]}" in failures
    assert verdicts(page)["tests of bits: replays, order of the work, neighbours: failed"] == ("1", "**missed**")
