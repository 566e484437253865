"""PyramidDrop and MustDrop: the same tokens in every layer and the same answer as transformers with the rules of
tests/narrow_oracles.py, and each mistake that is easy to make."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import refusal
from test_next import make_next
from test_parity import noise
from test_pick_methods import between

from model import Batch, Generation, Sampling, load
from model.pruning import make_method
from model.pruning.budget import at_depth
from model.pruning.mustdrop import MustDrop
from model.pruning.mustdrop1 import MustDrop1
from model.pruning.pyramiddrop import PyramidDrop
from model.view import Prefilled
from tests import narrow_oracles as oracle
from tests.given import given_view
from tests.onevision import make_onevision
from tests.paths import DEMO, DEMO_PICTURE
from tests.pick_oracles import Seen, mustdrop1, mustdrop1_keys
from tests.sizes import Sizes
from tests.test_cache import live_bytes

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

QUESTIONS = {  # name: (kind of checkpoint, question, sizes of the pictures)
    "one": ("llava", "what is left of <image> there?", [(90, 60)]),
    "three": ("llava", "what is <image> and <image> left of <image> there?", [(60, 90), (50, 50), (90, 30)]),
    "last": ("llava", "what is left of <image> in <image>", [(60, 90), (50, 50)]),  # a picture ends the prompt
    "next": ("next", "what is <image> left of <image> there?", [(330, 75), (160, 210)]),
    "onevision": ("onevision", "what is left of <image> there?", [(150, 190)]),  # 6 x 5 tiles, which shrink
    "frames": ("onevision", "what is <video> left of <image> there?", [(60, 90)]),
}


@pytest.fixture(scope="module")
def pair(make_hf_checkpoint, tmp_path_factory):
    """Function (kind) -> transformers' model and our checkpoint: 8 layers, 8 query heads over 2 KV heads."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            text = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
            text["max_position_embeddings"] = 2048
            vision = {"image_size": {"llava": 84, "next": 112, "onevision": 32}[kind], "num_hidden_layers": 4}
            make = {"next": make_next, "onevision": make_onevision}.get(kind)
            make = partial(make, make_hf_checkpoint) if make else make_hf_checkpoint
            made[kind] = make(folder, text, vision, seed=5), replace(load(folder, "fp32"), stop_ids=())
        return made[kind]

    return get


def ask(pair, question, spec, count=24, **options):
    kind, words, sizes = QUESTIONS[question]
    pictures = [noise(*size, seed=i) for i, size in enumerate(sizes)]
    options |= {"frames": [noise(50, 40, seed=9 + i) for i in range(3)]} if "<video>" in words else {}
    return Generation(pair(kind)[1], words, pictures, Sampling(count), template="raw", prune=spec, **options)


def spans_of(ids, image_id, counts):
    """Of pictures with these numbers of tokens in a prompt."""
    spans, end, counts = [], 0, iter(counts)
    for i in ids:
        size = next(counts) if i == image_id else 1
        spans += [(end, end + size)] if i == image_id else []
        end += size
    return spans


def says_the_same(hf, asked, tokens, rule):
    """Logits, 24 greedy ids and the number of tokens in each layer, as transformers -> tokens held by each layer."""
    checkpoint, never = asked.checkpoint, asked.checkpoint.never_ids
    image_id = checkpoint.config.image_token_index
    logits, ids, held = oracle.answer(hf, asked.ids, image_id, tokens, 24, never, rule)
    with torch.inference_mode():
        torch.testing.assert_close(asked.prefill(), logits, rtol=1e-4, atol=2e-4)
    "".join(asked)
    assert asked.token_ids == ids
    new = len(asked.token_ids) - 1
    assert [row.tolist() for row in asked.cache.kv_len] == [[len(layer) + new] * len(row) for layer, row in
                                                            zip(held, asked.cache.kv_len, strict=True)]  # fmt: skip
    return held


def shows(asked, held):
    """The masks for --show are those of the tokens that each layer holds."""
    for mask, layer in zip(asked.masks, held, strict=True):
        assert all(set(head.nonzero()[:, 0].tolist()) == layer for head in mask)


# ---------------------------------------------------------------- against transformers

