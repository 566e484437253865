"""Tiles, warps and pipeline stages of the decode kernels by measurement: `bench_kernels.py --tune`.

An entry of kernels/tuned.json holds for all lengths and batches, so a candidate is timed on all sizes, and its speed in
a round is the geometric mean over the sizes of the formula's time over its own. The median over rounds decides. To win,
a candidate must be more than 2 % faster in the first and in the second half of the rounds; otherwise the formula stays.

Before it is timed, each candidate is checked against float64, and compared bitwise with the formula's results. The
winner is also checked in two launches (`ragged_decode`), which use the same entry.
"""

import gc
import json
import statistics
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from kernels import decode_plan
from kernels.backend import interpreted
from kernels.tiles import CHOICES, TUNED, architecture, chosen, entry
from model import InputError

from . import harness, problems
from .command import say, unwritable, write_json
from .harness import judge

GRID = {"BN": (32, 64, 128), "num_stages": (2, 3, 4), "num_warps": (2, 4, 8)}
REHEARSAL = {"BN": (16, 32), "num_stages": (2,), "num_warps": (4,)}  # in the interpreter only BN has an effect
CASES = "ragged_decode_append --shapes 7b gqa8 g8 --mbytes 4 17 65 --retention 0.2 --layouts plphp"
GAIN = 1.02  # required speed over the formula


def tune(args, argv, device, dtype):
    """Time the candidates on the cases of `args`, print a table per entry, and write the winners -> exit code 0."""
    rehearsal = device.type == "cpu" and interpreted()
    if device.type != "cuda" and not rehearsal:
        raise InputError("--tune needs a GPU; run it on one, or rehearse it with TRITON_INTERPRET=1 and --out FILE")
    target = Path(args.out or TUNED).resolve()
    if rehearsal and target == TUNED:
        raise InputError("times of the interpreter must not be shipped; give --tune another --out FILE")
    if wrong := unwritable(args.json, target):
        raise InputError(wrong)
    about = harness.about_run("bench_kernels", argv, device, str(dtype), args.rounds)
    about["arch"] = arch = architecture(device)
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    setting, entries = problems.Setting(dtype, device, {}, args.rounds, args.copies), {}
    for layer in problems.layers(args, dtype.itemsize):
        _, _, group, d = layer.sizes
        formula = chosen(group, d, dtype.itemsize, arch, {})
        entries.setdefault(entry(formula, dtype.itemsize), (formula, []))[1].append(layer)
    machine = [about["machine"], *(f"{name} {about[name]}" for name in ("torch", "triton")), about["date"]]
    table, rows = json.loads((target if target.stat().st_size else TUNED).read_text()), []
    for name, (formula, layers) in entries.items():
        tiles = candidates(formula, REHEARSAL if rehearsal else GRID)
        best, new = compare(name, tiles, layers, setting)
        table = merged(table, arch, ", ".join(machine), name, tiles[best], formula)
        rows += new
        harness.save(args, about, rows)
        write_json(target, table)  # an interrupted run keeps its entries
    print(f"\n{target.name}, {arch}: {json.dumps(table[arch]['tiles'])}; all other tiles are the formula's")
    return 0


def candidates(formula, grid):
    """{name: tile}: the formula's, then every combination of the grid."""
    tiles = [formula, *(formula | dict(zip(grid, values, strict=True)) for values in product(*grid.values()))]
    return {"BN {BN}, {num_stages} stages, {num_warps} warps".format(**tile): tile for tile in tiles}


def merged(table, arch, about, name, tile, formula):
    """The table with the entry `name` of an architecture: where the tile differs from the formula's, else no entry."""
    others = {key: values for key, values in table.get(arch, {}).get("tiles", {}).items() if key != name}
    new = {key: tile[key] for key in CHOICES if tile[key] != formula[key]}
    return table | {arch: {"about": about, "tiles": others | ({name: new} if new else {})}}


# ---------------------------------------------------------------- time


def compare(name, tiles, layers, setting):
    """Time the tiles {name: tile}, the formula's first, on all layers -> (name of the winner, rows of the table)."""
    formula, *_ = tiles
    rows = {tile: {"entry": name, "tile": tile, "right": True, "why": None, "bits": True} for tile in tiles}
    times = {tile: [] for tile in tiles}  # seconds per layer and round
    for number, layer in enumerate(layers):
        say(f"{name}: {layer.name}, {len(times)} candidates")
        found = timed({tile: tiles[tile] for tile in times}, layer, rows, setting)
        if formula not in found:
            why = rows[formula]["why"]
            raise InputError(f"the formula's tile fails ({why}); run bench_kernels.py without --tune first")
        times = {tile: [*times[tile], rounds] for tile, rounds in found.items()}
        for tile, rounds in found.items():
            rows[tile][f"us {number}"] = 1e6 * statistics.median(rounds)
        gc.collect()  # graphs and buffers, before the next layer's
    for tile, found in times.items():
        rows[tile] |= dict(zip(("speed", "first", "second"), speeds(found, times[formula]), strict=True))
    best = winner({tile: (row["speed"], row["first"], row["second"]) for tile, row in rows.items() if row["right"]})
    if best and (why := in_two_launches(layers[0], tiles[best], setting)):
        rows[best] |= {"right": False, "why": f"in two launches: {why}"}
        best = None
    columns = [(f"{layer.name.split(',')[0]} {number + 1}, us", f"us {number}") for number, layer in enumerate(layers)]
    shown = [(title, key, 1, 14, ".1f") for title, key in columns]
    shown += [(key, key, 1, 8, ".3f") for key in ("speed", "first", "second")] + [("error", "max_error", 1, 8, ".0e")]

    def notes(row):
        what = "same bits" if row["bits"] else "differs by rounding"
        return f"   {what}{', the formula' * (row['tile'] == formula)}{', chosen' * (row['tile'] == best)}"

    sizes = "; ".join(f"{number + 1}: {layer.name}" for number, layer in enumerate(layers))
    print(f"\n{name} ({sizes})", *harness.table(list(rows.values()), {"tile": 26}, shown, notes), sep="\n", flush=True)
    return best or formula, list(rows.values())


