"""The pruning methods, and how to name one.

A method is one small file here and one row of METHODS: a function keep(view, *, SETTING=DEFAULT, ...), or a frozen
dataclass whose fields are its settings (`__post_init__` may raise a ValueError). A value must have the annotated type,
or that of the default. The docstring begins with one sentence and has a line `name: meaning (range)` for each setting
that is not in COMMON; `run.py --list-methods` prints them. A class implements at least one of these stages, a function
the first:

    keep(view)      after a layer's attention: the tokens whose K and V each KV head keeps, (Hkv, T) bool, or None for
                    all. Hidden states do not change
    narrow(view)    after a layer: the tokens that later layers process, (T,) bool, or None for all; or (T,) int64, for
                    each token its own index if it stays, the index of the token into which it is averaged, or -1
    attend(view)    before a layer's attention: the tokens that take part in it, (T,) bool, or None for all. The others
                    are seen by no token, and their attention is 0; they go on through the layer's other parts. Or a
                    `Looking`: what heads and vision tokens see, and the part of the MLP that vision tokens use
    compact(prefilled)   after the prefill: what each layer goes on holding, a list of (T,) or (Hkv, T) bool over the
                    prompt's tokens, or None for all
    evict(view)     after keep: scores (Hkv, T) fp32 of the tokens, or None for infinite ones. While the answer grows,
                    what its tokens attend to is added, and the token with the lowest score gives its slot to the next
                    one. Attributes: `newest`, the share of these slots that is for the newest tokens, and
                    `extra_tokens`, slots of each head beside those of the tokens that it kept
    pick(picture)   before the language model: indices (P',) int64, ascending, of the patch tokens that it gets, or a
                    matrix (P', P) or (P', P + n) of floats that makes P' new tokens from the features of the P tokens
                    (and of the CLS tokens of the n squares), or None for all
    merge(patches)  inside the vision tower, after its layer `merge_after` (an attribute, counted from 0): a matrix
                    (n, P', S * S) of floats that makes P' tokens from the patches (n, S, S, C) of each square, or None

view: a `model.view.View` of the layer; prefilled: a `model.view.Prefilled`; picture: a `model.picture.PictureView`. The
method takes from them what it
needs. Text is always kept. A class may also have

    check(num_layers, kv_heads)   raises a ValueError for an unsuitable model
    layers(num_layers)            with pick or merge: the layers of the vision tower, counted from 0, whose attention or
                                  keys it asks for
    protect(picture)              with pick or merge: the tokens that later stages may not drop, (P,) bool, or None
    needs_cls                     an attribute, with pick or merge: True if it asks for the CLS token of the tower

A composition A+B is a method with `pick` or `merge`, then one with `keep` or `narrow`.

The look-ahead rows are computed only for a method whose setting query is "lookahead".
"""

import importlib.util
import inspect
import json
import re
import sys
import traceback
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Protocol, Union, get_args, get_origin, get_type_hints

import torch

from .budget import best, by_kv_head
from .composed import Composition
from .divprune import DivPrune
from .downsample import Downsample
from .fastv import FastV
from .fopru import FoPru
from .grid import grid_tokens
from .gsearch import GSearch
from .h2o import H2O
from .hired import Hired
from .mustdrop import MustDrop
from .mustdrop1 import MustDrop1
from .objects import Objects
from .pick_grid import PickGrid
from .pick_random import PickRandom
from .plphp import Plphp, PlphpAda
from .pyramiddrop import PyramidDrop
from .random_tokens import Random
from .shared import shared_tokens
from .snapkv import AdaKV, SnapKV
from .sparsevlm import SparseVLM
from .topk import TopK
from .visionzip import VisionZip
from .vtc_cls import VtcCls
from .yopo import Looking, Yopo
from .zipvl import ZipVL

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
    "g-search": GSearch,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "zipvl": ZipVL,
    "yopo": Yopo,
    "h2o": H2O,
    "hired": Hired,
    "vtc-cls": VtcCls,
    "fopru": FoPru,
    "visionzip": VisionZip,
    "mustdrop1": MustDrop1,
    "mustdrop": MustDrop,
    "divprune": DivPrune,
    "pick-grid": PickGrid,
    "pick-random": PickRandom,
    "downsample": Downsample,
}

ALIASES = {"uniform": "topk"}  # former name of a method -> its name

FAMILY = {"plphp-ada": ("plphp",)}  # method -> methods whose calibrated settings it uses if it has none of its own
AMOUNTS = (  # settings that say how much is kept
    "retention", "keep_tokens", "r", "mass", "rates", "ratios", "schedule", "threshold", "tau",
)  # fmt: skip
SIGMOID = "lo", "hi", "steepness"  # settings of g-search without a schedule
SILENCED = {  # setting -> settings that have no effect beside it
    "retention": ("keep_tokens", "r", "mass", "rates", "ratios", "schedule", "threshold", "tau"),
    "keep_tokens": ("r", "dr", "alpha", "beta", "mass", "rates", "threshold", "tau"),
    "mass": ("rates",),
    "schedule": SIGMOID,
    "query": ("window",),  # but not beside query=last
}

