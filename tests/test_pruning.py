"""Pruning methods: their names and settings, and the whole against transformers with masks per layer and head."""

import dataclasses
import itertools
import json
import math
import sys

import pytest
import torch

from model import Generation, InputError, Sampling, load
from model.cache import RaggedCache
from model.pruning import METHODS, Method, make_method
from model.pruning.budget import best, budget
from tests.given import given_view
from tests.oracle import masked_ids
from tests.paths import DEMO, DEMO_PICTURE

SPANS = [(5, 30), (33, 58)]


def keeps_of(method, layers):
    """What a method keeps of 60 tokens in each layer of a model with 3 layers and 2 KV heads."""
    return [method.keep(given_view(SPANS, 60, num_layers=3, layer=layer)) for layer in layers]


@pytest.fixture
def demo():
    return load(DEMO, "fp32", torch.get_default_device())


# ---------------------------------------------------------------- choosing tokens


@pytest.mark.parametrize(
    ("tokens", "retention", "kept"),
    [(576, 0.1, 58), (10, 0.25, 3), (10, 0.24, 2), (10, 0.0, 1), (10, 1.0, 10), (10, 7.0, 10), (1, 0.4, 1)],
)
def test_budget_rounds_half_up_within_its_bounds(tokens, retention, kept):
    assert budget(tokens, retention) == kept
    assert budget(tokens, retention, 4) == min(4, tokens)


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 1.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert best(scores, 3).int().tolist() == [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0]]
    many = torch.zeros(5000)  # an unstable sort would reorder these
    assert best(many, 1700).nonzero()[:, 0].tolist() == list(range(1700))


def test_random_keeps_its_budget_of_every_picture_and_all_text():
    method = make_method("random", retention=0.3)
    keeps = keeps_of(method, range(3))
    text = torch.ones(60, dtype=torch.bool)
    for start, stop in SPANS:
        text[start:stop] = False
        assert all((k[:, start:stop].sum(1) == math.floor(0.3 * 25 + 0.5)).all() for k in keeps)
    assert all(k[:, text].all() for k in keeps)
    assert not any(torch.equal(a, b) for a, b in ((keeps[0], keeps[1]), (keeps[0][:1], keeps[0][1:])))
    assert torch.equal(keeps_of(method, [1])[0], keeps[1])  # the same again
    other = make_method("random:seed=7", retention=0.3)
    assert not torch.equal(keeps_of(other, [1])[0], keeps[1])


def test_heads_may_draw_together():
    method = make_method("random:shared=true", keep_tokens=6)
    keeps = keeps_of(method, range(2))
    assert all((k == k[:1]).all() and k[:, slice(*SPANS[0])].sum() == 12 for k in keeps)
    assert not keeps[0].equal(keeps[1])
    with pytest.raises(ValueError, match="one of them"):
        make_method("random:shared=true,pooled=true")


def test_a_pooled_budget_is_spread_unevenly():
    method = make_method("random:pooled=true", keep_tokens=6)
    keeps = torch.stack(keeps_of(method, range(3)))
    first = keeps[:, :, slice(*SPANS[0])].sum(2)
    assert (first.sum(1) == 12).all() and (first[:, 0] != first[:, 1]).any()


# ---------------------------------------------------------------- names and settings


def test_settings_come_from_the_spec_from_set_and_from_flags(tmp_path):
    (tmp_path / "s.json").write_text('{"seed": 3, "pooled": true}')
    method = make_method("random:scope=image", settings=(f"@{tmp_path}/s.json", "retention=0.25"))
    assert method.settings == {
        "retention": 0.25, "keep_tokens": None, "pooled": True, "shared": False, "scope": "image", "seed": 3,
        "sink": 0, "recent": 0, "sink_keys": 0,
    }  # fmt: skip
    assert make_method("random", 0.75).settings["retention"] == 0.75 and make_method("none") is None
    assert set(METHODS) >= {"none", "random", "plphp", "plphp-ada"}


def test_commas_within_brackets_do_not_part_settings():
    rates = [[0.5, [0.25, 1]], [0.1, 0.2]][1]
    assert make_method(f"topk:rates={rates},window=3".replace(" ", "")).rule.rates == [0.1, 0.2]
    nested = make_method("topk:window=3,rates=[[0.1,0.9],0.3],group=max")
    assert (
        nested.rule.rates == [[0.1, 0.9], 0.3] and nested.settings["group"] == "max" and nested.settings["window"] == 3
    )


def test_the_former_name_of_a_method_is_as_good(tmp_path):
    assert make_method("uniform", 0.3) == make_method("topk", 0.3) and make_method("uniform").name == "topk"
    (tmp_path / "uniform.json").write_text('{"window": 4}')
    assert all(make_method(n, folder=tmp_path).settings["window"] == 4 for n in ("topk", "uniform"))
    (tmp_path / "topk.json").write_text('{"window": 5}')
    assert make_method("uniform", folder=tmp_path).settings["window"] == 5


