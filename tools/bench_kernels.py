"""Time the kernels against alternatives in PyTorch and other libraries. A provider with a wrong result is not timed.

    python tools/bench_kernels.py                            # ragged_decode on this machine
    python tools/bench_kernels.py decode                     # whole decode steps of the demo model
    python tools/bench_kernels.py prefill                    # its prefill: cost of scoring, choosing and packing
    python tools/bench_kernels.py all --json out.json --csv out.csv
    python tools/bench_kernels.py ragged_decode --kernel my.py    # also time my.py::ragged_decode, or a copied file;
                                                                  # over 8-bit arenas too if it takes k_scale, v_scale
    python tools/bench_kernels.py --shapes gqa8 --mbytes 4 65     # size cases by MB of K and V per layer
    python tools/bench_kernels.py --layouts plphp zipf giant --retention 0.2    # other distributions over the heads
    python tools/bench_kernels.py --skew                     # equal bytes, one head 1, 2, 4 and 8 times the mean
    python tools/bench_kernels.py --base HEAD                # also time the kernels of the last commit
    python tools/bench_kernels.py --preset gpu --json gpu.json    # everything worth timing on a GPU, in minutes
    python tools/bench_kernels.py --tune                     # choose tiles of the decode kernels on this GPU

Each row is one provider on one case: median time of a call, 20th and 80th percentile, and

    speed      time of the baseline / time of the provider, median over rounds. Providers take turns in each round, so
               a machine that slows down affects all of them. Rows of ours end with the same ratio over the fastest
               other baseline and over --base, that of --kernel also over ours; `speeds` in --json has all ratios.
    ceiling    useful bytes per second as a fraction of the measured memory bandwidth, and in GB/s
    max error  largest absolute difference from a float64 reference

The command below a case's name repeats that case alone. A round calls every copy of the problem once. Each copy has
its own buffers, so that caches hold little of them (but a decode step reads the same model in every call).
On CUDA a round is one captured graph of at least 16 calls. All copies are checked before timing, two of them again
afterwards; a wrong provider gets no numbers. tools/plot_bench.py draws the output of --json.
"""

import io
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import partial
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels  # noqa: E402
from model import InputError  # noqa: E402
from model.checkpoint import DTYPES  # noqa: E402
from model.flags import choose_device  # noqa: E402
from tools import harness, problems, tune  # noqa: E402
from tools.command import as_command, exit_code, flags, imported, number, one_line, one_of, unwritable  # noqa: E402
from tools.harness import judge, said  # noqa: E402
from tools.problems import DEFAULT_SHAPES, LAYOUTS, Setting, layers, layouts_of  # noqa: E402
from tools.shapes import LAYERS  # noqa: E402

