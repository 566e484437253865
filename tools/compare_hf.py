"""Run the same checkpoint, picture and prompt with this project and with transformers, each in its own process.

    python tools/compare_hf.py                                    # the demo model
    python tools/compare_hf.py --model DIR --dtype bf16 -n 4 --repeat 1    # 7B on a CPU

Prints one table: load time, time to first token, decode speed, anonymous memory (allocated by the process; excludes
mapped weight files), and whether the greedy ids agree. Needs the packages of requirements-test.txt.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.console import as_command  # noqa: E402


def parser():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--model", default=str(ROOT / "assets" / "demo"))
    p.add_argument("--image", default=str(ROOT / "assets" / "demo.png"))
    p.add_argument("--prompt", default="Describe the picture.")
    p.add_argument("-n", "--max-new-tokens", type=int, default=128)
    p.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    p.add_argument("--repeat", type=int, default=3, help="timed runs after one warm-up; the best counts (default 3)")
    p.add_argument("--process", action="store_true", help="also time a run.py process and a bare `import torch`")
    p.add_argument("--engine", choices=("ours", "transformers"), help=argparse.SUPPRESS)  # the child processes
    return p


class AnonymousMemory(threading.Thread):
    """Largest RssAnon of this process in bytes, sampled every 20 ms (Linux)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0

    def run(self):
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(0.02)


def run_ours(args):
    from model import Generation, Sampling, load

    start = time.perf_counter()
    checkpoint = load(args.model, args.dtype)
    loaded = time.perf_counter() - start
    runs = []
    for _ in range(1 + args.repeat):
        sampling = Sampling(max_new_tokens=args.max_new_tokens)
        generation = Generation(checkpoint, args.prompt, [args.image], sampling, timed=True)
        "".join(generation)
        t = generation.timing
        runs.append((t["vision"] + t["prefill"], sum(t["steps"]) / max(1, len(t["steps"]))))
    weights = sum(p.nbytes for p in checkpoint.model.parameters())
    return loaded, runs, generation.token_ids, {"weights": weights}


def run_transformers(args):
    """generate() with its defaults; it suppresses the ids that this project never generates."""
    from model import Generation, open_checkpoint
    from model.checkpoint import DTYPES
    from tools.hf import import_transformers

    start = time.perf_counter()
    dtype = DTYPES[args.dtype]
    model = import_transformers().AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).eval()
    loaded = time.perf_counter() - start
    asked = Generation(open_checkpoint(args.model), args.prompt, [args.image])  # for ids and pixels only
    inputs = hf_inputs(asked, dtype)

    def timed(n):
        begin = time.perf_counter()
        out = model.generate(**inputs, do_sample=False, max_new_tokens=n)
        return time.perf_counter() - begin, out[0, asked.prompt_tokens :].tolist()

    runs = []
    for _ in range(1 + args.repeat):
        first, _ = timed(1)
        whole, said = timed(args.max_new_tokens)
        runs.append((first, (whole - first) / max(1, len(said) - 1)))
    return loaded, runs, [t for t in said if t not in asked.checkpoint.stop_ids], {}


def hf_inputs(asked, dtype, device="cpu"):
    """Arguments of transformers' generate() for a Generation with one picture."""
    import torch

    image, (picture,) = asked.checkpoint.config.image_token_index, asked.images
    ids = [i for t in asked.ids for i in [t] * (picture["tokens"] if t == image else 1)]
    ids, pixels = torch.tensor([ids], device=device), torch.stack(asked.pixels).to(device, dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "suppress_tokens": asked.never()}
    if not asked.checkpoint.config.image_grid_pinpoints:
        return inputs | {"pixel_values": pixels}
    # LLaVA-NeXT: (pictures, squares, 3, S, S) and (height, width)
    return inputs | {"pixel_values": pixels[None], "image_sizes": torch.tensor([picture["size"][::-1]])}


def child(args):
    memory = AnonymousMemory()
    memory.start()
    loaded, runs, ids, more = (run_ours if args.engine == "ours" else run_transformers)(args)
    warm = runs[1:] or runs
    result = {
        "load": loaded,
        "first": min(r[0] for r in warm),
        "step": min(r[1] for r in warm),
        "ids": ids,
        "anonymous": memory.peak,
    }
    print(json.dumps({**result, **more}))


def process_seconds(words, repeat=3):
    """Wall time of a Python process, the best of `repeat`."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        best = min(best, time.perf_counter() - start)
    return best


def main():
    args = parser().parse_args()
    if args.max_new_tokens < 2 or args.repeat < 1:
        return "error: -n must be at least 2 (prefill gives the first token) and --repeat at least 1; try -n 4"
    if args.engine:
        return child(args)
    rows = {}
    for engine in ("ours", "transformers"):
        print(f"running {engine} ...", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--engine", engine], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            return f"error: {engine} exited with {done.returncode}; see its message above"
        rows[engine] = json.loads(done.stdout.splitlines()[-1])
    print(f"{'':14}{'load s':>9}{'first token ms':>16}{'ms/token':>10}{'tokens/s':>10}{'anonymous MB':>14}")
    for engine, r in rows.items():
        speeds = f"{1e3 * r['first']:16.1f}{1e3 * r['step']:10.2f}{1 / r['step']:10.1f}"
        print(f"{engine:14}{r['load']:9.2f}{speeds}{r['anonymous'] / 1e6:14.0f}")
    ours, theirs = rows["ours"], rows["transformers"]
    same = ours["ids"] == theirs["ids"]
    agree = f"greedy ids {'agree' if same else 'DIFFER'} over {len(ours['ids'])} tokens"
    decode, first = theirs["step"] / ours["step"], theirs["first"] / ours["first"]
    print(
        f"weights {ours['weights'] / 1e6:.0f} MB; decode {decode:.2f}x transformers, first token {first:.2f}x; {agree}"
    )
    if args.process:
        bare = process_seconds(["-c", "import torch"])
        words = ["--model", args.model, "--image", args.image, "--prompt", args.prompt]
        whole = process_seconds([str(ROOT / "run.py"), *words])
        print(f"run.py process {whole:.2f} s, `import torch` alone {bare:.2f} s: {whole / bare:.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(as_command(main))
