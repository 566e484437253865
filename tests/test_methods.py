"""Every method: its parts against loops, the whole against masked transformers, and what it must never do."""

import dataclasses
import functools
import itertools
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model import Generation, Sampling, load, out_of_memory
from model.cache import RaggedCache
from model.console import explain
from model.pruning import METHODS, Composition, Method, MethodError, make_method
from model.pruning.budget import best, budget, by_head, later, mass, pooled, select
from model.pruning.plphp import Plphp, gamma
from model.view import Pruning, View, pruned_prefill
from tests.given import given_view
from tests.oracle import masked_ids, small_llama
from tests.paths import DEMO_PICTURE
from tests.sizes import Sizes

NAMES = [name for name in METHODS if name not in ("none", "yopo")]  # yopo needs a table: tests/test_yopo.py
IN_MODEL = [name for name in NAMES if not make_method(name).picks]  # the others: tests/test_pick.py
BUDGETED = [name for name in IN_MODEL if "keep_tokens" in make_method(name).settings]
UNEVEN = {"plphp-ada", "adakv"}  # the heads of a layer keep different numbers
NARROWING = {"fastv", "g-search", "pyramiddrop", "sparsevlm", "zipvl"}  # hidden states change


# ---------------------------------------------------------------- pieces

FEW = settings(max_examples=50, deadline=None)
# rows of small integers: sums are exact and ties are common
ROWS = st.tuples(st.integers(1, 4), st.integers(1, 12)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(0, 4), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)


def ranked(row):
    """Indices from the highest to the lowest, equal ones in their order."""
    return sorted(range(len(row)), key=lambda j: (-row[j], j))


def divided(rows, count, floor):
    """First every row's floor, then the best remaining pairs; ties by row, then by token."""
    chosen = [(h, j) for h, row in enumerate(rows) for j in ranked(row)[: max(1, int(floor * count))]]
    rest = [(h, j) for h, row in enumerate(rows) for j in range(len(row)) if (h, j) not in chosen]
    rest.sort(key=lambda pair: (-rows[pair[0]][pair[1]], pair))
    return {*chosen, *rest[: len(rows) * count - len(chosen)]}


def pairs(keep):
    """bool (H, n) -> {(head, token)}."""
    return {tuple(pair) for pair in keep.nonzero().tolist()}


@pytest.mark.parametrize(
    ("tokens", "retention", "kept"),
    [(576, 0.1, 58), (10, 0.25, 3), (10, 0.24, 2), (10, 0.0, 1), (10, 1.0, 10), (10, 7.0, 10), (1, 0.4, 1)],
)
def test_budget_rounds_half_up_within_its_bounds(tokens, retention, kept):
    assert budget(tokens, retention) == kept
    assert budget(tokens, retention, 4) == min(4, tokens)


@FEW
@given(ROWS, st.data())
def test_every_row_may_have_its_own_count(rows, data):
    counts = data.draw(st.lists(st.integers(0, len(rows[0]) + 2), min_size=len(rows), max_size=len(rows)))
    wanted = {(h, j) for h, row in enumerate(rows) for j in ranked(row)[: counts[h]]}
    assert pairs(best(torch.tensor(rows).float(), torch.tensor(counts)[:, None])) == wanted


def test_many_equal_scores_keep_their_order():
    assert best(torch.zeros(5000), 1700).nonzero()[:, 0].tolist() == list(range(1700))  # an unstable sort would not


def test_a_table_of_rates_has_a_number_for_each_layer_or_head():
    table = [0.25, [0.0, 1.0, 0.75]]
    assert by_head(table, 0, 3, 10).tolist() == [[3], [3], [3]]  # 2.5 is rounded up
    assert by_head(table, 1, 3, 10).tolist() == [[1], [10], [8]]


@FEW
@given(ROWS, st.data(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_a_pot_is_divided_by_rank_above_a_floor(rows, data, floor):
    count = data.draw(st.integers(1, len(rows[0])))
    assert pairs(pooled(torch.tensor(rows).float(), count, floor)) == divided(rows, count, floor)


@FEW
@given(ROWS, st.integers(1, 8))
def test_mass_is_the_fewest_tokens_that_hold_the_share(rows, eighths):
    wanted = set()
    for h, row in enumerate(rows):
        count = next(
            c for c in range(1, len(row) + 1) if sum(row[j] for j in ranked(row)[:c]) * 8 >= eighths * sum(row)
        )
        wanted |= {(h, j) for j in ranked(row)[:count]}  # a row of zeros keeps one token, which holds all of its mass
    assert pairs(mass(torch.tensor(rows).float(), eighths / 8)) == wanted


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1 / 576])
def test_mass_of_equal_tokens_is_that_share_of_them(value):
    """The sums are inexact in fp32; rounding must not add a token."""
    for n in (4, 8, 36, 576):
        scores = torch.full((1, n), value)
        assert [mass(scores, q / 4).sum().item() for q in (1, 2, 3, 4)] == [n // 4, n // 2, 3 * n // 4, n]


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_picture_is_starved_only_where_all_are_ranked_together(kv_heads):
    place = given_view([(0, 4), (6, 8), (8, 12)], 12, kv_heads=kv_heads)  # two pictures are adjacent
    scores = torch.arange(12.0).expand(kv_heads, 12)  # the last picture has the best scores
    asked = []

    def choose(s):
        asked.append(s[0].tolist())
        return best(s, 2)

    each = select(scores, place, choose, "image")
    together = select(scores, place, choose, "vision")
    assert asked == [[0, 1, 2, 3], [6, 7], [8, 9, 10, 11], [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]]
    assert each[0].int().tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1]
    assert together[0].int().tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    assert select(scores, given_view([], 12, kv_heads=kv_heads), choose, "vision").all()


