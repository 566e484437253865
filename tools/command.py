"""What the commands of this folder share: flags, files that they write, errors. Imports torch only on demand."""

import argparse
import errno
import importlib.util
import json
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.console import as_command, fail, one_line, say  # noqa: E402, F401 (the tools import these from here)
from model.flags import DEMO, Parser, number, one_of  # noqa: E402, F401


def flags(doc):
    """A parser whose help begins with the command's docstring and whose errors are one line."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def model_flags(parser, dtype="auto"):
    """Add --model (the demo by default), --dtype and --device -> the parser."""
    parser.add_argument("--model", default=str(DEMO), metavar="DIR|ID",
                        help="folder or cached Hugging Face id (default: the demo)")  # fmt: skip
    parser.add_argument("--dtype", default=dtype, type=one_of("auto", "bf16", "fp16", "fp32"), metavar="TYPE",
                        help="%(type)s (default %(default)s)")  # fmt: skip
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default auto)")
    return parser


def exit_code(work, *arguments, interrupted=None):
    """The exit code of work(*arguments), None being 0. One line on stderr after an InputError or an OSError, and 2;
    after a MethodError or on a full disk, and 1; after Ctrl-C, if `interrupted` is a message, this message, and 130."""
    from model.config import InputError  # imports torch; -h must not wait for that
    from model.pruning import MethodError

    try:
        return work(*arguments) or 0
    except BrokenPipeError:
        raise  # see `as_command`
    except (InputError, OSError, MethodError) as wrong:  # libraries' messages have line breaks
        failed = isinstance(wrong, MethodError) or getattr(wrong, "errno", None) == errno.ENOSPC
        return fail(one_line(wrong), 1 if failed else 2)
    except KeyboardInterrupt:
        if interrupted is None:
            raise
        say(interrupted)
        return 130


def unwritable(*paths):
    """The error message for the first of these files that cannot be written, or None. Creates them; skips None.

    Called before a measurement, which would be lost.
    """
    try:
        for path in filter(None, paths):
            open(path, "a").close()
    except OSError as wrong:
        return f"cannot write the output ({one_line(wrong)}); give another file"
    return None


def write_json(path, data, indent=1, sort_keys=False):
    """Write data as indented JSON."""
    Path(path).write_text(json.dumps(data, indent=indent, sort_keys=sort_keys) + "\n", encoding="utf-8")


def imported(name, path, advice):
    """Import the module, or the package with this __init__.py, from a path. InputError with advice if that fails."""
    from model.config import InputError  # imports torch

    found = importlib.util.spec_from_file_location(name, path, loader=SourceFileLoader(name, str(path)))
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # triton looks up a kernel's module; relative imports look up the package
    try:
        found.loader.exec_module(module)
    except Exception as broken:
        why = f"{type(broken).__name__}: {one_line(broken)[:200]}"
        raise InputError(f"cannot import {path} ({why}); {advice}") from broken
    return module
