"""What a method can see of pictures: the place and contrast of each token, and the methods that use them."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from PIL import Image

from kernels import window_scores
from model import Generation, load
from model import view as views
from model.image import ImageSettings, contrast_of, kept_of_tiles, normalise, places_of, to_tiles
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
    assert places_of(2, 4).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert places_of(2, 5).tolist() == [[-1, 0], [0, 0], [0, 1], [1, 0], [1, 1]]
    assert contrast_of(torch.rand(1, 3, 4, 4), 2, 5)[0] == 0


@pytest.mark.parametrize("size", [(200, 90), (90, 200), (111, 112), (300, 80), (50, 50)])
@pytest.mark.parametrize("order", ["hf", "orig"])
def test_tiles_say_where_in_the_picture_they_look(size, order):
    """A dark part on a light ground is found at the right places, in the whole picture and in its tiles."""
    settings = dataclasses.replace(ImageSettings(56, "anyres", pinpoints=PINPOINTS), order=order)
    wide, high = size
    picture = Image.new("RGB", size, (250, 240, 230))
    picture.paste((20, 30, 90), (int(0.5 * wide), int(0.25 * high), int(0.9 * wide), int(0.5 * high)))
    squares, grid = to_tiles(picture, settings)
    cut = kept_of_tiles(grid, 8, size, order)
    rows, columns = (part.stop - part.start for part in cut)
    tokens = 64 + rows * (columns + 1)
    places = places_of(8, tokens, cut)
    contrast = contrast_of(torch.stack([normalise(s, settings) for s in squares]), 8, tokens, cut, grid)
    assert len(places) == len(contrast) == tokens
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
def test_a_view_knows_the_attention_of_any_rows_and_of_the_next_layer(heads, kv_heads):
    """The next layer's attention is what that layer then measures. No row sees later tokens."""
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
    rows = torch.tensor([0, 7, 3])
    for view, _ in seen:
        scores = view._q.double() @ view.keys.double().repeat_interleave(heads // kv_heads, 0).mT
        scores *= view.keys.shape[-1] ** -0.5
        weights = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf")).softmax(-1)
        torch.testing.assert_close(view.row_attention(rows).double(), weights[:, rows].mean(0), rtol=1e-4, atol=1e-6)
        assert view.counts == [9] and view.whole_spans == [(2, 6)]
    with pytest.raises(ValueError, match="next layer"):
        seen[2][0].next_attention()
    for wrong in (torch.tensor([12]), torch.tensor([-1]), torch.tensor([1.0]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match="give int64 indices"):
            seen[0][0].row_attention(wrong)


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
