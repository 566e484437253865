"""Time the kernels against alternatives in PyTorch and other libraries. A provider with a wrong result is not timed.

    python tools/bench_kernels.py                            # ragged_decode on this machine
    python tools/bench_kernels.py decode                     # whole decode steps of the demo model
    python tools/bench_kernels.py prefill                    # its prefill: cost of scoring, choosing and packing
    python tools/bench_kernels.py all --json out.json --csv out.csv
    python tools/bench_kernels.py ragged_decode --kernel my.py    # also time my.py::ragged_decode
    python tools/bench_kernels.py --shapes gqa8 --mbytes 4 65     # size cases by MB of K and V per layer
    python tools/bench_kernels.py --layouts plphp zipf giant --retention 0.2    # other distributions over the heads
    python tools/bench_kernels.py --skew                     # equal bytes, one head 1, 2, 4 and 8 times the mean
    python tools/bench_kernels.py --base HEAD                # also time the kernels of the last commit
    python tools/bench_kernels.py --preset gpu --json gpu.json    # everything worth timing on a GPU, in minutes

Each row is one provider on one case: median time of a call, 20th and 80th percentile, and

    speed      time of the baseline / time of the provider, median over rounds. Providers take turns in each round, so
               a machine that slows down affects all of them. Rows of ours end with the same ratio over the fastest
               other baseline and over --base, that of --kernel also over ours; `speeds` in --json has all ratios.
    ceiling    useful bytes per second as a fraction of the measured memory bandwidth, and in GB/s
    max error  largest absolute difference from a float64 reference

The command below a case's name reproduces that case alone. A round calls every copy of the problem once. Each copy has
its own buffers, so that caches hold little of them (but a decode step reads the same model in every call).
On CUDA a round is one captured graph of at least 16 calls. All copies are checked before timing, two of them again
afterwards; a wrong provider gets no numbers. tools/plot_bench.py draws the output of --json.
"""

import importlib.util
import io
import itertools
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import InputError  # noqa: E402
from model.checkpoint import DTYPES  # noqa: E402
from model.flags import choose_device  # noqa: E402
from tools import harness, problems  # noqa: E402
from tools.command import as_command, exit_code, flags, number, one_line, one_of, unwritable  # noqa: E402
from tools.harness import judge, said  # noqa: E402
from tools.problems import DEFAULT_SHAPES, LAYOUTS, Setting, layers, layouts_of  # noqa: E402
from tools.shapes import LAYERS  # noqa: E402

ATTENTION = ("ragged_decode", "ragged_decode_append")
OPS = (*ATTENTION, "window_scores", "ragged_pack", "prefill", "decode")
QUICK = "--copies 2 --rounds 2"
# Command lines, the most informative first; flags given beside --preset override them. FlexAttention compiles for
# seconds in every case, so only the first line times it.
PRESETS = {
    "gpu": (
        "ragged_decode_append --shapes 7b gqa8 --mbytes 4 17 65 130 512 --retention 0.2 --layouts plphp",
        "ragged_decode --shapes 7b gqa8 --mbytes 4 17 65 130 512 --retention 0.2 --layouts plphp --no-flex",
        "ragged_decode_append --shapes 7b gqa8 --mbytes 65 --skew 1 2 4 8 --no-flex",
        "ragged_decode_append --shapes 'gqa8 x 8' --mbytes 65 --retention 0.2 --layouts plphp --no-flex",
        "ragged_decode_append --shapes qwen g8 --mbytes 17 --retention 0.2 --layouts plphp --no-flex",
        "ragged_decode_append --shapes 7b gqa8 --mbytes 17 --retention 0.2 --layouts equal zipf --no-flex",
        "ragged_decode_append --shapes 7b gqa8 --mbytes 65 --retention 0.05 --layouts giant --no-flex",
        "window_scores ragged_pack --shapes 7b gqa8 --tokens 2048 8192 --retention 0.3",
        "prefill --tokens 640 2900",
    ),
    "smoke": (
        f"ragged_decode ragged_decode_append --shapes demo qwen g8 --tokens 40 --retention 0.3 --no-flex {QUICK}",
        f"ragged_decode ragged_decode_append --shapes demo --mbytes 0.03 0.1 --retention 0.5 --no-flex {QUICK}",
        f"ragged_decode --shapes demo --tokens 40 --retention 0.3 --layouts plphp zipf giant {QUICK}",
        f"ragged_decode ragged_decode_append --shapes demo --tokens 40 --skew 1 2 --no-flex {QUICK}",
        f"window_scores ragged_pack --shapes demo --tokens 40 --retention 0.3 {QUICK}",
        f"prefill --tokens 40 {QUICK}",
    ),
}


