"""Choose a pruning method by name, for both Python and run.py. Only this module of model/ imports model.pruning."""

from collections.abc import Callable
from typing import Any

from .config import InputError
from .pruning import (
    AMOUNTS,
    COMMON,
    METHODS,
    Composition,
    Method,
    Narrowing,
    Picking,
    calibrated,
    make_method,
    sets_budget,
    settings_of,
)  # fmt: skip
from .pruning import MethodError as MethodError  # for model.console

AnyMethod = Method | Composition
# What `prune` accepts: None or "none"; a SPEC as in `--prune`; a Method or Composition; or a function, a class or an
# instance as `model.pruning` describes them
PruneLike = str | AnyMethod | Callable[..., Any] | Narrowing | Picking | None


def choose_method(prune: PruneLike, folder=None, retention=None, keep_tokens=None, settings=()) -> AnyMethod | None:
    """The `model.pruning.Method` for the arguments, or None to keep everything. InputError if they are invalid.

    folder: the checkpoint's; methods given by name use its settings files, such as plphp.json. retention, keep_tokens,
    settings: as in `make_method`.
    """
    try:
        return make_method(prune, retention, keep_tokens, settings, folder)
    except ValueError as wrong:
        raise InputError(str(wrong)) from wrong


def change_method(spec, folder, budget):
    """The Method of a SPEC with the budget {"retention": F or None, "keep_tokens": N or None}, and a note or None.

    A SPEC that sets its own budget keeps it; the note says so. InputError as in `choose_method`.
    """
    method = choose_method(spec, folder)
    given = [f"{key} {value:g}" for key, value in budget.items() if value is not None]
    if method is None or not given:
        return method, None
    if not sets_budget(spec):
        return choose_method(spec, folder, **budget), None
    own = "retention" in method.parts[-1].settings
    why = "SPEC sets its own budget" if own else f"{method.name} has no setting retention"
    return method, f"{given[0]} has no effect, because {why}"


def change_budget(method, folder, budget):
    """A copy of the Method with another budget. The first part of a composition keeps its own. InputError."""
    *_, last = method.parts
    prefix = f"{last.name}." if len(method.parts) > 1 else ""
    amounts = {prefix + key for key in AMOUNTS}
    others = {key: value for key, value in method.effective.items() if key not in amounts}
    return choose_method(method.name, folder, **budget, settings=others)


def named_with_budget(method):
    """A Method's name and how much it keeps: "topk, retention 0.5"."""
    return " + ".join(
        ", ".join([part.name, *(f"{key} {value}" for key, value in part.effective.items() if key in AMOUNTS)])
        for part in method.parts
    )


def note_on_settings(method, folder):
    """One line if a file in the checkpoint's folder has settings for the Method, else None."""
    name = method and method.parts[-1].name
    file = calibrated(folder, name)
    return f"{name} uses the settings in {file}; explicit settings override them" if file else None


def list_methods(name, model):
    """The text of --list-methods: all methods, or the one with this name and its settings for the model. InputError."""
    from .checkpoint import find_folder
    from .pruning.describe import describe, listing

    try:
        return describe(name, find_folder(model)) if name else listing()
    except ValueError as wrong:
        raise InputError(str(wrong)) from wrong


def known_settings():
    """The names of all settings of the built-in methods."""
    return set(COMMON).union(*(settings_of(method) for method in METHODS.values() if method))


def off_budget(method, kept, wanted):
    """A one-line warning, or None. kept, wanted: fractions of the vision tokens; wanted is None if none was requested.

    Warns if kept differs from wanted by more than 0.03, if no vision token was kept, or if all were kept and no
    fraction was requested.
    """
    if method is None:
        return None
    name = "the method" if method.name == "<lambda>" else method.name
    if kept == 0:
        return f"{name} kept no vision token; return True for those that the answer needs"
    if kept == 1 and wanted is None:
        return f"{name} dropped no vision token; check its settings, and that it returns what to keep"
    if wanted is None or abs(kept - wanted) <= 0.03:
        return None
    hint = "; tools/calibrate.py fits its settings to a model" if "alpha" in method.parts[-1].settings else ""
    hint = "; check that it returns what to keep" if kept == 1 else hint
    return f"{name} kept {100 * kept:.1f} % of the vision tokens instead of {100 * wanted:.1f} %{hint}"
