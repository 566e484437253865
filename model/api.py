"""Pruning methods by name, from Python as on the command line: the one file of model/ that imports model/pruning."""

from .config import InputError
from .pruning import make_method


def choose_method(prune, folder=None, retention=None, keep_tokens=None, settings=()):
    """The `model.pruning.Method` that is meant, or None to keep everything; InputError says what is wrong.

    prune: None, "none", a SPEC of `--prune`, a Method, or a function or class as `model.pruning` describes them;
    folder: of the checkpoint, whose own settings (plphp.json) hold for what is named; retention, keep_tokens, settings:
    as in `make_method`.
    """
    try:
        return make_method(prune, retention, keep_tokens, settings, folder)
    except ValueError as wrong:
        raise InputError(str(wrong)) from wrong
