"""Predict the time of a call of `append_kernel` (a decode step's attention in one layer) on a GPU, on paper.

Needs neither torch nor a GPU. `roofline.py --kernel` prints the assumptions and the predictions. A prediction is a
small simulation. Programs (work items) start in order on the free places of the multiprocessors, and each

    loads its work item, then the length and the query           one dependent load after another
    streams its K and V                                          all streaming programs share the bandwidth
    stores its partial result and draws a ticket                 two round trips to L2
    merges, if it is the last of its segment                     the log-sum-exps, then four parts per round trip

The time is that of the last program, plus the launch. Caches are cold at the beginning, as in the benchmark.
"""

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass

from tools.shapes import LAYERS, fit, one_long

SLACK = 64  # free slots per segment, as in bench_kernels.py
D, SLOTS = 128, 64  # channels; slots of a tile
UNROLLED = 4  # parts of a merge that are loaded together: ptxas unrolls the loop so (machine code for sm_90)
CYCLES = 4  # per instruction: latency of NVIDIA's ALU, issue time of an AMD wave. Chosen after 2 had proved too few
LOADS = 3  # that wait for each other, the first tile included: `chain` of inspect_kernels.py. 4 before 2026-11-26
BARRIER = 30  # cycles
NODE = 1.0e-6  # an empty node of a captured graph: measured on an H100 (NOTES.md)
START = 2.5e-6  # the rest of starting and ending a kernel: fitted to the times of an H200 and an H100


@dataclass(frozen=True)
class Rows:
    """Keys and values in a type. Counted in the machine code of append_kernel for sm_90, triton 3.7.1 (NOTES.md).

    row: bytes of a key or a value, with its scale; instructions: per tile and warp; barriers: from the loaded query to
    the first load of K; in 8 bits the new token is quantised there.
    """

    row: int
    instructions: int
    barriers: int

    @property
    def tile(self):
        """Bytes of K and V in a tile."""
        return 2 * SLOTS * self.row


ROWS = {"auto": Rows(2 * D, 396, 10), "int8": Rows(D + 2, 691, 22), "fp8": Rows(D + 2, 720, 22)}  # auto: bf16


@dataclass(frozen=True)
class Device:
    """What a prediction needs to know of a GPU. Times in seconds.

    units: multiprocessors, or compute units; bandwidth: bytes/s that a kernel reaches; dram, l2: latency of a load
    from memory, and of data that another program has just written; shared: KB per unit for programs; stages: tiles in
    flight and in use, see kernels/tiles.py; registers, coded: programs for which a unit has registers, in 16 bits, in
    8 bits; fp8: False where it is refused.
    """

    units: int
    bandwidth: float
    clock: float
    dram: float
    l2: float
    shared: int
    stages: int
    registers: int
    coded: int
    fp8: bool
    source: str


CHASE = "gpu-benches (RRZE-HPC, 1038c5d)"  # its pointer chase, and its streaming kernels
DEVICES = {
    "H200": Device(132, 4.386e12, 1.98e9, 348e-9, 142e-9, 227, 3, 5, 5, True,
                   f"bandwidth measured (kernels-h200.json); latencies of a GH200, {CHASE}"),
    "H100": Device(132, 3.062e12, 1.98e9, 348e-9, 142e-9, 227, 3, 5, 5, True,
                   f"SXM; bandwidth measured (NOTES.md); latencies of a GH200, {CHASE}"),
    "A100": Device(108, 1.794e12, 1.41e9, 391e-9, 146e-9, 163, 2, 5, 4, False,
                   f"SXM, 80 GB; latencies and bandwidth, {CHASE}"),
    "L4": Device(58, 0.294e12, 2.04e9, 306e-9, 134e-9, 99, 2, 5, 4, True,
                 f"an L40's cycles and its 98 % of the data sheet's bandwidth, {CHASE}"),
    "MI300X": Device(304, 4.199e12, 2.1e9, 420e-9, 218e-9, 64, 2, 3, 2, False,
                     f"latencies and bandwidth, {CHASE}; l2 is the Infinity Cache, because units do not share one L2"),
}  # fmt: skip


