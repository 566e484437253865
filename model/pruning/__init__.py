"""The pruning methods, and how to name one.

A method is one small file here and one row of METHODS: a function keep(view, *, SETTING=DEFAULT, ...), or a frozen
dataclass whose fields are its settings (`__post_init__` may raise a ValueError). Its docstring begins with one
sentence and has a line `name: meaning (range)` for each setting that is not in COMMON; `run.py --list-methods` prints
them. A class has one or both of these stages, and a function is the first:

    keep(view)     after a layer's attention: whose K and V each KV head keeps, (Hkv, T) bool, or None for all. Hidden
                   states do not change
    narrow(view)   after a layer: the tokens that later layers process, (T,) bool, or None for all

view: a `model.view.View` of the layer, from which the method takes what it needs. Text is always kept. A class may also
have

    check(num_layers, kv_heads)    raises a ValueError for an unsuitable model

The look-ahead rows are computed only for a method whose setting query is "lookahead".
"""

import importlib.util
import inspect
import json
import sys
import traceback
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from .budget import GROUPS, QUERIES, SCOPES, best, by_kv_head
from .fastv import FastV
from .grid import grid_tokens
from .objects import Objects
from .plphp import Plphp, PlphpAda
from .random_tokens import Random
from .shared import shared_tokens
from .snapkv import AdaKV, SnapKV
from .topk import TopK

METHODS = {
    "none": None,
    "plphp": Plphp,
    "plphp-ada": PlphpAda,
    "random": Random,
    "grid": grid_tokens,
    "objects": Objects,
    "topk": TopK,
    "shared": shared_tokens,
    "snapkv": SnapKV,
    "adakv": AdaKV,
    "fastv": FastV,
}

ALIASES = {"uniform": "topk"}  # former name of a method -> its name

FAMILY = {"plphp-ada": ("plphp",)}  # method -> methods whose calibrated settings it uses if it has none of its own
AMOUNTS = ("retention", "keep_tokens", "r", "mass", "rates")  # settings that determine how much is kept
SILENCED = {  # setting -> settings that it makes ineffective
    "retention": ("keep_tokens", "r", "mass", "rates"),
    "keep_tokens": ("r", "dr", "alpha", "beta", "mass", "rates"),
    "mass": ("rates",),
}

GUARDS = {"sink": 0, "recent": 0, "sink_keys": 0}  # settings of every method, with their defaults


def _among(names):
    return " or ".join(names), lambda v: v in names


# Values that a setting may have: (description, function value -> bool)
COUNT = "a whole number of 0 or more", lambda v: type(v) is int and v >= 0
FRACTION = "a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1
SOME = "a number above 0 and up to 1", lambda v: FRACTION[1](v) and v > 0
ONE = "a whole number of 1 or more", lambda v: COUNT[1](v) and v > 0
SWITCH = "true or false", lambda v: type(v) is bool

# Settings with the same meaning in every method that has them: meaning, values
COMMON = {
    "retention": ("fraction of the vision tokens to keep", *SOME),
    "keep_tokens": ("tokens that each head keeps of each picture; replaces retention", *ONE),
    "window": ("last prompt rows whose mean attention ranks the tokens", *ONE),
    "query": ("rank by the attention of the last prompt rows or of look-ahead rows", *_among(QUERIES)),
    "values": ("rank by attention times the L1 norm of the token's value vector, as in 2406.12335", *SWITCH),
    "group": ("how query heads that share a KV head are combined", *_among(GROUPS)),
    "scope": ("one budget for each picture, or one for all pictures together", *_among(SCOPES)),
    "cover": ("share of each head's tokens taken from an even grid instead of by score", *FRACTION),
    "sink": ("first tokens of the prompt that no head may drop", *COUNT),
    "recent": ("last tokens of the prompt that no head may drop", *COUNT),
    "sink_keys": ("tokens most attended by a head's last 32 prompt rows, which it may not drop", *COUNT),
}


class Narrowing(Protocol):
    """An object that implements the second stage, such as a `FastV`."""

    def narrow(self, view: object) -> torch.Tensor | None: ...


class MethodError(RuntimeError):
    """A method's own code raised an exception. The message is one line with the method's name and the line number."""