GIVEN = {  # setting: a value; two that cannot be combined are rejected wherever they are given
    "plphp": {"retention": 0.5, "keep_tokens": 9, "r": 0.9, "dr": 0.1, "alpha": 0.4, "beta": 0.2},
    "topk": {"retention": 0.5, "keep_tokens": 9, "mass": 0.8, "rates": [0.5]},
    "random": {"retention": 0.5, "keep_tokens": 9, "seed": 3},
}
TOGETHER = {  # combinations that are allowed
    "plphp": {("retention", other) for other in ("dr", "alpha", "beta")}
    | {(a, b) for a in ("r", "dr", "alpha", "beta") for b in ("r", "dr", "alpha", "beta")},
    "topk": set(),
    "random": {("retention", "seed"), ("keep_tokens", "seed")},
}
TOGETHER["plphp-ada"], GIVEN["plphp-ada"] = TOGETHER["plphp"], GIVEN["plphp"]


def ways(setting, value, tmp_path):
    """[(settings in the SPEC, retention, keep_tokens, --set)]: the ways to give one setting."""
    text, file = f"{setting}={json.dumps(value)}".replace(" ", ""), tmp_path / f"{setting}.json"
    file.write_text(json.dumps({setting: value}))
    found = [(text, None, None, []), ("", None, None, [text]), ("", None, None, [f"@{file}"])]
    flag = {"retention": ("", value, None, []), "keep_tokens": ("", None, value, [])}
    return found + [flag[setting]] if setting in flag else found


@pytest.mark.parametrize("name", GIVEN)
def test_nothing_that_is_given_is_dropped(name, tmp_path):
    """Every pair of settings of the kept number, given in the SPEC, by --set, in a file and by flag."""
    tried = 0
    for a, b in itertools.product(GIVEN[name], repeat=2):
        fits = a != b and ((a, b) in TOGETHER[name] or (b, a) in TOGETHER[name])
        first, second = (ways(s, GIVEN[name][s], tmp_path) for s in (a, b))
        for one, two in itertools.product(first, second):
            if a == b and one == two and (one[1] or one[2]):
                continue  # a flag has one value
            spec = f"{name}:" + ",".join(filter(None, (one[0], two[0])))
            arguments = spec.rstrip(":"), one[1] or two[1], one[2] or two[2], [*one[3], *two[3]]
            tried += 1
            if fits:
                found = make_method(*arguments).settings
                assert all(found[s] == GIVEN[name][s] for s in (a, b)), arguments
                continue
            with pytest.raises(ValueError, match="one of them|once") as refused:
                make_method(*arguments)
            message = str(refused.value)
            assert a in message and b in message and "\n" not in message, arguments
    assert tried > 90


def test_a_checkpoints_own_budget_gives_way_to_what_is_given(tmp_path):
    (tmp_path / "plphp.json").write_text('{"retention": 0.4, "alpha": 0.5, "beta": 0.3, "dr": 0.0}')
    given = {"plphp": 0.4, "plphp:r=0.7": 0.7, "plphp:retention=0.2": 0.2, "plphp-ada:r=0.6": 0.6}
    for spec, rate in given.items():
        rule = make_method(spec, folder=tmp_path).rule
        assert rule.rate(0.6) == rule.rate(0.1) == rate and (rule.alpha, rule.beta) == (0.5, 0.3)
    assert make_method("plphp", keep_tokens=7, folder=tmp_path).settings["retention"] is None