PYRAMIDS = {  # SPEC: {first layer: fraction} in 8 layers
    "pyramiddrop": {2: 0.5, 4: 0.25, 6: 0.125},
    "pyramiddrop:retention=0.68359375": {2: 0.75, 4: 0.75**2, 6: 0.75**3},
    "pyramiddrop:stages=[1,7],ratios=[0.9,0.06]": {1: 0.9, 7: 0.06},
    "pyramiddrop:scope=vision": {2: 0.5, 4: 0.25, 6: 0.125},
}


@pytest.mark.parametrize("spec", PYRAMIDS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_pyramiddrop_hides_what_the_last_row_attends_to_least(pair, question, spec):
    hf, _ = pair(QUESTIONS[question][0])
    asked = ask(pair, question, spec, remember=True)
    with torch.inference_mode():
        tokens = [t.clone() for t in asked.encode_images()]
        spans = spans_of(asked.ids, asked.checkpoint.config.image_token_index, map(len, tokens))
        rule = oracle.PyramidDrop(spans, PYRAMIDS[spec], together="vision" in spec)
        held = says_the_same(hf, asked, tokens, rule)
    shows(asked, held)
    text = asked.prompt_tokens - asked.vision_tokens
    assert asked.kept == [len(layer) - text for layer in held] and asked.kept[-1] < asked.kept[0]
    assert asked.retention == pytest.approx(sum(asked.kept) / 8 / asked.vision_tokens)
    with torch.inference_mode():
        off = asked.prefill() - ask(pair, question, None).prefill()
    assert off.abs().max() > 1e-2  # otherwise hiding would have no effect


def merged_pictures(hf, asked, **merging):
    """A Seen of each picture with windows merged, and the tokens that the stage `protect` keeps, by index."""
    join = lambda patches: mustdrop1(patches, **merging)  # noqa: E731
    seen = [Seen.of_picture(hf, picture, join) for picture in asked.pictures]
    return seen, [mustdrop1_keys(one) if one.cls else [] for one in seen]


DROPS = {  # SPEC: what differs in the rule
    "mustdrop": {},
    "mustdrop:global_threshold=0.002,individual_threshold=0.004": {"share": 0.002, "peak": 0.004},
    "mustdrop:global_threshold=0.0015,individual_threshold=1": {"share": 0.0015, "peak": 1.0},
}


@pytest.mark.parametrize("spec", DROPS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_mustdrop_merges_hides_what_text_ignores_and_forgets_it_in_earlier_layers(pair, question, spec):
    hf, checkpoint = pair(QUESTIONS[question][0])
    plain = ask(pair, question, None)
    with torch.inference_mode():
        merging = {"threshold": between([Seen.of_picture(hf, p) for p in plain.pictures], 2), "block": 2}
        keys = {"key_share": 0} if QUESTIONS[question][0] == "onevision" else {}  # without CLS
        asked = ask(pair, question, make_method(spec, settings=merging | keys), remember=True)
        seen, keys = merged_pictures(hf, asked, **merging)
        tokens, counts = [one.tokens(None) for one in seen], [image["tokens"] for image in asked.images]
        spans = spans_of(asked.ids, checkpoint.config.image_token_index, map(len, tokens))
        keys = [start + i for (start, _), own in zip(spans, keys, strict=True) for i in own]
        rule = oracle.MustDrop(spans, counts, keys, [1, 2, 3, 4], **DROPS[spec])  # 2, 6, 10, 14 of 32
        held = says_the_same(hf, asked, tokens, rule)
    assert len(held[0]) == asked.prefilled < asked.prompt_tokens  # windows were merged
    assert all(layer == held[-1] for layer in held[1:]) and set(keys) <= held[-1] <= held[0]
    steps = [len(layer) for layer in rule.prefilled.values()]
    assert steps == sorted(steps, reverse=True)
    assert len({*steps}) >= 3 or "individual_threshold=1" not in spec  # dropped in more than one step
    text = asked.prompt_tokens - asked.vision_tokens
    assert asked.kept == [len(layer) - text for layer in held]
    # a merged token stands for one token of the prompt, so that the masks count as many
    assert [mask.sum(1).tolist() for mask in asked.masks] == [[len(layer)] * 2 for layer in held]


@pytest.mark.parametrize("spec", ["pyramiddrop", "mustdrop"])
def test_the_demo_gives_the_answer_of_transformers(demo, spec):
    """The trained model: its attention has structure. 6 layers."""
    hf = transformers.LlavaForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()
    asked = Generation(
        replace(demo, stop_ids=()), "Describe the picture.", DEMO_PICTURE, Sampling(24), prune=spec, remember=True
    )
    with torch.inference_mode():
        if spec == "pyramiddrop":
            tokens = [t.clone() for t in asked.encode_images()]
            ((start, stop),) = spans_of(asked.ids, demo.config.image_token_index, [256])
            held = says_the_same(hf, asked, tokens, oracle.PyramidDrop([(start, stop)], {2: 0.5, 3: 0.25, 5: 0.125}))
            shows(asked, held)
        else:
            (seen,), (keys,) = merged_pictures(hf, asked)
            ((start, stop),) = spans_of(asked.ids, demo.config.image_token_index, [seen.count])
            rule = oracle.MustDrop([(start, stop)], [256], [start + i for i in keys], [1, 2, 3])
            held = says_the_same(hf, asked, [seen.tokens(None)], rule)
    assert len(held[-1]) < len(held[0]) - 10


NOTHING = [
    "pyramiddrop:stages=[]", "pyramiddrop:ratios=[1,1,1]", "pyramiddrop:retention=1",
    "mustdrop:threshold=1,individual_threshold=0", "mustdrop:threshold=1,global_threshold=0",
]  # fmt: skip


@pytest.mark.parametrize("spec", NOTHING)
@pytest.mark.parametrize("question", ["last", "next"])
@torch.inference_mode()
def test_dropping_nothing_is_no_pruning_bit_for_bit(pair, question, spec):
    plain, asked = ask(pair, question, None, 6), ask(pair, question, spec, 6, remember=True)
    assert asked.prefill().equal(plain.prefill()) and asked.masks.all() and asked.retention == 1.0
    assert "".join(asked) == "".join(plain) and asked.token_ids == plain.token_ids
    assert asked.cache.nbytes_reserved == plain.cache.nbytes_reserved


@torch.inference_mode()
def test_key_tokens_are_kept_whatever_the_thresholds(pair):
    spec = "mustdrop:threshold=1,global_threshold=1,individual_threshold=1,key_share="
    plain, every, some = (
        ask(pair, "three", spec and f"{spec}{share}") for spec, share in ((None, 0), (spec, 1), (spec, 0.25))
    )
    assert every.prefill().equal(plain.prefill()) and every.retention == 1.0
    assert some.prefill() is not None and some.kept == [108.0, *[27.0] * 7]


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("depth", "stages", "steps"),
    [
        (32, [8, 16, 24], [2, 6, 10, 14]), (40, [10, 20, 30], [3, 8, 13, 18]), (6, [2, 3, 5], [1, 1, 2, 3]),
        (4, [1, 2, 3], [1, 1, 1, 2]), (8, [2, 4, 6], [1, 2, 3, 4]), (2, [1, 1, 1], [1, 1, 1, 1]),
    ],
)  # fmt: skip
def test_layers_of_32_are_scaled_to_the_depth(depth, stages, steps):
    """In proportion, half rounded up; the first layer always sees and keeps all."""
    assert [at_depth(layer, depth) for layer in (8, 16, 24)] == stages
    assert [at_depth(layer, depth) for layer in (2, 6, 10, 14)] == steps
    assert PyramidDrop().schedule(depth) == dict(zip(stages, (0.5, 0.25, 0.125), strict=True))


def mean(schedule, depth):
    """Of the fractions kept by all layers."""
    return sum(schedule[max(first for first in (0, *schedule) if first <= layer)] for layer in range(depth)) / depth


@pytest.mark.parametrize("depth", [4, 6, 8, 30, 32])
@pytest.mark.parametrize("stages", [None, [1], [1, 3]])
def test_a_retention_is_the_mean_over_the_layers(depth, stages):
    """Each stage keeps the same part of what the one before it kept."""
    first = min(PyramidDrop(stages=stages).schedule(depth))
    for retention in (first / depth + 0.01, 0.5, 0.9, 0.46875, 1.0):
        schedule = PyramidDrop(retention=retention, stages=stages).schedule(depth)
        assert mean({0: 1.0} | schedule, depth) == pytest.approx(retention)
        ratios = [1.0, *schedule.values()]
        parts = [after / before for before, after in pairwise(ratios)]
        assert parts == pytest.approx([parts[0]] * len(parts)) and 0 < parts[0] <= 1
    if stages is None and depth in (4, 8, 32):
        assert PyramidDrop(retention=0.46875).schedule(depth) == pytest.approx(PyramidDrop().schedule(depth))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "pyramiddrop:retention=0.25",
            "retention is 0.25, but the first 2 of 8 layers keep everything; give more than 0.25, or earlier stages",
        ),
        ("pyramiddrop:retention=0.5,stages=[5,6]", "first 5 of 8 layers keep everything; give more than 0.625"),
        ("pyramiddrop:retention=0.5,stages=[]", "first 8 of 8 layers keep everything"),
        ("pyramiddrop:stages=[1,8]", "stages has layer 8, the model has 8; give 1 to 7"),
    ],
)
def test_what_the_model_cannot_do_is_refused(pair, spec, words):
    assert words in refusal(ask, pair, "one", spec)


