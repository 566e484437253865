"""Benchmark decoding end to end, pruned and unpruned, against transformers' generate(). Wrong results are not timed.

    python tools/bench_decode.py                             # the demo model, on this machine
    python tools/bench_decode.py --model DIR --image x.png   # any checkpoint
    python tools/bench_decode.py --shape llava-1.5-7b        # random weights, created on the device
    python tools/bench_decode.py --shape llava-1.5-7b --workloads one-b32 4x576,576+64 --prune plphp:dr=0@0.3
    python tools/bench_decode.py --growth --plot growth.png  # decode time over kept tokens, prefill memory over T
    python tools/bench_decode.py --smoke                     # run everything once on tiny prompts

Every engine runs in its own process. If all of them fit in memory (CPU only), their rounds alternate, so that a machine
that slows down affects all equally; otherwise they run one after another. A round is one answer. `TTFT` is the prefill
of all sequences, pruning included, until their first ids are known. `ms/token` is one step of all sequences until the
ids are read: median, 20th and 80th percentile over all steps of all rounds.

The workload `picture` is a real picture and question through model.Generation, vision tower included, compared with
transformers' class for the checkpoint. The others feed an embedded prompt directly to the language model, compared with
LlamaForCausalLM: random text, and pictures of random numbers scaled like the embeddings. BxP,P+T is a workload of your
own: B sequences, each with pictures of P tokens and T text tokens. Prompts beyond the context run and are marked.

Checks before timing: greedy ids equal those of transformers (fp32), or the first logits are close (bf16, fp16); step
logits match one long prefill of the same tokens; a pruned run starts with the same token, and its step logits match
dense attention under a mask; compiling changes no greedy id (fp32). With --kv-dtype, pruned or not, step logits match
dense attention over the dequantised keys and values.

`roofline` is the time to read the weights and the held K and V at the measured bandwidth, `ceiling` the largest
speed-up by bytes. --prune SPEC@F means --prune SPEC --retention F of run.py. dr=0 prunes every layer equally, so that
exactly F is kept: with random weights, all layers attend to pictures alike.
"""

import contextlib
import ctypes
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels.quantise import has_e4m3  # noqa: E402
from model import Generation, InputError, open_checkpoint  # noqa: E402
from model.cache import KV_DTYPES, RaggedCache  # noqa: E402
from model.checkpoint import DTYPES  # noqa: E402
from model.config import TextConfig  # noqa: E402
from model.fast import FastStep  # noqa: E402
from model.flags import choose_device  # noqa: E402
from tools import engines, harness, roofline  # noqa: E402
from tools.command import as_command, exit_code, flags, number, unwritable, write_json  # noqa: E402
from tools.engines import ENGINES, OURS, WATCHED, Task, Workload, error, method_of  # noqa: E402
from tools.shapes import SHAPES  # noqa: E402

USUAL = {  # default workloads; {0} is the number of tokens of a picture; `long` on GPUs only
    "one": "1x{0}+64", "one-b8": "8x{0}+64", "one-b32": "32x{0}+64", "tiles": "1x2880+64",
    "eight-images": "1x{0},{0},{0},{0},{0},{0},{0},{0}+64", "long": "1x9936+64",
}  # fmt: skip
# Largest RMS error of logits, relative to their RMS, at which two computations count as equal. Measured over 16 to 32
# random layers: 1e-6, 0.002, 0.013; for the 7B shape in bf16: 0.015 over 4 layers, 0.047 over 32. A position off by one
# gives 0.17 at width 1024.
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 8e-2}
# With K and V in 8 bits, where a rounding error may turn a code into its neighbour. Measured for the demo and 16 random
# layers: 2e-4, 0.015, 0.1
CODED_TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 0.15}  # below what a position off by one gives


