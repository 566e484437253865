"""Methods from Python: the forms that `prune` accepts, and that each means the same as --prune."""

import dataclasses
import functools
import inspect
import json
import re
import shutil
import sys
import typing
import warnings

import pytest
import torch
from PIL import Image

import model
from model import Generation, InputError, Sampling
from model.api import choose_method
from model.pruning import GUARDS, METHODS, make_method
from tests.paths import DEMO, DEMO_PICTURE

QUESTION = "Count the objects."


def public():
    """(name, function) of all functions, methods and properties of `from model import *`."""
    for name in model.__all__:
        value = getattr(model, name)
        if inspect.isfunction(value):
            yield name, value
        for own, member in vars(value).items() if inspect.isclass(value) else ():
            function = getattr(member, "fget", member)
            if inspect.isfunction(function) and (own[0] != "_" or own in ("__init__", "__iter__", "__len__")):
                yield f"{name}.{own}", function


@pytest.mark.parametrize(("name", "function"), public(), ids=lambda value: value if isinstance(value, str) else "")
def test_everything_public_has_type_hints(name, function):
    hints = typing.get_type_hints(function)  # a NameError for a name that does not exist
    method = "." in name
    missing = {*list(inspect.signature(function).parameters)[method:], "return"} - hints.keys()
    assert not missing


def test_hints_name_what_is_accepted():
    """Each kind of picture and of method once, for all functions."""
    hints = [typing.get_type_hints(function) for _, function in public()]
    pictures = {h["images"] for h in hints if "images" in h}
    assert pictures == {model.image.Pictures} and len([h for h in hints if "prune" in h]) >= 5
    assert {h["prune"] for h in hints if "prune" in h} == {model.PruneLike, model.api.AnyMethod}  # of check_method
    kinds = typing.get_args(model.PictureLike)
    assert {str, bytes, Image.Image, torch.Tensor} <= set(kinds)
    for name, hint in typing.get_type_hints(Sampling).items():
        assert getattr(Sampling(), name) is not None or type(None) in typing.get_args(hint), name


def kept_by(checkpoint, prune):
    """(tokens kept per layer, token ids) of a short answer."""
    generation = Generation(checkpoint, QUESTION, [DEMO_PICTURE], Sampling(6), prune=prune)
    "".join(generation)
    return generation.kept, generation.token_ids


@pytest.mark.parametrize("spec", ["plphp", "plphp-ada:retention=0.3", "uniform:rates=[0.1,0.2,0.3,0.4,0.5,1]", "none"])
def test_a_name_is_what_it_is_on_the_command_line(demo, cli, spec):
    flags = ["--image", DEMO_PICTURE, "--prompt", QUESTION, "--max-new-tokens", "6", "--json", "--prune", spec]
    said = json.loads(cli(*flags)[1])
    assert kept_by(demo, spec) == (said["prune"]["kept_per_layer"], said["token_ids"])
    assert demo.ask(QUESTION, [DEMO_PICTURE], prune=spec, max_new_tokens=6) == said["text"]


def test_the_checkpoints_own_settings_hold(demo):
    own = json.loads((DEMO / "plphp.json").read_text())
    for prune in ("plphp", "plphp-ada", METHODS["plphp"]):
        settings = Generation(demo, QUESTION, [DEMO_PICTURE], prune=prune).prune.settings
        assert own.items() <= settings.items()
    method = make_method("plphp")
    assert Generation(demo, QUESTION, [DEMO_PICTURE], prune=method).prune is method  # passed through unchanged


def first_ten(view, *, window=2, part=10):
    keep = torch.ones(view.kv_heads, view.tokens, dtype=torch.bool)
    for start, stop in view.spans:
        keep[:, start + part : stop] = False
    return keep


def test_a_function_and_a_class_are_methods(demo):
    assert kept_by(demo, first_ten)[0] == [10.0] * 6
    method = choose_method(first_ten, settings=["part=7"])
    assert kept_by(demo, method)[0] == [7.0] * 6 and method.name == "first_ten" and method.settings["window"] == 2
    assert kept_by(demo, METHODS["grid"])[0] == kept_by(demo, "grid")[0] == [128.0] * 6
    assert choose_method(METHODS["topk"], DEMO, 0.25).name == "topk"
    assert choose_method(None) is choose_method("none") is None