STAGES = {  # name of a stage -> what it sees
    "keep": "view", "narrow": "view", "attend": "view", "compact": "prefilled", "evict": "view",
    "pick": "picture", "merge": "patches", "protect": "picture",
}  # fmt: skip
EARLY = {"pick", "merge"}  # stages before the language model
LATE = {"keep", "narrow", "attend", "compact", "evict"}  # stages in it

GUARDS = {"sink": 0, "recent": 0, "sink_keys": 0}  # settings of every method with keep or narrow
PLACING = {"positions": "contiguous"}  # of every method with pick or merge


def _among(*names):
    return " or ".join(names), lambda v: v in names


# Values that a setting may have: (description, function value -> bool)
COUNT = "a whole number of 0 or more", lambda v: type(v) is int and v >= 0
FRACTION = "a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1
SOME = "a number above 0 and up to 1", lambda v: FRACTION[1](v) and v > 0
ONE = "a whole number of 1 or more", lambda v: COUNT[1](v) and v > 0
SWITCH = "true or false", lambda v: type(v) is bool
KINDS = {  # for settings that are not in COMMON
    int: "a whole number", float: "a number", bool: SWITCH[0], str: "text", list: "a list", dict: "an object",
    NoneType: "null",
}  # fmt: skip

# Settings with the same meaning in every method that has them: meaning, values
COMMON = {
    "retention": ("fraction of the vision tokens to keep", *SOME),
    "keep_tokens": ("tokens that each head keeps of each picture; replaces retention", *ONE),
    "window": ("last prompt rows whose mean attention ranks the tokens", *ONE),
    "query": ("rank by the attention of the last prompt rows or of look-ahead rows", *_among("last", "lookahead")),
    "values": ("rank by attention times the L1 norm of the token's value vector, as in 2406.12335", *SWITCH),
    "group": ("how query heads that share a KV head are combined", *_among("mean", "max")),
    "scope": (
        "one budget for each picture, one for each part of it (the whole picture, its tiles), or one for all pictures",
        *_among("image", "part", "vision"),
    ),
    "cover": ("share of each head's tokens taken from an even grid instead of by score", *FRACTION),
    "sink": ("first tokens of the prompt that no head may drop", *COUNT),
    "recent": ("last tokens of the prompt that no head may drop", *COUNT),
    "sink_keys": ("tokens that a head may not drop: those that its last 32 prompt rows attend to most", *COUNT),
    "positions": (
        "rotary positions of the tokens: contiguous, as in the originals, or those of the whole prompt",
        *_among("contiguous", "original"),
    ),
}


class Narrowing(Protocol):
    """An object that implements the second stage, such as a `FastV`."""

    def narrow(self, view: object) -> torch.Tensor | None: ...


class Picking(Protocol):
    """An object that implements the third stage, such as a `PickGrid`."""

    def pick(self, picture: object) -> torch.Tensor | None: ...


class MethodError(RuntimeError):
    """A method's own code raised an exception. The message is one line with the method's name and the line number."""


