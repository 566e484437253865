"""Generate the tables of the READMEs from committed sources: docstrings of the methods, files of results, arithmetic.

    python tools/tables.py                  # print them
    python tools/tables.py --write          # write them into the READMEs
    python tools/tables.py --figures out    # redraw the figures of pruning from committed results

A table is placed between `<!-- table NAME -->` and `<!-- end of table -->`, where NAME is a key of TABLES. Figures of
speed are drawn by tools/plot_bench.py.
"""

import csv
import inspect
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.pruning import GUARDS, METHODS, PLACING, describe, settings_of  # noqa: E402
from tools import evaluate, figures, roofline  # noqa: E402
from tools.command import as_command, flags  # noqa: E402
from tools.plot_bench import RIVALS  # noqa: E402

PAGES = ("README.md", *(f"{folder}/README.md" for folder in ("model/pruning", "kernels", "benchmarks", "assets")))
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end of table -->)", re.S)


def filled(text):
    """The text of a page with every table in it generated again."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


# ---------------------------------------------------------------- pruning


def methods():
    """The pruning methods: first paragraph of the docstring, settings with their defaults."""
    rows = []
    for name, method in METHODS.items():
        if method is None:
            rows.append([f"`{name}`", "Everything.", ""])
            continue
        file = Path(inspect.getsourcefile(method)).name
        what = re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", describe.summary(method))
        settings = ", ".join(f"`{key}={describe.shown(value)}`" for key, value in settings_of(method).items())
        rows.append([f"[`{name}`]({file})", what, settings])
    guards, places = (", ".join(f"`{key}={value}`" for key, value in each.items()) for each in (GUARDS, PLACING))
    return _markdown(["`--prune`", "what is kept", "settings"], rows, "---") + (
        f"\n\nEvery method in the language model also has {guards}: numbers of tokens that no head may drop.\n"
        "`sink` protects the first tokens of the prompt, `recent` the last, and `sink_keys` those most attended by\n"
        f"the last 32 rows of each head. Every method before the language model also has {places}: the rotary\n"
        "positions of its tokens, without gaps or (`original`) those of the whole prompt."
    )


PLPHP = {  # method in the results: its name in the first table
    "plphp": "PLPHP as we read the paper: ranked by the prompt's last token",
    "plphp as shipped": "PLPHP with the demo's settings: look-ahead rows, one rate, half of the tokens on an even grid",
    "plphp ahead+grid": "the same, but three rates as in the paper, at equal cache size",
}


def summary():
    """The first table: PLPHP as published and as shipped, and the baselines; below it, about the questions."""
    results = _results("pruning-accuracy")
    retentions = list(dict.fromkeys(row["retention"] for row in results if row["retention"]))
    right = {(row["method"], row["retention"]): float(row["long"]) for row in results}
    rows = [["unpruned", *(3 * [right["none", ""]])]]
    rows += [[label, *(right[method, r] for r in retentions)] for method, label in PLPHP.items()]
    chance = [max(right["random", r], right["grid", r]) for r in retentions]
    rows = _rounded([*rows, ["the better of random tokens and an even grid alone", *chance]], 1)
    about = (ROOT / "benchmarks" / "pruning-accuracy.md").read_text(encoding="utf-8")
    questions, scenes, long = re.match(r"(\d+) questions about (\d+) scenes, (\d+) of them", about).groups()
    return _markdown(["long answers right, %", *(f"{r} kept" for r in retentions)], rows) + (
        f"\n\nOf {int(questions):,} questions about {int(scenes):,} drawn scenes, {int(long):,} have long answers: six "
        "or more words that only the picture tells. All tokens must be right "
        f"(`python tools/evaluate.py accuracy --questions {int(questions) // 1000 * 1000}`)."
    )


def pruning():
    """All methods of the comparison."""
    return evaluate.short(_results("pruning-accuracy"))


COMPOSED = re.compile(r"([\w-]+):.*?retention=([\d.]+).*\+([\w-]+):.*")


def picks():
    """Methods before the language model and in it, at equal bytes: long answers, bytes, and time to the first token."""
    results = {(row["method"], row["retention"]): row for row in _results("pick-accuracy")}
    times = {row["prune"]: float(row["ttft"]) for row in _results("prefill-demo-cpu")}
    times["plphp as shipped@0.3"] = times["plphp@0.3"]
    whole, retentions = results["none", ""], ("0.5", "0.3", "0.15")
    rows = [["unpruned", *(6 * [whole["long"]]), "100 %", "1.00"]]
    for name, specs in _by_positions(spec for spec, _ in results).items():
        found = [results.get((spec, r)) for spec in specs for r in retentions]
        kept = next(row["kv bytes"] for row in (found[4], found[1]) if row)
        gain = times["none"] / times[f"{name}@0.3"] if f"{name}@0.3" in times else None
        rows.append([
            f"`{name}`", *(row["long"] if row else "" for row in found),
            _percent(float(kept) / float(whole["kv bytes"])), "" if gain is None else _round(gain),
        ])  # fmt: skip
    at = [f"{kind}, {r}" for kind in ("no gaps", "original") for r in retentions]
    return _markdown(["long answers right, %", *at, "K and V at 0.3", "first token: speed-up at 0.3"], rows)


def pick_tasks():
    """The same at 0.3 by task, with original positions where a method was measured with them."""
    results = {row["method"]: row for row in _results("pick-accuracy") if row["retention"] in ("", "0.3")}
    tasks = [key.removesuffix(", tokens >= 2") for key in results["none"] if key.endswith(", tokens >= 2")]
    rows = [["unpruned", *(results["none"][task] for task in tasks)]]
    for name, (moved, original) in _by_positions(results).items():
        rows.append([f"`{name}`", *(results[original or moved][task] for task in tasks)])
    return _markdown(["answers right at 0.3, %", *tasks], rows)


def inside():
    """Methods that act in the language model, with what each kept: right answers."""
    results = _results("inside-accuracy")
    rows = [
        [_named(row), f"{_round(row['kept'], 0)} %", _ranged(row, "long"), _ranged(row, "all")]
        for row in sorted(results, key=lambda row: (_family(row), -float(row["kept"])))
    ]
    return _markdown(["", "vision KV kept", "long answers right, %", "all answers right, %"], rows)


def inside_tasks():
    """The same by task, for each method where it kept closest to half."""
    results, nearest = _results("inside-accuracy"), {}
    for row in sorted(results, key=lambda row: abs(float(row["kept"]) - 50)):
        nearest.setdefault(_family(row), row)
    tasks = [key.removesuffix(", tokens >= 2") for key in results[0] if key.endswith(", tokens >= 2")]
    rows = [[f"{_named(row)}, {_round(row['kept'], 0)} %", *(row[task] for task in tasks)]
            for _, row in sorted(nearest.items())]  # fmt: skip
    return _markdown(["answers right, %", *tasks], rows)


# name of a method: (what its paper or code says of itself, file of results, its conditions there)
CLAIMS = {
    "plphp": ("K and V more than halved, decoding 18 % faster, 0.46 % of the score lost", "pruning", ["plphp"]),
    "plphp, the demo's settings": ("(ours: look-ahead rows, an even grid)", "pruning", ["plphp as shipped"]),
    "snapkv": ("3.6 times as fast, 8.2 times less memory, at 16,000 tokens of text", "pruning", ["snapkv"]),
    "adakv": ("text: better than equal budgets for all heads", "pruning", ["adakv"]),
    "h2o": ("20 % of text kept: up to 29 times the throughput of other systems", "inside", ["h2o"]),
    "fastv": ("45 % of the FLOPs saved, nearly the same scores", "pruning", ["fastv"]),
    "pyramiddrop": ("LLaVA-NeXT: 55 % of the FLOPs saved", "inside",
                    ["pyramiddrop:retention=0.5", "pyramiddrop:stages=[1,2,4],retention=0.3"]),
    "sparsevlm": ("78 % fewer tokens, 61 to 67 % of the FLOPs saved, 93 % of the accuracy", "inside",
                  ["sparsevlm:retention=0.5", "sparsevlm:retention=0.3"]),
    "mustdrop": ("92.2 % fewer tokens, 88.5 % of the FLOPs saved, comparable accuracy", "inside",
                 ["mustdrop", "mustdrop:global_threshold=0.011,individual_threshold=0.01"]),
    "g-search": ("more than twice as fast without a loss", "inside",
                 ["g-search:retention=0.5,query=lookahead", "g-search:retention=0.3,query=lookahead"]),
    "zipvl": ("prefill 2.3 times as fast, 2.8 times the decoding throughput, 0.5 % of VQAv2 lost", "inside",
              ["zipvl:tau=0.975", "zipvl"]),
    "yopo": ("88 % of the computation saved (fine-tuned), scores kept", "inside", ["yopo"]),
    "hired": ("20 % kept: 4.7 times the throughput, first token 78 % earlier", "pick",
              ["hired:positions=original"]),
    "visionzip": ("10 % kept: 95 % of the score, prefill 8 times as fast", "pick",
                  ["visionzip:positions=original"]),
    "fopru": ("(no number that we could read)", "pick", ["fopru:positions=original"]),
    "divprune": ("(no number that we could read)", "pick", ["divprune:positions=original"]),
}  # fmt: skip


def claims():
    """What each method's paper or code says of itself, beside the long answers that are right here."""
    rows = []
    for name, (claim, file, conditions) in CLAIMS.items():
        found = [row for row in _results(f"{file}-accuracy") if _spec(row) in conditions]
        found.sort(key=lambda row: -float(row["kept"]))
        here = "; ".join(f"{_round(row['kept'], 0)} %: {row['long']}" for row in found)
        rows.append([f"`{name}`" if name in METHODS else name, claim, here])
    return _markdown(["method", "of itself", "here: vision KV kept: long answers right, %"], rows, others="---")


