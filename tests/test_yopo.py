"""YOPO: against transformers with a mask per head, the planted cases of its rules, and the calibration of its table."""

import dataclasses

import pytest
import torch
from conftest import refusal
from oracle import small_llama
from test_cache import live_bytes
from test_methods import answered, pictures
from test_next import ask, make_next
from test_parity import noise
from yopo_oracle import attention_by_hand, near_mask, yopo_ids

from model import Batch, Generation, InputError, Sampling, load
from model.cache import RaggedCache
from model.looking import looking_attention, looking_mlp
from model.pruning import make_method
from model.pruning.yopo import Looking, Yopo
from model.view import Pruning, pruned_prefill
from tests.given import given_view
from tests.onevision import make_onevision
from tests.sizes import Sizes

# ---------------------------------------------------------------- against transformers

# per layer a ratio for each of 8 query heads over 2 KV heads
TABLE = [
    [0.0] * 8,
    [0.01, 0.2, 0.01, 0.02, 0.01, 0.01, 0.03, 0.02],
    [0.02, 0.01, 0.01, 0.01, 0.02, 0.01, 0.01, 0.09],
    [0.01, 0.03, 0.02, 0.01, 0.01, 0.02, 0.0, 0.03],
]
ACTIVE = [[True, True], [True, False], [False, True], [False, False]]  # above 0.035, with the first layer
SETTINGS = {  # name: settings beside the table
    "table": {},
    "cut": {"cut": 0.5},
    "window": {"radius": 1},
    "half": {"neurons": 0.5},
    "lost": {"renormalise": False},
    "lost and cut": {"renormalise": False, "cut": 0.75, "radius": 2},
    "cache": {"prefill": False},
    "cache and window": {"prefill": False, "radius": 0, "neurons": 0.25},
    "all": {"cut": 0.75, "radius": 2, "neurons": 0.5},
}


@pytest.fixture(scope="module")
def folders(make_hf_checkpoint, tmp_path_factory):
    """Folders of LLaVA, LLaVA-NeXT and LLaVA-OneVision: 4 layers, 8 query heads over 2 KV heads; squares of 36, 16 and
    36 tokens."""
    text = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    square, tiled, shrunk = (tmp_path_factory.mktemp(name) for name in ("square", "tiled", "shrunk"))
    make_hf_checkpoint(square, text, vision={"image_size": 84}, seed=3)
    make_next(make_hf_checkpoint, tiled, text, {"image_size": 56}, seed=3)
    make_onevision(make_hf_checkpoint, shrunk, text, seed=3)
    return square, tiled, shrunk


def of_transformers(folder, generation, settings):
    last = {1.0: 4, 0.75: 3, 0.5: 2}[settings.get("cut", 1.0)]
    return yopo_ids(folder, generation, ACTIVE, last, 24, **{k: v for k, v in settings.items() if k != "cut"})


@torch.inference_mode()
def first_logits(generation):
    return generation.again(generation.prune).prefill()


@pytest.mark.parametrize("question", ["one", "three", "last"])
@pytest.mark.parametrize("name", SETTINGS)
def test_ids_and_kept_sets_are_those_of_transformers(folders, name, question):
    checkpoint = dataclasses.replace(load(folders[0], "fp32"), stop_ids=())
    method = make_method("yopo", settings={"heads": TABLE} | SETTINGS[name])
    found = answered(checkpoint, question, 24, method)
    ids, kept, logits = of_transformers(folders[0], found, SETTINGS[name])
    assert found.token_ids == ids
    torch.testing.assert_close(first_logits(found), logits, rtol=1e-4, atol=1e-4)
    assert found.cache.kv_len.tolist() == [[n + 23 for n in keep.sum(1).tolist()] for keep in kept]
    assert ids != answered(checkpoint, question, 24).token_ids  # otherwise pruning would have no effect here


