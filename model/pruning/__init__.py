"""The pruning methods, and how to name one.

A method is called once per layer, after its prefill attention: method(layer, scores, layout) -> keep (Hkv, T) bool.
It is either a function whose further keyword arguments are its settings, or a frozen dataclass with a `__call__`, whose
fields are (its `__post_init__` may refuse them with a ValueError). If it has a setting called `window`, scores are fp32
(Hq, T), the attention of each query head, averaged over the last `window` rows of the prompt; otherwise None. layout
says where the pictures are (`model.generate.Layout`). A new method is one file here and one row below.
"""

import importlib.util
import inspect
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .plphp import Plphp, PlphpAda
from .random_tokens import random_tokens

METHODS = {"none": None, "plphp": Plphp, "plphp-ada": PlphpAda, "random": random_tokens}


@dataclass(frozen=True)
class Method:
    """A method with its settings. choose: (layer, scores (Hq, T) fp32 or None, layout) -> keep (Hkv, T) bool."""

    name: str
    choose: object
    settings: dict

    @property
    def window(self):
        """Rows of the prompt's end whose attention the method wants to see."""
        return self.settings.get("window", 0)


def make_method(spec, retention=None, keep_tokens=None, settings=()):
    """The Method of a SPEC, or None for "none".

    spec: NAME or FILE.py::NAME, then optionally ":" and key=value pairs with commas between them; settings: more such
    pairs, or "@file.json" with an object of them, which win over the spec's. retention, keep_tokens: the budget, for
    methods that have a setting of that name. ValueError says what is wrong.
    """
    name, pairs = _split(spec)
    if "+" in name and "::" not in name:
        raise ValueError(f"{name!r} combines methods, but all that exist choose at the same place; give one")
    function = _find(name)
    given = dict(_pair(p) for p in pairs)
    for text in settings:
        given |= _read(text[1:]) if text.startswith("@") else dict([_pair(text)])
    given |= {k: v for k, v in (("retention", retention), ("keep_tokens", keep_tokens)) if v is not None}
    if given.get("retention") is not None and given.get("keep_tokens") is not None:
        raise ValueError("retention and keep_tokens are both given; give one of them")
    if function is None:
        if given:
            raise ValueError(f"method none has no settings, {', '.join(given)} was given; give --prune METHOD")
        return None
    settings = _complete(name, function, given)
    return Method(name, function(**settings) if isinstance(function, type) else partial(function, **settings), settings)


def _split(spec):
    """SPEC -> (METHOD, ["key=value", ...]). The "::" of FILE.py::NAME is no separator."""
    file, twice, rest = spec.rpartition("::")
    method, colon, pairs = rest.partition(":")
    return file + twice + method, pairs.split(",") if colon else []


def _pair(text):
    """ "key=value" -> (key, value); numbers, true, false and null as JSON has them, all else is text."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"setting {text!r} is not KEY=VALUE; give for example retention=0.5")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _read(path):
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as broken:
        raise ValueError(f"cannot read settings from {path} ({broken}); give a JSON object") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no JSON object; write {{'key': value}} into it")
    return settings


def _find(name):
    """The function of a METHOD."""
    if "::" not in name:
        if name not in METHODS:
            raise ValueError(f"there is no method {name!r}; use {', '.join(METHODS)} or FILE.py::NAME")
        return METHODS[name]
    path, _, attribute = name.rpartition("::")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path!r}; give FILE.py::NAME")
    found = importlib.util.spec_from_file_location("pruning_method", path)
    if found is None:
        raise ValueError(f"{path!r} is no Python file; give FILE.py::NAME")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as broken:
        raise ValueError(f"{path} cannot be imported ({type(broken).__name__}: {broken}); mend it") from broken
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{path} has no function {attribute!r}; give FILE.py::NAME")
    return function


def _complete(name, function, given):
    """All settings of a function: its defaults, and what was given in their place."""
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown = [key for key in given if key not in defaults]
    if unknown:
        raise ValueError(f"method {name} has no setting {unknown[0]!r}; it has {', '.join(defaults) or 'none'}")
    missing = [key for key, value in defaults.items() if value is inspect.Parameter.empty and key not in given]
    if missing:
        raise ValueError(f"method {name} needs {missing[0]}; give --set {missing[0]}=VALUE")
    settings = {}
    for key, value in (defaults | given).items():
        settings[key] = _like(name, key, value, defaults[key])
    _check_budget(name, settings)
    return settings


def _like(name, key, value, default):
    """value as the type of the default; ValueError if it is none such. A default of None takes anything."""
    if default is None or default is inspect.Parameter.empty or type(value) is type(default):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    raise ValueError(f"setting {key} of method {name} is {value!r}; give {type(default).__name__}")


def _check_budget(name, settings):
    retention, keep_tokens = settings.get("retention"), settings.get("keep_tokens")
    if retention is not None and not (isinstance(retention, float) and 0 < retention <= 1):
        raise ValueError(f"retention of method {name} is {retention!r}; give a fraction above 0 and up to 1")
    if keep_tokens is not None and (type(keep_tokens) is not int or keep_tokens < 1):
        raise ValueError(f"keep_tokens of method {name} is {keep_tokens!r}; give a whole number from 1 on")
    if type(settings.get("window", 0)) is not int or settings.get("window", 0) < 0:
        raise ValueError(f"window of method {name} is {settings['window']!r}; give a number of rows from 0 on")