@FEW
@given(st.data())
def test_guards_and_text_wherever_the_pictures_are(data):
    """Also for a picture at the start or end of the prompt, and for guards longer than the prompt."""
    assert guarded([(0, 6)], 6, 1, 2) == [True, False, False, False, True, True]
    kinds = data.draw(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=5))
    sink, recent = data.draw(st.tuples(st.integers(0, 22), st.integers(0, 22)))
    vision = [picture for picture, n in kinds for _ in range(n)]
    ends = list(itertools.accumulate(n for _, n in kinds))
    spans = [(end - n, end) for (picture, n), end in zip(kinds, ends, strict=True) if picture]
    wanted = [not v or i < sink or i >= len(vision) - recent for i, v in enumerate(vision)]
    assert guarded(spans, len(vision), sink, recent) == wanted


def guarded(spans, tokens, sink, recent):
    """What is left of a prompt if a method drops all that it may, in its only head."""
    guards = {"sink": sink, "recent": recent}
    view = given_view(spans, tokens, 1, 1)
    nothing = make_method(lambda view: torch.zeros(1, tokens, dtype=torch.bool), settings=guards)
    return nothing.keep(view)[0].tolist()


def random_view(layer=1, spans=((4, 29),), tokens=70):
    """A view of random queries, keys and values; 4 heads over 2 KV heads."""
    q, k, v = torch.randn(3, 1, 4, tokens, 8)
    return View(layer, 4, q, k[:, :2], v[:, :2], list(spans), backend="torch")


@pytest.mark.parametrize("name", ["random", "topk", "fastv:layer=2"])
def test_the_key_that_attention_is_parked_on_stays(name):
    """In each KV head, the most attended keys of the last 32 rows, or of all rows after the picture if fewer."""
    parked = 0
    for end in (29, 60):  # 41 and 10 rows follow
        view = random_view(spans=[(4, end)])
        method = make_method(name, keep_tokens=1, settings={"sink_keys": 3})
        rows = min(32, 70 - end)
        scores = view.queries(rows).double() @ view.keys.double().repeat_interleave(2, 0).mT * 8**-0.5
        scores = scores.masked_fill(torch.ones(rows, 70).triu(70 - rows + 1).bool(), float("-inf"))
        top = scores.softmax(-1).mean(1).view(2, 2, -1).mean(1).topk(3).indices
        sinks = torch.zeros(2, 70, dtype=torch.bool).scatter(1, top, True)
        keep = answer(method, view)
        assert keep[sinks].all() and (keep[:, 4:end].sum(1) <= (7 if method.narrows else 4)).all()
        parked += sinks[:, 4:end].sum()
    assert parked  # otherwise the sinks are all text


def answer(method, view):
    """keep (Hkv, T); for a method that narrows the prompt or its attention, the same in every head."""
    if method.attends:
        chosen = method.attend(view)
        return (view.text | True if chosen is None else chosen).expand(view.kv_heads, -1)
    return method.narrow(view).expand(view.kv_heads, -1) if method.narrows else method.keep(view)


@pytest.mark.parametrize("spec", ["topk", "plphp:skip=0", "snapkv:kernel=1,window=1", "shared"])
def test_value_norms_weigh_the_attention(spec):
    """A method with `values` ranks by attention times the L1 norm of each token's value row."""
    view = random_view()
    worth = view.attention().view(2, 2, -1).mean(1) * view.values.abs().sum(-1)
    worth = worth.mean(0).expand(2, -1) if spec == "shared" else worth
    kept = [make_method(spec, keep_tokens=9, settings={"values": v}).keep(view)[:, 4:29] for v in (True, False)]
    assert [row.nonzero()[:, 0].tolist() for row in kept[0]] == [sorted(ranked(w)[:9]) for w in worth[:, 4:29].tolist()]
    assert not kept[0].equal(kept[1])  # otherwise the test could not fail


def test_random_tokens_differ_by_head_layer_and_seed():
    views = [given_view([(5, 30), (33, 58)], 60, num_layers=3, layer=layer) for layer in range(3)]
    first, second, again, other = (
        make_method(f"random:seed={seed}", 0.3).keep(view)
        for view, seed in zip((views[0], views[1], views[1], views[1]), (0, 0, 0, 7), strict=True)
    )
    assert again.equal(second) and not first.equal(second) and not second.equal(other)
    assert not first[0].equal(first[1])
    alike = [make_method("random:shared=true", keep_tokens=6).keep(view) for view in views]
    assert all(keep[0].equal(keep[1]) for keep in alike) and not alike[0].equal(alike[1])
    pots = torch.stack([make_method("random:pooled=true", keep_tokens=6).keep(view)[:, 5:30].sum(1) for view in views])
    assert (pots.sum(1) == 12).all() and (pots[:, 0] != pots[:, 1]).any()