def parser():
    p = flags(__doc__)
    # fmt: off
    p.add_argument("--model", metavar="DIR|ID", help="a checkpoint (default: the demo model)")
    p.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    p.add_argument("--image", metavar="PATH", help="picture of the workload `picture` (demo default: assets/demo.png)")
    p.add_argument("--prompt", default="Describe the picture.", help="question of the workload `picture`")
    p.add_argument("--workloads", nargs="+", metavar="NAME|BxP,P+T",
                   help=f"picture, {', '.join(USUAL)} or your own (default: all; on a CPU all but long)")
    p.add_argument("--prune", nargs="+", default=["none", "plphp:dr=0@0.5", "plphp:dr=0@0.2"], metavar="SPEC[@F]")
    p.add_argument("--engines", nargs="+", choices=ENGINES, metavar="ENGINE",
                   help=f"from {', '.join(ENGINES)} (default: all on CUDA; ours, hf-eager and hf-sdpa on a CPU)")
    p.add_argument("--new-tokens", type=number(int, 2), default=32, metavar="N", help="tokens per answer (default 32)")
    p.add_argument("--rounds", type=number(int, 1), default=5, help="timed answers after a checked one (default 5)")
    p.add_argument("--dtype", choices=DTYPES, help="default: bf16; fp32 on a CPU if it fits in half of memory")
    p.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto",
                   help="K and V in 8 bits; only for ours, so without transformers (default auto: as --dtype)")
    p.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]")
    p.add_argument("--backend", default="auto", choices=("auto", "triton", "torch"))
    p.add_argument("--seed", type=number(int, 0), default=0, help="seed of weights and prompts")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--csv", metavar="FILE")
    p.add_argument("--smoke", action="store_true", help="quick test: tiny prompts, few tokens, one round")
    p.add_argument("--growth", action="store_true", help="decode time and prefill memory of a small model over tokens")
    p.add_argument("--plot", metavar="FILE.png", help="plot of --growth")
    # fmt: on
    return p


# ---------------------------------------------------------------- workloads and tasks


def workloads(names, picture, asked):
    """The Workloads of --workloads. picture: tokens of one picture; asked: the workload `picture`, or None."""
    for name in names:
        spec = USUAL[name].format(picture) if name in USUAL else name
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*(?:,[1-9]\d*)*)\+([1-9]\d*)", spec)
        if name == "picture" and asked:
            yield asked
        elif sizes:
            yield Workload(name, int(sizes[1]), tuple(map(int, sizes[2].split(","))), int(sizes[3]))
        else:
            need = "needs a checkpoint and --image" if name == "picture" else "is unknown"
            raise InputError(f"workload {name!r} {need}; use {', '.join(USUAL)} or your own such as 4x576,576+64")


# ---------------------------------------------------------------- alternating processes


class Child:
    """A process that works on a task."""

    def __init__(self, task):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=engines.serve, args=(task, other))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: only the parent gets Ctrl-C
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        other.close()  # so that `reply` sees the end of the process

    def reply(self):
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return {"why": f"its process exited with {self.process.exitcode}"}

    def ask(self):
        with contextlib.suppress(OSError):  # the process has ended; `reply` reports its exit code
            self.pipe.send("go")
        return self.reply()

    def close(self):
        self.process.kill()
        self.process.join()


def run_tasks(tasks, rounds):
    """Run all tasks, alternating rounds -> {task: {"facts", "rounds", "why"}}."""
    found, running = {}, {}
    try:
        for task in tasks:
            say(f"{task.workload.name}: {task.engine}, {task.prune}")
            running[task] = Child(task)
        for task, child in running.items():
            found[task] = {"facts": {}, "rounds": [], "why": None} | child.reply()
        for _, (task, child) in product(range(rounds), running.items()):
            if found[task]["why"] is None:
                answer = child.ask()
                found[task]["rounds"].append(answer)
                found[task]["why"] = answer.get("why")
    finally:
        for child in running.values():
            child.close()
    return found


def say(text):
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- checks and speeds


def is_wrong(task, facts, unpruned, reference, plain=None):
    """The first fault in a task's answers, or None.

    reference: (name, facts) of transformers, or None; plain: facts of the same task without the compiler, or None.
    """
    allowed = (TOLERANCE if task.kv_dtype == "auto" else CODED_TOLERANCE)[task.dtype]
    if not facts.get("finite", True):
        return "logits are not finite"
    if not facts.get("error", 0.0) <= allowed:
        of = "one long prefill" if task.prune == "none" else "dense attention with the kept tokens' mask"
        of = of if task.kv_dtype == "auto" else "dense attention over the dequantised rows"
        return f"step logits differ from {of} by {facts['error']:.2g} (relative RMS)"
    if plain and task.dtype == "fp32" and plain["ids"] != facts["ids"]:
        return f"greedy ids {facts['ids']} differ from those without the compiler, {plain['ids']}"
    if task.prune != "none":  # prefill equals the unpruned one, except for methods that drop tokens during prefill
        same = not unpruned or [ids[:1] for ids in facts["ids"]] == [ids[:1] for ids in unpruned["ids"]]
        return None if same or method_of(task.prune).narrows else "the first token differs from the unpruned run"
    if reference is None or reference[1] is facts:
        return None
    name, wanted = reference
    exact = WATCHED if task.dtype == "fp32" else 0 if facts.get("logits") else 1  # in 16 bits, two close ids may swap
    if any(a[:exact] != b[:exact] for a, b in zip(facts["ids"], wanted["ids"], strict=True)):
        return f"greedy ids {facts['ids']} differ from those of {name}, {wanted['ids']}"
    alike = 2 if facts["ids"][0][:1] == wanted["ids"][0][:1] else 1  # the second logits depend on the first id
    off = [error(*pair) for pair in zip(facts.get("logits", [])[:alike], wanted.get("logits", []), strict=False)]
    return next((f"logits differ from {name} by {e:.2g} (relative RMS)" for e in off if not e <= allowed), None)


