"""The stage `pick` (and `merge`, `protect`): fewer vision tokens before the language model. Oracle: transformers' LLaVA
and LLaVA-NeXT, given embeddings that are put together by hand."""

import json
import re
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import exit_code_of, refusal
from test_next import SIDE, SMALL, make_next, random_sizes
from test_parity import noise

from model import Batch, Generation, Sampling, load
from model.api import change_budget, change_method, choose_method, named_with_budget, note_on_settings
from model.image import ImageSettings, Picture, prepare
from model.llama import rope_table
from model.picture import Picked, look, original_positions, origins, pick
from model.pruning import METHODS, Composition, make_method, sets_budget
from model.pruning.downsample import smaller
from model.questions import named_method
from tests.paths import DEMO, DEMO_PICTURE
from tools import bench_decode, harness, show_pruning
from tools.evaluation.replay import Asked, asked_by, replay

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

EARLY = [name for name in METHODS if name != "none" and make_method(name).picks]
SIZES = {"llava": [(60, 40), (30, 31)], "next": [(150, 120), (40, 90)]}
QUESTION = "what is <image> and <image>?"


@pytest.fixture(scope="module")
def pair(make_hf_checkpoint, tmp_path_factory):
    """Function (kind) -> transformers' model, our checkpoint; 36 patches per square, 4 layers in both towers."""
    made = {}

    def get(kind):
        if kind not in made:
            folder, text, vision = tmp_path_factory.mktemp(kind), {"num_hidden_layers": 4}, {"image_size": 84}
            make = make_hf_checkpoint if kind == "llava" else lambda *a, **b: make_next(make_hf_checkpoint, *a, **b)
            hf = make(folder, text, vision, seed=7)
            hf.set_attn_implementation("eager")
            made[kind] = hf, replace(load(folder, "fp32"), stop_ids=())
        return made[kind]

    return get


def ask(checkpoint, kind, method, count=24, question=QUESTION, **options):
    pictures = [noise(*size, seed=i) for i, size in enumerate(SIZES[kind][: question.count("<image>")])]
    return Generation(checkpoint, question, pictures, Sampling(count), template="raw", prune=method, **options)


# ---------------------------------------------------------------- the oracle: what transformers makes of a picture


def patch_order(size, grid, side, pinpoints, square):
    """Patches of a picture's tokens in transformers' order: index through all squares, -1 for a newline."""
    from transformers.models.llava_next import modeling_llava_next as theirs

    whole = list(range(side * side))
    if grid is None:
        return whole
    rows, columns = theirs.get_anyres_image_grid_shape(size[::-1], [list(p) for p in pinpoints], square)
    tiles = torch.arange(side * side, (1 + rows * columns) * side * side).view(rows, columns, side, side)
    seen = theirs.unpad_image(tiles.permute(0, 2, 1, 3).reshape(1, rows * side, columns * side), size[::-1])[0]
    return whole + [index for row in seen.tolist() for index in (*row, -1)]


def rows_of(order):
    """`patch_order` row by row: six of the whole picture, then those of the map with their newlines."""
    rows, rest = [order[i : i + 6] for i in range(0, 36, 6)], order[36:]
    width = rest.index(-1) + 1 if rest else 1
    return rows + [rest[i : i + width] for i in range(0, len(rest), width)]


@torch.no_grad()
def tower(hf, pixels):
    """CLIP's hidden states and attention probabilities of squares (n, 3, S, S)."""
    return hf.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)


def order_of(checkpoint, picture):
    settings, side = checkpoint.image_settings, picture.layout.side
    return patch_order(picture.size, picture.layout.grid, side, settings.pinpoints, settings.size)


@torch.no_grad()
def embeddings(hf, asked, of_picture):
    """x (1, T, C) of a prompt. of_picture(number, features (n, 1 + P, C), order) -> (P', C), NaN: a newline."""
    pieces, number = [], 0
    for token in asked.ids:
        if token != asked.checkpoint.config.image_token_index:
            pieces.append(hf.get_input_embeddings()(torch.tensor([token])))
            continue
        picture = asked.pictures[number]
        features = tower(hf, picture.pixels).hidden_states[-2]
        chosen = of_picture(number, features, order_of(asked.checkpoint, picture))
        tokens = hf.model.multi_modal_projector(chosen.nan_to_num())
        newline = chosen.isnan().any(-1)
        if newline.any():
            tokens[newline] = hf.model.image_newline
        pieces.append(tokens)
        number += 1
    return torch.cat(pieces)[None]


@torch.no_grad()
def says_the_same(hf, asked, x):
    """Same logits after the prompt, same 24 greedy ids."""
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    logits = hf(inputs_embeds=x, attention_mask=mask).logits[0, -1]
    torch.testing.assert_close(asked.prefill(), logits, rtol=1e-4, atol=2e-4)
    "".join(asked)
    ids = hf.generate(
        inputs_embeds=x, attention_mask=mask, do_sample=False, max_new_tokens=24, eos_token_id=None,
        suppress_tokens=asked.checkpoint.never_ids,
    )  # fmt: skip
    assert asked.token_ids == ids[0].tolist() and len(set(asked.token_ids)) > 3


def test_patches_are_in_the_order_of_transformers():
    settings = ImageSettings(SIDE, "anyres", pinpoints=SMALL)
    for size in [(1, 1), (386, 8), (8, 386), (84, 28), *random_sizes(12, 160, seed=3)]:
        picture = prepare(Picture("", noise(*size)), settings, 6, 0)
        assert picture.layout.patches.tolist() == patch_order(size, picture.layout.grid, 6, SMALL, SIDE), size
    plain = replace(settings, mode="crop")
    assert prepare(Picture("", noise(9, 9)), plain, 3, 0).layout.patches.tolist() == list(range(9))
    assert prepare(Picture("", noise(9, 9)), plain, 3, 1).layout.patches.tolist() == [-1, *range(9)]  # CLS


# ---------------------------------------------------------------- rules of this file


@dataclass(frozen=True)
class Third:
    """Every third token, and the first row of the last part: on NeXT a whole row of the map, whose newline stays."""

    def indices(self, tokens, shapes):
        start = sum(rows * columns for rows, columns in shapes[:-1])
        return sorted({*range(1, tokens, 3), *range(start, start + shapes[-1][1])})

    def pick(self, picture):
        return torch.tensor(self.indices(picture.tokens, picture.shapes))