def test_the_kept_part_is_what_was_asked_for(pair):
    for retention in (0.3, 0.5, 0.8):
        asked = ask(pair, "three", make_method("pyramiddrop", retention), 2)
        assert "".join(asked) is not None and asked.retention == pytest.approx(retention, abs=0.01)
        assert asked.wanted == retention
    both = ask(pair, "one", make_method("pick-grid:retention=0.5+pyramiddrop", 0.3), 2)
    assert "".join(both) is not None and both.retention == pytest.approx(0.3, abs=0.01)
    assert both.kept[0] == 18 and [part["requested"] for part in both.parts] == [0.5, 0.6]


# ---------------------------------------------------------------- planted attention


def coming(spans, tokens, attention, **options):
    """A view of layer 1 of 8 in which the next layer's attention (Hq, T) is given; that of this layer is random."""
    view = given_view(spans, tokens, 4, 2, 8, **options)
    view.next_attention = lambda rows=1: attention
    return view


def left(keep, spans):
    return [keep[a:b].nonzero()[:, 0].tolist() for a, b in spans]


def test_pyramiddrop_ranks_by_the_mean_of_all_heads_in_the_next_layer():
    """Two pictures of 8 and 4 tokens; of equal tokens the first. A head alone would choose others."""
    spans, attention = [(2, 10), (11, 15)], torch.zeros(4, 17)
    attention[0, 2:10] = torch.tensor([9, 9, 0, 0, 0, 0, 0, 0.0])
    attention[1:, 2:10] = torch.tensor([0, 0, 4, 4, 4, 5, 4, 0.0])
    attention[:, 11:15] = torch.tensor([1, 1, 1, 1.0])
    keep = PyramidDrop().narrow(coming(spans, 17, attention))  # half of each
    assert left(keep, spans) == [[2, 3, 4, 5], [0, 1]] and keep[[0, 1, 10, 15, 16]].all()
    together = PyramidDrop(scope="vision").narrow(coming(spans, 17, attention))
    assert left(together, spans) == [[0, 2, 3, 4, 5, 6], []]
    for layer in (0, 2, 4, 6, 7):
        assert PyramidDrop().narrow(coming(spans, 17, attention, layer=layer)) is None


