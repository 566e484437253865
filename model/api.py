"""Choose a pruning method by name, for both Python and run.py. Only this module of model/ imports model.pruning."""

from .config import InputError
from .pruning import make_method


def choose_method(prune, folder=None, retention=None, keep_tokens=None, settings=()):
    """The `model.pruning.Method` for the arguments, or None to keep everything. InputError if they are invalid.

    prune: None, "none", a SPEC of `--prune`, a Method, or a function, class or instance as `model.pruning`
    describes them; folder: the checkpoint's; methods given by name use its settings files, such as plphp.json;
    retention, keep_tokens, settings: as in `make_method`.
    """
    try:
        return make_method(prune, retention, keep_tokens, settings, folder)
    except ValueError as wrong:
        raise InputError(str(wrong)) from wrong
