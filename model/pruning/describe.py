"""The output of `run.py --list-methods`: the methods, or one of them with its settings."""

import inspect
import json
import re
import shutil
import textwrap

from . import COMMON, GUARDS, METHODS, PLACING, calibrated, guards_of, named, settings_of


def listing():
    """The methods, one line each if the terminal is wide enough."""
    width = max(map(len, METHODS)) + 1
    lines = [_row(name, summary(method), width) for name, method in METHODS.items()]
    return "\n".join([*lines, "", "run.py --list-methods NAME shows the settings of one; FILE.py::NAME is your own."])


def describe(name, folder=None):
    """A method of METHODS or FILE.py::NAME with the defaults, meanings and ranges of its settings, or ValueError.

    folder: of a checkpoint; its calibrated settings for the method are listed too.
    """
    name, method, _ = named(name)
    lines = [_row(f"{name}:", summary(method))]
    if method is None:
        return lines[0]
    defaults, what = settings_of(method), meanings(method)
    lines += ["", f"Settings, for --set KEY=VALUE or --prune {name}:KEY=VALUE,... and their defaults:"]
    lines += [_setting(key, value, what) for key, value in defaults.items()]
    more = {key: value for key, value in guards_of(method).items() if key not in defaults}
    for where, keys in (("in", GUARDS), ("before", PLACING)):
        shared = [_setting(key, more[key], what) for key in keys if key in more]
        lines += ["", f"Settings of every method {where} the language model:", *shared] if shared else []
    own = calibrated(folder, name)
    if own:
        pairs = " ".join(f"{key}={shown(value)}" for key, value in json.loads(own.read_bytes()).items())
        lines += ["", _row("For this model the defaults are:", f"{pairs} ({own})")]
    return "\n".join(lines)


def summary(method):
    """One sentence: the first paragraph of the docstring."""
    return "Keeps all tokens." if method is None else " ".join((inspect.getdoc(method) or "").split("\n\n")[0].split())


def meanings(method):
    """{setting: its meaning}, from lines `name: meaning` of the docstring, else a parent class's, else from COMMON."""
    found = {}
    for key, (what, values, _) in COMMON.items():
        found[key] = f"{what} ({re.sub('^a (whole )?number (from |of )?', '', values)})"
    for owner in reversed(method.__mro__) if isinstance(method, type) else [method]:
        lines = inspect.cleandoc(owner.__doc__ or "")
        found |= re.findall(r"^(\w+): (.+(?:\n(?!\w+: ).+)*)", lines, flags=re.M)
    return found


def shown(value):
    """A default in the form that --set accepts: JSON, but strings without quotes."""
    return "(none)" if value is inspect.Parameter.empty else json.dumps(value).strip('"')


def _setting(key, value, what):
    return _row(f"  {key}={shown(value)}", what.get(key, ""), 20)


def _row(left, right, indent=0):
    """Two columns, wrapped to the width of the terminal."""
    width, text = min(shutil.get_terminal_size().columns, 120), f"{left.ljust(indent - 1)} {' '.join(right.split())}"
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