@pytest.mark.parametrize("name", SETTINGS)
def test_on_llava_next_squares_are_apart_and_newlines_are_cells(folders, name):
    method = make_method("yopo", settings={"heads": TABLE} | SETTINGS[name])
    asked = ask(load(folders[1], "fp32"), "what is <image> and <image>?", [(150, 120), (40, 90)], prune=method)
    asked.sampling, asked.remember = Sampling(24), True
    "".join(asked)
    ids, kept, logits = of_transformers(folders[1], asked, SETTINGS[name])
    assert asked.token_ids == ids and asked.masks.equal(torch.stack(kept))
    torch.testing.assert_close(first_logits(asked), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cut", "all", "cache and window"])
@pytest.mark.parametrize("frames", [0, 3])
def test_on_llava_onevision_shrunk_maps_and_frames_are_apart(folders, name, frames):
    """A picture of 36 tiles, whose map shrinks to 18 x 18 tokens; three frames of 9 and two pictures of one square."""
    method = make_method("yopo", settings={"heads": TABLE} | SETTINGS[name])
    question, sizes = "what is <image> there?", [(150, 150)]
    if frames:
        question, sizes = "is <video> <image> or <image>?", [(150, 150), (50, 40)]
    asked = ask(
        dataclasses.replace(load(folders[2], "fp32"), stop_ids=()), question, sizes,
        prune=method, remember=True, sampling=Sampling(24),
        frames=[noise(50, 40, seed=9 + i) for i in range(frames)],
    )  # fmt: skip
    "".join(asked)
    assert [image["tokens"] for image in asked.images] == ([9, 9, 10, 37, 37] if frames else [36 + 18 * 19])
    ids, kept, logits = of_transformers(folders[2], asked, SETTINGS[name])
    assert asked.token_ids == ids and asked.masks.equal(torch.stack(kept))
    torch.testing.assert_close(first_logits(asked), logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the attention of a layer

SPANS, T = [(3, 39), (45, 71)], 80
PLACES = [  # a square of 6 x 6; a square of 4 x 4 and a map of 2 x 5 below it
    torch.tensor([(y, x) for y in range(6) for x in range(6)]),
    torch.cat(
        (
            torch.cartesian_prod(torch.arange(4), torch.arange(4)),
            torch.cartesian_prod(torch.arange(4, 6), torch.arange(5)),
        )
    ),
]
SIDES = [6, 4]
CELLS = [(0, 0, *cell) for cell in PLACES[0].tolist()] + [(1, int(y >= 4), y, x) for y, x in PLACES[1].tolist()]


def drawn(q_heads=6, kv_heads=3):
    """q, k, v of a layer in float64, and which tokens are vision."""
    vision = torch.zeros(T, dtype=torch.bool)
    for start, stop in SPANS:
        vision[start:stop] = True
    q, k, v = (torch.randn(1, h, T, 8, dtype=torch.float64) for h in (q_heads, kv_heads, kv_heads))
    return q, k, v, vision


@pytest.mark.parametrize("radius", [None, 0, 1, 2, 9])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("heads", [(True, False, True), (False,) * 3, (True,) * 3])
def test_the_attention_is_that_with_whole_masks(heads, radius, renormalise, monkeypatch):
    monkeypatch.setattr("model.looking.ROWS", 10)
    monkeypatch.setattr("model.looking.TEXT_ROWS", 7)
    q, k, v, vision = drawn()
    looking = Looking(torch.tensor(heads), radius, renormalise)
    near = None if radius is None else near_mask(CELLS, radius)
    wanted = attention_by_hand(q, k, v, 8**-0.5, vision, ~looking.heads, near, renormalise)
    assert (looking_attention(q, k, v, looking, SPANS, PLACES, SIDES) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize(("token", "radius", "seen"), [
    (3 + 6 * 2 + 2, 1, [3 + 6 * y + x for y in (1, 2, 3) for x in (1, 2, 3)]),
    (3, 2, [3 + 6 * y + x for y in (0, 1, 2) for x in (0, 1, 2)]),
    (45 + 4 * 3 + 3, 1, [45 + 4 * y + x for y in (2, 3) for x in (2, 3)]),  # not the map, which begins below
    (45 + 16 + 4, 1, [45 + 16 + 5 * y + x for y in (0, 1) for x in (3, 4)]),  # a newline is a cell of the map
])  # fmt: skip
def test_a_vision_token_is_seen_by_its_neighbours_before_and_after_it(token, radius, seen):
    q, k, v, vision = drawn()
    looking = Looking(torch.ones(3, dtype=torch.bool), radius)
    plain = looking_attention(q, k, v, looking, SPANS, PLACES, SIDES)
    v[:, :, token] += 1
    changed = (looking_attention(q, k, v, looking, SPANS, PLACES, SIDES) != plain).any(-1)[0].all(0)
    assert (changed & vision).nonzero()[:, 0].tolist() == seen
    assert (changed & ~vision).nonzero()[:, 0].tolist() == [t for t in range(token, T) if not vision[t]]


def test_deleting_is_one_plus_r_times_zeroing():
    """r: attention to vision over attention to text of a row and head, before anything is dropped."""
    q, k, v, vision = drawn(3, 3)
    blind = torch.zeros(3, dtype=torch.bool)
    deleted, zeroed = (looking_attention(q, k, v, Looking(blind, None, n), SPANS, PLACES, SIDES) for n in (True, False))
    weights = (q @ k.transpose(2, 3) * 8**-0.5).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf).softmax(-1)
    r = weights[..., vision].sum(-1, keepdim=True) / weights[..., ~vision].sum(-1, keepdim=True)
    off = (deleted - (1 + r) * zeroed)[:, :, ~vision].abs().max()
    assert (
        off < 1e-14 and r[0, :, -1].min() > 0.5 and not deleted[:, :, vision].any() and not zeroed[:, :, vision].any()
    )


def test_half_of_the_neurons_are_the_first_ones_and_only_for_vision():
    mlp = small_llama().model.layers[0].mlp
    x, wanted = torch.randn(1, T, 32), []
    vision = drawn()[3]
    n = mlp.gate_proj.out_features
    for t in range(T):
        hidden = torch.nn.functional.silu(mlp.gate_proj(x[0, t])) * mlp.up_proj(x[0, t])
        hidden[n // 2 if vision[t] else n :] = 0
        wanted.append(mlp.down_proj(hidden))
    assert (looking_mlp(mlp, x, 0.5, SPANS)[0] - torch.stack(wanted)).abs().max() < 1e-5


LONG = 700


@torch.no_grad()
def test_no_prefill_holds_a_whole_matrix_of_attention():
    model, spans = small_llama(kv_heads=2), [(20, 320), (320, 650)]
    table = [[1.0] * 4, [1.0, 0.0, 0.0, 0.0], [1.0] * 4]
    for settings in ({}, {"radius": 2, "neurons": 0.5}, {"renormalise": False}):
        method, cache = make_method("yopo", settings={"heads": table} | settings), RaggedCache(3, backend="torch")
        pruning = Pruning(method, 3, spans, backend="torch")
        with Sizes() as sizes:
            pruned_prefill(model, torch.randn(LONG, 32), cache, pruning)
        assert sizes.largest < LONG**2, sizes.where
        assert cache.kv_len.tolist() == [[LONG] * 2, [LONG, LONG - 630], [LONG] * 2]


# ---------------------------------------------------------------- the parts and their switches


def yopo(**settings):
    return make_method("yopo", settings={"heads": TABLE} | settings)


def prefilled(checkpoint, question, method, images=2):
    prompt = {1: "what is left?", 2: "what is <image> left of <image> there?"}[images]
    generation = Generation(checkpoint, prompt, pictures(images), prune=method, backend="torch")
    with torch.inference_mode():
        return generation.prefill(), generation


def held(generation):
    """K and V of the taken slots, (n, D) for each segment of each layer."""
    cache, found = generation.cache, []
    for layer, rows in enumerate(zip(cache.kv_start.tolist(), cache.kv_len.tolist(), strict=True)):
        slots = [slice(a, a + n) for a, n in zip(*rows, strict=True)]
        found += [arena[layer][part] for arena in (cache.k, cache.v) for part in slots]
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"heads": [[1] * 8] * 4},
        {"heads": [[True] * 8] * 4},
        {"retention": 1.0},
        {"threshold": 0, "heads": [[0.1] * 8] * 4},
    ],
)
def test_without_any_part_the_bits_are_those_of_no_pruning(folders, settings):
    checkpoint = load(folders[0], "fp32")
    (logits, ours), (plain, theirs) = (prefilled(checkpoint, "", m) for m in (yopo(**settings), None))
    assert logits.equal(plain) and ours.retention == 1.0
    assert all(a.equal(b) for a, b in zip(held(ours), held(theirs), strict=True))


