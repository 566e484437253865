"""The console blocks of the pages do what they say: their commands run, in their order, and print what is shown."""

import re
import subprocess
import sys

import pytest

from tests.paths import PAGES, ROOT


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


SHOWN = {page.relative_to(ROOT).as_posix(): found for page in PAGES if (found := examples(page.read_text()))}


def test_examples_are_found():
    assert len(SHOWN["README.md"]) >= 2 and len(SHOWN["tools/README.md"]) >= 8


@pytest.mark.thorough
@pytest.mark.parametrize("page", SHOWN)
def test_worked_examples_print_what_they_show(page, tmp_path):
    for command, lines in SHOWN[page]:
        placed = re.sub(r"\bout/", f"{tmp_path}/", command)
        placed = re.sub(r"\bpython ", f"{sys.executable} ", placed)
        done = subprocess.run(["bash", "-c", f"set -e -o pipefail; {placed}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.replace(f"{tmp_path}/", "out/").splitlines() == lines, command
