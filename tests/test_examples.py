"""The commands in tools/README.md run in order and print what it shows."""

import re
import subprocess
import sys

import pytest

from tests.paths import ROOT


def examples(text):
    """[(command, [lines shown below it])] of the console blocks, in order."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", text, flags=re.M | re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line.removeprefix("$ "), []))
            else:
                found[-1][1].append(line)
    return found


@pytest.mark.thorough
def test_worked_examples_print_what_they_show(tmp_path):
    shown = examples((ROOT / "tools" / "README.md").read_text())
    assert len(shown) >= 8
    for command, lines in shown:
        placed = re.sub(r"\bout/", f"{tmp_path}/", command)
        placed = re.sub(r"\bpython ", f"{sys.executable} ", placed)
        done = subprocess.run(["bash", "-c", f"set -e -o pipefail; {placed}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.replace(f"{tmp_path}/", "out/").splitlines() == lines, command
