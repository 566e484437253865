"""Names and settings of methods: what is accepted, what is refused and how, and what --list-methods says."""

import itertools
import json
import re
import sys

import pytest
import torch

from model.config import InputError
from model.pruning import METHODS, guards_of, make_method, settings_of
from model.pruning.describe import describe, meanings, shown
from model.view import Pruning
from tests.paths import DEMO

NAMES = [name for name in METHODS if name != "none"]


def test_settings_come_from_the_spec_from_set_and_from_flags(tmp_path):
    (tmp_path / "s.json").write_text('{"seed": 3, "pooled": true}')
    method = make_method("random:scope=image", settings=(f"@{tmp_path}/s.json", "retention=0.25"))
    assert method.settings == {
        "retention": 0.25, "keep_tokens": None, "pooled": True, "shared": False, "scope": "image", "seed": 3,
        "sink": 0, "recent": 0, "sink_keys": 0,
    }  # fmt: skip
    assert make_method("random:retention=.75") == make_method("random", 0.75)
    assert make_method("random", 0.75).settings["retention"] == 0.75 and make_method("none") is None


def test_commas_within_brackets_do_not_part_settings():
    rule = make_method("topk:window=3,rates=[[0.1,0.9],[0.3,1]],group=max").rule
    assert (rule.rates, rule.group, rule.window) == ([[0.1, 0.9], [0.3, 1]], "max", 3)


def test_the_former_name_of_a_method_is_as_good(tmp_path):
    assert make_method("uniform", 0.3) == make_method("topk", 0.3) and make_method("uniform").name == "topk"
    (tmp_path / "uniform.json").write_text('{"window": 4}')
    assert all(make_method(n, folder=tmp_path).settings["window"] == 4 for n in ("topk", "uniform"))
    (tmp_path / "topk.json").write_text('{"window": 5}')
    assert make_method("uniform", folder=tmp_path).settings["window"] == 5


PLPHP = {"retention": 0.5, "keep_tokens": 9, "r": 0.9, "dr": 0.1, "alpha": 0.4, "beta": 0.2}
RATES = [set(pair) for pair in itertools.combinations(("r", "dr", "alpha", "beta"), 2)]
RATES += [{"retention", other} for other in ("dr", "alpha", "beta")]
GIVEN = {  # method: settings of the kept number, and the pairs of them that may be combined
    "plphp": (PLPHP, RATES),
    "plphp-ada": (PLPHP, RATES),
    "topk": ({"retention": 0.5, "keep_tokens": 9, "mass": 0.8, "rates": [0.5]}, []),
    "random": ({"retention": 0.5, "keep_tokens": 9, "seed": 3}, [{"retention", "seed"}, {"keep_tokens", "seed"}]),
}


def ways(setting, value, folder):
    """[(settings in the SPEC, retention, keep_tokens, --set)]: the ways to give one setting."""
    text, file = f"{setting}={json.dumps(value)}".replace(" ", ""), folder / f"{setting}.json"
    file.write_text(json.dumps({setting: value}))
    flag = {"retention": [("", value, None, [])], "keep_tokens": [("", None, value, [])]}
    return [(text, None, None, []), ("", None, None, [text]), ("", None, None, [f"@{file}"]), *flag.get(setting, ())]


@pytest.mark.parametrize("name", GIVEN)
def test_nothing_that_is_given_is_dropped(name, tmp_path):
    """Every pair of settings of the kept number, given in the SPEC, by --set, in a file and by flag."""
    values, together = GIVEN[name]
    for a, b in itertools.product(values, repeat=2):
        for one, two in itertools.product(ways(a, values[a], tmp_path), ways(b, values[b], tmp_path)):
            if one == two and (one[1] or one[2]):
                continue  # a flag has one value
            spec = f"{name}:" + ",".join(filter(None, (one[0], two[0])))
            arguments = spec.rstrip(":"), one[1] or two[1], one[2] or two[2], [*one[3], *two[3]]
            if {a, b} in together:
                found = make_method(*arguments).settings
                assert all(found[s] == values[s] for s in (a, b)), arguments
            else:
                said = refused(*arguments)
                assert a in said and b in said and re.search("give one of them|give it once", said), arguments