def test_pyramiddrop_counts_from_the_whole_picture():
    """A quarter of 8 and of 4 tokens, of which 4 and 2 are left."""
    spans = [(2, 6), (7, 9)]
    view = coming(spans, 11, torch.arange(44.0).view(4, 11), layer=3)
    view.whole_spans = [(2, 10), (11, 15)]
    assert left(PyramidDrop().narrow(view), spans) == [[2, 3], [1]]
    view.whole_spans = [(2, 6), (7, 9)]
    assert left(PyramidDrop().narrow(view), spans) == [[3], [1]]  # of a shorter prompt


def rowed(spans, tokens, attention, counts=None, layer=1, **options):
    """A view of a layer of 8 in which the rows after the pictures have this attention (R, T)."""
    view, asked = given_view(spans, tokens, 4, 2, 8, layer, **options), []

    def row_attention(rows):
        asked.append(rows.tolist())
        return attention

    view.row_attention, view.asked = row_attention, asked
    view.counts = counts or [576] * len(spans)
    return view


def test_mustdrop_drops_what_is_weak_in_sum_and_in_every_row():
    """Both thresholds are in units of 576 tokens; a token that reaches one of them stays."""
    spans, rule = [(1, 5)], MustDrop(global_threshold=0.25, individual_threshold=0.5)
    rows = torch.tensor([[9, 0.5, 0.25, 0.125, 0, 9, 9.0], [9, 0.25, 0.25, 0.25, 0.375, 9, 9]])
    view = rowed(spans, 7, rows)  # sums 0.75, 0.5, 0.375, 0.375 of 2: the threshold is 0.5
    assert left(rule.narrow(view), spans) == [[0, 1]] and view.asked == [[5, 6]]
    assert left(rule.narrow(rowed(spans, 7, rows, [1152])), spans) == [[0, 1, 2, 3]]
    assert left(rule.narrow(rowed(spans, 7, rows, [288])), spans) == [[]]
    one_row = torch.tensor([[0, 0, 0, 0.5, 0, 0, 0], [0, 5, 5, 0, 0.25, 0, 0]])  # the third is weak in sum only
    assert left(rule.narrow(rowed(spans, 7, one_row)), spans) == [[0, 1, 2]]
    assert [rule.narrow(rowed(spans, 7, rows, layer=layer)) is None for layer in range(8)] == [
        layer not in (1, 2, 3, 4) for layer in range(8)
    ]