@dataclass(frozen=True)
class Sums:
    """Seven sums of tokens, then the CLS tokens of all squares."""

    cls: bool = True

    def matrix(self, tokens, squares):
        weights = torch.rand(7, tokens, generator=torch.Generator().manual_seed(tokens)) * (2 / tokens)
        weights[3, 5] = 1.0
        return torch.block_diag(weights, torch.eye(squares)) if self.cls else weights

    def pick(self, picture):
        return self.matrix(picture.tokens, picture.squares)


class Everything:
    def pick(self, picture):
        return None


class AllIndices:
    def pick(self, picture):
        return torch.arange(picture.tokens)


@pytest.mark.parametrize("kind", SIZES)
def test_indices_give_the_logits_and_ids_of_transformers(pair, kind):
    hf, checkpoint = pair(kind)

    asked = ask(checkpoint, kind, Third())
    x = embeddings(hf, asked, lambda number, features, order: thinned(features, order)[0])
    says_the_same(hf, asked, x)
    assert asked.prefilled == x.shape[1] < asked.prompt_tokens
    assert asked.absent == asked.prompt_tokens - asked.prefilled


def thinned(features, order):
    """What `Third` leaves: features, NaN for a newline, and each one's index in the picture's tokens."""
    tokens, rows = [patch for patch in order if patch >= 0], rows_of(order)
    picked, kept = {*tokens[1::3], *rows[6 if len(rows) > 6 else 0]} - {-1}, []
    for row in rows:
        kept += [patch in picked or (patch < 0 and picked.issuperset(row[:-1])) for patch in row]
    where = torch.tensor(kept).nonzero()[:, 0]
    flat = torch.cat((features[:, 1:].flatten(0, 1), torch.full((1, features.shape[2]), float("nan"))))
    return flat[torch.tensor(order)[where]], where


@pytest.mark.parametrize("kind", SIZES)
@torch.inference_mode()
def test_original_positions_are_those_of_the_whole_prompt(pair, kind):
    """Against transformers with position_ids, computed from the start for each of 12 tokens, and in a second turn."""
    hf, checkpoint = pair(kind)
    asked = ask(checkpoint, kind, make_method(Third, settings={"positions": "original"}), 12)
    kept = []

    def of_picture(number, features, order):
        chosen, index = thinned(features, order)
        kept.append((index, len(order)))
        return chosen

    x, where, end, pictures = embeddings(hf, asked, of_picture), [], 0, iter(kept)
    for token in asked.ids:
        picture = token == checkpoint.config.image_token_index
        index, length = next(pictures) if picture else (torch.tensor([0]), 1)
        where, end = where + (end + index).tolist(), end + length
    assert end == asked.prompt_tokens and len(where) == x.shape[1]

    def logits(x, where):
        return hf(inputs_embeds=x, position_ids=torch.tensor([where])).logits[0, -1]

    torch.testing.assert_close(asked.prefill(), logits(x, where), rtol=1e-4, atol=2e-4)
    moved = logits(x, list(range(len(where))))
    assert (logits(x, where) - moved).abs().max() > 0.01  # positions matter
    "".join(asked)
    assert int(asked.cache.pos[0]) == asked.prompt_tokens + 11 and asked.moved == 0 < asked.absent
    assert asked.goes_on and asked.unfed == asked.token_ids[11:]

    def feed(tokens):
        more = hf.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
        return torch.cat((x, more), 1), where + [end + i for i in range(len(tokens))]

    for i, token in enumerate(asked.token_ids):
        found = logits(*feed(asked.token_ids[:i]))
        found[checkpoint.never_ids] = float("-inf")
        assert found.argmax() == token
    later = Generation(checkpoint, "why?", (), Sampling(2), before=asked)
    first = later.prefill()
    torch.testing.assert_close(first, logits(*feed(later.ids[len(asked.ids) :])), rtol=1e-4, atol=2e-4)
    assert later.moved == 0 and later.goes_on


def test_an_answer_follows_the_whole_prompt_if_that_ends_with_a_picture(pair):
    """At original positions the answer and the look-ahead rows do not move up to the last token that was picked."""
    checkpoint, method = pair("llava")[1], make_method(Third, settings={"positions": "original"})
    picture = noise(33, 50, seed=9)
    asked = Generation(checkpoint, "see <image>", [picture], Sampling(9), "raw", prune=method)
    asked.prefill()
    last = asked.pick_images(method)[1][0].origin[-1]
    assert last < asked.vision_tokens - 1  # the picture's last token is dropped
    assert int(asked.cache.pos[0]) == asked.prompt_tokens
    "".join(asked)
    assert asked.goes_on and asked.unfed == asked.token_ids[8:]


def test_a_cls_token_has_the_position_after_the_tokens_before_it():
    """Two pictures of 4 tokens, at 2 and at 7; CLS twice in a row, merged tokens out of order."""
    picked = [Picked(torch.tensor([-1, -1, 3, 1]), None), Picked(torch.tensor([2, -1]), None)]
    origin = origins(picked, [(2, 6), (7, 11)], 12)
    assert origin.tolist() == [0, 1, -1, -1, 5, 3, 6, 9, -1, 11]
    assert original_positions(origin).tolist() == [0, 1, 2, 2, 5, 3, 6, 9, 10, 11]


