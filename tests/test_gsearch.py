"""G-Search: sets, ids and bytes against transformers with a mask per layer; the sigmoid; the search; its premise."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import exit_code_of, refusal
from hypothesis import given
from hypothesis import strategies as st

from model import Batch, Generation, Sampling, load
from model.pruning import make_method
from model.pruning.gsearch import sigmoid_shares
from tests.given import given_view
from tests.oracle import masked_ids
from tests.paths import DEMO, DEMO_PICTURE
from tests.sizes import Sizes
from tests.test_methods import QUESTIONS, pictures
from tests.test_next import ask, make_next
from tools import calibrate
from tools.evaluation.replay import replay
from tools.evaluation.schedule import agreements, kendall_tau, search, shapes

SCHEDULE = [1, 0.8, 0.5, 0.125]


# ---------------------------------------------------------------- against transformers


def by_hand(spans, schedule):
    """narrow(layer, attention) for `masked_ids`: loops over each picture's tokens that are left."""
    left = [list(range(a, b)) for a, b in spans]

    def narrow(layer, attention):
        if layer + 1 == len(schedule) or schedule[layer + 1] == schedule[layer]:
            return None
        keep = torch.ones(attention.shape[1], dtype=torch.bool)
        for (a, b), tokens in zip(spans, left, strict=True):
            worth = {j: sum(row[j] for row in attention.double().tolist()) for j in tokens}
            order = sorted(tokens, key=lambda j: (-worth[j], j))
            last = {attention.shape[1] - 1} & {*tokens}  # it predicts the next token
            tokens[:] = sorted({*order[: max(1, math.floor(schedule[layer + 1] * (b - a) + 0.5))]} | last)
            keep[a:b] = False
            keep[tokens] = True
        return keep

    return narrow


def check(folder, generation, schedule):
    """The kept tokens of each layer, 24 greedy ids and the bytes are those of transformers with masks."""
    "".join(generation)
    everything = torch.ones(2, generation.prompt_tokens, dtype=torch.bool)
    narrow = by_hand(generation.spans, schedule)
    ids, kept = masked_ids(folder, generation, lambda *_: everything, 24, narrow=narrow)
    assert torch.equal(generation.masks, torch.stack(kept)) and generation.token_ids == ids
    assert torch.equal(generation.cache.kv_len.long(), torch.stack([keep.sum(1) for keep in kept]) + 23)
    assert generation.bytes_held == sum(keep.sum().item() for keep in kept) * 2 * generation.cache.k[0].shape[1] * 4
    return [keep[0].sum().item() for keep in kept]


@pytest.fixture(scope="module")
def oracle(make_hf_checkpoint, tmp_path_factory):
    """A folder and its checkpoint: 4 layers, 8 query heads over 2 KV heads, 36 tokens a picture, no stop id."""
    folder = tmp_path_factory.mktemp("oracle")
    text = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    make_hf_checkpoint(folder, text, vision={"image_size": 84}, seed=3)
    return folder, replace(load(folder, "fp32"), stop_ids=())


def asked(checkpoint, question, tokens=24, prune=None, **options):
    prompt, count, template = QUESTIONS[question]
    return Generation(checkpoint, prompt, pictures(count), Sampling(tokens), template, prune=prune, **options)


@pytest.mark.parametrize("question", ["one", "three", "last"])
@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ({"schedule": SCHEDULE}, SCHEDULE),
        ({"schedule": [1, 1, 0.5, 0.5]}, [1, 1, 0.5, 0.5]),
        ({}, sigmoid_shares(4, 0.5, 0.0, 1.0, 10.0)),
        ({"retention": 0.3, "lo": 0.1, "steepness": 3.0}, sigmoid_shares(4, 0.3, 0.1, 1.0, 3.0)),
    ],
)
def test_sets_ids_and_bytes_are_those_of_transformers_with_a_mask_per_layer(oracle, question, settings, schedule):
    folder, checkpoint = oracle
    generation = asked(checkpoint, question, prune=make_method("g-search", settings=settings), remember=True)
    assert len({*check(folder, generation, schedule)}) > 1
    plain = asked(checkpoint, question)
    "".join(plain)
    assert plain.token_ids != generation.token_ids  # otherwise the schedule would have no effect here


