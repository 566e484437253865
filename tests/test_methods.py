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
from model.pruning import GUARDS, METHODS, Method, MethodError, make_method, settings_of
from model.pruning.budget import best, by_head, by_kv_head, mass, pooled, select
from model.pruning.describe import describe, meanings, shown
from model.view import Pruning
from tests.given import given_view
from tests.oracle import masked_batch, masked_ids, small_llama
from tests.paths import DEMO, DEMO_PICTURE
from tests.sizes import Sizes
from tests.test_plphp import plphp_by_hand

NAMES = [name for name in METHODS if name != "none"]
UNEVEN = {"plphp-ada", "adakv"}  # the heads of a layer keep different numbers
NARROWING = {"fastv"}  # tokens leave the prompt


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


def pairs(keep):
    """bool (H, n) -> {(head, token)}."""
    return {tuple(pair) for pair in keep.nonzero().tolist()}


@FEW
@given(ROWS, st.data())
def test_every_row_may_have_its_own_count(rows, data):
    counts = data.draw(st.lists(st.integers(0, len(rows[0]) + 2), min_size=len(rows), max_size=len(rows)))
    wanted = {(h, j) for h, row in enumerate(rows) for j in ranked(row)[: counts[h]]}
    assert pairs(best(torch.tensor(rows).float(), torch.tensor(counts)[:, None])) == wanted


def test_a_table_of_rates_has_a_number_for_each_layer_or_head():
    table = [0.25, [0.0, 1.0, 0.75]]
    assert by_head(table, 0, 3, 10).tolist() == [[3], [3], [3]]  # 2.5 is rounded up
    assert by_head(table, 1, 3, 10).tolist() == [[1], [10], [8]]


@FEW
@given(ROWS, st.integers(1, 13))
def test_shared_rows_keep_the_best_of_their_sum(rows, count):
    sums = [sum(column) for column in zip(*rows, strict=True)]
    wanted = {(h, j) for h in range(len(rows)) for j in ranked(sums)[:count]}
    heads, tokens = len(rows), len(rows[0])
    view = given_view([(0, tokens)], tokens, heads, heads, scores=torch.tensor(rows).float())
    assert pairs(make_method("shared", keep_tokens=count).keep(view)) == wanted