def make_rows(found, context, shape, itemsize, bandwidth):
    """A row for each task. found: {task: {"facts", "rounds", "why"}}, unpruned first; shape: a roofline.Shape."""
    unpruned = next((r["facts"] for t, r in found.items() if t.engine in OURS and t.prune == "none"), {})
    hf = next(((t.engine, r["facts"]) for t, r in found.items() if t.engine not in OURS and r["facts"]), None)
    rows = {}  # {(engine, prune): row}
    for task, result in found.items():
        w, facts, why = task.workload, result["facts"], result["why"]
        right = None  # not timed
        if why is None:
            twin = found.get(replace(task, engine="ours")) if task.engine == "ours-compile" else None
            why = is_wrong(task, facts, unpruned, hf, twin and twin["facts"])
            if why is None and rows.get((task.engine, "none"), {}).get("right") is False:
                why = "the unpruned run is wrong"  # the same code
            right = why is None
        elif task.engine in OURS and not re.search(r"[Oo]ut ?[Oo]f ?[Mm]emory|can't allocate|exited with -9", why):
            right = False  # a fault of this project
        if right and not any(r["steps"] for r in result["rounds"]):
            right, why = None, "the answer has a single token"
        row = rows[task.engine, task.prune] = {
            "engine": task.engine, "prune": task.prune, "kv_dtype": task.kv_dtype, "workload": w.name, "batch": w.batch,
            "vision_tokens": sum(w.pictures), "text_tokens": w.text,
            "beyond_context": w.tokens + task.new_tokens > context, "right": right, "why": why,
        }  # fmt: skip
        if right:
            row |= speeds(task, facts, result["rounds"], shape, itemsize, bandwidth)
    compare({key: row for key, row in rows.items() if row["right"]})
    return [*rows.values()]


def speeds(task, facts, rounds, shape, itemsize, bandwidth):
    """The measured columns of a correct row. K and V are those of the prompt after prefill, their scales included."""
    batch, d = task.workload.batch, shape.config.head_dim
    low, median, high = harness.spread([1e3 * s for r in rounds for s in r["steps"]])
    row = itemsize * d if task.kv_dtype == "auto" else d + 2  # bytes of a key or a value; 2 of them a scale
    full = batch * (shape.vision + shape.text) * shape.kv_numbers // d * row
    held, weights = facts.get("kv_bytes_held", full), itemsize * shape.weight_numbers
    floor = 1e3 * (weights + held) / bandwidth
    return {
        "kept": facts.get("kept", 1.0), "ttft_ms": 1e3 * statistics.median(r["first"] for r in rounds),
        "ms_per_token": median, "ms_p20": low, "ms_p80": high,
        "tokens_per_s": 1e3 * batch / median, "kv_bytes_held": held, "kv_bytes_full": full,
        "peak_bytes": max(r["peak"] for r in rounds), "bytes_per_step": weights + held, "roofline_ms": floor,
        "roofline_reached": floor / median, "ceiling_speedup": (weights + full) / (weights + held),
    } | {f"step_{name}": n for name, n in facts.get("step", {}).items()}  # fmt: skip


def compare(timed):
    """Add to our rows the speed-up over the unpruned run and over transformers. timed: {(engine, prune): row}."""
    for (engine, prune), row in timed.items():
        if engine not in OURS:
            continue
        if base := timed.get((engine, "none")):
            row["speedup"] = base["ms_per_token"] / row["ms_per_token"]
            row["ceiling_reached"] = row["speedup"] / row["ceiling_speedup"]
        for (other, others), theirs in timed.items():
            if other not in OURS or (other != engine and others == prune):
                row[f"decode_x_{other}"] = theirs["ms_per_token"] / row["ms_per_token"]
                row[f"ttft_x_{other}"] = theirs["ttft_ms"] / row["ttft_ms"]


