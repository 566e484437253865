"""The plan of a decode step: where the segments are and how the Triton kernels split them. Made when they move."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch

from .backend import check_tables


@dataclass(frozen=True)
class DecodePlan:
    """The layout of a layer's S segments, and how the Triton kernels cut them into W splits.

    kv_start, kv_cap (S,) int32; starts, caps: the same as lists
    split: slots per work item of the Triton kernels; None: `split_size` of each segment
    segments: S; shortest, longest: smallest and largest capacity; end: slots that the arena must have
    buffers: work items, ticket counters and workspaces of the Triton kernels, allocated on first use (but see `items`).
        Calls share them, so no two calls may use a plan at the same time. Keys: "items", row tiles, (rows, d).
    """

    kv_start: torch.Tensor
    kv_cap: torch.Tensor
    starts: list
    caps: list
    split: int | None
    segments: int
    shortest: int
    longest: int
    end: int
    buffers: dict = field(default_factory=dict)

    @cached_property
    def overlap(self):
        """Two segments that share slots, (a, b), or None."""
        segments = zip(self.starts, self.caps, range(self.segments), strict=True)
        slots = sorted((start, start + cap, s) for start, cap, s in segments if cap)
        return next(((a, b) for (_, end, a), (start, _, b) in pairwise(slots) if start < end), None)

    @property
    def items(self):
        """work (W, 6) int32, a row per program: segment, index of the split in it, the segment's first item, slots per
        split, the segment's first slot and its capacity; firsts, sizes (S,) int32: each segment's first item and slots
        per split.

        On CUDA `decode_plans` makes them, because a decode step must not copy from the host.
        """
        if "items" not in self.buffers:
            (self.buffers["items"],) = _work_items([self.starts], [self.caps], self.split, self.kv_start.device)
        return self.buffers["items"]

    def tickets(self, row_tiles):
        """Ticket counters (S * row_tiles,) int32: finished programs per segment and row tile. All 0 between calls."""
        if row_tiles not in self.buffers:
            self.buffers[row_tiles] = self.kv_cap.new_zeros(self.segments * row_tiles)
        return self.buffers[row_tiles]

    def scratch(self, rows, d):
        """Workspace for the items' partial results, fp32: out (W, rows, d), log-sum-exp (W, rows); rows: T * G."""
        if (rows, d) in self.buffers:
            return self.buffers[rows, d]
        items, device = len(self.items[0]), self.kv_start.device
        workspace = torch.empty(items, rows, d, device=device), torch.empty(items, rows, device=device)
        if rows <= 16:  # a decode step; the workspace of a conversation's new turn is too large to keep
            self.buffers[rows, d] = workspace
        return workspace


def decode_plan(kv_start, kv_cap, *, split=None):
    """Plan for `ragged_decode` over segments kv_start, kv_cap (S,) int32. Build it when segments have moved,
    not in each step: it synchronises.

    split: slots per work item of the Triton kernels, a multiple of 16 up to 2**20; for experiments, and for tests that
    need several items in a short segment. Default: `split_size`. ValueError for another split, and for tables of
    another dtype or shape, on two devices, or with negative entries.
    """
    _check(kv_start, kv_cap, split, 1)
    return _plans(kv_start[None], kv_cap[None], split)[0]


def decode_plans(kv_start, kv_cap, *, split=None):
    """Plans for L layers, kv_start and kv_cap (L, S) int32. Synchronises once. ValueError as for `decode_plan`."""
    _check(kv_start, kv_cap, split, 2)
    return _plans(kv_start, kv_cap, split)


def _check(kv_start, kv_cap, split, ndim):
    check_tables({"kv_start": kv_start, "kv_cap": kv_cap}, ndim)
    if split is not None and (type(split) is not int or not 16 <= split <= 2**20 or split % 16):
        raise ValueError(f"split is {split!r}; give a multiple of 16 slots, up to 2**20")


def _plans(kv_start, kv_cap, split):
    pair = torch.stack((kv_start, kv_cap))  # a copy, because the caller may overwrite its tables later
    (starts, caps), (kv_start, kv_cap) = pair.tolist(), pair.unbind()
    plans = [_plan(*layer, split) for layer in zip(kv_start, kv_cap, starts, caps, strict=True)]
    if kv_start.is_cuda:
        for plan, items in zip(plans, _work_items(starts, caps, split, kv_start.device), strict=True):
            plan.buffers["items"] = items
    return plans


def _plan(kv_start, kv_cap, starts, caps, split):
    if min(starts) < 0 or min(caps) < 0:
        raise ValueError(f"segments with starts {starts}, sizes {caps}: some are negative; count slots from 0")
    end = max(start + cap for start, cap in zip(starts, caps, strict=True))
    return DecodePlan(kv_start, kv_cap, starts, caps, split, len(caps), min(caps), max(caps), end)


def _work_items(starts, caps, split, device):
    """The `DecodePlan.items` of each layer, made with a single copy to the device. starts, caps: for each layer a list
    of S."""
    starts, caps = (torch.tensor(table, device="cpu") for table in (starts, caps))  # (L, S)
    sizes = torch.tensor([[split or split_size(cap) for cap in row] for row in caps.tolist()], device="cpu")
    counts = (caps + sizes - 1).div(sizes, rounding_mode="floor").clamp(min=1)
    firsts = counts.cumsum(1) - counts
    ends = counts.flatten().cumsum(0)
    owner = torch.repeat_interleave(counts.flatten())  # segment of each item, numbered across layers
    number = torch.arange(len(owner), device="cpu") - (ends - counts.flatten())[owner]
    own = [table.flatten()[owner] for table in (firsts, sizes, starts, caps)]
    work = torch.stack((owner % sizes.shape[1], number, *own), 1)
    flat = torch.cat([t.flatten().int() for t in (work, firsts, sizes)]).to(device)
    work, firsts, sizes = flat.split([6 * len(owner), firsts.numel(), sizes.numel()])
    works = work.view(-1, 6).split(counts.sum(1).tolist())
    return list(zip(works, firsts.chunk(len(caps)), sizes.chunk(len(caps)), strict=True))


def split_size(cap):
    """Slots per work item of a segment with `cap` slots.

    64 for each 768 slots (rounded up), up to 512; above 32,768 slots, 64 for each 4,096, up to 1,024. At most 12
    items up to 6,144 slots, and 64 up to 65,536: enough to fill the device, few enough to merge cheaply (NOTES.md).
    The size depends on this segment alone, so the rest of the batch cannot change the order of a sum.
    """
    short, long = -(-cap // 768), -(-cap // 4096)
    return 64 * min(16, max(1, min(8, short), long))
