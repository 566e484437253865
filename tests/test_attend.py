"""The stage `attend`, attention among some tokens in prefill, and ZipVL, which lives on it: against transformers with
masks, against loops, and what both must never do."""

import dataclasses
import itertools
import json

import pytest
import torch
from conftest import refusal
from test_cache import live_bytes
from test_methods import QUESTIONS, answered, pictures
from test_parity import noise

from kernels import window_scores
from model import Batch, Generation, InputError, Sampling, load
from model.cache import RaggedCache
from model.lookahead import Lookahead
from model.pruning import make_method
from model.pruning.zipvl import ZipVL
from model.view import Pruning, View, attention_among, pruned_prefill
from tests.given import given_view
from tests.onevision import make_onevision
from tests.oracle import assert_as_exact, small_llama
from tests.seeds import torch_random
from tests.sparse_oracles import count_of, sparse_ids, zipvl_by_hand

TEXT = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def oracle(make_hf_checkpoint, tmp_path_factory):
    """A folder and its checkpoint: 4 layers, 8 query heads over 2 KV heads, 36 tokens a picture, no stop id."""
    folder = tmp_path_factory.mktemp("attend")
    make_hf_checkpoint(folder, TEXT, vision={"image_size": 84}, seed=3)
    return folder, dataclasses.replace(load(folder, "fp32"), stop_ids=())


@pytest.fixture(scope="module")
def tiled(make_hf_checkpoint, tmp_path_factory):
    """The same for LLaVA-NeXT, with tiles of 2 x 2 patches."""
    folder = tmp_path_factory.mktemp("tiled")
    top = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]], "vision_feature_select_strategy": "default"}
    make_hf_checkpoint(folder, TEXT, seed=3, kind="LlavaNext", top=top)
    return folder, dataclasses.replace(load(folder, "fp32"), stop_ids=())


@pytest.fixture(scope="module")
def shrunk(make_hf_checkpoint, tmp_path_factory):
    """The same for LLaVA-OneVision."""
    folder = tmp_path_factory.mktemp("shrunk")
    make_onevision(make_hf_checkpoint, folder, TEXT, seed=3)
    return folder, dataclasses.replace(load(folder, "fp32"), stop_ids=())


class Some:
    """Of each picture a random half takes part, another half in each layer; K and V of all are kept, or of these."""

    def __init__(self, *, store: bool = False):
        self.store = store

    def attend(self, view):
        return torch.rand(view.tokens, generator=torch_random(view.layer), device="cpu").to(view.device) < 0.5

    def keep(self, view):
        return view.attended.expand(view.kv_heads, -1) if self.store else None


def half_by_hand(spans):
    """choose(layer, weights) for `sparse_ids`: as `Some`, with text and the last token."""

    def choose(layer, weights):
        part = torch.rand(weights.shape[1], generator=torch_random(layer)) < 0.5
        vision = torch.zeros_like(part)
        for a, b in spans:
            vision[a:b] = True
        vision[-1] = False
        return part | ~vision

    return choose


@pytest.fixture
def taking_part(monkeypatch):
    """What the stage `attend` returned, in call order, and the rows that were probed in these calls."""
    found, rows = [], []
    attend, attention = ZipVL.attend, View.attention

    def watched(self, view):
        found.append(attend(self, view))
        return found[-1]

    def listening(self, asked=1, query="last"):
        rows.extend([asked.tolist()] if isinstance(asked, torch.Tensor) else [])
        return attention(self, asked, query)

    monkeypatch.setattr(ZipVL, "attend", watched)
    monkeypatch.setattr(View, "attention", listening)
    return found, rows


def first_logits(checkpoint, question, method=None):
    """Logits of the first new token, and the Generation."""
    prompt, count, template = QUESTIONS[question]
    generation = Generation(checkpoint, prompt, pictures(count), Sampling(8), template, prune=method)
    with torch.inference_mode():
        return generation.prefill(), generation


# ---------------------------------------------------------------- the stage


