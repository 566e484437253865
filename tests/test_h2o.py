"""The stage `evict` and h2o: what each head holds after each token, in fixed bytes, alone and in a batch."""

import copy
import dataclasses

import pytest
import torch
from test_methods import pictures

from model import Batch, Generation, InputError, Sampling, load
from model.fast import FastStep
from model.generate import plain_step
from model.pruning import make_method
from model.report import logits_along
from model.view import View
from tests.h2o_oracle import heavy_hitters
from tests.onevision import make_onevision
from tests.oracle import poison
from tests.seeds import torch_random
from tests.test_cache import live_bytes
from tests.test_out_of_memory import failures

LONG = {"max_position_embeddings": 2048, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def tiny(make_hf_checkpoint, tmp_path_factory):
    """Function (KV heads, kind) -> folder and checkpoint: 3 layers, 4 query heads, 36 tokens a picture, no stop id."""
    made = {}

    def get(kv_heads=2, kind="Llava"):
        if (kv_heads, kind) not in made:
            folder = tmp_path_factory.mktemp("tiny")
            top = {"image_grid_pinpoints": [[84, 168], [168, 84]]} if kind == "LlavaNext" else {}
            text = LONG | {"num_key_value_heads": kv_heads}
            if kind == "LlavaOnevision":
                make_onevision(make_hf_checkpoint, folder, text, seed=kv_heads)
            else:
                make_hf_checkpoint(folder, text, {"image_size": 84}, top, seed=kv_heads, kind=kind)
            made[kv_heads, kind] = folder, dataclasses.replace(load(folder, "fp32"), stop_ids=())
        return made[kv_heads, kind]

    return get


class Watched(FastStep):
    """A step that poisons free slots and records logits and, per layer and head, the positions in the cache."""

    told = []

    def __call__(self, ids):
        logits = super().__call__(ids)
        poison(self.cache)
        self.told.append((logits.clone(), held(self.cache) if self.cache.evicts else None))
        return logits


def held(cache):
    """Per layer and segment the set of positions in it."""
    found = []
    for layer in range(len(cache.k)):
        places, segment = cache.positions(layer)
        found.append([{*places[segment == s].tolist()} for s in range(cache.kv_len.shape[1])])
        assert all(len(places) == n for places, n in zip(found[-1], cache.kv_len[layer].tolist(), strict=True))
    return found


@pytest.fixture
def watched(monkeypatch):
    """Function (checkpoint, spec, ...) -> finished Generation, [(logits, positions) after each step]."""

    def run(checkpoint, spec, count=28, images=1, prompt="what is in the picture?", **options):
        monkeypatch.setattr(Watched, "told", [])
        checkpoint = dataclasses.replace(checkpoint, step=Watched)
        prune = spec and make_method(spec)
        generation = Generation(checkpoint, prompt, pictures(images), Sampling(count), prune=prune, **options)
        "".join(generation)
        return generation, Watched.told

    return run


ORACLE = [  # KV heads, kind, retention, newest, extra tokens, pictures
    (4, "Llava", 0.3, 0.5, 1, 1), (2, "Llava", 0.2, 0.5, 1, 2), (2, "Llava", 0.5, 0.0, 4, 1),
    (1, "Llava", 0.1, 1.0, 2, 1), (2, "LlavaNext", 0.2, 0.3, 1, 1),
    (2, "LlavaOnevision", 0.2, 0.3, 1, 2),
]  # fmt: skip


@pytest.mark.parametrize(("kv_heads", "kind", "retention", "newest", "extra", "images"), ORACLE)
def test_each_head_holds_what_transformers_with_masks_would(
    tiny, watched, kv_heads, kind, retention, newest, extra, images
):
    folder, checkpoint = tiny(kv_heads, kind)
    spec = f"h2o:retention={retention},newest={newest},extra_tokens={extra}"
    generation, seen = watched(checkpoint, spec, images=images)
    ids, told = heavy_hitters(folder, generation, generation.spans, retention, newest, extra, 28)
    for (_, ours), theirs in zip(seen, told, strict=True):
        assert ours == [[{*row.nonzero()[:, 0].tolist()} for row in layer] for layer in theirs]
    assert generation.token_ids == ids and len(ids) == 28
    if newest < 1:  # otherwise only the newest are left
        assert len({frozenset(own) for layer in seen[-1][1] for own in layer}) == 3 * kv_heads  # each head its own
    text = {*range(generation.prompt_tokens)} - {j for a, b in generation.spans for j in range(a, b)}
    assert all(text <= own for _, layers in seen for layer in layers for own in layer)


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_with_room_for_everything_the_logits_are_those_of_no_pruning(tiny, watched, backend, kind):
    """To the last bit, though scores are kept."""
    _, checkpoint = tiny(2)
    checkpoint = dataclasses.replace(load(checkpoint.folder, "fp32", torch.get_default_device()), stop_ids=())
    count = 24 if backend == "torch" else 5
    options = {"backend": backend, "kv_dtype": kind}
    pruned, ours = watched(checkpoint, "h2o:retention=1,extra_tokens=100", count, **options)
    plain, theirs = watched(checkpoint, None, count, **options)
    assert pruned.token_ids == plain.token_ids and pruned.bytes_held == plain.bytes_held
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(ours, theirs, strict=True)) and len(ours) == count - 1
    _, fewer = watched(checkpoint, "h2o:retention=1,extra_tokens=2", count, **options)
    assert [torch.equal(a, b) for (a, _), (b, _) in zip(fewer, theirs, strict=True)][:3] == [True, True, False]