@dataclass(frozen=True)
class Method:
    """A method with its settings, and the code shared by all methods. rule: the function or object of its file."""

    name: str
    rule: object
    settings: dict

    @property
    def spec(self):
        """SPEC with every setting that has an effect; `--prune` with it selects this method, for any checkpoint."""
        given = {k: v for k, v in self.settings.items() if v is not None and (k not in GUARDS or v)}
        if "keep_tokens" in given:
            given.pop("retention", None)  # the default, which keep_tokens replaces
        silent = {b for a, b in _silenced(self.name, given)} | ({"window"} if self.looks_ahead else set())
        pairs = [f"{k}={v if type(v) is str else json.dumps(v)}" for k, v in given.items() if k not in silent]
        return self.name + (":" if pairs else "") + ",".join(pairs)

    @property
    def looks_ahead(self):
        """True if the scores are the attention of the look-ahead rows."""
        return self.settings.get("query") == "lookahead"

    @property
    def narrows(self):
        """True if the method drops hidden states too, so that the first new token may differ."""
        return "narrow" in stages(self.rule)

    def check(self, num_layers, kv_heads):
        """ValueError if the method does not fit the model."""
        if hasattr(self.rule, "check"):
            self.rule.check(num_layers, kv_heads)

    def wanted(self, tokens):
        """The requested fraction of the vision tokens, or None if no setting gives one. tokens: count per picture."""
        count, retention = self.settings.get("keep_tokens"), self.settings.get("retention")
        if count is None or not sum(tokens):
            return retention
        pots = [sum(tokens)] if self.settings.get("scope") == "vision" else tokens
        return sum(min(count, n) for n in pots) / sum(tokens)

    def keep(self, view):
        """-> the tokens that each head keeps, (Hkv, T) bool, or None for all. ValueError for anything else."""
        return self._ask("keep", view, (view.kv_heads, view.tokens))

    def narrow(self, view):
        """-> the tokens that later layers process, (T,) bool, or None for all. ValueError for anything else.

        The last token stays, because it predicts the answer.
        """
        keep = self._ask("narrow", view, (view.tokens,))
        if keep is not None:
            keep[-1] = True
        return keep

    def _ask(self, stage, view, shape):
        """What a stage of the rule returns, with text and guards added; None if there is no such stage. Its exceptions
        become a MethodError, except the ValueErrors of METHODS."""
        function = stages(self.rule).get(stage)
        try:
            keep = function and function(view)
        except MemoryError:
            raise
        except Exception as wrong:
            if isinstance(wrong, ValueError) and self.name in METHODS:
                raise  # its message is one line
            what, line = " ".join(str(wrong).split()), _line(function, wrong)
            where = f" in line {line}" if line else ""
            raise MethodError(f"{titled(self.name)}: {type(wrong).__name__}{where}: {what}") from wrong
        if keep is None:
            return None
        if not isinstance(keep, torch.Tensor) or keep.shape != shape or keep.dtype != torch.bool:
            found = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, torch.Tensor) else type(keep).__name__
            raise ValueError(f"{titled(self.name)} returned {found}; return bool {shape}")
        return keep.to(view.device) | self._guarded(view, keep.ndim)

    def _guarded(self, view, dims):
        """(T,) or (Hkv, T) bool: tokens that a stage may not drop: text, and those that the settings GUARDS protect."""
        sink, recent, keys = (self.settings.get(name, 0) for name in GUARDS)
        mask = view.text
        if sink or recent:
            mask = mask.clone()
            mask[:sink] = True
            mask[max(0, view.tokens - recent) :] = True
        if not keys:
            return mask
        # such keys absorb attention of heads that need no token; without them it would go to other tokens
        attended = best(by_kv_head(view.attention(rows=32), view.kv_heads), keys)
        return mask | (attended if dims == 2 else attended.any(0))


def titled(name):
    """A method in an error message: "method topk"; a lambda has no name."""
    return "the method" if name == "<lambda>" else f"method {name}"


def _bare(rule):
    """The function of a `functools.partial`, or the rule itself."""
    return rule.func if isinstance(rule, partial) else rule


def _line(function, wrong):
    """Number of the last line of a function's file that an exception passed through, or None."""
    code = getattr(inspect.unwrap(_bare(function)), "__code__", None)
    steps = traceback.walk_tb(wrong.__traceback__)
    lines = [line for frame, line in steps if code and frame.f_code.co_filename == code.co_filename]
    return lines[-1] if lines else None