# ---------------------------------------------------------------- PLPHP


@pytest.mark.parametrize(
    ("share", "rate"), [(0.25, 0.7), (0.2499, 0.4), (0.1, 0.4), (0.0999, 0.1), (1.0, 0.7), (0.0, 0.1)]
)
def test_three_classes_with_their_borders(share, rate):
    """At alpha a layer is attentive, at beta balanced."""
    assert Plphp().rate(share) == pytest.approx(rate)


def test_rates_stay_between_nothing_and_everything():
    assert Plphp(r=0.9, dr=0.3).rate(1.0) == 1.0 and Plphp(r=0.2, dr=0.3).rate(0.0) == 0.0
    for wanted, dr in ((0.5, 0.3), (0.2, 0.15), (0.3, 0.225), (0.9, 0.1), (1.0, 0.0)):  # dr = min(dr, 0.75 F, 1 - F)
        method = make_method("plphp", wanted).rule
        assert method.rate(1.0) == pytest.approx(wanted + dr) and method.rate(0.0) == pytest.approx(wanted - dr)
        assert method.rate(0.2) == wanted
    same = Plphp(alpha=0.2, beta=0.2)  # no layer is balanced
    assert same.rate(0.2) == pytest.approx(0.7) and same.rate(0.1999) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("method", "layers", "spared"), [(Plphp(), 6, 1), (Plphp(), 12, 2), (Plphp(skip=0), 6, 0), (Plphp(skip=6), 6, 6)]
)
def test_the_first_layers_are_spared(method, layers, spared):
    views = [given_view([(1, 5)], 6, layer=i, num_layers=layers) for i in range(layers)]
    assert [method.keep(view) is None for view in views] == [True] * spared + [False] * (layers - spared)


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


def test_more_rows_rank_but_gamma_is_the_last_ones():
    """The layer's class follows the last row, whatever the window."""
    view = random_view()
    last, mean = (gamma(view.attention(rows), view.spans) for rows in (1, 32))
    border = (last + mean) / 2
    for window in (1, 32):
        keep = Plphp(r=0.5, dr=0.3, alpha=border, beta=border, window=window).keep(view)
        assert keep[:, 4:29].sum(1).tolist() == [20 if last > mean else 5] * 2


# ---------------------------------------------------------------- any method

GRIDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)  # rows, columns of pictures
BUDGETS = st.one_of(
    st.floats(0.01, 1).map(lambda f: {"retention": f}), st.integers(1, 90).map(lambda n: {"keep_tokens": n})
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(BUDGETED), GRIDS, BUDGETS, st.sampled_from([(4, 4), (8, 2), (6, 1)]), st.integers(0, 3))
def test_every_method_keeps_exactly_its_budget(name, grids, wanted, heads, gap):
    """Pictures of different shapes, with and without text between them, any number of heads; results repeat exactly."""
    spans, places, end = [], [], 2
    for rows, columns in grids:
        spans.append((end, end + rows * columns))
        places.append(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)))
        end += rows * columns + gap
    view = given_view(spans, end + 3, *heads, places=places)
    method = make_method(f"{name}:dr=0" if name.startswith("plphp") and "retention" in wanted else name, **wanted)
    keep = answer(method, view)
    for a, b in spans:
        count = wanted["keep_tokens"] if "keep_tokens" in wanted else math.floor(wanted["retention"] * (b - a) + 0.5)
        count, kept = max(1, min(count, b - a)), keep[:, a:b].sum(1)
        assert kept.sum() == heads[1] * count and (name in UNEVEN or kept.tolist() == [count] * heads[1])
        assert kept.min() >= 1
    assert keep[:, view.text].all() and keep.equal(answer(method, view))


@pytest.mark.parametrize("name", BUDGETED)
def test_pictures_may_share_a_budget(name):
    """20 of all their tokens; separate budgets would keep 20 of each."""
    view = given_view([(3, 40), (45, 70), (70, 100)], 110, 8, 4)
    keep = answer(make_method(f"{name}:scope=vision", keep_tokens=20), view)
    assert keep[:, ~view.text].sum() == 4 * 20 and keep[:, view.text].all()
    assert name in UNEVEN or keep.sum(1).unique().tolist() == [110 - 92 + 20]


@pytest.fixture(scope="module")
def small(make_checkpoint, tmp_path_factory):
    """A checkpoint of random weights: 4 layers, 4 heads over 2 KV heads, 36 tokens a picture."""
    folder = tmp_path_factory.mktemp("small")
    make_checkpoint(folder, {"num_hidden_layers": 4}, {"image_size": 84}, seed=3)
    return load(folder, "fp32")


@functools.cache
def pictures(count):
    """`count` different pictures, the demo's first."""
    with Image.open(DEMO_PICTURE) as picture:
        return [picture.convert("RGB").rotate(90 * i) for i in range(count)]


QUESTIONS = {  # name: (question, number of pictures, template)
    "one": ("what is left?", 1, "auto"),
    "three": ("what is <image> and <image> left of <image> there?", 3, "auto"),
    "last": ("what is left of <image> in <image>", 2, "raw"),  # a picture ends the prompt
    "none": ("what is left?", 0, "auto"),
}


