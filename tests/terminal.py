"""run.py on a pseudo-terminal, for the tests of conversations: type, wait for what it shows, never for a time."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time

import run
from model.console import as_command

PATIENCE = 120  # seconds, for machines with much else to do


class Terminal:
    """run.py in a fork of this process, with a terminal of its own as stdin, stdout and stderr. `with` ends it.

    A fork has torch loaded already. It must not use threads, hence --threads 1.
    """

    def __init__(self, *args, stdout=None, until="> "):
        """Wait for a text, by default the first prompt. stdout: a file that takes the place of the terminal there."""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            _become_run([*map(str, args), "--device", "cpu", "--threads", "1"], stdout)
        self.shown = ""  # what `wait_for` has not returned
        self.everything = ""
        self.code = None
        self.introduction = until and self.wait_for(until)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)

    def type(self, text):
        """Keys; Enter is \\n, Ctrl-C \\x03, Ctrl-D \\x04."""
        os.write(self.master, text.encode())

    def enter(self, line):
        """Type a line -> all that is shown until the next prompt, without the line's echo."""
        self.type(line + "\n")
        return (self.wait_for("\n> ") + "\n").partition("\n")[2]

    def begin(self, question):
        """Type a question and wait for the beginning of its answer."""
        self.type(question + "\n")
        self.wait_for("\n")  # the echo
        self.wait_more(10)

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, text, again=""):
        """What is shown before the text appears, which it may have already. again: as in `leave`."""
        assert self._read_until(lambda: text in self.shown, again), f"{text!r} was never shown:\n{self.everything}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def wait_more(self, characters):
        """Until so many more characters are shown."""
        wanted = len(self.everything) + characters
        assert self._read_until(lambda: len(self.everything) >= wanted), f"it has ended:\n{self.everything}"

    def leave(self, keys="", again=""):
        """Type the keys and wait until the program ends, without a traceback -> its exit code.

        again: keys to repeat once a second. Python's readline misses a Ctrl-C between showing the prompt and waiting
        for input, and a person presses it once more.
        """
        self.type(keys)
        self._read_until(lambda: False, again)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert "Traceback" not in self.everything, self.everything
        return self.code

    def _read_until(self, done, again=""):
        """Take in what is shown until done() -> True, or until the program ends -> False."""
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end, f"it does nothing more:\n{self.everything}"
            if not select.select([self.master], [], [], 1)[0]:
                self.type(again)
                continue
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux: the program has closed the terminal
                data = b""
            if not data:
                return False
            text = data.decode(errors="replace").replace("\r\n", "\n")
            self.shown, self.everything = self.shown + text, self.everything + text
        return True


def _become_run(args, stdout):
    """In the fork: what the interpreter does around `python run.py`. It never returns."""
    code = 1
    try:
        os.environ["TERM"] = "dumb"  # no escape codes
        if stdout is not None:
            os.dup2(stdout.fileno(), 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        with contextlib.suppress(SystemExit):  # of argparse
            code = 2
            code = as_command(lambda: run.main(args))
        sys.stderr.flush()
    finally:
        os._exit(code)