def _family(row):
    """Sorts a condition: the unpruned model first, then controls, then by method."""
    spec, first = _spec(row), ("none", "random", "grid", "plphp as shipped")
    return (first.index(spec), "") if spec in first else (len(first), spec.partition(":")[0])


def _spec(row):
    """The condition as it was given, without the settings from the model's folder."""
    given = row["method"].startswith(evaluate.GIVEN)
    return row["label"].removeprefix(evaluate.GIVEN).strip("`") if given else row["method"]


def _named(row):
    return "unpruned" if row["method"] == "none" else f"`{_spec(row)}`"


def _ranged(row, key):
    low, high = (_round(row[f"{key} {end}"], 0) for end in ("low", "high"))
    return f"{row[key]} ({low}–{high})"


def _by_positions(conditions):
    """{short SPEC: [its condition without gaps, with original positions], or None}. Methods in
    the language model always have original positions."""
    found = {}
    for condition in dict.fromkeys(conditions):
        spec = condition.removeprefix(evaluate.GIVEN)
        parts = COMPOSED.fullmatch(spec)
        name = "{}:retention={}+{}".format(*parts.groups()) if parts else spec.removesuffix(":positions=original")
        original = "positions=original" in spec or spec == condition
        if condition != "none":
            found.setdefault(name, [None, None])[original] = condition
    return found


