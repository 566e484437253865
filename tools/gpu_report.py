"""The report of gpu.py: one page from the files that its stages wrote, ceilings first.

The targets are those of kernels/NOTES.md, set for one H200. A figure that was not measured is called so.
"""

import json
import xml.etree.ElementTree as ElementTree

STEP, SPLITS, SDPA = "ragged_decode_append", "ragged_decode", "hf-sdpa"
BITS = "ten_thousand_replays", "order_of_the_work", "neighbours_do_not_matter"  # parts of the names of tests


def report(out, names):
    """The page about a folder of results. names: of the stages that should be there."""
    read = {path.stem: content(path) for path in sorted(out.glob("*.json"))}
    status = {name: read.get(f"{name}.status") for name in names}
    before, after, smoke, tuned = (read.get(n, {}) for n in ("kernels", "tuned-kernels", "smoke", "tuned"))
    answers = [row for name in ("decode", "pictures") for row in read.get(name, {}).get("rows", [])]
    tests = {name: outcomes(out / f"{name}.xml") for name in ("tests", "model")}
    measured = [after, before, smoke, *(read.get(name, {}) for name in ("tune", "decode", "pictures"))]
    about = next((found["about"] for found in measured if "about" in found), {})
    bandwidth = f"{about['bandwidth_GBps']} GB/s" if "bandwidth_GBps" in about else "not measured"
    rehearsed = any(found and found["rehearsal"] for found in status.values())
    source, rows = "tuned-kernels" if after else "kernels", (after or before).get("rows", [])
    parts = [
        f"# {'Rehearsal: times mean nothing' if rehearsed else 'The first minutes on a GPU'}",
        ", ".join(f"{key} {about[key]}" for key in ("machine", "torch", "triton", "dtype", "date") if key in about),
        f"## Ceilings\n\nMeasured bandwidth: {bandwidth}. The share counts only the bytes of kept tokens.",
        table(("case", "MB", "us", "share", "us, tuned", "share, tuned"), ceilings(before, after)),
        "## Speed over\n\nA decode step (`ragged_decode_append`), time of the other over ours.",
        table(*ratios(rows)),
        "## Whole answers",
        table(("workload", "method", "ms per token", "share of the roofline", "by pruning (by bytes)", f"over {SDPA}",
               "first token"), whole(answers)),
        "## Prefill with fewer vision tokens before the language model",
        table(("method", "speed-up", "ceiling", "first token: speed-up"), prefills(read.get("prefill", {}))),
        "## Tiles chosen by `--tune`",
        table(("architecture", "case", "instead of the formula's"), [*choices(tuned)]),
        f"## Targets\n\n{'From ' + source + '.json' if rows else 'Not measured'}; the worst of the cases counts.",
        table(("target", "limit", "worst", ""), [target(*t) for t in targets(rows, answers, tests["tests"])]),
        "## Failures",
        "\n".join(failures(out, status, tests, read)) or "None.",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def content(path):
    """A JSON file; {} if there is none, or if its stage was stopped while it wrote."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def table(titles, rows):
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) if rows else "Not measured."


# ---------------------------------------------------------------- sections


def ours(found, *ops, coded=False):
    """Rows of our Triton kernels that were timed, from the rows of bench_kernels.py. coded: those in 8 bits, too."""
    rows = [r for r in found if r["op"] in ops and r["right"] and r["provider"].startswith("ours, triton")]
    return [r for r in rows if coded or not kind_of(r)]


def kind_of(row):
    """int8 or fp8 of a row over arenas in 8 bits, else ""."""
    return ", ".join(row["provider"].split(", ")[2:])


def ceilings(before, after):
    """Time and share of the bandwidth of each case of attention, before and after tuning."""
    cells = {}
    for place, found in enumerate((before, after)):
        for r in ours(found.get("rows", []), STEP, SPLITS, coded=True):
            words = [kind_of(r)] * bool(kind_of(r)) + ["two launches"] * (r["op"] == SPLITS)
            label = r["case"] + f" ({', '.join(words)})" * bool(words)
            size = r["GBps"] * r["us"] / 1e3  # of this row's type
            line = cells.setdefault(label, [label, f"{size:.3g}", "", "", "", ""])
            line[2 + 2 * place : 4 + 2 * place] = f"{r['us']:.1f}", f"{r['ceiling']:.0%}"
    return [*cells.values()]


def ratios(rows):
    """(titles, rows) of the speed over every other provider."""
    steps = ours(rows, STEP)
    others = list(dict.fromkeys(name for r in steps for name in r["speeds"]))
    return ("case", *others), [
        [r["case"], *(f"{r['speeds'][name]:.2f}" if name in r["speeds"] else "" for name in others)] for r in steps
    ]


def whole(answers):
    """Our rows of bench_decode.py."""
    lines = []
    for r in [r for r in answers if r["engine"] == "ours" and r["right"]]:
        by_bytes = f"{r.get('speedup', 1):.2f} ({r['ceiling_speedup']:.2f})" if r["prune"] != "none" else ""
        over = [f"{r[key]:.2f}" if key in r else "" for key in (f"decode_x_{SDPA}", f"ttft_x_{SDPA}")]
        share = f"{r['roofline_reached']:.0%}"
        lines.append([r["workload"], r["prune"], f"{r['ms_per_token']:.2f}", share, by_bytes, *over])
    return lines


def prefills(measured):
    """The rows of bench_prefill.py that have a speed-up over the first, the unpruned one."""
    rows = [row for row in measured.get("rows", []) if "speedup" in row]
    return [
        [r["prune"], *(f"{r[key]:.2f}" for key in ("speedup", "ceiling")), f"{rows[0]['ttft'] / r['ttft']:.2f}"]
        for r in rows
    ]


def choices(tuned):
    """What --tune has written: a line per entry, or per architecture on which the formula won everywhere."""
    for arch, found in tuned.items():
        yield from [[arch, *entry] for entry in found["tiles"].items()] or [[arch, "all", "nothing"]]


# ---------------------------------------------------------------- targets


def targets(rows, answers, tests):
    """(what, limit, is it the most or the least, unit, measured values) of each target in kernels/NOTES.md."""
    step, steps = ours(rows, STEP), [r for r in answers if r["engine"] == "ours" and r["right"]]
    sizes = [r for r in step if r["layout"] == "plphp" and r["shape"] in ("7b", "gqa8") and "0.2 kept" in r["case"]]

    def near(size):
        return [r for r in sizes if abs(r["megabytes"] / size - 1) < 0.03]

    def over(name, found):
        return [r["speeds"][name] for r in found if name in r["speeds"]]

    for size, limit in ((4, 8), (17, 10), (65, 22)):
        yield (
            f"{size} MB, 8 KV heads, append included",
            limit,
            "most",
            " us",
            [r["us"] for r in near(size) if r["shape"] == "gqa8"],
        )
    for size, limit in ((65, 60), (130, 80), (512, 90)):
        yield f"share of the bandwidth at {size} MB", limit, "least", " %", [100 * r["ceiling"] for r in near(size)]
    skewed = [r["over_uniform"] for r in step if r["layout"] == "skew 8" and "over_uniform" in r]
    yield "longest head 8 times the mean, over equal heads", 1.1, "most", "x", skewed
    yield "over AdaKV's copy per step", 5, "least", "x", over("adakv-style", step)
    yield "over varlen attention, heads as batch", 2, "least", "x", over("varlen, heads as batch", ours(rows, SPLITS))
    large = [r for r in sizes if r["megabytes"] / 0.2 >= 130]
    yield "over SDPA on all tokens, a fifth kept of 130 MB or more", 3, "least", "x", over("sdpa, all tokens", large)
    costs = [r["step_allocations"] + r["step_mallocs"] + r["step_syncs"] for r in steps if "step_mallocs" in r]
    yield "allocations and waits per decode step", 0, "most", "", costs
    bits = [result != "passed" for name, result in tests.items() if any(part in name for part in BITS)]
    yield "tests of bits: replays, order of the work, neighbours: failed", 0, "most", "", bits


def target(what, limit, sense, unit, values):
    """A line of the table: met, or missed by how much."""
    if not values:
        return what, f"{limit}{unit}", "", "not measured"
    worst = max(values) if sense == "most" else min(values)
    missed = worst > limit if sense == "most" else worst < limit
    by = f" by {abs(worst / limit - 1):.0%}" if limit else ""
    return what, f"{limit}{unit}", f"{worst:.3g}{unit}", f"**missed{by}**" if missed else "met"


# ---------------------------------------------------------------- failures


def outcomes(path):
    """{name of a test: passed, failed or skipped} from pytest's XML; {} without a complete file."""
    try:
        cases = ElementTree.parse(path).iter("testcase")
    except (OSError, ElementTree.ParseError):
        return {}
    found = {}
    for case in cases:
        kinds = {child.tag for child in case}
        what = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = what
    return found


def failures(out, status, tests, read):
    """Stages that did not run or failed, with the end of their logs; tests that failed; results that were wrong."""
    for name, found in status.items():
        if found is None:
            yield f"- {name}: not run"
        elif found["code"]:
            how = f"time limit of {found['limit']} s" if found["code"] == 124 else f"exit code {found['code']}"
            log = out / f"{name}.log"
            end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-6:] if log.exists() else []
            yield f"- {name}: {how} after {found['seconds']} s. The end of {log.name}:\n"
            yield from (f"      {line[:160]}" for line in end)
    for name, found in tests.items():
        if failed := [test for test, result in found.items() if result == "failed"]:
            yield f"- {name}: {len(failed)} of {len(found)} tests failed: {', '.join(failed[:20])}"
    for name, found in read.items():
        for row in found.get("rows", []) if isinstance(found.get("rows"), list) else []:
            if row.get("right") is False and not row.get("guest") and "tile" not in row:
                case = row.get("case") or row.get("workload")
                yield f"- {name}.json: {row.get('provider') or row.get('engine')}, {case}: {row['why']}"
