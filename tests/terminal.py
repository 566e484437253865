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


class Terminal:
    """run.py in a fork of this process, with a terminal of its own as stdin, stdout and stderr. `with` ends it.

    A fork has torch loaded already. It must not use threads, hence --threads 1.
    """

    PATIENCE = 120  # seconds, for machines with much else to do

    def __init__(self, *args, stdout=None):
        """stdout: a file that takes the place of the terminal there."""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            _become_run([*map(str, args), "--device", "cpu", "--threads", "1"], stdout)
        self.shown = ""  # what `wait_for` has not returned
        self.everything = ""
        self.code = None

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

    def wait_for(self, text, again=""):
        """What is shown before the text appears, which it may have already. again: as in `leave`."""
        end = time.monotonic() + self.PATIENCE
        while text not in self.shown:
            if not self._read(min(end, time.monotonic() + 1) if again else end):
                assert again and time.monotonic() < end, f"{text!r} was never shown:\n{self.everything}"
                self.type(again)
        before, _, self.shown = self.shown.partition(text)
        return before

    def wait_more(self, characters):
        """Until so many more characters are shown."""
        end, wanted = time.monotonic() + self.PATIENCE, len(self.everything) + characters
        while len(self.everything) < wanted:
            assert self._read(end), f"nothing more is shown:\n{self.everything}"

    def leave(self, again=""):
        """Wait until the program ends -> its exit code.

        again: keys to repeat once a second. Python's readline misses a Ctrl-C between showing the prompt and waiting
        for input, and a person presses it once more.
        """
        end = time.monotonic() + self.PATIENCE
        while not self._ended(time.monotonic() + 1 if again else end):
            assert time.monotonic() < end, f"it does not end:\n{self.everything}"
            self.type(again)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def _ended(self, end):
        """Read until the program ends (True) or until a time."""
        while time.monotonic() < end:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            if ready and not self._read(end):
                return True
        return False

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self, end):
        """Take in what is shown next; False at the end of the program or of the patience."""
        ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
        try:
            data = os.read(self.master, 65536) if ready else b""
        except OSError:  # Linux: the program has closed the terminal
            data = b""
        text = data.decode(errors="replace").replace("\r\n", "\n")
        self.shown, self.everything = self.shown + text, self.everything + text
        return bool(data)


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
