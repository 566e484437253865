"""Many answers at a time, in one cache without padding."""

import time
from collections import deque

import torch

from .cache import ARENAS, RaggedCache
from .config import InputError, brief
from .generate import Generation
from .sampling import Chooser


class Batch:
    """Generations that decode together, so that each step reads the weights once for all of them.

    Each one is prefilled separately when it is added, at any time. When its answer ends, it is removed and its K and V
    are freed: there is no padding and no waiting for the longest. Answers depend on each other only by rounding: matrix
    products have other sizes, and PyTorch's attention reads segments in another way. The Triton kernels compute the
    same bits for each sequence as without the others. All must use the same checkpoint, backend and kv_dtype.

        batch = Batch()
        batch.add(Generation(...))
        while batch:
            for generation in batch.advance():
                print(generation.text)

    A generation with non-finite logits is removed too; its `failure` is the exception.
    """

    def __init__(self) -> None:
        self.running: list[Generation] = []  # generations, in the order of the cache's sequences
        self._choosers, self._over = [], []
        self.cache = self._step = self._ids = None

    def __len__(self) -> int:
        """Number of generations that were added and not yet returned by `advance`."""
        return len(self.running) + len(self._over)

    @torch.inference_mode()
    def add(self, generation: Generation) -> None:
        """Prefill a generation and add it. If its first token ends the answer, the next `advance` returns it.

        InputError for another checkpoint, backend or kv_dtype, ValueError if it is already in the batch.
        """
        if not isinstance(generation, Generation):
            raise InputError(f"a batch takes one Generation at a time, not {brief(generation)}; add one")
        first = self.running[0] if self.running else generation
        kinds = {(id(g.checkpoint), g.backend, g.kv_dtype) for g in (generation, first)}
        if len(kinds) > 1:
            raise InputError("a batch has one checkpoint, one backend, one kv_dtype; start another batch for this one")
        if generation in (*self.running, *self._over):
            raise ValueError("this generation is already in the batch; add another")
        generation._begin()
        logits = generation.prefill()
        chooser = Chooser(generation.sampling, generation.checkpoint.never_ids, generation.checkpoint.device)
        ids = chooser(logits)
        self._take(generation, ids.item())
        own, generation.cache = generation.cache, None  # its K and V move to the batch's cache
        if generation.over:
            self._over.append(generation)
            return
        ids = torch.cat((self._ids, ids)) if self.running else ids
        self.cache = join([self.cache, own]) if self.running else own
        self._ids, self._step = ids, None  # `advance` makes a new step for the larger batch
        self.running.append(generation)
        self._choosers.append(chooser)

    @torch.inference_mode()
    def advance(self) -> list[Generation]:
        """Decode one token for each generation -> those that have ended, in no particular order.

        Each entry of `timing["steps"]` is the duration of the whole batch's step. If memory runs out, the step is
        either undone or complete; in both cases call `advance` again to continue.
        """
        self._dismiss()  # removes what the previous call could not, because memory ran out
        if self.running:
            start, checkpoint = time.perf_counter(), self.running[0].checkpoint
            self._step = self._step or checkpoint.step(checkpoint.model.language_model, self.cache)
            with self.cache.reserving(1):  # if memory runs out, the step can be repeated
                ids = self._next(self._step(self._ids))
                tokens = ids.tolist()
            self._ids = ids
            seconds = time.perf_counter() - start
            for generation, token in zip(self.running, tokens, strict=True):
                self._take(generation, token)
                generation.timing["steps"].append(seconds)  # of the batch
            self._dismiss()
        over, self._over = self._over, []
        return over

    def _take(self, generation, token):
        """`generation.take`; an error ends only this generation."""
        try:
            generation.take(token)
        except RuntimeError as broken:
            generation.failure = broken

    def _next(self, logits):
        """logits (B, V) -> next ids (B,)."""
        if all(chooser.sampling.temperature == 0 for chooser in self._choosers):
            return self._choosers[0].greedy(logits)[0]
        return torch.cat([chooser(row) for chooser, row in zip(self._choosers, logits, strict=True)])

    def _dismiss(self):
        """Remove the generations that have ended and free their memory."""
        stay = [i for i, generation in enumerate(self.running) if not generation.over]
        if len(stay) == len(self.running):
            return
        ids = self._ids[stay]
        if stay:
            keep_sequences(self.cache, stay)  # nothing below can fail before all fields are updated
        self._over += [generation for generation in self.running if generation.over]
        self.running, self._choosers = ([listed[i] for i in stay] for listed in (self.running, self._choosers))
        self._ids = ids
        if stay:
            self.cache.repack(self.cache.rooms)
        else:
            self.cache = self._step = self._ids = None