ATTENTION = ("ragged_decode", "ragged_decode_append")
OPS = (*ATTENTION, "window_scores", "ragged_pack", "prefill", "decode")
LAUNCHERS = {  # functions of kernels/*_triton.py
    "ragged_decode": "attend", "ragged_decode_append": "append_attend", "window_scores": "scores",
    "ragged_pack": "pack",
}  # fmt: skip
QUICK = "--copies 2 --rounds 2"
NOISY = 1.5  # 80th percentile of the rounds over the 20th
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
    p.add_argument("--tokens", nargs="+", type=number(int, 1), metavar="T",
                   help="before pruning (default 640, on CUDA also 2048)")
    p.add_argument("--mbytes", nargs="+", type=positive, metavar="MB",
                   help="kept K and V per layer, instead of --tokens; adds sequences to stay below 32k tokens per head")
    p.add_argument("--retention", nargs="+", type=number(float, 0, 1, open_low=True), default=[1.0, 0.3], metavar="F")
    p.add_argument("--layouts", nargs="+", metavar="LAYOUT",
                   help="how a layer's kept rows are distributed over its heads, with equal totals: equal; ragged, "
                        "0.25 to 1.75 times the mean; plphp, PLPHP's three rates over several sequences, or plphp-ada "
                        "over the heads of one; zipf, 1/rank; giant, one head keeps everything, the others share the "
                        "rest (default equal and ragged)")
    p.add_argument("--skew", nargs="*", type=number(float, 1), metavar="R",
                   help="instead of --retention: one head R times as long as the mean, total bytes fixed "
                        "(default 1 2 4 8)")
    p.add_argument("--dtype", choices=DTYPES, help="default fp32 on a CPU, bf16 on CUDA")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=number(int, 1), default=15, help="timed rounds (default 15)")
    p.add_argument("--copies", type=number(int, 1), help="copies of each problem (default: more than the cache holds)")
    p.add_argument("--only", metavar="TITLE", help="time only this case, written as in the output: OP: NAME")
    p.add_argument("--kernel", metavar="FILE.py", help="also time the function of the op's name in this file, or a "
                   "changed copy of a kernels/*_triton.py")
    p.add_argument("--base", metavar="REV", help="also time the kernels of this commit (not for prefill and decode)")
    p.add_argument("--no-flex", action="store_true", help="skip FlexAttention, which compiles for every case")
    p.add_argument("--tune", action="store_true",
                   help="time other tiles of the decode kernels and write the faster ones to kernels/tuned.json")
    p.add_argument("--out", metavar="FILE", help="write the table of --tune to this file instead")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--csv", metavar="FILE")
    # fmt: on
    return p


# ---------------------------------------------------------------- which cases


def cases(args, setting):
    """Yield (title of the case, function that builds it)."""
    for op in args.ops:
        shapes = args.shapes or (("demo",) if op == "prefill" else DEFAULT_SHAPES)
        if op in ATTENTION:
            for layer in layers(args, setting.dtype.itemsize):
                yield f"{op}: {layer.name}", partial(problems.attention_case, op, layer, setting)
        elif op == "window_scores":
            for shape, tokens in product(shapes, args.tokens):
                build = partial(problems.scores_case, shape, tokens, setting)
                yield f"{op}: {shape}, {tokens} tokens, 1 rows", build
        elif op == "ragged_pack":
            for shape, tokens, kept in product(shapes, args.tokens, args.retention):
                build = partial(problems.pack_case, shape, tokens, kept, setting)
                yield f"{op}: {shape}, {tokens} tokens, {kept:g} kept", build
        elif op == "prefill":
            for shape, tokens in product(shapes, args.tokens):
                model = "demo model" if shape == "demo" else "2 layers of the 7B shape"
                build = partial(problems.prefill_case, shape, tokens, setting)
                yield f"{op}: {model}, prefill of {tokens} tokens", build
        else:
            for tokens, kept in product(args.tokens, args.retention):
                for layout in layouts_of(args, kept):
                    build = partial(problems.step_case, tokens, kept, layout, setting)
                    yield f"{op}: demo model, 1 x {tokens} tokens, {kept:g} kept, {layout}", build


# ---------------------------------------------------------------- check, time, print


def measure(about, case, rounds, bandwidth, device):
    """Rows of one case, one per provider. about: the first columns."""
    verdicts = {name: judge(checks, case.place) for name, checks in case.checks.items()}
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
        wrong[name] = said(broken[name]) if name in broken else judge(case.checks[name][:2], case.place)[0]
    times = {name: found[1:] for name, found in times.items() if not wrong[name]}  # the first round warms up
    about |= {"shape": case.shape, "layout": case.layout, "megabytes": case.bytes / 1e6, "baseline": case.baseline}
    rows = []
    for name, why in [*wrong.items(), *case.missing.items()]:
        right = name in times or (None if name in case.missing else False)
        row = about | {"provider": name, "guest": name in case.guests, "right": right, "why": why}
        if right:
            low, median, high = (1e6 * t for t in harness.spread(times[name]))
            size = case.sizes.get(name, case.bytes)
            useful = None if name == case.reads_more or not size else size / (1e-6 * median)  # bytes/s
            own = name not in case.rivals and not name.startswith("ours, ")  # from --kernel
            over = [
                other
                for other in times
                if other in case.rivals
                or (own and other.startswith("ours, ") and case.sizes.get(other) == case.sizes.get(name))
            ]
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
    """The end of a row's line: more ratios, those of a skew sweep, whether it could not be captured or is noisy."""
    line = "".join(f"   {row['speeds'][rival]:.2f} x {rival}" for rival in strongest(row))
    if "over_uniform" in row:
        line += f"   {row['over_uniform']:5.2f} x the time at equal lengths"
    if device.type == "cuda" and not row["graph"]:
        line += "   (no CUDA graph: it synchronises)"
    if row["p80_us"] > NOISY * row["p20_us"]:
        line += f"   noisy: {row['p80_us'] / row['p20_us']:.1f} x between rounds"
    return line