def answered(checkpoint, question, tokens, prune=None, backend="torch"):
    """The finished answer to one of the QUESTIONS, with at most `tokens` tokens."""
    prompt, count, template = QUESTIONS[question]
    generation = Generation(
        checkpoint, prompt, pictures(count), Sampling(tokens), template, prune=prune, backend=backend
    )
    "".join(generation)
    return generation


@pytest.mark.parametrize(
    ("spec", "retention"),
    [
        *((n, 1.0) for n in NAMES if n != "h2o" and "retention" in make_method(n).settings),
        ("h2o:extra_tokens=8", 1.0),
        *((spec, None) for spec in ("plphp:r=1,dr=0,skip=0", "pyramiddrop:stages=[]", "pyramiddrop:ratios=[1,1,1]")),
        ("plphp:skip=4", 0.1),
        ("mustdrop:threshold=1,individual_threshold=0", None),
    ],  # fmt: skip
)
def test_keeping_everything_is_no_pruning(small, spec, retention):
    pruned, plain = answered(small, "last", 8, make_method(spec, retention)), answered(small, "last", 8)
    assert pruned.token_ids == plain.token_ids and pruned.text == plain.text
    assert pruned.kept == plain.kept == [72.0] * 4 and pruned.bytes_held == plain.bytes_held
    assert pruned.notes == []


@pytest.mark.parametrize("name", [n for n in IN_MODEL if n not in NARROWING])
def test_dropping_k_and_v_does_not_change_the_first_token(small, name):
    """The prompt's hidden states are unchanged, so its logits are equal bit for bit."""
    pruned, plain = (Generation(small, "what?", pictures(1), prune=p) for p in (make_method(name, keep_tokens=1), None))
    with torch.inference_mode():
        assert pruned.prefill().equal(plain.prefill())
    assert pruned.bytes_held < plain.bytes_held and min(pruned.kept) == 1.0
    assert answered(small, "three", 1, make_method(name, 0.1)).token_ids == answered(small, "three", 1).token_ids


@pytest.mark.parametrize("name", NAMES)
def test_without_a_picture_nothing_is_dropped_and_a_note_says_so(small, name):
    pruned, plain = answered(small, "none", 4, make_method(name)), answered(small, "none", 4)
    assert pruned.token_ids == plain.token_ids and pruned.bytes_held == plain.bytes_held
    assert pruned.kept == [0.0] * 4 and plain.notes == []
    "".join(pruned)
    (note,) = pruned.notes  # asking again does not repeat it
    assert name in note and "no picture" in note


LONG = 700  # tokens; many more than the 32 channels


@pytest.mark.parametrize("name", ["none", *IN_MODEL])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_no_prefill_holds_a_whole_matrix_of_attention(name, kv_heads):
    model, cache = small_llama(kv_heads=kv_heads), RaggedCache(3, backend="torch")
    method, spans, x = make_method(name), [(20, 320), (320, 650)], torch.randn(1, LONG, 32)
    contrast = [torch.linspace(0, 1, stop - start) for start, stop in spans]
    pruning = method and Pruning(method, 3, spans, contrast=lambda: contrast, backend="torch", embeddings=x[0])
    with Sizes() as sizes:
        pruned_prefill(model, x[0], cache, pruning)
    assert sizes.where and sizes.largest < LONG**2, sizes.where
    assert not method or cache.kv_len.min() < LONG  # something was pruned


def test_a_whole_matrix_of_attention_would_be_noticed():
    q, k = torch.randn(2, 1, LONG, 8)
    with Sizes() as sizes:
        (q @ k.transpose(1, 2)).softmax(-1)
    assert sizes.largest == LONG**2
    with Sizes() as sizes:  # with a mask SDPA needs as much memory
        F.scaled_dot_product_attention(q, k, k, attn_mask=torch.ones(LONG, LONG).tril().bool())
    assert sizes.largest == LONG**2


# ---------------------------------------------------------------- against transformers


@pytest.fixture(scope="module")
def oracle(make_hf_checkpoint, tmp_path_factory):
    """A folder and its checkpoint: 4 layers, 8 query heads over 2 KV heads, 36 tokens a picture, no stop id."""
    folder = tmp_path_factory.mktemp("oracle")
    text = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    make_hf_checkpoint(folder, text, vision={"image_size": 84}, seed=3)
    return folder, dataclasses.replace(load(folder, "fp32"), stop_ids=())


@pytest.fixture
def answers(monkeypatch):
    """The masks that the methods return, in call order."""
    found = []

    def listening(ask):
        def asked(method, view):
            keep = ask(method, view)
            found.extend([] if keep is None else [keep])
            return keep

        return asked

    for name in ("keep", "narrow"):
        monkeypatch.setattr(Method, name, listening(getattr(Method, name)))
    return found


# rules in loops: layer, worth (Hkv, n) of a picture and gamma of the layer -> {(head, token)}


def count_of(rate, n):
    return max(1, math.floor(rate * n + 0.5))


def own(rate):
    """Each head keeps its own best. rate (layer, head, gamma) -> fraction."""

    def rule(layer, worth, share):
        counts = [count_of(rate(layer, h, share), len(row)) for h, row in enumerate(worth)]
        return {(h, j) for h, row in enumerate(worth) for j in ranked(row)[: counts[h]]}

    return rule


