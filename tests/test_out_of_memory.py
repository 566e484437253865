"""Out of memory: every allocation of every cache operation fails in turn, and the cache stays consistent.

Consistent: tables, plans and arenas agree, occupied rows are unchanged, and the same call later does what it would have
done. An allocation is any operation whose result needs new memory; in-place operations and views need none.
"""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import Generation, Sampling, llama, load
from model.batch import Batch, join, keep_sequences
from model.cache import RaggedCache
from model.fast import FastStep
from model.generate import plain_step
from tests.oracle import small_llama
from tests.paths import DEMO, DEMO_PICTURE
from tests.seeds import torch_random

LAYERS = 3  # of small_llama
pytestmark = pytest.mark.usefixtures("frequent_repacks")


class MemoryFor(TorchDispatchMode):
    """Allows n more tensors; the next allocation fails."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        returns = operation._schema.returns
        if any(r.alias_info is None and "Tensor" in str(r.type) for r in returns):
            if self.left == 0:
                raise torch.OutOfMemoryError("no memory left in this test")
            self.left -= 1
        return operation(*args, **(kwargs or {}))


def failures(before, act, every=1, shared=()):
    """Copies of `before` for which act(copy) ran out of memory at its first, second, ... (or every third) allocation.
    shared: what is not copied."""
    for n in range(0, 100_000, every):
        thing = copy.deepcopy(before, {id(part): part for part in shared})
        try:
            with MemoryFor(n):
                act(thing)
        except torch.OutOfMemoryError:
            yield thing
        else:
            assert n > 0
            return


def rows_of(cache):
    """The occupied rows of each segment of each layer, K beside V."""
    return [
        torch.cat((cache.k[i][a : a + n], cache.v[i][a : a + n]), 1)
        for i in range(len(cache.k))
        for a, n in zip(cache.kv_start[i].tolist(), cache.kv_len[i].tolist(), strict=True)
    ]


def check_whole(cache):
    """Check that all parts of a cache agree."""
    for i in range(len(cache.k)):
        start, length, cap, plan = cache.kv_start[i], cache.kv_len[i], cache.kv_cap[i], cache.plan(i)
        assert torch.equal(plan.kv_start, start) and torch.equal(plan.kv_cap, cap)
        assert plan.caps == cap.tolist() and plan.starts == start.tolist()
        assert 0 <= cache.room <= (cap - length).min()
        order = start.argsort()
        ends = (start + cap)[order]
        assert (ends[:-1] <= start[order][1:]).all() and ends[-1] <= len(cache.k[i]) == len(cache.v[i])


def check_same(cache, other, room=False):
    """Check that two caches hold the same rows, wherever they are stored."""
    check_whole(cache)
    for name in ("pos", "kv_len"):
        assert torch.equal(getattr(cache, name), getattr(other, name)), name
    assert all(torch.equal(a, b) for a, b in zip(rows_of(cache), rows_of(other), strict=True))
    assert not room or cache.rooms == other.rooms


def prompted(slack=2, room=0):
    """A model, and a cache of two sequences whose heads keep different tokens, with `room` free slots each."""
    model = small_llama()
    cache, keep = RaggedCache(LAYERS, slack, "torch"), torch.rand(LAYERS, 4, 7) < 0.6
    model.prefill(torch.randn(2, 7, 32), cache, prune=lambda layer, *_: (keep[layer], None))
    for _ in range(slack - room):
        model.decode(torch.randn(2, 32), cache)
    return model, cache


def decoded(model, cache, steps):
    """Hidden states of `steps` more steps, (steps, B, C)."""
    generator = torch_random(7)
    x = torch.randn(steps, len(cache.pos), 32, generator=generator)
    return torch.stack([model.decode(row, cache) for row in x])


STEPS = {
    "a step": (1, lambda model, cache: model.decode(torch.ones(2, 32), cache)),
    "a step into larger arenas": (0, lambda model, cache: model.decode(torch.ones(2, 32), cache)),
    "a turn": (2, lambda model, cache: model.extend(torch.ones(2, 2, 32), cache)),
    "a turn in blocks": (5, lambda model, cache: model.extend(torch.ones(2, 5, 32), cache)),
    "a turn into larger arenas": (1, lambda model, cache: model.extend(torch.ones(2, 5, 32), cache)),
    "logits": (1, lambda model, cache: FastStep(model, cache)(torch.tensor([5, 6]))),
    "plain logits": (1, lambda model, cache: plain_step(model, cache)(torch.tensor([5, 6]))),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_finds_no_memory_has_not_happened(name, monkeypatch):
    if name == "a turn in blocks":
        monkeypatch.setattr(llama, "BLOCK", 2)
    room, step = STEPS[name]
    model, before = prompted(slack=max(2, room), room=room)
    after = copy.deepcopy(before)
    wanted = torch.cat([step(model, after).flatten(), decoded(model, after, 3).flatten()])
    tried, every = 0, 1 if name in ("a step into larger arenas", "logits", "plain logits") else 4
    for cache in failures(before, lambda cache: step(model, cache), every):
        check_same(cache, before)
        assert cache.room >= room  # more if the arenas had already grown
        if tried % 6 == 0:  # continue with this cache
            got = torch.cat([step(model, cache).flatten(), decoded(model, cache, 3).flatten()])
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            check_same(cache, after)
        tried += 1
    assert tried > 60 // every


@pytest.mark.parametrize("slack", [1, 9])
def test_repacking_is_done_or_not_layer_by_layer(slack):
    model, before = prompted(slack=4, room=3)
    wanted = decoded(model, copy.deepcopy(before), 4)
    moved = set()
    for cache in failures(before, lambda cache: cache.repack([slack, slack + 1])):
        check_same(cache, before)
        moved.add(sum(len(a) != len(b) for a, b in zip(cache.k, before.k, strict=True)))
        torch.testing.assert_close(decoded(model, cache, 4), wanted, rtol=1e-4, atol=1e-4)
    assert moved == set(range(LAYERS))


def test_a_layer_drops_tokens_or_not():
    _, before = prompted(slack=4, room=3)
    stays = torch.rand(int(before.kv_len[1].sum())) < 0.5
    after = copy.deepcopy(before)
    after.drop(1, stays)
    for cache in failures(before, lambda cache: cache.drop(1, stays)):
        check_same(cache, before, room=True)
        cache.drop(1, stays)
        check_same(cache, after, room=True)


def leave(cache):
    """Sequence 0 leaves."""
    keep_sequences(cache, [1])
    cache.repack(cache.rooms)


def test_those_who_stay_are_whole_and_the_others_are_there_or_not():
    model, before = prompted(room=2)
    after = copy.deepcopy(before)
    leave(after)
    wanted, seen = decoded(model, copy.deepcopy(after), 4), set()
    for cache in failures(before, leave):
        seen.add(len(cache.pos))
        if len(cache.pos) == 2:
            check_same(cache, before, room=True)
            leave(cache)
        check_same(cache, after)
        for i, k in enumerate(cache.k):  # a rectangle needs heads with the same number of slots and no gaps
            even = cache.kv_cap[i].unique().tolist() == [len(k) / cache.kv_cap.shape[1]]
            assert (cache.rectangle(i) is not None) == even
        torch.testing.assert_close(decoded(model, cache, 4), wanted, rtol=1e-4, atol=1e-4)
    assert seen == {1, 2}


def test_caches_that_could_not_be_joined_are_what_they_were():
    made = [prompted(room=2) for _ in range(3)]
    model, before = made[0][0], [cache for _, cache in made]
    copies = copy.deepcopy(before)
    wanted_alone = decoded(model, copies[1], 3)
    joined = join(copy.deepcopy(before))
    for caches in failures(before, join):
        for cache, old in zip(caches, before, strict=True):
            check_same(cache, old, room=True)
        alone = copy.deepcopy(caches[1])
        torch.testing.assert_close(decoded(model, alone, 3), wanted_alone, rtol=1e-4, atol=1e-4)
        again = join(caches)
        check_same(again, joined, room=True)
        assert all(k is None for cache in caches for k in (*cache.k, *cache.v))


def test_a_layer_is_packed_or_not():
    k, v, keep = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8), torch.rand(4, 9) < 0.5
    wanted = RaggedCache(2, 3, "torch")
    for layer in range(2):
        wanted.pack(layer, k, v, keep)
    before = RaggedCache(2, 3, "torch")
    for first in (0, 1):  # the layer that fails
        for cache in failures(before, lambda cache, first=first: cache.pack(first, k, v, keep)):
            assert cache.k[first] is None and cache.v[first] is None
            for layer in range(first, 2):
                cache.pack(layer, k, v, keep)
            check_same(cache, wanted, room=True)
        before.pack(first, k, v, keep)


def test_a_batch_goes_on_where_it_was():
    """Three answers; one ends in this step, and the rows of the others move."""
    demo = load(DEMO, "fp32")
    prepared = Batch()
    for limit in (4, 2, 5):
        prepared.add(Generation(demo, "Describe the picture.", [DEMO_PICTURE], Sampling(max_new_tokens=limit)))
    shared = (demo, demo.tokenizer, demo.model.language_model, demo.model)

    def run(batch):
        done = []
        while batch:
            done += batch.advance()
        return sorted(generation.text for generation in done)

    wanted, left, seen = run(copy.deepcopy(prepared, {id(thing): thing for thing in shared})), [], set()
    for n, batch in enumerate(failures(prepared, Batch.advance, 5, shared)):
        left.append(len(batch.running))
        if n % 4 == 0 or left[-1] not in seen:
            check_whole(batch.cache)
            assert run(batch) == wanted
        seen.add(left[-1])
    assert seen == {2, 3} and left == sorted(left, reverse=True)