def strongest(row):
    """Providers to compare a row of ours with: the fastest rival besides the baseline, the same backend of --base, and
    for the function of --kernel all of our backends."""
    if row["provider"] in row["speeds"]:
        return []
    _, _, backend = row["provider"].partition("ours")  # ", torch"
    ours = [name for name in row["speeds"] if name.startswith(("ours, ", "base "))]
    others = row["speeds"].keys() - {row["baseline"], *ours}
    return [*sorted(others, key=row["speeds"].get)[:1], *(name for name in ours if name.endswith(backend))]


def one_case(title, build, again, setting, bandwidth, uniform):
    """Build, time and print one case -> its rows. Its buffers are freed on return. again: its command."""
    (op, _, name), case = title.partition(": "), build()
    print(f"\n{title}, {case.bytes / 1e6:.2f} MB\n  {again}", flush=True)
    rows = measure({"op": op, "case": name, "repro": again}, case, setting.rounds, bandwidth, setting.device)
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
    for name in ("ops", "preset", "kernel", "base", "only", "csv"):
        if given.tune and getattr(given, name):
            raise InputError(
                f"--tune does not use {name}; leave it out (--shapes, --mbytes and --layouts set the cases)"
            )
    if given.out and not given.tune:
        raise InputError("--out is the table of --tune; give both, or --json for times")
    lines = [shlex.split(line) for line in PRESETS[given.preset]] if given.preset else [[]]
    lines = [shlex.split(tune.CASES)] if given.tune else lines
    if given.base and (whole := {"prefill", "decode"} & set(given.ops)):
        raise InputError(f"--base is not for {' and '.join(sorted(whole))}; time them without it")
    found = [parser().parse_args(line + argv) for line in lines]
    for args in found:
        args.tokens = args.tokens or ([640, 2048] if args.device.startswith("cuda") else [640])
        args.ops = list(OPS) if "all" in args.ops else args.ops or ["ragged_decode"]
        args.skew = [1.0, 2.0, 4.0, 8.0] if args.skew == [] else args.skew
        if "prefill" in args.ops and set(args.shapes or ()) - {"demo", "7b"}:
            raise InputError(f"prefill has no shape {' '.join(args.shapes)}; use demo, 7b")
        if unknown := set(args.layouts or ()) - set(() if args.skew else LAYOUTS):
            raise InputError(f"no layout {' '.join(sorted(unknown))}; use {', '.join(LAYOUTS)}, none with --skew")
    return found


def repeated(argv, setting, title):
    """The command that repeats one case of the run with these arguments."""
    dropped = flags(None)  # files, which the command does not overwrite, and what is added below
    for flag in ("--json", "--csv", "--base", "--only"):
        dropped.add_argument(flag)
    _, words = dropped.parse_known_args(argv)
    words += ["--base", setting.base[1]] if setting.base else []  # the hash, because HEAD moves
    interpreter = "" if problems.triton_name(setting.device) == "triton" else "TRITON_INTERPRET=1 "
    return interpreter + shlex.join(["python", "tools/bench_kernels.py", *words, "--only", title])