def test_the_same_on_a_checkpoint_with_tiles(make_hf_checkpoint, tmp_path):
    """Each picture keeps its fraction, newlines included; the pictures have different numbers of tokens."""
    make_next(make_hf_checkpoint, tmp_path, {"num_hidden_layers": 4}, {"image_size": 56}, seed=3)
    checkpoint, method = load(tmp_path, "fp32"), make_method("g-search", settings={"schedule": SCHEDULE})
    options = {"prune": method, "remember": True, "sampling": Sampling(max_new_tokens=24)}
    generation = ask(checkpoint, "what is <image> and <image>?", [(150, 120), (40, 90)], **options)
    check(tmp_path, generation, SCHEDULE)
    tokens = [stop - start for start, stop in generation.spans]
    assert len({*tokens}) == 2
    assert generation.kept == [sum(math.floor(share * n + 0.5) for n in tokens) for share in SCHEDULE]


# ---------------------------------------------------------------- the method


@pytest.mark.parametrize("spec", ["schedule=[]", "schedule=[1,1,1,1]", "retention=1", "retention=1.0,lo=0.3,hi=0.7"])
@torch.inference_mode()
def test_without_a_drop_all_bits_are_those_of_no_pruning(oracle, spec):
    pruned, plain = (asked(oracle[1], "three", prune=p) for p in (f"g-search:{spec}", None))
    assert pruned.prefill().equal(plain.prefill()) and pruned.bytes_held == plain.bytes_held
    for ours, theirs in zip(*(packed(generation.cache) for generation in (pruned, plain)), strict=True):
        assert ours.equal(theirs)


def packed(cache):
    """K and V of every layer and head, (T, D) each, without free slots."""
    for layer, arenas in enumerate(zip(cache.k, cache.v, strict=True)):
        tables = cache.kv_start[layer].tolist(), cache.kv_len[layer].tolist()
        for start, length in zip(*tables, strict=True):
            yield from (arena[start : start + length] for arena in arenas)


def test_without_a_picture_nothing_is_dropped(oracle):
    pruned, plain = (asked(oracle[1], "none", 4, prune=p) for p in ("g-search", None))
    assert "".join(pruned) == "".join(plain) and pruned.bytes_held == plain.bytes_held


def test_fractions_are_of_the_pictures_that_the_language_model_got(oracle):
    """Each layer's fraction is of the original count, not of what is left; after pick-grid, of what it picked."""
    for first, tokens in (("", 36), ("pick-grid:retention=0.5+", 18)):
        generation = asked(oracle[1], "three", 2, f"{first}g-search:schedule=[1,0.5,0.5,0.25]")
        "".join(generation)
        assert generation.kept == [3.0 * math.floor(share * tokens + 0.5) for share in (1, 0.5, 0.5, 0.25)]


def test_a_token_that_left_does_not_return_and_each_layer_ranks_anew():
    """Layer 0 drops the token that layer 1 attends to most; of the rest, layer 1 decides. All heads count."""
    method = make_method("g-search", settings={"schedule": [1, 0.75, 0.5, 0.5]})
    views = [given_view([(1, 5)], 6, layer=0, scores=torch.tensor([[0, 5, 3, 0, 1, 0], [0, 0, 3, 4, 0, 0.0]] * 2))]
    assert method.narrow(views[0]).tolist() == [True, True, True, True, False, True]
    views.append(given_view([(1, 4)], 5, layer=1, scores=torch.tensor([[9.0, 1, 3, 2, 9]] * 4)))
    views[1].whole_spans = [(1, 5)]
    assert method.narrow(views[1]).tolist() == [True, False, True, True, True]
    assert method.narrow(given_view([(1, 3)], 4, layer=2)) is None  # no fewer than before
    assert method.narrow(given_view([(1, 3)], 4, layer=3)) is None  # no later layer