def test_a_checkpoints_own_budget_gives_way_to_what_is_given(tmp_path):
    (tmp_path / "plphp.json").write_text('{"retention": 0.4, "alpha": 0.5, "beta": 0.3, "dr": 0.0}')
    given = {"plphp": 0.4, "plphp:r=0.7": 0.7, "plphp:retention=0.2": 0.2, "plphp-ada:r=0.6": 0.6}
    for spec, rate in given.items():
        rule = make_method(spec, folder=tmp_path).rule
        assert rule.rate(0.6) == rule.rate(0.1) == rate and (rule.alpha, rule.beta) == (0.5, 0.3)
    assert make_method("plphp", keep_tokens=7, folder=tmp_path).settings["retention"] is None
    assert f"(settings not given come from {tmp_path}/plphp.json)" in refused("plphp:alpha=0.2", folder=tmp_path)


@pytest.mark.parametrize("folder", [None, DEMO])
@pytest.mark.parametrize("name", NAMES)
def test_the_spec_of_a_method_gives_it_again(name, folder):
    budgets = [{}, {"retention": 0.3}, {"keep_tokens": 9}]
    pairs = ("sink=2", "scope=vision", "mass=0.9", "rates=[0.5,0.3]", "r=0.3", "query=last", "window=32", "cover=0.25")
    made = 0
    for asked in [*budgets, *({"settings": [p]} for p in pairs), *({"retention": 0.3, "settings": [p]} for p in pairs)]:
        try:
            method = make_method(name, folder=folder, **asked)
        except ValueError:  # no setting of this method, or two budgets
            continue
        assert make_method(method.spec, folder=folder).settings == method.settings
        made += 1
    few = method.picks or "scope" not in method.settings
    assert made >= (3 if few else 7) - ("keep_tokens" not in method.settings) - (name == "zipvl")


# ---------------------------------------------------------------- a user's own file