def needs(view, *, part):
    return None


@dataclasses.dataclass(frozen=True)
class Firsts:
    part: int
    window: int = 2

    def keep(self, view):
        return first_ten(view, part=self.part)


def test_an_instance_and_a_partial_are_methods(demo):
    few, topk = Firsts(7), METHODS["topk"]
    assert kept_by(demo, few)[0] == kept_by(demo, functools.partial(first_ten, part=7))[0] == [7.0] * 6
    method = choose_method(few)
    assert (method.name, method.rule) == ("Firsts", few) and method.settings == {"part": 7, "window": 2} | GUARDS
    assert choose_method(topk(retention=0.25)).settings == choose_method(topk, retention=0.25).settings
    assert choose_method(functools.partial(topk, window=4), retention=0.25).settings["window"] == 4
    assert kept_by(demo, METHODS["fastv"](keep_tokens=5))[0] == [256.0] * 2 + [5.0] * 4
    for made in (few, choose_method(few)):
        with pytest.raises(InputError, match="method Firsts already has its settings; give its name or class"):
            choose_method(made, retention=0.5)
    with pytest.raises(InputError, match="part is given twice"):
        choose_method(functools.partial(first_ten, part=7), settings={"part": 8})
    with pytest.raises(InputError, match="window of method Firsts is 0"):
        choose_method(Firsts(7, 0))


BAD = {
    "plphd": "'plphd'", "plphp:r=0.3,retention=0.5": "one of them", "": "''", 0.5: "float", ("plphp",): "tuple",
    needs: "part", "plphp+topk": "both act in the language model", int: "type", print: "builtin_function", DEMO: "Path",
}  # fmt: skip


@pytest.mark.parametrize("prune", BAD, ids=lambda bad: getattr(bad, "__name__", str(bad)))
def test_what_is_no_method_is_refused_in_one_line(demo, prune):
    with pytest.raises(InputError) as refused:
        Generation(demo, QUESTION, [DEMO_PICTURE], prune=prune)
    message = str(refused.value)
    assert BAD[prune] in message and "; " in message and "\n" not in message
    assert isinstance(prune, str) or BAD[prune] == "part" or "function, class, instance or Method" in message


# ---------------------------------------------------------------- the methods of a loaded checkpoint


def test_ask_and_stream_mean_what_the_flags_mean(demo, cli):
    flags = (
        "--prune topk --retention 0.25 --set window=4 --set group=max --temperature 9 --top-p 0.9 --top-k 30 --seed 5"
    )
    flags += " -n 9 --template vicuna --stop qq --image-mode pad --dtype fp32 --no-stream"
    given = {
        "prune": "topk", "retention": 0.25, "settings": {"window": 4, "group": "max"}, "temperature": 9, "top_p": 0.9,
        "top_k": 30, "seed": 5, "max_new_tokens": 9, "template": "vicuna", "stop": "qq", "system": "Be brief.",
        "image_mode": "pad",
    }  # fmt: skip
    code, out, _ = cli("--image", DEMO_PICTURE, "--prompt", QUESTION, "--system", "Be brief.", *flags.split())
    wanted = out.removesuffix("\n")
    assert code == 0
    assert demo.ask(QUESTION, DEMO_PICTURE, **given) == "".join(demo.stream(QUESTION, DEMO_PICTURE, **given)) == wanted
    assert demo.ask_many([(QUESTION, DEMO_PICTURE)], **given) == [wanted]
    for name, other in {"retention": 0.02, "settings": {}, "seed": 6, "max_new_tokens": 3, "top_k": 1}.items():
        assert demo.ask(QUESTION, DEMO_PICTURE, **given | {name: other}) != wanted, name
    plain = demo.ask(QUESTION, [DEMO_PICTURE], max_new_tokens=6)
    assert demo.ask(QUESTION, [DEMO_PICTURE], max_new_tokens=6) == plain
    pruned = demo.ask(QUESTION, [DEMO_PICTURE], prune="random:keep_tokens=2", max_new_tokens=6)
    assert demo.ask(QUESTION, DEMO_PICTURE, prune="random", keep_tokens=2, max_new_tokens=6) == pruned != plain