@pytest.mark.parametrize("spec", ["g-search", "g-search:schedule=[1,0.4,0.2,0.1]"])
def test_a_batch_and_a_later_turn_give_the_same_ids(oracle, spec):
    questions = ["one", "three", "last", "one"]
    alone = [asked(oracle[1], question, 8, spec) for question in questions]
    for generation in alone:
        "".join(generation)
    batch, found = Batch(), [asked(oracle[1], question, 8, spec) for question in questions]
    for generation in found:
        batch.add(generation)
    while batch:
        batch.advance()
    assert [g.token_ids for g in found] == [g.token_ids for g in alone]
    later = Generation(oracle[1], "and what else?", sampling=Sampling(8), before=alone[0])
    "".join(later)
    assert len(later.token_ids) == 8


@torch.no_grad()
def test_no_layer_holds_a_whole_matrix_of_attention():
    """Ranking by one row needs one row of scores per head."""
    view = given_view([(2, 602)], 610, layer=0)
    with Sizes() as sizes:
        make_method("g-search").narrow(view)
    assert sizes.largest < 610 * 16


BAD = {
    "schedule=[0.5,0.5,0.5,0.5]": "schedule begins with 0.5; give 1",
    "schedule=[1,0.5,0.6,0.1]": "schedule grows from 0.5 to 0.6",
    'schedule=[1,0.5,"x",0.1]': "an entry of schedule is 'x'; give a number from 0 to 1",
    "schedule=[1,0.5,-0.1,-0.2]": "an entry of schedule is -0.1",
    "retention=0.5,schedule=[1,1,1,1]": "schedule has no effect with retention",
    "lo=0.5,hi=0.2": "lo 0.5 is above hi 0.2; give lo <= hi",
    "steepness=1001": "steepness is 1001.0; give a number from 0 to 1000",
}


@pytest.mark.parametrize("spec", BAD)
def test_settings_that_make_no_schedule_are_refused(spec):
    with pytest.raises(ValueError) as refused:
        make_method(f"g-search:{spec}")
    assert BAD[spec] in str(refused.value) and "\n" not in str(refused.value)


def test_a_schedule_of_another_model_is_refused(oracle):
    with pytest.raises(ValueError, match="schedule has 3 layers, the model 4; give one for each"):
        asked(oracle[1], "one", 1, "g-search:schedule=[1,0.5,0.5]")


def test_a_retention_below_the_first_layers_is_refused(oracle):
    said = refusal(asked, oracle[1], "one", 1, make_method("g-search", 0.25))
    assert said == "method g-search: retention is 0.25, but the first of 4 layers keeps everything; give more than 0.25"


def test_a_checkpoints_schedule_gives_way_to_a_given_retention_or_sigmoid(tmp_path):
    own = {"schedule": [1, 0.5], "lo": 0.1, "hi": 0.9, "steepness": 3.0, "query": "last"}
    (tmp_path / "g-search.json").write_text(json.dumps(own))

    def effective(spec, retention=None):
        return make_method(spec, retention, folder=tmp_path).effective

    assert effective("g-search") == {"schedule": [1, 0.5], "query": "last"}
    assert effective("g-search", 0.3) == {"retention": 0.3} | {k: v for k, v in own.items() if k != "schedule"}
    assert effective("g-search:steepness=30") == {"lo": 0.1, "hi": 0.9, "steepness": 30.0, "query": "last"}
    assert effective("g-search:schedule=[1,0.2]") == {"schedule": [1, 0.2], "query": "last"}
    file = f"@{tmp_path / 'g-search.json'}"  # its sigmoid is for other retentions
    assert make_method("g-search", settings=[file]).effective == {"schedule": [1, 0.5], "query": "last"}
    with pytest.raises(ValueError, match="lo has no effect with schedule"):
        make_method("g-search", settings=[file, "lo=0.3"])
    again = make_method(make_method("g-search", folder=tmp_path).spec)
    assert again.rule.shares(2) == [1, 0.5]


# ---------------------------------------------------------------- the sigmoid


