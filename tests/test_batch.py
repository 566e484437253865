"""Batches of questions: each answer equals the one it gets alone, and a finished sequence costs nothing."""

import copy
import dataclasses
import weakref

import pytest
import torch
from conftest import IMAGE_ID
from PIL import Image
from test_parity import noise

from model import Batch, Generation, InputError, Sampling, load
from model.batch import answer_each, join, keep_sequences
from model.cache import RaggedCache
from model.fast import FastStep
from model.pruning import make_method
from model.sampling import Chooser
from tests.paths import DEMO_PICTURE as PICTURE


def tilted():
    """A picture other than the demo's."""
    return Image.open(PICTURE).convert("RGB").rotate(90)


def mixed(checkpoint, **options):
    """Eight questions: prompts of different lengths, none, one and two pictures, limits from 1 to 40 tokens."""
    asked = [
        ("Describe the picture.", [PICTURE], 40),
        ("How many objects are there?", [PICTURE], 40),
        ("Describe the picture.", [tilted()], 40),
        ("What is the difference between <image> and <image>?", [PICTURE, tilted()], 24),
        ("What colour is a circle?", [], 12),
        ("Spell the word on the sign.", [PICTURE], 7),
        ("Is there a red circle?", [tilted()], 1),
        ("List the objects from left to right. " * 4, [PICTURE], 30),
    ]
    return [Generation(checkpoint, p, i, Sampling(max_new_tokens=n), **options) for p, i, n in asked]


def together(generations, size=None):
    """Answer them with at most `size` at a time; the next one takes the slot of a finished one."""
    batch, waiting, over = Batch(), list(generations), []
    while waiting or batch:
        while waiting and len(batch) < (size or len(generations)):
            batch.add(waiting.pop(0))
        over += batch.advance()
    assert sorted(map(id, over)) == sorted(map(id, generations))  # each is returned once
    return generations


AHEAD = "plphp-ada:query=lookahead,cover=0.5"
METHODS = [None, "plphp", "plphp-ada", AHEAD, "fastv", "sparsevlm:recycle=true"]


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("size", [8, 3])
def test_a_batch_says_what_each_would_say_alone(demo, spec, size):
    prune = make_method(spec, 0.5) if spec else None
    alone = mixed(demo, prune=prune)
    for generation in alone:
        "".join(generation)
    mates = together(mixed(demo, prune=prune), size)
    for name in ("token_ids", "text", "finish_reason", "bytes_held"):
        assert [getattr(g, name) for g in mates] == [getattr(g, name) for g in alone]
    assert {g.finish_reason for g in mates} == {"stop", "length"}


@pytest.mark.parametrize("spec", [None, "plphp", "plphp-ada", AHEAD])
def test_logits_of_a_batch_are_within_1e_4_of_those_alone(demo, monkeypatch, spec):
    """All logits of 12 steps for eight sequences, some of which finish on the way."""
    prune = make_method(spec, 0.3) if spec else None
    seen = {}

    class Spy(FastStep):
        def __call__(self, ids):
            logits = super().__call__(ids)
            for pos, row in zip(self.cache.pos.tolist(), logits, strict=True):
                seen.setdefault(pos, []).append(row)
            return logits

    def shortened():
        found = mixed(dataclasses.replace(demo, step=Spy), prune=prune)
        for generation in found:
            limit = min(generation.sampling.max_new_tokens, 12)
            generation.sampling = dataclasses.replace(generation.sampling, max_new_tokens=limit)
        return found

    for generation in shortened():
        "".join(generation)
    alone = {pos: torch.stack(rows) for pos, rows in seen.items()}
    seen.clear()
    together(shortened())
    assert seen.keys() == alone.keys() and len(seen) > 20
    for pos, rows in seen.items():  # positions may coincide: each row must match a different single run
        assert len(rows) == len(alone[pos])
        apart = (torch.stack(rows)[:, None] - alone[pos]).abs().amax(-1)
        assert apart.min(1).values.max() <= 1e-4, pos


def test_a_batch_needs_no_padding_and_gives_memory_back(demo):
    batch = Batch()
    for generation in mixed(demo)[:4]:
        batch.add(generation)
        assert generation.cache is None  # its memory now belongs to the batch
    lengths = batch.cache.kv_len[0].view(4, -1)[:, 0]
    assert torch.equal(lengths, batch.cache.pos) and len(set(lengths.tolist())) > 2
    row = 2 * 4 * 32 * 4 * 6  # K and V, heads, channels, bytes, layers
    assert batch.cache.nbytes_held == row * int(lengths.sum())
    before, products = batch.cache.nbytes_reserved, []
    batch.running[1].limit = 2
    (gone,) = batch.advance()
    assert gone.prompt_tokens and gone not in batch.running and batch.cache.nbytes_reserved < before
    assert batch.cache.nbytes_held == row * int(batch.cache.pos.sum())
    last = demo.model.language_model.model.norm
    hook = last.register_forward_hook(lambda _, given, made: products.append(len(made)))
    batch.advance()
    hook.remove()
    assert products == [3]  # the finished one takes part in no product