@dataclass(frozen=True)
class Method:
    """A method with its settings, and the code shared by all methods. rule: the function or object of its file."""

    name: str
    rule: object
    settings: dict

    @property
    def effective(self):
        """The settings that have an effect."""
        given = {k: v for k, v in self.settings.items() if v is not None and v != (GUARDS | PLACING).get(k)}
        if "keep_tokens" in given:
            given.pop("retention", None)  # the default, which keep_tokens replaces
        silent = {b for _, b in _silenced(self.name, given)}
        return {k: v for k, v in given.items() if k not in silent}

    @property
    def spec(self):
        """The SPEC with every effective setting: `--prune SPEC` gives this same method with any checkpoint."""
        pairs = ",".join(f"{k}={v if type(v) is str else json.dumps(v)}" for k, v in self.effective.items())
        return self.name + (":" if pairs else "") + pairs

    @property
    def looks_ahead(self):
        """True if the scores are the attention of the look-ahead rows."""
        return self.settings.get("query") == "lookahead"

    @property
    def narrows(self):
        """True if the method changes hidden states too, so that the first new token may differ."""
        return self.picks or self.attends or "narrow" in stages(self.rule)

    @property
    def attends(self):
        """True if not all tokens take part in the attention of the prefill: a stage `attend`."""
        return "attend" in stages(self.rule)

    @property
    def compacts(self):
        """True if layers give up tokens after the prefill: a stage `compact`."""
        return "compact" in stages(self.rule)

    @property
    def evicts(self):
        """True if heads give up tokens while the answer grows: a stage `evict`."""
        return "evict" in stages(self.rule)

    @property
    def newest(self):
        """Share of the slots for which tokens compete that the newest have for themselves; with a stage `evict`."""
        return self.rule.newest

    @property
    def extra_tokens(self):
        """Slots of each head beside those of the tokens that it kept; with a stage `evict`."""
        return self.rule.extra_tokens

    @property
    def picks(self):
        """True if the language model gets fewer or other vision tokens: a stage `pick` or `merge`."""
        return not EARLY.isdisjoint(stages(self.rule))

    @property
    def moves(self):
        """True if the tokens after a picture move to the positions of those that were dropped before the model."""
        return self.settings.get("positions") == "contiguous"

    @property
    def needs_cls(self):
        """True if the method asks for the CLS token of the vision tower."""
        return getattr(self.rule, "needs_cls", False)

    @property
    def merge_after(self):
        """The layer of the vision tower after which `merge` is called, None without that stage."""
        return self.rule.merge_after if "merge" in stages(self.rule) else None

    def check(self, num_layers, kv_heads):
        """ValueError if the method does not fit the model."""
        if hasattr(self.rule, "check"):
            self.rule.check(num_layers, kv_heads)

    @property
    def parts(self):
        """The methods that this one consists of; see `Composition`."""
        return (self,)

    @property
    def fraction(self):
        """The setting retention, None if there is none or keep_tokens replaces it."""
        return self.settings.get("retention") if self.settings.get("keep_tokens") is None else None

    def requested(self, tokens, parts=None):
        """`wanted` of each of the parts."""
        return [self.wanted(tokens, parts)]

    def shares(self, picked, kept):
        """What each of the parts kept. picked: fraction of the vision tokens that the language model got; kept:
        fraction of all (head, vision token) pairs."""
        return [kept]

    def wanted(self, tokens, parts=None):
        """The requested fraction of the vision tokens, or None if no setting gives one. tokens: count per picture;
        parts: count per part of a picture, the same if None."""
        count, retention = self.settings.get("keep_tokens"), self.settings.get("retention")
        if count is None or not sum(tokens):
            return retention
        pots = {"vision": [sum(tokens)], "part": parts or tokens}.get(self.settings.get("scope"), tokens)
        return sum(min(count, n) for n in pots) / sum(tokens)

    def keep(self, view):
        """-> the tokens that each head keeps, (Hkv, T) bool, or None for all. ValueError for anything else."""
        return self._ask("keep", view, (view.kv_heads, view.tokens))

    def narrow(self, view):
        """-> the tokens that later layers process, (T,) bool, or None for all; or (T,) int64, for each token its own
        index if it stays, that of the token into which it is averaged, or -1. ValueError for anything else.

        The last token stays, because it predicts the answer.
        """
        chosen = self._tensor("narrow", view, (view.tokens,), f" in layer {view.layer}", (torch.bool, torch.int64))
        if chosen is None:
            return None
        fixed = self._guarded(view, 1)
        fixed[-1] = True
        if chosen.dtype == torch.bool:
            return chosen | fixed
        owner = torch.where(fixed, torch.arange(view.tokens, device=view.device), chosen)
        outside = (owner < -1) | (owner >= view.tokens)
        if outside.any() or (owner[owner.clamp(min=0)] != owner)[owner >= 0].any():
            raise ValueError(
                f"{titled(self.name)} averages a token of layer {view.layer} into one that does not stay; return the "
                "index of a token that owns itself, or -1"
            )
        return owner

    def attend(self, view):
        """-> the tokens that take part in a layer's attention, (T,) bool, or a Looking, or None for all. ValueError
        otherwise.

        The last token takes part, because it predicts the answer.
        """
        chosen = self._tensor("attend", view, (view.tokens,), f" in layer {view.layer}", other=Looking)
        if isinstance(chosen, Looking):
            shape = (view.kv_heads,)
            if (chosen.heads.dtype, tuple(chosen.heads.shape)) != (torch.bool, shape):
                raise ValueError(f"{titled(self.name)} returned heads {_shown(chosen.heads)}; give torch.bool {shape}")
            return chosen
        if chosen is not None:
            chosen = chosen | self._guarded(view, 1)
            chosen[-1] = True
        return None if chosen is None or chosen.all() else chosen

    def evict(self, view):
        """-> the tokens' scores, (Hkv, T) fp32, infinite for those that are never evicted: text, and those that the
        settings protect. ValueError for anything else, and for NaN."""
        shape = view.kv_heads, view.tokens
        scores = self._tensor("evict", view, shape, f" in layer {view.layer}", (torch.float32,))
        scores = torch.full(shape, float("inf"), device=view.device) if scores is None else scores
        if scores.isnan().any():
            raise ValueError(f"{titled(self.name)} returned NaN from evict in layer {view.layer}; return sums")
        return scores.masked_fill(self._guarded(view, 2), float("inf"))

    def compact(self, prefilled):
        """-> for each layer the tokens that its heads go on holding, (Hkv, T) bool, or None for all. ValueError."""
        found, count = self._call("compact", prefilled), len(prefilled.kept)
        if not isinstance(found, list) or len(found) != count:
            raise ValueError(f"{titled(self.name)} returned {_shown(found)} from compact; return a list of {count}")
        shape = prefilled.kv_heads, prefilled.tokens
        for layer, keep in enumerate(found):
            fine = isinstance(keep, torch.Tensor) and keep.dtype == torch.bool and keep.shape in (shape, shape[1:])
            if not (keep is None or fine):
                raise ValueError(
                    f"{titled(self.name)} returned {_shown(keep)} for layer {layer}; return torch.bool {shape}"
                )
        pairs = zip(found, prefilled.guarded, strict=True)
        return [None if keep is None else keep.to(guarded.device).expand(shape) | guarded for keep, guarded in pairs]

    def guarded(self, view):
        """-> (Hkv, T) bool: the tokens that `compact` may not drop in a layer."""
        return self._guarded(view, 2).expand(view.kv_heads, -1)

    def layers(self, num_layers):
        """The layers of a vision tower that the stages before the language model ask for, ascending. ValueError."""
        asked = self._call("layers", num_layers, getattr(self.rule, "layers", None)) or ()
        if not isinstance(asked, list | tuple | range):
            raise ValueError(f"layers returned {_shown(asked)}; return a list of layers of the vision tower")
        for layer in asked:
            if type(layer) is not int or not 0 <= layer < num_layers:
                raise ValueError(f"layers names layer {layer!r} of the vision tower; give 0 to {num_layers - 1}")
        return sorted({*asked})

    def pick(self, picture):
        """-> indices (P',) int64, matrix (P', P) or (P', P + n) fp32, or None for all tokens. ValueError otherwise."""
        chosen = self._call("pick", picture)
        if chosen is None:
            return None
        if isinstance(chosen, torch.Tensor) and chosen.dtype == torch.int64 and chosen.ndim == 1:
            return self._checked_indices(chosen.to(picture.device), picture.tokens)
        widths = picture.tokens, picture.tokens + picture.squares
        wanted = f"int64 indices (P',), or floats (P', {widths[0]}) or (P', {widths[1]})"
        return self._checked_matrix("pick", chosen, 2, widths, wanted).to(picture.device)

    def merge(self, patches):
        """patches (n, S, S, C) -> matrix (n, P', S * S) fp32, or None for all patches. ValueError otherwise."""
        count, side = patches.shape[:2]
        chosen = self._call("merge", patches)
        if chosen is None:
            return None
        matrix = self._checked_matrix("merge", chosen, 3, (side**2,), f"floats ({count}, P', {side**2})")
        if len(matrix) != count:
            raise ValueError(f"{titled(self.name)} merged {len(matrix)} squares of {count}; return a matrix for each")
        return matrix.to(patches.device)

    def protect(self, picture):
        """-> the tokens that later stages may not drop, (P,) bool, or None. ValueError for anything else."""
        return self._tensor("protect", picture, (picture.tokens,), "")

    def _checked_indices(self, chosen, tokens):
        """Indices in a valid order, or None if they are all."""
        if not len(chosen):
            raise ValueError(f"{titled(self.name)} picked no token; return at least one index")
        if (chosen.diff() <= 0).any() or chosen[0] < 0 or chosen[-1] >= tokens:
            raise ValueError(
                f"{titled(self.name)} picked indices that are not ascending, unique and below {tokens}; sort them"
            )
        return None if len(chosen) == tokens else chosen

    def _checked_matrix(self, stage, chosen, dims, widths, wanted):
        """A matrix of floats as fp32; its last dimension is one of widths."""
        fine = isinstance(chosen, torch.Tensor) and chosen.is_floating_point() and chosen.ndim == dims
        if not fine or chosen.shape[-1] not in widths or not chosen.numel():
            raise ValueError(f"{titled(self.name)} returned {_shown(chosen)} from {stage}; return {wanted}")
        if not chosen.isfinite().all() or not chosen.any(-1).all():
            raise ValueError(f"{titled(self.name)} returned NaN, infinity or a row of zeros from {stage}; return sums")
        return chosen.float()

    def _ask(self, stage, view, shape):
        """The tokens that a stage of the rule keeps, plus text and guards; None if it has no such stage."""
        keep = self._tensor(stage, view, shape, f" in layer {view.layer}")
        return None if keep is None else keep | self._guarded(view, keep.ndim)

    def _tensor(self, stage, view, shape, where, dtypes=(torch.bool,), other=()):
        """What a stage returns, a tensor of this shape, an instance of the class `other`, or None. ValueError for
        anything else."""
        keep = self._call(stage, view)
        if keep is None or isinstance(keep, other):
            return keep
        found, wanted = _shown(keep), [f"{dtype} {shape} on {view.device}" for dtype in dtypes]
        if isinstance(keep, torch.Tensor):
            keep = keep if keep.is_meta else keep.to(view.device)
            found = _shown(keep)
        if found not in wanted:
            raise ValueError(f"{titled(self.name)} returned {found}{where}; return {wanted[0]}")
        return keep

    def _call(self, stage, seen, function=None):
        """What a stage of the rule returns; None if it has no such stage. Exceptions are raised as MethodError, except
        a ValueError from a method of METHODS."""
        function = function or stages(self.rule).get(stage)
        try:
            return function and function(seen)
        except Exception as wrong:
            if isinstance(wrong, MemoryError) or (isinstance(wrong, ValueError) and self.name in METHODS):
                raise  # its message is one line
            raise MethodError(f"{titled(self.name)}: {_what(self.rule, wrong)}") from wrong

    def _guarded(self, view, dims):
        """(T,) or (Hkv, T) bool: tokens that a stage may not drop: text, and those that the settings GUARDS protect."""
        sink, recent, keys = (self.settings.get(name, 0) for name in GUARDS)
        mask = view.text.clone()
        mask[:sink] = True
        mask[max(0, view.tokens - recent) :] = True
        if view.protected is not None:
            mask |= view.protected
        if not keys:
            return mask
        # heads that need no token attend to such keys; without these, they would attend to other tokens
        attended = best(by_kv_head(view.attention(rows=32), view.kv_heads), keys)
        return mask | (attended if dims == 2 else attended.any(0))