class Masked(Yopo):
    """The layer cut by blindness of all heads instead of fewer tokens."""

    def attend(self, view):
        after = view.layer >= self.last(view.num_layers)
        return Looking(torch.zeros(view.kv_heads, dtype=torch.bool)) if after else super().attend(view)

    def narrow(self, view):
        return None


@pytest.mark.parametrize("cut", [0.25, 0.5, 0.75])
def test_dropping_vision_tokens_at_the_cut_equals_hiding_them(folders, cut):
    checkpoint = load(folders[0], "fp32")
    (fewer, ours), (hidden, theirs) = (
        prefilled(checkpoint, "", make_method(kind, settings={"heads": TABLE, "cut": cut})) for kind in ("yopo", Masked)
    )
    assert (fewer - hidden).abs().max() < 1e-4 * hidden.abs().max()
    assert ours.cache.kv_len.equal(theirs.cache.kv_len) and ours.kept[round(4 * cut) :] == [0.0] * (4 - round(4 * cut))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(held(ours), held(theirs), strict=True))


def test_the_first_token_changes_only_with_prefill(folders):
    checkpoint = load(folders[0], "fp32")
    plain, without, within = (prefilled(checkpoint, "", m)[0] for m in (None, yopo(prefill=False), yopo()))
    assert without.equal(plain) and not torch.allclose(within, plain, atol=0.1)