def parser():
    p, positive = flags(__doc__), number(float, 0, open_low=True)
    # fmt: off
    p.add_argument("ops", nargs="*", metavar="OP", type=one_of(*OPS, "all"),
                   help=f"{', '.join(OPS)} or all (default ragged_decode)")
    p.add_argument("--preset", choices=PRESETS, help="a set of ops and cases: gpu (minutes) or smoke (quick test)")
    p.add_argument("--shapes", nargs="+", choices=LAYERS, metavar="SHAPE",
                   help="default demo, 7b, gqa8; prefill: demo (default, the model) or 7b (two layers of that shape)")
    p.add_argument("--tokens", nargs="+", type=number(int, 1), default=[640, 2048], metavar="T", help="before pruning")
    p.add_argument("--mbytes", nargs="+", type=positive, metavar="MB",
                   help="kept K and V per layer, instead of --tokens; adds sequences to stay below 32k tokens per head")
    p.add_argument("--retention", nargs="+", type=number(float, 0, 1, open_low=True), default=[1.0, 0.3], metavar="F")
    p.add_argument("--layouts", nargs="+", metavar="LAYOUT",
                   help="how a layer's kept rows are distributed over its heads, with equal totals: equal; ragged, "
                        "0.25 to 1.75 times the mean; plphp, PLPHP's three rates over several sequences, or plphp-ada "
                        "over the heads of one; zipf, 1/rank; giant, one head keeps everything, the others share the "
                        "rest (default equal and ragged). With --skew: the cases of the sweep, such as 'skew 4'")
    p.add_argument("--skew", nargs="*", type=number(float, 1), metavar="R",
                   help="instead of --retention: one head R times as long as the mean, total bytes fixed "
                        "(default 1 2 4 8)")
    p.add_argument("--dtype", choices=DTYPES, help="default fp32 on a CPU, bf16 on CUDA")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=number(int, 1), default=15, help="timed rounds (default 15)")
    p.add_argument("--copies", type=number(int, 1), help="copies of each problem (default: more than the cache holds)")
    p.add_argument("--kernel", metavar="FILE.py", help="also time the function of the op's name in this file")
    p.add_argument("--base", metavar="REV", help="also time the kernels of this commit (not for prefill and decode)")
    p.add_argument("--no-flex", action="store_true", help="skip FlexAttention, which compiles for every case")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--csv", metavar="FILE")
    # fmt: on
    return p


# ---------------------------------------------------------------- which cases


def cases(args, setting):
    """Yield (function that builds a Case, op and flags that select only this case)."""
    for op in args.ops:
        if op in ATTENTION:
            for layer in layers(args, setting.dtype.itemsize):
                yield partial(problems.attention_case, op, layer, setting), [op, *layer.flags]
            continue
        shapes = args.shapes or (("demo",) if op == "prefill" else DEFAULT_SHAPES)
        for shape, tokens in itertools.product(("demo",) if op == "decode" else shapes, args.tokens):
            selected = [op, "--shapes", shape, "--tokens", tokens]
            if op in ("window_scores", "prefill"):
                build = problems.scores_case if op == "window_scores" else problems.prefill_case
                yield partial(build, shape, tokens, setting), selected
                continue
            for retention in args.retention:
                more = [*selected, "--retention", retention]
                if op == "ragged_pack":
                    yield partial(problems.pack_case, shape, tokens, retention, setting), more
                    continue
                for layout in layouts_of(args, retention):
                    build = partial(problems.step_case, tokens, retention, layout, args.rounds, setting)
                    yield build, [*more, "--layouts", layout]


# ---------------------------------------------------------------- check, time, print


