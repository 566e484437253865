"""The KV cache. For now a dense one: every head of every layer keeps every token.

One K and one V arena of (N, D) slots per layer; segment b * Hkv + h (sequence b, KV head h) owns `capacity` slots
of it, and the first `length` of them are taken:

    head 0            head 1            head 2
    [k k k k k . . .][k k k k k . . .][k k k k k . . .]      '.' = free slot for a new token

A new token is written in place. Only when the free slots run out does a layer move to a larger arena.
"""

import torch
import torch.nn.functional as F


class DenseCache:
    """K and V of B sequences of equal length.

    pos (B,) int64: the true position of the next token of each sequence (what RoPE needs; not a slot number).
    slack: free slots per segment after prefill, and the step in which a full arena grows.
    """

    def __init__(self, num_layers, slack=64):
        self.slack = max(1, slack)
        self.k, self.v = [None] * num_layers, [None] * num_layers  # (B, Hkv, capacity, D) views of the arenas
        self.length = [0] * num_layers  # taken slots per segment
        self.pos = None

    def pack(self, layer, k, v):
        """Keep a layer's prefill: k, v (B, Hkv, T, D)."""
        self.length[layer] = k.shape[2]
        self.k[layer], self.v[layer] = _with_slack(k, self.slack), _with_slack(v, self.slack)
        if self.pos is None:
            self.pos = torch.full((k.shape[0],), k.shape[2], device=k.device)

    def append(self, layer, k, v):
        """Write one token per sequence behind the others: k, v (B, Hkv, D)."""
        n = self.length[layer]
        if n == self.k[layer].shape[2]:
            self.repack(layer)
        self.k[layer][:, :, n], self.v[layer][:, :, n] = k, v
        self.length[layer] = n + 1

    def repack(self, layer):
        """Move a full layer to an arena with `slack` more slots per segment."""
        n = self.length[layer]
        self.k[layer] = _with_slack(self.k[layer][:, :, :n], self.slack)
        self.v[layer] = _with_slack(self.v[layer][:, :, :n], self.slack)

    def attend(self, layer, q):
        """One query row per head, q (B, Hq, D), against everything kept -> (B, Hq, D)."""
        k, v = self.k[layer], self.v[layer]
        n = self.length[layer]
        # the G query heads of a KV head are G rows of one small product: no K or V is repeated
        rows = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, D)
        return F.scaled_dot_product_attention(rows, k[:, :, :n], v[:, :, :n]).flatten(1, 2)

    def advance(self):
        """All layers have taken the token at `pos`: the next one comes after it."""
        self.pos += 1

    @property
    def nbytes_held(self):
        """Bytes of the K and V rows that are taken."""
        return sum(2 * k[:, :, :n].numel() * k.element_size() for k, n in zip(self.k, self.length, strict=True) if n)

    @property
    def nbytes_reserved(self):
        """Bytes of the arenas, free slots included."""
        return sum(t.untyped_storage().nbytes() for t in (*self.k, *self.v) if t is not None)


def _with_slack(x, slack):
    """A copy of x (B, Hkv, T, D) in an arena with `slack` free slots behind each segment."""
    b, h, t, d = x.shape
    arena = x.new_empty(b, h, t + slack, d)
    arena[:, :, :t] = x
    return arena
