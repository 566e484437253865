"""What a method can see of pictures: the place and contrast of each token, and the methods that use them."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import refusal
from PIL import Image

from kernels import window_scores
from model import Generation, load
from model import view as views
from model.cache import RaggedCache
from model.image import ImageSettings, Picture, prepare
from model.layout import Layout
from model.llama import rope_table
from model.pruning import Method, make_method
from model.view import Pruning, View
from tests.given import given_view
from tests.oracle import small_llama
from tests.paths import DEMO
from tests.seeds import torch_random
from tools import evaluate, scenes

PINPOINTS = tuple((a * 56, b * 56) for a, b in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1)))


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, "fp32")


def board(rows, columns, layer=1, contrast=None):
    """The view of one picture in one of 4 layers with 4 heads."""
    places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns))]
    n = rows * columns
    return given_view([(3, n + 3)], n + 5, 4, 4, 4, layer, places=places, contrast=contrast)


# ---------------------------------------------------------------- places and contrast


def test_a_square_is_read_row_by_row_behind_its_cls():
    assert Layout(2, 0, (2, 2)).places.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert Layout(2, 1, (2, 2)).places.tolist() == [[-1, 0], [0, 0], [0, 1], [1, 0], [1, 1]]
    assert Layout(2, 1, (2, 2)).contrast(torch.rand(1, 3, 4, 4))[0] == 0


@pytest.mark.parametrize("size", [(200, 90), (90, 200), (111, 112), (300, 80), (50, 50)])
@pytest.mark.parametrize("order", ["hf", "orig"])
def test_tiles_say_where_in_the_picture_they_look(size, order):
    """A dark part on a light ground is found at the right places, in the whole picture and in its tiles."""
    settings = dataclasses.replace(ImageSettings(56, "anyres", pinpoints=PINPOINTS), order=order)
    wide, high = size
    picture = Image.new("RGB", size, (250, 240, 230))
    picture.paste((20, 30, 90), (int(0.5 * wide), int(0.25 * high), int(0.9 * wide), int(0.5 * high)))
    seen = prepare(Picture("", picture), settings, 8, 0)
    (rows, columns), places, contrast = seen.layout.map, seen.layout.places, seen.contrast
    assert len(places) == len(contrast) == 64 + rows * (columns + 1)
    dark = 0
    for (row, column), far in zip(places.tolist(), contrast.tolist(), strict=True):
        down, right = (8, 8) if row < 8 else (rows, columns)
        if column == columns and row >= 8:
            assert far == 0  # a newline
            continue
        y, x = (row % 8 if row < 8 else row - 8, column)
        y, x = (y + 0.5) / down, (x + 0.5) / right
        near = min(abs(x - 0.5) * right, abs(x - 0.9) * right, abs(y - 0.25) * down, abs(y - 0.5) * down)
        rim = row >= 8 and (row in (8, 7 + rows) or column in (0, columns - 1))  # may show some black canvas
        if near > 1.1 and not rim:  # the patch lies entirely on one side of every edge
            inside = 0.5 < x < 0.9 and 0.25 < y < 0.5
            assert (far > contrast.mean()) == inside, (row, column)
            dark += inside
    assert dark > 0 or min(rows, columns) < 10


def truth(scene):
    """(256,) bool: patches that show a thing or a sign."""
    shown = torch.zeros(256, dtype=torch.bool)
    for item in (*scene.things, *([scene.sign] if scene.sign else [])):
        shown[list(scenes.patches_of(item))] = True
    return shown


def test_what_stands_out_is_what_was_drawn(demo):
    """In 20 scenes nearly all patches of things are found; the others found are shadows or edges of things."""
    found = drawn = right = 0
    for number in range(20):
        scene = evaluate.held_out_questions(evaluate.FIRST + number, False, False, 0)[0][0]
        (contrast,), shown = evaluate.views_of(demo, [scene])["contrast"], truth(scene)
        out = contrast > contrast.mean()
        found, drawn, right = found + out.sum(), drawn + shown.sum(), right + (out & shown).sum()
    assert right / drawn > 0.98 and right / found > 0.7


def test_an_answer_and_the_evaluation_look_at_the_same(demo):
    scene = evaluate.held_out_questions(evaluate.FIRST, False, False, 0)[0][0]
    views = evaluate.views_of(demo, [scene])
    generation = Generation(demo, "What?", [scenes.draw_scene(scene)])
    assert views["places"][0].equal(generation.places[0]) and views["contrast"][0].equal(generation.contrast[0])


def test_places_follow_what_leaves_the_prompt():
    """A method that narrows the prompt and then prunes K and V sees the places of the remaining tokens."""
    seen = []

    class Both:
        def keep(self, view):
            seen.append(view)

        def narrow(self, view):
            if view.layer == 2:
                return None
            keep = torch.ones(view.tokens, dtype=torch.bool)
            keep[3 : 3 + (12, 8)[view.layer] : (3, 4)[view.layer]] = False
            return keep

    places = [torch.cartesian_prod(torch.arange(3), torch.arange(4))]
    pruning = Pruning(
        Method("both", Both(), {}), 3, [(3, 15)], places, lambda: [torch.arange(12.0)], backend="torch", remember=True
    )
    q, k = torch.randn(2, 1, 4, 17, 8, generator=torch_random(0))
    left, stays = [*range(12)], torch.arange(17)
    for layer, after in enumerate(([1, 2, 4, 5, 7, 8, 10, 11], [2, 4, 5, 8, 10, 11], None)):
        _, rows = pruning(layer, q, k, k)
        assert seen[layer].spans == [(3, 3 + len(left))] and seen[layer].contrast()[0].tolist() == left
        assert seen[layer].places[0].tolist() == [[i // 4, i % 4] for i in left] and seen[layer].keys.equal(k[0])
        assert pruning.masks[layer].nonzero()[:, 1].view(4, -1)[0].tolist() == stays.tolist()  # of the whole prompt
        if after is None:
            assert rows is None
            break
        q, k, stays, left = q[:, :, rows], k[:, :, rows], stays[rows], after


def test_what_a_method_writes_into_its_view_does_not_reach_the_model():
    """Nor what it sees of the next layer, nor which tokens count as text."""
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=torch_random(0))
    places, contrast, before = [torch.ones(4, 2)], [torch.arange(4.0)], [t.clone() for t in (q, k, v)]

    def writes(view):
        mine = [view.keys, view.values, view.queries(), view.value_norms(), *view.places, *view.contrast()]
        for tensor in (*mine, view.attention()):
            tensor.zero_()
        assert view.attention().sum(1).allclose(torch.ones(1))  # a later measurement is not changed
        return view.text.logical_not_().expand(view.kv_heads, -1)  # drops the text

    pruning = Pruning(make_method(writes), 2, [(2, 6)], places, lambda: contrast, backend="torch")
    for layer in range(2):
        keep, _ = pruning(layer, q, k, v)
        assert keep.all()  # text is kept whatever a method returns
    assert all(map(torch.equal, (q, k, v), before)) and places[0].all() and contrast[0].sum() == 6


def test_attention_is_measured_once_per_layer_and_query(monkeypatch):
    """Against a softmax in float64; the rows stop after the last picture, and look-ahead rows see each other."""
    measured = []
    counted = lambda *given, **how: measured.append(given) or window_scores(*given, **how)  # noqa: E731
    monkeypatch.setattr(views, "window_scores", counted)
    q, k, v = torch.randn(3, 1, 4, 12, 8, generator=torch_random(0))
    k, v = k[:, :2], v[:, :2]
    view = View(0, 3, q, k, v, [(1, 4), (5, 7)], ahead=2, backend="torch")
    weights = q[0].double() @ k[0].double().repeat_interleave(2, 0).transpose(1, 2) * 8**-0.5
    weights = weights.masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf")).softmax(-1)[..., :10]
    for asked, rows in (((), [9]), ((2,), [8, 9]), ((99,), [7, 8, 9]), ((1, "lookahead"), [10, 11])):
        torch.testing.assert_close(view.attention(*asked).double(), weights[:, rows].mean(1), rtol=1e-5, atol=1e-6)
    assert view.attention(3).equal(view.attention(99)) and len(measured) == 4
    assert view.queries(2).equal(q[0, :, 8:10]) and view.keys.equal(k[0, :, :10]) and view.tokens == 10
    torch.testing.assert_close(view.value_norms(), v[0, :, :10].abs().sum(-1))
    with pytest.raises(ValueError, match='setting query="lookahead"'):
        View(0, 3, q, k, v, [(1, 4)]).attention(query="lookahead")
    for wrong in ({"query": "look-ahead"}, {"rows": 0}, {"rows": True}, {"rows": 1.5}):
        with pytest.raises(ValueError, match="give rows of 1 or more"):
            view.attention(**wrong)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_a_view_knows_the_attention_of_the_next_layer(heads, kv_heads):
    """It is what that layer then measures."""
    model, seen = small_llama(heads, kv_heads), []

    class Looks:
        def keep(self, view):
            following = [view.next_attention(n) for n in (1, 4, 99)] if view.layer < 2 else None
            seen.append((view, following))

    method = Method("looks", Looks(), {})
    pruning = Pruning(method, 3, [(2, 6)], backend="torch", counts=[9])
    model.prefill(torch.randn(1, 12, 32), prune=pruning)
    for (_, following), (after, _) in pairwise(seen):
        for n, attention in zip((1, 4, 99), following, strict=True):
            torch.testing.assert_close(attention, after.attention(n), rtol=1e-4, atol=1e-6)
        assert after.counts == [9] and after.whole_spans == [(2, 6)]
    with pytest.raises(ValueError, match="next layer"):
        seen[2][0].next_attention()


@pytest.mark.parametrize("known", [10, 7])
def test_attention_of_any_rows_is_that_of_a_softmax(backend, known):
    """Against a loop in float64. known: last rows whose queries are stored; two look-ahead rows follow."""
    q, k, v = torch.randn(3, 1, 4, 12, 8)
    q, k, v = q[:, :, 10 - known :], k[:, :2], v[:, :2]
    view = View(0, 3, q, k, v, [(1, 4), (5, 7)], ahead=2, backend=backend)

    def row(head, place):
        key = k[0, head // 2, : place + 1].double()
        weights = (key @ q[0, head, place - (10 - known)].double() * 8**-0.5).exp()
        return F.pad(weights / weights.sum(), (0, 9 - place))

    for rows in ([9], [3], [8, 3, 3], [9, 5, 4, 6], list(range(3, 10))):
        wanted = torch.stack([torch.stack([row(head, place) for place in rows]) for head in range(4)])  # (Hq, R, T)
        asked = torch.tensor(rows)
        torch.testing.assert_close(view.attention(asked).double(), wanted.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(view.row_attention(asked).double(), wanted.mean(0), rtol=1e-5, atol=1e-6)
        view.attention(asked).zero_()
    torch.testing.assert_close(view.attention(torch.tensor([7, 8, 9])), view.attention(3), rtol=1e-5, atol=1e-6)
    for wrong in ([], [-1], [9 - known], [10], [[9]], [9.0]):
        for ask in (view.attention, view.row_attention):
            with pytest.raises(ValueError, match=f"give int64 indices .* from {10 - known} to 9"):
                ask(torch.tensor(wrong, dtype=None if wrong else torch.int64))


# ---------------------------------------------------------------- tokens that are averaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Averages:
    """Returns the owners given for each layer; notes what it sees."""

    owners: dict
    seen: list = dataclasses.field(default_factory=list)

    def narrow(self, view):
        self.seen.append(view)
        return self.owners.get(view.layer)


SPANS = [(2, 8), (10, 13)]  # of 15 tokens
OWNERS = {  # layer: owner of each token that it sees
    0: [0, 1, 2, 5, -1, 5, 5, 2, 8, 9, 5, 11, -1, 13, 14],  # 2 and 7; 3, 5, 6 and 10, across two pictures
    1: [0, 1, 2, 2, 4, 5, 6, 7, 8],  # then 2 and 5
}
LEFT = [[*range(15)], [0, 1, 2, 5, 8, 9, 11, 13, 14], [0, 1, 2, 8, 9, 11, 13, 14]]


def averaged(model, x, owners):
    """The decoder's layers, one after the other, with means in loops -> hidden states of the tokens that are left."""
    left = [*range(len(x))]
    for layer, block in enumerate(model.model.layers):
        rope = rope_table(torch.tensor(left), model.config, x.dtype)  # the positions of the prompt
        x = block.prefill(x[None], rope)[0][0]
        owner = owners.get(layer, range(len(x)))
        stay = [i for i, own in enumerate(owner) if own == i]
        x = torch.stack([torch.stack([x[i] for i, own in enumerate(owner) if own == u]).mean(0) for u in stay])
        left = [left[i] for i in stay]
    return model.model.norm(x)


