"""Plot the results of tools/bench_kernels.py --json or tools/bench_decode.py --json.

    python tools/plot_bench.py gpu.json --out gpu.png
    python tools/plot_bench.py a.json b.json --op ragged_decode --shape 7b --layout equal --out b.png
    python tools/plot_bench.py decode.json --out decode.png

bench_decode.py: decode speed relative to transformers, one panel per workload on one scale. A black line marks the
speed of the same engine unpruned times the reduction in bytes. It is an expectation, not a bound: a step that is far
from the memory bandwidth may gain more or less.

bench_kernels.py, left: share of the memory bandwidth that the kept bytes reach, over MB of K and V per layer. Right,
with a --skew sweep: time relative to equal lengths at the same bytes. All axes are logarithmic. Each provider has one
line and always the same colour. If a case was measured twice, the later row counts.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.command import as_command, flags  # noqa: E402
from tools.figures import new  # noqa: E402

# Okabe and Ito's colours, which colour-blind people can distinguish; markers and dashes differ too
STYLES = {
    "ours, triton": ("#D55E00", "o", "-"),
    "ours, triton (interpreted)": ("#D55E00", "o", ":"),
    "ours, torch": ("#E69F00", "s", "--"),
    "sdpa, all tokens": ("#000000", "x", ":"),
    "sdpa, rectangle": ("#0072B2", "^", "-"),
    "sdpa, padded + mask": ("#56B4E9", "v", "--"),
    "varlen, heads as batch": ("#009E73", "D", "-"),
    "adakv-style": ("#CC79A7", "P", "--"),
    "flex attention": ("#999933", "<", "-."),  # these two from Paul Tol's palette
    "flashinfer": ("#882255", ">", "-"),
    "compactor-style": ("#332288", "p", "--"),
    "fastdms-style": ("#117733", "h", "-."),
}
BASES = {"triton": ("#D55E00", "1", ":"), "torch": ("#E69F00", "2", ":")}  # our kernels at another commit: dotted
OTHERS = ("#777777", "*", "-.")
RIVALS = {  # provider: its name in the tables and figures of the pages
    "flex attention": "FlexAttention",
    "sdpa, padded + mask": "SDPA, padded",
    "adakv-style": "a copy per step (AdaKV)",
    "sdpa, all tokens": "SDPA, nothing dropped",
}
ENGINES = {"ours": "#E69F00", "ours-compile": "#D55E00"}  # engines of bench_decode.py; others are grey
NAMES = ("op", "case", "provider", "workload", "engine", "prune")  # fields that identify a row


def read(paths):
    """(about, timed rows) of all files. SystemExit if they are not all from one machine, dtype and model."""
    abouts, rows = [], {}
    for path in paths:
        try:
            data = json.loads(Path(path).read_bytes())
            abouts.append(data["about"])
            timed = [row for row in data["rows"] if "us" in row or "ms_per_token" in row]
        except (OSError, ValueError, KeyError, TypeError) as wrong:
            raise SystemExit(f"error: {path} is not the --json file of a benchmark ({wrong}); give one") from None
        rows |= {tuple(row.get(part) for part in NAMES): row for row in timed}
    if len({"ms_per_token" in row for row in rows.values()}) > 1:
        raise SystemExit("error: the files come from both benchmarks; plot one at a time")
    for key in ("machine", "dtype", "model"):
        if len({about.get(key) for about in abouts}) > 1:
            raise SystemExit(f"error: the files differ in {key}; plot one {key} at a time")
    return abouts[-1], list(rows.values())


def chosen(rows, args):
    """(op, shape, layout) to plot, from the flags and the rows."""
    op = args.op or next((row["op"] for row in rows if row["shape"]), None)
    rows = [row for row in rows if row["op"] == op and row["layout"]]
    shape = args.shape or most((row["shape"], row["megabytes"]) for row in rows)
    rows = [row for row in rows if row["shape"] == shape]
    plain = [row for row in rows if not row["layout"].startswith("skew")]
    layout = args.layout or most((row["layout"], row["case"]) for row in sorted(plain, key=lambda r: r["layout"]))
    if not rows or (args.layout and not any(row["layout"] == layout for row in plain)):
        asked = ", ".join(filter(None, (args.op, args.shape, args.layout))) or "attention over a layer"
        raise SystemExit(f"error: no timed rows for {asked} in {', '.join(args.files)}; measure it first")
    return op, shape, layout


def most(pairs):
    """The name with the most different values among (name, value) pairs; of several the last, None without pairs."""
    seen = defaultdict(set)
    for name, value in pairs:
        seen[name].add(value)
    return max(reversed(seen), key=lambda name: len(seen[name]), default=None)


def lines(rows, x, y):
    """provider -> sorted points (x(row), y(row)), in the order of STYLES, then the others."""
    found = defaultdict(dict)
    for row in rows:
        if y(row) is not None:
            found[row["provider"]][x(row)] = y(row)
    order = [*STYLES, *found]
    return {name: sorted(found[name].items()) for name in sorted(found, key=order.index)}


def style(name):
    """Colour, marker and dash of a provider. Providers of --base are named "base REV, backend"."""
    if name.startswith("base "):
        return BASES.get(name.split(", ")[-1].split(" (")[0], OTHERS)
    return STYLES.get(name, OTHERS)


def apart(values):
    """Drop sorted values less than a fifth larger than the one kept before, so that labels do not overlap."""
    kept = []
    for value in values:
        if not kept or value > 1.2 * kept[-1]:
            kept.append(value)
    return kept


def figure(about, rows, op, shape, layout):
    """One panel, or two with a skew sweep."""
    rows = [row for row in rows if row["op"] == op and row["shape"] == shape]
    cases = [row for row in rows if row["layout"] == layout]
    swept = [row for row in rows if row["layout"].startswith("skew")]
    sizes = lines(cases, lambda row: row["megabytes"], lambda row: row["ceiling"] and 100 * row["ceiling"])
    skews = lines(swept, lambda row: float(row["layout"].split()[1]), lambda row: row.get("over_uniform"))
    page, panels = new(1 + bool(sizes and skews), 4.5)
    if sizes:  # without a line: providers that read dropped tokens too
        missing = absent("not drawn, it reads all", skews, sizes)
        draw(panels[0], sizes, 10, [0.1, 1, 10, 100], f"by size; {lengths_of(layout, cases)}")
        panels[0].set(xlabel=f"MB of K and V kept per layer (log){missing}", ylabel="share of the bandwidth, % (log)")
    if skews:
        times = [y for line in skews.values() for _, y in line]
        ticks = [2.0**i for i in range(-10, 11) if min(times) / 2 < 2.0**i < 2 * max(times)]
        missing = absent("not measured here", sizes, skews)
        draw(panels[-1], skews, 2, ticks, "by skew; one head longer,\nthe same bytes")
        panels[-1].set(xlabel=f"longest head over mean (log){missing}", ylabel="time / time of equal lengths (log)")
    handles = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    page.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    bandwidth = f"{about['bandwidth_GBps']:.0f} GB/s measured"
    dtype = about["dtype"].removeprefix("torch.")
    flags = f"{op} --shapes {shape}" + (f" --layouts {layout}" if sizes else "")
    page.suptitle(f"{flags}:\n{dtype}, {about['machine']} ({bandwidth})", fontsize=10.5)
    return page


def draw(axes, points, base, y_ticks, title):
    """Draw the lines of all providers on logarithmic axes."""
    for name, line in points.items():
        colour, marker, dash = style(name)
        label = RIVALS.get(name, name)
        axes.plot(*zip(*line, strict=True), color=colour, marker=marker, linestyle=dash, label=label)
    axes.set_xscale("log", base=base)
    axes.set_yscale("log", base=base)
    for axis, values in (
        (axes.xaxis, apart(sorted({x for line in points.values() for x, _ in line}))),
        (axes.yaxis, y_ticks),
    ):
        axis.set_ticks(values, [f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in values])
        axis.set_ticks([], minor=True)
    axes.set_title(title, fontsize=10)


def lengths_of(layout, cases):
    """How the heads of these cases differ in length, in words."""
    if layout == "equal":
        return "heads of equal length"
    if layout != "plphp":
        return f"heads of different lengths ({layout})"
    several = sorted({round(row["megabytes"]) for row in cases if " x " in row["case"]})
    if not several:
        return "head lengths as in a layer of plphp-ada"
    return f"head lengths as in a layer of plphp-ada;\n{', '.join(map(str, several))} MB: several sequences, plphp"


def absent(why, others, points):
    """A line that names the providers of the other panel that have no line here, or nothing."""
    names = [name for name in others if name not in points]
    return f"\n({'; '.join(RIVALS.get(name, name) for name in names)}: {why})" if names else ""


def decode_figure(about, rows):
    """A panel per workload: speed of each engine and method relative to transformers (SDPA if it was measured)."""
    work = list(dict.fromkeys(row["workload"] for row in rows))
    names = list(dict.fromkeys((row["engine"], row["prune"]) for row in rows))
    page, panels = new(len(work), 2.2 + 0.47 * len(names), sharex=True, sharey=True)
    base = base_of(names)
    for axes, workload in zip(panels, work, strict=True):
        found = {(row["engine"], row["prune"]): row for row in rows if row["workload"] == workload}
        for y, name in enumerate(names):
            if name not in found or base not in found:
                continue
            row, unpruned, reference = found[name], found.get((name[0], "none")), found[base]["ms_per_token"]
            speed = reference / row["ms_per_token"]
            axes.barh(y, speed, color=ENGINES.get(name[0], "#999999"))
            axes.text(0, y, f" {speed:.2f}", va="center", fontsize=9)
            if unpruned and name[1] != "none":
                reach = reference / unpruned["ms_per_token"] * row["ceiling_speedup"]
                axes.plot([reach, reach], [y - 0.45, y + 0.45], color="#000000", linewidth=1.5)
        one = next(iter(found.values()))
        sequences = "1 sequence" if one["batch"] == 1 else f"{one['batch']} sequences"
        axes.set_title(f"{sequences}:\n{one['vision_tokens']:,} vision,\n{one['text_tokens']} text tokens", fontsize=10)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=4, integer=True)
    labels = [called(engine) if prune == "none" else f"{called(engine)}\n{flags_of(prune)}" for engine, prune in names]
    panels[0].set_yticks(range(len(names)), labels, fontsize=9)
    panels[0].invert_yaxis()
    label = f"decode speed, {called(base[0])} = 1"
    if any(prune != "none" for _, prune in names):
        label += (
            "\nblack line: speed of the unpruned run above times\nthe reduction in bytes; an expectation, not a bound"
        )
    page.supxlabel(label, fontsize=10)
    page.suptitle(f"{about['model']}, {about['dtype']}, {about['machine']}", fontsize=11)
    return page


def called(engine):
    """An engine in words; ours with the flag of run.py that selects it."""
    return {"ours-compile": "ours --compile"}.get(engine, engine.replace("hf-", "transformers "))


def flags_of(prune):
    """SPEC or SPEC@RETENTION, as bench_decode.py has it -> flags of run.py."""
    spec, at, retention = prune.rpartition("@")
    return f"--prune {spec}\n--retention {retention}" if at else f"--prune {prune}"


def base_of(names):
    """The (engine, prune) of transformers used as the base; the first name if there is none."""
    return next((name for wanted in ("hf-sdpa", "hf-") for name in names if name[0].startswith(wanted)), names[0])


def main(argv=None):
    p = flags(__doc__)
    p.add_argument("files", nargs="+", metavar="FILE.json")
    p.add_argument("--op", help="kernel to plot (default: the first in the files)")
    p.add_argument("--shape", help="model shape (default: the one with most sizes)")
    p.add_argument("--layout", help="such as equal or zipf (default: that with most rows; ragged before equal)")
    p.add_argument("--out", default="bench.png", metavar="FILE.png", help="default bench.png in the current folder")
    args = p.parse_args(argv)
    about, rows = read(args.files)
    if rows and "ms_per_token" in rows[0]:
        page, what = decode_figure(about, rows), "decode"
    else:
        op, shape, layout = chosen(rows, args)
        page, what = figure(about, rows, op, shape, layout), f"{op}, {shape}, {layout}"
    try:
        page.savefig(args.out)
    except (OSError, ValueError) as wrong:
        raise SystemExit(f"error: cannot write {args.out} ({wrong}); give another --out") from None
    print(f"{args.out}: {what}")
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