COLUMNS = (  # title, key, factor, width, format
    ("kept", "kept", 1, 6, ".1%"), ("TTFT ms", "ttft_ms", 1, 9, ".2f"), ("ms/token", "ms_per_token", 1, 9, ".3f"),
    ("p20", "ms_p20", 1, 8, ".3f"), ("p80", "ms_p80", 1, 8, ".3f"), ("tokens/s", "tokens_per_s", 1, 9, ".1f"),
    ("KV MB", "kv_bytes_held", 1e-6, 9, ".2f"), ("peak MB", "peak_bytes", 1e-6, 9, ".0f"),
    ("roofline ms", "roofline_ms", 1, 12, ".3f"), ("reached", "roofline_reached", 1, 8, ".1%"),
    ("ceiling", "ceiling_speedup", 1, 8, ".2f"), ("speed-up", "speedup", 1, 9, ".2f"),
)  # fmt: skip


def show(rows):
    """Lines of a workload's table."""
    first = rows[0]
    beyond = ", LONGER THAN THE MODEL'S CONTEXT" if first["beyond_context"] else ""
    prompt = f"{first['batch']} x ({first['vision_tokens']} vision + {first['text_tokens']} text) tokens"
    yield f"\n{first['workload']}: {prompt}{beyond}"
    yield from harness.table(rows, {"engine": 13, "prune": 21}, COLUMNS, notes)


def notes(row):
    """Lines below a row: the cost of a step, and the speed relative to other engines."""
    lines = ""
    if "step_launches" in row:
        counts = (f"{n:,g} {k[5:].replace('_', ' ')}" for k, n in row.items() if k.startswith("step_"))
        lines += f"\n    per step: {', '.join(counts)}"
    if than := sorted(k.removeprefix("decode_x_") for k in row if k.startswith("decode_x_")):
        said = (f"{e} {row[f'decode_x_{e}']:.2f} (first token {row[f'ttft_x_{e}']:.2f})" for e in than)
        lines += f"\n    speed-up over {', '.join(said)}"
    return lines


# ---------------------------------------------------------------- the whole run


def bench(args, argv):
    """Run all workloads -> exit code."""
    device, (text, picture, asked) = choose_device(args.device, args.backend), chosen_model(args)
    cuda, wide = device.type == "cuda", 4 * roofline.Shape("", text, 0, 0).weight_numbers
    dtype = args.dtype or ("fp32" if not cuda and fits(wide, "SC_PHYS_PAGES") else "bf16")
    chosen = args.engines or (ENGINES if cuda else ("ours", "hf-eager", "hf-sdpa"))
    if args.kv_dtype != "auto":
        chosen = in_8_bits(args, device, chosen)
    prunes = ["none", *(spec for spec in args.prune if spec != "none")]
    for spec in prunes[1:]:
        if method_of(spec, args.model, text).picks:
            raise InputError(f"--prune {spec} needs pictures, and the workloads have none; time it with run.py --stats")
    usual = [name for name in USUAL if cuda or name != "long"]
    if args.smoke:
        usual, args.new_tokens, args.rounds = ["2x24,8+8"], min(args.new_tokens, 3), 1
    work = list(workloads(args.workloads or [*(["picture"] if asked else []), *usual], picture, asked))
    if wrong := unwritable(args.json, args.csv):
        raise InputError(wrong)
    about = about_run(args, argv, device, dtype, args.shape or Path(args.model).name)
    print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    harness.save(args, about, [])
    rows, itemsize = [], DTYPES[dtype].itemsize
    for w in work:
        ours = Task(
            "ours", "none", w, args.model, args.shape, args.image if w is asked else None, args.prompt, dtype,
            str(device), args.backend, args.new_tokens, args.seed, args.kv_dtype,
        )  # fmt: skip
        tasks = [replace(ours, engine=e, prune=prune) for e in OURS if e in chosen for prune in prunes]
        tasks += [replace(ours, engine=e) for e in chosen if e not in OURS]
        shape = roofline.Shape("", text, sum(w.pictures), w.text)
        size = itemsize * (shape.weight_numbers + 2 * w.batch * w.tokens * shape.kv_numbers) + 2**29  # of one process
        found, known = {}, []
        together = not cuda and fits(len(tasks) * size, "SC_AVPHYS_PAGES")  # on a GPU times hardly vary
        for group in [tasks] if together else [[task] for task in tasks]:
            found |= run_tasks(group, args.rounds)
            known = make_rows(found, text.max_position_embeddings, shape, itemsize, 1e9 * about["bandwidth_GBps"])
            harness.save(args, about, rows + known)  # keep partial results of an interrupted run
        rows += known
        print(*show(known), sep="\n", flush=True)
    return 1 if any(row["right"] is False for row in rows) else 0


