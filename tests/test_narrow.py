"""PyramidDrop and MustDrop: the same tokens in every layer and the same answer as transformers with the rules of
tests/narrow_oracles.py, and each mistake that is easy to make."""

from dataclasses import replace

import pytest
import torch
from test_next import make_next
from test_parity import noise

from model import Generation, Sampling, load
from tests import narrow_oracles as oracle
from tests.paths import DEMO, DEMO_PICTURE
from tests.pick_oracles import Seen, mustdrop1, mustdrop1_keys

transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")

QUESTIONS = {  # name: (kind of checkpoint, question, sizes of the pictures)
    "one": ("llava", "what is left of <image> there?", [(90, 60)]),
    "three": ("llava", "what is <image> and <image> left of <image> there?", [(60, 90), (50, 50), (90, 30)]),
    "last": ("llava", "what is left of <image> in <image>", [(60, 90), (50, 50)]),  # a picture ends the prompt
    "next": ("next", "what is <image> left of <image> there?", [(330, 75), (160, 210)]),
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
            vision = {"image_size": 84 if kind == "llava" else 112, "num_hidden_layers": 4}
            make = make_hf_checkpoint if kind == "llava" else lambda *a, **b: make_next(make_hf_checkpoint, *a, **b)
            made[kind] = make(folder, text, vision, seed=5), replace(load(folder, "fp32"), stop_ids=())
        return made[kind]

    return get


def ask(pair, question, spec, count=24, **options):
    kind, words, sizes = QUESTIONS[question]
    pictures = [noise(*size, seed=i) for i, size in enumerate(sizes)]
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
    plain = ask(pair, question, None)
    assert "".join(plain) is not None and plain.token_ids != asked.token_ids  # otherwise hiding would have no effect


def merged_pictures(hf, asked, **merging):
    """A Seen of each picture with windows merged, and the tokens that the stage `protect` keeps, by index."""
    join = lambda patches: mustdrop1(patches, **merging)  # noqa: E731
    seen = [Seen(hf, picture.pixels, picture.size, join) for picture in asked.pictures]
    return seen, [mustdrop1_keys(one) for one in seen]


DROPS = {  # SPEC: what differs in the rule
    "mustdrop:threshold=0.3,block=2": {},
    "mustdrop:threshold=0.3,block=2,global_threshold=0.002,individual_threshold=0.004": {"share": 0.002, "peak": 0.004},
    "mustdrop:threshold=0.3,block=2,global_threshold=0.0015,individual_threshold=1": {"share": 0.0015, "peak": 1.0},
}


@pytest.mark.parametrize("spec", DROPS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_mustdrop_merges_hides_what_text_ignores_and_forgets_it_in_earlier_layers(pair, question, spec):
    hf, checkpoint = pair(QUESTIONS[question][0])
    asked = ask(pair, question, spec, remember=True)
    with torch.inference_mode():
        seen, keys = merged_pictures(hf, asked, threshold=0.3, block=2)
        tokens, counts = [one.tokens(None) for one in seen], [image["tokens"] for image in asked.images]
        spans = spans_of(asked.ids, checkpoint.config.image_token_index, map(len, tokens))
        keys = [start + i for (start, _), own in zip(spans, keys, strict=True) for i in own]
        rule = oracle.MustDrop(spans, counts, keys, [1, 2, 3, 4], **DROPS[spec])  # 2, 6, 10, 14 of 32
        held = says_the_same(hf, asked, tokens, rule)
    assert len(held[0]) == asked.prefilled < asked.prompt_tokens  # windows were merged
    assert all(layer == held[-1] for layer in held[1:]) and set(keys) <= held[-1] < held[0]
    steps = [len(layer) for layer in rule.prefilled.values()]
    assert steps == sorted(steps, reverse=True) and len({*steps}) >= 3  # dropped in more than one step
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
