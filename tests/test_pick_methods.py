"""HiRED, VTC-CLS, FoPru, VisionZip, MustDrop's first stage and DivPrune: the same choice and the same answer as
transformers with the rules of tests/pick_oracles.py, and each mistake that is easy to make."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_next import make_next
from test_parity import noise

from model import Generation, Sampling, load
from model.pruning import METHODS, Method, make_method
from model.pruning.budget import divided
from model.pruning.divprune import DivPrune
from model.pruning.fopru import FoPru
from model.pruning.hired import Hired
from model.pruning.mustdrop1 import MustDrop1
from model.pruning.visionzip import VisionZip
from model.pruning.vtc_cls import VtcCls
from tests import pick_oracles as oracle
from tests.onevision import make_onevision
from tests.paths import DEMO, DEMO_PICTURE
from tests.pick_oracles import Seen, amount, answer, map_of, shares
from tests.seeds import torch_random
from tests.sizes import Sizes

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

NAMES = ["hired", "vtc-cls", "fopru", "visionzip", "mustdrop1", "divprune"]
CHOICES = {  # function (Seen, our choice, which decides between nearly equal tokens)
    "hired": lambda seen, ours: oracle.hired(seen, ours=ours)[0],
    "hired:retention=0.6,whole=0.2": lambda seen, ours: oracle.hired(seen, 0.6, 0.2, ours)[0],
    "vtc-cls": lambda seen, ours: oracle.vtc_cls(seen, ours=ours),
    "vtc-cls:retention=0.3,first=1": lambda seen, ours: oracle.vtc_cls(seen, 0.3, 1, ours),
    "fopru": lambda seen, ours: oracle.fopru(seen, ours=ours),
    "fopru:retention=0.4,form=row": lambda seen, ours: oracle.fopru(seen, 0.4, "row"),
    "visionzip": lambda seen, ours: oracle.visionzip(seen, ours=ours),
    "visionzip:retention=0.4,contextual=0.5": lambda seen, ours: oracle.visionzip(seen, 0.4, 0.5, ours),
    "divprune": lambda seen, ours: oracle.divprune(seen, ours=ours),
    "divprune:retention=0.3": lambda seen, ours: oracle.divprune(seen, 0.3, ours),
}
CASES = {  # kind, side of a square in pixels, sizes of the pictures
    "LLaVA-1.5, 24 x 24": ("llava", 336, [(90, 60)]),
    "16 x 16, two pictures": ("llava", 224, [(60, 90), (50, 50)]),
    "LLaVA-NeXT, 8 x 8, two pictures": ("next", 112, [(330, 75), (60, 290)]),  # 1 x 3 and 3 x 1 tiles, with borders
    "LLaVA-NeXT, 8 x 8, 2 x 2 tiles": ("next", 112, [(210, 160)]),
    "LLaVA-NeXT, 24 x 24": ("next", 336, [(1000, 250)]),
    "OneVision, 8 x 8, 6 x 5 tiles that shrink": ("onevision", 32, [(150, 190)]),
    "OneVision, 8 x 8, two pictures": ("onevision", 32, [(60, 90), (50, 50)]),
    "OneVision, 7 x 7, a picture and 3 frames": ("onevision", 28, [(60, 90)]),
}
FRAMES = {"OneVision, 7 x 7, a picture and 3 frames": [(50, 40)] * 3}
BLIND = {"hired", "vtc-cls"}  # without CLS


@pytest.fixture(scope="module")
def case(make_hf_checkpoint, tmp_path_factory):
    """Function (name of CASES) -> transformers' model and our checkpoint; 8 layers in the tower."""
    made = {}

    def get(name):
        kind, side, _ = CASES[name]
        if (kind, side) not in made:
            folder = tmp_path_factory.mktemp("pick")
            text, vision = {"max_position_embeddings": 4096}, {"image_size": side, "num_hidden_layers": 8}
            make = {"next": make_next, "onevision": make_onevision}.get(kind)
            make = partial(make, make_hf_checkpoint) if make else make_hf_checkpoint
            made[kind, side] = make(folder, text, vision, seed=11), replace(load(folder, "fp32"), stop_ids=())
        return made[kind, side]

    return get