OWN = """
import torch

def first(view, *, window=2, part):
    scores = view.attention(window)
    assert scores.shape == (view.q_heads, view.tokens) and scores.dtype == torch.float32
    torch.testing.assert_close(scores.sum(1), torch.ones(view.q_heads))
    keep = torch.ones(view.kv_heads, view.tokens, dtype=torch.bool)
    for start, stop in view.spans:
        keep[:, start + part : stop] = False
    return keep

def ids(view):
    return [0, 1]

def placed(view, window=1, part=7):
    return None

def anything(view, **settings):
    return None

def grouped(view, *, group=3):
    return None

def _hidden(view):
    return None

def wide(view):
    return torch.ones(view.kv_heads, view.tokens + 1, dtype=torch.bool)

number = 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("1 +")
    (tmp_path / "copied.py").write_text("from .budget import best")
    (tmp_path / "helped.py").write_text("from helper import keep")
    (tmp_path / "helper.py").write_text("def keep(view):\n    return None\n")
    (tmp_path / "ends.py").write_text("import sys; sys.exit('bye')")
    (tmp_path / "own.txt").write_text("")
    (tmp_path / "list.json").write_text("[1]")
    return tmp_path


NAMES = "first, ids, placed, anything, grouped, wide"
BAD = {
    "unknown name": (["plphd"], "there is no method 'plphd'; did you mean plphp? use none, plphp, "),
    "an unknown name like no other": (["nope"], "there is no method 'nope'; use none, "),
    "settings after a space": (
        ["topk 0.3"],
        "'topk 0.3' has spaces; settings follow a colon, as in topk:retention=0.5",
    ),
    "a very long name": (["q" * 3000], f"there is no method '{'q' * 80}'; use none"),
    "a name in capitals": (["PLPHP"], "'PLPHP'; did you mean plphp? use none, "),
    "a long unknown name": (["zebra"], "there is no method 'zebra'; use none, "),
    "a setting that is not keyword-only": (
        ["{own}/own.py::placed"],
        "placed takes view, window, part, but a method is called with one",
    ),
    "advice on it": (["{own}/own.py::placed:part=3"], "put *, before window"),
    "settings of any name": (["{own}/own.py::anything:part=3"], "anything takes settings of any name"),
    "a setting with another meaning": (["{own}/own.py::grouped"], "give mean or max (or rename it: retention, keep_"),
    "a copied file": (["{own}/copied.py::best"], "; write `from model.pruning.budget import ...`"),
    "a file without a name": (["{own}/own.py"], f"own.py::NAME (it has {NAMES})"),
    "a file with one colon": (["{own}/own.py:first"], f"own.py::NAME (it has {NAMES})"),
    "no such file, no name": (["{own}/other.py"], "there is no file"),
    "a name nearly right": (["{own}/own.py::frist"], f"'frist'; did you mean first? it has {NAMES}"),
    "a setting nearly right": (["random:sed=3"], "'sed'; did you mean seed? it has "),
    "two methods": (["random+none"], "'random+none'"),
    "a bracket that stays open": (["topk:rates=[0.5,0.5"], "rates"),
    "a number for a method": ([0.5], "float"),
    "pooled and shared": (["random:pooled=true,shared=true"], "one of them"),
    "three methods": (["topk+grid+fastv:layer=1"], "combines"),
    "both budgets": (["random", 0.5, 3], "one of them"),
    "both budgets in the spec": (["random:keep_tokens=3", 0.5], "one of them"),
    "null for a number": (["random:seed=null"], "None"),
    "a file that ends": (["{own}/ends.py::first"], "bye"),
    "no such setting": (["random:speed=3"], "'speed'"),
    "no value": (["random:seed"], "'seed'"),
    "empty value": (["random", None, None, ["seed="]], "'seed='"),
    "text for a number": (["random:seed=x"], "'x'"),
    "fraction for a whole number": (["random:seed=1.5"], "1.5"),
    "yes for a number": (["random:retention=true"], "True"),
    "retention above 1": (["random:retention=1.5"], "1.5"),
    "retention 0": (["random:retention=0"], "0.0"),
    "retention NaN": (["random:retention=NaN"], "nan"),
    "half a token": (["random:keep_tokens=0.5"], "0.5"),
    "no tokens": (["random:keep_tokens=0"], "0"),
    "none with settings": (["none:seed=1"], "seed"),
    "no such file": (["{own}/other.py::first"], "other.py"),
    "no Python file": (["{own}/own.txt::first"], "own.txt"),
    "no such function": (["{own}/own.py::last"], "'last'"),
    "no function at all": (["{own}/own.py::number"], "'number'"),
    "a file that does not parse": (["{own}/broken.py::first"], "SyntaxError"),
    "a needed setting": (["{own}/own.py::first"], "part"),
    "a window below 0": (["{own}/own.py::first:part=1,window=-1"], "-1"),
    "settings without a file": (["random", None, None, ["@{own}/none.json"]], "none.json"),
    "settings that are a list": (["random", None, None, ["@{own}/list.json"]], "list.json"),
    "a budget it does not take": (["{own}/own.py::first:part=1", 0.5], "'retention'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_refused_in_one_line(name, own):
    arguments, word = BAD[name]
    arguments = [
        a.format(own=own) if isinstance(a, str) else [x.format(own=own) for x in a] if isinstance(a, list) else a
        for a in arguments
    ]
    with pytest.raises(ValueError) as refused:
        make_method(*arguments)
    assert word in str(refused.value) and ";" in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_of_ones_own_may_import_what_is_beside_it(own, monkeypatch):
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    before = list(sys.path)
    assert make_method(f"{own}/helped.py::keep").name.endswith("helped.py::keep") and sys.path == before
    with pytest.raises(ValueError):
        make_method(f"{own}/broken.py::keep")
    assert sys.path == before
    sys.modules.pop("helper")


def test_a_file_of_ones_own_may_hold_finished_methods(own):
    (own / "made.py").write_text(
        "from functools import partial\nfrom model.pruning import METHODS\n"
        "few, wide = METHODS['topk'](keep_tokens=3), partial(METHODS['topk'], window=9)\n"
    )
    assert make_method(f"{own}/made.py::few").settings["keep_tokens"] == 3
    wide = make_method(f"{own}/made.py::wide", 0.3).settings
    assert (wide["window"], wide["retention"]) == (9, 0.3)


def test_a_method_of_ones_own_sees_scores_and_decides(demo, own):
    method = make_method(f"{own}/own.py::first:part=7")
    generation = Generation(demo, "Describe the picture.", [DEMO_PICTURE], Sampling(max_new_tokens=2), prune=method)
    "".join(generation)
    assert generation.kept == [7.0] * 6 and generation.timing["prune"] > 0
    for function, word in (("ids", "list"), ("wide", "(4, 270)")):
        method = make_method(f"{own}/own.py::{function}")
        with pytest.raises(InputError) as refused:
            "".join(Generation(demo, "Describe the picture.", [DEMO_PICTURE], prune=method))
        assert word in str(refused.value) and "(4, 269)" in str(refused.value)


@torch.inference_mode()
def test_scores_are_the_attention_of_the_last_rows(backend):
    """The scores that a method gets, against the softmax of queries and keys from a second prefill."""
    demo, seen, wanted = load(DEMO, "fp32", torch.get_default_device()), [], []
    method = Method(
        "look",
        lambda view: seen.append(view.attention(rows=3)) or torch.ones(4, 269, dtype=torch.bool),
        {},
    )
    asked = demo, "Describe the picture.", [DEMO_PICTURE], Sampling(max_new_tokens=1)
    generation = Generation(*asked, prune=method, backend=backend)
    "".join(generation)

    def look(layer, q, k, v):
        scores = q[0, :, -3:].double() @ k[0].double().repeat_interleave(2, 0).transpose(1, 2) * 32**-0.5
        wanted.append((scores + torch.full((3, 269), float("-inf"), dtype=torch.float64).triu(267)).softmax(-1).mean(1))
        return None, None

    x, _ = demo.model.splice(generation.ids, generation.encode_images())
    demo.model.language_model.prefill(x[None], RaggedCache(6), prune=look)
    torch.testing.assert_close(torch.stack(seen).double(), torch.stack(wanted), rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- the whole


def test_keeping_everything_changes_nothing(demo):
    asked = demo, "Describe the picture.", [DEMO_PICTURE]
    plain, kept = Generation(*asked), Generation(*asked, prune=make_method("random", 1.0))
    assert "".join(plain) == "".join(kept) and plain.token_ids == kept.token_ids
    assert kept.kept == plain.kept == [256.0] * 6 and kept.bytes_held == plain.bytes_held


def test_without_pictures_nothing_is_pruned(demo):
    generation = Generation(demo, "What?", sampling=Sampling(max_new_tokens=3), prune=make_method("random", 0.1))
    "".join(generation)
    assert generation.kept == [0.0] * 6 and generation.bytes_held == 6 * 4 * 256 * generation.prompt_tokens


@pytest.mark.parametrize("spec", ["random:retention=0.1", "random:retention=0.02,pooled=true", "random:keep_tokens=1"])
@pytest.mark.parametrize("pictures", [1, 2])
def test_pruned_ids_are_those_of_transformers_with_masks(make_hf_checkpoint, tmp_path, backend, spec, pictures):
    text = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    make_hf_checkpoint(tmp_path, text, vision={"image_size": 84})
    checkpoint = dataclasses.replace(load(tmp_path, "fp32", torch.get_default_device()), stop_ids=())
    method = make_method(spec)
    count = 24 if backend == "torch" else 8  # the interpreter is slow
    asked = checkpoint, "what is left?", [DEMO_PICTURE] * pictures, Sampling(max_new_tokens=count)
    generation = Generation(*asked, prune=method, backend=backend)
    "".join(generation)
    shape = generation.spans, generation.prompt_tokens, 8, 4, 4
    keeps = [method.keep(given_view(*shape, layer)) for layer in range(4)]
    text_tokens = generation.prompt_tokens - generation.vision_tokens
    assert generation.kept == [k.sum().item() / 4 - text_tokens for k in keeps]
    unpruned = Generation(*asked)
    "".join(unpruned)
    assert generation.token_ids != unpruned.token_ids  # otherwise the test could not fail
    ids, _ = masked_ids(tmp_path, generation, lambda layer, attention: keeps[layer].cpu(), count)
    assert generation.token_ids == ids


def test_settings_are_valid_json(demo):
    assert json.loads(json.dumps(make_method("random").settings))["seed"] == 0
