"""The ten-minute guide of kernels/README.md, line by line: a copied kernel, inspected, checked and timed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(shutil.which("git") is None, reason="needs git"),
]


@pytest.fixture
def folder(tmp_path):
    """A repository with one commit of what the guide needs."""
    for part in ("kernels", "tools", "model"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for words in (["init"], ["add", "-A"], ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    return tmp_path


def test_the_ten_minute_guide_runs_line_by_line(folder):
    page = (ROOT / "kernels" / "README.md").read_text()
    (block,) = re.findall(r"^## Ten minutes.*?^```sh\n(.*?)^```", page, flags=re.M | re.S)
    copy, edit, inspect, check, time = block.splitlines()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(line, code=0):
        line = re.sub(r"\bpython ", f"{sys.executable} ", line)
        done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, env=environment)
        assert done.returncode == code, (line, done.stdout, done.stderr)
        return done.stdout

    run(copy)
    run(edit)
    assert '{"BN": 2 * tile["BN"]}' in (folder / "my.py").read_text()
    # BN is 128 at D = 128 in bf16: two tiles of 64 KB, more than the gate allows; in fp32 registers spill
    header, *rows, _ = run(inspect, code=1).splitlines()
    end = header.index("verdict")
    columns = [dict(zip(header.split(), [*row[:end].split(), row[end:]], strict=True)) for row in rows]
    (row,) = (c for c in columns if (c["dtype"], c["codes"], c["D"], c["M"]) == ("bf16", "-", "128", "4"))
    assert int(row["shared"]) > 128 << 10 and "shared 130 KB > 80" in row["verdict"] and int(row["regs"]) > 100
    assert any(int(c["spills"]) > 100 for c in columns)
    right = r"^  my +\d.* \d\.\de-\d\d  "
    assert re.search(right, run(check), re.M)  # its largest error, in the interpreter
    out = run(time)
    assert re.search(r"^  base HEAD, torch +\d", out, re.M) and re.search(r"^  ours, torch +\d", out, re.M)
    assert re.search(r"^  my +not timed: needs CUDA", out, re.M) or re.search(right, out, re.M)
