"""The KV cache: every head of every layer keeps its own tokens and its own number of them.

Each layer has one K and one V arena, a tensor (N, D), for all B sequences. Segment b * Hkv + h (sequence b, KV head h)
owns kv_cap slots, starting at kv_start. The first kv_len of them are taken; '.' is a free slot for a new token:

    head 0            head 1      head 2
    [k k k k k . . .][k k . . .][k k k k . . .]      kv_start = 0  8  13     kv_len = 5  2  4     kv_cap = 8  5  7

A new token is written in place. If it does not fit, all segments move to larger arenas first (`make_room`).
An unpruned cache is the case where all lengths are equal. Keys keep the rotary position that their token had in the
prompt, so the position of the next token is `pos`, never a length. Nor does attention depend on the order of a
segment: an evicting cache (`watch`) reuses the slots of the tokens that it gives up, so it does not grow.

Any call may run out of memory. Each call allocates what it needs before it changes the cache; methods that move
several layers do so one layer at a time. After such an error the cache is consistent, and the call can be repeated.
"""

from contextlib import contextmanager

import torch

from kernels import add_scores, decode_plans, evict, quantise, ragged_pack
from kernels.backend import choose_backend
from kernels.ragged_decode import unchecked_append, unchecked_decode

KV_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of the arenas; None: as the model
ARENAS = ("k", "v", "k_scale", "v_scale", "score", "token", "score_before")
NEVER = 2**30  # tokens until a sequence begins to evict, if it never does
MORE = 64  # free slots that each segment of a full sequence gets at least


