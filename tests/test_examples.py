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


SHOWN = {page.relative_to(ROOT).as_posix(): examples(page.read_text()) for page in PAGES}
# a page that only runs run.py is left to tests/test_repo.py, which does so in its own process
LONG = [page for page, shown in SHOWN.items() if not all(c.startswith("python run.py") for c, _ in shown)]


def test_examples_are_found():
    assert (
        len(SHOWN["README.md"]) >= 2
        and len(SHOWN["tools/README.md"]) >= 8
        and set(LONG) == {"README.md", "tools/README.md"}
    )


@pytest.mark.thorough
@pytest.mark.parametrize("page", LONG)
def test_worked_examples_print_what_they_show(page, tmp_path):
    for command, lines in SHOWN[page]:
        placed = re.sub(r"\bout/", f"{tmp_path}/", command)
        placed = re.sub(r"\bpython ", f"{sys.executable} ", placed)
        done = subprocess.run(["bash", "-c", f"set -e -o pipefail; {placed}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.replace(f"{tmp_path}/", "out/").splitlines() == lines, command
