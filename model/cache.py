"""The KV cache: every head of every layer keeps its own tokens and its own number of them.

One K and one V arena of (N, D) rows per layer holds all B sequences. Segment b * Hkv + h (sequence b, KV head h) owns
kv_cap slots from kv_start on; the first kv_len of them are taken, '.' is a free slot for a new token:

    head 0            head 1      head 2
    [k k k k k . . .][k k . . .][k k k k . . .]      kv_start = 0  8  13     kv_len = 5  2  4     kv_cap = 8  5  7

A new token is written in place. Only when a segment is full do all move to larger arenas. A cache in which nothing was
pruned is the case where all lengths are equal. Keys carry the position their token had in the prompt, so the position
of the next token is `pos`, and no length says what it is.
"""

import torch

from kernels import decode_plan, ragged_decode, ragged_decode_append, ragged_pack
from kernels.backend import choose_backend


class RaggedCache:
    """K and V of B sequences. S = B * Hkv segments, L layers.

    k, v               L arenas (N, D) each
    kv_start, kv_len, kv_cap   (L, S) int32: first slot, taken slots, all slots of a segment
    pos (B,) int64     position of the next token of each sequence
    live (B,) bool     False once `finish` was called: the sequence takes no more tokens
    slack              free slots per segment after packing, and the least by which full arenas grow
    """

    def __init__(self, num_layers, slack=64, backend="auto"):
        self.slack, self.backend = max(1, slack), backend
        self.k, self.v, self.plans = [None] * num_layers, [None] * num_layers, [None] * num_layers
        self.kv_start = self.kv_len = self.kv_cap = self.pos = self.live = None
        self.takes = None  # (S,) int32: 1 where a step adds a token, 0 in finished sequences
        self.rows = None  # segments that take tokens; None: all
        self.newest = None  # (L, S) int64: slot of each segment's last token
        self.lengths = self.newest_rows = ()  # rows of kv_len and of newest, one per layer
        self.slots = ()  # per layer: the slots (S,) or (S, T) that were claimed for the tokens of this step
        self.room = 0  # tokens that fit before a live segment is full
        self.fused = False  # does one kernel append and attend?
        self.past = None  # then these, (L, S) int32, are the lengths before the step
        self.version = 0  # counts what a captured graph cannot know of: moved arenas, finished sequences

    # ------------------------------------------------------------ prefill

    def pack(self, layer, k, v, keep=None):
        """Keep rows of a layer's prefill: k, v (B, Hkv, T, D); keep (B * Hkv, T) bool, or None for all of them."""
        if self.k[layer] is not None:
            raise ValueError(f"layer {layer} of the cache holds a prompt already; make a new cache")
        b, _, tokens, _ = k.shape
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        total = None
        if keep is None:
            keep, total = k.new_ones(k.shape[:2], dtype=torch.bool), len(k) * tokens
        if self.pos is None:
            tables = k.new_zeros(3, len(self.k), len(k), dtype=torch.int32)
            self.kv_start, self.kv_len, self.kv_cap = tables
            self._make_rows()
            self.pos = torch.full((b,), tokens, device=k.device)
            self._set_live(torch.ones(b, dtype=torch.bool, device=k.device))
            self.room = self.slack
        self.k[layer], self.v[layer], start, length, _ = ragged_pack(
            k, v, keep, slack=self.slack, total=total, backend=self.backend
        )
        self.fused = choose_backend(self.backend, k.device, k.dtype) == "triton"
        self._settle(layer, start, length, self.slack)

    def _make_rows(self):
        """Views of single layers, made once: a step then only changes what they show."""
        self.newest = (self.kv_start + self.kv_len - 1).long()
        self.lengths, self.newest_rows = self.kv_len.unbind(), self.newest.unbind()
        self.past = self.kv_len.clone()

    def _settle(self, layer, start, length, slack):
        """Note where a layer's segments lie."""
        self.kv_start[layer], self.kv_len[layer], self.kv_cap[layer] = start, length, length + slack
        self.newest[layer] = start + length - 1
        self.plans[layer] = decode_plan(self.kv_start[layer], self.kv_cap[layer])
        self.version += 1

    @classmethod
    def join(cls, caches):
        """One cache of all the sequences of several, which are emptied layer by layer: no second copy of the whole."""
        if not caches:
            raise ValueError("no caches to join; give one for each sequence")
        first, layers = caches[0], range(len(caches[0].k))
        joined = cls(len(layers), first.slack, first.backend)
        before = torch.zeros(len(layers), 1, dtype=torch.int32, device=first.pos.device)  # rows of the earlier caches
        starts = []
        for cache in caches:
            starts.append(cache.kv_start + before)
            before += torch.tensor([[len(k)] for k in cache.k], dtype=torch.int32, device=before.device)
        joined.kv_start = torch.cat(starts, 1)
        joined.kv_len, joined.kv_cap = (torch.cat([getattr(c, n) for c in caches], 1) for n in ("kv_len", "kv_cap"))
        joined._make_rows()
        joined.pos = torch.cat([c.pos for c in caches])
        joined._set_live(torch.cat([c.live for c in caches]))
        joined.room, joined.fused = min(c.room for c in caches), first.fused
        for i in layers:
            joined.k[i], joined.v[i] = torch.cat([c.k[i] for c in caches]), torch.cat([c.v[i] for c in caches])
            joined.plans[i] = decode_plan(joined.kv_start[i], joined.kv_cap[i])
            for c in caches:
                c.k[i] = c.v[i] = None
        return joined

    # ------------------------------------------------------------ decode

    def grow(self, tokens=1):
        """Claim the next slots of every live sequence, in all layers at once; `append` fills them layer by layer."""
        self.reserve(tokens)
        if tokens > 1:
            ahead = torch.arange(1, tokens + 1, device=self.newest.device)
            self.slots = (self.newest[..., None] + ahead).unbind()
        self.newest.add_(self.takes, alpha=tokens)
        if tokens == 1:
            self.slots = self.newest_rows
        if self.fused:
            self.past.copy_(self.kv_len)
        self.kv_len.add_(self.takes, alpha=tokens)
        self.pos.add_(self.live, alpha=tokens)

    def reserve(self, tokens=1):
        """The part of `grow` that a captured graph does not repeat: make sure that there is room, and count it."""
        if self.rows is None or len(self.rows):  # somebody is live
            if self.room < tokens:
                self.slack = max(self.slack, min(64, 2 * self.slack))  # so that repacking becomes rare
                self.repack(max(self.slack, tokens))
            self.room -= tokens

    def give_back(self, tokens=1):
        """Undo `grow`, when a step was broken off before all layers had filled their slots."""
        if not (self.pos.is_cuda and torch.cuda.is_current_stream_capturing()):  # then nothing has been done yet
            for table, step in ((self.newest, self.takes), (self.kv_len, self.takes), (self.pos, self.live)):
                table.add_(step, alpha=-tokens)
        self.room += tokens if self.rows is None or len(self.rows) else 0

    def append(self, layer, k, v):
        """Write the claimed slots: k, v (B, Hkv, D) for one token per sequence, or (B, T, Hkv, D)."""
        slots = self.slots[layer]
        if k.ndim == 4:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        k, v = k.flatten(0, 1), v.flatten(0, 1)  # (S, [T,] D)
        if self.rows is not None:  # a full segment of a finished sequence has no slot
            k, v, slots = k[self.rows], v[self.rows], slots[self.rows]
        if k.ndim == 3:
            k, v, slots = k.flatten(0, 1), v.flatten(0, 1), slots.flatten()
        self.k[layer].index_copy_(0, slots, k)
        self.v[layer].index_copy_(0, slots, v)

    def attend(self, layer, q, kv_len=None, return_lse=False):
        """q (B, [T,] Hq, D) against everything kept, the claimed slots included; kv_len (S,) overrides the lengths."""
        plan, length = self.plans[layer], self.lengths[layer] if kv_len is None else kv_len
        return ragged_decode(
            q, self.k[layer], self.v[layer], plan.kv_start, length,
            return_lse=return_lse, plan=plan, backend=self.backend,
        )  # fmt: skip

    def append_attend(self, layer, q, k, v, rope=None):
        """A decode step: one token per sequence, k and v (B, Hkv, D), is appended; q (B, Hq, D) attends -> like q.

        Where the cache is `fused` the kernel turns q and k by rope, cos and sin (B, 1, D); elsewhere they are turned.
        """
        if not self.fused:
            self.append(layer, k, v)
            return self.attend(layer, q.contiguous())
        plan = self.plans[layer]  # a finished sequence writes into a slot that is never counted, if it has one
        return ragged_decode_append(
            q, k, v, self.k[layer], self.v[layer], plan.kv_start, self.past[layer], plan.kv_cap,
            plan=plan, backend=self.backend, rope=rope,
        )  # fmt: skip

    def rectangle(self, layer):
        """The layer's arenas as (S, n, D) views, where all segments have n slots and take tokens; None elsewhere."""
        plan, k, v = self.plans[layer], self.k[layer], self.v[layer]
        if self.rows is not None or plan.longest * plan.segments != len(k):  # arenas have no gaps
            return None
        shape = plan.segments, plan.longest, k.shape[1]
        return k.view(shape), v.view(shape)

    def finish(self, sequence):
        """The sequence takes no more tokens: it stops growing, its `pos` stands still, what it is given is ignored."""
        self.live[sequence] = False
        self._set_live(self.live)

    def keep(self, sequences):
        """Only these sequences (a list of indices, ascending) stay; the slots of the others are given back."""
        heads, live = self.kv_len.shape[1] // len(self.pos), self.live[sequences]
        rows = [b * heads + h for b in sequences for h in range(heads)]
        self.kv_start, self.kv_len, self.kv_cap = (t[:, rows] for t in (self.kv_start, self.kv_len, self.kv_cap))
        self.pos = self.pos[sequences]
        self._make_rows()
        self._set_live(live)
        self.repack(max(1, self.room))

    def _set_live(self, live):
        """What follows from `live` for the segments."""
        self.version += 1
        self.live, heads = live, self.kv_len.shape[1] // len(live)
        self.takes = live.repeat_interleave(heads).int()
        self.rows = None if live.all() else self.takes.nonzero()[:, 0]

    def repack(self, slack):
        """Move every layer to arenas with `slack` free slots in each live segment, one layer after the other."""
        free = self.takes * slack
        for layer in range(len(self.k)):
            length = self.kv_len[layer].clone()
            start = ((length + free).cumsum(0) - (length + free)).int()
            source, slot = _taken(self.kv_start[layer], length), _taken(start, length)
            for arenas in (self.k, self.v):
                old = arenas[layer]
                new = old.new_empty(len(slot) + int(free.sum()), old.shape[1])
                arenas[layer] = new.index_copy_(0, slot, old[source])
            self._settle(layer, start, length, free)
        self.room = slack

    # ------------------------------------------------------------ bytes

    @property
    def nbytes_held(self):
        """Bytes of the K and V rows that are taken."""
        rows = [] if self.kv_len is None else self.kv_len.sum(1).tolist()
        return sum(2 * n * k.shape[1] * k.element_size() for n, k in zip(rows, self.k, strict=False) if k is not None)

    @property
    def nbytes_reserved(self):
        """Bytes of the arenas, free slots included."""
        return sum(t.untyped_storage().nbytes() for t in (*self.k, *self.v) if t is not None)


def _taken(start, length):
    """Indices of the taken slots of all segments: start, length (S,) -> (sum of length,)."""
    shift = start - (length.cumsum(0) - length)  # from the row's number among all rows to its slot
    return torch.repeat_interleave(shift, length) + torch.arange(int(length.sum()), device=start.device)