def test_mustdrop_compares_with_the_tokens_own_picture():
    """The first picture gets a hundredth of the attention; the rows are those after the last."""
    spans, rule = [(1, 3), (4, 6)], MustDrop(global_threshold=0.4, individual_threshold=1.0)
    rows = torch.tensor([[0, 0.003, 0.007, 0, 0.3, 0.7, 0, 0]])
    view = rowed(spans, 8, rows)
    assert left(rule.narrow(view), spans) == [[1], [1]] and view.asked == [[6, 7]]
    assert left(rule.narrow(rowed(spans, 8, rows, [1152, 576])), spans) == [[0, 1], [1]]
    ends = rowed([(1, 3), (4, 8)], 8, torch.rand(1, 8))
    rule.narrow(ends)
    assert ends.asked == [[7]]  # a picture ends the prompt


def test_higher_thresholds_keep_fewer_in_one_step():
    spans, rows = [(3, 103)], torch.rand(5, 108, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for name in ("global_threshold", "individual_threshold"):
        other = {"global_threshold": 0.0099, "individual_threshold": 0.0125}
        kept = [MustDrop(**other | {name: t}).narrow(rowed(spans, 108, rows)) for t in (0.0, 0.008, 0.01, 0.012, 1.0)]
        assert all((more | fewer).equal(more) for more, fewer in pairwise(kept))
        assert kept[0].all() and not kept[-1].all() and len({int(keep.sum()) for keep in kept}) >= 3


def test_mustdrop_never_drops_the_key_tokens():
    everything = make_method("mustdrop:global_threshold=1,individual_threshold=1")
    view = rowed([(1, 9)], 12, torch.zeros(3, 12) + 0.01, [8])
    view.protected = torch.zeros(12, dtype=torch.bool)
    view.protected[[2, 5]] = True
    assert left(everything.narrow(view), [(1, 9)]) == [[1, 4]]


def test_nan_is_refused():
    attention = torch.full((4, 9), float("nan"))
    with pytest.raises(ValueError, match="the scores of layer 1 hold NaN"):
        MustDrop().narrow(rowed([(1, 5)], 9, attention))
    with pytest.raises(ValueError, match="the scores of layer 1 hold NaN"):
        PyramidDrop().narrow(coming([(1, 5)], 9, attention))


def test_the_layers_of_the_steps_forget_what_the_last_step_dropped():
    """8 layers, steps after layers 1 to 4. Layer 0 keeps everything; deeper layers never had it."""
    kept = [torch.ones(2, 6, dtype=torch.bool) for _ in range(8)]
    for layer, gone in ((2, 1), (3, 2), (4, 3), (5, 4)):
        for later in kept[layer:]:
            later[:, gone] = False
    found = MustDrop().compact(Prefilled([(1, 5)], kept, None, []))
    left = [True, False, False, False, False, True]
    assert [keep if keep is None else keep.tolist() for keep in found] == [None, *[left] * 4, None, None, None]


def test_the_first_stage_is_that_of_mustdrop1():
    patches = torch.rand(1, 6, 6, 4, generator=torch.Generator().manual_seed(0))
    whole = MustDrop(threshold=0.7, block=2, key_share=0.3)
    first = MustDrop1(threshold=0.7, block=2, key_share=0.3)
    assert whole.merge(patches).equal(first.merge(patches)) and whole.merge(patches).shape[1] < 36
    assert whole.merge_after == 0 and whole.layers(24) == (23,)


# ---------------------------------------------------------------- memory, batches, turns


@pytest.mark.parametrize("spec", ["pyramiddrop", "mustdrop:threshold=1", "mustdrop"])
def test_after_the_prefill_nothing_lives_but_what_the_layers_hold(demo, spec):
    """6 layers of 4 KV heads with 32 channels; 256 tokens of a picture."""
    asked = Generation(demo, "Describe the picture.", [DEMO_PICTURE], Sampling(64), prune=spec)
    _, before = live_bytes()
    next(iter(asked))
    after, _ = live_bytes(apart=before)
    cache, row = asked.cache, 2 * 32 * 4
    assert abs(after - cache.nbytes_reserved) < 0.01 * cache.nbytes_reserved
    tokens = [kept + asked.prompt_tokens - 256 for kept in asked.kept]
    assert asked.bytes_held == sum(tokens) * 4 * row
    assert cache.nbytes_reserved == asked.bytes_held + 6 * 4 * 64 * row
    first, *others = asked.kept
    if spec == "pyramiddrop":
        assert asked.kept == [256, 256, 128, 64, 64, 32]
    else:
        assert others == [others[0]] * 5 and others[0] < first == 256 - asked.absent
    assert asked.retention == pytest.approx(sum(asked.kept) / 6 / 256)


@pytest.mark.parametrize("spec", ["pyramiddrop", "mustdrop"])
@torch.inference_mode()
def test_no_prefill_holds_a_whole_matrix_of_attention(demo, spec):
    """5 pictures: 1,280 tokens, or fewer after merging."""
    asked = Generation(demo, "What is " + "<image>" * 5, [DEMO_PICTURE] * 5, Sampling(1), prune=spec)
    with Sizes() as sizes:
        asked.prefill()
    assert asked.prefilled > 900 and sizes.largest < asked.prefilled**2, sizes.where


@pytest.mark.parametrize("spec", ["pyramiddrop", "mustdrop"])
def test_a_batch_says_what_each_would_say_alone(demo, spec):
    asked = [
        Generation(demo, words, [DEMO_PICTURE] * count, Sampling(limit), prune=spec)
        for words, count, limit in (
            ("Describe the picture.", 1, 20), ("What is the difference between <image> and <image>?", 2, 9),
            ("What colour is a circle?", 0, 5), ("How many objects are there?", 1, 12),
        )
    ]  # fmt: skip
    alone = [(one.again(one.prune), one) for one in asked]
    batch = Batch()
    for one in asked:
        batch.add(one)
    while batch:
        batch.advance()
    for twin, one in alone:
        "".join(twin)
        assert (one.token_ids, one.kept, one.bytes_held) == (twin.token_ids, twin.kept, twin.bytes_held)


@pytest.mark.parametrize("spec", ["pyramiddrop", "mustdrop:threshold=1"])
def test_a_second_turn_reads_what_was_left_and_keeps_its_own(demo, spec):
    """What `drop` leaves for a turn is tested in tests/test_cache.py."""
    first = Generation(demo, "Describe the picture.", [DEMO_PICTURE], Sampling(6), prune=spec, remember=True)
    "".join(first)
    before = first.kept
    second = Generation(demo, "How many objects are there?", sampling=Sampling(6), before=first, prune=spec)
    second.remember = True
    "".join(second)
    assert second.kept == before and second.prefilled < 40 and second.masks.shape[2] == second.prompt_tokens
    text = second.prompt_tokens - 256
    assert second.masks.sum(2).tolist() == [[kept + text] * 4 for kept in before]
    assert second.cache.kv_len.tolist() == [[kept + text + len(second.token_ids) - 1] * 4 for kept in before]