def test_who_is_over_with_the_first_token_never_joins(demo):
    batch = Batch()
    batch.add(Generation(demo, "Is there a red circle?", [PICTURE], Sampling(max_new_tokens=1)))
    assert not batch.running and len(batch.advance()) == 1 and batch.advance() == []


def test_sampling_in_a_batch_is_that_of_each_alone(demo):
    def asked():
        samplings = [Sampling(12, 8.0, seed=1), Sampling(9, 0.0), Sampling(12, 8.0, top_k=50, seed=2)]
        return [Generation(demo, "Describe the picture.", [PICTURE], s) for s in samplings]

    alone = asked()
    for generation in alone:
        "".join(generation)
    assert [g.token_ids for g in together(asked())] == [g.token_ids for g in alone]
    assert len({tuple(g.token_ids[:9]) for g in alone}) == 3


def test_a_batch_is_of_one_checkpoint_and_backend_and_stays_as_it_was(demo, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    batch, (good, bad) = Batch(), mixed(demo)[:2]
    batch.add(good)
    for wrong, words in (
        (mixed(dataclasses.replace(demo))[0], "one checkpoint"),
        (Generation(demo, "What?", backend="triton"), "one backend"),
        (Generation(demo, "What?", kv_dtype="int8"), "one kv_dtype"),
        *((wrong, "takes one Generation at a time") for wrong in ("What?", None, ["What?"])),
        (good, "already in the batch"),
    ):
        with pytest.raises(ValueError, match=words):
            batch.add(wrong)
    monkeypatch.setattr(bad, "prefill", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.add(bad)
    assert len(batch) == 1
    while batch.running:
        batch.advance()
    assert good.text == "".join(mixed(demo)[0])


def test_one_step_is_made_for_all_that_join_before_it(demo):
    made = []
    checkpoint = dataclasses.replace(demo, step=lambda *given: made.append(given) or FastStep(*given))
    batch, generations = Batch(), mixed(checkpoint)[:4]
    for count, generation in enumerate(generations):
        batch.add(generation)
        if count >= 2:
            batch.advance(), batch.advance()
    assert len(made) == 2


def test_a_step_whose_tokens_could_not_be_chosen_is_repeated(demo, failing):
    alone, mates, batch = mixed(demo)[:2], mixed(demo)[:2], Batch()
    for generation, mate in zip(alone, mates, strict=True):
        "".join(generation), batch.add(mate)
    failing(Batch, "_next", MemoryError(), at=2)
    batch.advance()
    positions = batch.cache.pos.tolist()
    with pytest.raises(MemoryError):
        batch.advance()
    assert batch.cache.pos.tolist() == positions and batch.cache.kv_len.amax(1).tolist() == 6 * [max(positions)]
    while batch:
        batch.advance()
    assert [g.token_ids for g in mates] == [g.token_ids for g in alone] and len(alone[0].token_ids) > 3


def test_broken_logits_of_one_are_noticed(demo):
    chooser = Chooser(Sampling(), [3], torch.device("cpu"))
    logits = torch.randn(3, 50)
    logits[1, 7], logits[2, 3] = float("nan"), 1e9
    ids, _ = chooser.greedy(logits)
    assert ids[1] == -1 and ids[0] >= 0 and ids[2] not in (-1, 3)
    with pytest.raises(RuntimeError, match="NaN"):
        mixed(demo)[0].take(-1)


def filled(lengths, backend, slack=3, d=4):
    """Caches of sequences of these lengths, 2 layers and heads; each row holds its sequence's number."""
    caches = []
    for b, n in enumerate(lengths):
        cache = RaggedCache(2, slack, backend)
        for layer in range(2):
            k = 100.0 * b + 10 * layer + torch.arange(n)[:, None].expand(1, 2, n, d).clone()
            cache.pack(layer, k, -k, torch.rand(2, n) < 0.7)
        caches.append(cache)
    return caches


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_sequence_is_computed_as_if_alone(backend):
    """In Triton, to the bit: arenas that move for one sequence leave the splits of the others as they were."""
    alone = filled([700, 40, 300, 20], backend, slack=3, d=16)
    together = copy.deepcopy(alone)
    cache, live = join(together[:2]), [0, 1]
    for step in range(7):  # 0 and 1 are full in step 3, 2 in step 4, 3 in step 5
        if step in (1, 2):
            cache, live = join([cache, together[len(live)]]), [*live, len(live)]
        if step == 6:
            live = [0, 1, 3]
            keep_sequences(cache, live)
            cache.repack(cache.rooms)
        q, (k, v) = torch.randn(4, 4, 16), torch.randn(2, 4, 2, 16)
        cache.grow()
        got = [cache.append_attend(layer, q[live], k[live], v[live]) for layer in range(2)]
        for row, b in enumerate(live):
            alone[b].grow()
            assert torch.equal(cache.kv_cap[:, 2 * row : 2 * row + 2], alone[b].kv_cap), f"step {step}, sequence {b}"
            for layer in range(2):
                wanted = alone[b].append_attend(layer, *(t[b : b + 1] for t in (q, k, v)))
                assert torch.equal(got[layer][row], wanted[0]), f"step {step}, sequence {b}, layer {layer}"


@pytest.mark.parametrize("stay", [[0], [2], [0, 2], [1, 2], [0, 1, 2]])
def test_keep_moves_the_rows_of_those_who_stay(backend, stay):
    caches = filled([5, 9, 7], backend)
    rows = [
        [cache.k[i][s : s + n].clone() for s, n in zip(cache.kv_start[i], cache.kv_len[i], strict=True)]
        for cache in caches
        for i in range(2)
    ]
    joined = join(caches)
    joined.grow()  # a step whose slots the test fills itself
    for i in range(2):
        joined.append(i, torch.full((3, 2, 4), 7.0), torch.full((3, 2, 4), -7.0))
    version, pos = joined.version, joined.pos.clone()
    keep_sequences(joined, stay)
    joined.repack(joined.rooms)
    assert joined.version > version and torch.equal(joined.pos, pos[stay])
    for i in range(2):
        got = [joined.k[i][s : s + n] for s, n in zip(joined.kv_start[i], joined.kv_len[i], strict=True)]
        want = [torch.cat((head, torch.full((1, 4), 7.0))) for b in stay for head in rows[2 * b + i]]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert len(joined.k[i]) == sum(map(len, want)) + joined.room * 2 * len(stay)
    for _ in range(5):  # enough for a repack
        joined.grow()
        for i in range(2):
            k, v = torch.randn(2, len(stay), 2, 4)
            assert joined.append_attend(i, torch.randn(len(stay), 4, 4), k, v).isfinite().all()


def test_many_questions_of_a_small_model_come_through_a_small_batch(make_checkpoint, tmp_path, backend):
    make_checkpoint(tmp_path, text={"num_hidden_layers": 3})
    checkpoint = load(tmp_path, "fp32", torch.get_default_device())
    checkpoint = dataclasses.replace(checkpoint, stop_ids=(11, 40, 77, 130, 201, 300, 350, 400))
    prune = make_method("plphp-ada:skip=1", 0.5)

    def asked():
        return [
            Generation(
                checkpoint, "what is there? " * (1 + i % 4), [noise(20 + i, 30, seed=i)] * (i % 3),
                Sampling(max_new_tokens=1 + 3 * i % 17), template="raw", prune=prune, backend=backend,
            )
            for i in range(25 if backend == "torch" else 5)
        ]  # fmt: skip

    alone = asked()
    for generation in alone:
        "".join(generation)
    assert [g.token_ids for g in together(asked(), 4)] == [g.token_ids for g in alone]
    assert IMAGE_ID not in {i for g in alone for i in g.token_ids}


@pytest.mark.parametrize("error", [InputError, torch.OutOfMemoryError])
def test_a_failed_question_holds_no_memory_while_others_are_answered(demo, error):
    seen = []

    def begin(held):
        if seen:
            assert seen[0]() is None
            return Generation(demo, "Describe the picture.", [PICTURE], Sampling(max_new_tokens=2))
        tensor = torch.empty(held)
        seen.append(weakref.ref(tensor))
        raise error("out of memory")

    answers = []
    for _, answer in answer_each(begin, [7, 7], 1, crowded=print):
        answers.append(answer)
    assert isinstance(answers[0], error) and len(answers[1].token_ids) == 2


def test_a_question_is_taken_only_when_there_is_room(demo):
    taken = []

    def asked():
        for number in range(5):
            taken.append(number)
            yield number

    def begin(number):
        return Generation(demo, "Describe the picture.", sampling=Sampling(max_new_tokens=1 + number))

    ended = []
    for number, _ in answer_each(begin, asked(), 2):
        ended.append(number)
        assert len(taken) <= len(ended) + 1
    assert sorted(ended) == taken == [0, 1, 2, 3, 4]