def test_a_kv_head_is_active_if_one_of_its_query_heads_is():
    rule = Yopo(heads=[[0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1, 0.1]] * 3, threshold=0.2, skip=0)
    assert rule.active(3, 2).tolist() == [[True, False]] * 3
    assert rule.active(3, 8).sum() == 3 and rule.active(3, 8)[:, 3].all()
    exact = Yopo(heads=[[0.2, 0.3]], threshold=0.2, skip=0)
    assert exact.active(1, 2).tolist() == [[False, True]]  # above, not at


@pytest.mark.parametrize(("layers", "first"), [(4, 1), (11, 1), (12, 2), (32, 2)])
def test_the_first_layers_keep_all_heads(layers, first):
    active = Yopo(heads=[[0.0, 0.0]] * layers).active(layers, 2)
    assert active.all(1).tolist() == [layer < first for layer in range(layers)] and not active[first:].any()
    assert not Yopo(heads=[[0.0, 0.0]] * layers, skip=0).active(layers, 2).any()


def test_masks_are_nested_in_the_threshold_and_in_the_retention():
    table = torch.rand(12, 8).tolist()
    for key, values in (("threshold", (0.9, 0.5, 0.2, 0.0)), ("retention", (0.2, 0.4, 0.7, 1.0))):
        masks = [Yopo(heads=table, **{key: value}).active(12, 4) for value in values]
        assert all((few <= more).all() and few.sum() < more.sum() for few, more in zip(masks, masks[1:], strict=False))


def test_the_retention_counts_all_layers_and_the_lower_head_wins_a_tie():
    table = [[0.0] * 4, [0.5, 0.5, 0.3, 0.5], [0.4, 0.5, 0.1, 0.2]]
    kept = {share: Yopo(heads=table, retention=share).active(3, 4).nonzero().tolist() for share in (0.1, 0.5, 0.75)}
    first = [[0, h] for h in range(4)]
    assert kept == {0.1: first, 0.5: [*first, [1, 0], [1, 1]], 0.75: [*first, [1, 0], [1, 1], [1, 3], [2, 0], [2, 1]]}
    cut = Yopo(heads=table, retention=0.5, cut=0.67).active(3, 4)
    assert cut.tolist() == [[True] * 4, [True, True, False, False], [False] * 4]


def test_the_cut_is_a_share_of_the_depth():
    lasts = [[Yopo(cut=cut).last(layers) for layers in (40, 28, 32, 6, 1)] for cut in (1.0, 0.5, 0.857, 0.01)]
    assert lasts == [[40, 28, 32, 6, 1], [20, 14, 16, 3, 1], [34, 24, 27, 5, 1], [1] * 5]


def test_mistakes_are_told(folders, tmp_path):
    checkpoint = load(folders[0], "fp32")

    def said(**settings):
        return refusal(Generation, checkpoint, "what?", pictures(1), prune=make_method("yopo", settings=settings))

    assert "tools/calibrate.py heads" in said()
    assert "3 layers with 8 query heads, the model 4 with 2 KV heads" in said(heads=TABLE[:3])
    assert "4 layers with 7 query heads" in said(heads=[[1] * 7] * 4)
    assert "4 layers with 6 or 8 query heads" in said(heads=[[1] * 8, [1] * 6, [1] * 8, [1] * 8])
    assert "cut=0.5 keeps less than retention=0.7; give a larger cut" in said(heads=TABLE, cut=0.5, retention=0.7)
    for heads in ([], 3, [3], [[]], [["a"]], [[-1]], [[None]], [[float("nan")]], [[1], 2]):
        with pytest.raises(ValueError, match="heads "):
            make_method("yopo", settings={"heads": heads}).check(1, 1)
    with pytest.raises(ValueError, match="renormalise=false has no effect with prefill=false"):
        make_method("yopo:renormalise=false,prefill=false")
    for setting in ("cut=0", "neurons=0", "neurons=1.5", "radius=-1", "radius=0.5", "skip=-1", "threshold=-1"):
        with pytest.raises(ValueError, match=setting.partition("=")[0] + " "):
            make_method("yopo:" + setting)
    with pytest.raises(ValueError, match="retention and threshold are both given"):
        make_method("yopo:retention=0.5,threshold=0.1")
    view = given_view([(2, 6)], 9, q_heads=4, kv_heads=2)
    with pytest.raises(ValueError, match="heads has 8 per layer, the model 4; calibrate"):
        yopo().keep(view)