def test_stream_gives_pieces_and_refuses_when_it_is_called(demo):
    pieces = demo.stream("How many objects are there?", DEMO_PICTURE)
    assert next(pieces) == "The" and "".join(pieces) == " picture has four objects."
    with pytest.raises(InputError, match="no picture at nowhere.png"):
        demo.stream(QUESTION, "nowhere.png")


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_many_questions_are_answered_in_order_whatever_befalls_one(demo, monkeypatch, batch):
    spell = "Spell the word on the sign.", [DEMO_PICTURE]
    asked = [(QUESTION, DEMO_PICTURE), ("Q", "nowhere.png"), "What is a star?", 3, "", spell, str(DEMO_PICTURE)]
    # a forgotten list turns a pair into two questions, the second of them a path
    wrong = {1: "no picture at nowhere.png", 3: "give a text or a pair", 4: "empty", 6: "is a file; give a list"}
    alone = [demo.ask(*q, max_new_tokens=12) for q in (asked[0], (asked[2],), asked[5])]
    answers = demo.ask_many(asked, batch=batch, max_new_tokens=12)
    assert [answers[i] for i in (0, 2, 5)] == alone and len(set(alone)) == 3
    assert all(isinstance(answers[i], InputError) and words in str(answers[i]) for i, words in wrong.items())
    take = Generation.take

    def broken(self, token):
        return take(self, -1 if "star" in self.prompt and len(self.token_ids) == 3 else token)

    monkeypatch.setattr(Generation, "take", broken)
    answers = demo.ask_many(asked, batch=batch, max_new_tokens=12)
    assert isinstance(answers[2], RuntimeError) and [answers[0], answers[5]] == [alone[0], alone[2]]
    assert demo.ask_many([]) == []


BAD_CALLS = {
    "prune": ({"prune": "nope"}, "no method 'nope'"),
    "no prune": ({"retention": 0.5}, "retention was given, but prune is missing; give a method"),
    "retention": ({"prune": "topk", "retention": 1.5}, "give a number above 0 and up to 1"),
    "two budgets": ({"prune": "topk", "retention": 0.5, "keep_tokens": 3}, "give one of them"),
    "setting": ({"prune": "topk", "settings": {"depth": 1}}, "no setting 'depth'"),
    "value": ({"prune": "topk", "settings": {"window": 0}}, "window of method topk is 0; give a whole number"),
    "settings": ({"prune": "topk", "settings": "window=3"}, "give a dict"),
    "no names": ({"prune": "topk", "settings": {1: 2}}, "give a dict"),
    "twice": ({"prune": "topk:window=3", "settings": {"window": 3}}, "window is given twice"),
    "template": ({"template": "llama3"}, "template 'llama3'"),
    "mode": ({"image_mode": "anyres"}, "tiles"),
    "tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    "system": ({"system": 3}, "system is 3"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_arguments_that_cannot_be_used_are_refused_in_one_line(demo, name):
    given, said = BAD_CALLS[name]
    for call in (demo.ask, demo.stream, demo.ask_many):
        with pytest.raises(InputError) as refused:
            call([QUESTION] if call == demo.ask_many else QUESTION, **given)
        assert said in str(refused.value) and "; " in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("questions", "batch"),
    [(QUESTION, 1), ({"a"}, 1), (None, 1), ([QUESTION], 0), ([QUESTION], True), ([QUESTION], 1.5)],
)
def test_ask_many_refuses_what_is_no_list_of_questions(demo, questions, batch):
    with pytest.raises(InputError, match="; give a"):
        demo.ask_many(questions, batch=batch)


@pytest.mark.parametrize("way", ["ask", "stream"])
def test_a_warning_names_the_line_of_the_caller_and_no_lambda(demo, way):
    wide = Image.new("RGB", (400, 100))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drop_all = lambda view: view.text.expand(view.kv_heads, -1)  # noqa: E731
        line = sys._getframe().f_lineno + 1
        "".join(getattr(demo, way)(QUESTION, wide, prune=drop_all, max_new_tokens=1))
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line)] * 2
    cropped, dropped = (str(warning.message) for warning in caught)
    assert "the centre crop removes 75 %" in cropped and dropped.startswith("the method kept no vision token")