def one_pot(rate):
    """The best pairs, with a floor of a fifth of an even share per head."""
    return lambda layer, worth, share: divided(worth, count_of(rate(layer, 0, share), len(worth[0])), 0.2)


def one_set(layer, worth, share):
    """All heads keep the best half by the sum."""
    total = [sum(column) for column in zip(*worth, strict=True)]
    return {(h, j) for h in range(len(worth)) for j in ranked(total)[: count_of(0.5, len(total))]}


def portion(layer, worth, share):
    """The tokens that hold 0.6 of a head's attention to the picture."""
    chosen = set()
    for h, row in enumerate(worth):
        held = 0.0
        for j in ranked(row):
            chosen.add((h, j))
            held += row[j]
            if held >= 0.6 * sum(row):
                break
    return chosen


def around(row, j):
    """A token and its neighbours within the picture, two on each side."""
    return row[max(0, j - 2) : j + 3]


def half(layer, head, share):
    return 0.5


def plphp_rate(layer, head, share):
    """The first layer is not pruned."""
    return 1.0 if layer == 0 else 0.7 if share >= 0.25 else 0.1 if share < 0.1 else 0.4


PER_LAYER, PER_HEAD = [0.1, 1.0, 0.25, 0.5], [[0.1, 0.9], 0.3, [1.0, 0.0], [0.5, 0.25]]
RULES = {  # (spec, further settings): (window, smoothing (row, token) -> number, rule)
    ("plphp",): (1, None, own(plphp_rate)),
    ("plphp:window=3",): (3, None, own(plphp_rate)),
    ("plphp-ada",): (1, None, one_pot(plphp_rate)),
    ("topk",): (1, None, own(half)),
    ("topk:window=3,retention=0.5",): (3, None, own(half)),
    ("topk:mass=0.6",): (1, None, portion),
    ("topk", f"rates={json.dumps(PER_LAYER)}"): (1, None, own(lambda layer, head, share: PER_LAYER[layer])),
    ("topk", f"rates={json.dumps(PER_HEAD)}"): (
        1, None, own(lambda layer, head, share: PER_HEAD[layer][head] if layer != 1 else 0.3),
    ),
    ("shared",): (1, None, one_set),
    ("snapkv",): (32, lambda row, j: sum(around(row, j)) / 5, own(half)),
    ("snapkv:pool=max,window=4",): (4, lambda row, j: max(around(row, j)), own(half)),
    ("adakv",): (32, lambda row, j: sum(around(row, j)) / 5, one_pot(half)),
}  # fmt: skip


def by_hand(rule, smooth, spans, group):
    """choose(layer, attention) for `masked_ids`: average over rows, then heads, then neighbours."""

    def choose(layer, attention):
        rows = attention.double() if attention.ndim == 3 else attention.double()[:, None]  # (Hq, W, T)
        heads = [rows[h : h + group].mean((0, 1)).tolist() for h in range(0, len(rows), group)]
        share = sum(row[-1, a:b].sum().item() for row in rows for a, b in spans) / len(rows)
        keep = torch.ones(len(heads), rows.shape[2], dtype=torch.bool)
        for a, b in spans:
            worth = [row[a:b] for row in heads]
            if smooth:
                worth = [[smooth(row, j) for j in range(b - a)] for row in worth]
            keep[:, a:b] = False
            for h, j in rule(layer, worth, share):
                keep[h, a + j] = True
        return keep

    return choose


@pytest.mark.parametrize("case", RULES, ids=" ".join)
@pytest.mark.parametrize("question", ["one", "three", "last"])
def test_kept_sets_and_ids_are_those_of_transformers_with_masks(oracle, answers, case, question):
    """The window stops after the last picture, or has 1 row if that ends the prompt."""
    (spec, *more), (window, smooth, rule) = case, RULES[case]
    folder, checkpoint = oracle
    generation = answered(checkpoint, question, 24, make_method(spec, settings=more))
    behind = generation.prompt_tokens - generation.spans[-1][1]
    assert (behind == 0) if question == "last" else (4 <= behind < 32)
    rows = max(1, min(window, behind))
    ids, kept = masked_ids(folder, generation, by_hand(rule, smooth, generation.spans, 4), 24, rows)
    spared = len(kept) - len(answers)  # layers that a method leaves alone
    assert spared == ("plphp" in spec) and all(keep.all() for keep in kept[:spared])
    assert [torch.equal(a, b) for a, b in zip(answers, kept[spared:], strict=True)] == [True] * (4 - spared)
    assert generation.token_ids == ids
    assert answered(checkpoint, question, 24).token_ids != ids  # otherwise pruning would have no effect here


def test_kernels_answer_alike_whatever_each_head_keeps(oracle, backend):
    folder, plain = oracle
    checkpoint = dataclasses.replace(load(folder, "fp32", torch.get_default_device()), stop_ids=())
    for spec in ("plphp-ada", "random:retention=0.02,pooled=true"):  # some heads keep no token of the picture
        found = answered(checkpoint, "one", 8, make_method(spec), backend)
        with torch.device("cpu"):
            assert found.token_ids == answered(plain, "one", 8, make_method(spec)).token_ids