def make_method(spec, retention=None, keep_tokens=None, settings=(), folder=None):
    """The Method of a SPEC, or None for "none".

    spec: NAME or FILE.py::NAME, then optionally ":" and comma-separated key=value pairs; or a function, a class or a
    `functools.partial` of either; or an instance of a class; or a Method; or None. settings: a dict, or a list of
    "key=value" and "@FILE.json" (a JSON object). retention, keep_tokens: the budget, for methods with a setting of that
    name. folder: of a checkpoint; its NAME.json, if there is one (see `calibrated`), replaces the method's defaults.
    ValueError for invalid input, including a setting that is given twice or together with one that makes it
    ineffective.
    """
    name, function, pairs = named(spec)
    if not isinstance(settings, dict | list | tuple) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"the settings are {str(settings)[:80]!r}; give a dict, such as {{'window': 4}}")
    function, given = (function.func, dict(function.keywords)) if isinstance(function, partial) else (function, {})
    for text in (*pairs, *(() if isinstance(settings, dict) else settings)):
        _add(given, _read(text[1:]) if text.startswith("@") else dict([_pair(text)]))
    if isinstance(settings, dict):
        _add(given, settings)
    _add(given, {k: v for k, v in (("retention", retention), ("keep_tokens", keep_tokens)) if v is not None})
    made = not (function is None or _takes_settings(function))  # a Method, or an instance of a class
    if given and spec is None:
        raise ValueError(f'{", ".join(given)} was given, but prune is missing; give a method, such as prune="plphp"')
    if given and (made or function is None):
        why = "already has its settings; give its name or class" if made else "takes no settings; give a method by name"
        raise ValueError(f"{', '.join(given)} was given, but method {name} {why}")
    if function is None or isinstance(function, Method):
        return function
    if made:
        fields = settings_of(type(function))
        settings = GUARDS | {key: getattr(function, key) for key in fields if hasattr(function, key)}
        _check_common(name, settings)
        _check_stages(name, function)
        return Method(name, function, settings)
    _check_budget(name, given)
    file = calibrated(folder, name)
    given = _instead(_read(file) if file else {}, given)
    settings = _complete(name, function, given)
    own = {k: v for k, v in settings.items() if k not in GUARDS or k in settings_of(function)}
    try:
        rule = function(**own) if isinstance(function, type) else partial(function, **own)
    except ValueError as wrong:
        raise ValueError(f"{wrong} (settings not given come from {file})" if file else str(wrong)) from wrong
    _check_stages(name, rule)
    return Method(name, rule, settings)


def stages(rule):
    """{"keep" or "narrow": function of a view} of what a rule implements; a function is the stage keep."""
    if inspect.isroutine(_bare(rule)):
        return {"keep": rule}
    return {name: getattr(rule, name) for name in ("keep", "narrow") if callable(getattr(rule, name, None))}


def _check_stages(name, rule):
    """ValueError if a rule implements no stage, or one that cannot be called with a view."""
    if not stages(rule):
        raise ValueError(
            f"{titled(name)} has neither keep(self, view) nor narrow(self, view); see model/pruning/README.md"
        )
    for stage, function in stages(rule).items():
        try:
            inspect.signature(function).bind(None)
        except TypeError:
            taken = str(inspect.signature(function))[:80]
            raise ValueError(
                f"{stage} of {titled(name)} is {stage}{taken}; it must take one argument, the view"
            ) from None


def _takes_settings(spec):
    """True for a function or a class, which settings turn into a rule."""
    return inspect.isfunction(spec) or isinstance(spec, type)


def calibrated(folder, name):
    """Path of the calibrated settings in a checkpoint's folder for a method of METHODS, or None (tools/calibrate.py).

    The first file that exists of NAME.json, OLD_NAME.json (see ALIASES), and NAME.json of each method in its FAMILY.
    """
    if folder is None or name not in METHODS:
        return None
    former = [old for old, new in ALIASES.items() if new == name]
    paths = [Path(folder) / f"{n}.json" for n in (name, *former, *FAMILY.get(name, ()))]
    return next((path for path in paths if path.is_file()), None)