def titled(name):
    """A method in an error message: "method topk"; a lambda has no name."""
    return "the method" if name == "<lambda>" else f"method {name}"


def _shown(value):
    """A returned value in an error message: its type, or dtype, shape and device."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)} on {value.device}"


def _what(rule, wrong):
    """ "TYPE in line N: WORDS" of an exception; N is the last line of the rule's file that it passed through."""
    functions = [inspect.unwrap(getattr(stage, "func", stage)) for stage in stages(rule).values()]
    files = {function.__code__.co_filename for function in functions if hasattr(function, "__code__")}
    steps = traceback.walk_tb(wrong.__traceback__)
    lines = [f" in line {line}" for frame, line in steps if frame.f_code.co_filename in files]
    return f"{type(wrong).__name__}{lines[-1] if lines else ''}: {' '.join(str(wrong).split())}"


def make_method(spec, retention=None, keep_tokens=None, settings=(), folder=None):
    """The Method of a SPEC, the Composition of one with a "+", or None for "none".

    spec: NAME or FILE.py::NAME, optionally followed by ":" and comma-separated key=value pairs, or two of these with
    "+" between them; a function or class, or a `functools.partial` of one; an instance of a class; a Method or
    Composition; or None. settings: a dict, or a list of "key=value" and "@FILE.json" (a JSON object); in a composition
    the keys are NAME.KEY. retention, keep_tokens: the budget, for methods with a setting of that name; the retention of
    a composition is that of both together. folder: of a checkpoint; its NAME.json, if there is one (see `calibrated`),
    replaces the method's defaults.
    ValueError for invalid input, including a setting that is given twice or together with one that makes it
    ineffective.
    """
    parts = parts_of(spec)
    if len(parts) > 1:
        return _compose(parts, retention, keep_tokens, _gathered(settings), folder)
    name, rule, given = named(spec)
    _add(given, _gathered(settings))
    _add(given, {k: v for k, v in (("retention", retention), ("keep_tokens", keep_tokens)) if v is not None})
    if _takes_settings(rule):
        rule, settings = _with_settings(name, rule, given, folder)
    elif given:
        why = f"method {name} already has its settings; give its name or class"
        if spec is None:
            why = 'prune is missing; give a method, such as prune="plphp"'
        elif rule is None:
            why = f"method {name} takes no settings; give a method by name"
        raise ValueError(f"{', '.join(given)} was given, but {why}")
    elif rule is None or isinstance(rule, Method | Composition):
        return rule
    else:  # an instance of a class
        own = {key: getattr(rule, key) for key in inspect.signature(type(rule)).parameters if hasattr(rule, key)}
        settings = guards_of(rule) | {key: _checked(name, key, value, value, None) for key, value in own.items()}
    _check_stages(name, rule)
    return Method(name, rule, settings)