@pytest.mark.parametrize("kind", ["auto", "int8", "fp8"])
def test_backends_hold_the_same(tiny, watched, kind):
    pytest.importorskip("triton", reason="triton has no wheel for this system")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = dataclasses.replace(load(tiny(2)[0], "fp32", device), stop_ids=())
    with torch.device(device):
        ways = [watched(checkpoint, "h2o:newest=0.2", 7, backend=b, kv_dtype=kind) for b in ("torch", "triton")]
    (one, ours), (two, theirs) = ways
    assert one.token_ids == two.token_ids and two.cache.fused
    assert [places for _, places in ours] == [places for _, places in theirs]
    for (a, _), (b, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_an_answer_of_500_tokens_takes_no_more_bytes_than_its_first(tiny, kind):
    _, checkpoint = tiny(2)
    sampling = Sampling(500)
    generation = Generation(checkpoint, "what?", pictures(2), sampling, prune=make_method("h2o"), kv_dtype=kind)
    _, before = live_bytes()
    sizes, lives, answer = set(), [], iter(generation)
    for piece, _ in enumerate(answer):
        cache = generation.cache
        sizes.add((cache.nbytes_reserved, tuple(cache.kv_len.flatten().tolist())) if piece > 1 else None)
        if piece in (2, 400):
            lives.append(live_bytes(apart=before)[0])
    assert len(generation.token_ids) == 500 and len(sizes) == 2  # None, and one for all later steps
    assert cache.pos.item() == generation.prompt_tokens + 499
    assert abs(lives[1] - lives[0]) <= 4096  # ids and times of the answer
    assert 0 <= lives[0] - cache.nbytes_reserved <= 4096  # tables, plans, what a step computes
    rows = int(cache.kv_len.sum())
    row = 2 * 16 * 4 if kind == "auto" else 2 * (16 + 2)
    assert cache.nbytes_held == rows * row and cache.nbytes_reserved == rows * (row + 12)  # no slot is free
    assert generation.bytes_held == cache.nbytes_held - 3 * 2 * row


SPECS = ["h2o", None, "h2o:retention=0.5,newest=0.1,extra_tokens=7", "plphp", "h2o:keep_tokens=1"]


@pytest.mark.parametrize("size", [5, 2])
@torch.inference_mode()
def test_sequences_of_a_batch_evict_as_they_would_alone(tiny, size):
    """Other budgets, other ages, some that never evict; they join and leave."""
    _, checkpoint = tiny(2)

    def asked():
        lengths = (30, 12, 25, 9, 18)
        return [
            Generation(
                checkpoint, "what? " * (i + 1), pictures(1 + i % 2), Sampling(n), prune=spec and make_method(spec)
            )
            for i, (n, spec) in enumerate(zip(lengths, SPECS, strict=True))
        ]

    alone, mates, batch = asked(), asked(), Batch()
    for generation in alone:
        "".join(generation)
    waiting, over = list(mates), []
    while waiting or batch:
        while waiting and len(batch) < size:
            batch.add(waiting.pop(0))
        over += batch.advance()
        if batch.cache:
            poison(batch.cache)
            counted(batch.cache)
    assert len(over) == 5 and [g.token_ids for g in mates] == [g.token_ids for g in alone]


def counted(cache):
    """Check that the host's counts are those of the device."""
    for b, (room, ahead) in enumerate(zip(cache.rooms, cache.ahead, strict=True)):
        own = slice(2 * b, 2 * b + 2)
        assert (cache.kv_cap - cache.kv_len)[:, own].unique().tolist() == [room] and room >= 0
        if cache.evicts and ahead < 1000:
            assert (cache.limit - cache.kv_len)[:, own].unique().tolist() == [ahead]


def prompted(checkpoint, spec="h2o:retention=0.2,extra_tokens=2", steps=4):
    """A cache that evicts, after some steps."""
    generation = Generation(checkpoint, "what?", pictures(1), Sampling(9), prune=make_method(spec))
    language = checkpoint.model.language_model
    with torch.inference_mode():
        generation.prefill()
        for i in range(steps):
            plain_step(language, generation.cache)(torch.tensor([i + 5]))
    return language, generation.cache


STEPS = {
    "step": lambda language, cache: language.step(torch.tensor([7]), cache),
    "fast step": lambda language, cache: FastStep(language, cache)(torch.tensor([7])),
    "turn": lambda language, cache: language.extend(torch.ones(1, 5, 64), cache),
}


@pytest.mark.parametrize("block", [512, 2])
@pytest.mark.parametrize("name", STEPS)
@torch.inference_mode()
def test_a_step_that_finds_no_memory_changes_no_score_and_evicts_at_most_once(tiny, name, block, monkeypatch):
    monkeypatch.setattr("model.llama.BLOCK", block)
    language, before = prompted(tiny(2)[1])
    after, act, tried = copy.deepcopy(before), STEPS[name], 0
    wanted = [act(language, after), language.step(torch.tensor([3]), after)]
    for cache in failures(before, lambda cache: act(language, cache), 7):
        tried += 1
        assert cache.pos.equal(before.pos) and ((before.kv_len - cache.kv_len) >= 0).all()
        assert (before.kv_len - cache.kv_len).max() <= 1 and cache.fits()
        if tried % 4 == 0:
            got = [act(language, cache), language.step(torch.tensor([3]), cache)]
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert held(cache) == held(after) and cache.limit.equal(after.limit)
            assert scores(cache) == [pytest.approx(own, rel=1e-5) for own in scores(after)]
    assert tried > 8


def scores(cache):
    """Per layer and segment {position: score}."""
    found = []
    for layer, sums in enumerate(cache.score):
        tables = cache.kv_start[layer].tolist(), cache.kv_len[layer].tolist()
        for start, length in zip(*tables, strict=True):
            taken = slice(start, start + length)
            found.append(dict(zip(cache.token[layer][taken].tolist(), sums[taken].tolist(), strict=True)))
    return found


@torch.inference_mode()
def test_an_evicting_cache_is_no_rectangle(tiny):
    """So that --compile compiles the halves of a layer, between which scores are taken."""
    _, cache = prompted(tiny(2)[1])
    assert cache.kv_cap.unique().numel() == 1 and cache.rectangle(0) is None


# ---------------------------------------------------------------- conversations and reports


@torch.inference_mode()
def test_a_turn_adds_what_it_attends_to(tiny):
    """The scores of tokens that compete grow, together by less than the turn has rows."""
    language, cache = prompted(tiny(2)[1])
    before = scores(cache)
    language.extend(torch.randn(1, 5, 64), cache)
    for old, new in zip(before, scores(cache), strict=True):
        grown = [new[place] - own for place, own in old.items() if own < float("inf")]
        assert min(grown) > 0 and 0 < sum(grown) < 5 and len(new) == len(old) + 5
        assert list(new.values()).count(float("inf")) == len(new) - len(grown)


@pytest.mark.parametrize("spec", ["h2o:retention=0.5", "pick-grid:retention=0.5+h2o:retention=0.4"])
def test_a_later_turn_is_never_evicted_and_reports_what_is_left(tiny, spec):
    """With a second picture. Vision tokens of the first one and tokens of its answer go on competing."""
    _, checkpoint = tiny(2)
    first = Generation(checkpoint, "what?", pictures(1), Sampling(25), prune=make_method(spec), remember=True)
    "".join(first)
    kept, limit = first.kept, first.cache.limit.clone()
    second = Generation(
        checkpoint, "and <image> now?", pictures(1), Sampling(30), prune=first.prune, before=first, remember=True
    )
    "".join(second)
    cache, fed = second.cache, second.prefilled
    assert torch.equal(cache.limit, limit + fed) and torch.equal(cache.kv_len, cache.limit)
    start = second.prompt_tokens - second.moved - fed  # position of the first token of the turn
    assert all({*range(start, start + fed)} <= own for layer in held(cache) for own in layer)
    assert all(sum(p < start for p in own) < cache.limit.max() - fed for layer in held(cache) for own in layer)
    (a, b), (c, d) = second.spans
    assert d - c == 36 and second.masks[..., c:d].all() and not second.masks[..., a:b].all(2).any()
    assert second.kept == pytest.approx([36 + m.sum(1).double().mean().item() for m in second.masks[..., a:b]])
    assert all(36 < now < 36 + old for now, old in zip(second.kept, kept, strict=True))


@torch.inference_mode()
def test_an_answer_that_is_fed_is_evicted_like_one_that_is_decoded(tiny):
    """As --compare and the evaluation feed it."""
    language, cache = prompted(tiny(2)[1])
    steps, turn, x = cache, copy.deepcopy(cache), torch.randn(1, 6, 64)
    fed = copy.deepcopy(cache)
    states = torch.stack([language.decode(x[:, i], steps) for i in range(6)], 1)
    assert torch.equal(language.extend(x, fed, answer=True), states) and held(fed) == held(steps)
    language.extend(x, turn)
    assert torch.equal(turn.kv_len, steps.kv_len + 6)
    assert len(logits_along(Generation(tiny(2)[1], "what?", pictures(1), prune=make_method("h2o")), [5, 6, 7])) == 4


def test_guards_hold_while_decoding(tiny, watched):
    """`sink_keys` protects vision tokens of each head; without a picture nothing is evicted."""
    left = []
    for guards in (0, 12):
        spec = f"h2o:keep_tokens=4,newest=1,sink_keys={guards}"
        generation, seen = watched(tiny(2)[1], spec, 30)
        vision = {*range(*generation.spans[0])}
        left.append([len(own & vision) for layer in seen[-1][1] for own in layer])
    assert max(left[0]) <= 1 < max(left[1]) and sum(left[1]) > 3 * sum(left[0])
    text, _ = watched(tiny(2)[1], "h2o", 20, images=0)
    assert not text.cache.evicts and text.cache.kv_len.unique().tolist() == [text.prompt_tokens + 19]


class Oldest:
    """Give up what has the lowest score of its own: the earliest vision token."""

    def __init__(self, *, newest=0.0, extra_tokens=3):
        self.newest, self.extra_tokens = newest, extra_tokens

    def evict(self, view):
        return torch.arange(view.tokens, device=view.device).expand(view.kv_heads, -1).float() * 1000


def test_a_method_of_ones_own_evicts(tiny, watched):
    """Three tokens of the answer have slots of their own; then they go first, because they count for least."""
    generation, seen = watched(tiny(2)[1], Oldest, 12)
    start, stop = generation.spans[0]
    answer = {generation.prompt_tokens + i for i in range(11)}
    for i, (_, layers) in enumerate(seen, 1):
        assert all(len(own) == generation.prompt_tokens + min(i, 3) for layer in layers for own in layer)
    assert all({*range(start, stop)} <= own and len(own & answer) == 3 for layer in layers for own in layer)


@pytest.mark.parametrize(("spec", "words"), [
    ("h2o:newest=1.5", "newest is 1.5"), ("h2o:extra_tokens=0", "extra_tokens is 0"), ("h2o:newest=x", "newest"),
    ("h2o:retention=0", "retention"), (type("Bare", (), {"evict": lambda self, view: None}), "evict with newest None"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(spec, words):
    with pytest.raises(ValueError, match=words) as refused:
        make_method(spec)
    assert ";" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("returned", "words"), [
    (lambda view: torch.zeros(view.kv_heads, view.tokens, dtype=torch.float64), "float64"),
    (lambda view: torch.zeros(view.tokens), "returned torch.float32"),
    (lambda view: torch.full((view.kv_heads, view.tokens), float("nan")), "NaN"),
])  # fmt: skip
def test_scores_that_do_not_fit_are_refused(tiny, monkeypatch, returned, words):
    monkeypatch.setattr(Oldest, "evict", lambda self, view: returned(view))
    generation = Generation(tiny(2)[1], "what?", pictures(1), prune=make_method(Oldest))
    with pytest.raises(InputError, match=words):
        "".join(generation)


def test_scores_of_the_prompt_are_the_sums_of_its_rows(tiny, monkeypatch):
    """Blocks of rows whose number does not divide the prompt's."""
    sums = []
    for rows in (64, 7):
        monkeypatch.setattr("model.view.ROWS", rows)
        q, k = (
            torch.randn(1, 4, 23, 16, generator=torch_random(1)),
            torch.randn(1, 2, 23, 16, generator=torch_random(2)),
        )
        sums.append(View(0, 2, q, k, k, [(3, 9)]).sums)
    scores = q[0] @ k[0].repeat_interleave(2, 0).mT * 16**-0.5
    exact = scores.masked_fill(torch.ones(23, 23, dtype=torch.bool).triu(1), float("-inf")).softmax(-1).sum(1)
    for found in sums:
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