class Wrong:
    def attend(self, view):
        return Looking(torch.ones(3, dtype=torch.bool))


class Slim:
    """A user's method with look-ahead rows."""

    def __init__(self, *, query="lookahead"):
        self.query = query

    def attend(self, view):
        return Looking(torch.ones(view.kv_heads, dtype=torch.bool), neurons=0.5)


def test_a_looking_that_cannot_be_done_is_refused(folders, demo):
    with pytest.raises(InputError, match=r"returned heads torch.bool \(3,\).*; give "):
        prefilled(load(folders[0], "fp32"), "", Wrong)
    with pytest.raises(InputError, match="look-ahead rows need the whole MLP; "):
        prefilled(demo, "", Slim, 1)
    every = torch.ones(2, dtype=torch.bool)
    for wrong in ({"radius": -1}, {"radius": "2"}, {"radius": True}, {"neurons": 0}, {"neurons": 2}, {"neurons": -0.5}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name} of Looking is .*; give a .*number"):
            Looking(every, **wrong)
    with pytest.raises(ValueError, match="heads of Looking is a list; give a bool tensor"):
        Looking([True, True])


def test_a_given_table_is_not_compared_with_the_threshold_of_the_checkpoints_table(tmp_path):
    """Ratios of another model are far larger than true."""
    (tmp_path / "yopo.json").write_text('{"heads": [[50, 1], [1, 30]], "threshold": 18.7, "cut": 0.5}')
    own, given = (make_method(spec, folder=tmp_path) for spec in ("yopo", "yopo:heads=[[true,true],[true,false]]"))
    assert (own.rule.threshold, given.rule.threshold, given.rule.cut) == (18.7, Yopo.threshold, 0.5)
    assert given.rule.active(2, 2).tolist() == [[True, True], [False, False]]
    assert make_method("yopo:cut=1.0", folder=tmp_path).rule.active(2, 2).tolist() == [[True, True], [False, True]]


# ---------------------------------------------------------------- the whole


def test_what_is_dropped_is_freed(demo):
    method = make_method("yopo", folder=demo.folder, settings={"cut": 0.67})
    generation = Generation(demo, "Describe the picture.", pictures(1), Sampling(64), prune=method, backend="torch")
    _, before = live_bytes()
    next(iter(generation))
    after, _ = live_bytes(apart=before)
    cache, row = generation.cache, 2 * 32 * 4  # K and V, D, fp32
    assert abs(after - cache.nbytes_reserved) < 0.01 * cache.nbytes_reserved
    heads, text = method.rule.active(6, 4).sum().item(), generation.prompt_tokens - 256
    assert 4 < heads < 16 and generation.bytes_held == (heads * 256 + 24 * text) * row
    assert cache.nbytes_reserved == generation.bytes_held + 24 * 64 * row


def test_in_a_batch_and_in_a_later_turn_answers_are_the_same(folders):
    checkpoint = dataclasses.replace(load(folders[0], "fp32"), stop_ids=())
    methods = [yopo(cut=0.5, radius=1), None, yopo(neurons=0.5)]
    alone = [answered(checkpoint, "three", 8, method, "torch") for method in methods]
    batch = Batch()
    for one in alone:
        batch.add(one.again(one.prune))
    found = {}
    while batch:
        found |= {id(g.prune): g.token_ids for g in batch.advance()}
    assert [found[id(one.prune)] for one in alone] == [one.token_ids for one in alone]
    first = alone[0]
    lengths = first.cache.kv_len.clone()
    later = Generation(checkpoint, "and there?", pictures(1), Sampling(4), before=first)
    "".join(later)
    assert (later.cache.kv_len - lengths).unique().numel() == 1  # of a new turn everything is kept
    assert later.kept == [n + 36.0 for n in first.kept] and later.kept[-1] == 36.0


def test_a_method_before_the_language_model_leaves_the_window_its_places(demo):
    """pick-grid keeps every fourth token or so; those within two rows and columns still see each other."""
    method = make_method("pick-grid:retention=0.5+yopo:radius=2", folder=demo.folder)
    seen = []

    def spy(q, k, v, looking, spans, places, sides):
        seen.append((spans, places, sides))
        return looking_attention(q, k, v, looking, spans, places, sides)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.view.looking_attention", spy)
        prefilled(demo, "", method, 1)
    ((start, stop),), (places,), sides = seen[0]
    assert stop - start == len(places) == 128 and places.max() == 15 and sides == [None]
