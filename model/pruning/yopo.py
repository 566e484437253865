"""YOPO (arXiv 2410.06169): heads that look little at pictures do not see them, by a table made once for a model.

    r     = attention to the pictures / attention to the text, of a head, summed over the rows of a sample
    table = per layer and query head the r that it exceeds in more than 40 % of the samples (tools/calibrate.py)
    a head is active if its entry is above `threshold`; a KV head, if one of its query heads is
    an active head sees everything, an inactive one only text, and its output for vision tokens is 0

This is the rule of the original: a head wins a vote if r > threshold, and is active with more than 40 % of the votes.
One entry per head says so for every threshold, and the active heads of a higher threshold are among those of a lower
one. The original sets inactive heads' attention to pictures to 0 after the softmax. Here K and V of inactive KV heads
are freed, which scales an output by 1 + r: `renormalise` gives the original's form in the prefill, while decoded tokens
would need the freed keys for it. The original's mask is per query head; in models where query heads share KV heads, we
apply that of the KV head to all of them, so that tokens of the prompt and of the answer see the same.

The other parts are off by default. The authors' LLaVA checkpoints were fine-tuned with cut=0.5, radius=2 and
neurons=0.5; on models as they are, they report the table, and for Qwen2-VL cut=0.857 (24 of 28 layers).
"""

import math
from dataclasses import dataclass

import torch

from .budget import best, budget, check_fraction

NO_TABLE = (
    "there is no table of this model's heads; make yopo.json in its folder with tools/calibrate.py heads, or "
    "give the setting heads"
)


@dataclass(frozen=True)
class Looking:
    """What a layer computes for vision tokens in the prefill; the stage `attend` may return it. Tokens that no head may
    drop (`sink` and others) stay in the cache, but blind heads do not see them here.

    heads        (Hkv,) bool: the KV heads that see vision tokens. In the others text sees text, and the attention of
                 vision tokens is 0
    radius       vision tokens see text before them, and of the vision tokens only those of their own square at most
                 this many rows and columns away, later ones too; None: all tokens before them
    renormalise  False: the attention to vision tokens that such a head does not see is lost instead of divided among
                 the others, as in YOPO
    neurons      share of the MLP's neurons, the first ones, that vision tokens use
    """

    heads: torch.Tensor
    radius: int | None = None
    renormalise: bool = True
    neurons: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Yopo:
    """Heads that look little at pictures, by a table made for the model, do not see them at all (2410.06169).

    A head keeps all vision tokens or none. Without yopo.json in the model's folder, the setting heads is needed.

    heads: list with a list per layer of a number per query head: its attention to pictures, relative to that to text;
        true and false will do (numbers of 0 or more)
    threshold: heads with numbers above this are active; in the original 0.035 to 0.2 (any number of 0 or more)
    retention: fraction to keep of all layers together: the heads with the highest numbers, instead of those above the
        threshold (above 0 and up to 1)
    skip: number of first layers where all heads are active; null means 1 for fewer than 12 layers, else 2 (0 or more)
    cut: share of the layers, half rounded up, that process vision tokens; later ones have none (above 0 and up to 1)
    radius: vision tokens see only those at most this many rows and columns away, in both directions; null means all
        before them (0 or more)
    neurons: share of the MLP's neurons that vision tokens use, the first ones (above 0 and up to 1)
    prefill: whether inactive heads do not see pictures in the prefill either (true or false)
    renormalise: whether the attention of inactive heads to text adds up to 1 in the prefill; false is the original's
        form, as slow as seeing the pictures (true or false)
    """

    heads: list | None = None
    threshold: float = 0.035
    retention: float | None = None
    skip: int | None = None
    cut: float = 1.0
    radius: int | None = None
    neurons: float = 1.0
    prefill: bool = True
    renormalise: bool = True

    def __post_init__(self):
        rows = self.heads if isinstance(self.heads, list) else [] if self.heads is None else [None]
        entries = [entry for row in rows for entry in (row if isinstance(row, list) and row else [None])]
        if not all(type(entry) in (bool, int, float) and 0 <= entry < math.inf for entry in entries):
            raise ValueError("heads is no list of lists of numbers of 0 or more; give a list per layer, as calibrated")
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold is {self.threshold!r}; give a number of 0 or more")
        for name in ("cut", "neurons"):
            check_fraction(name, getattr(self, name))
            if getattr(self, name) == 0:
                raise ValueError(f"{name} is 0; give a number above 0 and up to 1")
        for name in ("skip", "radius"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name} is {value!r}; give a whole number of 0 or more")
        if not self.prefill and not self.renormalise:
            raise ValueError("renormalise=false has no effect with prefill=false; give one of them")

    def check(self, num_layers, kv_heads):
        """ValueError if there is no table for the model, or one of another shape; or if `cut` drops too much."""
        self.active(num_layers, kv_heads)

    def last(self, num_layers):
        """The number of layers that process vision tokens, at least 1."""
        return budget(num_layers, self.cut)

    def active(self, num_layers, kv_heads):
        """(L, Hkv) bool on the CPU: the KV heads that see vision tokens. ValueError as in `check`."""
        if self.heads is None:
            raise ValueError(NO_TABLE)
        widths = {len(row) for row in self.heads}
        if len(self.heads) != num_layers or len(widths) != 1 or min(widths) % kv_heads:
            shape = f"{len(self.heads)} layers with {' or '.join(map(str, sorted(widths)))} query heads"
            raise ValueError(f"heads has {shape}, the model {num_layers} with {kv_heads} KV heads; calibrate the model")
        table = torch.tensor(self.heads, dtype=torch.float64, device="cpu")
        looks = table.unflatten(1, (kv_heads, -1)).amax(2)  # (L, Hkv)
        skip, last = (2 if num_layers >= 12 else 1) if self.skip is None else self.skip, self.last(num_layers)
        looks[:skip] = math.inf
        looks[last:] = -1
        if self.retention is None:
            return looks > self.threshold
        count = max(budget(looks.numel(), self.retention), min(skip, last) * kv_heads)
        if count > last * kv_heads:
            raise ValueError(f"cut={self.cut} keeps less than retention={self.retention}; give a larger cut")
        return best(looks.view(1, -1), count).view_as(looks)

    def looking(self, view):
        """(Hkv,) bool on the CPU: `active` of the view's layer. ValueError for a table of another model."""
        active = self.active(view.num_layers, view.kv_heads)
        if len(self.heads[0]) != view.q_heads:
            raise ValueError(f"heads has {len(self.heads[0])} per layer, the model {view.q_heads}; calibrate the model")
        return active[view.layer]

    def attend(self, view):
        """-> the layer's Looking, or None if it is the plain attention and MLP."""
        seen = self.looking(view) if self.prefill else torch.ones(view.kv_heads, dtype=torch.bool, device="cpu")
        if view.layer >= self.last(view.num_layers) or (seen.all() and self.radius is None and self.neurons == 1):
            return None  # after the cut there are no vision tokens
        return Looking(seen, self.radius, self.renormalise, self.neurons)

    def keep(self, view):
        """-> keep (Hkv, T) bool, or None if all heads are active."""
        active = self.looking(view)
        return None if active.all() else view.text | active[:, None].to(view.device)

    def narrow(self, view):
        """-> the text, (T,) bool, after the last layer that processes vision tokens, or None."""
        last = self.last(view.num_layers)
        return view.text if view.layer == last - 1 < view.num_layers - 1 else None