def witness():
    """KL on a pretrained text decoder: mean over all kinds of questions, and over the kind left out of training."""
    results = _results("witness")
    names, kinds, retentions = (
        list(dict.fromkeys(row[column] for row in results)) for column in ("ranked by", "questions", "retention")
    )
    at = {(row["questions"], row["ranked by"], row["retention"]): row["kl"] for row in results}
    rows = [[name, *(at[kind, name, r] for kind in kinds for r in retentions)] for name in names]
    heads = [f"{what}{r} kept" for what in ("", "left-out kind, ") for r in retentions]
    return _markdown(["KL from unpruned, nats", *heads], _rounded(rows, 3))


def demo():
    """Accuracy of the demo model by task."""
    return (ROOT / "assets" / "demo-accuracy.md").read_text(encoding="utf-8").strip()


def ceilings():
    """Upper bounds of the speed-up by pruning, from bytes."""
    return roofline.table([1, 8, 32], [0.5, 0.2])


# ---------------------------------------------------------------- speed of whole answers: files of bench_decode.py

ENGINES = {"ours": "ours", "ours-compile": "ours `--compile`", "hf-sdpa": "transformers sdpa"}
OURS = ("ours", "ours-compile")


def decode_gpu():
    """The 7B shape on an H200."""
    rows = []
    for row in _results("decode-7b-h200"):
        if row["engine"] in OURS:
            pruned, one = row["prune"] != "none", row["batch"] == "1"
            rows.append([
                f"{row['batch']} sequence{'' if one else 's'}, {_percent(row['kept']) if pruned else 'all'} kept",
                _round(row["ms_per_token"], 1), _round(row["decode_x_hf-sdpa"], 1), _gain(row) if pruned else "",
                _round(row["ttft_x_hf-sdpa"]), _bytes(row["kv_bytes_held"], 1e9, 2 if one else 1, " GB"),
                _bytes(row["peak_bytes"], 1e9, 1, " GB"),
            ])  # fmt: skip
    return _markdown(["", "ms per token", "decode: speed-up over sdpa", "speed-up by pruning (by bytes)",
                      "first token: speed-up over sdpa", "K and V", "peak memory"], rows)  # fmt: skip


def decode_demo():
    """The demo model compared with transformers, on a CPU."""
    rows = []
    for row in _results("decode-demo-cpu"):
        if ours := row["engine"] in OURS:
            name = f"{ENGINES[row['engine']]}, {'all' if row['prune'] == 'none' else 'half'} kept"
        else:
            name = f"transformers {row['engine'].removeprefix('hf-')}"
        over = ("decode_x_hf-sdpa", "decode_x_hf-eager", "decode_x_hf-static", "ttft_x_hf-sdpa")
        rows.append([name, *(_round(row[column]) if ours else "" for column in over), *_memory_and_reach(row)])
    return _markdown(["speed-up over `transformers`", "decode: over sdpa", "decode: over eager",
                      "decode: over static cache, compiled", "first token: over sdpa", "peak MB",
                      "share of the roofline"], rows)  # fmt: skip


def decode_7b_cpu():
    """The 7B shape on a CPU."""
    rows = []
    for row in _results("decode-7b-cpu"):
        over = [row[column] for column in ("decode_x_hf-sdpa", "ttft_x_hf-sdpa")]
        rows.append([ENGINES[row["engine"]], *(_round(x) if x else "1" for x in over), *_memory_and_reach(row)])
    head = ["speed-up over transformers sdpa", "decode", "first token", "peak MB", "share of the roofline"]
    return _markdown(head, rows)


WORKLOADS = {
    "one": "256 vision tokens",
    "one-b8": "8 sequences of 256",
    "eight-images": "2,048, beyond the demo's context",
    "1x7936+256": "7,936, also beyond it",
}


def pruning_speed():
    """Speed-up by pruning on a CPU, by number of tokens."""
    found = {(r["engine"], r["workload"], r["prune"]): r for r in _results("decode-demo-long-cpu")}
    columns = [(engine, f"plphp:dr=0@{kept}") for engine in OURS for kept in (0.5, 0.2)]
    rows = [[label, *(_gain(found[e, work, prune]) for e, prune in columns)] for work, label in WORKLOADS.items()]
    return _markdown(["speed-up by pruning, measured (by bytes)", "0.5 kept", "0.2 kept",
                      "`--compile`, 0.5 kept", "`--compile`, 0.2 kept"], rows)  # fmt: skip


def first_token():
    """The unpruned first token on a CPU, compared with transformers."""
    found = {(r["engine"], r["workload"]): r for r in _results("decode-demo-long-cpu") if r["prune"] == "none"}
    rows = [[ENGINES[engine], *(found[engine, work]["ttft_x_hf-sdpa"] for work in WORKLOADS)] for engine in OURS]
    return _markdown(["first token: speed-up over transformers sdpa", *WORKLOADS.values()], _rounded(rows))


def prefill():
    """Prefill with fewer vision tokens before the language model, beside the ceiling by arithmetic."""
    results = _results("prefill-thin-cpu")
    plain = float(results[0]["ttft"])
    rows = [[f"`{row['prune']}`", row["tokens"].removesuffix(".0"),
             f"{_round(row['speedup'])} ({_round(row['low'])}–{_round(row['high'])})", _round(row["ceiling"]),
             _percent(row["share"]), _round(plain / float(row["ttft"])), _round(row["vision_ratio"])]
            for row in results]  # fmt: skip
    return _markdown(["", "tokens prefilled", "prefill: speed-up (20–80 %)", "ceiling", "share of it",
                      "first token: speed-up", "vision: time"], rows)  # fmt: skip