def chosen_model(args):
    """(TextConfig, tokens of a picture, the workload `picture` or None); InputError if the model does not exist."""
    if args.shape:
        if args.model or args.image:
            raise InputError("--shape uses random weights without a vision tower; leave out --model and --image")
        text, vision, _ = SHAPES[args.shape]
        return TextConfig(**text), roofline.tower_of(vision).patches, None
    if args.model is None:
        args.model, args.image = ROOT / "assets" / "demo", args.image or str(ROOT / "assets" / "demo.png")
    checkpoint = open_checkpoint(args.model)
    args.model, config, asked = str(checkpoint.folder), checkpoint.config, None
    if args.image:
        generation = Generation(checkpoint, args.prompt, [args.image])
        vision = generation.vision_tokens
        asked = Workload("picture", 1, (vision,), generation.prompt_tokens - vision)
    return config.text_config, config.image_tokens, asked


def in_8_bits(args, device, engines):
    """Those of the engines that have K and V in 8 bits; InputError if others were asked for, or the GPU cannot."""
    if others := [name for name in args.engines or () if name not in OURS]:
        raise InputError(f"--kv-dtype {args.kv_dtype} is not for {', '.join(others)}; give {' or '.join(OURS)}")
    if args.kv_dtype == "fp8" and args.backend != "torch" and not has_e4m3(device):
        raise InputError(f"--kv-dtype fp8: {device} has no float8_e4m3fn; use int8, or --backend torch")
    return [name for name in engines if name in OURS]


def fits(size, pages, share=0.5):
    """Are `size` bytes at most `share` of memory? pages: SC_PHYS_PAGES for all, SC_AVPHYS_PAGES for free memory."""
    known = pages in getattr(os, "sysconf_names", ())  # otherwise assume 16 GB
    return size <= share * (os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages) if known else 16e9)


def about_run(args, argv, device, dtype, model):
    """Model, machine, versions and settings of this run. Measures the bandwidth."""
    about = {"model": model, "weights": "random" if args.shape or args.growth else "of the checkpoint"}
    about |= harness.about_run("bench_decode", argv, device, dtype, args.rounds)
    about |= {"device": str(device), "transformers": harness.version("transformers"), "backend": args.backend}
    return about | {"new_tokens": args.new_tokens, "kv_dtype": args.kv_dtype}


# ---------------------------------------------------------------- growth


def growth(args, argv):
    """Measure a small model: decode step time over kept tokens, prefill memory over prompt tokens -> exit code."""
    device = choose_device(args.device)
    if device.type == "cpu" and sys.platform != "linux":
        raise InputError("--growth on a CPU reads process memory from Linux; give --device cuda or run it on Linux")
    if wrong := unwritable(args.json, args.plot):
        raise InputError(wrong)
    if device.type == "cpu":
        free_at_once()
    dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    tokens = [64, 128, 192] if args.smoke else [1024, 2048, 4096, 8192, 16384]
    thin = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    language = harness.random_language(TextConfig(vocab_size=512, **thin), DTYPES[dtype], device, args.seed)
    measured = {
        "decode ms": [1e3 * s for s in decode_seconds(language, tokens, 3 if args.smoke else 30)],
        "prefill MB": [1e-6 * prefill_peak(language, n) for n in tokens],
    }
    lines = {what: fitted(tokens, values) for what, values in measured.items()}
    for what, fit in lines.items():
        values = ", ".join(f"{n}: {v:.3f}" for n, v in zip(tokens, fit["values"], strict=True))
        found = f"{fit['intercept']:.3f} + {1e3 * fit['slope']:.3f} per 1000 tokens, R^2 {fit['r2']:.4f}"
        print(f"{what:12}{found}    ({values})")
    about = about_run(args, argv, device, dtype, "2 layers, 256 wide, 4 heads")
    if args.json:
        write_json(args.json, {"about": about, "tokens": tokens, **lines})
    if args.plot:
        plot(about, tokens, lines, args.plot)
    return 0


