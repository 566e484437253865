"""Methods from Python: what `prune` may be, and that it means what --prune means."""

import json
import shutil

import pytest
import torch

import run
from model import Generation, InputError, Sampling, ask, load
from model.api import choose_method
from model.pruning import METHODS, Method, make_method
from tests.paths import DEMO, DEMO_PICTURE

QUESTION = "Count the objects."


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, "fp32")


def kept_by(checkpoint, prune):
    """(what is kept per layer, token ids) of a short answer."""
    generation = Generation(checkpoint, QUESTION, [DEMO_PICTURE], Sampling(6), prune=prune)
    "".join(generation)
    return generation.kept, generation.token_ids


@pytest.mark.parametrize("spec", ["plphp", "plphp-ada:retention=0.3", "uniform:rates=[0.1,0.2,0.3,0.4,0.5,1]", "none"])
def test_a_name_is_what_it_is_on_the_command_line(demo, capsys, spec):
    flags = ["--image", str(DEMO_PICTURE), "--prompt", QUESTION, "--max-new-tokens", "6", "--json", "--prune", spec]
    assert run.main(flags) == 0
    said = json.loads(capsys.readouterr().out)
    assert kept_by(demo, spec) == (said["prune"]["kept_per_layer"], said["token_ids"])
    assert ask(demo, QUESTION, [DEMO_PICTURE], prune=spec, max_new_tokens=6) == said["text"]


def test_the_checkpoints_own_settings_hold(demo):
    own = json.loads((DEMO / "plphp.json").read_text())
    for prune in ("plphp", "plphp-ada", METHODS["plphp"]):
        settings = Generation(demo, QUESTION, [DEMO_PICTURE], prune=prune).prune.settings
        assert own.items() <= settings.items()
    method = make_method("plphp")
    assert Generation(demo, QUESTION, [DEMO_PICTURE], prune=method).prune is method  # as it is


def first_ten(layer, scores, layout, *, window=2, part=10):
    keep = torch.ones(layout.kv_heads, layout.tokens, dtype=torch.bool)
    for start, stop in layout.spans:
        keep[:, start + part : stop] = False
    return keep


def test_a_function_and_a_class_are_methods(demo):
    assert kept_by(demo, first_ten)[0] == [10.0] * 6
    method = choose_method(first_ten, settings=["part=7"])
    assert kept_by(demo, method)[0] == [7.0] * 6 and method.name == "first_ten" and method.window == 2
    assert kept_by(demo, METHODS["grid"])[0] == kept_by(demo, "grid")[0] == [128.0] * 6
    assert choose_method(METHODS["topk"], DEMO, 0.25).name == "topk"
    assert choose_method(None) is choose_method("none") is None


def needs(layer, scores, layout, *, part):
    return None


BAD = {
    "plphd": "'plphd'", "plphp:r=0.3,retention=0.5": "one of them", "": "''", 0.5: "float", ("plphp",): "tuple",
    needs: "part", "plphp+topk": "combines", int: "type",
}  # fmt: skip


@pytest.mark.parametrize("prune", BAD, ids=lambda bad: getattr(bad, "__name__", str(bad)))
def test_what_is_no_method_is_refused_in_one_line(demo, prune):
    with pytest.raises(InputError) as refused:
        Generation(demo, QUESTION, [DEMO_PICTURE], prune=prune)
    message = str(refused.value)
    assert BAD[prune] in message and "; " in message and "\n" not in message
    with pytest.raises(InputError, match="takes no settings"):
        choose_method(Method("mine", needs, {}), retention=0.5)


# ---------------------------------------------------------------- what was kept, against what was asked for


@pytest.fixture
def bare(tmp_path):
    """The demo without settings of its own."""
    return shutil.copytree(DEMO, tmp_path / "bare", ignore=shutil.ignore_patterns("plphp.json"))


@pytest.mark.parametrize(
    ("spec", "flags", "note"),
    [
        ("plphp-ada", ["--retention", "0.5"], "plphp-ada kept 83."),
        ("plphp", ["--retention", "0.3"], "30.0 % were requested; tools/calibrate.py"),
        ("plphp:dr=0,skip=0", ["--retention", "0.3"], None),
        ("plphp:skip=0", ["--keep-tokens", "64"], None),
        ("plphp", ["--keep-tokens", "64"], "plphp kept 37.5 % of the vision tokens, 25.0 %"),  # one layer is spared
        ("fastv:layer=3", ["--retention", "0.5"], "fastv kept 75.0 % of the vision tokens, 50.0 % were requested"),
        ("fastv:layer=3,keep_tokens=32", [], "fastv kept 56.2 % of the vision tokens, 12.5 %"),
        ("grid:sink=60", ["--retention", "0.5"], "grid kept"),
        ("topk", ["--retention", "0.29"], None),
        ("plphp:r=0.9", [], None),  # r is no fraction of the whole
    ],
)
def test_what_is_kept_is_said_where_it_is_not_what_was_asked(bare, capsys, spec, flags, note):
    asked = ["--model", str(bare), "--image", str(DEMO_PICTURE), "--prompt", QUESTION, "--prune", spec, *flags]
    assert run.main([*asked, "--max-new-tokens", "1"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "requested" in line and "kept" in line]
    assert len(said) == (note is not None) and all(line.startswith("note: ") and note in line for line in said)


def test_a_file_of_questions_says_it_once(bare, tmp_path, capsys):
    lines = [json.dumps({"question_id": i, "image": DEMO_PICTURE.name, "text": QUESTION}) for i in range(3)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    flags = ["--questions", str(tmp_path / "q.jsonl"), "--image-folder", str(DEMO_PICTURE.parent)]
    flags += ["--max-new-tokens", "2", "--prune", "plphp-ada", "--retention", "0.5"]
    for model, times in ((bare, 1), (DEMO, 0)):
        assert run.main([*flags, "--model", str(model), "--answers", str(tmp_path / f"{times}.jsonl")]) == 0
        assert capsys.readouterr().err.count("plphp-ada kept 83.") == times
