"""tools/inspect_kernels.py: the shipped kernels pass its gates on four architectures; a faulty kernel fails."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tools.inspect_kernels import ARCHS, KERNELS, Facts, Variant, failures

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def tool(*arguments, root=ROOT):
    """Run the tool of a copy of the repository in its own process, because it compiles and tests may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(root / "tools" / "inspect_kernels.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)


@pytest.mark.wider
def test_what_ships_passes_its_gates_on_every_architecture(tmp_path, pytestconfig):
    """Without --all on two of them, one per vendor."""
    archs = list(ARCHS) if pytestconfig.option.all else ["sm_90", "gfx942"]
    done = tool("--arch", *archs, "--json", tmp_path / "facts.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "facts.json").read_text())["rows"]
    bad = [row for row in rows if row["verdict"] != "ok"]
    assert not bad, bad
    assert {(row["kernel"], row["arch"]) for row in rows} == {(kernel, arch) for kernel in KERNELS for arch in archs}


@pytest.mark.thorough
@pytest.mark.skipif(not os.path.isdir(os.environ.get("TRITON_36", "")), reason="make test-all installs triton 3.6")
def test_triton_3_6_compiles_them_too(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.environ["TRITON_36"])
    done = tool("--arch", "sm_90")
    assert done.returncode == 0 and "with triton 3.6.0: none failed" in done.stdout, done.stdout + done.stderr


def test_the_step_in_one_launch_passes_on_its_own():
    """Fast enough for tests/mutants.py."""
    done = tool("--arch", "sm_90", "--kernel", "append_kernel")
    assert done.returncode == 0, done.stdout + done.stderr


ALIGNMENTS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from types import SimpleNamespace
from unittest.mock import DEFAULT, patch
from kernels import ragged_decode_triton as module
from kernels.ragged_decode_plan import _work_items, decode_plan

caps = torch.tensor([[640, 641], [640, 640], [641, 641]], dtype=torch.int32)  # 10 or 11 work items per segment
starts, x = caps.cumsum(1, dtype=torch.int32) - caps, torch.empty(1, 2, 128)
calls = {"append_kernel": [], "split_kernel": [], "merge_kernel": []}
kernels = {name: getattr(module, name) for name in calls}
for layer, items in enumerate(_work_items(starts.tolist(), caps.tolist(), None, "cpu")):  # as on CUDA: of all layers
    plan = decode_plan(starts[layer], caps[layer])
    plan.buffers["items"] = items
    with patch.multiple(module, architecture=lambda device: "sm_90", **{name: DEFAULT for name in calls}) as mocks:
        k = torch.empty(2000, 128)
        module.append_attend(x, x, x, k, k, caps[layer], plan, 1.0)
        module.attend(x[:, None], k, k, caps[layer], plan, 1.0)
    for name, mock in mocks.items():
        if name in calls:
            calls[name].append(mock.__getitem__.return_value.call_args)
driver.set_active(SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0,
                                  get_current_target=lambda: GPUTarget("cuda", 90, 32)))
for name, kernel in kernels.items():
    print(name, len({kernel.warmup(*call.args, grid=(1,), **call.kwargs) for call in calls[name]}))
"""


def test_layers_share_a_compiled_kernel():
    """Tables are views of one tensor for all layers, and their alignment varies."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", ALIGNMENTS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.split() == ["append_kernel", "1", "split_kernel", "1", "merge_kernel", "1"], done.stderr


WIDE = "at = slot.to(tl.int64)[:, None] * D + col[None, :]"
TILE = "ROPE=rope is not None, UP=interpreted(), LARGEST=CODES.get(k.dtype, 0), **"  # of append_kernel
FAULTS = {  # gate that must fail: changes to the source
    ("barrier", "int64"): {
        "        tl.debug_barrier()": "        pass",
        WIDE: "at = slot[:, None] * D + col[None, :]",
    },
    ("stack", "int64"): {
        TILE + "tile": TILE + '(tile | {"num_warps": 1})',  # needs too many registers
        WIDE: "at = (slot[:, None] * D).to(tl.int64) + col[None, :]",  # widened too late
    },
}


def changed(folder, changes):
    """A copy of the files that the tool and the kernels need, with changes {old: new} to the decode kernels."""
    for part in ("kernels", "tools", "model"):
        shutil.copytree(ROOT / part, folder / part)
    path = folder / "kernels" / "ragged_decode_triton.py"
    text = path.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return folder


@pytest.mark.parametrize("gates", FAULTS, ids=" and ".join)
def test_a_spoilt_kernel_fails_the_gate(gates, tmp_path):
    few = changed(tmp_path, FAULTS[gates]) / "tools" / "inspect_kernels.py"  # three variants are enough
    few.write_text(few.read_text().replace("cover = COVER if", "cover = () if", 1))
    done = tool("--arch", "sm_90", "--kernel", "append_kernel", root=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    header, *rows, summary = done.stdout.splitlines()
    verdicts = [row[header.index("verdict") :].split(", ") for row in rows]
    assert any(set(gates) <= {gate.split()[0] for gate in verdict} for verdict in verdicts), done.stdout
    named = r"stack \d+ bytes > 8 or \d+ spills > 4|barrier (no|chance)|int64|\w+ \d.*"
    assert all(re.fullmatch(named, gate) for verdict in verdicts for gate in verdict), done.stdout
    assert all("int64" in verdict for verdict in verdicts) and "failed a gate" in summary


@pytest.mark.parametrize(
    ("arguments", "naming"),
    [
        (["--arch", "sm_1"], "sm_1"),
        (["--kernel", "split_kernel", "attend"], "attend"),
        (["--json", "no/such/folder/facts.json"], "no/such/folder"),
        (["--processes", "0"], "--processes is 0"),
        (["--file", "/nowhere.py"], "/nowhere.py"),
        (["--file", "kernels/ragged_pack_triton.py", "--kernel", "append_kernel"], "has no append_kernel"),
        (["--file", "kernels/backend.py"], "kernels/backend.py has no append_kernel, "),
    ],
)
def test_mistakes_are_one_line(arguments, naming):
    refused(tool(*arguments), naming)


def test_it_says_when_triton_is_missing():
    code = "import sys; sys.modules['triton'] = None\nfrom tools.inspect_kernels import main\nsys.exit(main([]))"
    refused(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT), "triton")


@pytest.mark.parametrize("names", [["keys"], ["keys", "values"]], ids=" and ".join)
def test_loads_of_another_name_are_not_taken_for_a_fault(names, tmp_path):
    root = changed(tmp_path, {f" {name} = tl.load(": f" my_{name} = tl.load(" for name in names})
    lines = " or ".join(f"`{name} = tl.load(`" for name in names)
    wanted = f"no line {lines} in kernels/ragged_decode_triton.py; the inspector finds loads by these names"
    refused(tool("--kernel", "append_kernel", root=root), wanted)


def test_a_changed_copy_is_inspected_instead(tmp_path):
    """Only the kernels that the file has."""
    source, wide = (ROOT / "kernels" / "ragged_pack_triton.py").read_text(), "to = slot.to(tl.int64)[:, None] * D"
    assert source.count(wide) == 1
    (tmp_path / "my.py").write_text(source.replace(wide, "to = slot[:, None] * D"))
    done = tool("--arch", "sm_90", "--file", tmp_path / "my.py")
    assert done.returncode == 1, done.stdout + done.stderr
    header, *rows, summary = done.stdout.splitlines()
    assert {row.split()[0] for row in rows} == {"pack_kernel"} and f": {len(rows)} failed" in summary
    assert {row[header.index("verdict") :].strip() for row in rows} == {"int64"}, done.stdout


def test_failed_gates_name_the_numbers():
    facts = Facts(138, 136 << 10, 0, 0, 4, 1, 4, 8, "yes", True, 4)
    constants = {"M": 4, "BN": 64, "DP": 128}
    failed = failures(Variant("split_kernel", "bf16", 128, 4, 1), "sm_90", facts, constants, 128)
    assert failed == [
        "registers 138 > 128",
        "shared 136 KB > 80",
        "loads 4 wide + 1 narrow",
        "pipeline 4 of 5 loads",
        "chain 4 > 3",
    ]


def test_a_kernel_that_it_does_not_know_is_noticed(tmp_path):
    (changed(tmp_path, {}) / "kernels" / "new_triton.py").write_text("def new_kernel(x):\n    pass\n")
    refused(tool(root=tmp_path), "new_kernel")


def refused(done, naming):
    """Exit 2, one line on stderr with cause and remedy, nothing on stdout."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "; " in line and naming in line, line
