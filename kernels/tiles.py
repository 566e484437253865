"""Tiles, warps and pipeline stages of the decode kernels: a formula, overridden where another choice was measured to be
faster (`tuned.json`).

A choice depends on the shape of a query tile, the dtype and the GPU's architecture, never on lengths or on the batch.
So a sequence's bits do not depend on its neighbours, whatever the table says. The size of a split is not in the table,
because it decides the order of a merge (NOTES.md). The table's format, with one entry per architecture, padded head
dimension, rows and bytes of an element; written by `tools/bench_kernels.py --tune`:

    {"sm_90": {"about": "GPU, versions, date", "tiles": {"DP 128, M 4, 2 bytes": {"BN": 32, "num_warps": 2}}}}
"""

import json
from functools import cache
from pathlib import Path

import torch

TUNED = Path(__file__).with_name("tuned.json")
CHOICES = ("BN", "num_stages", "num_warps")  # what an entry may override
# 200 KB of shared memory per multiprocessor or more: three tiles of K and V in 16 bits (67 KB) leave room for others
ROOMY = ("sm_90", "sm_100", "sm_101", "sm_103", "sm_110")


def tiles(rows, d, itemsize):
    """Tile sizes by the formula, for T * G rows of D channels: M rows, DP channels, BN slots, BS log-sum-exps.

    M is a power of two, below 16 only if DP is 64 or 128: there AMD's matrix units need only 4 rows, for other DP 16.
    NVIDIA's compiler accepts any M. A K tile (BN x DP) takes up to 16 KB; BN is 16 to 128, at most 64 if M > 16 or M is
    8 (128 slots, 7 heads in a group and 64 channels, as in Qwen2-0.5B, take 140 registers instead of 80 on sm_80).
    In fp32 M is at most 16 and a K tile takes 8 KB, 16 KB if DP is 256. This fits registers and shared memory together
    with the prefetched tiles (tools/inspect_kernels.py).
    """
    dp = max(16, _power_of_2(d))
    m = min(max(_power_of_2(rows), 1 if dp in (64, 128) else 16), 64 if itemsize == 2 else 16, 4096 // dp)
    bn = 2**13 // dp if itemsize == 2 else 2**11 // dp
    return {
        "M": m,
        "DP": dp,
        "BN": max(16, min(64 if m == 8 or m > 16 else 128, bn)),
        "BS": max(16, min(64, 1024 // m)),
    }


def chosen(rows, d, itemsize, arch, table=None, coded=False):
    """`tiles` with num_warps and num_stages (tiles of K and V in flight), and the table's overrides for this case.

    arch: of `architecture`; table: the content of a file like `tuned.json`, by default of that file ({}: the formula).
    coded: K and V in 8 bits, which the table does not cover.
    """
    tile = tiles(rows, d, itemsize) | {"num_warps": 4, "num_stages": 3 if arch in ROOMY else 2}
    if coded:
        return tile
    table = read(TUNED) if table is None else table
    return tile | table.get(arch, {}).get("tiles", {}).get(entry(tile, itemsize), {})


def entry(tile, itemsize):
    """The name of a tile's entry in the table."""
    return f"DP {tile['DP']}, M {tile['M']}, {itemsize} bytes"


@cache
def architecture(device):
    """A device's architecture as the table names it: sm_90, gfx942, or cpu (the interpreter)."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def read(path):
    """The table in a file, read once per process. ValueError if an entry overrides anything but CHOICES."""
    table = json.loads(path.read_text(encoding="utf-8"))
    for arch, found in table.items():
        for name, values in found["tiles"].items():
            if not values.keys() <= set(CHOICES) or not all(type(n) is int and n > 0 for n in values.values()):
                raise ValueError(f"{path}: {arch}, {name} is {values}; give positive numbers for {', '.join(CHOICES)}")
    return table


def _power_of_2(n):
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