def timed(tiles, layer, rows, setting):
    """{tile: seconds of each round} of the tiles that are right on a layer; adds to `rows` what was found."""
    case, runs, failed = problem(layer, tiles, setting), {}, {}
    verdicts = {tile: judge(checks[:4]) for tile, checks in case.checks.items()}
    formula, *_ = tiles
    for tile, (why, error) in verdicts.items():
        row = rows[tile]
        if why:
            row |= {"right": None if "OutOfResources" in why else False, "why": why}  # too little shared memory
            continue
        same = verdicts[formula][0] is None and torch.equal(case.calls[tile][0](), case.calls[formula][0]())
        row |= {"bits": row["bits"] and same, "max_error": max(error, row.get("max_error", 0))}
        try:
            runs[tile], _ = harness.timer(case.calls[tile], setting.device)
        except Exception as broken:  # CUDA, Triton and ptxas have no common exception class
            failed[tile] = broken
    measured, late = harness.take_turns(runs, 1 + setting.rounds)
    for tile, broken in (failed | late).items():
        rows[tile] |= {"right": False, "why": harness.said(broken)}
    return {tile: rounds[1:] for tile, rounds in measured.items() if tile not in late}  # the first warms up


def speeds(times, formula):
    """Speed over the formula: median over all rounds, over the first half and over the second. Arguments: seconds per
    layer and round."""
    layers = [[b / a for a, b in zip(*pair, strict=True)] for pair in zip(times, formula, strict=True)]
    rounds = [statistics.geometric_mean(ratios) for ratios in zip(*layers, strict=True)]
    half = len(rounds) // 2
    return [statistics.median(part) for part in (rounds, rounds[: half or 1], rounds[half:])]


def winner(speeds):
    """The fastest of {name: (speed, first half, second half)} with a gain above GAIN in both halves, or None."""
    better = {name: speed for name, (speed, *halves) in speeds.items() if min(halves) > GAIN}
    return max(better, key=better.get, default=None)


def problem(layer, tiles, setting):
    """A Case with one provider per tile: a decode step over the layer, as in `problems.attention_case`."""
    b, hkv, _, d = layer.sizes
    row, longest = 2 * d * setting.dtype.itemsize, int(layer.lengths.max())
    case = problems.Case(row * (int(layer.lengths.sum()) + 2 * b * hkv), "")
    for i in range(problems.copies_for(setting, case.bytes, 3 * row * b * hkv * (layer.tokens + longest))):
        q, new, dense, arenas, (start, length, cap) = problems.make_copy(layer, setting, True, i)
        padded = [t[:, :, : longest + 1].clone() for t in dense]
        at = torch.arange(b * hkv, device=setting.device), length.long()
        problems.write(problems.places([t.flatten(0, 1) for t in padded], at, new))
        mask = torch.arange(longest + 1, device=setting.device) <= length[:, None]
        where = problems.places(arenas, start.long() + length, new)
        check = problems.attention_check((q, *padded, mask.view(b, hkv, 1, -1)), where)
        given = q, *new, *arenas, length, decode_plan(start, cap), d**-0.5
        for name, tile in tiles.items():
            case.add(name, partial(step, *given, tile=tile), check)
    return case


def step(*given, tile):
    from kernels.ragged_decode_triton import append_attend  # triton is an optional package

    return append_attend(*given, tile=tile)[0]


def in_two_launches(layer, tile, setting):
    """What is wrong with a tile in `ragged_decode`, or None. The step before stores the new token."""
    from kernels.ragged_decode_triton import attend

    def call(given):
        step(*given, tile=tile)
        q, _, _, k, v, length, plan, scale = given
        return attend(q[:, None], k, v, length + 1, plan, scale, tile=tile)[0][:, 0]

    case = problem(layer, {"step": tile}, replace(setting, copies=1))
    (check,), (run,) = case.checks["step"], case.calls["step"]
    return judge([lambda: check.func(lambda: call(run.args))])[0]