@pytest.mark.parametrize("shape", [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_among_tokens_is_dense_attention_with_a_mask(shape, dtype):
    (heads, kv_heads), tokens = shape, torch.rand(50) < 0.5
    q, k, v = (torch.randn(1, 50, h, 16, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads))

    def dense(kind):
        keys, values = (t.to(kind).repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = q.to(kind) @ keys.mT * 16**-0.5
        scores = scores.masked_fill(~(torch.ones(50, 50).tril().bool() & tokens), float("-inf"))
        return (scores.softmax(-1) @ values).masked_fill(~tokens[:, None], 0.0)

    got = attention_among(q, k, v, tokens)
    assert_as_exact(got, dense(dtype), dense(torch.float64), dtype)
    assert not got[:, :, ~tokens].any() and got.shape == q.shape


@pytest.mark.parametrize("question", ["one", "three", "last"])
@pytest.mark.parametrize("store", [False, True])
def test_what_takes_part_is_that_of_transformers_with_masks(oracle, question, store):
    folder, checkpoint = oracle
    generation = answered(checkpoint, question, 24, make_method(Some, settings={"store": store}))
    ids, logits, _ = sparse_ids(folder, generation, half_by_hand(generation.spans), 24, stored=store)
    assert generation.token_ids == ids
    first, _ = first_logits(checkpoint, question, Some())
    assert torch.allclose(first, logits[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first_logits(checkpoint, question)[0], logits[0], rtol=1e-2, atol=1e-2)


def test_nothing_left_out_is_unpruned_bit_for_bit(oracle):
    class Everything:
        def __init__(self, *, chosen: bool = False):
            self.chosen = chosen

        def attend(self, view):
            return torch.ones(view.tokens, dtype=torch.bool) if self.chosen else None

        def keep(self, view):
            assert view.attended is None

    for question in ("one", "three", "last"):
        plain, _ = first_logits(oracle[1], question)
        for chosen in (False, True):
            assert first_logits(oracle[1], question, Everything(chosen=chosen))[0].equal(plain)
        for spec in ("zipvl:tau=1", "zipvl:retention=1", "zipvl:keep_tokens=36"):
            logits, generation = first_logits(oracle[1], question, spec)
            assert logits.equal(plain) and generation.retention == 1.0


def test_text_guards_and_the_last_token_always_take_part(oracle):
    seen = []

    class Nothing:
        def attend(self, view):
            return torch.zeros(view.tokens, dtype=torch.bool)

        def keep(self, view):
            seen.append((view.text, view.attended, view.spans))
            return view.attended.expand(view.kv_heads, -1)

    for question in ("one", "last"):
        seen.clear()
        guards = {"sink": 14, "sink_keys": 2}
        _, generation = first_logits(oracle[1], question, make_method(Nothing, settings={}))
        assert len(seen) == 4
        for text, attended, spans in seen:
            last = torch.arange(len(text)) == len(text) - 1
            assert attended.equal(text | last) and (question != "last" or spans[-1][1] == len(text))
        assert generation.kept == [float(question == "last")] * 4
        seen.clear()
        _, generation = first_logits(oracle[1], question, make_method(Nothing, settings=guards))
        for text, attended, _ in seen:
            assert attended[:14].all() and attended[text].all() and not attended.all()
        sinks = 14 - generation.spans[0][0]
        assert min(generation.kept) >= sinks > 0 and max(generation.kept) > sinks


def test_views_before_attention_know_what_there_is(oracle):
    class Asks:
        def attend(self, view):
            assert view.attended is None
            assert view.keys.shape == view.values.shape == (2, view.tokens, 8)
            assert view.origin.tolist() == list(range(view.tokens))
            rows = torch.tensor([0, 3, view.tokens - 1])
            scores = view.queries(1)[:, 0].double() @ view.keys.double().repeat_interleave(4, 0).mT * 8**-0.5
            wanted = torch.stack([s.softmax(-1) for s in scores.diagonal().T])
            assert torch.allclose(view.attention(rows[2:]).double(), wanted, atol=1e-5)
            early = view.attention(rows[:1])
            assert (early[:, 0] == 1).all() and not early[:, 1:].any()
            return view.hidden > 0

    with pytest.raises(Exception, match="hidden states are not known here") as failed:
        first_logits(oracle[1], "one", Asks())
    assert "method Asks" in str(failed.value) and "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda view: [1], "list in layer 0"),
        (lambda view: view.text[1:], "torch.bool (T,) on cpu in layer 0"),
        (lambda view: view.text.long(), "torch.int64 (T,) on cpu in layer 0"),
        (lambda view: view.text.expand(2, -1), "torch.bool (2, T) on cpu in layer 0"),
    ],
)
def test_what_is_no_mask_is_refused(oracle, returned, words):
    class Wrong:
        def attend(self, view):
            return returned(view)

    said = refusal(first_logits, oracle[1], "one", Wrong())
    assert "method Wrong returned" in said and words.split("(")[0] in said and "return torch.bool (" in said


class Ahead(Some):
    """Some, ranked by look-ahead rows, which are stored in `seen`."""

    def __init__(self, *, query: str = "lookahead"):
        super().__init__(store=True)
        self.query, self.seen = query, []

    def keep(self, view):
        self.seen.append(view.attention(query="lookahead"))
        return super().keep(view)


@torch.no_grad()
def test_look_ahead_rows_take_part_and_are_seen_by_no_other_row():
    """Without adapters they are like text at the end of the prompt, which all its rows ignore."""
    language, spans = small_llama(), [(3, 20)]
    lookahead = Lookahead(language, rows=4).requires_grad_(False)
    lookahead.embeddings.normal_()
    x, found = torch.randn(30, 32), []

    def run(x, lookahead, rule):
        pruning = Pruning(make_method(rule), 3, spans, ahead=lookahead.rows if lookahead else 0)
        return pruned_prefill(language, x, RaggedCache(3), pruning, lookahead)[0]

    class Same(Some):
        def attend(self, view):
            part = torch.zeros(34, dtype=torch.bool)
            part[:30] = torch.rand(30, generator=torch_random(view.layer)) < 0.5
            return part

        def keep(self, view):
            found.append(window_scores(view.queries(4), view.keys, group="none")[:, :30])
            return super().keep(view)

    ahead = Ahead()
    with_rows = run(x, lookahead, ahead)
    as_text = run(torch.cat((x, lookahead.embeddings)), None, Same(store=True))
    torch.testing.assert_close(with_rows, as_text[:30], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(with_rows, run(x, None, Some(store=True)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ahead.seen, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", ["pick-grid:retention=0.5", "mustdrop1:retention=0.5,key_share=0.2"])
def test_a_method_before_the_language_model_comes_first(oracle, taking_part, spec):
    """ZipVL sees the tokens that the first method left; those that it protects take part in every layer."""
    found, _ = taking_part
    prompt, count, template = QUESTIONS["one"]
    method = make_method(f"{spec}+zipvl:tau=0.3")
    generation = Generation(oracle[1], prompt, pictures(count), Sampling(8), template, prune=method)
    "".join(generation)
    left = len(found[0]) - count_text(generation)
    assert left < 36 and {len(part) for part in found} == {len(found[0])} and method.attends and method.narrows
    kept = [int(part[generation.spans[0][0] :][:left].sum()) for part in found]
    if spec.startswith("pick"):
        assert left == 18 and generation.kept == kept and max(kept) < 18
    else:
        assert all(a >= b for a, b in zip(generation.kept, kept, strict=True)) and sum(generation.kept) > sum(kept)


def test_a_method_may_narrow_and_attend(oracle):
    """After the first layer a third of each picture remains; of these every other one takes part."""
    shapes = []

    class Both(Some):
        def narrow(self, view):
            keep = view.text
            for a, b in view.spans:
                keep[a:b:3] = True
            return keep if view.layer == 0 else None

        def attend(self, view):
            assert view.attended is None  # not that of the layer before
            shapes.append((view.tokens, view.origin.tolist()))
            return super().attend(view)

    generation = answered(oracle[1], "three", 8, Both(store=True))
    whole = generation.prompt_tokens
    assert [t for t, _ in shapes] == [whole] + [whole - 72] * 3
    for tokens, origin in shapes[1:]:
        assert len(origin) == tokens and sorted(set(origin)) == origin
        assert all(i in origin for a, b in generation.spans for i in range(a, b, 3))
    masks = first_masks(oracle[1], "three", Both(store=True))
    for layer, mask in enumerate(masks):
        vision = torch.cat([mask[0, a:b] for a, b in generation.spans])
        assert 0 < vision.sum() < (108 if layer == 0 else 36) and mask[0].equal(mask[1])


def first_masks(checkpoint, question, method):
    """`masks` of a Generation that remembers."""
    prompt, count, template = QUESTIONS[question]
    generation = Generation(
        checkpoint, prompt, pictures(count), Sampling(2), template, prune=make_method(method), remember=True
    )
    "".join(generation)
    return generation.masks


# ---------------------------------------------------------------- ZipVL

CASES = [
    ("zipvl:tau=0.8", 0.8),
    ("zipvl:tau=0.5,last_rows=4,random_rows=9", 0.5),
    ("zipvl:tau=0.6,last_rows=1,random_rows=0", 0.6),
]


def check_zipvl(pair, asked, taking_part, spec, tau):
    folder, checkpoint = pair
    found, rows = taking_part
    generation = asked(checkpoint, make_method(spec))
    "".join(generation)
    layers = checkpoint.config.text_config.num_hidden_layers
    assert len(found) == len(rows) == layers
    ids, logits, chosen = sparse_ids(folder, generation, zipvl_by_hand(rows, tau, generation.spans), 24)
    text = torch.ones(generation.prompt_tokens, dtype=torch.bool)
    for a, b in generation.spans:
        text[a:b] = False
    text[-1] = True
    assert [(part | text).tolist() for part in found] == [part.tolist() for part in chosen]
    assert generation.kept == [float((part & ~text).sum() + text.sum() - count_text(generation)) for part in chosen]
    assert generation.token_ids == ids
    assert 0 < generation.retention < 1
    assert torch.allclose(first_of(asked, checkpoint, spec), logits[0], rtol=1e-4, atol=1e-4)


def count_text(generation):
    return generation.prompt_tokens - generation.vision_tokens


def first_of(asked, checkpoint, spec):
    with torch.inference_mode():
        return asked(checkpoint, make_method(spec)).prefill()


@pytest.mark.parametrize("question", ["one", "three", "last"])
@pytest.mark.parametrize(("spec", "tau"), CASES)
def test_sets_and_ids_are_those_of_transformers_with_masks(oracle, taking_part, question, spec, tau):
    prompt, count, template = QUESTIONS[question]

    def asked(checkpoint, method):
        return Generation(checkpoint, prompt, pictures(count), Sampling(24), template, prune=method)

    check_zipvl(oracle, asked, taking_part, spec, tau)


@pytest.mark.parametrize(("spec", "tau"), CASES)
@pytest.mark.parametrize("sizes", [[(56, 50)], [(60, 30), (56, 56)]])
def test_also_with_tiles_and_newlines(tiled, taking_part, spec, tau, sizes):
    def asked(checkpoint, method):
        shown = [noise(*size) for size in sizes]
        return Generation(checkpoint, "what is left?", shown, Sampling(24), prune=method)

    check_zipvl(tiled, asked, taking_part, spec, tau)


@pytest.mark.parametrize("frames", [0, 3])
def test_also_with_shrunk_maps_and_frames(shrunk, taking_part, frames):
    """A picture of 36 tiles, whose map shrinks to 18 x 18 tokens; three frames of 9 and two pictures of one square."""
    video = [noise(50, 40, seed=9 + i) for i in range(frames)]
    question = "is <image> or <image> in <video>?" if frames else "what is left of <image>?"
    pictures = [noise(150, 150), noise(50, 40)][: 1 + bool(frames)]

    def asked(checkpoint, method):
        generation = Generation(checkpoint, question, pictures, Sampling(24), "raw", prune=method, frames=video)
        assert [i["tokens"] for i in generation.images] == ([37, 37, 9, 9, 10] if frames else [36 + 18 * 19])
        return generation

    check_zipvl(shrunk, asked, taking_part, "zipvl:tau=0.6,last_rows=4,random_rows=9", 0.6)


def planted(attention, spans, layer=1):
    """A View whose head h and row i attend to tokens with attention[h][i], lists of numbers from 0."""

    class Planted(type(given_view(spans, 1))):
        def attention(self, rows=1, query="last"):
            return torch.tensor([[head[r] for r in rows.tolist()] for head in attention]).float().mean(1)

    view = given_view(spans, len(attention[0]), len(attention), 1, layer=layer)
    view.__class__ = Planted
    return view


def test_the_count_is_by_sums_and_the_ranking_by_means():
    """Token 1 has the larger sum, because all four rows see it; token 3 the larger mean over the rows that do."""
    rows = [
        [1.0, 0.0, 0.0, 0.0],
        [0.25, 0.75, 0.0, 0.0],
        [0.25, 0.625, 0.125, 0.0],
        [0.0, 0.125, 0.125, 0.75],
    ]
    view = planted([rows], [(0, 3)])
    # sums 1.5, 1.5, 0.25, 0.75; by rows that see them: 1.5 / 4, 1.5 / 3, 0.25 / 2, 0.75 / 1
    for tau, wanted in ((0.375, [3]), (0.376, [1, 3]), (0.75, [1, 3]), (0.751, [0, 1, 3]), (0.9375, [0, 1, 3])):
        method = ZipVL(tau=tau, last_rows=4)
        assert method.attend(view).nonzero()[:, 0].tolist() == wanted, tau
    assert ZipVL(tau=0.9376, last_rows=4).attend(view).all()
    some = ZipVL(tau=0.5, last_rows=2, random_rows=0).attend(view)  # sums 0.25, 0.75, 0.25, 0.75: two by means
    assert some.nonzero()[:, 0].tolist() == [1, 3]


def test_a_fixed_number_of_each_picture_is_ranked_by_means():
    """Without it 1 of 4 tokens holds tau. The sums prefer the first token of each picture, the means the second."""
    rows = torch.zeros(6, 6)
    rows[:, 1], rows[2:, 2], rows[3:, 3], rows[4:, 4] = 0.25, 0.375, 0.25, 0.375
    rows[:, 0], rows[5, 5] = 0.5, 1.0
    sums = (rows.sum(0)).tolist()
    means = [total / (6 - j) for j, total in enumerate(sums)]
    assert sums[1] == 1.5 == sums[2] and sums[3] == 0.75 == sums[4] and means[1] < means[2] and means[3] < means[4]
    view = planted([rows.tolist()], [(1, 3), (3, 5)])
    for fixed in ({"keep_tokens": 1}, {"retention": 0.5}):
        assert ZipVL(tau=0.2, **fixed).attend(view).tolist() == [True, False, True, False, True, True]
    assert ZipVL(keep_tokens=1, scope="vision").attend(view).tolist() == [True, False, True, False, False, True]


def test_scores_that_are_not_numbers_are_refused():
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    k[..., 4, :] = float("nan")
    for spec in ("zipvl", "zipvl:retention=0.5"):
        attend, _ = Pruning(make_method(spec), 2, [(2, 6)], backend="torch").inside(0)
        with pytest.raises(InputError, match="the scores of layer 0 hold NaN"):
            attend(q, k, v)


def test_heads_are_summed_and_text_is_added():
    one = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0.125, 0.875, 0]]
    two = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 1.0, 0, 0]]
    view = planted([one, two], [(1, 3)])
    kept = ZipVL(tau=0.1, last_rows=1, random_rows=0).attend(view)  # sums 0, 1.125, 0.875, 0
    assert kept.tolist() == [True, True, False, True]
    kept = ZipVL(tau=0.6, last_rows=1, random_rows=0).attend(view)
    assert kept.tolist() == [True, True, True, True]


def random_views(count):
    for layer in range(count):
        q, k, v = torch.randn(3, 1, 4, 90, 8) * 2
        yield View(layer, count, q, k[:, :2], v[:, :2], [(4, 40), (44, 80)], backend="torch")


def test_a_larger_tau_adds_tokens_and_takes_none_away():
    sizes = []
    for view in random_views(3):
        kept = [ZipVL(tau=tau).attend(view) for tau in (0.05, 0.2, 0.5, 0.8, 0.975, 0.999)]
        assert all((a <= b).all() for a, b in itertools.pairwise(kept))
        sizes.append([int(mask.sum()) for mask in kept])
        fixed = [ZipVL(retention=f).attend(view) for f in (0.1, 0.5, 0.9)]
        assert [int(mask[~view.text].sum()) for mask in fixed] == [8, 36, 64]
        assert all((a <= b).all() for a, b in itertools.pairwise(fixed))
    assert all(row[0] < row[2] < row[4] for row in sizes) and len({tuple(row) for row in sizes}) == 3  # per layer


def test_probe_rows_are_the_last_and_random_ones_of_the_others():
    views = list(random_views(3))
    method = ZipVL(last_rows=20, random_rows=30)
    rows = [method.probes(view).tolist() for view in views]
    for found in rows:
        assert found[-20:] == list(range(70, 90)) and len(found) == 50 == len({*found})
        assert found == sorted(found) and found[0] >= 0
    assert len({tuple(found) for found in rows}) == 3 and rows[1] == method.probes(views[1]).tolist()
    assert rows[1] != ZipVL(last_rows=20, random_rows=30, seed=1).probes(views[1]).tolist()
    assert ZipVL().probes(views[0]).tolist() == list(range(90))  # a short prompt: all rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert method.probes(views[1]).tolist() == rows[1]  # whatever was drawn before


def test_the_count_uses_the_probe_rows_only():
    for view in random_views(2):
        method = ZipVL(tau=0.7, last_rows=8, random_rows=8)
        rows = method.probes(view).tolist()
        raw = (view.attention(torch.tensor(rows)).double() * 16).sum(0)
        kept = method.attend(view)
        mean = [raw[j] / sum(r >= j for r in rows) for j in range(90)]
        best = sorted(range(90), key=lambda j: (-mean[j], j))[: count_of(raw.tolist(), 0.7)]
        assert kept.tolist() == [j in best or bool(view.text[j]) for j in range(90)]


@pytest.mark.parametrize("spec", ["zipvl:tau=0.5", "zipvl:retention=0.25"])
def test_only_the_important_tokens_of_each_layer_are_stored(oracle, spec):
    """Counted on live tensors: nothing but the arenas remains, and these hold what `kept` says."""
    prompt, count, template = QUESTIONS["three"]
    generation = Generation(oracle[1], prompt, pictures(count), Sampling(24), template, prune=make_method(spec))
    _, before = live_bytes()
    text = iter(generation)
    next(text)
    after, _ = live_bytes(apart=before)
    cache = generation.cache
    assert 0 <= after - cache.nbytes_reserved < 0.1 * cache.nbytes_reserved
    stored = [count_text(generation) + kept for kept in generation.kept]
    assert cache.nbytes_held - 2 * 4 * 2 * 2 * 8 * 4 <= generation.bytes_held == sum(stored) * 2 * 2 * 8 * 4
    assert max(generation.kept) < 108 and (spec != "zipvl:retention=0.25" or generation.kept == [27.0] * 4)
    assert max(arena.shape[0] for arena in cache.k) <= 2 * (max(stored) + cache.slack)


def test_the_same_in_a_batch_and_in_later_turns(oracle):
    checkpoint = oracle[1]

    def asked(question):
        prompt, count, template = QUESTIONS[question]
        return Generation(
            checkpoint, prompt, pictures(count), Sampling(12), template, prune=make_method("zipvl:tau=0.6")
        )

    alone = {name: asked(name) for name in ("one", "three", "none")}
    for generation in alone.values():
        "".join(generation)
    batch, together = Batch(), {name: asked(name) for name in alone}
    for generation in together.values():
        batch.add(generation)
    while batch:
        batch.advance()
    for name, generation in together.items():
        assert generation.token_ids == alone[name].token_ids and generation.kept == alone[name].kept
    follow = Generation(
        checkpoint, "where?", before=alone["one"], sampling=Sampling(6), prune=make_method("zipvl:tau=0.6")
    )
    "".join(follow)
    assert len(follow.token_ids) == 6 and follow.retention < 1 and follow.prefilled < follow.prompt_tokens


def test_what_is_reported_is_what_was_kept(cli):
    options = ["--image", "assets/demo.png", "--prompt", "Describe the picture.", "--prune", "zipvl:tau=0.8"]
    code, out, _ = cli(*options, "--json", "--max-new-tokens", "8")
    said = json.loads(out)["prune"]
    assert code == 0 and said["method"] == "zipvl" and said["retention_requested"] is None
    assert (
        said["retention_actual"] == pytest.approx(sum(said["kept_per_layer"]) / 256 / 6)
        and said["kv_bytes_held"] < said["kv_bytes_full"]
    )
    code, out, err = cli(*options, "--compare", "--max-new-tokens", "8")
    assert code == 0 and "zipvl" in err
    code, out, _ = cli(*options[:-1], "zipvl", "--retention", "0.25", "--json", "--max-new-tokens", "8")
    assert json.loads(out)["prune"]["kept_per_layer"] == [64.0] * 6


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("zipvl:tau=0", "tau is 0.0; give a number above 0 and up to 1"),
        ("zipvl:tau=1.5", "tau is 1.5; give a number above 0 and up to 1"),
        ("zipvl:tau=NaN", "tau is nan; give a number above 0 and up to 1"),
        ("zipvl:last_rows=0", "last_rows is 0; give a whole number of 1 or more"),
        ("zipvl:random_rows=-1", "random_rows is -1; give a whole number of 0 or more"),
        ("zipvl:tau=0.9,retention=0.5", "tau has no effect with retention=0.5"),
    ],
)
def test_settings_outside_their_range_are_refused(spec, words):
    with pytest.raises(ValueError, match="; ") as refused:
        make_method(spec)
    assert words in str(refused.value)