def narrow_by_hand(spans, layer, count):
    """narrow(layer, attention) for `masked_ids`: the best of each picture by the last row, plus the last row."""

    def narrow(at, attention):
        if at != layer - 1:
            return None
        mean = [sum(column) / len(attention) for column in zip(*attention.tolist(), strict=True)]
        keep = torch.ones(len(mean), dtype=torch.bool)
        for a, b in spans:
            for j in ranked(mean[a:b])[count:]:
                keep[a + j] = False
        keep[-1] = True  # it predicts the next token
        return keep

    return narrow


@pytest.mark.parametrize("question", ["one", "three", "last"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fastv_is_hiding_columns_from_every_row_of_later_layers(oracle, answers, layer, question):
    """The last token stays even if it belongs to a picture, because the answer continues from it."""
    folder, checkpoint = oracle
    generation = answered(checkpoint, question, 24, make_method(f"fastv:layer={layer}", 0.25))
    everything = torch.ones(2, generation.prompt_tokens, dtype=torch.bool)
    narrow = narrow_by_hand(generation.spans, layer, 9)  # a quarter of 36
    ids, kept = masked_ids(folder, generation, lambda *_: everything, 24, narrow=narrow)
    (stays,) = answers  # called once
    assert all(keep.equal(everything if i < layer else stays.expand(2, -1)) for i, keep in enumerate(kept))
    assert generation.token_ids == ids
    assert answered(checkpoint, question, 24).token_ids != ids  # otherwise hiding would have no effect here


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fastv_frees_the_later_layers(small, layer):
    generation = answered(small, "three", 24, make_method(f"fastv:layer={layer}", 0.25))
    lengths = [generation.prompt_tokens - (0 if i < layer else 3 * 27) for i in range(4)]
    assert generation.kept == [108.0] * layer + [27.0] * (4 - layer)
    assert generation.cache.kv_len.tolist() == [[n + 23] * 2 for n in lengths]
    assert generation.bytes_held == sum(lengths) * 2 * 2 * 16 * 4  # K and V of two heads with 16 channels in fp32
    starved = answered(small, "three", 3, make_method(f"fastv:scope=vision,layer={layer}", keep_tokens=1))
    assert starved.kept == [108.0] * layer + [1.0] * (4 - layer)  # two pictures keep no token
    equal = answered(small, "three", 3, make_method(f"fastv:layer={layer}", later(0.8, layer, 4)))
    assert abs(equal.retention - 0.8) < 0.015 and later(0.2, layer, 4) == 0  # the first layers alone are a quarter


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fastv:layer=4", "layer is 4, the model has 4; give one from 1 to 3"),
        ("topk:rates=[0.5,0.5,0.5]", "3 layers"),
        ("topk:rates=[0.5,0.5,0.5,0.5,0.5]", "5 layers"),
        ("topk:rates=[[0.5,0.5,0.5],0.5,0.5,0.5]", "3 heads"),
        ("topk:rates=[]", "0 layers"),
    ],
)
def test_settings_for_another_model_are_refused(small, spec, words):
    assert words in refusal(Generation, small, "what?", pictures(1), prune=spec)


# ---------------------------------------------------------------- a user's own code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thin:
    layer: int = 1
    step: int = 2

    def narrow(self, view):
        if view.layer != self.layer - 1:
            return None
        keep = torch.zeros(view.tokens, dtype=torch.bool)
        for start, stop in view.spans:
            keep[start : stop : self.step] = True
        return keep


class Both(Thin):
    def keep(self, view):
        keep = torch.zeros(view.kv_heads, view.tokens, dtype=torch.bool)
        for start, _ in view.spans:
            keep[:, start : start + 5] = True
        return keep


def test_a_class_of_ones_own_may_narrow(small):
    text = answered(small, "three", 3).prompt_tokens - 108
    for changed, before, each in (({"step": 3}, 1, 12), ({"layer": 3, "recent": 2}, 3, 18)):
        generation = answered(small, "three", 3, make_method(Thin, settings=changed))
        assert generation.kept == [108.0] * before + [3.0 * each] * (4 - before)
        assert generation.bytes_held == (4 * text + 108 * before + 3 * each * (4 - before)) * 2 * 2 * 16 * 4
    assert answered(small, "three", 3, Both(layer=2)).kept == [15.0] * 4  # later layers see the remaining tokens


class Forgets:
    """Each head keeps `mask` of what it sees and, after the prefill, `left` of that; (Hkv, T) bool each."""

    def __init__(self, mask, left):
        self.mask, self.left = mask, left

    def keep(self, view):
        return self.mask

    def compact(self, prefilled):
        assert all(kept[self.mask].all() and not kept.all() for kept in prefilled.kept)
        assert (prefilled.tokens, prefilled.kv_heads) == (self.mask.shape[1], len(self.mask))
        for kept in prefilled.kept:
            kept.zero_()  # a copy
        return [self.left, None, self.left.any(0), self.left]