def _gathered(settings):
    """Settings as in `make_method` -> a dict."""
    if not isinstance(settings, dict | list | tuple) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"the settings are {str(settings)[:80]!r}; give a dict, such as {{'window': 4}}")
    given = {}
    for more in [settings] if isinstance(settings, dict) else map(_parsed, settings):
        _add(given, more)
    return given


def _compose(specs, retention, keep_tokens, settings, folder):
    """The Composition of two SPECs. settings: {"NAME.KEY": value}. ValueError if they cannot be combined."""
    _check_parts(specs)
    names = [named(spec)[0] for spec in specs]
    short, whole = [name.rpartition("::")[2] for name in names], "+".join(names)
    given = [{}, {}]
    for key, value in settings.items():
        part, _, own = key.rpartition(".")
        part = ALIASES.get(part, part)
        if part not in (*names, *short):
            raise ValueError(f"{key} is no setting of a part of {whole}; write {short[0]}.{own} or {short[1]}.{own}")
        given[0 if part in (names[0], short[0]) else 1][own] = value
    if keep_tokens is not None:
        keys = " or ".join(f"{name}.keep_tokens={keep_tokens}" for name in short)
        raise ValueError(f"keep_tokens is given for {whole}, which has two numbers of tokens; give the setting {keys}")
    first = make_method(specs[0], settings=given[0], folder=folder)
    if retention is not None:
        share, key = first.fraction, f"{short[0]}.retention"
        if share is None:
            raise ValueError(
                f"a retention of {whole} needs a fraction of {names[0]}; give settings for each part instead"
            )
        if retention > share:
            raise ValueError(
                f"{whole} keeps at most {share:g}, the retention of {names[0]}, instead of {retention:g}; give the "
                f"setting {key}={retention:g} or more"
            )
        retention = round(retention / share, 12)
    return Composition(first, make_method(specs[1], retention, settings=given[1], folder=folder))