def named(spec):
    """spec -> (method name; its function or class, or the Method, or None; ["key=value", ...]). Raises ValueError."""
    if spec is None:
        return "none", None, []
    if isinstance(spec, Method):
        return spec.name, spec, []
    if not isinstance(spec, str):
        rule = spec.func if isinstance(spec, partial) else spec
        kind = rule if _takes_settings(rule) else type(rule)
        if kind.__module__ == "builtins" or not (kind is rule or stages(rule)):
            found = type(spec).__name__
            raise ValueError(f"a {found} is no pruning method; give a name, SPEC, function, class, instance or Method")
        return next((name for name, known in METHODS.items() if known is kind), kind.__name__), spec, []
    name, pairs = _split(spec)
    name = ALIASES.get(name, name)
    if "+" in name and "::" not in name:
        raise ValueError(f"{name!r} combines methods, which is not supported; give one")
    return name, _find(name), pairs


def _add(given, more):
    """Add settings to a dict; ValueError if one is already in it."""
    for key, value in more.items():
        if key in given:
            raise ValueError(f"{key} is given twice, as {given[key]!r} and {value!r}; give it once")
        given[key] = value


def _check_budget(name, values):
    """ValueError if a given setting makes another given one ineffective."""
    for a, b in _silenced(name, values):
        raise ValueError(f"{a} and {b} are both given, but {b} has no effect with {a}; give one of them")
    if values.get("query") == "lookahead" and values.get("window") is not None:
        raise ValueError("window counts the prompt's rows, but query is lookahead; give one of them")


def _silenced(name, values):
    """Pairs (a, b) of given settings where a makes b ineffective."""
    given = {key for key, value in values.items() if value is not None}
    pairs = [(a, b) for a, silent in SILENCED.items() for b in silent if name in METHODS or b == "keep_tokens"]
    return [(a, b) for a, b in pairs if a in given and b in given]


def _instead(own, given):
    """A checkpoint's own settings, overridden by given ones; a given budget or window also removes conflicting ones."""
    budgets = [key for key in AMOUNTS if given.get(key) is not None]
    if "window" in given:  # then tokens are ranked by the prompt's rows instead of the look-ahead rows
        own = {key: value for key, value in own.items() if key != "query"}
    return {key: value for key, value in own.items() if key not in AMOUNTS or key == "r" or not budgets} | given


def sets_budget(spec):
    """True if a SPEC sets its own budget, or if its method has no setting `retention`."""
    _, function, pairs = named(spec)
    return function is None or "retention" not in settings_of(function) or any(_pair(p)[0] in AMOUNTS for p in pairs)


def amounts(method):
    """The settings by which a Method determines how much is kept: ["retention=0.5"]."""
    return [pair for pair in _split(method.spec)[1] if _pair(pair)[0] in AMOUNTS]


def without_amounts(method):
    """The SPEC of a Method without the settings that determine how much is kept."""
    name, pairs = _split(method.spec)
    rest = [pair for pair in pairs if _pair(pair)[0] not in AMOUNTS]
    return name + (":" if rest else "") + ",".join(rest)


def _split(spec):
    """SPEC -> (METHOD, ["key=value", ...]). Does not split at the "::" of FILE.py::NAME or at commas in brackets."""
    file, twice, rest = spec.rpartition("::")
    method, colon, text = rest.partition(":")
    pairs, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth <= 0:
            pairs.append("")
        else:
            pairs[-1] += letter
    return file + twice + method, pairs if colon else []