def test_what_is_given_up_after_the_prefill_is_as_if_no_layer_had_kept_it(small):
    """A head's own tokens, or the same in all heads; None: nothing is given up. Text and guarded tokens stay."""
    tokens = answered(small, "three", 1).prompt_tokens
    mask, left = torch.rand(2, 2, tokens) < 0.5
    wanted = [mask & left, mask, mask & left.any(0), mask & left]
    ids = {}
    for name, rule in (("compact", Forgets(mask, left)), ("keep", lambda view: wanted[view.layer])):
        method = Method(name, rule, {"sink": 40, "recent": 30})
        generation = Generation(small, *QUESTIONS["three"][:1], pictures(3), Sampling(8), prune=method, remember=True)
        ids[name] = ["".join(generation), generation.token_ids, generation.kept, generation.bytes_held]
        for layer, (keep, shown) in enumerate(zip(wanted, generation.masks, strict=True)):
            fixed = torch.ones(tokens, dtype=torch.bool)
            for a, b in generation.spans:
                fixed[max(a, 40) : max(40, min(b, tokens - 30))] = False
            assert shown.equal(keep | fixed)
            assert generation.cache.kv_len[layer].tolist() == ((keep | fixed).sum(1) + 7).tolist()
    assert ids["compact"] == ids["keep"] and generation.kept != [108.0] * 4


class ForgetsAll:
    """Drops vision tokens after layer 1, and all that are left after the prefill; `most`: 3 per head and layer."""

    def __init__(self):
        self.most = []

    def narrow(self, view):
        scores = view.attention(rows=32).unflatten(0, (view.kv_heads, -1)).mean(1)
        self.most.append(view.origin[scores.argsort(dim=1, descending=True, stable=True)[:, :3]])
        return view.text | (view.origin % 3 == 0) if view.layer == 1 else None

    def compact(self, prefilled):
        return [torch.zeros(prefilled.tokens, dtype=torch.bool)] * 4


@pytest.mark.parametrize("before", ["", "pick-grid:retention=0.5"])
def test_the_tokens_that_a_head_attends_to_most_stay_after_the_prefill(small, before):
    method = Method("ForgetsAll", ForgetsAll(), {"sink_keys": 3})
    whole = Composition(make_method(before), method) if before else method
    generation = Generation(small, *QUESTIONS["three"][:1], pictures(3), Sampling(2), prune=whole, remember=True)
    "".join(generation)
    origin = generation._origin if before else torch.arange(generation.prompt_tokens)
    for shown, most in zip(generation.masks, method.rule.most, strict=True):
        wanted = torch.ones_like(shown)
        for a, b in generation.spans:
            wanted[:, a:b] = False
        assert shown.equal(wanted.scatter_(1, origin[most], True))
    assert sum(generation.kept) > 0


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "NoneType from compact; return a list of 4"),
        ([None] * 3, "list from compact; return a list of 4"),
        ([None, torch.ones(9, dtype=torch.bool)] * 2, "torch.bool (9,) on cpu for layer 1; return torch.bool (2, T)"),
        ([None, None, [True], None], "list for layer 2; return torch.bool (2, T)"),
        ([torch.ones(2, 59)] * 4, "torch.float32 (2, T) on cpu for layer 0; return torch.bool (2, T)"),
    ],
)
def test_what_is_no_list_of_masks_is_refused_after_the_prefill(small, result, words):
    class Gives:
        def compact(self, prefilled):
            return result

    said = refusal(answered, small, "one", 1, Gives())
    assert re.sub(r"\b\d\d+\b", "T", said) == f"method Gives returned {words}"


def forgets_text(view):
    return torch.zeros(view.kv_heads, view.tokens, dtype=torch.bool)


def test_a_function_of_ones_own_may_keep_all_or_forget(small):
    plain, all_kept = answered(small, "three", 4), answered(small, "three", 4, lambda view: None)
    assert all_kept.token_ids == plain.token_ids and all_kept.bytes_held == plain.bytes_held
    blind = answered(small, "three", 4, forgets_text)
    assert blind.kept == [0.0] * 4 and blind.cache.kv_len.tolist() == [[blind.prompt_tokens - 108 + 3] * 2] * 4
    few = answered(small, "three", 4, make_method(forgets_text, settings={"sink": blind.spans[0][0] + 2}))
    assert few.kept == [2.0] * 4 and few.timing["prune"] > 0


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda view: [0, 1], "list in layer 0"),
        (lambda view: view.text, "torch.bool (T,) on cpu in layer 0"),
        (lambda view: view.attention()[:2], "torch.float32 (2, T) on cpu in layer 0"),
        (lambda view: forgets_text(view).to("meta") if view.layer else None, "torch.bool (2, T) on meta in layer 1"),
    ],
)
def test_what_is_no_mask_is_refused(small, method, words):
    said = re.sub(r"\b\d\d+\b", "T", refusal(answered, small, "one", 1, method))
    assert said == f"the method returned {words}; return torch.bool (2, T) on cpu"


