"""What a command prints, and how it ends: messages on stderr, exit codes, errors in one line. Imports no torch."""

import errno
import json
import os
import sys


def as_command(main):
    """Run a command line's main() and return its exit code.

    Characters that the terminal's encoding lacks are written as escapes. A closed pipe, as in `... | head`, is not an
    error. If stderr is closed, output for it is discarded, because print(file=None) would write to stdout.
    """
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def explain(broken):
    """(message, exit code) of an exception."""
    text = one_line(broken)
    if "cannot load module more than once" in text:  # an import, broken off by Ctrl-C, was tried again
        return "interrupted", 130
    if isinstance(broken, ImportError):
        return f"{text}; run `make run` once and then use .venv/bin/python", 2
    from . import InputError, out_of_memory
    from .api import MethodError

    if isinstance(broken, InputError):
        return text, 2
    if out_of_memory(broken):
        return f"out of memory ({text[:200]}); try --dtype bf16, a smaller --max-new-tokens or fewer pictures", 1
    if isinstance(broken, OSError) and broken.errno == errno.ENOSPC:
        return f"the disk is full ({text}); free some space and run the command again", 1
    if type(broken).__name__ in ("InductorError", "BackendCompilerFailed"):
        why = text.split(" Set TORCHDYNAMO_VERBOSE")[0][:200]
        return f"torch.compile failed ({why}); it needs a C++ compiler such as g++; run without --compile", 1
    what = text[:400] if isinstance(broken, MethodError) else f"{type(broken).__name__}: {text[:300]}"
    return f"{what}; run again with --debug to see where", 1


def fail(message, code):
    """Print an error to stderr -> code, the exit code."""
    say(f"error: {message}")
    return code


def say(text):
    """Print to stderr."""
    print(text, file=sys.stderr, flush=True)


def note(text):
    say(f"note: {text}")


def one_line(text):
    return " ".join(str(text).split())


def as_json(value):
    """One line of JSON, with escapes for all but ASCII unless the encoding of stdout is UTF-8."""
    plain = getattr(sys.stdout, "encoding", "") in ("utf-8", "UTF-8", "utf8")
    return json.dumps(value, ensure_ascii=not plain, default=str)