def _pair(text):
    """ "key=value" -> (key, value). The value is parsed as JSON; if that fails, it remains a string."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"setting {text!r} is not KEY=VALUE; give for example retention=0.5")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _read(path):
    try:
        settings = json.loads(Path(path).read_bytes())  # any UTF, with or without byte-order mark
    except (OSError, ValueError, RecursionError) as broken:
        raise ValueError(f"cannot read settings from {path} ({broken}); give a JSON object") from None
    if not isinstance(settings, dict):
        raise ValueError(f'{path} is not a JSON object; write {{"key": value}} into it')
    return settings


def _find(name):
    """The function or class that a NAME or FILE.py::NAME refers to, None for "none". Raises ValueError."""
    if "::" not in name:
        if name.endswith(".py"):
            own = ", ".join(_own_names(_import(name))) or "no function"
            raise ValueError(f"{name} is a file; write {name}::NAME (it has {own})")
        if name not in METHODS:
            first, *more = name.split() or [""]
            if more and first in METHODS:
                raise ValueError(f"{name[:80]!r} has spaces; settings follow a colon, as in {first}:retention=0.5")
            near = _near(name, METHODS)
            raise ValueError(f"there is no method {name[:80]!r}; {near}use {', '.join(METHODS)} or FILE.py::NAME")
        return METHODS[name]
    path, _, attribute = name.rpartition("::")
    module = _import(path)
    function = getattr(module, attribute, None)
    if not callable(function) and not stages(function):
        own = _own_names(module)
        raise ValueError(
            f"{path} has no function {attribute!r}; {_near(attribute, own)}it has {', '.join(own) or 'none'}"
        )
    return function


def _import(path):
    """The module of a user's file, which may import modules beside it. ValueError if that fails."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path!r}; give FILE.py::NAME")
    found = importlib.util.spec_from_file_location("pruning_method", path)
    if found is None:
        raise ValueError(f"{path!r} is not a Python file; give FILE.py::NAME")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look up postponed annotations there
    beside = [folder for folder in [str(Path(path).resolve().parent)] if folder not in sys.path]
    sys.path.extend(beside)  # last, so that no file beside it replaces an installed module
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as broken:
        copied = "relative import" in str(broken)
        cure = "write `from model.pruning.budget import ...`, with no dot" if copied else "fix it"
        raise ValueError(f"{path} cannot be imported ({type(broken).__name__}: {broken}); {cure}") from broken
    finally:
        sys.path[:] = [folder for folder in sys.path if folder not in beside]
    return module


def _own_names(module):
    """The names of the functions and classes that a user's file defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return [name for name in own if not name.startswith("_")]


def _near(name, known):
    """The hint "did you mean NAME? " if a known name is similar, else an empty string."""
    written = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), written, 1, 0.8)  # a lower cutoff suggests none for nope
    return f"did you mean {written[near[0]]}? " if near else ""


def settings_of(function):
    """{setting: default} of a method's function or class, without GUARDS. ValueError if its settings are not clear."""
    by_name, places = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = list(inspect.signature(function).parameters.values())
    title = getattr(function, "__name__", "the method")
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise ValueError(f"{title} takes settings of any name; name each, such as *, window=1")
    if isinstance(function, type):
        return {p.name: p.default for p in parameters if p.kind in (by_name, places)}  # every field of a dataclass
    taken = [p.name for p in parameters if p.kind is places]
    if len(taken) > 1:
        raise ValueError(
            f"{title} takes {', '.join(taken)}, but a method is called with one argument, the view; "
            f"put *, before {taken[1]} if the others are settings, else get their values from the view"
        )
    return {p.name: p.default for p in parameters if p.kind is by_name}


def _complete(name, function, given):
    """All settings of a method: the given ones, and defaults for the others."""
    defaults = GUARDS | settings_of(function)
    unknown = [key for key in given if key not in defaults]
    if unknown:
        near = _near(unknown[0], defaults)
        raise ValueError(f"method {name} has no setting {unknown[0]!r}; {near}it has {', '.join(defaults)}")
    missing = [key for key, value in defaults.items() if value is inspect.Parameter.empty and key not in given]
    if missing:
        raise ValueError(f"method {name} needs {missing[0]}; give the setting {missing[0]}=VALUE")
    settings = {}
    for key, value in (defaults | given).items():
        settings[key] = _like(name, key, value, defaults[key])
    _check_common(name, settings)
    return settings


def _like(name, key, value, default):
    """value in the type of the default, or ValueError if it has another type. A default of None accepts any type."""
    if default is None or default is inspect.Parameter.empty or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    wanted = COMMON[key][1] if key in COMMON else kinds.get(type(default), f"a {type(default).__name__}")
    raise ValueError(f"{key} of method {name} is {value!r}; give {wanted}")


def _check_common(name, settings):
    """ValueError if a setting of COMMON has a value outside its range."""
    for key, (_, values, fits) in COMMON.items():
        unset = key not in settings or (settings[key] is None and key in AMOUNTS)
        if not unset and not fits(settings[key]):
            own = "" if name in METHODS else f" (or rename it: {', '.join(COMMON)} mean the same in every method)"
            raise ValueError(f"{key} of method {name} is {settings[key]!r}; give {values}{own}")