@FEW
@given(ROWS, st.data(), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_a_pot_is_divided_by_rank_above_a_floor(rows, data, floor):
    """First every row's floor, then the best remaining pairs; ties by row, then by token."""
    scores, count = torch.tensor(rows).float(), data.draw(st.integers(1, len(rows[0])))
    least = max(1, int(floor * count))
    chosen = [(h, j) for h, row in enumerate(rows) for j in ranked(row)[:least]]
    rest = [(h, j) for h, row in enumerate(rows) for j in range(len(row)) if (h, j) not in chosen]
    rest.sort(key=lambda pair: (-rows[pair[0]][pair[1]], pair))
    got = pooled(scores, count, floor)
    assert pairs(got) == {*chosen, *rest[: len(rows) * count - len(chosen)]}
    assert got.sum() == len(rows) * count and (got.sum(1) >= least).all()
    if floor == 1:
        assert got.equal(best(scores, count))


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


def test_mass_of_everything_is_every_token_that_has_any():
    assert mass(torch.tensor([[0.5, 0.25, 0.125, 0.125], [0, 1, 0, 0]]), 1.0).sum(1).tolist() == [4, 1]


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


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_the_query_heads_of_a_kv_head_agree(q_heads, kv_heads):
    scores, size = torch.rand(q_heads, 5), q_heads // kv_heads
    for h in range(kv_heads):
        for j in range(5):
            own = [scores[h * size + g, j].item() for g in range(size)]
            assert by_kv_head(scores, kv_heads)[h, j].item() == pytest.approx(sum(own) / size)
            assert by_kv_head(scores, kv_heads, "max")[h, j].item() == max(own)


@torch.inference_mode()
def test_value_norms_weigh_the_attention(small):
    """A method with `values` ranks by attention times the L1 norm of each token's value row."""
    seen = {}

    def look(layer, q, k, v):
        """Softmax of the last row, in float64."""
        q, k = q[0, :, -1].double().view(2, 2, -1), k[0].double()
        weights = torch.einsum("hgd,htd->hgt", q, k).mul(q.shape[-1] ** -0.5).softmax(-1).mean(1)
        seen[layer] = weights * v[0].double().abs().sum(-1)

    generation = Generation(small, "what is left?", pictures(1), Sampling(1))
    x, (span,) = small.model.splice(generation.ids, small.model.encode_images(torch.stack(generation.pixels)))
    method = make_method("topk:values=true", keep_tokens=9)
    plain, differ = Pruning(make_method("topk", keep_tokens=9), 4, [span], backend="torch"), 0
    pruning = Pruning(method, 4, [span], backend="torch")

    def prune(layer, q, k, v):
        look(layer, q, k, v)
        keep, _ = pruning(layer, q, k, v)
        for h, row in enumerate(seen[layer][:, slice(*span)].tolist()):
            assert keep[h, slice(*span)].nonzero()[:, 0].tolist() == sorted(ranked(row)[:9])
        nonlocal differ
        differ += not keep.equal(plain(layer, q, k, v)[0])
        return keep, None

    small.model.language_model.prefill(x[None], RaggedCache(4, backend="torch"), prune=prune)
    assert differ  # otherwise the test could not fail


@pytest.mark.parametrize("name", ["random", "topk", "fastv"])
@torch.inference_mode()
def test_the_key_that_attention_is_parked_on_stays(small, name):
    """In each KV head, the most attended keys of the last 32 rows, or of all rows after the picture if fewer."""
    generation = Generation(small, "what is left?", pictures(1), Sampling(1))
    x, (span,) = small.model.splice(generation.ids, small.model.encode_images(torch.stack(generation.pixels)))
    pruning = Pruning(make_method(f"{name}:sink_keys=3", keep_tokens=1), 4, [span], backend="torch")
    kept = {}

    def parked(q, k):
        """(Hkv, T) bool, from a softmax in float64."""
        rows = min(32, len(x) - span[1])
        scores = q[0, :, -rows:].double() @ k[0].double().repeat_interleave(2, 0).transpose(1, 2) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(rows, len(x)).triu(len(x) - rows + 1).bool(), float("-inf"))
        top = scores.softmax(-1).mean(1).view(2, 2, -1).mean(1).topk(3).indices
        return torch.zeros(2, len(x), dtype=torch.bool).scatter(1, top, True)

    def prune(layer, q, k, v):
        keep, rows = pruning(layer, q, k, v)
        if keep is not None:
            sinks = parked(q, k)
            assert keep[sinks].all() and (keep[:, slice(*span)].sum(1) <= 4).all()
            kept[layer] = sinks[:, slice(*span)].any()
        if rows is not None:
            wanted = parked(q, k).any(0).nonzero()[:, 0]
            assert torch.isin(wanted, rows).all()
            kept[layer] = ((wanted >= span[0]) & (wanted < span[1])).any()
        return keep, rows

    small.model.language_model.prefill(x[None], RaggedCache(4, backend="torch"), prune=prune)
    assert any(kept.values())  # otherwise the sinks are all text


# ---------------------------------------------------------------- any method


def answer(method, place):
    """keep (Hkv, T); for a method that narrows the prompt, the same in every head."""
    return method.narrow(place).expand(place.kv_heads, -1) if method.narrows else method.keep(place)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rate", [0.01, 0.37, 0.5, 1.0])
def test_every_picture_keeps_its_rounded_share(name, rate):
    """Pictures of one token, of an even and of an odd number; for an uneven method only the sum is checked."""
    place = given_view([(3, 4), (6, 40), (40, 55)], 60, 8, 4)
    method = make_method(f"{name}:dr=0" if name.startswith("plphp") else name, rate)
    keep = answer(method, place)
    for a, b in place.spans:
        count = min(b - a, max(1, math.floor(rate * (b - a) + 0.5)))
        kept = keep[:, a:b].sum(1)
        assert kept.sum() == 4 * count and kept.min() >= 1
        assert name in UNEVEN or kept.tolist() == [count] * 4
    assert keep[:, place.text].all()


GRIDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)  # rows, columns of pictures
BUDGETS = st.one_of(
    st.floats(0.01, 1).map(lambda f: {"retention": f}), st.integers(1, 90).map(lambda n: {"keep_tokens": n})
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), GRIDS, BUDGETS, st.sampled_from([(4, 4), (8, 2), (6, 1)]), st.integers(0, 3))
def test_every_method_keeps_exactly_its_budget(name, grids, wanted, heads, gap):
    """Pictures of different shapes, with and without text between them, any number of heads; results repeat exactly."""
    spans, places, end = [], [], 2
    for rows, columns in grids:
        spans.append((end, end + rows * columns))
        places.append(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)))
        end += rows * columns + gap
    place = given_view(spans, end + 3, *heads, places=places)
    method = make_method(f"{name}:dr=0" if name.startswith("plphp") and "retention" in wanted else name, **wanted)
    keep = answer(method, place)
    for a, b in spans:
        count = wanted["keep_tokens"] if "keep_tokens" in wanted else math.floor(wanted["retention"] * (b - a) + 0.5)
        count, kept = max(1, min(count, b - a)), keep[:, a:b].sum(1)
        assert kept.sum() == heads[1] * count and (name in UNEVEN or kept.tolist() == [count] * heads[1])
    assert keep[:, place.text].all() and keep.equal(answer(method, place))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_may_share_a_budget(name):
    """20 of all their tokens; separate budgets would keep 20 of each."""
    place = given_view([(3, 40), (45, 70), (70, 100)], 110, 8, 4)
    keep = answer(make_method(f"{name}:scope=vision", keep_tokens=20), place)
    assert keep[:, ~place.text].sum() == 4 * 20 and keep[:, place.text].all()
    assert name in UNEVEN or keep.sum(1).unique().tolist() == [110 - 92 + 20]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spans", [[(0, 30)], [(10, 40)], [(0, 12), (25, 40)]])
@pytest.mark.parametrize("guards", ["sink=0,recent=0", "sink=5,recent=0", "sink=15,recent=13", "sink=99"])
def test_protected_tokens_are_never_dropped(name, spans, guards):
    place, method = given_view(spans, 40), make_method(f"{name}:{guards}", keep_tokens=1)
    keep = answer(method, place)
    sink, recent = method.settings["sink"], method.settings["recent"]
    outside = {t for t in range(40) if not any(a <= t < b for a, b in spans)}
    safe = outside | set(range(min(sink, 40))) | set(range(40 - recent, 40))
    assert all(safe <= {t for h, t in pairs(keep) if h == head} for head in range(2))
    assert safe == set(range(40)) or not keep.all()  # and the rest is pruned


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


def answered(checkpoint, question, tokens, prune=None):
    """The finished answer to one of the QUESTIONS, with at most `tokens` tokens."""
    prompt, count, template = QUESTIONS[question]
    generation = Generation(
        checkpoint, prompt, pictures(count), Sampling(tokens), template, prune=prune, backend="torch"
    )
    "".join(generation)
    return generation


@pytest.mark.parametrize(
    ("spec", "retention"), [*((n, 1.0) for n in NAMES), ("plphp:r=1,dr=0,skip=0", None), ("plphp:skip=4", 0.1)]
)
def test_keeping_everything_is_no_pruning(small, spec, retention):
    pruned, plain = answered(small, "last", 8, make_method(spec, retention)), answered(small, "last", 8)
    assert pruned.token_ids == plain.token_ids and pruned.text == plain.text
    assert pruned.kept == plain.kept == [72.0] * 4 and pruned.bytes_held == plain.bytes_held
    assert pruned.notes == []


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NARROWING])
def test_dropping_k_and_v_does_not_change_the_first_token(small, name):
    """The prompt's hidden states are unchanged, so its logits are equal bit for bit."""
    pruned, plain = (Generation(small, "what?", pictures(1), prune=p) for p in (make_method(name, keep_tokens=1), None))
    with torch.inference_mode():
        assert pruned.prefill().equal(plain.prefill())
    assert pruned.bytes_held < plain.bytes_held and min(pruned.kept) == 1.0
    assert answered(small, "three", 1, make_method(name, 0.1)).token_ids == answered(small, "three", 1).token_ids


