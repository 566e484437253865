"""PLPHP: its rates, its choice of tokens, and the whole against transformers with independently made masks."""

import dataclasses
import math

import pytest
import torch

from model import Generation, Sampling, load
from model.pruning import make_method
from model.pruning.plphp import Plphp, PlphpAda, gamma
from tests.given import given_view
from tests.oracle import masked_ids
from tests.paths import DEMO, DEMO_PICTURE


@pytest.mark.parametrize(
    ("gamma", "rate"), [(0.25, 0.7), (0.2499, 0.4), (0.1, 0.4), (0.0999, 0.1), (1.0, 0.7), (0.0, 0.1)]
)
def test_three_classes_with_their_borders(gamma, rate):
    """At alpha a layer is attentive, at beta balanced."""
    assert Plphp().rate(gamma) == pytest.approx(rate)


def test_rates_stay_between_nothing_and_everything():
    assert Plphp(r=0.9, dr=0.3).rate(1.0) == 1.0 and Plphp(r=0.2, dr=0.3).rate(0.0) == 0.0
    for wanted, dr in ((0.5, 0.3), (0.2, 0.15), (0.3, 0.225), (0.9, 0.1), (1.0, 0.0)):  # dr = min(dr, 0.75 F, 1 - F)
        method = make_method("plphp", wanted).rule
        assert method.rate(1.0) == pytest.approx(wanted + dr) and method.rate(0.0) == pytest.approx(wanted - dr)
        assert method.rate(0.2) == wanted
    same = Plphp(alpha=0.2, beta=0.2)  # no layer is balanced
    assert same.rate(0.2) == pytest.approx(0.7) and same.rate(0.1999) == pytest.approx(0.1)


def test_the_first_layers_are_spared():
    def pruned(method, num_layers):
        views = [given_view([(1, 5)], 6, layer=i, num_layers=num_layers) for i in range(num_layers)]
        return [method.keep(view) is not None for view in views]

    assert pruned(Plphp(), 6) == [False] + [True] * 5
    assert pruned(Plphp(), 12) == [False] * 2 + [True] * 10
    assert all(pruned(Plphp(skip=0), 6)) and not any(pruned(Plphp(skip=6), 6))


def test_each_head_keeps_its_own_best_of_each_picture():
    """Two pictures with text around them; the second has one token, which every rate keeps."""
    scores = torch.tensor([
        [9, 1, 5, 3, 4, 9, 0, 9],  # KV head 0
        [9, 3, 1, 3, 2, 9, 0, 9],
        [9, 0, 0, 8, 8, 9, 0, 9],  # KV head 1
        [9, 0, 0, 0, 8, 9, 0, 9],
    ]) / 64  # fmt: skip
    view = given_view([(1, 5), (6, 7)], 8, layer=3, scores=scores)
    assert gamma(scores, view.spans) == pytest.approx(float((scores[:, 1:5].sum() + scores[:, 6].sum()) / 4))
    half = {"r": 0.5, "dr": 0.0, "skip": 0}
    mean, most = (Plphp(**half, group=g).keep(view).int().tolist() for g in ("mean", "max"))
    assert mean == [[1, 0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 1, 1, 1, 1]]
    assert most == [[1, 0, 1, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1, 1, 1]]
    none = Plphp(r=0.0, dr=0.0, skip=0).keep(view)
    assert none.sum(1).tolist() == [5, 5]  # text, and at least one token of each picture


def test_ties_go_to_the_lower_index_and_counts_round_half_up():
    view = given_view([(1, 11)], 12, scores=torch.full((4, 12), 1 / 12))
    for rate, count in ((0.25, 3), (0.24, 2), (0.05, 1), (0.95, 10)):
        keep = Plphp(r=rate, dr=0.0, skip=0).keep(view)[:, 1:11]
        assert keep.int().tolist() == [[1] * count + [0] * (10 - count)] * 2
    assert make_method("plphp:skip=0", keep_tokens=4).keep(view)[:, 1:11].sum(1).tolist() == [4, 4]


def test_ada_divides_the_same_budget_unevenly():
    scores = torch.rand(4, 42)
    scores[:2] *= 5  # KV head 0 attends more to the picture
    view = given_view([(1, 41)], 42, scores=scores)
    even, uneven = (m(r=0.5, dr=0.0, skip=0).keep(view) for m in (Plphp, PlphpAda))
    assert (
        even.sum() == uneven.sum() and uneven[0].sum() > uneven[1].sum() == 2 + 4
    )  # text and the floor: a fifth of 20
    assert PlphpAda(r=0.5, dr=0.0, skip=0, floor=1.0).keep(view).equal(even)
    heads = scores.view(2, 2, 42).mean(1)
    for keep, row in zip(uneven, heads, strict=True):  # within a head the best are kept
        assert row[1:41][keep[1:41]].min() >= row[1:41][~keep[1:41]].max()