# ---------------------------------------------------------------- what a call consists of


def split_size(cap):
    """Slots per work item of a segment: the rule of kernels/ragged_decode_plan.py, which needs torch."""
    short, long = -(-cap // 768), -(-cap // 4096)
    return 64 * min(16, max(1, min(8, short), long))


@dataclass(frozen=True)
class Item:
    segment: int
    parts: int  # live items of its segment; 0: the item begins after the segment's end, it returns at once
    bytes: int  # of K and V


def items_of(lengths, rows=ROWS["auto"]):
    """The Items of a call over segments of these lengths, in the order of the work list."""
    items = []
    for segment, length in enumerate(lengths):
        size = split_size(length + SLACK)
        parts = max(1, -(-length // size))
        for i in range(-(-(length + SLACK) // size)):
            slots = max(0, min(size, length - i * size))
            items.append(Item(segment, parts if i < parts else 0, 2 * rows.row * slots))
    return items


def places(device, rows=ROWS["auto"]):
    """Programs that fit on a unit beside each other. One takes 3 KB (1 KB of it reserved) beside its tiles. Scales are
    in registers."""
    coded = rows.row < 2 * D
    tiles = (device.stages - 1) * (16 if coded else 32)  # KB
    return min(device.shared // (tiles + 3), device.coded if coded else device.registers)


# ---------------------------------------------------------------- the simulation


def seconds(items, device, bandwidth=None, slots=None, loads=LOADS, rows=ROWS["auto"]):
    """Time of a call. bandwidth, slots: instead of the device's; with both infinite, the longest chain of loads.
    loads: 4 for a kernel that requests the query only after it knows the length."""
    bandwidth, free = bandwidth or device.bandwidth, slots or device.units * places(device, rows)
    arithmetic = CYCLES * rows.instructions / device.clock  # of a tile
    most = min((device.stages - 1) * rows.tile / device.dram, rows.tile / arithmetic)  # bytes/s that a program streams
    prologue = BARRIER * rows.barriers / device.clock
    waiting, left = deque(items), {item.segment: item.parts for item in items if item.parts}
    now, moved, order = 0.0, 0.0, itertools.count()  # moved: bytes of a program that has streamed from the beginning
    events, streams = [], []  # heaps: (time, order, what, Item); (value of `moved` at the end, order, Item)

    def after(delay, what, item):
        heapq.heappush(events, (now + delay, next(order), what, item))

    while waiting or events or streams:
        while free and waiting:
            item, table = waiting.popleft(), device.dram if now == 0 else device.l2  # later programs find it in L2
            free -= 1
            if item.parts:  # tables; query, with the length if there are 3 loads; first tile
                after((loads - 2) * table + 2 * device.dram + prologue, "stream", item)
            else:
                after(2 * table, "end", item)
        rate = min(most, bandwidth / len(streams)) if streams else 0.0
        finish = now + (streams[0][0] - moved) / rate if streams else math.inf
        if not events or finish <= events[0][0]:
            now, (moved, _, item) = finish, heapq.heappop(streams)
            if item.parts == 1:
                after(arithmetic + device.l2, "end", item)
            else:  # its partial result, then the ticket
                after(arithmetic + 2 * device.l2, "ticket", item)
            continue
        moved += rate * (events[0][0] - now)
        now, _, what, item = heapq.heappop(events)
        if what == "stream":
            heapq.heappush(streams, (moved + item.bytes, next(order), item))
            continue
        if what == "ticket":
            left[item.segment] -= 1
        if what == "ticket" and left[item.segment] == 0:  # the log-sum-exps, the parts, the result
            after((2 + -(-item.parts // UNROLLED)) * device.l2, "end", item)
        else:
            free += 1
    return NODE + START + now


# ---------------------------------------------------------------- the report


def assumptions(devices, loads, kv="auto"):
    """Lines: the constants, then each device's numbers, with sources. kv: key of ROWS."""
    rows, plain = ROWS[kv], ROWS["auto"]
    yield f"bf16, D = {D}, {SLACK} free slots per segment, cold caches, in a captured graph."
    if kv != "auto":
        yield (
            f"- K and V in {kv}: 1 byte per element and 2 per row and arena for its scale, {rows.row} bytes instead of "
            f"{plain.row}; the same segments and splits"
        )
    yield f"- an empty node of the graph: {1e6 * NODE:g} us (measured on an H100, NOTES.md)"
    yield f"- the rest of starting and ending a kernel: {1e6 * START:g} us (fitted to times of an H200 and an H100)"
    more = f", {rows.instructions - plain.instructions} of them for codes" if kv != "auto" else ""
    yield f"- {rows.instructions} instructions per tile and warp{more} (machine code for sm_90, assumed for all)"
    yield f"- {loads} loads that wait for each other up to the first tile of K (PTX for sm_90; inspect_kernels: chain)"
    yield f"- {CYCLES} cycles per instruction (latency of NVIDIA's ALU; chosen after 2 had proved too few)"
    yield (
        f"- {BARRIER * rows.barriers} cycles before the first tile ({rows.barriers} barriers of {BARRIER}); "
        f"merges load {UNROLLED} parts at a time (machine code for sm_90)"
    )
    for name in devices:
        d = DEVICES[name]
        yield (
            f"- {name}: {d.units} multiprocessors, places for {places(d, rows)} on each ({d.shared} KB of shared "
            f"memory, {d.stages} stages), {d.clock / 1e9:g} GHz, {d.bandwidth / 1e9:,.0f} GB/s, latency of memory "
            f"{1e9 * d.dram:.0f} ns, of L2 {1e9 * d.l2:.0f} ns ({d.source})"
        )


HEAD = ["case", "work items", "per multiprocessor", "waves", "chain us", "bytes us", "predicted us", "of bandwidth"]


def row(name, lengths, device, loads=LOADS, rows=ROWS["auto"]):
    """Cells of the table for a call over segments of these lengths."""
    items, size = items_of(lengths, rows), 2 * rows.row * sum(lengths)
    live = sum(item.parts > 0 for item in items)
    whole, chain = (seconds(items, device, *given, loads=loads, rows=rows) for given in ((), (math.inf, len(items))))
    numbers = (
        live / device.units,
        live / (device.units * places(device, rows)),
        1e6 * chain,
        1e6 * size / device.bandwidth,
    )
    cells = [f"{x:.1f}" for x in (*numbers, 1e6 * whole)]
    return [name, str(live), *cells, f"{size / device.bandwidth / whole:.0%}"]


def cases(shapes, mbytes, skews):
    """Yield (name, lengths): as `bench_kernels.py --mbytes ... --skew ...`; ratio 1: all heads equally long."""
    for shape in shapes:
        for size in mbytes:
            b, mean = fit(shape, size, 2, in_mbytes=True, ratio=max(skews))
            label = shape if b == LAYERS[shape][0] else f"{shape} x {b}"
            segments = b * LAYERS[shape][1]
            for ratio in skews:
                lengths = one_long(segments, segments * mean, round(ratio * mean))
                yield f"{label}, {mean} tokens on average, skew {ratio:g}", lengths


def measured(path, kv="auto"):
    """Yield (name, lengths, measured us) of the cases of `append_kernel` in a file by bench_kernels.py. Needs torch."""
    provider = "ours, triton" if kv == "auto" else f"ours, triton, {kv}"
    import json

    from tools.problems import lengths_of_case

    for found in json.loads(path.read_text())["rows"]:
        if (found["op"], found["provider"], found["right"]) == ("ragged_decode_append", provider, True):
            (*_, d), lengths = lengths_of_case(found["case"])
            if d == D:
                yield found["case"], lengths.tolist(), found["us"]