def test_look_ahead_rows_follow_the_prompt_whatever_its_positions():
    """One picture, one dropped token: its position stays empty, and the rows' attention is that to a hidden column."""
    demo = load(DEMO, "fp32")
    seen = {}

    class AllButLast:
        def pick(self, picture):
            return torch.arange(picture.tokens - 1)

    class Look:
        query: str = "lookahead"

        def __init__(self, *, query="lookahead"):
            self.query = query

        def keep(self, view):
            seen[view.layer] = view.attention(query="lookahead")

    for positions in ("original", "contiguous"):
        method = Composition(make_method(AllButLast, settings={"positions": positions}), make_method(Look))
        Generation(demo, "What is there?", DEMO_PICTURE, Sampling(1), prune=method).prefill()
        rows, language = seen.copy(), demo.model.language_model
        if positions == "original":
            asked = Generation(demo, "What is there?", DEMO_PICTURE, Sampling(1))
            x, ((_, stop),) = demo.model.splice(asked.ids, asked.encode_images())
            whole = torch.cat((x, demo.lookahead.embeddings.reshape(demo.lookahead.rows, -1)))
            mask = torch.ones(len(whole), len(whole), dtype=torch.bool).tril()
            mask[:, stop - 1] = torch.arange(len(whole)) == stop - 1
            with torch.inference_mode():
                rope = rope_table(torch.arange(len(whole)), language.config, whole.dtype)
                _, q, k, _ = language.model.layers[0].prefill(whole[None], rope, mask, demo.lookahead.layers[0])
            scores = (q[0, :, -demo.lookahead.rows :] @ k[0].repeat_interleave(2, 0).mT) * q.shape[-1] ** -0.5
            hidden = scores.masked_fill(~mask[-demo.lookahead.rows :], float("-inf")).softmax(-1).mean(1)
            wanted = torch.cat((hidden[:, : stop - 1], hidden[:, stop : len(x)]), 1)
            torch.testing.assert_close(rows[0], wanted, rtol=1e-4, atol=1e-6)
        else:
            assert (rows[0] - wanted).abs().max() > 1e-5


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("kind", SIZES)
def test_matrices_give_the_logits_and_ids_of_transformers(pair, kind, cls):
    hf, checkpoint = pair(kind)

    def of_picture(number, features, order):
        flat, tokens = features[:, 1:].flatten(0, 1), [patch for patch in order if patch >= 0]
        matrix = Sums(cls).matrix(len(tokens), len(features))
        return matrix @ torch.cat((flat[tokens], *([features[:, 0]] if cls else [])))

    asked = ask(checkpoint, kind, Sums(cls))
    says_the_same(hf, asked, embeddings(hf, asked, of_picture))
    new = sum(7 + cls * len(picture.squares) for picture in asked.pictures)
    assert asked.prefilled == asked.prompt_tokens - asked.vision_tokens + new and asked.kept == [new] * 4


# ---------------------------------------------------------------- what a method sees


class Seen:
    """Picks everything; `seen` collects what it is shown."""

    def __init__(self):
        self.seen = []

    def layers(self, num_layers):
        return [0, 2, num_layers - 1]

    def pick(self, picture):
        self.seen.append(picture)


def views(checkpoint, kind, rule=None, question=QUESTION):
    """(`PictureView`, `Prepared`) of each picture of a prompt."""
    rule = rule or Seen()
    asked = ask(checkpoint, kind, rule, question=question)
    with torch.inference_mode():
        asked.prefill()
    return list(zip(rule.seen, asked.pictures, strict=True))


@pytest.mark.parametrize("kind", SIZES)
@torch.no_grad()
def test_attention_and_keys_are_those_of_transformers(pair, kind):
    hf, checkpoint = pair(kind)
    for view, picture in views(checkpoint, kind):
        states, patches = tower(hf, picture.pixels), torch.tensor([p for p in order_of(checkpoint, picture) if p >= 0])
        square, cell = patches // 36, patches % 36 + 1
        assert view.tokens == len(patches) and view.squares == len(picture.pixels) and view.num_layers == 4
        assert view.tile.equal(square) and (view.grid, view.side) == (picture.layout.grid, 6)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(view.features, states.hidden_states[-2][square, cell], **close)
        torch.testing.assert_close(view.cls_features, states.hidden_states[-2][:, 0], **close)
        wanted = hf.model.multi_modal_projector(view.features)
        torch.testing.assert_close(view.projected, wanted, **close)
        for layer in (0, 2, 3):  # LLaVA does not run the last one
            attention = states.attentions[layer]  # (n, H, 1 + P, 1 + P)
            torch.testing.assert_close(view.cls_attention(layer), attention[square, :, 0, cell].T, **close)
            module = hf.model.vision_tower.encoder.layers[layer]
            x = module.layer_norm1(states.hidden_states[layer])
            keys = module.self_attn.k_proj(x).unflatten(-1, (2, -1))  # (n, 1 + P, H, D)
            torch.testing.assert_close(view.keys(layer), keys[square, cell].transpose(0, 1), **close)
            rows = torch.zeros(2, len(patches), len(patches))
            for i in range(len(patches)):
                same = square == square[i]
                rows[:, i, same] = attention[square[i], :, cell[i]][:, cell[same]]
            for first, last in ((0, view.tokens), (3, 4), (30, view.tokens - 1)):
                torch.testing.assert_close(view.attention(layer, first, last), rows[:, first:last], **close)


def test_shapes_and_places_are_those_of_the_parts(pair):
    for kind in SIZES:
        for view, picture in views(pair(kind)[1], kind):
            whole, *tiles = view.shapes
            assert whole == (6, 6) and len(tiles) == (picture.layout.grid is not None)
            assert view.tokens == sum(rows * columns for rows, columns in view.shapes) == len(view.places)
            assert view.places[:36].equal(torch.cartesian_prod(torch.arange(6), torch.arange(6)))
            for rows, columns in tiles:
                cells = torch.cartesian_prod(torch.arange(rows) + 6, torch.arange(columns))
                assert view.places[36:].equal(cells)
            assert view.places.equal(picture.layout.places[picture.layout.patches >= 0])


def test_views_are_copies_and_layers_have_to_be_named(pair):
    ((view, _), *_) = views(pair("llava")[1], "llava", question="what is <image>?")
    for measured in (
        lambda: view.features, lambda: view.cls_features, lambda: view.projected, lambda: view.keys(2),
        lambda: view.cls_attention(2), lambda: view.attention(2, 0, 3), lambda: view.tile + 0 * view.places[:, 0] + 1,
    ):  # fmt: skip
        before = measured().clone()
        measured().zero_()
        assert before.any() and measured().equal(before)
    for layer in (1, -1, 4, "0"):
        with pytest.raises(ValueError, match="was not named; return it from layers"):
            view.cls_attention(layer)


def test_a_tower_without_cls_says_which_measures_need_it(pair):
    ((view, _), *_) = views(pair("llava")[1], "llava", question="what is <image>?")
    view._cls = 0
    for measure in (lambda: view.cls_attention(0), lambda: view.cls_features):
        with pytest.raises(ValueError, match="needs the CLS token of the vision tower, and this tower has none"):
            measure()