def free_at_once():
    """From now on return freed blocks of 64 KB or more to the system, so that process size equals live memory."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD of glibc


@torch.inference_mode()
def decode_seconds(language, lengths, rounds):
    """Median seconds of a decode step of one sequence for each kept length; heads keep different tokens."""
    config, table, runs = language.config, language.model.embed_tokens.weight, {}
    heads, tokens = config.num_key_value_heads, 2 * max(lengths)  # before pruning
    ids = torch.ones(1, dtype=torch.long, device=table.device)

    def once(step):
        start = time.perf_counter()
        step(ids).argmax(-1).tolist()  # waits for the device
        return time.perf_counter() - start

    for kept in lengths:
        cache = RaggedCache(config.num_hidden_layers)
        for layer in range(config.num_hidden_layers):
            k, v = torch.randn(2, 1, heads, tokens, config.head_dim, dtype=table.dtype, device=table.device)
            cache.pack(layer, k, v, torch.rand(heads, tokens, device=table.device).argsort(1) < kept)
        runs[kept] = partial(once, FastStep(language, cache))
    times, broken = harness.take_turns(runs, 3 + rounds)
    for why in broken.values():
        raise why
    return [statistics.median(seconds[3:]) for seconds in times.values()]  # the first three warm up and capture


@torch.inference_mode()
def prefill_peak(language, tokens):
    """Peak bytes of a pruned prefill of `tokens` tokens, excluding the model and its input."""
    config, table = language.config, language.model.embed_tokens.weight
    x = torch.randn(1, tokens, config.hidden_size, dtype=table.dtype, device=table.device)
    method, spans = method_of("plphp:dr=0@0.5"), [(1, tokens - tokens // 8)]

    def prefill():
        return harness.prefill(language, x, RaggedCache(config.num_hidden_layers), method, spans)

    prefill()  # one-time allocations
    harness.reset_peak(x.device)
    before = harness.peak_memory(x.device)
    prefill()
    return harness.peak_memory(x.device) - before


def fitted(x, y):
    """Least-squares line through the points, and its R^2."""
    slope, intercept = statistics.linear_regression(x, y)
    r2 = statistics.correlation(x, y) ** 2 if len(set(y)) > 1 else 1.0  # a constant lies on its line
    return {"values": y, "slope": slope, "intercept": intercept, "r2": r2}


def plot(about, tokens, lines, path):
    """Plot both curves with their fitted lines, in Okabe and Ito's colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    page, panels = pyplot.subplots(1, 2, figsize=(9, 4.3), layout="constrained")
    labels = (
        ("decode ms", "time of a decode step, ms", "tokens that each head keeps", "#D55E00"),
        ("prefill MB", "peak memory of a prefill, MB", "tokens of the prompt", "#0072B2"),
    )
    for axes, (what, value, label, colour) in zip(panels, labels, strict=True):
        fit = lines[what]
        axes.plot(tokens, [fit["intercept"] + fit["slope"] * n for n in tokens], color="#000000", linestyle=":")
        axes.plot(tokens, fit["values"], color=colour, marker="o", linestyle="")
        axes.set(xlabel=label, ylabel=value, ylim=(0, None))
        axes.set_title(f"dotted: least-squares line, R² {fit['r2']:.4f}", fontsize=10)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3)
    page.suptitle(f"{about['model']}, {about['dtype']}, {about['machine']}", fontsize=11)
    page.savefig(path, dpi=200)


def check_growth(args):
    """InputError for a flag that this mode would ignore."""
    of_growth = {"growth", "plot", "smoke", "device", "dtype", "seed", "json"}
    for name, value in vars(args).items():
        ignored = name not in of_growth if args.growth else name == "plot"
        if ignored and value != parser().get_default(name):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} works only {'without' if args.growth else 'with'} --growth; see -h")


def run(args, argv):
    check_growth(args)
    return growth(args, argv) if args.growth else bench(args, argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        return exit_code(run, args, argv)
    except KeyboardInterrupt:
        kept = " and ".join(filter(None, (args.json, args.csv)))
        say(f"interrupted; {f'the results so far are in {kept}' if kept else 'use --json to keep partial results'}")
        return 130


if __name__ == "__main__":
    sys.exit(as_command(main))