def test_a_checkpoint_is_shown_in_one_line(demo):
    assert repr(demo) == f"<Checkpoint {DEMO}: 5,364,096 parameters in torch.float32 on cpu>"


# ---------------------------------------------------------------- kept against requested


@pytest.fixture
def bare(tmp_path):
    """The demo without its plphp.json."""
    return shutil.copytree(DEMO, tmp_path / "bare", ignore=shutil.ignore_patterns("plphp.json"))


@pytest.mark.parametrize(
    ("spec", "note"),
    [
        ("plphp-ada --retention 0.5", "plphp-ada kept 83."),
        ("plphp --retention 0.3", "instead of 30.0 %; tools/calibrate.py"),
        ("plphp:dr=0,skip=0 --retention 0.3", None),
        ("plphp:skip=0 --keep-tokens 64", None),
        ("plphp --keep-tokens 64", "plphp kept 37.5 % of the vision tokens instead of 25.0 %"),  # a layer is unpruned
        ("fastv:layer=3 --retention 0.5", "fastv kept 75.0 % of the vision tokens instead of 50.0 %"),
        ("fastv:layer=3,keep_tokens=32", "fastv kept 56.2 % of the vision tokens instead of 12.5 %"),
        ("grid:sink=60 --retention 0.5", "grid kept"),
        ("topk --retention 0.29", None),
        ("plphp:r=0.9", None),  # r is not the fraction of the whole
    ],
)
def test_what_is_kept_is_said_where_it_is_not_what_was_asked(bare, cli, spec, note):
    asked = "--model", bare, "--image", DEMO_PICTURE, "--prompt", QUESTION, "-n", "1", "--prune", *spec.split()
    code, _, err = cli(*asked)
    said = [line for line in err.splitlines() if re.match("note: .* kept .* instead of", line)]
    assert code == 0 and len(said) == (note is not None) and all(note in line for line in said)


@pytest.fixture
def of_file(tmp_path, cli):
    """Function (flags) -> stderr of a run over a file of three questions."""

    def of_file(*flags):
        lines = [{"question_id": i, "image": DEMO_PICTURE.name, "text": QUESTION} for i in range(3)]
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / "a.jsonl").unlink(missing_ok=True)
        files = "--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl"
        code, _, err = cli(*files, "--image-folder", DEMO_PICTURE.parent, "-n", "1", *flags)
        assert code == 0
        return err

    return of_file


def test_a_file_of_questions_says_it_once(bare, of_file):
    for folder, times in ((bare, 1), (DEMO, 0)):
        err = of_file("--prune", "plphp-ada", "--retention", "0.5", "--model", folder)
        assert err.count("plphp-ada kept 83.") == times


FORGETFUL = """
import torch

def forgets(view):
    keep = view.text.expand(view.kv_heads, -1)

def blind(view):
    return view.text.expand(view.kv_heads, -1)

def some(view):
    return view.text.expand(view.kv_heads, -1) if view.layer else None
"""


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("forgets", "forgets dropped no vision token; check its settings, and that it returns what to keep"),
        ("blind", "blind kept no vision token; return True for those that the answer needs"),
        ("some", None),
        ("topk:retention=1", None),
        ("random:keep_tokens=999", None),
    ],
)
def test_a_method_that_drops_nothing_or_everything_is_told_of(demo, tmp_path, cli, of_file, spec, said):
    """For one answer, once for a file of questions, and as a warning from Python; without a picture never."""
    (tmp_path / "mine.py").write_text(FORGETFUL)
    spec = spec if ":" in spec else f"{tmp_path}/mine.py::{spec}"
    flags = "--prompt", QUESTION, "-n", "1", "--prune", spec
    for told in (cli("--image", DEMO_PICTURE, *flags)[2], of_file(*flags[2:])):
        assert told.count("vision token;") == (said is not None) and f"{said or ''}\n" in told
    assert "vision token;" not in cli(*flags)[2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        demo.ask(QUESTION, DEMO_PICTURE, prune=spec, max_new_tokens=1)
    told = [str(warning.message) for warning in caught]
    assert len(told) == (said is not None) and all(said in line for line in told)