def measure(op, case, rounds, bandwidth, device, again):
    """Rows of one case, one per provider. again: the command that reproduces the case."""
    verdicts = {name: judge(checks) for name, checks in case.checks.items()}
    wrong = {name: why for name, (why, _) in verdicts.items()}
    runs, graphs, broken = {}, {}, {}
    for name in [name for name in case.calls if not wrong[name]]:
        try:
            runs[name], graphs[name] = harness.timer(case.calls[name], device, case.repeatable)
        except Exception as why:  # a third-party kernel may raise anything
            broken[name] = why
    times, late = harness.take_turns(runs, 1 + rounds)
    broken |= late
    for name in times | broken:  # check again
        wrong[name] = said(broken[name]) if name in broken else judge(case.checks[name][:2])[0]
    times = {name: found[1:] for name, found in times.items() if not wrong[name]}  # the first round warms up
    about = {"op": op, "case": case.name, "shape": case.shape, "layout": case.layout, "megabytes": case.bytes / 1e6}
    about |= {"repro": again, "baseline": case.baseline}
    rows = []
    for name, why in [*wrong.items(), *case.missing.items()]:
        right = name in times or (None if name in case.missing else False)
        row = about | {"provider": name, "guest": name in case.guests, "right": right, "why": why}
        if right:
            low, median, high = (1e6 * t for t in harness.spread(times[name]))
            useful = None if name == case.reads_more or not case.bytes else case.bytes / (1e-6 * median)  # bytes/s
            own = name not in case.rivals and not name.startswith("ours, ")  # from --kernel
            over = [other for other in times if other in case.rivals or (own and other.startswith("ours, "))]
            speeds = {other: times_over(times[other], times[name]) for other in over}
            row |= {"us": median, "p20_us": low, "p80_us": high, "speed": speeds.get(case.baseline), "speeds": speeds}
            row |= {"GBps": useful and useful / 1e9, "ceiling": useful and useful / bandwidth}
            row |= {"max_error": verdicts[name][1], "graph": graphs[name]}
        rows.append(row)
    return rows


def times_over(times, others):
    """Median over the rounds of times / others."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def against_uniform(rows, uniform):
    """Add to the rows of a skew sweep the ratio of their time to that at equal lengths, which `uniform` stores."""
    for row in [row for row in rows if row["right"] and row["layout"].startswith("skew")]:
        key = row["op"], row["case"].removesuffix(row["layout"]), row["provider"]
        if row["layout"] == "skew 1":
            uniform[key] = row["us"]
        if key in uniform:
            row["over_uniform"] = row["us"] / uniform[key]


COLUMNS = (  # title, key, factor, width, format
    ("us", "us", 1, 10, ".1f"), ("20 %", "p20_us", 1, 10, ".1f"), ("80 %", "p80_us", 1, 10, ".1f"),
    ("speed", "speed", 1, 7, ".2f"), ("ceiling", "ceiling", 1, 8, ".1%"), ("GB/s", "GBps", 1, 7, ".1f"),
    ("max error", "max_error", 1, 10, ".1e"),
)  # fmt: skip


def notes(row, device):
    """The end of a row's line: more ratios, those of a skew sweep, whether it could not be captured."""
    line = "".join(f"   {row['speeds'][rival]:.2f} x {rival}" for rival in strongest(row))
    if "over_uniform" in row:
        line += f"   {row['over_uniform']:5.2f} x the time at equal lengths"
    if device.type == "cuda" and not row["graph"]:
        line += "   (no CUDA graph: it synchronises)"
    return line


def strongest(row):
    """Providers to compare a row of ours with: the fastest rival besides the baseline, --base, and for the function of
    --kernel also our backends."""
    if row["provider"] in row["speeds"]:
        return []
    ours = [name for name in row["speeds"] if name.startswith(("ours, ", "base "))]
    others = row["speeds"].keys() - {row["baseline"], *ours}
    return [*sorted(others, key=row["speeds"].get)[:1], *ours]


def one_case(build, selected, args, setting, bandwidth, uniform):
    """Build, time and print one case -> its rows. Its buffers are freed on return."""
    case, again = build(), command(selected, args, setting)
    print(f"\n{selected[0]}: {case.name}, {case.bytes / 1e6:.2f} MB\n  {again}", flush=True)
    rows = measure(selected[0], case, args.rounds, bandwidth, setting.device, again)
    against_uniform(rows, uniform)
    names = {"provider": max(27, *(len(row["provider"]) for row in rows))}
    print("\n".join(harness.table(rows, names, COLUMNS, partial(notes, device=setting.device))), flush=True)
    return rows


# ---------------------------------------------------------------- the command line


def parsed(argv):
    """One Namespace per command line of the preset; without a preset, one for argv."""
    given = parser().parse_args(argv)
    if given.preset and given.ops:
        raise InputError(f"--preset {given.preset} already selects the ops; give either a preset or ops")
    lines = [shlex.split(line) for line in PRESETS[given.preset]] if given.preset else [[]]
    if given.base and (whole := {"prefill", "decode"} & set(given.ops)):
        raise InputError(f"--base is not for {' and '.join(sorted(whole))}; time them without it")
    found = [parser().parse_args(line + argv) for line in lines]
    for args in found:
        args.ops = list(OPS) if "all" in args.ops else args.ops or ["ragged_decode"]
        args.skew = [1.0, 2.0, 4.0, 8.0] if args.skew == [] else args.skew
        if "prefill" in args.ops and set(args.shapes or ()) - {"demo", "7b"}:
            raise InputError(f"prefill has no shape {' '.join(args.shapes)}; use demo, 7b")
        known = [f"skew {ratio:g}" for ratio in sorted({1.0, *args.skew})] if args.skew else LAYOUTS
        if unknown := [layout for layout in args.layouts or () if layout not in known]:
            where = " in this --skew sweep" if args.skew else ""
            raise InputError(f"unknown layout {unknown[0]!r}{where}; use {', '.join(known)}")
    return found


