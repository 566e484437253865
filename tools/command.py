"""What the commands of this folder share: flags, files that they write, errors. Imports torch only on demand."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.console import as_command, one_line  # noqa: E402, F401 (the tools import these from here)
from model.flags import Parser, number, one_of  # noqa: E402, F401


def flags(doc):
    """A parser whose help begins with the command's docstring and whose errors are one line."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)


def exit_code(work, *arguments):
    """The exit code of work(*arguments), None being 0; after an InputError one line on stderr, and 2."""
    from model.config import InputError  # imports torch; -h must not wait for that

    try:
        return work(*arguments) or 0
    except InputError as wrong:
        print("error:", one_line(wrong), file=sys.stderr)  # messages of libraries may have line breaks
        return 2


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