def blocks(size, seed):
    """A picture of coloured squares with some noise: patches are alike in places."""
    coarse = noise(max(1, size[0] // 40), max(1, size[1] // 40), seed=seed).resize(size, Image.Resampling.NEAREST)
    return Image.blend(coarse, noise(*size, seed=seed + 100), 0.2)


def ask(checkpoint, name, spec, count=24, **options):
    sizes, frames = CASES[name][2], [blocks(size, 50 + i) for i, size in enumerate(FRAMES.get(name, ()))]
    pictures = [blocks(size, i) for i, size in enumerate(sizes)]
    question = "what is " + " and ".join(["<image>"] * len(sizes) + ["<video>"] * bool(frames)) + "?"
    options |= {"frames": frames} if frames else {}
    return Generation(checkpoint, question, pictures, Sampling(count), template="raw", prune=spec, **options)


@pytest.fixture(scope="module")
def seen(case):
    """Function (name of CASES) -> a Seen of each picture."""
    made = {}

    @torch.inference_mode()
    def get(name):
        if name not in made:
            hf, checkpoint = case(name)
            asked = ask(checkpoint, name, None)
            made[name] = [Seen.of_picture(hf, picture) for picture in asked.pictures]
        return made[name]

    return get


@pytest.fixture
def chosen(monkeypatch):
    """What the stage `pick` returned, as lists of indices (None: all) or matrices, in call order."""
    found, pick = [], Method.pick

    def listening(method, picture):
        choice = pick(method, picture)
        found.append(choice)
        return choice

    monkeypatch.setattr(Method, "pick", listening)
    return found


# ---------------------------------------------------------------- against transformers


def says_the_same(hf, asked, logits, tokens):
    """The logits after the prompt and 24 greedy ids are those of transformers for these tokens of each picture."""
    checkpoint = asked.checkpoint
    wanted, ids = answer(hf, asked.ids, checkpoint.config.image_token_index, tokens, 24, checkpoint.never_ids)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=2e-4)
    "".join(asked)
    assert asked.token_ids == ids


def between(pictures, block):
    """A threshold that merges half of the windows of the square with the least similar ones."""
    found = []
    for picture in pictures:
        patches = picture.states[1][:, picture.cls :].unflatten(1, (picture.side, picture.side)).double().numpy()
        for row in oracle.likeness(patches, block)[1]:
            half = np.sort(row)[::-1][len(row) // 2 - 1 : len(row) // 2 + 1]
            found.append(float(half.mean()))
    return max(0.0, min(found))


@pytest.mark.parametrize("spec", CHOICES)
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_the_choice_and_24_ids_are_those_of_transformers_and_the_oracle(case, seen, chosen, name, spec):
    hf, checkpoint = case(name)
    if spec.split(":")[0] in BLIND and not seen(name)[0].cls:
        assert "needs the CLS token of the vision tower, and this tower has" in refusal(ask, checkpoint, name, spec)
        return
    asked = ask(checkpoint, name, spec)
    logits = asked.prefill()
    wanted = [CHOICES[spec](picture, ours.numpy()) for picture, ours in zip(seen(name), chosen, strict=True)]
    for ours, theirs, picture in zip(chosen, wanted, seen(name), strict=True):
        if isinstance(theirs, list):
            assert ours.tolist() == theirs
        else:
            np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)
        if "row" not in spec:
            method = make_method(spec)
            assert len(ours) == amount(picture.count, method.settings["retention"])  # exactly the budget
    tokens = [picture.tokens(choice) for picture, choice in zip(seen(name), wanted, strict=True)]
    says_the_same(hf, asked, logits, tokens)
    assert asked.prefilled == len(asked.ids) - len(tokens) + sum(map(len, tokens)) < asked.prompt_tokens


@pytest.mark.parametrize("setting", ["threshold", "retention"])
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_merged_patches_and_24_ids_are_those_of_transformers_and_the_oracle(case, seen, monkeypatch, name, setting):
    hf, checkpoint = case(name)
    merging = {"block": 2, "threshold": between(seen(name), 2)} if setting == "threshold" else {"rate": 0.5}
    keys = {} if seen(name)[0].cls else {"key_share": 0.0}
    method = MustDrop1(retention=0.5, **keys) if setting == "retention" else MustDrop1(**merging, **keys)
    found, merge, protect = [], Method.merge, Method.protect
    monkeypatch.setattr(Method, "merge", lambda method, x: found.append(merge(method, x)) or found[-1])
    monkeypatch.setattr(Method, "protect", lambda method, view: found.append(protect(method, view)) or found[-1])
    asked = ask(checkpoint, name, make_method(method))
    logits = asked.prefill()
    pictures = [
        Seen.of_picture(hf, picture, lambda x, ours=ours: oracle.mustdrop1(x, **merging, ours=ours.numpy()))
        for picture, ours in zip(asked.pictures, found[::2], strict=True)
    ]
    for matrix, keys, picture in zip(found[::2], found[1::2], pictures, strict=True):
        np.testing.assert_allclose(matrix.numpy(), picture.joined, atol=1e-6)
        assert matrix.shape[1] < picture.side**2  # something was merged
        assert keys is None if not picture.cls else keys.nonzero()[:, 0].tolist() == oracle.mustdrop1_keys(picture)
    tokens = [picture.tokens(None) for picture in pictures]
    says_the_same(hf, asked, logits, tokens)
    assert asked.prefilled == len(asked.ids) - len(tokens) + sum(map(len, tokens)) < asked.prompt_tokens


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_demo_gives_the_answer_of_transformers(demo, chosen, name):
    hf = transformers.LlavaForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()
    asked = Generation(replace(demo, stop_ids=()), "Describe the picture.", DEMO_PICTURE, Sampling(24), prune=name)
    logits, (picture,) = asked.prefill(), asked.pictures
    seen = Seen(hf, picture.pixels, picture.size, oracle.mustdrop1 if name == "mustdrop1" else None)
    wanted = CHOICES[name](seen, chosen[0].numpy()) if name in CHOICES else None
    if isinstance(wanted, list):
        assert chosen[0].tolist() == wanted
    says_the_same(hf, asked, logits, [seen.tokens(wanted)])
    assert seen.side == 16 and asked.absent > 60


@pytest.mark.parametrize("name", ["LLaVA-1.5, 24 x 24", "OneVision, 8 x 8, 6 x 5 tiles that shrink"])
@torch.inference_mode()
def test_attention_of_patches_is_summed_over_all_blocks(case, seen, name):
    """Mean over all patches of the square, also those that no token stands for; CLIP's 576 are five blocks."""
    found = []

    class Received:
        def pick(self, picture):
            found.append(picture.patch_attention(picture.read_layer).mean(0))

    ask(case(name)[1], name, Received(), 1).prefill()
    for ours, picture in zip(found, seen(name), strict=True):
        first = picture.cls
        mean = picture.attention[picture.read][picture.tile, :, first:, first + picture.cell].mean((1, 2))
        np.testing.assert_allclose(ours.numpy(), mean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["LLaVA-1.5, 24 x 24", "LLaVA-NeXT, 8 x 8, two pictures"])
@pytest.mark.parametrize("spec", [*(f"{name}:retention=1" for name in NAMES), "mustdrop1:threshold=1"])
@torch.inference_mode()
def test_keeping_everything_is_no_pruning_bit_for_bit(case, name, spec):
    checkpoint = case(name)[1]
    plain, kept = ask(checkpoint, name, None, 4), ask(checkpoint, name, spec, 4)
    assert kept.prefill().equal(plain.prefill()) and kept.absent == 0 and kept.retention == 1.0


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_picture_of_one_patch_is_kept(make_hf_checkpoint, tmp_path, name):
    make_hf_checkpoint(tmp_path, vision={"image_size": 14})
    checkpoint = load(tmp_path, "fp32")
    plain, pruned = (Generation(checkpoint, "what?", [noise(9, 9)], prune=spec) for spec in (None, name))
    assert pruned.prefill().equal(plain.prefill()) and pruned.vision_tokens == 1 and pruned.kept == [1.0] * 2


@torch.inference_mode()
def test_key_tokens_outlive_the_second_method(case):
    name = "LLaVA-NeXT, 8 x 8, 2 x 2 tiles"
    hf, checkpoint = case(name)
    asked = ask(checkpoint, name, "mustdrop1:retention=0.6,key_share=0.3+random:retention=0.1", 2, remember=True)
    asked.prefill()
    (picture,) = asked.pictures
    merged = Seen(hf, picture.pixels, picture.size, lambda patches: oracle.mustdrop1(patches, rate=0.6))
    keys, plain = oracle.mustdrop1_keys(merged, 0.3), Seen(hf, picture.pixels, picture.size)
    # a merged token stands for the first of its members that exist; a newline follows each row of the tiles' map
    index = {patch: i + max(0, i - 64) // plain.map[1] for i, patch in enumerate(plain.patch)}
    stand = []
    for square, row in zip(merged.tile[keys], merged.cell[keys], strict=True):
        members = 64 * square + np.flatnonzero(merged.joined[square, row])
        stand.append(min(index[patch] for patch in members if patch in index))
    kept = asked.masks[..., slice(*asked.spans[0])]
    assert len(keys) == math.ceil(0.3 * merged.count) and kept[..., stand].all()
    assert len(keys) <= kept.sum(2).min() and kept.sum(2).max() < 0.45 * merged.count


@pytest.mark.parametrize("spec", ["fopru", "divprune"])
@torch.inference_mode()
def test_no_square_matrix_of_all_tokens_is_made(case, spec):
    name = "LLaVA-NeXT, 24 x 24"
    asked = ask(case(name)[1], name, spec, 1)
    with Sizes() as sizes:
        asked.pick_images(asked.prune)
    tokens = asked.pictures[0].layout.patches.ge(0).sum().item()
    assert 2 * 256 * tokens <= sizes.largest < tokens**2 / 2, sizes.where


# ---------------------------------------------------------------- planted pictures


class Planted(Seen):
    """A picture with given scores, for the methods (like a PictureView) and for the oracle (a Seen).

    kept: (rows, columns) of the tiles' map in the middle of the canvas. scores: {layer: (P,)}; other layers fail.
    """

    def __init__(self, side, grid=None, kept=None, scores=None, depth=24, **measured):
        index = np.arange(side**2)
        if grid:
            top, left = ((n * side - k) // 2 for n, k in zip(grid, kept, strict=True))
            joined = map_of(side, grid)[top : top + kept[0], left : left + kept[1]]
            index = np.concatenate((index, joined.ravel()))
        self.side, self.grid, self.map, self.patch = side, grid, kept, index
        self.tile_of, self.cell, self.count = index // side**2, index % side**2, len(index)
        self.read_layer, self.has_cls = depth - 2, True
        self.squares, self.depth, self.scores = 1 + (math.prod(grid) if grid else 0), depth, scores or {}
        self.per_square, self.joined, self.newline, self.cls, self.read = side**2, None, False, 1, depth - 2
        # as a PictureView
        self.tile, self.tokens, self.num_layers, self.device = torch.from_numpy(self.tile_of), self.count, depth, "cpu"
        self.shapes = [(side, side), *([kept] if grid else [])]
        rows = [torch.cartesian_prod(torch.arange(r), torch.arange(c)) for r, c in self.shapes]
        self.places = torch.cat([part + torch.tensor([side * i, 0]) for i, part in enumerate(rows)])
        self.__dict__ |= measured

    def cls_attention(self, layer):
        return torch.as_tensor(self.scores[layer], dtype=torch.float32)[None]

    def looked_at(self, layer):
        return np.asarray(self.scores[layer], dtype=np.float64)

    def of(self, square):
        return np.flatnonzero(self.tile_of == square)


def marked(side, rows, columns, count):
    """(count,) scores, 1 in these rows and columns of the whole picture, 0 elsewhere and in the tiles."""
    scores = torch.zeros(count)
    scores[: side**2].view(side, side)[rows, columns] = 1
    return scores


def counts(picture, method):
    """Tokens that HiRED gives to each square."""
    chosen = method.pick(picture)
    return torch.bincount(picture.tile[chosen], minlength=picture.squares).tolist()


FIRST, LAST = slice(0, 4), slice(4, 8)


@pytest.mark.parametrize(
    ("grid", "rows", "columns", "tile"),
    [
        ((2, 2), FIRST, FIRST, 1), ((2, 2), FIRST, LAST, 2), ((2, 2), LAST, FIRST, 3), ((2, 2), LAST, LAST, 4),
        ((1, 2), slice(0, 8), LAST, 2), ((2, 1), LAST, slice(0, 8), 2), ((1, 2), LAST, FIRST, 1),
        ((2, 1), FIRST, LAST, 1), ((2, 4), LAST, slice(4, 6), 7), ((4, 2), slice(4, 6), LAST, 6),
    ],
)  # fmt: skip
def test_hired_gives_the_budget_to_the_tile_that_cls_looks_at(grid, rows, columns, tile):
    """Cells are parts of the picture, not strips of rows; rows and columns of tiles are not swapped."""
    tokens = 64 * (1 + math.prod(grid))
    picture = Planted(
        8, grid, (8 * grid[0], 8 * grid[1]), {0: marked(8, rows, columns, tokens), 22: torch.ones(tokens)}
    )
    whole = 1 - float(picture.looked_at(0).sum()) / 64  # as many marked tokens as CLS looks at
    wanted = [math.floor(whole * 40)] + [0] * math.prod(grid)
    wanted[tile] = 40 - wanted[0]
    assert counts(picture, Hired(keep_tokens=40, whole=whole)) == wanted


def test_a_tile_on_the_border_shows_less_of_the_picture():
    """Of 8 columns of the whole picture, the first and the last tile show two each, the tile between them four."""
    picture = Planted(8, (1, 3), (8, 20), {22: torch.ones(64 + 160)})
    found = []
    for column in range(8):
        picture.scores[0] = marked(8, slice(0, 8), slice(column, column + 1), picture.count)
        found.append(counts(picture, Hired(keep_tokens=16, whole=0.875)))
    assert found == [[14, 2, 0, 0]] * 2 + [[14, 0, 2, 0]] * 4 + [[14, 0, 0, 2]] * 2


def test_what_does_not_fit_in_a_tile_goes_to_others():
    """All four marks are in the second tile; each tile shows 12 tokens. The budget is met exactly."""
    picture = Planted(4, (1, 2), (4, 6), {0: marked(4, slice(0, 2), slice(2, 4), 40), 22: torch.ones(40)})
    for tokens, wanted in {16: [12, 0, 4], 24: [16, 0, 8], 30: [16, 2, 12], 39: [16, 11, 12]}.items():
        assert counts(picture, Hired(keep_tokens=tokens, whole=0.75)) == wanted
    assert counts(picture, Hired(keep_tokens=38, whole=0.0)) == [14, 12, 12]  # the tiles are full
    assert counts(picture, Hired(keep_tokens=21, whole=1.0)) == [16, 3, 2]  # the whole picture is, and no mark is left


LAYOUTS = st.tuples(
    st.integers(1, 6), st.sampled_from([None, (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]), st.floats(0.1, 1.0)
)
VALUES = st.sampled_from([1, 3, 1000])
MANY = settings(max_examples=60, deadline=None)


def layout(side, grid, part, seed, values):
    """A Planted picture with random scores of few values, so that ties are common."""
    kept = None
    if grid:
        kept = [n * side for n in grid]
        kept[seed % 2] -= 2 * int((1 - part) * kept[seed % 2] / 2)
    picture = Planted(side, grid, kept and tuple(kept))
    generator = torch_random(seed)
    for layer in range(picture.depth - 1):
        picture.scores[layer] = torch.randint(values, (picture.count,), generator=generator) / 16
    return picture


@MANY
@given(
    LAYOUTS, st.integers(0, 99), st.sampled_from([1, 3, 1000]), st.floats(0.01, 1.0), st.sampled_from([0, 0.3, 0.5, 1])
)
def test_hired_meets_every_budget_in_every_layout(shape, seed, values, rate, whole):
    picture = layout(*shape, seed, values)
    wanted, per_square = oracle.hired(picture, rate, whole)
    got = Hired(retention=rate, whole=whole).pick(picture).tolist()
    assert got == wanted and len(got) == sum(per_square) == amount(picture.count, rate)


@MANY
@given(LAYOUTS, st.integers(0, 99), VALUES, st.floats(0.01, 1.0), st.sampled_from([None, 0, 22]))
def test_vtc_cls_ranks_all_tokens_of_a_picture(shape, seed, values, rate, first):
    picture = layout(*shape, seed, values)
    got = VtcCls(retention=rate, first=first).pick(picture).tolist()
    assert got == oracle.vtc_cls(picture, rate, first) and len(got) == amount(picture.count, rate)


@MANY
@given(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_a_number_is_divided_in_proportion_within_limits(total, parts):
    weights, room = zip(*parts, strict=True)
    got = divided(total, weights, room)
    assert got == shares(total, weights, room) and sum(got) == min(total, sum(room))
    assert all(0 <= count <= limit for count, limit in zip(got, room, strict=True))


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(24, range(16, 23)), (12, range(8, 11)), (27, range(18, 26)), (5, [3]), (4, [2]), (3, [1]), (2, [0]), (1, [0])],
)
def test_the_layers_scale_with_the_depth_and_the_last_is_not_summed(depth, layers):
    assert make_method("vtc-cls").layers(depth) == [*layers]
    assert make_method("hired").layers(depth) == [0]
    assert make_method("mustdrop1").layers(depth) == [depth - 1]


@pytest.mark.parametrize("first", [23, 30])
def test_a_range_without_layers_is_refused(first):
    with pytest.raises(ValueError, match=f"first is {first}, the vision tower has 24 layers; give one from 0 to 22"):
        make_method(f"vtc-cls:first={first}").layers(24)


def attending(rows):
    """rows (P, P): attention among patches -> function of PictureView."""
    return lambda layer, first, last: {22: rows}[layer][None, first:last]


def test_without_the_column_of_cls_what_is_given_can_vary_most():
    """Each row of softmax, CLS included, sums to 1. Tokens 1, 6 and 11 give CLS the least."""
    to_cls = torch.full((16,), 0.9)
    to_cls[[1, 6, 11]] = 0.1
    rows = (1 - to_cls)[:, None].expand(16, 16) / 16  # all receive the same
    assert FoPru(keep_tokens=3).pick(Planted(4, attention=attending(rows))).tolist() == [1, 6, 11]
    with_cls = torch.cat((to_cls[:, None], rows), 1)
    assert with_cls.sum(1).var() < 1e-12
    received = torch.zeros(16, 16)
    received[:, [2, 3]] = 0.4
    assert FoPru(keep_tokens=2).pick(Planted(4, attention=attending(received))).tolist() == [2, 3]


def test_fopru_takes_whole_rows_of_the_picture_until_the_budget_is_reached():
    picture = Planted(4, (1, 2), (2, 8))
    received = torch.zeros(picture.count, picture.count)
    worth = torch.tensor([0.0, 3, 1, 0, 1.2, 0])  # of the four rows of the square and the two of the map, 4 and 8 long
    row = picture.places[:, 0]
    received[:] = worth[row] / 100
    picture.attention = attending(received)
    tokens = [[i for i in range(picture.count) if row[i] == r] for r in range(6)]
    assert FoPru(form="row", keep_tokens=4).pick(picture).tolist() == tokens[1]
    assert FoPru(form="row", keep_tokens=5).pick(picture).tolist() == tokens[1] + tokens[4]
    assert FoPru(form="row", keep_tokens=13).pick(picture).tolist() == tokens[1] + tokens[2] + tokens[4]
    assert FoPru(form="row", keep_tokens=17).pick(picture).tolist() == tokens[0] + tokens[1] + tokens[2] + tokens[4]


def test_visionzip_merges_around_targets_at_an_even_stride():
    """16 tokens, 3 dominant ones with CLS and 4 contextual: targets are every third of the other 14."""
    scores, angle = torch.zeros(16), torch.arange(16.0) * 0.1
    scores[[3, 9]] = torch.tensor([0.2, 0.1])
    angle = angle + 0.5 * angle**2  # 2 is nearer to 0 than to 4, 6 nearer to 7 than to 4
    keys = torch.stack((angle.cos(), angle.sin()), 1)[None]
    matrix = VisionZip(keep_tokens=7, contextual=4 / 7).pick(Planted(4, scores={22: scores}, keys={22: keys}.get))
    rows = [{i: round(v, 3) for i, v in enumerate(row) if v} for row in matrix.tolist()]
    assert rows == [
        {16: 1}, {3: 1}, {9: 1},  # CLS, then the others in their order
        {0: 1, 1: 0.5, 2: 0.5}, {4: 1, 5: 1}, {6: 0.5, 7: 1, 8: 0.5},  # a target, and the mean of the others
        {10: 0.2, 11: 1, 12: 0.2, 13: 0.2, 14: 0.2, 15: 0.2},
    ]  # fmt: skip


def test_visionzip_compares_directions_of_keys_averaged_over_heads():
    """Token 1 is nearest to target 0 by cosine, and to target 2 by dot product; single heads say the contrary."""
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [9.0, 9.0], [0.0, 1.0]]]).repeat(2, 1, 1)
    keys[0] += 5 * torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [0.0, 0.0]])
    keys[1] -= 5 * torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [0.0, 0.0]])
    picture = Planted(2, scores={22: torch.tensor([0.0, 0.0, 0.0, 0.0])}, keys=lambda layer: keys)
    matrix = VisionZip(keep_tokens=3, contextual=0.67).pick(picture)
    assert matrix.tolist() == [[0, 0, 0, 0, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]


def test_mustdrop_puts_merged_windows_first_and_the_rest_in_order():
    """7 x 7 patches, 3 x 3 windows: the last row and column have none. Of four windows two are alike."""
    patches = torch.randn(1, 7, 7, 64, generator=torch_random(1))
    patches[0, 0:3, 3:6] = patches[0, 0, 3] + 0.05 * torch.randn(3, 3, 64, generator=torch_random(2))
    patches[0, 3:6, 0:3] = patches[0, 3, 0] * torch.rand(3, 3, 1, generator=torch_random(3)).add(0.5)  # one direction
    matrix = MustDrop1().merge(patches)[0]
    lower = [y * 7 + x for y in range(3, 6) for x in range(3)]
    upper = [y * 7 + x for y in range(3) for x in range(3, 6)]
    assert matrix.shape == (49 - 2 * 8, 49)
    assert [row.nonzero()[:, 0].tolist() for row in matrix[:2]] == [lower, upper]
    assert matrix[:2][matrix[:2] > 0].allclose(torch.tensor(1 / 9))
    rest = [i for i in range(49) if i not in lower + upper]
    assert matrix[2:].equal(torch.eye(49)[rest])


def test_all_squares_merge_as_many_windows_as_the_one_with_the_fewest():
    patches = torch.randn(3, 6, 6, 64, generator=torch_random(1))
    for square, count in enumerate((4, 2, 3)):
        for window in range(count):
            top, left = 3 * (window // 2), 3 * (window % 2)
            same = patches[square, top, left] + 0.05 * (window + 1) * patches[square, :3, :3]  # more alike or less
            patches[square, top : top + 3, left : left + 3] = same
    matrix = MustDrop1().merge(patches)
    assert matrix.shape == (3, 36 - 2 * 8, 36)
    np.testing.assert_allclose(matrix, oracle.mustdrop1(patches.double().numpy()), atol=1e-6)
    patches[1] = torch.randn(6, 6, 64, generator=torch_random(2))
    assert MustDrop1().merge(patches) is None
    assert MustDrop1().merge(patches[:, :2, :2]) is None  # smaller than a window


@pytest.mark.parametrize(("rate", "left"), [(0.9, 28), (0.5, 12), (0.4, 12), (0.01, 4), (1.0, 36)])
def test_a_retention_merges_as_few_windows_as_it_takes(rate, left):
    patches = torch.randn(2, 6, 6, 8, generator=torch_random(1))
    matrix = MustDrop1(retention=rate).merge(patches)
    assert (36 if matrix is None else matrix.shape[1]) == left
    wanted = oracle.mustdrop1(patches.double().numpy(), rate=rate)
    np.testing.assert_allclose(torch.eye(36).expand(2, 36, 36) if matrix is None else matrix, wanted, atol=1e-6)


def test_equal_tokens_are_taken_from_the_first_on():
    flat = Planted(4, scores=dict.fromkeys(range(24), torch.full((16,), 0.01)), attention=attending(torch.ones(16, 16)))
    for method in (Hired(keep_tokens=5), VtcCls(keep_tokens=5), FoPru(keep_tokens=5)):
        assert method.pick(flat).tolist() == [*range(5)], method
    assert FoPru(keep_tokens=5, form="row").pick(flat).tolist() == [*range(8)]
    assert DivPrune(keep_tokens=5).pick(Planted(4, projected=torch.eye(16))).tolist() == [*range(5)]
    zip_ = VisionZip(keep_tokens=5, contextual=0.4).pick(
        Planted(4, scores=flat.scores, keys=lambda _: torch.ones(1, 16, 2))
    )
    rest = [*range(2, 16)]
    assert [row.nonzero()[:, 0].tolist() for row in zip_] == [[16], [0], [1], [i for i in rest if i != 9], [9]]
    same = MustDrop1(retention=0.75, block=2).merge(torch.ones(1, 4, 4, 3))
    assert [row.nonzero()[:, 0].tolist() for row in same[0, :2]] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert MustDrop1(key_share=0.2).protect(Planted(4, scores={23: torch.ones(16)})).nonzero()[:, 0].tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_divprune_begins_with_the_token_farthest_from_its_nearest_neighbour():
    """Not with the one farthest from the mean, nor with the first."""
    degrees = torch.tensor([0.0, 5, 100, 140, 181, 185]) * math.pi / 180
    picture = Planted(
        1, projected=torch.stack((degrees.cos(), degrees.sin()), 1) * torch.tensor([[1.0, 9, 2, 3, 4, 5]]).T
    )
    picture.tokens = 6
    assert DivPrune(keep_tokens=1).pick(picture).tolist() == [2]
    assert DivPrune(keep_tokens=2).pick(picture).tolist() == [0, 2]
    assert DivPrune(keep_tokens=3).pick(picture).tolist() == [0, 2, 5]
    twice = torch.eye(3)[[0, 0, 1, 1, 2, 2]]
    picture.projected = twice  # an equal token is not chosen twice
    assert DivPrune(keep_tokens=5).pick(picture).tolist() == [0, 1, 2, 3, 4]


def test_half_precision_is_compared_in_fp32():
    """Cosines in bf16 have three digits, so that the ranks would differ."""
    near = 1 + 0.05 * torch.randn(144, 32, generator=torch_random(4))
    half = near.bfloat16()
    unit = half.double().numpy() / np.linalg.norm(half.double().numpy(), axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    first = int((distance + 9 * np.eye(144)).min(1).argmax())
    chosen = [first]
    while len(chosen) < 20:
        chosen.append(int(np.where(np.isin(range(144), chosen), -1, distance[chosen].min(0)).argmax()))
    assert DivPrune(keep_tokens=20).pick(Planted(12, projected=half)).tolist() == sorted(chosen)
    squares = half.view(1, 12, 12, 32)
    matrix = MustDrop1(retention=0.5).merge(squares)
    np.testing.assert_allclose(matrix, oracle.mustdrop1(squares.double().numpy(), rate=0.5), atol=1e-6)
    scores = torch.rand(144, generator=torch_random(5))
    zipped = [
        VisionZip(keep_tokens=40).pick(Planted(12, scores={22: scores}, keys=lambda _, k=keys: k[None]))
        for keys in (half, half.double())
    ]
    assert zipped[0].dtype == torch.float32 and zipped[0].equal(zipped[1])


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hired:whole=1.5", "whole is 1.5; give a number from 0 to 1"),
        ("vtc-cls:first=-1", "first is -1; give a whole number of 0 or more"),
        ("fopru:form=column", "form is 'column'; use rank or row"),
        ("visionzip:contextual=-1", "contextual is -1.0; give a number from 0 to 1"),
        ("mustdrop1:block=1", "block is 1; give a whole number of 2 or more"),
        ("mustdrop1:threshold=NaN", "threshold is nan; give a number from 0 to 1"),
        ("mustdrop1:key_share=2", "key_share is 2.0; give a number from 0 to 1"),
        ("mustdrop1:retention=0.5,threshold=0.7", "threshold has no effect with retention=0.5"),
        ("mustdrop1:keep_tokens=9,threshold=0.7", "threshold has no effect with keep_tokens=9"),
    ],
)
def test_wrong_settings_are_refused(spec, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        make_method(spec)


@pytest.mark.parametrize("name", NAMES)
def test_a_number_of_tokens_is_of_each_picture(case, name):
    case_name = "16 x 16, two pictures"
    asked = ask(case(case_name)[1], case_name, f"{name}:keep_tokens=40", 1)
    "".join(asked)
    (kept, _) = asked.kept
    assert kept == (2 * 56 if name == "mustdrop1" else 80)  # 25 windows of 9 and 31 other patches


def test_defaults_are_those_of_the_originals():
    for name, tokens in {"hired": 115, "vtc-cls": 36, "visionzip": 64, "divprune": 56}.items():
        assert amount(576, METHODS[name]().retention) == tokens
    assert round(64 * VisionZip().contextual) == 10 and Hired().whole == 0.5
    drop = MustDrop1()
    assert (drop.threshold, drop.block, drop.key_share, math.ceil(576 * drop.key_share)) == (0.8, 3, 0.08, 47)