OWN = '''
from dataclasses import dataclass
from functools import partial
from model.pruning import METHODS

few, wide = METHODS["topk"](keep_tokens=3), partial(METHODS["topk"], window=9)
number = 3

def first(view, *, window=2, part):
    return None

def keep(view, *, part=7, window=2, other=None):
    """Keep a part.

    More words: of no setting.

    part: how many tokens stay, which takes more than a line
        to say
    window: rows
    """

def placed(view, window=1):
    return None

def anything(view, **settings):
    return None

def no_view(*, window=1):
    return None

def grouped(view, *, group=3):
    return None

def _hidden(view):
    return None

@dataclass(frozen=True)
class Short:
    """Shorter.

    step: how far
    other: not this
    """

    step: int
    other: str = "a"

    def keep(self, view):
        return None

@dataclass(frozen=True)
class New(Short):
    """Newer.

    other: but this
    """

@dataclass(frozen=True, kw_only=True)
class Neither:
    layer: int = 1

@dataclass(frozen=True, kw_only=True)
class Called:
    def __call__(self, view):
        return None

@dataclass(frozen=True, kw_only=True)
class Former:
    def narrow(self, scores, layout):
        return None

class Plain:
    share = 0.5
    typed: float
    def keep(self, view):
        return None

@dataclass(frozen=True)
class Untyped(Plain):
    step = 2

class Open(Plain):
    def __init__(self, part=3, **more):
        self.part = part / (part != 0)

class Broken(Open):
    def __init__(self):
        super().__init__(0)
opened = Open(7)


@dataclass(frozen=True)
class Typed:
    part: int | None = None
    flag: bool | None = None
    rates: "list[float] | float" = 0.5

    def keep(self, view):
        pass
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory with a user's files."""
    files = {
        "own.py": OWN, "late.py": "from __future__ import annotations\n" + OWN, "broken.py": "1 +", "own.txt": "",
        "copied.py": "from .budget import best", "helped.py": "from helper import keep",
        "helper.py": "def keep(view):\n    return None\n", "ends.py": "import sys; sys.exit('bye')", "list.json": "[1]",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_of_ones_own_may_import_what_is_beside_it(own, monkeypatch):
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    before = list(sys.path)
    assert make_method("helped.py::keep").name == "helped.py::keep" and sys.path == before
    refused("broken.py::keep")
    assert sys.path == before
    sys.modules.pop("helper")


def test_a_file_of_ones_own_may_hold_classes_and_finished_methods(own):
    """Also with `from __future__ import annotations`, which dataclasses look up in their own module."""
    for file in ("own.py", "late.py"):
        assert make_method(f"{file}::few").settings["keep_tokens"] == 3
        wide = make_method(f"{file}::wide", 0.3).settings
        assert (wide["window"], wide["retention"]) == (9, 0.3)
        assert make_method(f"{file}::Short:step=2").rule.step == 2  # fields need not be keyword-only
        assert make_method(f"{file}::opened").settings["part"] == 7  # __init__ has already taken its arguments


# ---------------------------------------------------------------- what is refused


def refused(*arguments, **options):
    """The error message of make_method: one line, `what; what to do`."""
    with pytest.raises(ValueError) as caught:
        make_method(*arguments, **options)
    message = str(caught.value)
    assert ";" in message and "\n" not in message
    return message


LISTED = "own.py::NAME (it has first, keep, placed, anything, no_view, grouped, Short, New, Neither, Called, Former, "
FIELD = "no setting '{0}', only a class attribute; write @dataclass(frozen=True) above the class and {0}: TYPE"
BAD = [  # SPEC, or several arguments of make_method; words of the error
    ("plphd", "there is no method 'plphd'; did you mean plphp? use none, plphp, "),
    ("nope", "there is no method 'nope'; use none, "),
    ("topk 0.3", "settings follow a colon; write topk:SETTING=VALUE"),
    ("q" * 3000, f"there is no method '{'q' * 80}'; use none"),
    ("PLPHP", "'PLPHP'; did you mean plphp? use none, "),
    ("random+none", "none keeps everything, so nothing can be combined with it"),
    ("topk+grid+fastv:layer=1", "combines"),
    (0.5, "float"),
    ("none:seed=1", "seed"),
    ("random:speed=3", "'speed'"),
    ("random:sed=3", "'sed'; did you mean seed? it has "),
    ("random:seed", "'seed'"),
    (("random", None, None, ["seed="]), "'seed='"),
    (("random", 0.5, 3), "one of them"),
    (("random:keep_tokens=3", 0.5), "one of them"),
    ("topk:window=3,query=lookahead", "window has no effect with query=lookahead"),
    ("g-search:schedule=[1,0.5],lo=0.1", "lo has no effect with schedule=[1, 0.5]"),
    ("g-search:schedule=[],steepness=3", "steepness has no effect with schedule=[]"),
    ("g-search:schedule=[],hi=0.9", "hi has no effect with schedule=[]"),
    ("zipvl:scope=vision", "scope=vision has no effect with tau; give retention or keep_tokens, or no scope"),
    ("zipvl:scope=part,tau=0.9", "scope=part has no effect with tau"),
    (("random", None, None, ["@none.json"]), "none.json"),
    (("random", None, None, ["@list.json"]), "list.json"),
    # values
    ("random:retention=1.5", "retention of method random is 1.5; give a number above 0 and up to 1"),
    ("random:retention=NaN", "nan"),
    ("random:retention=true", "True"),
    ("random:retention=null", "None"),
    ("topk:keep_tokens=0", "keep_tokens of method topk is 0; give a whole number of 1 or more"),
    ("random:keep_tokens=0.5", "0.5"),
    ("random:seed=0.5", "seed of method random is 0.5; give a whole number"),
    ("random:seed=null", "None"),
    ("random:pooled=1", "pooled of method random is 1; give true or false"),
    ("random:pooled=true,shared=true", "one of them"),
    ("snapkv:pool=3", "pool of method snapkv is 3; give text"),
    ("snapkv:floor=0.5", "'floor'"),
    ("plphp:r=big", "r of method plphp is 'big'; give a number"),
    ("plphp:floor=0.5", "'floor'"),
    ("topk:group=1", "group of method topk is 1; give mean or max"),
    ("topk:mass=most", "'most'"),
    ("topk:rates=[0.5,0.5", "rates"),
    ("pyramiddrop:stages=[2,2]", "stages is [2, 2]; give whole numbers of 1 or more, in ascending order"),
    ("pyramiddrop:ratios=[0.5,0.2]", "ratios has 2 entries; give 3, one for each stage"),
    ("pyramiddrop:stages=[3],ratios=[0.5,0.2]", "ratios has 2 entries; give 1, one for each stage"),
    ("pyramiddrop:stages=3", "stages of method pyramiddrop is 3; give a list or null"),
    (("pyramiddrop:ratios=[0.5,0.2,0.1]", 0.5), "retention and ratios are both given, but ratios has no effect"),
    ("mustdrop:retention=0.5", "method mustdrop has no setting 'retention'"),
    ("mustdrop:key_share=2", "key_share is 2.0; give a number from 0 to 1"),
    ("mustdrop:global_threshold=-1", "global_threshold is -1.0; give a number from 0 to 1"),
    ("mustdrop:individual_threshold=NaN", "individual_threshold is nan; give a number from 0 to 1"),
    ("mustdrop+topk", "method mustdrop acts before the language model and in it; use it alone"),
    ("pick-grid+mustdrop", "method mustdrop acts before the language model and in it; use it alone"),
    *((f"topk:rates={rates}", "rates") for rates in ("[[0.5,-1]]", '["half"]', "[NaN]", "[[[0.5]]]", "half", "true")),
    # files
    ("own.py", LISTED),
    ("own.py:first", LISTED),
    ("other.py", "there is no Python file 'other.py'"),
    ("other.py::first", "there is no Python file 'other.py'"),
    ("own.txt::first", "there is no Python file 'own.txt'"),
    ("broken.py::first", "SyntaxError"),
    ("ends.py::first", "bye"),
    ("copied.py::best", "; write `from model.pruning.budget import ...`"),
    ("own.py::frist", "'frist'; did you mean first? it has first, keep, "),
    ("own.py::number", "'number'"),
    ("own.py::first", "part"),
    ("own.py::Short", "step"),
    ("own.py::first:part=1,window=-1", "-1"),
    (("own.py::first:part=1", 0.5), "'retention'"),
    ("own.py::grouped", "give mean or max (or rename it: retention, keep_"),
    ("own.py::placed:window=3", "placed takes view, window=1, but settings are listed, checked and passed by name; "),
    ("own.py::anything:part=3", "passed by name; write anything(view, *, SETTING=DEFAULT, ...)"),
    ("own.py::Open:part=1", "takes part=3, **more, but settings are listed, checked and passed by name; write __"),
    ("own.py::Broken", "method own.py::Broken cannot be created (ZeroDivisionError in line 84: "),
    *((f"own.py::{at}=1", FIELD.format(at.split(":")[1])) for at in ("Plain:share", "Plain:typed", "Untyped:step")),
    ("own.py::Typed:part=abc", "part of method own.py::Typed is 'abc'; give a whole number or null"),
    *((f"own.py::Typed:part={part}", "give a whole number or null") for part in ("7.9", "true", "[1]")),
    ("own.py::Typed:flag=maybe", "flag of method own.py::Typed is 'maybe'; give true or false or null"),
    ("own.py::Plain:keep=1", "has no setting 'keep'; it has sink"),
    ("own.py::no_view", "no_view takes window"),
    (
        "own.py::Neither",
        "method own.py::Neither has no keep(self, view), narrow(self, view), pick(self, picture) or merge",
    ),
    (
        "own.py::Called",
        "method own.py::Called has no keep(self, view), narrow(self, view), pick(self, picture) or merge",
    ),
    ("own.py::Former", "method own.py::Former has narrow(scores, layout); it must take one argument, the view"),
]


@pytest.mark.parametrize(("asked", "words"), BAD, ids=[str(asked)[:40] for asked, _ in BAD])
def test_what_cannot_be_meant_is_refused_in_one_line(own, asked, words):
    assert words in refused(*(asked if isinstance(asked, tuple) else (asked,)))


# ---------------------------------------------------------------- what --list-methods says

# a range as it is written: values that must be refused, and one that may not
RANGES = {
    "0 to 1": ((-0.1, 1.1, "x"), 0.5), "above 0 and up to 1": ((0, 1.1, "x"), 0.5), "0 or more": ((-1, 0.5), 1),
    "1 or more": ((0, 1.5), 2), "1 or more, odd": ((-1, 0, 2), 3), "true or false": ((1, "yes"), True),
    "mean or max": (("sum",), "max"), "avg or max": (("sum",), "max"), "image or part or vision": (("all",), "vision"),
    "last or lookahead": (("first",), "lookahead"), "any whole number": ((0.5,), 3), "beta or more": ((0.05,), 0.3),
    "up to alpha": ((0.3,), 0.2), "1 or more, below the number of layers": ((-1, 0, 1.5), 3),
    "2 or more": ((-1, 1, 2.5), 3), "rank or row": (("column",), "row"),
    "contiguous or original": (("packed",), "original"), "0 to 1, first 1": ((-0.1, 1.1, "x", 0.5), 1.0),
    "0 to hi": ((-0.1, 1.1, "x"), 0.5), "lo to 1": ((-0.1, 1.1, "x"), 0.5), "0 to 1000": ((-0.1, 1001, "x"), 3.0),
    "any number of 0 or more": ((-0.1, "x"), 0.5), "numbers of 0 or more": ((-1, "x"), 0.5),
    "1 or more, ascending": (([0, 1], [2, 1], [1.5], "x"), [1, 3, 4]),
    "above 0 and up to 1, descending": (([0.5, 0.6, 0.1], [0.5, 0.2, 0], [1.5, 1, 1], ["x"] * 3), [0.5, 0.5, 0.2]),
}  # fmt: skip
LISTS = ("rates", "schedule")  # settings with a value per layer


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_is_listed_with_its_meaning_and_the_range_that_is_checked(name):
    listed, known = " ".join(describe(name).split()), guards_of(METHODS[name]) | settings_of(METHODS[name])
    heads = {"in": "sink" in known, "before": "positions" in known}
    assert all((f"of every method {where} the language model:" in listed) == has for where, has in heads.items())
    for key, default in known.items():
        meaning = meanings(METHODS[name])[key]
        assert f"{key}={shown(default)} {' '.join(meaning.split())}" in listed
        written = re.search(r"\(([^()]*)\)$", meaning)
        advice = f"{key} of {name}: end its meaning with a range in brackets, and add new ranges to RANGES"
        assert written and written[1] in RANGES, advice
        wrong, fine = RANGES[written[1]]
        if written[1] == "numbers of 0 or more":
            wrong, fine = [[[value]] for value in wrong], [[fine]]
        for value in wrong:
            said = refused(f"{name}:{key}={json.dumps([value] * 4 if key in LISTS else value)}")
            assert re.search(rf"\b{key}\b.*; \w", said)
        retention = 0.5 if (name, key) == ("zipvl", "scope") else None  # alone it has no effect
        make_method(f"{name}:{key}={json.dumps([fine] * 4 if key in LISTS else fine)}", retention)


def test_a_method_of_ones_own_is_listed(own, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert describe("own.py::keep").splitlines()[3:8] == [
        "  part=7            how many tokens stay, which takes more",
        "                    than a line to say",
        "  window=2          rows",
        "  other=null",
        "",
    ]
    lines = describe("own.py::New").splitlines()
    assert "  step=(none)       how far" in lines and "  other=a           but this" in lines
    assert describe("none") == "none: Keeps all tokens."


def test_the_models_own_settings_are_listed(tmp_path):
    (tmp_path / "plphp.json").write_text('{"r": 0.5, "query": "lookahead"}')
    for name in ("plphp", "plphp-ada"):
        assert f"are: r=0.5 query=lookahead ({tmp_path}/plphp.json)" in " ".join(describe(name, tmp_path).split())
    assert "For this model" not in describe("topk", tmp_path)


@pytest.mark.parametrize("spec", ["topk", "plphp:skip=0", "shared", "snapkv", "adakv", "topk:mass=0.5"])
def test_scores_that_are_not_numbers_are_refused(spec):
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    q[..., -1, :] = float("nan")
    with pytest.raises(InputError, match="the scores of layer 0 hold NaN"):
        Pruning(make_method(spec), 2, [(2, 6)], backend="torch")(0, q, k, v)