def _check_parts(specs):
    """ValueError unless the SPECs are a method before the language model and one in it."""
    order = "write A+B, where A picks tokens before the language model (pick-grid) and B prunes in it (plphp)"
    if len(specs) > 2:
        raise ValueError(f"{'+'.join(specs)} combines {len(specs)} methods; {order}")
    early = []
    for spec in specs:
        name, rule, _ = named(spec)
        if rule is None:
            raise ValueError(f"none keeps everything, so nothing can be combined with it; {order}")
        found = {stage in EARLY for stage in stages(rule) if stage != "protect"}
        if len(found) > 1:
            raise ValueError(f"{titled(name)} acts before the language model and in it; use it alone")
        early += found
    if early == [False, True]:
        raise ValueError(f"{specs[1]} acts before the language model and comes first; write {specs[1]}+{specs[0]}")
    if early != [True, False]:
        where = "before" if early[0] else "in"
        raise ValueError(f"{specs[0]} and {specs[1]} both act {where} the language model; {order}")


def guards_of(rule):
    """The settings that every rule with these stages has, with their defaults: GUARDS, PLACING or both."""
    early, late = (not found.isdisjoint(stages(rule)) for found in (EARLY, LATE))
    return (GUARDS if late else {}) | (PLACING if early else {})


def _with_settings(name, rule, given, folder):
    """-> (rule with settings, all settings). Given settings come first, then the checkpoint's, then defaults."""
    for a, b in _silenced(name, given):
        raise ValueError(f"{a} and {b} are both given, but {b} has no effect with {a}={given[a]}; give one of them")
    file = calibrated(folder, name)
    settings = _complete(name, rule, _instead(_read(file) if file else {}, given))
    own = {key: settings[key] for key in settings_of(rule)}
    try:
        return (rule(**own) if isinstance(rule, type) else partial(rule, **own)), settings
    except ValueError as wrong:
        raise ValueError(f"{wrong} (settings not given come from {file})" if file else str(wrong)) from wrong
    except Exception as broken:
        raise ValueError(f"{titled(name)} cannot be created ({_what(rule, broken)}); fix it") from broken


def stages(rule):
    """The stages that a rule implements, {name of STAGES: function of what it sees}. A function is "keep"."""
    if isinstance(rule, partial) or inspect.isroutine(rule):
        return {"keep": rule}
    return {name: getattr(rule, name) for name in STAGES if callable(getattr(rule, name, None))}


def _check_stages(name, rule):
    """ValueError if a rule implements no stage, or one that cannot be called with a view."""
    found = stages(rule)
    if not found.keys() - {"protect"}:
        raise ValueError(
            f"{titled(name)} has no keep(self, view), narrow(self, view), pick(self, picture) or merge(self, patches); "
            "see model/pruning/README.md"
        )
    if found.keys() >= EARLY:
        raise ValueError(f"{titled(name)} has pick and merge; give one of them")
    if "merge" in found and type(getattr(rule, "merge_after", None)) is not int:
        raise ValueError(
            f"{titled(name)} has merge, but no merge_after; give it the index of a layer of the vision tower"
        )
    newest, extra = getattr(rule, "newest", None), getattr(rule, "extra_tokens", None)
    if "evict" in found and not (FRACTION[1](newest) and ONE[1](extra)):
        raise ValueError(
            f"{titled(name)} has evict with newest {newest!r} and extra_tokens {extra!r}; give it {FRACTION[0]} and "
            f"{ONE[0]}"
        )
    for stage, function in found.items():
        try:
            inspect.signature(function).bind(None)
        except TypeError:
            taken = f"{stage}{str(inspect.signature(function))[:80]}"
            raise ValueError(f"{titled(name)} has {taken}; it must take one argument, the {STAGES[stage]}") from None


def _takes_settings(rule):
    """True for a function or a class: both become a rule when given settings."""
    return inspect.isfunction(rule) or isinstance(rule, type)