def join(caches):
    """Move the sequences of caches with equal settings and device into a new RaggedCache; the old ones end up empty.

    Layers are joined one at a time. Each old cache then holds views of the joined layer, so there is never a second
    full copy in memory. ValueError for an empty list.
    """
    if not caches:
        raise ValueError("no caches to join; give one for each sequence")
    first, layers = caches[0], range(len(caches[0].k))
    if any(cache.evicts for cache in caches):
        for cache in caches:
            if not cache.evicts:
                cache.watch_nothing()
    joined = RaggedCache(len(layers), first.slack, first.backend, first.dtype)
    shift = torch.zeros(len(layers), 1, dtype=torch.int32, device=first.pos.device)  # slots of the earlier caches
    starts = []
    for cache in caches:
        starts.append(cache.kv_start + shift)
        shift += torch.tensor([[len(k)] for k in cache.k], dtype=torch.int32, device=shift.device)
    joined.kv_start, joined.pos = torch.cat(starts, 1), torch.cat([c.pos for c in caches])
    for name in ("kv_len", "kv_cap", *(("limit", "recent") if first.evicts else ())):
        setattr(joined, name, torch.cat([getattr(c, name) for c in caches], 1))
    joined.ahead = [n for c in caches for n in c.ahead]
    joined.set_rooms([room for c in caches for room in c.rooms])
    joined.fused = first.fused
    for i in layers:
        whole = [None if own[0] is None else torch.cat(own) for own in zip(*(c.rows(i) for c in caches), strict=True)]
        sizes = [len(c.k[i]) for c in caches]
        for name, arena in zip(ARENAS, whole, strict=True):
            if arena is not None:
                getattr(joined, name)[i] = arena
                for c, own in zip(caches, arena.split(sizes), strict=True):
                    getattr(c, name)[i] = own
        for c in caches:
            c.version += 1
    joined.plan(0)  # makes the plans of all layers
    for c in caches:
        for name in ARENAS:
            setattr(c, name, [None] * len(layers))
    return joined


def keep_sequences(cache, sequences):
    """Keep only these sequences (ascending indices) of a cache. The slots of the others are freed by `repack`."""
    heads = cache.kv_len.shape[1] // len(cache.pos)
    segments = [b * heads + h for b in sequences for h in range(heads)]
    names = "kv_start", "kv_len", "kv_cap", *(("limit", "recent") if cache.evicts else ())
    tables, rooms, pos = [getattr(cache, name)[:, segments] for name in names], cache.rooms, cache.pos[sequences]
    for name, table in zip(names, tables, strict=True):
        setattr(cache, name, table)
    cache.pos, cache.ahead = pos, [cache.ahead[b] for b in sequences]
    cache.set_rooms([rooms[b] for b in sequences])
    cache.moved()


def answer_each(begin, questions, size, crowded=None, meanwhile=None):
    """Answer the questions, at most `size` at a time. Yields (index, finished Generation or exception) as they end.

    questions: an iterable; the next one is taken when there is room for it, and the index counts those taken.
    begin(question): returns its Generation, or raises the InputError that is yielded instead. If memory runs out,
    crowded(number of questions) is called and they are tried one by one; a question that does not fit alone yields its
    error. Without `crowded` the error is raised. Errors are yielded without tracebacks, whose frames hold tensors.
    meanwhile() is called before each step.
    """
    batch, running, queue = Batch(), {}, deque()  # running: index -> (question, its Generation); queue: to be retried
    numbered = enumerate(questions)
    alone = set()  # questions that did not fit in memory with others

    def room():
        return not running or (len(running) < size and not queue and alone.isdisjoint(running))

    while True:
        try:
            while room() and (asked := queue.popleft() if queue else next(numbered, None)):
                number, question = asked
                running[number] = question, None
                try:
                    running[number] = question, begin(question)
                    batch.add(running[number][1])
                except InputError as wrong:
                    del running[number]
                    yield number, InputError(str(wrong))
            if not running:
                return
            if meanwhile:
                meanwhile()
            for generation in batch.advance():
                number = next(n for n, (_, other) in running.items() if other is generation)
                del running[number]
                yield number, generation
        except Exception as broken:
            if crowded is None or not out_of_memory(broken):
                raise
            batch, tried = Batch(), sorted((n, question) for n, (question, _) in running.items())
            running = {}  # the cache may be inconsistent
            if len(tried) == 1:
                yield tried[0][0], broken.with_traceback(None)
            else:
                crowded(len(tried))
                queue, alone = deque(tried), {number for number, _ in tried}


def answer_together(begin, questions, size):
    """List of each question's answer, or its exception. Arguments as for `answer_each`."""
    answers = [None] * len(questions)
    for number, answer in answer_each(begin, questions, size):
        answers[number] = answer if isinstance(answer, InputError) else answer.failure or answer.text
    return answers


def out_of_memory(error: BaseException) -> bool:
    """True if the exception is an out-of-memory error, of the host or of a device."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )
