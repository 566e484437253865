"""Time the kernels against what people would use instead. A wrong result is never timed.

    python tools/bench_kernels.py                            # ragged_decode on this machine
    python tools/bench_kernels.py decode                     # whole decode steps of the demo model
    python tools/bench_kernels.py all --json out.json --csv out.csv
    python tools/bench_kernels.py ragged_decode --kernel my.py    # my.py::ragged_decode beside ours

Every row is one provider on one case. `speed` is the baseline's time over the provider's, the median over rounds in
which all providers take turns, so a machine that slows down slows all of them. `ceiling` is the part of the measured
memory bandwidth that the useful bytes reach. A round calls every copy of the problem once, each with buffers of its
own, so that the caches hold little of it (a decode step reads what one model reads, over and over). On CUDA a round is
one captured graph. Every copy is checked before the timing and after it.
"""

import argparse
import csv
import importlib.util
import inspect
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels  # noqa: E402
from model import InputError, load  # noqa: E402
from model.cache import RaggedCache  # noqa: E402
from run import choose_device, number  # noqa: E402
from tools.report import measure_bandwidth  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# B, Hkv, G, D of a layer
SHAPES = {"demo": (1, 4, 2, 32), "7b": (1, 32, 1, 128), "gqa8": (1, 8, 4, 128), "gqa8 x 8": (8, 8, 4, 128)}
OPS = ("ragged_decode", "window_scores", "ragged_pack", "decode")


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(OPS)} or all (default ragged_decode)")
    p.add_argument("--shapes", nargs="+", default=["demo", "7b", "gqa8"], choices=SHAPES, metavar="SHAPE")
    p.add_argument("--tokens", nargs="+", type=number(int, 1), default=[640, 2048], metavar="T", help="before pruning")
    p.add_argument("--retention", nargs="+", type=number(float, 0, 1, open_low=True), default=[1.0, 0.3], metavar="F")
    p.add_argument(
        "--batch", nargs="+", type=number(int, 1), default=[1], metavar="B", help="sequences, of decode (default 1)"
    )
    p.add_argument("--dtype", choices=DTYPES, help="default fp32 on a CPU, bf16 on CUDA")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=number(int, 1), default=15, help="turns of each provider (default 15)")
    p.add_argument("--kernel", metavar="FILE.py", help="also time the function of the op's name in this file")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--csv", metavar="FILE")
    return p


# ---------------------------------------------------------------- cases


@dataclass
class Case:
    """One problem, several times over with buffers of its own: calls[provider][i]() runs copy i."""

    name: str
    bytes: int  # that have to be read and written
    calls: dict  # provider -> list of functions
    checks: dict  # provider -> list of functions, each: (what it gives, the same in plain PyTorch, in float64)
    baseline: str


def lengths_of(layout, segments, tokens, retention, generator):
    """Kept tokens per segment (S,): all equal, or between 0.25 and 1.75 of the mean, with the same sum."""
    mean = max(1, round(retention * tokens))
    if layout == "equal":
        return torch.full((segments,), mean)
    share = 0.25 + 1.5 * torch.rand(segments, generator=generator)
    lengths = (share / share.sum() * mean * segments).round().long()
    lengths[-1] += mean * segments - lengths.sum()
    return lengths.clamp(1, tokens)


def attention(q, k, v, mask=None):
    """q (B, Hq, D), k and v (B, Hkv, n, D): one query row per head, the G heads of a group as rows of one product."""
    rows = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, D)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).flatten(1, 2)


def exact_attention(q, k, v, mask=None, dtype=torch.float64):
    """The same in another dtype, written out."""
    rows, k, v = q.unflatten(1, (k.shape[1], -1)).to(dtype), k.to(dtype), v.to(dtype)
    scores = rows @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).flatten(1, 2)


