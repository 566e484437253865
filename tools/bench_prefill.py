"""Benchmark the prefill of a whole question about a picture, with fewer vision tokens before the language model.

    python tools/bench_prefill.py                                     # random weights, 2,928 vision tokens
    python tools/bench_prefill.py --prune hired@0.25 visionzip@0.1 fastv@0.25
    python tools/bench_prefill.py --prune zipvl@0.5 --pictures 3 --noise 672x616    # 8,196 vision tokens
    python tools/bench_prefill.py --model DIR --image x.png --prompt "..."

Every method answers with one token; the rounds alternate, so that a machine that slows down affects all equally.
`vision` is the time of the vision tower and projector, `prefill` that of the language model with choosing, `TTFT` both.
`speed-up` is the unpruned prefill time over that of the method, `ceiling` the same ratio of floating-point operations
by arithmetic: matrix products over the tokens that each layer processes, and causal attention among those of them that
take part in it (zipvl: the important ones). A method that drops K and V only, such as plphp, saves no operations: its
ceiling is 1. `of it` is the speed-up over the ceiling; `of gain` the same of what they are above 1.

On a CPU that other programs use too, --clock processor counts the time that this process was running. `vision` then
ends with the last use of the projector, so it includes the choice of methods before the language model.
"""

import argparse
import random
import re
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from model import Generation, Sampling, load  # noqa: E402
from model.config import InputError  # noqa: E402
from model.flags import choose_device  # noqa: E402
from tools import engines, harness, make_checkpoint  # noqa: E402
from tools.command import as_command, exit_code, flags, number, one_of, say, unwritable  # noqa: E402
from tools.roofline import Shape  # noqa: E402
from tools.shapes import SHAPES  # noqa: E402

METHODS = ("pick-grid@0.25", "hired@0.25", "visionzip@0.25", "fastv@0.25", "plphp:dr=0@0.25")


def parser():
    p = flags(__doc__)
    # fmt: off
    p.add_argument("--model", metavar="DIR|ID", help="a checkpoint")
    p.add_argument("--shape", choices=SHAPES, help="random weights of this shape (default: thin-next, without --model)")
    p.add_argument("--image", metavar="PATH", help="a picture (default: noise)")
    p.add_argument("--noise", type=size, default=(672, 672), metavar="WxH", help="size of the noise (672x672 pixels)")
    p.add_argument("--pictures", type=number(int, 1), default=1, metavar="N", help="so many times (default 1)")
    p.add_argument("--prompt", default="Describe the picture.", help="default: %(default)s")
    p.add_argument("--prune", nargs="+", default=METHODS, metavar="SPEC[@F]", help=f"default: {' '.join(METHODS)}")
    p.add_argument("--rounds", type=number(int, 1), default=7, help="timed answers of each (default 7)")
    p.add_argument("--clock", choices=("wall", "processor"), default="wall", help="default: %(default)s")
    p.add_argument("--dtype", type=one_of("auto", "bf16", "fp16", "fp32"), default="auto", metavar="TYPE")
    p.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--csv", metavar="FILE")
    # fmt: on
    return p


def main(argv=None):
    p = parser()
    words = sys.argv[1:] if argv is None else argv
    args = p.parse_args(words)
    if args.model and args.shape:
        p.error("--model and --shape are both given; give one of them")
    if why := unwritable(args.json, args.csv):
        p.error(why)
    return exit_code(bench, args, words, interrupted="interrupted; nothing is printed before all rounds are done")


def bench(args, words):
    """Time all methods in turn, print and save the table -> exit code: 1 if a method broke."""
    checkpoint, clock = checkpoint_of(args), None if args.clock == "wall" else time.process_time
    if clock and checkpoint.device.type != "cpu":
        raise InputError(f"--clock processor does not see the time of {checkpoint.device}; use --clock wall")
    methods = {"none": None} | {spec: engines.method_of(spec, checkpoint.folder) for spec in args.prune}
    shown = [args.image or noise(args.noise)] * args.pictures
    asked = Generation(checkpoint, args.prompt, shown, Sampling(max_new_tokens=1), timed=True)
    runs = {spec: lambda method=method: prefilled(asked, method, clock) for spec, method in methods.items()}
    times, broken = {}, {}
    for turn in range(args.rounds + 1):  # the first round is a warm-up
        say(f"round {turn} of {args.rounds}" if turn else "warm-up")
        found, stopped = harness.take_turns({spec: runs[spec] for spec in runs if spec not in broken}, 1)
        broken |= stopped
        for spec, (took,) in ((spec, took) for spec, took in found.items() if took and turn):
            times.setdefault(spec, []).append(took)
    rows = [row_of(spec, times.get(spec), broken.get(spec)) for spec in methods]
    for row in rows:
        compare_with(rows[0], row)
    about = harness.about_run("bench_prefill", words, checkpoint.device, str(checkpoint.dtype)[6:], args.rounds)
    squares = sum(image["tiles"] for image in asked.images)
    print(f"{about['machine']}, {about['threads']} threads, {about['dtype']}; {asked.prompt_tokens} tokens, "
          f"{asked.vision_tokens} of them vision tokens in {squares} squares")  # fmt: skip
    print("\n".join(harness.table(rows, {"prune": max(map(len, methods))}, COLUMNS, lambda row: "")))
    harness.save(args, about, rows)
    return 1 if broken else 0