class RaggedCache:
    """K and V of B sequences. S = B * Hkv segments, L layers.

    k, v       L arenas (N, D) each: keys and values, or with dtype "int8" or "fp8" their codes
    k_scale, v_scale   L scales of the codes, (N,) fp16 each, or None; see kernels/quantise.py
    kv_start, kv_len, kv_cap   (L, S) int32: first slot, number of taken slots, number of slots of each segment
    score, token, score_before   L each, or None unless the cache evicts: fp32 (N,), the attention that each slot has
               got (infinite: never evicted), int32 (N,), the position of its token, and score before the last `grow`
    limit, recent   (L, S) int32, or None unless the cache evicts: slots that a segment may take, and its newest tokens
               that are not evicted
    slots      per layer (S * T,) int64: the slots that the last `grow` claimed for T tokens, computed for all layers
               together: layer by layer would be slower (kernels/NOTES.md)
    len_before (L, S) int32: kv_len before the last `grow`, which counts new tokens before `append` writes them
    pos        (B,) int64: position of the next token of each sequence
    slack      free slots per segment after packing; when the segments of a sequence are full, they get more (`_more`)
    room       tokens that still fit into every segment; a number on the host
    spare      per sequence: free slots in each of its segments beyond `room`; numbers on the host
    ahead      per sequence: tokens until it begins to evict; numbers on the host
    claimed    tokens that `grow` has claimed and `give_back` has not freed; a number on the host
    backend    of the kernels; `pack` replaces "auto" by "triton" or "torch"
    fused      True with Triton: one kernel appends and attends
    version    increases when arenas move or sequences are removed, which invalidates the graph of `FastStep`
    """

    def __init__(self, num_layers, slack=64, backend="auto", dtype="auto"):
        self.slack, self.backend, self.dtype = max(1, slack), backend, dtype
        for name in ARENAS:
            setattr(self, name, [None] * num_layers)
        self.limit = self.recent = None
        self.kv_start = self.kv_len = self.kv_cap = self.slots = self.len_before = self.pos = None
        self.room, self.spare, self.fused, self.version = self.slack, [], False, 0
        self.ahead, self.claimed, self._held, self._open, self._saved = [], 0, False, False, False
        self._plans = None

    # ------------------------------------------------------------ prefill

    def pack(self, layer, k, v, keep=None):
        """Store a layer's prefill k, v (B, Hkv, T, D): tokens where keep (B * Hkv, T) bool is True, or all if None.

        Layer 0 comes first: its T is the length of the prompt, and later layers may see fewer tokens. ValueError if the
        layer already holds a prompt.
        """
        if self.k[layer] is not None:
            raise ValueError(f"layer {layer} of the cache already holds a prompt; make a new cache")
        b, _, tokens, _ = k.shape
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        total = None
        if keep is None:
            keep, total = k.new_ones(k.shape[:2], dtype=torch.bool), len(k) * tokens
        *arenas, start, length, _ = ragged_pack(k, v, keep, slack=self.slack, total=total, backend=self.backend)
        if self.pos is None:
            self.backend = choose_backend(self.backend, k.device, k.dtype, (k, v), KV_DTYPES[self.dtype])
            self.fused = self.backend == "triton"
            self.kv_start, self.kv_len, self.kv_cap = start.new_zeros(3, len(self.k), len(k)).unbind()
            self.pos, self.spare = torch.full((b,), tokens, device=k.device), [0] * b
            self.ahead = [NEVER] * b
        self._place(layer, (*self._coded(*arenas), None, None, None), start, length, self.slack)

    def _coded(self, k, v):
        """Rows k, v (..., D) as the arenas hold them: k, v, k_scale, v_scale; the scales are None without codes."""
        if self.dtype == "auto":
            return k, v, None, None
        (k, k_scale), (v, v_scale) = quantise(k, KV_DTYPES[self.dtype]), quantise(v, KV_DTYPES[self.dtype])
        return k, v, k_scale, v_scale

    def arenas(self, layer):
        """k, v, k_scale and v_scale of a layer; None for what there is not."""
        return self.k[layer], self.v[layer], self.k_scale[layer], self.v_scale[layer]

    def rows(self, layer):
        """Everything of a layer that has a row per slot, in the order of ARENAS; None for what there is not."""
        return [getattr(self, name)[layer] for name in ARENAS]

    def _place(self, layer, rows, start, length, slack):
        """Give a layer its `rows`. start, length (S,): first slot and taken slots of each segment."""
        for table, row in ((self.kv_cap, length + slack), (self.kv_start, start), (self.kv_len, length)):
            table[layer].copy_(row)
        for name, row in zip(ARENAS, rows, strict=True):
            getattr(self, name)[layer] = row
        self.moved()

    def moved(self):
        """Segments have moved: discard the plans and count a new version."""
        self.version, self._plans = self.version + 1, None

    def plan(self, layer):
        """The layer's decode plan. All layers' plans are made together, so that a device synchronises once."""
        if self._plans is None:
            self._plans = decode_plans(self.kv_start, self.kv_cap)
            if any(k is not None and plan.end > len(k) for plan, k in zip(self._plans, self.k, strict=True)):
                raise RuntimeError("segments exceed their arenas; this is a fault of RaggedCache, please report it")
        return self._plans[layer]

    # ------------------------------------------------------------ decode

    def grow(self, tokens=1, held=False):
        """Claim the next slots of every segment, in all layers at once; `append` fills them layer by layer.

        held: the tokens are of a prompt and never evicted: the limits rise. Otherwise it is one token per sequence, and
        an evicting segment at its limit first gives up a slot.
        """
        self.make_room(tokens, held)
        if self.evicts and not held:
            self._evict()
        new = torch.arange(tokens, device=self.kv_len.device)
        self.slots = ((self.kv_start + self.kv_len)[..., None] + new).flatten(1).unbind()  # of all layers at once
        self.len_before = self.kv_len.clone()  # nothing below allocates
        if self.evicts and not (held and self._saved):
            torch._foreach_copy_(self.score_before, self.score)
            self._saved = True
        self.claim(tokens, held)
        self.kv_len.add_(tokens)
        self.pos.add_(tokens)
        if self.evicts and held:
            self.limit.add_(tokens)

    def claim(self, tokens=1, held=False):
        """The host's part of `grow`; of `give_back` if tokens is negative."""
        rooms = [room - tokens for room in self.rooms]
        if not held:
            self.ahead = [n - tokens for n in self.ahead]
            rooms = [room + (n < 0) for room, n in zip(rooms, self.ahead, strict=True)]  # evicting gave it a slot
            self.ahead = [max(0, n) for n in self.ahead]
        self.set_rooms(rooms)
        self.claimed, self._held = self.claimed + tokens, held

    def make_room(self, tokens, held=False):
        """Repack if this many tokens do not fit. Only full sequences get more slots, so that the capacities of a
        sequence, which determine how a kernel splits its segments, do not depend on the other sequences."""
        if not self.fits(tokens, held):
            rows = zip(self.rooms, self._needs(tokens, held), self.ahead, self.pos.tolist(), strict=True)
            self.repack([room if room >= need else max(need, min(_more(pos), n)) for room, need, n, pos in rows])

    def fits(self, tokens=1, held=False):
        """True if this many tokens need no larger arenas."""
        return all(room >= need for room, need in zip(self.rooms, self._needs(tokens, held), strict=True))

    def _needs(self, tokens, held):
        """Free slots that each sequence needs for so many tokens: one that evicts reuses a slot."""
        return [tokens if held or n else tokens - 1 for n in self.ahead]

    @property
    def rooms(self):
        """Tokens that still fit into each segment of a sequence: a list of B."""
        return [self.room + more for more in self.spare]

    def set_rooms(self, rooms):
        self.room = min(rooms)
        self.spare = [room - self.room for room in rooms]

    @property
    def counts(self):
        """The counts on the host, to be restored after a capture, which claims nothing."""
        return self.room, self.spare, self.ahead, self.claimed

    @counts.setter
    def counts(self, counts):
        self.room, self.spare, self.ahead, self.claimed = counts

    @contextmanager
    def reserving(self, tokens):
        """Make room for tokens. If the body fails or Ctrl-C interrupts it, the slots that it claimed are freed.

        `grow` claims slots. These contexts may be nested: an outer one frees only what is still claimed.
        """
        outer, self._open = self._open, True
        self._saved = self._saved and outer
        try:
            self.make_room(tokens)
            claimed = self.claimed
            try:
                yield
            except BaseException:
                self.give_back(self.claimed - claimed)
                raise
        finally:
            self._open = outer

    def give_back(self, tokens=1):
        """Undo `grow`, also what the tokens added to the scores. A token that was evicted for them stays evicted: the
        next `grow` then finds its slot free, and evicts no other."""
        if not (self.pos.is_cuda and torch.cuda.is_current_stream_capturing()):  # a capture changes only the counts
            self.kv_len.sub_(tokens)
            self.pos.sub_(tokens)
            if self.evicts and tokens:
                torch._foreach_copy_(self.score, self.score_before)
                self.limit.sub_(tokens if self._held else 0)
        self.claim(-tokens, self._held)

    def append(self, layer, k, v):
        """Write k, v into the slots that `grow` claimed: (B, Hkv, D), one token per sequence, or (B, T, Hkv, D)."""
        if k.ndim == 4:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        new = self._coded(k.flatten(0, -2), v.flatten(0, -2))  # (S * T, D)
        for arena, x in zip(self.arenas(layer), new, strict=True):
            if arena is not None:
                _bytes(arena).index_copy_(0, self.slots[layer], _bytes(x))

    def attend(self, layer, q, kv_len=None, return_lse=False):
        """Attention of q (B, [T,] Hq, D) over all taken and claimed slots -> like q; kv_len (S,) overrides the lengths.

        return_lse: also return the log-sum-exp, (B, [T,] Hq) fp32.
        """
        length = self.kv_len[layer] if kv_len is None else kv_len
        arenas, plan = self.arenas(layer), self.plan(layer)
        return unchecked_decode(q, arenas, length, plan, self.backend, return_lse=return_lse)

    def append_attend(self, layer, q, k, v, rope=None):
        """A decode step: append k and v (B, Hkv, D) of one token per sequence; q (B, Hq, D) attends -> like q.

        If the cache is `fused`, the kernel rotates q and k by rope, cos and sin (B, 1, D); else pass them rotated.
        """
        if not self.fused:
            self.append(layer, k, v)
            out = self.attend(layer, q.contiguous())
            self.add_scores(layer, q)
            return out
        arenas, plan, length = self.arenas(layer), self.plan(layer), self.len_before[layer]
        out = unchecked_append(q, k, v, arenas, length, plan, self.backend, rope, return_lse=self.evicts)
        if self.evicts:
            out, lse = out
            self.add_scores(layer, q, lse, rope)
        return out

    # ------------------------------------------------------------ eviction

    @property
    def evicts(self):
        """True if a sequence gives up tokens while decoding."""
        return self.limit is not None

    def watch(self, scores, tokens, newest, extra):
        """From now on, evict: before a token is appended, each segment at its limit gives up the token with the lowest
        score (arXiv 2306.14048). For a cache of one sequence, after its prompt.

        scores   per layer (taken slots,) fp32, segment after segment: the attention that each token has got; infinite
                 for those that are never evicted. What later tokens attend to is added
        tokens   per layer (taken slots,): the positions of the tokens
        newest   share (0 to 1) of the slots of the others that the newest tokens have for themselves
        extra    tokens that each segment may take beyond those it has now, 1 or more
        """
        self.limit, self.recent = self.kv_len + extra, torch.zeros_like(self.kv_len)
        for layer, (own, places) in enumerate(zip(scores, tokens, strict=True)):
            taken, slots = _taken(self.kv_start[layer], self.kv_len[layer]), len(self.k[layer])
            self.score[layer], self.score_before[layer] = own.new_zeros(slots), own.new_zeros(slots)
            self.token[layer] = places.new_zeros(slots, dtype=torch.int32)
            self.score[layer][taken], self.token[layer][taken] = own, places.int()
            _, segment = self.positions(layer)
            free = torch.bincount(segment[own.isfinite()], minlength=self.kv_len.shape[1]) + extra
            self.recent[layer] = torch.minimum((newest * free.double()).floor(), free - 1)
        self.ahead = [extra]

    def watch_nothing(self):
        """Become like a cache that evicts, to be joined with one, but never evict."""
        self.limit, self.recent = torch.full_like(self.kv_len, NEVER), torch.zeros_like(self.kv_len)
        for layer, k in enumerate(self.k):
            self.score[layer], self.score_before[layer] = (k.new_zeros(len(k), dtype=torch.float32) for _ in "ab")
            self.token[layer] = k.new_zeros(len(k), dtype=torch.int32)

    def _evict(self):
        """Let the segments at their limit give up a slot."""
        before = (self.pos.repeat_interleave(self.kv_len.shape[1] // len(self.pos)) - self.recent).int()  # (L, S)
        for layer, (score, token) in enumerate(zip(self.score, self.token, strict=True)):
            tables = self.kv_len[layer], self.limit[layer], before[layer]
            evict(self.arenas(layer), score, token, *tables, self.plan(layer), self.backend)

    def add_scores(self, layer, q, lse=None, rope=None):
        """If the cache evicts, add what the newest tokens attend to; q, lse, rope as for `kernels.add_scores`."""
        if not self.evicts:
            return
        where = self.k[layer], self.score[layer], self.token[layer], self.kv_len[layer], self.pos, self.plan(layer)
        add_scores(q, *where, self.backend, lse=lse, rope=rope, k_scale=self.k_scale[layer])
        if q.ndim == 4:  # of a prompt
            self.score[layer].index_fill_(0, self.slots[layer], float("inf"))

    def positions(self, layer):
        """The positions of the tokens in the taken slots of an evicting cache, and their segments: (taken slots,)."""
        length = self.kv_len[layer]
        segment = torch.repeat_interleave(torch.arange(len(length), device=length.device), length)
        return self.token[layer][_taken(self.kv_start[layer], length)].long(), segment

    # ------------------------------------------------------------ arenas as a whole

    def rectangle(self, layer):
        """The layer's arenas as (S, n, D) views if all segments have n slots and no codes, else None; None too if the
        cache evicts, which needs the attention weights, and a whole layer in one function does not return them."""
        plan, k, v = self.plan(layer), self.k[layer], self.v[layer]
        even = plan.longest * plan.segments == len(k) and plan.shortest == plan.longest
        if self.dtype != "auto" or self.evicts or not even:
            return None
        shape = plan.segments, plan.longest, k.shape[1]
        return k.view(shape), v.view(shape)

    def repack(self, rooms):
        """Move every layer to new arenas, one layer after the other. rooms: free slots in each segment, per sequence.

        If memory runs out, the earlier layers have moved and the others have not.
        """
        self.set_rooms([min(pair) for pair in zip(self.rooms, rooms, strict=True)])  # until all have moved
        heads = self.kv_len.shape[1] // len(rooms)
        slack = self.kv_len.new_tensor(rooms).repeat_interleave(heads)  # (S,)
        for layer in range(len(self.k)):
            length = self.kv_len[layer].clone()
            self._move(layer, _taken(self.kv_start[layer], length), length, slack, heads * sum(rooms))
        self.set_rooms(rooms)

    def _move(self, layer, source, length, slack, free=None):
        """Move a layer's slots `source` to new arenas. length, slack (S,): taken and free slots of each segment; free:
        the sum of slack, if the host knows it."""
        start = ((length + slack).cumsum(0) - (length + slack)).int()
        slot = _taken(start, length)
        slots = len(slot) + (int(slack.sum()) if free is None else free)
        moved = [
            None if old is None else _moved(old, source, old.new_empty(slots, *old.shape[1:]), slot)
            for old in self.rows(layer)
        ]
        self._place(layer, moved, start, length, slack)

    def drop(self, layer, keep):
        """Free some of a layer's taken slots. keep: bool for each, segment after segment. The layer gets new arenas
        with as many free slots in each segment as before."""
        free, length = self.kv_cap[layer] - self.kv_len[layer], self.kv_len[layer]
        source = _taken(self.kv_start[layer], length)[keep]
        owner = torch.repeat_interleave(torch.arange(len(length), device=keep.device), length)[keep]
        length = torch.bincount(owner, minlength=len(length)).int()
        self._move(layer, source, length, free)

    # ------------------------------------------------------------ bytes

    @property
    def nbytes_held(self):
        """Bytes of the taken slots' K and V, scales included."""
        taken = [] if self.kv_len is None else self.kv_len.sum(1).tolist()
        layers = ((n, t) for layer, n in enumerate(taken) for t in self.arenas(layer) if t is not None)
        return sum(n * t.nbytes // len(t) for n, t in layers if len(t))

    @property
    def nbytes_reserved(self):
        """Bytes of all that has a row per slot, free slots included; scores and positions too."""
        every = (t for layer in range(len(self.k)) for t in self.rows(layer))
        return sum(t.untyped_storage().nbytes() for t in every if t is not None)


def _more(pos):
    """Free slots that each segment of a full sequence gets: half of its position, so that repacking becomes rare. The
    position counts dropped tokens too, so a pruned cache repacks at the same steps as an unpruned one."""
    return max(pos // 2, MORE)


def _bytes(t):
    """A view of fp8 as int8, because PyTorch has no index_copy_ for fp8; any other tensor itself."""
    return t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t


def _moved(old, source, new, slot):
    """Copy the slots `source` of an arena to the slots `slot` of a new one -> the new one."""
    _bytes(new).index_copy_(0, slot, _bytes(old)[source])
    return new


def _taken(start, length):
    """Indices of the taken slots of all segments: start, length (S,) -> (sum of length,)."""
    shift = start - (length.cumsum(0) - length)  # from an index among all taken slots to the slot
    return torch.repeat_interleave(shift, length) + torch.arange(int(length.sum()), device=start.device)