def copies_for(size, device):
    """How many copies of a problem are more than the last cache holds; at most 256."""
    cache = 4 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**26
    return max(2, min(256, -(-cache // size)))


def decode_case(shape, tokens, retention, layout, dtype, device, own):
    """ragged_decode over one layer, beside SDPA on all tokens, on the packed rectangle, and padded with a mask."""
    b, hkv, group, d = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    segments = b * hkv
    lengths = lengths_of(layout, segments, tokens, retention, generator)
    longest, slack = int(lengths.max()), 64
    size = 2 * int(lengths.sum()) * d * dtype.itemsize
    calls, checks = {}, {}

    def add(name, call, arguments):
        def check():
            return call(), *(exact_attention(*arguments, dtype=t) for t in (dtype, torch.float64))

        calls.setdefault(name, []).append(call)
        checks.setdefault(name, []).append(check)

    for _ in range(copies_for(size, device)):
        random = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
        q, dense_k, dense_v = random(b, hkv * group, d), random(b, hkv, tokens, d), random(b, hkv, tokens, d)
        keep = torch.arange(tokens) < lengths[:, None]  # which ones does not matter for speed
        k, v, start, length, _ = kernels.ragged_pack(
            dense_k.flatten(0, 1), dense_v.flatten(0, 1), keep.to(device), slack=slack
        )
        plan = kernels.decode_plan(start, length + slack)
        padded_k, padded_v = (t[:, :, :longest].contiguous() for t in (dense_k, dense_v))
        mask = keep[:, :longest].view(b, hkv, 1, longest).to(device)
        masked = (q, padded_k, padded_v, mask)
        add("sdpa, all tokens", lambda a=(q, dense_k, dense_v): attention(*a), (q, dense_k, dense_v))
        if layout == "equal":
            add("sdpa, rectangle", lambda a=masked[:3]: attention(*a), masked[:3])
        add("sdpa, padded + mask", lambda a=masked: attention(*a), masked)
        ragged = (q, k, v, start, length)
        add("ours, torch", lambda a=ragged, p=plan: kernels.ragged_decode(*a, plan=p, backend="torch"), masked)
        if own:
            add(*own_call(own, ragged, plan=plan), masked)
    name = f"{shape}, {tokens} tokens, {retention:g} kept, {layout}"
    return Case(name, size, calls, checks, "sdpa, all tokens")


def scores_case(shape, tokens, dtype, device, own, rows=1):
    """window_scores of the last rows of a prompt, beside the written-out softmax."""
    _, hkv, group, d = SHAPES[shape]
    calls, checks = {}, {}
    size = hkv * tokens * d * dtype.itemsize
    for i in range(copies_for(size, device)):
        generator = torch.Generator().manual_seed(i)
        q, k = (
            torch.randn(n, t, d, generator=generator).to(device, dtype) for n, t in ((hkv * group, rows), (hkv, tokens))
        )

        def plain(q=q, k=k, compute=torch.float32):
            scores = q.to(compute) @ k.to(compute).repeat_interleave(group, 0).transpose(1, 2) * d**-0.5
            future = torch.arange(tokens, device=device) > torch.arange(tokens - rows, tokens, device=device)[:, None]
            return scores.masked_fill(future, float("-inf")).softmax(-1).mean(1)

        providers = {"plain softmax": plain, "ours, torch": lambda a=(q, k): kernels.window_scores(*a, group="none")}
        if own:
            name, call = own_call(own, (q, k), group="none")
            providers[name] = call
        for name, call in providers.items():
            calls.setdefault(name, []).append(call)
            check = lambda call=call, plain=plain: (call(), plain(), plain(compute=torch.float64))  # noqa: E731
            checks.setdefault(name, []).append(check)
    return Case(f"{shape}, {tokens} tokens, {rows} rows", size, calls, checks, "plain softmax")


def pack_case(shape, tokens, retention, dtype, device, own):
    """ragged_pack of one layer, beside indexing (which leaves no room for new tokens)."""
    _, hkv, _, d = SHAPES[shape]
    calls, checks = {}, {}
    size = 4 * round(retention * hkv * tokens) * d * dtype.itemsize  # read and written, K and V
    for i in range(copies_for(size, device)):
        generator = torch.Generator().manual_seed(i)
        k, v = (torch.randn(hkv, tokens, d, generator=generator).to(device, dtype) for _ in range(2))
        keep = (torch.rand(hkv, tokens, generator=generator) < retention).to(device)
        total = int(keep.sum())

        def index(k=k, v=v, keep=keep, total=total):
            rows = keep.flatten().nonzero_static(size=total)[:, 0]  # as k[keep], but without waiting for the device
            return torch.cat((k.flatten(0, 1)[rows], v.flatten(0, 1)[rows]))

        ours = lambda a=(k, v, keep), n=total: kernels.ragged_pack(*a, slack=64, total=n)  # noqa: E731
        providers = {"indexing": index, "ours, torch": ours}
        if own:
            name, call = own_call(own, (k, v, keep), slack=64, total=total)
            providers[name] = call
        for name, call in providers.items():
            check = lambda call=call, index=index: (kept_rows(call()), index(), index().double())  # noqa: E731
            calls.setdefault(name, []).append(call)
            checks.setdefault(name, []).append(check)
    return Case(f"{shape}, {tokens} tokens, {retention:g} kept", size, calls, checks, "indexing")


def kept_rows(packed):
    """What ragged_pack has put into its arenas, without the free slots."""
    if isinstance(packed, torch.Tensor):
        return packed
    k_arena, v_arena, _, _, kv_pos = packed
    return torch.cat((k_arena[kv_pos >= 0], v_arena[kv_pos >= 0]))


# ---------------------------------------------------------------- whole steps of the demo model


class DenseCache:
    """The baseline: contiguous K and V (B, Hkv, capacity, D), every head keeping everything."""

    def __init__(self, num_layers, capacity):
        self.capacity, self.k, self.v = capacity, [None] * num_layers, [None] * num_layers
        self.length, self.pos = 0, None

    def pack(self, layer, k, v, keep=None):
        b, h, t, d = k.shape
        self.k[layer], self.v[layer] = k.new_empty(b, h, self.capacity, d), k.new_empty(b, h, self.capacity, d)
        self.k[layer][:, :, :t], self.v[layer][:, :, :t] = k, v
        self.length, self.pos = t, torch.full((b,), t, device=k.device)

    def grow(self):
        self.length += 1
        self.pos += 1

    def append(self, layer, k, v):
        self.k[layer][:, :, self.length - 1], self.v[layer][:, :, self.length - 1] = k, v

    def attend(self, layer, q):
        n = self.length
        return attention(q, self.k[layer][:, :, :n], self.v[layer][:, :, :n])


def step_case(batch, tokens, retention, layout, device, rounds):
    """One decode step of the demo model on prompts of `tokens`: the dense cache of all of it, and the ragged one."""
    checkpoint = load(ROOT / "assets" / "demo", "fp32", device)
    model, config = checkpoint.model.language_model, checkpoint.config.text_config
    generator = torch.Generator().manual_seed(0)
    x = model.model.embed_tokens.weight[torch.randint(3, 600, (batch, tokens), generator=generator).to(device)]
    segments, steps = batch * config.num_key_value_heads, 2 * rounds + 8
    dense = DenseCache(config.num_hidden_layers, tokens + steps)
    ragged = RaggedCache(config.num_hidden_layers, slack=steps)

    def choose(layer, q, k):
        lengths = lengths_of(layout, segments, tokens, retention, generator)
        draw = torch.rand(segments, tokens, generator=generator).argsort(-1).argsort(-1)
        return (draw < lengths[:, None]).to(device)

    model.prefill(x, dense)
    model.prefill(x, ragged, choose=choose if retention < 1 else None)
    q = torch.randn(batch, config.num_attention_heads, config.head_dim, generator=generator).to(device)
    checks = {n: [lambda c=c: attended(c, q)] for n, c in (("dense cache", dense), ("ours, torch", ragged))}
    calls = {n: [lambda c=c: model.decode(x[:, 0], c)] for n, c in (("dense cache", dense), ("ours, torch", ragged))}
    weights = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith(("lm_head", "model.embed_tokens")))
    name = f"demo model, {batch} x {tokens} tokens, {retention:g} kept, {layout}"
    return Case(name, weights + ragged.nbytes_held, calls, checks, "dense cache")


def attended(cache, q):
    """What a cache gives for q in all layers, and what its rows should give."""
    got, plain, exact = [], [], []
    for layer in range(len(cache.k)):
        got.append(cache.attend(layer, q))
        if isinstance(cache, DenseCache):
            arguments = q, *(t[layer][:, :, : cache.length] for t in (cache.k, cache.v))
            plain.append(exact_attention(*arguments, dtype=torch.float32))
            exact.append(exact_attention(*arguments))
            continue
        k, v, where = cache.k[layer], cache.v[layer], (cache.kv_start[layer], cache.kv_len[layer])
        plain.append(kernels.ragged_decode_ref(q, k, v, *where))
        exact.append(kernels.ragged_decode_ref(q.double(), k.double(), v.double(), *where))
    return torch.stack(got), torch.stack(plain), torch.stack(exact)


# ---------------------------------------------------------------- check, time, print


def own_call(own, arguments, **options):
    """(name, call) of somebody's function; options that it does not know are left out."""
    name, function = own
    known = inspect.signature(function).parameters
    options = {k: v for k, v in options.items() if k in known}
    return name, lambda: function(*arguments, **options)


def is_wrong(checks):
    """What is wrong with a provider on all copies, None if nothing is."""
    try:
        results = [check() for check in checks]
        if not all(isinstance(got, torch.Tensor) and got.shape == exact.shape for got, _, exact in results):
            return "WRONG RESULT"
        got, plain, exact = (torch.cat([t.flatten() for t in outputs]) for outputs in zip(*results, strict=True))
        return None if is_right(got, plain, exact) else "WRONG RESULT"
    except Exception as broken:  # somebody's kernel
        return f"{type(broken).__name__}: {' '.join(str(broken).split())[:80]}"


def is_right(got, plain, exact):
    """The tolerance of the tests: twice the error of plain PyTorch plus two ulp of the result's dtype."""
    if not got.isfinite().all():
        return False
    ulp = ULP.get(got.dtype, 2**-23) * exact.abs().max()
    return bool((got.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + 2 * ulp)


def captured(calls, device):
    """On CUDA one graph of all calls; on a CPU the calls, one after the other."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up outside of the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def seconds(run, device):
    """Duration of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return 1e-3 * start.elapsed_time(stop)


def measure(op, case, rounds, bandwidth, device):
    """Rows of one case, one per provider."""
    wrong = {name: is_wrong(checks) for name, checks in case.checks.items()}
    runs = {name: captured(calls, device) for name, calls in case.calls.items() if not wrong[name]}
    times = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            t = seconds(run, device) / len(case.calls[name])
            if i:  # the first round warms up
                times[name].append(t)
    wrong |= {name: is_wrong(case.checks[name]) for name in runs}  # still?
    rows = []
    for name in case.calls:
        row = {"op": op, "case": case.name, "provider": name, "right": not wrong[name], "wrong": wrong[name]}
        if not wrong[name]:
            median = statistics.median(times[name])
            base = times[case.baseline] if not wrong[case.baseline] else times[name]
            speed = statistics.median(a / b for a, b in zip(base, times[name], strict=True))
            reads_all = name == case.baseline and op in ("ragged_decode", "decode")  # more bytes than the case's
            reached = None if reads_all else case.bytes / median / bandwidth
            row |= {"us": 1e6 * median, "speed": speed, "ceiling": reached}
        rows.append(row)
    return rows


def show(rows):
    """One table per op; a wrong provider has no numbers."""
    for row in rows:
        if not row["right"]:
            yield f"  {row['provider']:22} {row['wrong']}, not timed"
            continue
        ceiling = f"{100 * row['ceiling']:5.1f} %" if row["ceiling"] is not None else "      -"
        yield f"  {row['provider']:22} {row['us']:10.1f} us   speed {row['speed']:5.2f}   ceiling {ceiling}"


def cases(args, dtype, device, own):
    """(op, Case) one after the other."""
    for op in args.ops:
        if op == "decode":
            for tokens in args.tokens:
                for retention in args.retention:
                    for layout in ("equal", "ragged") if retention < 1 else ("equal",):
                        for batch in args.batch:
                            yield op, step_case(batch, tokens, retention, layout, device, args.rounds)
            continue
        for shape in args.shapes:
            for tokens in args.tokens:
                if op == "window_scores":
                    yield op, scores_case(shape, tokens, dtype, device, own.get(op))
                    continue
                for retention in args.retention:
                    if op == "ragged_pack":
                        yield op, pack_case(shape, tokens, retention, dtype, device, own.get(op))
                        continue
                    for layout in ("equal", "ragged") if retention < 1 else ("equal",):
                        yield op, decode_case(shape, tokens, retention, layout, dtype, device, own.get(op))


def load_own(path, ops):
    """Functions of somebody's file, by the name of their op."""
    if path is None:
        return {}
    found = importlib.util.spec_from_file_location(f"own_{Path(path).stem}", path)
    if found is None or not Path(path).is_file():
        raise SystemExit(f"error: {path} is no Python file; give --kernel FILE.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[module.__name__] = module  # triton looks a kernel's module up
    try:
        found.loader.exec_module(module)
    except Exception as broken:
        raise SystemExit(f"error: {path} cannot be imported ({type(broken).__name__}: {broken}); mend it") from broken
    name = Path(path).stem
    own = {op: (name, getattr(module, op)) for op in ops if callable(getattr(module, op, None))}
    if not own:
        raise SystemExit(f"error: {path} has none of {', '.join(ops)}; name the function after the op")
    return own


@torch.inference_mode()
def main(argv=None):
    args = parser().parse_args(argv)
    args.ops = list(OPS) if "all" in args.ops else args.ops or ["ragged_decode"]
    if unknown := [op for op in args.ops if op not in OPS]:
        raise SystemExit(f"error: there is no op {unknown[0]!r}; use {', '.join(OPS)} or all")
    try:
        device = choose_device(args.device)
        for path in filter(None, (args.json, args.csv)):  # before anything is measured
            open(path, "a").close()
    except (InputError, OSError) as wrong:
        raise SystemExit(f"error: {wrong}") from None
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    own = load_own(args.kernel, args.ops)
    bandwidth = measure_bandwidth(device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    about = {
        "machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": str(dtype),
        "bandwidth_GBps": round(bandwidth / 1e9, 1), "rounds": args.rounds, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows = []
    for op, case in cases(args, dtype, device, own):
        print(f"\n{op}: {case.name}, {case.bytes / 1e6:.2f} MB", flush=True)
        new = measure(op, case, args.rounds, bandwidth, device)
        print("\n".join(show(new)), flush=True)
        rows += new
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, ["op", "case", "provider", "right", "wrong", "us", "speed", "ceiling", *about])
            writer.writeheader()
            writer.writerows(row | about for row in rows)
    return 0 if all(row["right"] for row in rows) else 1


def cpu_name():
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