@given(
    st.integers(2, 80), st.floats(0, 1, exclude_min=True), st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    st.one_of(st.just(0.0), st.floats(0.01, 1000)),
)  # fmt: skip
def test_the_mean_is_the_retention_and_no_layer_has_more_than_the_one_before(layers, retention, ends, steepness):
    """Whatever the limits and the steepness. The first layer alone is 1 / L."""
    retention = 1 / layers + retention * (1 - 1 / layers)
    shares = sigmoid_shares(layers, retention, *ends, steepness)
    assert len(shares) == layers and shares[0] == 1 and all(0 <= share <= 1 for share in shares)
    assert sum(shares) / layers == pytest.approx(retention, abs=1e-6)
    assert all(b <= a for a, b in itertools.pairwise(shares))


def test_it_is_the_sigmoid_that_is_documented():
    """The logit of a fraction between lo and hi falls by steepness over the depth of the model."""
    shares = sigmoid_shares(9, 0.5, 0.1, 0.9, 6.0)[1:]
    logits = [math.log((share - 0.1) / (0.9 - share)) for share in shares]
    assert [a - b for a, b in itertools.pairwise(logits)] == pytest.approx([6 / 8] * 7)
    assert sigmoid_shares(5, 0.6, 0.0, 1.0, 0.0)[1:] == pytest.approx([0.5] * 4)
    assert sigmoid_shares(1, 0.5, 0.0, 1.0, 10.0) == (1.0,)


# ---------------------------------------------------------------- the search


@given(st.lists(st.integers(1, 32), min_size=1, max_size=12))
def test_the_search_finds_the_least_fractions_that_are_needed(needed):
    """needed: of 32, in each layer but the first. A layer needs at least what later ones do."""
    tried = []

    def loss(schedule):
        tried.append(schedule)
        return float(any(32 * share < need for share, need in zip(schedule[1:], needed, strict=True)))

    found = search(loss, len(needed) + 1, 0.5)
    assert found == [1.0, *(max(needed[i:]) / 32 for i in range(len(needed)))]
    assert len(tried) <= 5 * len(needed)
    assert all(b <= a for schedule in tried for a, b in itertools.pairwise(schedule))


def test_no_layer_spends_the_tolerance_of_later_ones():
    """Every layer loses as much as it drops. If the first could lose all, no later layer could drop more."""

    def loss(schedule):
        return sum(1 - share for share in schedule)

    found = search(loss, 5, 1.0, steps=1000)
    assert loss(found) <= 1.0 and found[1] > found[2] > found[3] > found[4]
    for layer in range(1, 5):
        held = found[: layer + 1] + [found[layer]] * (4 - layer)
        less = found[:layer] + [found[layer] - 0.001] * (5 - layer)
        assert loss(held) <= layer / 4 + 1e-9 < loss(less) + 2e-9


def test_shapes_keep_the_retention_and_differ():
    found = list(shapes(6, 0.3, ["last", "lookahead"]))
    assert found[0] == {"lo": 0.0, "hi": 1.0, "steepness": 0.0, "query": "last"}
    made = [make_method("g-search", 0.3, settings=settings).rule for settings in found]
    rounded = [(rule.query, *(round(share, 3) for share in rule.shares(6))) for rule in made]
    assert len({*rounded}) == len(rounded) > 10 and {rule.query for rule in made} == {"last", "lookahead"}
    assert all(sum(rule.shares(6)) / 6 == pytest.approx(0.3) for rule in made)
    assert all(rule.lo <= rule.shares(6)[-1] + 1e-3 and rule.shares(6)[1] <= rule.hi + 1e-3 for rule in made)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=20))
def test_kendalls_tau_counts_pairs(scores):
    a, b = zip(*scores, strict=True)
    pairs = list(itertools.combinations(range(len(a)), 2))
    alike = sum((a[i] > a[j]) - (a[i] < a[j]) == (b[i] > b[j]) - (b[i] < b[j]) != 0 for i, j in pairs)
    against = sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in pairs)
    untied = [sum(x[i] != x[j] for i, j in pairs) for x in (a, b)]
    wanted = (alike - against) / math.sqrt(untied[0] * untied[1]) if min(untied) else 0.0
    assert kendall_tau(*(torch.tensor(x).float() for x in (a, b))) == pytest.approx(wanted, abs=1e-9)