def averaging(owners, num_layers=3, **more):
    """A `Pruning` with `Averages` for prompts of 15 tokens, and what it sees."""
    method = Averages(owners={layer: torch.tensor(owner) for layer, owner in owners.items()})
    places = [torch.cartesian_prod(torch.arange(rows), torch.arange(3)) for rows in (2, 1)]
    contrast = [torch.arange(6.0), torch.arange(3.0)]
    pruning = Pruning(
        make_method(method), num_layers, SPANS, places, lambda: contrast, backend="torch", remember=True, **more
    )
    return pruning, method.seen


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_a_token_is_averaged_into_one_that_stays_at_its_place(kv_heads):
    model, x = small_llama(kv_heads=kv_heads), torch.randn(1, 15, 32)
    before, cache = x.clone(), RaggedCache(3, backend="torch")
    pruning, seen = averaging(OWNERS, embeddings=x[0])
    hidden = model.prefill(x, cache, prune=pruning)
    torch.testing.assert_close(hidden[0], averaged(model, x[0], OWNERS), rtol=1e-4, atol=1e-5)
    assert x.equal(before) and cache.pos.tolist() == [15]
    assert cache.kv_len.tolist() == [[len(left)] * kv_heads for left in LEFT]
    for view, left, mask in zip(seen, LEFT, pruning.masks, strict=True):
        assert view.origin.tolist() == left and mask.nonzero()[:, 1].tolist() == left * kv_heads
        assert view.whole_spans == SPANS and view.embeddings.equal(x[0])
        assert [j for a, b in view.spans for j in left[a:b]] == [j for j in left if not view.text[left.index(j)]]
        kept = [[j - a for j in left if a <= j < b] for a, b in SPANS]
        assert [far.tolist() for far in view.contrast()] == kept
        assert [place.tolist() for place in view.places] == [[[j // 3, j % 3] for j in row] for row in kept]
    without = {layer: [own if own == i else -1 for i, own in enumerate(owner)] for layer, owner in OWNERS.items()}
    dropped = averaged(model, x[0], without)
    assert (hidden[0, -1] - dropped[-1]).abs().max() > 1e-2  # the means have an effect
    none, _ = averaging(without)
    masks, _ = averaging({})
    masks.method = make_method(Keeps(keep={i: torch.tensor(o) >= 0 for i, o in without.items()}))
    both = [model.prefill(x, prune=pruning) for pruning in (none, masks)]
    assert both[0].equal(both[1])  # owners of -1 are a mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keeps:
    keep: dict

    def narrow(self, view):
        return self.keep.get(view.layer)


@torch.no_grad()
def test_text_protected_tokens_and_the_last_one_own_themselves():
    """Whatever a method says of them; they are in no mean."""
    x, q = torch.randn(1, 17, 8), torch.zeros(1, 1, 17, 4)  # two look-ahead rows
    before, protected = x.clone(), torch.zeros(15, dtype=torch.bool)
    protected[[3, 11]] = True
    pruning, _ = averaging({0: [4] * 15}, protected=protected, ahead=2)
    pruning.method = dataclasses.replace(pruning.method, settings={"sink": 3})
    keep, go_on = pruning(0, q, q, q, x)
    stay = [0, 1, 2, 3, 4, 8, 9, 11, 13, 14]
    assert keep is None and go_on.tolist() == stay
    rest = [i for i in (*stay, 15, 16) if i != 4]
    assert x[0, rest].equal(before[0, rest])
    torch.testing.assert_close(x[0, 4], before[0, [4, 5, 6, 7, 10, 12]].mean(0))
    assert pruning.protected.nonzero()[:, 0].tolist() == [3, 7]
    owner = torch.tensor([*range(10), 10, 10, 10, 10, 10])
    last = Pruning(make_method(Averages(owners={0: owner})), 3, [(2, 8), (10, 15)], backend="torch")
    q, x = q[:, :, :15], torch.randn(1, 15, 8)
    assert last(0, q, q, q, x)[1].tolist() == [*range(11), 14]  # a picture ends the prompt


def test_a_mean_in_bf16_is_rounded_once():
    """A sum of 300 tokens in bf16 would be off; tokens that stay alone keep their bits."""
    x = torch.randn(1, 310, 4).bfloat16() + 1
    q = torch.zeros(1, 1, 310, 4)
    before, owner = x[0].clone(), torch.arange(310)
    owner[2:302] = 7
    pruning = Pruning(make_method(Averages(owners={0: owner})), 2, [(2, 305)], backend="torch")
    _, go_on = pruning(0, q, q, q, x)
    assert go_on.tolist() == [0, 1, 7, *range(302, 310)]
    assert x[0, 7].equal(before[2:302].double().mean(0).bfloat16())
    rest = [0, 1, *range(302, 310)]
    assert x[0, rest].equal(before[rest])


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        ([0, 1, 3, -1, *range(4, 15)], "averages a token of layer 0 into one that does not stay"),
        ([0, 1, 3, 4, *range(4, 15)], "averages a token of layer 0 into one that does not stay"),
        ([0, 1, 15, *range(3, 15)], "averages a token of layer 0 into one that does not stay"),
        ([0, 1, -2, *range(3, 15)], "averages a token of layer 0 into one that does not stay"),
        ([*range(14)], "returned torch.int64 (14,)"),
        ([float(i) for i in range(15)], "returned torch.float32 (15,)"),
    ],
)
def test_owners_that_do_not_stay_are_refused(owner, words):
    """Of a token that is dropped, of one that is averaged itself, of none."""
    pruning, _ = averaging({0: owner})
    x, q = torch.randn(1, 15, 8), torch.zeros(1, 1, 15, 4)
    assert words in refusal(pruning, 0, q, q, q, x)


# ---------------------------------------------------------------- grid, objects


@pytest.mark.parametrize("rate", [0.5, 0.3, 0.15])
@pytest.mark.parametrize("size", [(16, 16), (24, 24), (11, 31)])
def test_a_grid_is_even_in_both_directions(rate, size):
    """Every 5 x 5 window holds its share within 2 tokens, and every token is kept by its share of heads."""
    windows = {}
    for name in ("grid", "random"):
        views = [board(*size, layer) for layer in range(4)]
        keep = torch.stack([make_method(name, rate).keep(view) for view in views]).flatten(0, 1)
        keep = keep[:, slice(*views[0].spans[0])].view(16, *size).float()
        held = torch.nn.functional.avg_pool2d(keep[:, None], 5, 1) * 25
        windows[name] = (held - rate * 25).abs().max()
        across = (keep.sum(0) - 16 * rate).abs().max()  # number of the 16 heads that keep a token
        assert (across < 2) == (name == "grid"), across
        assert len({tuple(head.flatten().tolist()) for head in keep}) == 16  # all heads differ
    assert windows["grid"] < 2.6 < windows["random"]


def test_a_grid_needs_no_map():
    """Tokens of unknown place count as one row, with nearly even gaps between kept ones."""
    keep = make_method("grid", 0.25).keep(given_view([(3, 103)], 105, 4, 4, layer=2))
    for head in keep[:, 3:103]:
        gaps = head.nonzero()[:, 0].diff()
        assert head.sum() == 25 and gaps.max() <= 5 and (gaps < 4).sum() <= 2


def test_objects_come_first_and_the_rest_is_drawn():
    contrast = torch.zeros(256)
    contrast[40:80] = torch.linspace(0.5, 2, 40)
    view = board(16, 16, contrast=[contrast])
    half = make_method("objects", 0.5).keep(view)[:, 3:259]
    assert half[:, 40:80].all() and half.sum(1).tolist() == [128] * 4
    shares = half.float().mean(0)
    assert 0.3 < shares[:40].mean() < 0.5 and len({tuple(head.tolist()) for head in half}) == 4
    few = make_method("objects", keep_tokens=10).keep(view)[:, 3:259]
    stand_out = contrast > contrast.mean()
    assert not few[:, ~stand_out].any() and few.sum(1).tolist() == [10] * 4
    assert math.isclose(few.float().sum(), 40) and few.any(0).sum() > 20  # each head draws its own
    with pytest.raises(ValueError, match="pixels"):
        make_method("objects").keep(board(4, 4))