def load_own(path, ops, folder):
    """op -> (file name, function, package of kernels that it belongs to), from the --kernel file.

    A function with the op's name is called as it is. A copy of a kernels/*_triton.py has a launcher instead; it takes
    that file's place in a copy of the package, made in the folder. InputError for a file with neither.
    """
    if path is None:
        return {}
    name = Path(path).stem
    module = imported(f"kernels.own_{name}", path, "give --kernel FILE.py")  # so that it may import `.backend`
    own = {op: (name, getattr(module, op), kernels) for op in ops if callable(getattr(module, op, None))}
    launchers = {op: LAUNCHERS[op] for op in ops & LAUNCHERS.keys() - own.keys()}
    copied = {op: launcher for op, launcher in launchers.items() if callable(getattr(module, launcher, None))}
    if not own | copied:
        wanted = ", ".join(sorted({*ops, *launchers.values()}))
        raise InputError(f"{path} has none of {wanted}; name the function after the op, or copy kernels/*_triton.py")
    if copied:
        package = Path(shutil.copytree(Path(kernels.__file__).parent, Path(folder) / "own"))
        for shipped in package.glob("*_triton.py"):
            if any(f"\ndef {launcher}(" in shipped.read_text() for launcher in copied.values()):
                shutil.copy(path, shipped)
        package = imported(f"own_{Path(folder).name}", package / "__init__.py", f"{path} does not fit; mend it")
        own |= {op: (name, partial(getattr(package, op), backend="triton"), package) for op in copied}
    return own


def kernels_of(rev, folder):
    """(rev, its hash, its package of kernels) for a commit of this repository. Writes the package's files to a folder,
    where triton reads the source when a kernel is first called."""
    wanted = f"--base {rev} is not a commit with kernels"
    sha = git(wanted, "rev-parse", "--verify", "--short", "--end-of-options", f"{rev}^{{commit}}").decode().strip()
    zipfile.ZipFile(io.BytesIO(git(wanted, "archive", "--format=zip", sha, "kernels"))).extractall(folder)
    path = Path(folder) / "kernels" / "__init__.py"
    return rev, sha, imported(f"base_{Path(folder).name}", path, f"{rev} does not fit; give another --base")


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
    if args.tune:
        return tune.tune(args, argv, device, dtype)
    with tempfile.TemporaryDirectory(prefix="kernels_") as folder:  # of --kernel and --base
        own = load_own(args.kernel, {op for part in parts for op in part.ops}, folder)
        base = kernels_of(args.base, folder) if args.base else None
        settings = [Setting(dtype, device, own, part.rounds, part.copies, base, not part.no_flex) for part in parts]
        todo = [(*case, s) for part, s in zip(parts, settings, strict=True) for case in cases(part, s)]
        work = [case for case in todo if args.only in (None, case[0])]
        if not work:
            raise InputError(f"--only {args.only} is none of the cases; copy a title from the output")
        if wrong := unwritable(args.json, args.csv):
            raise InputError(wrong)
        about = harness.about_run("bench_kernels", argv, device, str(dtype), args.rounds)
        about |= {"base": base[1]} if base else {}
        print(", ".join(f"{k} {v}" for k, v in about.items()))
        rows, uniform = [], {}
        for i, (title, build, setting) in enumerate(work, 1):
            print(f"case {i} of {len(work)}: {title}", file=sys.stderr)
            again, bandwidth = repeated(argv, setting, title), 1e9 * about["bandwidth_GBps"]
            rows += one_case(title, build, again, setting, bandwidth, uniform)
            harness.save(args, about, rows)
    print(f"\n{time.perf_counter() - begin:.0f} s")
    failed = [row for row in rows if row["right"] is False and not row["guest"]]
    if failed:
        first = failed[0]
        print(f"no right result in {len(failed)} rows, first {first['provider']}: {first['why']}", file=sys.stderr)
    return 1 if failed else 0


def main(argv=None):
    return exit_code(bench, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(as_command(main))