@pytest.mark.parametrize("name", NAMES)
def test_without_a_picture_nothing_is_dropped_and_a_note_says_so(small, name):
    pruned, plain = answered(small, "none", 4, make_method(name, keep_tokens=1)), answered(small, "none", 4)
    assert pruned.token_ids == plain.token_ids and pruned.bytes_held == plain.bytes_held
    assert pruned.kept == [0.0] * 4 and plain.notes == []
    (note,) = pruned.notes
    assert name in note and "no picture" in note
    "".join(pruned)
    assert len(pruned.notes) == 1  # asking again does not repeat it


# ---------------------------------------------------------------- no T x T


LONG = 700  # tokens; many more than the 32 channels


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_no_prefill_holds_a_whole_matrix_of_attention(name, kv_heads):
    model, cache = small_llama(kv_heads=kv_heads), RaggedCache(3, backend="torch")
    method, spans = make_method(name), [(20, 320), (320, 650)]
    contrast = [torch.linspace(0, 1, stop - start) for start, stop in spans]
    pruning = method and Pruning(method, 3, spans, contrast=lambda: contrast, backend="torch")
    with Sizes() as sizes:
        model.prefill(torch.randn(1, LONG, 32), cache, prune=pruning)
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
    """Function (Hq, Hkv) -> folder and its checkpoint: 4 layers, 36 tokens a picture, no stop id."""

    @functools.cache
    def make(heads, kv_heads):
        folder = tmp_path_factory.mktemp("oracle")
        text = {"num_hidden_layers": 4, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        make_hf_checkpoint(folder, text, vision={"image_size": 84}, seed=3)
        return folder, dataclasses.replace(load(folder, "fp32"), stop_ids=())

    return make


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


def count_of(rate, n):
    return max(1, math.floor(rate * n + 0.5))


# rules in loops: worth (Hkv, n) of a picture in a layer -> {(head, token)}


def own(rate):
    """Each head keeps its own best. rate (layer, head) -> fraction."""
    return lambda layer, worth: {
        (h, j) for h, row in enumerate(worth) for j in ranked(row)[: count_of(rate(layer, h), len(row))]
    }


def one_set(layer, worth):
    """All heads keep the best half by the sum."""
    total = [sum(column) for column in zip(*worth, strict=True)]
    return {(h, j) for h in range(len(worth)) for j in ranked(total)[: count_of(0.5, len(total))]}


def one_pot(layer, worth):
    """Half of all pairs, with a floor of a fifth of an even share per head."""
    count = count_of(0.5, len(worth[0]))
    chosen = [(h, j) for h, row in enumerate(worth) for j in ranked(row)[: max(1, int(0.2 * count))]]
    rest = [(h, j) for h, row in enumerate(worth) for j in range(len(row)) if (h, j) not in chosen]
    rest.sort(key=lambda pair: (-worth[pair[0]][pair[1]], pair))
    return {*chosen, *rest[: count * len(worth) - len(chosen)]}


def portion(layer, worth):
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


PER_LAYER, PER_HEAD = [0.1, 1.0, 0.25, 0.5], [[0.1, 0.9], 0.3, [1.0, 0.0], [0.5, 0.25]]
HALF = own(lambda layer, head: 0.5)
RULES = {  # (spec, further settings): (window, smoothing (row, token) -> number, rule)
    ("topk",): (1, None, HALF),
    ("topk:window=3,retention=0.5",): (3, None, HALF),
    ("topk:mass=0.6",): (1, None, portion),
    ("topk", f"rates={json.dumps(PER_LAYER)}"): (1, None, own(lambda layer, head: PER_LAYER[layer])),
    ("topk", f"rates={json.dumps(PER_HEAD)}"): (
        1, None, own(lambda layer, h: PER_HEAD[layer][h] if layer != 1 else 0.3),
    ),
    ("shared",): (1, None, one_set),
    ("snapkv",): (32, lambda row, j: sum(around(row, j)) / 5, HALF),
    ("snapkv:pool=max,window=4",): (4, lambda row, j: max(around(row, j)), HALF),
    ("adakv",): (32, lambda row, j: sum(around(row, j)) / 5, one_pot),
}  # fmt: skip


def by_hand(rule, smooth, spans, group):
    """choose(layer, attention) for `masked_ids`: average over rows, then heads, then neighbours."""

    def choose(layer, attention):
        rows = attention.double() if attention.ndim == 3 else attention.double()[:, None]  # (Hq, W, T)
        heads = [rows[h : h + group].mean((0, 1)).tolist() for h in range(0, len(rows), group)]
        keep = torch.ones(len(heads), rows.shape[2], dtype=torch.bool)
        for a, b in spans:
            worth = [row[a:b] for row in heads]
            if smooth:
                worth = [[smooth(row, j) for j in range(b - a)] for row in worth]
            keep[:, a:b] = False
            for h, j in rule(layer, worth):
                keep[h, a + j] = True
        return keep

    return choose


@pytest.mark.parametrize("case", RULES, ids=" ".join)
@pytest.mark.parametrize("question", ["one", "three", "last"])
def test_kept_sets_and_ids_are_those_of_transformers_with_masks(oracle, answers, case, question):
    """8 query heads over 2 KV heads. The window stops after the last picture, or has 1 row if that ends the prompt."""
    (spec, *more), (window, smooth, rule) = case, RULES[case]
    folder, checkpoint = oracle(8, 2)
    generation = answered(checkpoint, question, 24, make_method(spec, settings=more))
    behind = generation.prompt_tokens - generation.spans[-1][1]
    assert (behind == 0) if question == "last" else (4 <= behind < 32)
    rows = max(1, min(window, behind))
    ids, kept = masked_ids(folder, generation, by_hand(rule, smooth, generation.spans, 4), 24, rows)
    assert [torch.equal(a, b) for a, b in zip(answers, kept, strict=True)] == [True] * 4
    assert generation.token_ids == ids
    assert answered(checkpoint, question, 24).token_ids != ids  # otherwise pruning would have no effect here


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
    folder, checkpoint = oracle(8, 2)
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


def test_fastv_needs_a_layer_that_the_model_has(small):
    for layer in (4, 5):
        message = refusal(Generation, small, "what?", pictures(1), prune=make_method(f"fastv:layer={layer}"))
        assert f"layer is {layer}" in message and "from 1 to 3" in message


@torch.inference_mode()
def together(generations, count):
    """Greedy ids of several answers, prefilled separately and decoded as one batch."""
    language, never = generations[0].checkpoint.model.language_model, generations[0].never()
    cache, ids = RaggedCache.join([g.cache for g in generations]), [list(g.token_ids) for g in generations]
    for _ in range(count - 1):
        x = F.embedding(torch.tensor([row[-1] for row in ids]), language.model.embed_tokens.weight)
        logits = language.logits(language.decode(x, cache))
        logits[:, never] = float("-inf")
        for row, token in zip(ids, logits.argmax(-1).tolist(), strict=True):
            row.append(token)
    return ids


@pytest.mark.parametrize("spec", ["plphp", "plphp-ada"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_a_joined_batch_is_that_of_transformers_padded_on_the_left(oracle, answers, spec, heads):
    """Prompts with one and with three pictures: each sequence is pruned by its own last row over its own columns."""
    folder, checkpoint = oracle(*heads)
    generations = [answered(checkpoint, question, 1, make_method(spec)) for question in ("one", "three")]
    assert generations[0].prompt_tokens < generations[1].prompt_tokens
    chooses = [plphp_by_hand(g.spans, heads[0] // heads[1], spec == "plphp-ada")[0] for g in generations]
    (first, second), found = masked_batch(folder, generations, chooses, 24), together(generations, 24)
    kept = [*first[1][1:], *second[1][1:]]  # the first layers are never pruned
    assert [torch.equal(a, b) for a, b in zip(answers, kept, strict=True)] == [True] * 6
    assert found == [first[0], second[0]]


# ---------------------------------------------------------------- rejected settings

BAD = {
    "topk:scope=all": "'all'",
    "shared:scope=all": "'all'",
    "fastv:scope=text": "'text'",
    "topk:group=sum": "'sum'",
    "snapkv:group=sum": "'sum'",
    "topk:retention=0.5,keep_tokens=3": "one of them",
    "topk:retention=0.5,mass=0.5": "one of them",
    "topk:keep_tokens=3,mass=0.5": "one of them",
    "topk:mass=0": "0",
    "topk:mass=2": "2",
    "topk:mass=most": "'most'",
    "topk:window=0": "0",
    "snapkv:window=0": "0",
    "snapkv:window=-3": "-3",
    "snapkv:kernel=4": "4",
    "snapkv:kernel=-1": "-1",
    "adakv:kernel=0": "0",
    "snapkv:pool=sum": "'sum'",
    "snapkv:floor=0.5": "'floor'",
    "adakv:floor=2": "2",
    "adakv:floor=-0.1": "-0.1",
    "fastv:layer=0": "0",
    "fastv:layer=-1": "-1",
    "fastv:layer=1.5": "1.5",
    "fastv:retention=0": "0",
    "topk:sink=-1": "-1",
    "fastv:recent=1.5": "1.5",
    "adakv:recent=-2": "-2",
}


def refused(*arguments, **options):
    """The error message of make_method: one line, `what; what to do`."""
    with pytest.raises(ValueError) as caught:
        make_method(*arguments, **options)
    message = str(caught.value)
    assert ";" in message and "\n" not in message
    return message


@pytest.mark.parametrize("spec", BAD)
def test_settings_that_cannot_be_meant_are_refused_in_one_line(spec):
    assert BAD[spec] in refused(spec)


@pytest.mark.parametrize(
    "rates", ["[0.5, 1.5]", "[[0.5, -1]]", '["half"]', "[NaN]", "[[[0.5]]]", "half", "0.5", "0", "true"]
)
def test_rates_that_are_no_table_of_fractions_are_refused(rates):
    assert "rates" in refused("topk", settings=[f"rates={rates}"])
    assert "one of them" in refused("topk", 0.5, settings=["rates=[0.5]"])


@pytest.mark.parametrize(
    ("rates", "word"),
    [([0.5] * 3, "3 layers"), ([0.5] * 5, "5 layers"), ([[0.5] * 3] * 4, "3 heads"), ([], "0 layers")],
)
def test_rates_of_another_model_are_refused(small, rates, word):
    method = make_method("topk", settings=[f"rates={json.dumps(rates)}"])
    assert word in refusal(Generation, small, "what?", pictures(1), prune=method)


# ---------------------------------------------------------------- a user's own file

OWN = """
from dataclasses import dataclass
import torch

@dataclass(frozen=True, kw_only=True)
class Thin:
    layer: int = 1
    step: int = 2

    def narrow(self, view):
        if view.layer != self.layer - 1:
            return None
        scores = view.attention()
        assert scores.shape == (view.q_heads, view.tokens) and scores.dtype == torch.float32
        torch.testing.assert_close(scores.sum(1), torch.ones(view.q_heads))
        keep = torch.zeros(view.tokens, dtype=torch.bool)
        for start, stop in view.spans:
            keep[start : stop : self.step] = True
        return keep

@dataclass(frozen=True, kw_only=True)
class Both(Thin):
    def keep(self, view):
        assert view.attention().shape == (view.q_heads, view.tokens)
        keep = torch.zeros(view.kv_heads, view.tokens, dtype=torch.bool)
        for start, stop in view.spans:
            keep[:, start : start + 5] = True
        return keep

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

def former(layer, scores, layout, *, window=1):
    return None

def no_view(*, window=1):
    return None

def everything(view):
    return None

def forgets_text(view):
    return torch.zeros(view.kv_heads, view.tokens, dtype=torch.bool)

@dataclass(frozen=True)
class Short:
    step: int

    def keep(self, view):
        return None
"""


@pytest.fixture
def mine(tmp_path):
    """Function (name, settings) -> the method of a user's file."""
    (tmp_path / "mine.py").write_text(OWN)
    return lambda name, *settings: make_method(f"{tmp_path}/mine.py::{name}", settings=settings)


def test_a_class_of_ones_own_may_narrow(small, mine):
    text = answered(small, "three", 3).prompt_tokens - 108
    for changed, before, each in ((("step=3",), 1, 12), (("layer=3", "recent=2"), 3, 18)):
        generation = answered(small, "three", 3, mine("Thin", *changed))
        assert generation.kept == [108.0] * before + [3.0 * each] * (4 - before)
        assert generation.bytes_held == (4 * text + 108 * before + 3 * each * (4 - before)) * 2 * 2 * 16 * 4
    both = answered(small, "three", 3, mine("Both", "layer=2"))  # later layers see the remaining tokens
    assert both.kept == [15.0] * 4


def test_a_class_that_is_no_method_is_refused(mine):
    for name in ("Neither", "Called", "Former", "former", "no_view"):
        with pytest.raises(ValueError) as caught:
            mine(name)
        said = str(caught.value)
        assert name in said and "; " in said and "\n" not in said and "view" in said


def test_a_function_of_ones_own_may_keep_all_or_forget(small, mine):
    plain, all_kept = answered(small, "three", 4), answered(small, "three", 4, mine("everything"))
    assert all_kept.token_ids == plain.token_ids and all_kept.bytes_held == plain.bytes_held
    blind = answered(small, "three", 4, mine("forgets_text"))
    assert blind.kept == [0.0] * 4 and blind.cache.kv_len.tolist() == [[blind.prompt_tokens - 108 + 3] * 2] * 4
    few = answered(small, "three", 4, mine("forgets_text", f"sink={blind.spans[0][0] + 2}"))
    assert few.kept == [2.0] * 4


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

@dataclass(frozen=True)
class Thin:
    def narrow(self, view):
        return int("x")

@dataclass(frozen=True)
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
    "Thin": "ValueError in line 29: invalid literal for int()",
    "Skips": "ZeroDivisionError in line 34: division by zero",
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_in_ones_own_code_is_told_with_its_line(small, tmp_path, name):
    (tmp_path / "mine.py").write_text(FAULTY)
    with pytest.raises(MethodError) as failed:
        answered(small, "one", 1, make_method(f"{tmp_path}/mine.py::{name}"))
    said, code = explain(failed.value)
    assert said.startswith(f"method {tmp_path}/mine.py::{name}: {FAULTS[name]}") and "\n" not in said
    assert code == 1 and said.endswith("; run again with --debug to see where")
    assert failed.value.__cause__ is not None


def test_what_a_class_of_ones_own_refuses_stays_in_its_words(small, tmp_path):
    (tmp_path / "mine.py").write_text(FAULTY)
    own = f"{tmp_path}/mine.py::Own"
    assert refusal(answered, small, "one", 1, f"{own}:part=4") == "part is above 3; give 3"
    assert refusal(answered, small, "one", 1, own) == f"method {own}: the model has 4 layers; give one with 40"


def test_memory_that_runs_out_in_ones_own_code_is_still_that(small):
    def greedy(view):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def vast(view):
        raise MemoryError

    for method in (greedy, vast):
        with pytest.raises(Exception) as failed:
            answered(small, "one", 1, method)
        assert out_of_memory(failed.value)


def test_a_field_without_a_value_is_asked_for(mine):
    """An ordinary frozen dataclass, with fields that are not keyword-only."""
    with pytest.raises(ValueError, match="step"):
        mine("Short")
    assert mine("Short", "step=2").rule.step == 2


# ---------------------------------------------------------------- what --list-methods says

# a range as it is written: values that must be refused, and one that may not
RANGES = {
    "0 to 1": ((-0.1, 1.1, "x"), 0.5), "above 0 and up to 1": ((0, 1.1, "x"), 0.5), "0 or more": ((-1, 0.5), 1),
    "1 or more": ((0, 1.5), 2), "1 or more, odd": ((0, 2), 3), "true or false": ((1, "yes"), True),
    "mean or max": (("sum",), "max"), "avg or max": (("sum",), "max"), "image or vision": (("all",), "vision"),
    "last or lookahead": (("first",), "lookahead"), "any whole number": ((0.5,), 3), "beta or more": ((0.05,), 0.3),
    "up to alpha": ((0.3,), 0.2), "1 or more, below the number of layers": ((0, 1.5), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_setting_is_listed_with_its_meaning_and_the_range_that_is_checked(name):
    listed, known = " ".join(describe(name).split()), GUARDS | settings_of(METHODS[name])
    for key in known:
        meaning = meanings(METHODS[name])[key]
        assert f"{key}={shown(known[key])} {' '.join(meaning.split())}" in listed
        written = re.search(r"\(([^()]*)\)$", meaning)
        advice = f"{key} of {name}: end its meaning with a range in brackets, and add new ranges to RANGES"
        assert written and written[1] in RANGES, advice
        refused, fine = RANGES[written[1]]
        for value in refused:
            with pytest.raises(ValueError, match=rf"\b{key}\b.*; \w"):
                make_method(f"{name}:{key}={json.dumps([value] * 4 if key == 'rates' else value)}")
        make_method(f"{name}:{key}={json.dumps([fine] * 4 if key == 'rates' else fine)}")


def test_a_range_is_named_where_it_is_left():
    for spec, said in (
        ("random:retention=1.5", "retention of method random is 1.5; give a number above 0 and up to 1"),
        ("topk:keep_tokens=0", "keep_tokens of method topk is 0; give a whole number of 1 or more"),
        ("random:seed=0.5", "seed of method random is 0.5; give a whole number"),
        ("random:pooled=1", "pooled of method random is 1; give true or false"),
        ("snapkv:pool=3", "pool of method snapkv is 3; give text"),
        ("plphp:r=big", "r of method plphp is 'big'; give a number"),
        ("shared:window=0", "window of method shared is 0; give a whole number of 1 or more"),
        ("topk:group=1", "group of method topk is 1; give mean or max"),
    ):
        with pytest.raises(ValueError) as refused:
            make_method(spec)
        assert str(refused.value) == said


def test_a_method_of_ones_own_is_listed(mine, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\n\n"
        "def keep(view, *, part=7, window=2, other=None):\n"
        '    """Keep a part.\n\n    More words: of no setting.\n\n'
        '    part: how many tokens stay, which takes more than a line\n        to say\n    window: rows\n    """\n\n'
        "@dataclass(frozen=True)\nclass Old:\n"
        '    """Older.\n\n    step: how far\n    other: not this\n    """\n    step: int\n    other: str = "a"\n\n'
        '@dataclass(frozen=True)\nclass New(Old):\n    """Newer.\n\n    other: but this\n    """\n'
    )
    assert describe(f"{tmp_path}/own.py::keep").splitlines()[4:9] == [
        "  part=7            how many tokens stay, which takes more",
        "                    than a line to say",
        "  window=2          rows",
        "  other=null",
        "",
    ]
    lines = describe(f"{tmp_path}/own.py::New").splitlines()
    assert "  step=(none)       how far" in lines and "  other=a           but this" in lines
    assert describe("none") == "none: Keeps all tokens."
    with pytest.raises(ValueError, match="no function 'nope'"):
        describe(f"{tmp_path}/own.py::nope")


def test_the_models_own_settings_are_listed(tmp_path):
    (tmp_path / "plphp.json").write_text('{"r": 0.5, "query": "lookahead"}')
    for name in ("plphp", "plphp-ada"):
        assert f"are: r=0.5 query=lookahead ({tmp_path}/plphp.json)" in " ".join(describe(name, tmp_path).split())
    assert "For this model" not in describe("topk", tmp_path)


def test_a_file_may_postpone_its_annotations(tmp_path):
    """With `from __future__ import annotations`, dataclasses look up their own module."""
    (tmp_path / "late.py").write_text("from __future__ import annotations\n" + OWN)
    assert make_method(f"{tmp_path}/late.py::Thin:step=3").rule.step == 3


@pytest.mark.parametrize("folder", [None, DEMO])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "none"])
def test_the_spec_of_a_method_gives_it_again(name, folder):
    budgets = [{}, {"retention": 0.3}, {"keep_tokens": 9}, {"settings": ["sink=2"]}, {"settings": ["scope=vision"]}]
    budgets += [{"retention": 0.3, "settings": [pair]} for pair in ("query=last", "window=32", "cover=0.25")]
    made = 0
    for asked in [*budgets, {"settings": ["mass=0.9"]}, {"settings": ["rates=[0.5,0.3]"]}, {"settings": ["r=0.3"]}]:
        try:
            method = make_method(name, folder=folder, **asked)
        except ValueError:  # no setting of this method
            continue
        assert make_method(method.spec, folder=folder).settings == method.settings
        made += 1
    assert made >= 4