def sparse():
    """Prefill with half of the tokens important, or dropped: speed-up, ceiling and share of its gain, two prompts."""
    both = [_results(f"prefill-sparse-{n}-cpu") for n in (2880, 8192)]
    rows = [[f"`{one['prune']}`", *(cell for row in (one, two) for cell in (
             f"{_round(row['speedup'])} ({_round(row['low'])}–{_round(row['high'])})", _round(row["ceiling"]),
             _percent(row["gain"]) if row["gain"] else ""))]
            for one, two in zip(*both, strict=True)]  # fmt: skip
    titles = [f"{float(runs[0]['tokens']):,.0f} tokens" for runs in both]
    heads = [f"{title}: {what}" for title in titles for what in ("speed-up (20–80 %)", "ceiling", "share of the gain")]
    return _markdown(["", *heads], rows)


def _gain(row):
    return f"{_round(row['speedup'])} ({_round(row['ceiling_speedup'])})"


def _memory_and_reach(row):
    return _bytes(row["peak_bytes"], 1e6, 0), _percent(row["roofline_reached"])


# ---------------------------------------------------------------- speed of kernels: files of bench_kernels.py


def steps():
    """Speed of whole decode steps with the ragged cache, relative to a dense one."""
    found = {row["case"]: row["speed"] for row in _results("steps-cpu") if row["provider"] == "ours, torch"}
    kept = "1 kept, equal", "0.3 kept, equal", "0.3 kept, ragged"
    sizes = 300, 2048, 8192
    rows = [[f"{n:,} tokens", *(found[f"demo model, 1 x {n} tokens, {k}"] for k in kept)] for n in sizes]
    return _markdown(["speed of whole decode steps (dense cache: 1)", "all kept", "0.3 kept, heads of equal length",
                      "0.3 kept, lengths differ"], _rounded(rows))  # fmt: skip


def attention():
    """Attention of one layer on a CPU."""
    found = {row["case"]: row for row in _results("kernels-cpu") if row["provider"] == "ours, torch"}
    rows = []
    for shape, label in (("demo", "demo"), ("7b", "7B, 32 heads"), ("gqa8", "8 KV heads, G 4")):
        for tokens in (640, 2048, 8192):
            cells = []
            for layout in ("equal", "plphp", "zipf", "giant"):
                row = found[f"{shape}, {tokens} tokens, 0.3 kept, {layout}"]
                rival = json.loads(row["speeds"])["sdpa, rectangle" if layout == "equal" else "sdpa, padded + mask"]
                cells.append(f"{_round(row['speed'])} ({_round(rival)})")
            rows.append([f"{label}, {tokens:,}", *cells])
    return _markdown(["shape, tokens", "equal", "plphp-ada", "zipf", "giant"], rows)


def kernels():
    """Attention of one layer on an H200, by size."""
    rows = {"7b": "32 heads (7B)", "gqa8": "8 KV heads, G 4"}
    return _on_gpu("K and V kept, per layer", rows, slice(None))


def kernels_summary():
    """Three sizes of the shape with grouped heads."""
    return _on_gpu("K and V kept (8 KV heads)", {"gqa8": ""}, slice(0, 5, 2))


