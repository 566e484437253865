"""Long runs: progress, files that an interrupted run continues, tables."""

import json
import time

from model.console import say

PERIOD = 10  # seconds between two lines of progress


def progress(items, what, total=None):
    """Iterate over `total` items, with progress on stderr: at the start, at the end, and every PERIOD seconds."""
    total = len(items) if total is None else total
    started = said = time.monotonic()
    if total:
        say(f"{what}: 0/{total}")
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done == total or now > said + PERIOD:
            said = now
            say(f"{what}: {done}/{total}, {(now - started) / done * (total - done) / 60:.1f} min left")


class Lines:
    """A file of JSON lines that an interrupted run continues. `values` are those of its whole lines.

    A partial last line, left by a kill, stays until the next `add`.
    """

    def __init__(self, path):
        whole = path.read_bytes() if path.exists() else b""
        self.path, self.end = path, whole.rfind(b"\n") + 1
        self.values = [json.loads(line) for line in whole[: self.end].splitlines()]

    def add(self, value):
        line = json.dumps(value).encode() + b"\n"
        with open(self.path, "ab") as file:
            file.truncate(self.end)
            file.write(line)
        self.end += len(line)
        self.values.append(value)


def table(head, rows, columns=None):
    """A table in Markdown. columns: l (text) or r (number) for each; by default all but the first are numbers."""
    rule = ["---" if column == "l" else "---:" for column in columns or "l" + "r" * (len(head) - 1)]
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])