COLUMNS = (
    ("tokens", "tokens", 1, 7, ".0f"), ("vision ms", "vision", 1e3, 10, ".0f"),
    ("prefill ms", "prefill", 1e3, 11, ".0f"),
    ("TTFT ms", "ttft", 1e3, 8, ".0f"), ("vision", "vision_ratio", 1, 7, ".2f"), ("speed-up", "speedup", 1, 9, ".2f"),
    ("20 %", "low", 1, 6, ".2f"), ("80 %", "high", 1, 6, ".2f"), ("ceiling", "ceiling", 1, 8, ".2f"),
    ("of it", "share", 1, 6, ".2f"), ("of gain", "gain", 1, 8, ".2f"), ("KV MB", "kv_bytes", 1e-6, 7, ".1f"),
)  # fmt: skip


def checkpoint_of(args):
    """The checkpoint of --model, or random weights of --shape, written to a temporary folder and read from it."""
    device = choose_device(args.device)
    if args.model:
        return load(args.model, args.dtype, device)
    stored = "fp32" if args.dtype == "auto" else args.dtype
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(sys.stderr):
            make_checkpoint.make(Path(folder) / "model", args.shape or "thin-next", stored)
        return load(Path(folder) / "model", args.dtype, device)


def size(text):
    """ "WxH" -> (W, H), pixels; by default a picture fills 2 x 2 tiles of 336."""
    found = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if not found or not (int(found[1]) and int(found[2])):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give WIDTHxHEIGHT, such as 672x672")
    return int(found[1]), int(found[2])


def noise(shape):
    """A picture of this size, (width, height)."""
    pixels = random.Random(0).randbytes(3 * 84 * 84)
    return Image.frombytes("RGB", (84, 84), pixels).resize(shape, Image.Resampling.BICUBIC)


def prefilled(asked, method, clock=None):
    """Prefill a question with this method -> its times in seconds, tokens, bytes and floating-point operations.

    clock: replaces the times that the Generation measures itself: those up to the last use of the projector and after.
    """
    generation = asked.again(method)
    checkpoint, projected, processed, hooks = generation.checkpoint, [], [], []
    now = clock or time.perf_counter
    hooks.append(checkpoint.model.multi_modal_projector.register_forward_hook(lambda *_: projected.append(now())))
    for layer in checkpoint.model.language_model.model.layers:
        norm = layer.post_attention_layernorm  # it sees every token that the layer processes
        hooks.append(norm.register_forward_pre_hook(lambda _, given: processed.append(given[0].shape[1])))
    start = now()
    try:
        with torch.inference_mode():
            generation.prefill()
        end = now()
    finally:
        for hook in hooks:
            hook.remove()
    times = {"vision": projected[-1] - start, "prefill": end - projected[-1]} if clock else generation.timing
    ahead = checkpoint.lookahead.rows if method and method.looks_ahead else 0
    tokens = [count - ahead for count in processed]
    # a method with `attend` stores what takes part
    attending = generation.cache.kv_len.amax(1).tolist() if method and method.attends else tokens
    return {
        "vision": times["vision"], "prefill": times["prefill"], "tokens": generation.prefilled,
        "kv_bytes": generation.bytes_held, "flops": flops(checkpoint.config.text_config, tokens, attending),
    }  # fmt: skip


def flops(config, tokens, attending):
    """Floating-point operations of a prefill whose layers process these numbers of tokens, of which those numbers
    attend to each other; the output head included."""
    shape = Shape("", config, 0, 0)
    products = 2 * sum(tokens) * shape.layer_numbers
    attention = sum(shape.attention_flops(count, count) / 2 for count in attending)
    return (products + attention) / len(tokens) + 2 * shape.head_numbers


def row_of(spec, times, why):
    """A row of the table: medians over the rounds."""
    if why is not None or not times:
        return {"prune": spec, "right": None, "why": str(why)}
    medians = {key: harness.spread([took[key] for took in times])[1] for key in times[0]}
    return {"prune": spec, "right": True, **medians, "ttft": medians["vision"] + medians["prefill"], "rounds": times}


def compare_with(plain, row):
    """Add to a row what it gains over the unpruned one: round by round, so that a slow machine slows both."""
    if not (row["right"] and plain["right"]):
        return
    pairs = list(zip(plain["rounds"], row["rounds"], strict=True))
    gains = [a["prefill"] / b["prefill"] for a, b in pairs]
    row["low"], row["speedup"], row["high"] = harness.spread(gains)
    row["vision_ratio"] = harness.spread([b["vision"] / a["vision"] for a, b in pairs])[1]
    row["ceiling"] = plain["flops"] / row["flops"]
    row["share"] = row["speedup"] / row["ceiling"]
    row["gain"] = (row["speedup"] - 1) / (row["ceiling"] - 1) if row["ceiling"] > 1 else None


if __name__ == "__main__":
    sys.exit(as_command(main))