# ---------------------------------------------------------------- no-op


@pytest.mark.parametrize("rule", [Everything(), AllIndices(), "pick-grid", "pick-random", "downsample"])
@pytest.mark.parametrize("kind", SIZES)
def test_picking_everything_is_no_pruning_bit_for_bit(pair, kind, rule):
    checkpoint = pair(kind)[1]
    method = make_method(rule, 1.0) if isinstance(rule, str) else rule
    plain, picked = ask(checkpoint, kind, None), ask(checkpoint, kind, method)
    with torch.inference_mode():
        assert picked.prefill().equal(plain.prefill())
    "".join(plain), "".join(picked)
    assert picked.token_ids == plain.token_ids and picked.kept == plain.kept and picked.absent == 0
    assert picked.bytes_held == plain.bytes_held and picked.spans == plain.spans and picked.retention == 1.0


# ---------------------------------------------------------------- merging inside the tower


@dataclass(frozen=True)
class Merge:
    """After layer 1, the 2 x 2 windows of the upper half become their means, first; the rest stays."""

    merge_after = 1

    def matrix(self):
        windows = torch.zeros(9, 36)
        for i in range(9):
            row, column = 2 * (i // 3), 2 * (i % 3)
            windows[i, [6 * row + column, 6 * row + column + 1, 6 * row + column + 6, 6 * row + column + 7]] = 0.25
        return torch.cat((windows[:6], torch.eye(36)[24:]))  # 6 + 12 tokens

    def layers(self, num_layers):
        return [1, 3]

    def merge(self, patches):
        assert patches.shape[1:] == (6, 6, 32)
        return self.matrix().expand(len(patches), -1, -1)


@pytest.mark.parametrize("kind", SIZES)
@torch.no_grad()
def test_merged_patches_give_the_logits_and_ids_of_transformers(pair, kind):
    hf, checkpoint = pair(kind)
    clip, matrix = hf.model.vision_tower, Merge().matrix()

    def merged_features(pixels):
        """The tower by hand, with fewer tokens after layer 1, to the output of layer 2."""
        x = clip.pre_layrnorm(clip.embeddings(pixels))
        for i, layer in enumerate(clip.encoder.layers[:3]):
            x = layer(x, attention_mask=None)
            x = x[0] if isinstance(x, tuple) else x
            if i == 1:
                x = torch.cat((x[:, :1], torch.stack([matrix @ square for square in x[:, 1:]])), 1)
        return x

    origins = []

    def of_picture(number, features, order):
        features, exists, origin = merged_features(asked.pictures[number].pixels)[:, 1:], [], []
        for square in range(len(features)):
            for token, weights in enumerate(matrix):
                members = [36 * square + cell for cell in weights.nonzero()[:, 0].tolist()]
                seen = [order.index(patch) for patch in members if patch in order]
                exists += [features[square, token]] if seen else []
                origin += seen[:1]
        origins.append(origin)
        return torch.stack(exists)

    asked = ask(checkpoint, kind, Merge(), remember=True)
    x = embeddings(hf, asked, of_picture)
    says_the_same(hf, asked, x)
    assert asked.prefilled == x.shape[1] and asked.kept == [float(sum(map(len, origins)))] * 4
    for (start, stop), origin in zip(asked.spans, origins, strict=True):
        shown = asked.masks[..., start:stop]
        assert shown.all((0, 1)).nonzero()[:, 0].tolist() == sorted(origin) and shown.sum() == 8 * len(origin)


def test_after_a_merge_the_view_shows_the_merged_tokens(pair):
    seen = []

    class Shown(Merge):
        def protect(self, picture):
            seen.append(picture)
            seen.append((picture.cls_attention(3), picture.keys(3), picture.attention(3, 0, 5), picture.features))
            with pytest.raises(ValueError, match="layer 1 is before the merge; ask for a layer above 1"):
                picture.keys(1)

    asked = ask(pair("llava")[1], "llava", Shown(), question="what is <image>?")
    with torch.inference_mode():
        asked.prefill()
    view, (cls, keys, rows, features) = seen
    assert view.tokens == 18 == cls.shape[1] == keys.shape[1] == rows.shape[2] == len(features)
    assert view.places[:6].tolist() == [[0, 0], [0, 2], [0, 4], [2, 0], [2, 2], [2, 4]]
    assert view.places[6:].tolist() == [[i // 6, i % 6] for i in range(24, 36)]
    assert (cls.sum(1) < 1).all() and (cls.sum(1) > 0.3).all() and (rows.sum(2) < 1).all()


# ---------------------------------------------------------------- what later stages and reports know


class Watch:
    """Keeps token `kept` of every picture in each head; `seen` collects the views."""

    def __init__(self, kept=2):
        self.kept, self.seen = kept, []

    def keep(self, view):
        self.seen.append(view)
        keep = view.text.expand(view.kv_heads, -1).clone()
        for start, _ in view.spans:
            keep[:, start + self.kept] = True
        return keep


@torch.inference_mode()
def test_half_precision_measures_in_fp32_and_stays_near(pair, tmp_path_factory):
    _, checkpoint = pair("llava")
    half = replace(load(checkpoint.folder, "bf16"), stop_ids=())
    ((exact, _), *_), ((near, _), *_) = views(checkpoint, "llava"), views(half, "llava")
    assert near.features.dtype == near.keys(2).dtype == torch.bfloat16 and near.cls_attention(2).dtype == torch.float32
    assert (near.cls_attention(2) - exact.cls_attention(2)).abs().max() < 0.05
    for rule in (Sums(), Merge(), Third()):
        a, b = (ask(which, "llava", rule).prefill().float().softmax(0) for which in (checkpoint, half))
        assert (a - b).abs().max() < 0.1


@pytest.mark.parametrize("kind", SIZES)
def test_later_stages_know_where_the_tokens_were(pair, kind):
    checkpoint, watch = pair(kind)[1], Watch()
    plain = ask(checkpoint, kind, None)
    both = Composition(make_method(Third()), make_method(watch))
    asked = ask(checkpoint, kind, both, remember=True)
    with torch.inference_mode():
        plain.prefill()
        asked.prefill()
    assert asked.spans == plain.spans and asked.prompt_tokens == plain.prompt_tokens  # of the whole prompt
    assert asked.masks.shape == (4, 2, asked.prompt_tokens)
    end = 0
    for number, picture in enumerate(asked.pictures):
        patches, chosen = order_of(checkpoint, picture), []
        tokens = [i for i, patch in enumerate(patches) if patch >= 0]
        (_, *tiles), rows = [(6, 6), *([1] if picture.layout.grid else [])], rows_of(patches)
        first = tokens[36:][: len(rows[6]) - 1] if tiles else tokens[:6]
        chosen = {*tokens[1::3], *first} | ({first[-1] + 1} if tiles else set())  # with that row's newline
        view, (start, stop) = watch.seen[0], watch.seen[0].spans[number]
        assert sorted(chosen) == [i for i in range(picture.tokens) if i in chosen] and stop - start == len(chosen)
        assert view.places[number].equal(plain.places[number][sorted(chosen)])
        assert view.contrast()[number].equal(plain.contrast[number][sorted(chosen)])
        assert start == end + (plain.spans[number][0] - (plain.spans[number - 1][1] if number else 0))  # text between
        end, (a, b) = stop, asked.spans[number]
        mine = asked.masks[..., a:b]
        assert mine.any((0, 1)).nonzero()[:, 0].tolist() == [sorted(chosen)[2]] and mine.sum() == 8
    assert asked.kept == [2.0] * 4 and asked.retention == 2 / asked.vision_tokens
    assert asked.masks[..., : asked.spans[0][0]].all() and asked.masks[..., asked.spans[-1][1] :].all()
    assert [part["method"] for part in asked.parts] == ["Third", "Watch"]
    left = asked.prefilled - (asked.prompt_tokens - asked.vision_tokens)
    assert [part["actual"] for part in asked.parts] == pytest.approx([left / asked.vision_tokens, 2 / left])


def test_a_new_token_stands_for_its_heaviest_source(pair):
    checkpoint = pair("next")[1]
    method = make_method(Sums())
    for number, picture in enumerate(ask(checkpoint, "next", method).pictures):
        view = look(method, checkpoint.model, picture, number, picture.pixels)
        with torch.no_grad():
            _, picked = pick(method, view)
        weights, tokens = Sums().matrix(view.tokens, view.squares), (picture.layout.patches >= 0).nonzero()[:, 0]
        assert picked.origin[:7].tolist() == [tokens[row.argmax()].item() for row in weights[:7, : view.tokens]]
        assert picked.origin[3] == tokens[5] and picked.origin[7:].tolist() == [-1] * view.squares
        equal = torch.full((1, view.tokens), 1 / view.tokens)
        assert view.heaviest(equal).tolist() == [0]  # the first of equals
        above = picked.of(picture.layout.places, torch.tensor([-1, 0]))
        assert above[7:].tolist() == [[-1, 0]] * view.squares and above[:7].equal(
            picture.layout.places[picked.origin[:7]]
        )


class Twice:
    """Drops all vision tokens from the hidden states, twice."""

    def narrow(self, view):
        return view.text if view.layer in (0, 2) else None


@pytest.mark.parametrize("late", ["topk:keep_tokens=1", "fastv:keep_tokens=1", "plphp:keep_tokens=1", Twice])
def test_later_stages_keep_what_is_protected(pair, late):
    class Protects(Third):
        def protect(self, picture):
            mask = torch.zeros(picture.tokens, dtype=torch.bool)
            mask[[0, 1, 4]] = True  # Third picks all of them
            mask[8] = True  # and drops this one
            return mask

    checkpoint = pair("llava")[1]
    both = Composition(make_method(Protects()), make_method(late))
    asked = ask(checkpoint, "llava", both, remember=True)
    with torch.inference_mode():
        asked.prefill()
    for start, stop in asked.spans:
        kept = asked.masks[-1, :, start:stop]
        assert kept[:, [0, 1, 4]].all() and 3 <= kept.sum(1).min() <= kept.sum(1).max() <= 4


def test_retention_is_that_of_the_unpicked_prompt_in_the_json(pair, cli):
    args = "--image", DEMO_PICTURE, "--prompt", "Describe the picture.", "--max-new-tokens", 3, "--json"
    code, out, err = cli(*args, "--prune", "pick-grid:retention=0.5+topk", "--retention", 0.1)
    took = json.loads(out)
    assert code == 0 and took["prompt_tokens"] == 269 and took["vision_tokens"] == took["images"][0]["tokens"] == 256
    prune = took["prune"]
    assert prune["method"] == "pick-grid+topk" and prune["retention_actual"] == 26 / 256
    assert prune["retention_requested"] == pytest.approx(0.1) and prune["kept_per_layer"] == [26.0] * 6
    assert prune["parts"] == [
        {"method": "pick-grid", "requested": 0.5, "actual": 0.5},
        {"method": "topk", "requested": 0.2, "actual": pytest.approx(26 / 128)},
    ]
    assert prune["settings"]["pick-grid.retention"] == 0.5 and prune["settings"]["topk.retention"] == 0.2
    assert prune["kv_bytes_held"] / prune["kv_bytes_full"] == pytest.approx((13 + 26) / 269)
    assert "pick-grid+topk kept 10.2 %" in err


def test_stats_say_what_each_part_kept(cli, tmp_path):
    args = "--image", DEMO_PICTURE, "--prompt", "Describe the picture.", "--max-new-tokens", 3
    code, _, err = cli(*args, "--prune", "pick-random+plphp", "--stats", "--show", tmp_path / "x.png", "--compare")
    assert code == 0 and "pick-random kept 50.0 % of the vision tokens, plphp 50.0 % of these" in err
    assert "141 of 269 prompt tokens and 8 look-ahead rows" in err and "1 picture, 256 vision tokens" in err
    assert "x.png: which vision tokens each head kept" in err and "KV cache 1.65 -> 0.47 MB held" in err


@pytest.mark.parametrize("name", EARLY)
def test_each_method_answers(demo, name):
    asked = Generation(demo, "How many objects are there?", [DEMO_PICTURE], prune=name)
    assert re.search(r"\w+ objects", "".join(asked)) and 0 < asked.retention < 1 and asked.prefilled < 269


# ---------------------------------------------------------------- pictures, turns, batches


def test_pictures_draw_different_random_tokens(pair):
    def kept(seed):
        asked = ask(pair("llava")[1], "llava", f"pick-random:seed={seed}", remember=True)
        with torch.inference_mode():
            asked.prefill()
        return [asked.masks[0, 0, start:stop].nonzero()[:, 0].tolist() for start, stop in asked.spans]

    a, b = kept(0)
    assert len(a) == len(b) == 18 and a != b and kept(0) == [a, b] and kept(1)[0] not in (a, b)


@pytest.mark.parametrize("kind", SIZES)
@torch.inference_mode()
def test_a_later_turn_attends_to_what_was_picked_and_keeps_new_pictures(pair, kind):
    checkpoint = pair(kind)[1]
    first = ask(checkpoint, kind, Third(), 5, "what is <image>?", remember=True)
    "".join(first)
    more = noise(33, 50, seed=9)
    second = Generation(checkpoint, "and <image>?", [more], Sampling(6), prune=Third(), before=first, remember=True)
    cached, first_tokens, unfed = second.prefill(), first.token_ids, first.ids
    model = checkpoint.model
    tokens, _, _ = first.pick_images(first.prune)
    whole, _ = model.splice(second.ids, [*tokens, *second.encode_images(1)])
    by_hand = model.language_model.logits(model.language_model.prefill(whole[None])[0, -1])
    torch.testing.assert_close(cached, by_hand, rtol=1e-4, atol=2e-4)
    assert second.absent == first.absent > 0 and second.goes_on and second.unfed == []
    assert second.spans[0] == first.spans[0] and second.ids[: len(unfed)] == unfed
    start, stop = second.spans[1]
    assert stop - start == second.images[1]["tokens"] and stop < second.prompt_tokens
    text_between = (
        len(first.ids)
        - 1
        + len(first_tokens)
        + second.ids[len(first.ids) + len(first_tokens) :].index(checkpoint.config.image_token_index)
    )
    assert start == text_between + first.vision_tokens
    assert second.masks.shape[2] == second.prompt_tokens and second.masks[..., start:stop].all()
    assert second.kept == [n + second.images[1]["tokens"] for n in first.kept]
    third = Generation(checkpoint, "why?", (), Sampling(6), before=second)
    "".join(third)
    assert third.absent == first.absent and third.prefilled < 30


def test_a_batch_holds_prompts_with_and_without_picks(pair):
    checkpoint, batch, alone = pair("next")[1], Batch(), []
    for method in (Third(), None, Sums(), "pick-grid+topk", Merge()):
        asked = ask(checkpoint, "next", method, 8)
        "".join(asked)
        alone.append(asked.token_ids)
        batch.add(asked.again(asked.prune))
    running, done = list(batch.running), []
    while batch:
        done += batch.advance()
    assert [g.token_ids for g in running] == alone and len(done) == 5


def test_a_prompt_without_pictures_is_not_pruned(pair):
    checkpoint = pair("llava")[1]
    plain, both = (ask(checkpoint, "llava", m, 6, "what?") for m in (None, "pick-grid+topk"))
    "".join(plain), "".join(both)
    assert plain.token_ids == both.token_ids and both.retention == 1.0 and "no picture" in both.notes[0]


# ---------------------------------------------------------------- what is refused


def giving(stage, value, **more):
    """A rule whose stage returns this value, or that of a function of what it sees."""
    take = staticmethod(value if callable(value) else lambda seen: value)
    return type("Mine", (), {stage: take, "merge_after": 0} | more)()


WRONG = {  # name: (rule, words)
    "a list": (giving("pick", [1, 2]), "returned list from pick; return int64 indices (P',), or floats (P', 36) or"),
    "a mask": (giving("pick", torch.ones(36, dtype=torch.bool)), "returned torch.bool (36,) on cpu from pick"),
    "int32": (giving("pick", torch.tensor([1], dtype=torch.int32)), "returned torch.int32 (1,)"),
    "none": (giving("pick", torch.zeros(0, dtype=torch.int64)), "picked no token; return at least one index"),
    "twice": (giving("pick", torch.tensor([1, 1, 2])), "not ascending, unique and below 36; sort them"),
    "order": (giving("pick", torch.tensor([3, 2])), "not ascending, unique and below 36"),
    "negative": (giving("pick", torch.tensor([-1, 2])), "not ascending, unique and below 36"),
    "beyond": (giving("pick", torch.tensor([2, 36])), "not ascending, unique and below 36"),
    "wide": (giving("pick", torch.ones(2, 35)), "returned torch.float32 (2, 35) on cpu from pick"),
    "too wide": (giving("pick", torch.ones(2, 38)), "floats (P', 36) or (P', 37)"),
    "no row": (giving("pick", torch.ones(0, 36)), "returned torch.float32 (0, 36)"),
    "vector": (giving("pick", torch.ones(36)), "returned torch.float32 (36,)"),
    "nan": (giving("pick", torch.full((2, 36), float("nan"))), "NaN, infinity or a row of zeros from pick"),
    "zeros": (giving("pick", torch.eye(36)[:4] * torch.tensor([[1], [1], [0], [1]])), "or a row of zeros"),
    "merge": (giving("merge", torch.ones(4, 36)), "(4, 36) on cpu from merge; return floats (1, P', 36)"),
    "squares": (giving("merge", torch.ones(2, 4, 36)), "merged 2 squares of 1; return a matrix for each"),
    "protect": (
        giving("protect", torch.ones(35, dtype=torch.bool), pick=lambda self, seen: None),
        "returned torch.bool (35,) on cpu; return torch.bool (36,) on cpu",
    ),
    "unnamed": (giving("pick", lambda seen: seen.keys(1)), "layer 1 of the vision tower was not named"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_stage_must_not_return_is_refused_in_one_line(pair, wrong):
    rule, words = WRONG[wrong]
    asked = ask(pair("llava")[1], "llava", rule, question="what is <image>?")
    with pytest.raises((ValueError, RuntimeError)) as refused:
        asked.prefill()
    assert words in str(refused.value) and "Mine" in str(refused.value) and "\n" not in str(refused.value)


NO_METHOD = {
    "layers": (
        giving("pick", None, layers=lambda self, n: [4]),
        "method Mine: layers names layer 4 of the vision tower; give 0 to 3",
    ),
    "negative": (giving("pick", None, layers=lambda self, n: [-1]), "layers names layer -1 of the vision tower"),
    "one layer": (giving("pick", None, layers=lambda self, n: 1), "layers returned int; return a list of layers"),
    "both": (giving("pick", None, merge=lambda self, patches: None), "has pick and merge; give one of them"),
    "where": (giving("merge", None, merge_after=None), "has merge, but no merge_after"),
    "only": (giving("protect", None), "has no keep(self, view), narrow(self, view), pick(self, picture) or merge"),
    "no argument": (giving("pick", lambda: None), "it must take one argument, the picture"),
}


@pytest.mark.parametrize("wrong", NO_METHOD)
def test_what_cannot_be_a_method_is_refused_before_the_prefill(pair, wrong):
    rule, words = NO_METHOD[wrong]
    assert words in refusal(ask, pair("llava")[1], "llava", rule)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_merge_after_a_layer_that_does_not_run_is_refused(pair, layer):
    """The tower has 4 layers, and LLaVA runs 3."""
    asked = ask(pair("llava")[1], "llava", giving("merge", None, merge_after=layer), question="what is <image>?")
    assert refusal(asked.prefill) == f"merge_after of Mine is {layer}; give a layer from 0 to 2"


def test_features_of_a_layer_before_the_merge_are_refused(make_checkpoint, tmp_path):
    for name, top in (("early", {"vision_feature_layer": 1}), ("full", {"vision_feature_select_strategy": "full"})):
        make_checkpoint(tmp_path / name, None, {"image_size": 84}, top)
        asked = ask(load(tmp_path / name, "fp32"), "llava", Merge(), question="what is <image>?")
        assert "merged patches need features of later layers, without a CLS token" in refusal(asked.prefill)


def test_a_cls_token_that_the_prompt_has_stays(make_checkpoint, tmp_path):
    make_checkpoint(tmp_path, None, {"image_size": 84}, {"vision_feature_select_strategy": "full"})
    asked = ask(load(tmp_path, "fp32"), "llava", Third(), question="what is <image>?", remember=True)
    with torch.inference_mode():
        asked.prefill()
    start, stop = asked.spans[0]
    kept = asked.masks[0, 0, start:stop].nonzero()[:, 0].tolist()
    assert stop - start == 37 and kept == [0, *(1 + i for i in Third().indices(36, [(6, 6)]))]


COMPOSED = {
    "pick-grid+plphp": None, "downsample:retention=0.3+topk:window=4": None, "pick-random+fastv:layer=1": None,
    "plphp+pick-grid": "pick-grid acts before the language model and comes first; write pick-grid+plphp",
    "pick-grid+downsample": "both act before the language model; write A+B",
    "topk+plphp": "both act in the language model; write A+B", "pick-grid+none": "none keeps everything",
    "none+topk": "none keeps everything", "pick-grid+topk+plphp": "combines 3 methods; write A+B",
    "pick-grid+nosuch": "there is no method 'nosuch'", "pick-grid+": "there is no method 'pick-grid+'",
    "pick-grid:seed=1+topk": "pick-grid has no setting 'seed'",
    "pick-grid:retention=1e+5": "retention of method pick-grid",
    "pick-grid:sink=3": "has no setting 'sink'",
}  # fmt: skip


@pytest.mark.parametrize("spec", COMPOSED)
def test_compositions(spec):
    if COMPOSED[spec]:
        assert COMPOSED[spec] in refusal(choose_method, spec)
    else:
        method = choose_method(spec)
        assert isinstance(method, Composition) and method.name == "+".join(p.partition(":")[0] for p in spec.split("+"))
        assert choose_method(method.spec) == method and choose_method(method) is method


def test_a_budget_of_a_composition_is_that_of_both():
    both = choose_method("pick-grid:retention=0.4+topk", retention=0.1)
    assert both.second.settings["retention"] == 0.25 and both.fraction == pytest.approx(0.1)
    assert both.wanted([100, 50]) == pytest.approx(0.1) and both.requested([100]) == [0.4, 0.25]
    assert choose_method("pick-grid+plphp", retention=0.5).second.settings["retention"] == 1.0
    said = refusal(choose_method, "pick-grid+plphp", retention=0.6)
    assert "keeps at most 0.5, the retention of pick-grid, instead of 0.6; give the setting pick-grid.retention" in said
    said = refusal(choose_method, "pick-grid+plphp", keep_tokens=9)
    assert "give the setting pick-grid.keep_tokens=9 or plphp.keep_tokens=9" in said
    said = refusal(choose_method, "pick-grid:keep_tokens=9+plphp", retention=0.3)
    assert "needs a fraction of pick-grid" in said
    few = choose_method("pick-grid:keep_tokens=10+topk:keep_tokens=5")
    assert few.wanted([100, 100]) == pytest.approx(0.05) and few.fraction is None
    assert choose_method("pick-grid+plphp").wanted([100]) is None


def test_settings_of_a_composition_name_their_part(tmp_path):
    (tmp_path / "own+er.py").write_text("class Mine:\n    def pick(self, picture): return None\n")
    own = f"{tmp_path}/own+er.py::Mine"
    for spec in (own, own + "+topk", f"{own}+{tmp_path}/own+er.py::Mine"):
        try:
            assert choose_method(spec).parts[0].name == own
        except ValueError as wrong:
            assert "both act before the language model" in str(wrong)
    given = {"pick-grid.retention": 0.2, "topk.window": 3}
    for settings in (given, [f"{key}={value}" for key, value in given.items()]):
        both = choose_method("pick-grid+topk", settings=settings)
        assert both.first.settings["retention"] == 0.2 and both.second.settings["window"] == 3
    assert choose_method("pick-grid+uniform", settings={"uniform.window": 2}).second.settings["window"] == 2
    said = refusal(choose_method, "pick-grid+topk", settings={"window": 3})
    assert "window is no setting of a part of pick-grid+topk; write pick-grid.window or topk.window" in said
    assert "retention is given twice" in refusal(choose_method, "pick-grid:retention=0.5+topk", settings=given)
    mixed = type("Mixed", (), {"pick": lambda self, picture: None, "keep": lambda self, view: None})
    assert choose_method(mixed).picks and choose_method(mixed).settings["sink"] == 0


# ---------------------------------------------------------------- controls


@pytest.mark.parametrize("kind", SIZES)
def test_downsampling_is_an_interpolation_of_the_feature_maps(pair, kind):
    checkpoint = pair(kind)[1]
    for view, _ in views(checkpoint, kind):
        for wanted in (0.1, 0.25, 0.6):
            method = make_method("downsample", wanted)
            matrix, start, made = method.pick(view), 0, 0
            for rows, columns in view.shapes:
                new = smaller(rows, columns, int(wanted * view.tokens + 0.5) * rows * columns // view.tokens)
                part = view.features[start : start + rows * columns].view(1, rows, columns, -1).permute(0, 3, 1, 2)
                pooled = F.interpolate(part, new, mode="bilinear", antialias=True)[0].flatten(1).T
                here = matrix[made : made + len(pooled)]
                torch.testing.assert_close(here @ view.features, pooled, rtol=1e-4, atol=1e-4)
                start, made = start + rows * columns, made + len(pooled)
            assert made == len(matrix) and start == view.tokens == matrix.shape[1]
            torch.testing.assert_close(matrix.sum(1), torch.ones(made))


def test_a_smaller_grid_keeps_proportions_and_stays_within_its_budget():
    for rows, columns in ((24, 24), (16, 16), (18, 40), (7, 3), (1, 9)):
        for count in range(1, rows * columns + 1):
            r, c = smaller(rows, columns, count)
            assert 1 <= r <= rows and 1 <= c <= columns and r * c <= count
    assert smaller(24, 24, 144) == (12, 12) and smaller(24, 24, 576) == (24, 24) and smaller(18, 40, 180) == (9, 20)


def test_the_even_grid_is_even(pair):
    """Of a 6 x 6 square, any quarter of the rows or columns has about its share."""
    ((view, _), *_) = views(pair("llava")[1], "llava", question="what is <image>?")
    for count in (6, 12, 18):
        taken = view.places[make_method("pick-grid", keep_tokens=count).pick(view)]
        assert len(taken) == count
        for line in taken.T:
            halves = (line < 3).sum().item()
            assert abs(halves - count / 2) <= 1.5


# ---------------------------------------------------------------- tools


@torch.inference_mode()
def test_a_pick_in_the_evaluation_is_that_of_a_generation(pair):
    """Its prompt is put together from embeddings, not from ids; both have two pictures of several tiles."""
    checkpoint = pair("next")[1]
    for rule in (Third(), "pick-grid+topk", Sums(), Merge()):
        real = ask(checkpoint, "next", rule, 1, remember=True)
        "".join(real)
        asked = asked_by(ask(checkpoint, "next", None, 1), [])
        logits, (kept,), (keeps,) = replay(asked, [real.prune])
        torch.testing.assert_close(logits[0, 0], ask(checkpoint, "next", rule).prefill(), rtol=1e-5, atol=1e-5)
        assert kept == pytest.approx(real.retention) and torch.stack(keeps).equal(real.masks)


def test_tools_without_pictures_refuse_picks(demo, capsys):
    asked = Asked(demo.model.language_model, torch.randn(9, 192), 9, [(1, 5)])
    assert "needs the pictures, and there are none here" in refusal(asked.cache, make_method("pick-grid"))
    with pytest.raises(ValueError, match="acts before the language model, and there is no picture; use"):
        harness.prefill(demo.model.language_model, torch.randn(1, 9, 192), method=make_method("pick-grid+topk"))
    assert exit_code_of(bench_decode.main, ["--prune", "pick-grid@0.5", "--smoke"]) == 2
    assert "needs pictures, and the workloads have none" in capsys.readouterr().err


def test_a_figure_of_a_pick_has_no_gamma(demo):
    shown = show_pruning.look(demo, "Describe the picture.", [DEMO_PICTURE], make_method("pick-grid+topk", 0.25))
    assert shown.gammas is None and shown.title.startswith("pick-grid+topk: 25.0 % of the vision tokens kept")
    assert shown.bytes_full == pytest.approx(269 * shown.bytes_held / (13 + 64))


def test_a_conversation_changes_methods_and_budgets():
    budget = {"retention": 0.2, "keep_tokens": None}
    method, note = change_method("pick-grid+topk", None, budget)
    assert note is None and method.second.settings["retention"] == 0.4
    assert named_with_budget(method) == "pick-grid, retention 0.5 + topk, retention 0.4"
    changed = change_budget(method, None, {"retention": 0.05, "keep_tokens": None})
    assert changed.spec == "pick-grid:retention=0.5+" + make_method("topk", 0.1).spec
    method, note = change_method("pick-grid:keep_tokens=9+topk:retention=0.5", None, budget)
    assert note == "retention 0.2 has no effect, because SPEC sets its own budget" and method.fraction is None
    assert change_method("pick-random", None, budget)[0].settings["retention"] == 0.2
    assert "plphp uses the settings in" in note_on_settings(make_method("pick-grid+plphp"), DEMO)


def test_a_file_of_answers_names_both_parts(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("class Mine:\n    def pick(self, picture): return None\n")
    monkeypatch.chdir(tmp_path)
    assert named_method(make_method("own.py::Mine+topk")) == f"{tmp_path / 'own.py'}::Mine+topk"
    assert named_method(make_method("pick-grid+topk")) == "pick-grid+topk" and named_method(None) == "none"


def test_whether_a_composition_has_a_budget_of_its_own():
    for spec, own in (
        ("pick-grid+topk", False), ("pick-grid:keep_tokens=9+topk", True), ("pick-grid+topk:retention=0.1", True),
        ("mustdrop1+topk", True), ("mustdrop1:retention=0.5+topk", False), ("pick-grid", False),
        ("mustdrop1:threshold=0.5", True), ("pick-grid+yopo", False), ("pick-grid+yopo:threshold=0.5", True),
    ):  # fmt: skip
        assert sets_budget(spec) == own, spec