BAD = {
    "thresholds crossed": ("plphp:alpha=0.1,beta=0.2", "alpha 0.1"),
    "rate above 1": ("plphp:r=1.5", "1.5"),
    "negative spread": ("plphp:dr=-0.1", "-0.1"),
    "retention above 1": ("plphp:retention=1.5", "1.5"),
    "retention 0": ("plphp:retention=0", "0"),
    "group": ("plphp:group=sum", "'sum'"),
    "skip": ("plphp:skip=-1", "-1"),
    "no window": ("plphp:window=0", "0"),
    "floor": ("plphp-ada:floor=2", "2"),
    "a floor where there is none": ("plphp:floor=0.5", "'floor'"),
    "both budgets": ("plphp:retention=0.5,keep_tokens=3", "one of them"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be_meant_are_refused(name):
    spec, word = BAD[name]
    with pytest.raises(ValueError) as refused:
        make_method(spec)
    assert word in str(refused.value) and ";" in str(refused.value)


# ---------------------------------------------------------------- the whole


def plphp_by_hand(spans, group, ada):
    """choose(layer, attention) for `masked_ids`: PLPHP with the defaults, written with loops and numbers."""
    classes = []

    def choose(layer, attention):
        hq, tokens = attention.shape
        hkv = hq // group
        rows = attention.double()
        seen = sum(rows[h, j].item() for h in range(hq) for a, b in spans for j in range(a, b)) / hq
        kind = "attentive" if seen >= 0.25 else "indifferent" if seen < 0.1 else "balanced"
        classes.append(kind)
        keep = torch.ones(hkv, tokens, dtype=torch.bool)
        if layer < 1:
            return keep
        rate = {"attentive": 0.7, "balanced": 0.4, "indifferent": 0.1}[kind]
        for a, b in spans:
            count = max(1, math.floor(rate * (b - a) + 0.5))
            worth = {(h, j): sum(rows[h * group + g, j].item() for g in range(group)) / group
                     for h in range(hkv) for j in range(a, b)}  # fmt: skip
            ranked = sorted(worth, key=lambda pair: (-worth[pair], pair))
            chosen = [pair for h in range(hkv) for pair in [p for p in ranked if p[0] == h][: share(count, ada)]]
            chosen += [pair for pair in ranked if pair not in chosen][: count * hkv - len(chosen)]
            keep[:, a:b] = False
            for h, j in chosen:
                keep[h, j] = True
        return keep

    return choose, classes


class Spy:
    """Wraps a method's rule and records its masks."""

    def __init__(self, rule, answers):
        self.rule, self.answers = rule, answers

    def keep(self, view):
        keep = self.rule.keep(view)
        self.answers.extend([] if keep is None else [keep])
        return keep


def share(count, ada):
    """Tokens a head keeps before the rest is divided."""
    return max(1, int(0.2 * count)) if ada else count


@pytest.mark.parametrize("spec", ["plphp", "plphp-ada"])
@pytest.mark.parametrize(("heads", "pictures"), [((4, 4), 1), ((8, 2), 1), ((8, 4), 3)])
def test_ids_and_kept_sets_are_those_of_transformers_with_masks(
    make_hf_checkpoint, tmp_path, backend, spec, heads, pictures
):
    if backend == "triton" and (spec, pictures) != ("plphp-ada", 1):
        pytest.skip("the kernels do not know the method; one case of unequal lengths is enough in the interpreter")
    text = {"num_hidden_layers": 4, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    make_hf_checkpoint(tmp_path, text, vision={"image_size": 84}, seed=3)
    checkpoint = dataclasses.replace(load(tmp_path, "fp32", torch.get_default_device()), stop_ids=())
    prompt = "what is <image> and <image> left of <image> there?" if pictures == 3 else "what is left?"
    asked = checkpoint, prompt, [DEMO_PICTURE] * pictures, Sampling(max_new_tokens=24)
    method, ours = make_method(spec), []
    spy = dataclasses.replace(method, rule=Spy(method.rule, ours))
    generation = Generation(*asked, prune=spy, backend=backend)
    "".join(generation)
    choose, classes = plphp_by_hand(generation.spans, heads[0] // heads[1], spec == "plphp-ada")
    ids, kept = masked_ids(tmp_path, generation, choose, 24)
    assert kept[0].all() and len(ours) == len(kept) - 1  # the first layer is not pruned
    for layer, (a, b) in enumerate(zip(ours, kept[1:], strict=True), 1):
        assert torch.equal(a.cpu(), b), f"layer {layer} ({classes[layer]})"
    assert generation.token_ids == ids
    unpruned = Generation(*asked)
    "".join(unpruned)
    assert generation.token_ids[0] == unpruned.token_ids[0]  # prefill is not pruned


def test_more_rows_rank_but_gamma_is_the_last_ones():
    """The layer's class follows the last row, whatever the window."""
    demo = load(DEMO, "fp32")
    kept = {}
    for settings in ("window=1", "window=32", "window=32,values=true"):
        spec = f"plphp:r=0.5,dr=0.3,alpha=0.7,beta=0.6,{settings}"
        asked = demo, "Describe the picture.", [DEMO_PICTURE], Sampling(max_new_tokens=2)
        generation = Generation(*asked, prune=make_method(spec))
        "".join(generation)
        kept[settings] = generation.kept
    assert len({tuple(k) for k in kept.values()}) == 1 and len(set(kept["window=1"])) > 2


def test_the_first_token_is_that_of_the_unpruned_model_and_text_stays():
    demo = load(DEMO, "fp32")
    asked = demo, "Describe the picture.", [DEMO_PICTURE], Sampling(max_new_tokens=1)
    pruned, plain = Generation(*asked, prune=make_method("plphp", 0.1)), Generation(*asked)
    assert "".join(pruned) == "".join(plain) and pruned.bytes_held < plain.bytes_held


def test_keeping_all_by_rate_is_no_pruning():
    demo = load(DEMO, "fp32")
    asked = demo, "Describe the picture.", [DEMO_PICTURE]
    pruned, plain = Generation(*asked, prune=make_method("plphp:r=1,dr=0")), Generation(*asked)
    assert "".join(pruned) == "".join(plain) and pruned.kept == [256.0] * 6