def calibrated(folder, name):
    """Path of the calibrated settings in a checkpoint's folder for a method of METHODS, or None (tools/calibrate.py).

    The first that exists of NAME.json, OLD_NAME.json (see ALIASES) and NAME.json of each method in its FAMILY.
    """
    if folder is None or name not in METHODS:
        return None
    former = [old for old, new in ALIASES.items() if new == name]
    paths = [Path(folder) / f"{n}.json" for n in (name, *former, *FAMILY.get(name, ()))]
    return next((path for path in paths if path.is_file()), None)


def named(spec):
    """spec -> (name, method, settings given in it). The method is a function or class, an instance, a Method or None.

    ValueError as in `make_method`.
    """
    spec = "none" if spec is None else spec
    if isinstance(spec, Method | Composition):
        return spec.name, spec, {}
    if len(parts_of(spec)) > 1:
        raise ValueError(f"{spec} combines methods; give one")
    name, rule, texts = None, spec, []
    if isinstance(spec, str):
        name, texts = _split(spec)
        name = ALIASES.get(name, name)
        rule = _find(name)
    rule, given = (rule.func, dict(rule.keywords)) if isinstance(rule, partial) else (rule, {})
    for text in texts:
        _add(given, _parsed(text))
    if name is None:
        kind = rule if _takes_settings(rule) else type(rule)
        if kind.__module__ == "builtins" or not (kind is rule or stages(rule)):
            found = type(spec).__name__
            raise ValueError(f"a {found} is no pruning method; give a name, SPEC, function, class, instance or Method")
        name = next((known for known, method in METHODS.items() if method is kind), kind.__name__)
    return name, rule, given


def _add(given, more):
    """Add settings to a dict; ValueError if one is already in it."""
    for key, value in more.items():
        if key in given:
            raise ValueError(f"{key} is given twice, as {given[key]!r} and {value!r}; give it once")
        given[key] = value


def _silenced(name, values):
    """Pairs (a, b) of given settings where a makes b ineffective."""
    given = {key for key, value in values.items() if value is not None and value != "last"}
    pairs = [(a, b) for a, silent in SILENCED.items() for b in silent if name in METHODS or b in COMMON]
    return [(a, b) for a, b in pairs if a in given and b in given]


def _instead(own, given):
    """A checkpoint's own settings, overridden by given ones; a given budget, sigmoid, table or window also removes
    conflicting ones."""
    replaced = {"query"} if "window" in given else set()  # a window selects prompt rows, not look-ahead rows
    if not given.keys().isdisjoint(SIGMOID):
        replaced.add("schedule")
    if given.get("heads") is not None:
        replaced.add("threshold")  # it was fitted to the checkpoint's table
    if any(given.get(key) is not None for key in AMOUNTS):
        replaced |= {*AMOUNTS} - {"r"}
    return {key: value for key, value in own.items() if key not in replaced} | given


def sets_budget(spec):
    """True if a SPEC sets its own budget, or if its method has no setting `retention`.

    In a composition the second part can be given a budget if the first keeps a fixed fraction."""
    *before, spec = parts_of(spec)
    for first in before:
        _, rule, given = named(first)
        settings = settings_of(rule) | given
        if settings.get("retention") is None or settings.get("keep_tokens") is not None:
            return True
    _, rule, given = named(spec)
    return rule is None or "retention" not in settings_of(rule) or not given.keys().isdisjoint(AMOUNTS)


def parts_of(spec):
    """The SPECs of a composition, [spec] for one method. A "+" in a number (1e+5), in brackets or in the path of a file
    does not split."""
    if not isinstance(spec, str):
        return [spec]
    for found in re.finditer(r"\+(?=[A-Za-z][\w-]*(?:[:+]|$)|[^:\d][^:]*\.py::)", spec):
        left, right = spec[: found.start()], spec[found.end() :]
        path = spec.partition("::")[0]
        in_path = found.start() < len(path) and Path(path).is_file()
        if not in_path and all(left.count(a) == left.count(b) for a, b in ("[]", "{}", "()")):
            return [left, *parts_of(right)]
    return [spec]


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


def _parsed(text):
    """ "key=value" or "@FILE.json" -> {key: value}. A value is parsed as JSON; if that fails, it remains a string."""
    if text.startswith("@"):
        found = _read(text[1:])  # calibrate.py writes a schedule with the sigmoid for other retentions
        return {key: value for key, value in found.items() if "schedule" not in found or key not in SIGMOID}
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"setting {text!r} is not KEY=VALUE; give for example retention=0.5")
    try:
        return {key: json.loads(re.sub(r"^(-?)\.(?=\d)", r"\g<1>0.", value))}  # JSON knows .5 only as 0.5
    except ValueError:
        return {key: value}