def command(selected, args, setting):
    """The command that runs one case alone. selected: from `cases`."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == setting.dtype)
    words = ["python", "tools/bench_kernels.py", *selected, "--dtype", dtype, "--device", setting.device]
    words += ["--rounds", args.rounds, *(["--no-flex"] if args.no_flex else [])]
    base = setting.base and setting.base[1]  # the hash, because HEAD moves
    for flag, value in (("--copies", args.copies), ("--kernel", args.kernel), ("--base", base)):
        words += [flag, value] if value else []
    interpreter = "" if problems.triton_name(setting.device) == "triton" else "TRITON_INTERPRET=1 "
    return interpreter + shlex.join(map(str, words))


def load_own(path, ops):
    """Functions of the --kernel file: op -> (file name, function). InputError if there are none."""
    if path is None:
        return {}
    if not Path(path).is_file() or Path(path).suffix != ".py":
        raise InputError(f"{path} is not a Python file; give --kernel FILE.py")
    name = Path(path).stem
    try:
        module = imported(f"own_{name}", path)
    except Exception as broken:
        raise InputError(f"cannot import {path} ({type(broken).__name__}: {broken}); fix the file") from broken
    own = {op: (name, getattr(module, op)) for op in ops if callable(getattr(module, op, None))}
    if not own:
        raise InputError(f"{path} defines none of {', '.join(ops)}; name the function after the op")
    return own


def imported(name, path):
    """Import the module, or the package with this __init__.py, from a path."""
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # triton looks up a kernel's module; relative imports look up the package
    found.loader.exec_module(module)
    return module


def kernels_of(rev, folder):
    """(rev, its hash, its package of kernels) for a commit of this repository. Writes the package's files to a folder,
    where triton reads the source when a kernel is first called."""
    wanted = f"--base {rev} is not a commit with kernels"
    sha = git(wanted, "rev-parse", "--verify", "--short", "--end-of-options", f"{rev}^{{commit}}").decode().strip()
    zipfile.ZipFile(io.BytesIO(git(wanted, "archive", "--format=zip", sha, "kernels"))).extractall(folder)
    try:
        return rev, sha, imported(Path(folder).name, Path(folder) / "kernels" / "__init__.py")
    except Exception as broken:
        raise InputError(f"cannot import the kernels of {rev} ({said(broken)}); give another commit") from broken


def git(wanted, *words):
    """Output of git, bytes. wanted: beginning of the error message if git fails."""
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as broken:
        why = getattr(broken, "stderr", b"").decode(errors="replace") or broken
        raise InputError(f"{wanted} ({one_line(why)}); choose one from git log -- kernels") from None


@torch.inference_mode()
def bench(argv):
    """Run all cases -> the exit code: 1 if a provider that is not a guest was wrong."""
    begin, parts = time.perf_counter(), parsed(argv)
    args, device = parts[0], choose_device(parts[0].device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams, events and graphs belong to the current device
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    own = load_own(args.kernel, {op for part in parts for op in part.ops})
    with tempfile.TemporaryDirectory(prefix="kernels_of_base_") as folder:
        base = kernels_of(args.base, folder) if args.base else None
        if wrong := unwritable(args.json, args.csv):
            raise InputError(wrong)
        about = harness.about_run("bench_kernels", argv, device, str(dtype), args.rounds)
        about |= {"base": base[1]} if base else {}
        print(", ".join(f"{k} {v}" for k, v in about.items()))
        rows, uniform = [], {}
        for part in parts:
            setting = Setting(dtype, device, own, part.copies, base, not part.no_flex)
            for build, selected in cases(part, setting):
                rows += one_case(build, selected, part, setting, 1e9 * about["bandwidth_GBps"], uniform)
                harness.save(args, about, rows)
    print(f"\n{time.perf_counter() - begin:.0f} s")
    return 1 if any(row["right"] is False and not row["guest"] for row in rows) else 0


def main(argv=None):
    return exit_code(bench, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(as_command(main))
