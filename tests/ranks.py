"""Run run.py in several processes, as torchrun would, but forked from one that has imported torch: a start is quick.

    python tests/ranks.py CASES.json        # a list of cases; prints a list of results

A case: size, argv; hook: Python code that each process runs first, with its `rank` and `argv`; kill: a process to kill,
and seconds after the first line that --answers grows by (0: at once, perhaps before that). A result: codes of the
processes, negative for a signal; seconds from the first end to the last; err: stderr of all.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import run  # noqa: E402
from model import parallel, processes, pruning, questions  # noqa: E402, F401 (so that no process has to)

LIMIT = 120  # seconds of a case
GRACE = 30  # seconds between SIGTERM and SIGKILL, as with torchrun


def start(size, argv, hook, err):
    """[process id] of the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(size):
        ids.append(os.fork())
        if ids[-1] == 0:
            os.dup2(err.fileno(), 2)
            os.environ |= {"WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 99
            try:
                exec(hook, {"rank": rank, "argv": argv})
                code = run.main(argv)
            finally:
                os._exit(code)
    return ids


def wait(ids, codes, until, seconds=LIMIT):
    """Note the codes of the processes that end, until all have, or until() is true, or the time is over."""
    end = time.monotonic() + seconds
    while len(codes) < len(ids) and not until() and time.monotonic() < end:
        for child in set(ids) - set(codes):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)


def attempt(size, argv, hook="", kill=None):
    """The result of a case."""
    path, codes = Path(argv[argv.index("--answers") + 1]) if kill else None, {}

    def lines():
        return path.stat().st_size if path and path.exists() else 0

    with tempfile.TemporaryFile() as err:
        before, ids = lines(), start(size, argv, hook, err)
        if kill:
            rank, delay = kill
            wait(ids, codes, lambda: lines() > before or not delay)
            wait(ids, codes, lambda: False, delay or 0.5)
            os.kill(ids[rank], signal.SIGKILL)
        wait(ids, codes, lambda: any(codes.values()))
        first = time.monotonic()
        for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):  # what torchrun does
            for child in set(ids) - set(codes):
                os.kill(child, number)
            wait(ids, codes, lambda: False, seconds)
        err.seek(0)
        told = err.read().decode(errors="replace")
    return {"codes": [codes[child] for child in ids], "seconds": time.monotonic() - first, "err": told}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([attempt(**case) for case in json.loads(Path(sys.argv[1]).read_text())]))