def _read(path):
    try:
        settings = json.loads(Path(path).read_bytes())  # any UTF, with or without byte-order mark
    except (OSError, ValueError, RecursionError) as broken:
        raise ValueError(f"cannot read settings from {path} ({broken}); give a JSON object") from None
    if not isinstance(settings, dict):
        raise ValueError(f'{path} is not a JSON object; write {{"key": value}} into it')
    return settings


def _find(name):
    """What a NAME or FILE.py::NAME refers to: a function, class or instance; None for "none". Raises ValueError."""
    path, twice, attribute = name.rpartition("::")
    if name in METHODS:
        return METHODS[name]
    if not twice and name.endswith(".py"):
        own = ", ".join(_own_names(_import(name))) or "none"
        raise ValueError(f"{name} is a file; write {name}::NAME (it has {own})")
    if not twice:
        first, _, rest = name.partition(" ")
        if rest and first in METHODS:
            raise ValueError(f"settings follow a colon; write {first}:SETTING=VALUE, such as {first}:retention=0.5")
        known = f"{_near(name, METHODS)}use {', '.join(METHODS)} or FILE.py::NAME"
        raise ValueError(f"there is no method {name[:80]!r}; {known}")
    module = _import(path)
    rule = getattr(module, attribute, None)
    if not callable(rule) and not stages(rule):
        own = _own_names(module)
        near = _near(attribute, own)
        raise ValueError(f"{path} has no function {attribute!r}; {near}it has {', '.join(own) or 'none'}")
    return rule


def _import(path):
    """The module of a user's file, which may import modules beside it. ValueError if that fails."""
    found = importlib.util.spec_from_file_location("pruning_method", path)
    if found is None or not Path(path).is_file():
        raise ValueError(f"there is no Python file {path!r}; give FILE.py::NAME")
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


def settings_of(rule):
    """{setting: default} of a method's function or class, without those of `guards_of`.

    ValueError unless a function takes a view and keyword-only settings, or a class takes settings only.
    """
    parameters, is_class = inspect.signature(rule).parameters.values(), isinstance(rule, type)
    by_name = {inspect.Parameter.KEYWORD_ONLY} | ({inspect.Parameter.POSITIONAL_OR_KEYWORD} if is_class else set())
    settings = {p.name: p.default for p in parameters if p.kind in by_name}
    if len(parameters) - len(settings) != (0 if is_class else 1):
        taken = f"{rule.__name__} takes {', '.join(map(str, parameters))}"
        wanted = ("__init__(self" if is_class else f"{rule.__name__}(view") + ", *, SETTING=DEFAULT, ...)"
        raise ValueError(f"{taken}, but settings are listed, checked and passed by name; write {wanted}")
    return settings


def _complete(name, rule, given):
    """All settings of a method: the given ones, and defaults for the others."""
    defaults = guards_of(rule) | settings_of(rule)
    for key in given:
        if key not in defaults:
            what, cure = f"method {name} has no setting {key!r}", f"{_near(key, defaults)}it has {', '.join(defaults)}"
            attributes = {*dir(rule), *inspect.get_annotations(rule)} if isinstance(rule, type) else ()
            if key in attributes and key not in stages(rule):
                what += ", only a class attribute"
                cure = f"write @dataclass(frozen=True) above the class and {key}: TYPE = DEFAULT in it"
            raise ValueError(f"{what}; {cure}")
    kinds = kinds_of(rule, defaults)
    return {key: _checked(name, key, value, defaults[key], kinds[key]) for key, value in (defaults | given).items()}


def kinds_of(rule, defaults):
    """{setting: types that it takes, None for any}: those of its annotation, else that of its default."""
    try:
        hints = get_type_hints(rule if is_dataclass(rule) or not isinstance(rule, type) else rule.__init__)
    except Exception:  # an annotation that names something unknown
        hints = {}
    known = {
        key: None if value in (None, inspect.Parameter.empty) else (type(value),) for key, value in defaults.items()
    }
    for key, hint in hints.items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        types = tuple(get_origin(part) or part for part in parts)
        known[key] = types if set(types) <= set(KINDS) else None
    return known


def _checked(name, key, value, default, kinds):
    """value, as a float if it is an integer and `kinds` has float. ValueError if it is missing, of another type than
    `kinds`, or outside the range in COMMON. kinds: types, or None for any."""
    if value is inspect.Parameter.empty:
        raise ValueError(f"method {name} needs {key}; give the setting {key}=VALUE")
    if kinds and type(value) is int and float in kinds and int not in kinds:
        value = float(value)
    wanted = " or ".join(KINDS.get(kind, f"a {kind.__name__}") for kind in kinds or ())
    fine = kinds is None or type(value) in kinds or value is default
    if key in COMMON and not (value is None and default is None):
        _, wanted, fits = COMMON[key]
        fine = fits(value)
    if not fine:
        reserved = f" (or rename it: {', '.join(COMMON)} mean the same in every method)"
        own = reserved if key in COMMON and name not in METHODS else ""
        raise ValueError(f"{key} of method {name} is {value!r}; give {wanted}{own}")
    return value