DIVERSE = """
import torch
import torch.nn.functional as F


def divprune(view, *, retention=0.5):
    \"\"\"Tokens whose keys are far apart (2503.02175): repeatedly the one farthest from those kept so far.\"\"\"
    keys = F.normalize(view.keys.float().mean(0), dim=-1)  # (T, D), one choice for all heads
    mask = view.text.clone()
    for start, stop in view.spans:
        far = 1 - keys[start:stop] @ keys[start:stop].T
        kept = [int((far + 9 * torch.eye(stop - start)).amin(1).argmax())]
        while len(kept) < max(1, round(retention * (stop - start))):
            nearest = far[:, kept].amin(1)
            nearest[kept] = -1
            kept.append(int(nearest.argmax()))
        mask[torch.tensor(kept) + start] = True
    return mask.expand(view.kv_heads, -1)


def keydiff(view, *, retention=0.5):
    \"\"\"Keys that are least like the mean key of their head (2504.15364).\"\"\"
    keys = F.normalize(view.keys.float(), dim=-1)  # (Hkv, T, D)
    mask = view.text.expand(view.kv_heads, -1).clone()
    for start, stop in view.spans:
        likeness = F.cosine_similarity(keys[:, start:stop], keys[:, start:stop].mean(1, keepdim=True), -1)
        few = likeness.topk(max(1, round(retention * (stop - start))), largest=False).indices
        mask[:, start:stop] = mask[:, start:stop].scatter(1, few, True)
    return mask
"""


def far_apart(keys, count):
    """DivPrune in loops over float64: indices of `count` rows of keys (n, D)."""
    rows = F.normalize(keys.double(), dim=-1).tolist()
    far = [[1 - sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    kept = [max(range(len(rows)), key=lambda i: min(far[i][:i] + far[i][i + 1 :]))]
    while len(kept) < count:
        kept.append(max((i for i in range(len(rows)) if i not in kept), key=lambda i: min(far[i][j] for j in kept)))
    return sorted(kept)


@pytest.mark.parametrize("name", ["divprune", "keydiff"])
def test_methods_of_other_papers_are_a_few_lines_over_the_keys(small, tmp_path, name):
    """They need no attention, so none is computed; what they keep is that of loops over the layer's own keys."""
    (tmp_path / "diverse.py").write_text(DIVERSE)
    seen, method = [], make_method(f"{tmp_path}/diverse.py::{name}", 0.25)

    def watched(view):
        seen.append((view, method.keep(view)))
        return seen[-1][1]

    generation = answered(small, "three", 2, watched)
    assert generation.kept == [27.0] * 4 and len(seen) == 4
    for view, keep in seen:
        assert not view._attention
        for a, b in view.spans:
            if name == "divprune":
                wanted = [far_apart(view.keys.mean(0)[a:b], 9)] * 2
            else:
                unit = F.normalize(view.keys.double(), dim=-1)[:, a:b]
                like = F.normalize(unit.mean(1), dim=-1)[:, None].mul(unit).sum(-1)
                wanted = [sorted(row.argsort()[:9].tolist()) for row in like]
            assert [row.nonzero()[:, 0].tolist() for row in keep[:, a:b]] == wanted


FAULTY = """
from dataclasses import dataclass
import torch
from model.pruning.budget import by_kv_head

def torn(view):
    return pair(view.spans[0] + (1,))

def unknown(view, *, part=3):
    return view.scores > part

def lent(view):
    return (
        by_kv_head(None, view.kv_heads))

def pair(values):
    first, second = values

@torch.no_grad()
def wrapped(view, *, window=1):
    return {}["key"]

def ahead(view):
    return view.attention(query="lookahead") > 0

class Thin:
    def narrow(self, view):
        return int("x")

class Skips:
    def keep(self, view):
        return 1 / (view.layer - 1) and None

@dataclass(frozen=True)
class Own:
    part: int = 3

    def __post_init__(self):
        if self.part > 3:
            raise ValueError("part is above 3; give 3")

    def check(self, num_layers, kv_heads):
        raise ValueError(f"the model has {num_layers} layers; give one with 40")

    def keep(self, view):
        return None
"""
FAULTS = {  # name: what is said behind the method's name
    "torn": "ValueError in line 17: too many values to unpack",
    "unknown": "AttributeError in line 10: 'View' object has no attribute 'scores'",
    "lent": "AttributeError in line 14: 'NoneType' object has no attribute 'unflatten'",
    "wrapped": "KeyError in line 21: 'key'",
    "ahead": 'ValueError in line 24: there are no look-ahead rows; the method needs a setting query="lookahead"',
    "Thin": "ValueError in line 28: invalid literal for int()",
    "Skips": "ZeroDivisionError in line 32: division by zero",
}


@pytest.fixture
def faulty(tmp_path):
    (tmp_path / "mine.py").write_text(FAULTY)
    return f"{tmp_path}/mine.py::"


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_in_ones_own_code_is_told_with_its_line(small, faulty, name):
    with pytest.raises(MethodError) as failed:
        answered(small, "one", 1, faulty + name)
    said, code = explain(failed.value)
    assert said.startswith(f"method {faulty}{name}: {FAULTS[name]}") and "\n" not in said
    assert code == 1 and said.endswith("; run again with --debug to see where")
    assert failed.value.__cause__ is not None


def test_what_a_class_of_ones_own_refuses_stays_in_its_words(small, faulty):
    assert refusal(answered, small, "one", 1, f"{faulty}Own:part=4") == "part is above 3; give 3"
    said = refusal(answered, small, "one", 1, f"{faulty}Own")
    assert said == f"method {faulty}Own: the model has 4 layers; give one with 40"


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()])
def test_memory_that_runs_out_in_ones_own_code_is_still_that(small, error):
    def greedy(view):
        raise error

    with pytest.raises(Exception) as failed:
        answered(small, "one", 1, greedy)
    assert out_of_memory(failed.value)