def kernels_codes():
    """Attention of one layer on an H100, by size, in 16 and in 8 bits, beside other caches with tokens per head."""
    found = [r for r in _results("kernels-h100") if r["op"] == "ragged_decode_append" and r["layout"] == "plphp"]
    by_case = {}
    for row in found:
        by_case.setdefault(row["case"], {})[row["provider"]] = row
    rows = []
    for case, providers in by_case.items():
        ours, int8, fp8 = (providers[f"ours, triton{kind}"] for kind in ("", ", int8", ", fp8"))
        speeds, shape = json.loads(ours["speeds"]), case.partition(",")[0].replace("gqa8", "8 KV heads")
        rows.append([
            f"{shape.replace('7b', '32 heads')}, {_round(ours['megabytes'], 0)} MB", _percent(ours["ceiling"]),
            *(f"{_round(row['us'], 1)} us" for row in (ours, int8, fp8)),
            _round(float(ours["us"]) / float(int8["us"])),
            *(_round(speeds[rival]) for rival in ("compactor-style", "fastdms-style")),
        ])  # fmt: skip
    head = ["K and V kept, per layer", "share of the bandwidth, bf16", "bf16", "int8", "fp8"]
    over = ["int8: speed-up over bf16", "bf16: over pages per head", "over a grid of splits"]
    return _markdown([*head, *over], rows)


def _on_gpu(head, shapes, chosen):
    """Our kernel by size; a fifth of the tokens is kept, heads differ in length. shapes: {shape: its name}."""
    ours = ("ragged_decode_append", "plphp", "ours, triton")
    found = [row for row in _results("kernels-h200") if (row["op"], row["layout"], row["provider"]) == ours]
    found = sorted((r for r in found if r["shape"] in shapes), key=lambda r: (r["shape"], float(r["megabytes"])))
    rows = []
    for row in found[chosen]:
        sequences = row["case"].partition(",")[0].partition(" x ")[2]
        name = shapes[row["shape"]] and f"{shapes[row['shape']]}, " + (f"{sequences} sequences, " if sequences else "")
        speeds = json.loads(row["speeds"])
        rows.append([
            f"{name}{_round(row['megabytes'], 0)} MB", f"{_round(row['us'], 1)} us", _percent(row["ceiling"]),
            *(_round(speeds[rival], 1) for rival in RIVALS),
        ])  # fmt: skip
    over = [f"speed-up over {rival}" for rival in RIVALS.values()]
    return _markdown([head, "time", "share of the bandwidth", *over], rows)


# ---------------------------------------------------------------- shared helpers


def _results(name):
    """Rows of a CSV file in benchmarks/, a list of {column: text}."""
    with open(ROOT / "benchmarks" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _round(number, digits=2):
    return f"{float(number):.{digits}f}"


def _rounded(rows, digits=2):
    """Rows of a name and numbers -> cells."""
    return [[name, *(_round(number, digits) for number in numbers)] for name, *numbers in rows]


def _percent(share):
    return f"{100 * float(share):.0f} %"


def _bytes(number, unit, digits, name=""):
    return f"{float(number) / unit:,.{digits}f}{name}"


def _markdown(head, rows, others="---:"):
    """A table in Markdown; the first column is aligned left, the others as `others` specifies."""
    lines = [head, ["---"] + [others] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {
    "summary": summary, "methods": methods, "pruning": pruning, "picks": picks, "pick-tasks": pick_tasks,
    "inside": inside, "inside-tasks": inside_tasks, "claims": claims,
    "witness": witness, "demo": demo, "roofline": ceilings, "tensor-parallel": roofline.parallel_summary,
    "decode-7b-h200": decode_gpu, "decode-demo": decode_demo, "decode-7b-cpu": decode_7b_cpu,
    "pruning-speed": pruning_speed, "first-token": first_token, "steps": steps, "attention": attention,
    "kernels": kernels, "kernels-codes": kernels_codes, "kernels-summary": kernels_summary, "prefill": prefill,
    "sparse": sparse,
}  # fmt: skip

FIGURES = {
    "pruning-accuracy": lambda: figures.pruning(_results("pruning-accuracy")),
    "pruning-second": lambda: figures.pruning(_results("pruning-second"), second=True),
    "witness": lambda: figures.witness(_results("witness")),
}


def main(argv=None):
    parser = flags(__doc__)
    parser.add_argument("--write", action="store_true", help="write them into the READMEs")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="redraw the figures of pruning into this folder")
    args = parser.parse_args(argv)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        for name, make in FIGURES.items():
            make().savefig(args.figures / f"{name}.png")
    elif args.write:
        for page in PAGES:
            path = ROOT / page
            path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(make() for make in TABLES.values()))


if __name__ == "__main__":
    sys.exit(as_command(main))