def test_kendalls_tau_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    a = torch.randn(200)
    for b in (a, -a, torch.randn(200), a + torch.randn(200), (a + torch.randn(200)).round()):
        assert kendall_tau(a, b) == pytest.approx(stats.kendalltau(a.numpy(), b.numpy()).statistic, abs=1e-6)


@torch.inference_mode()
def test_agreement_is_that_of_the_last_row_in_neighbouring_layers(oracle):
    """All pictures of a prompt count; from the queries and keys of an unpruned run."""
    found = calibrate.sample(oracle[1], QUESTIONS["three"][0], pictures(3), 4).asked
    rows = []
    for q, k, _, _ in found.layers:
        scores = (q[0, :, -1:].unflatten(0, (2, 4)) @ k[0, :, None].mT * q.shape[-1] ** -0.5)[..., 0, :]
        rows.append(scores.double().softmax(-1).mean((0, 1)))
    wanted = [
        sum(kendall_tau(a[start:stop], b[start:stop]) for start, stop in found.spans) / 3
        for a, b in itertools.pairwise(rows)
    ]
    assert agreements(found) == pytest.approx(wanted, abs=0.02) and len(wanted) == 3  # equal up to near ties


# ---------------------------------------------------------------- the tool


def test_the_tool_writes_a_schedule_within_its_tolerance(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "shapes", lambda *given: list(shapes(*given))[-2:])
    path, prompt = tmp_path / "g.json", "Count the objects."
    flags = ["schedule", "--image", str(DEMO_PICTURE), "--prompt", prompt, "--tolerance", "0.05", "--out", str(path)]
    assert calibrate.main(flags) == 0
    out, err = capsys.readouterr()
    found = json.loads(path.read_text())
    assert set(found) == {"schedule", "lo", "hi", "steepness", "query"} and found["query"] == "lookahead"
    assert "0-1: " in out and "Kendall" in out and str(found["schedule"]) in out and "agree less than 0.7" in err
    checkpoint = load(DEMO, "fp32")
    sample = calibrate.sample(checkpoint, prompt, [DEMO_PICTURE], 64)
    with torch.inference_mode():
        ((kl, kept, _),) = calibrate.judge([sample], "g-search", [found])
    assert kl <= 0.05 and kept == pytest.approx(sum(found["schedule"]) / 6, abs=0.01) and kept < 1


@torch.inference_mode()
def test_the_first_step_counts_where_it_can_change(oracle):
    """The loss is the mean KL along the unpruned answer, its first token included."""
    found = calibrate.sample(oracle[1], QUESTIONS["three"][0], pictures(3), 4)
    ((kl, *_),) = calibrate.judge([found], "g-search", [{"retention": 0.3}])
    (pruned,), _, _ = replay(found.asked, [make_method("g-search", 0.3)])
    full, pruned = found.asked.logits.double().log_softmax(-1), pruned.double().log_softmax(-1)
    steps = (full.exp() * (full - pruned)).sum(-1)
    assert kl == pytest.approx(steps.mean().item(), rel=1e-4) and len(steps) == 4
    first = asked(oracle[1], "three", prune=make_method("g-search", 0.3)).prefill().double().log_softmax(-1)
    assert first.sub(pruned[0]).abs().max() < 1e-4 and steps[0] > 1e-3


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["schedule", "--rates-only"], "--rates-only"), (["--tolerance", "1"], "--tolerance"), (["shedule"], "schedule")],
)
def test_flags_of_the_other_stage_are_refused(flags, word, tmp_path, capsys):
    assert exit_code_of(calibrate.main, [*flags, "--scenes", "1", "--out", str(tmp_path / "p.json")]) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "p.json").exists()


def test_ctrl_c_writes_nothing(tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "judge", stopped)
    flags = ["schedule", "--image", str(DEMO_PICTURE), "--prompt", "Count the objects.", "--out", str(tmp_path / "g")]
    assert calibrate.main(flags) == 130 and "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "g").exists()
