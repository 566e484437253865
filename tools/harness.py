"""What the benchmarks share: models and caches to time, the clock, the check before it, the machine, the report.

On CUDA a run is one captured graph, so that times exclude launches from Python. What is compared takes turns, so that a
machine that slows down affects all alike.
"""

import csv
import importlib.metadata
import json
import os
import platform
import re
import shlex
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import dequantised, quantise
from model.fast import arrange
from model.llama import Llama
from model.report import measure_bandwidth
from model.view import Pruning, pruned_prefill

from .command import one_line, write_json

ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
NEEDS_CUDA = "needs CUDA; TRITON_INTERPRET=1 checks it without a GPU"  # a Triton kernel


# ---------------------------------------------------------------- what is timed


def random_language(config, dtype, device, seed=0, tied=False):
    """A Llama with random weights, generated on the device in their dtype, so that no tensor exists twice."""
    with torch.device("meta"):
        language = Llama(config, tied).to(dtype).requires_grad_(False)
    language.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in language.named_parameters():
        biased = name.endswith("bias")
        p.fill_(1.0) if p.ndim == 1 and not biased else p.normal_(0, 0.02, generator=generator)
    arrange(language)  # as `load` does for weights that are not memory-mapped
    return language


def prefill(language, x, cache=None, method=None, spans=(), backend="auto", lookahead=None):
    """Prefill of embedded prompts x (B, T, C) with pictures at `spans` -> final hidden states.

    method: None keeps everything; lookahead: for methods that need its rows.
    """
    if method is None:
        return language.prefill(x, cache)
    if method.picks:
        raise ValueError(
            f"method {method.name} acts before the language model, and there is no picture; use another one"
        )
    lookahead = lookahead if method.looks_ahead else None
    ahead = lookahead.rows if lookahead else 0
    layers = language.config.num_hidden_layers
    pruning = Pruning(method, layers, spans, ahead=ahead, backend=backend, embeddings=x[0])
    return pruned_prefill(language, x[0], cache, pruning, lookahead)


def attention(q, k, v, mask=None):
    """SDPA of q (B, Hq, D) over k and v (B, Hkv, n, D), with the G heads of a group as rows of one product."""
    rows = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, D)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).flatten(1, 2)


def exact_attention(q, k, v, mask=None, dtype=torch.float64):
    """`attention` as plain matrix products in another dtype."""
    rows, k, v = q.unflatten(1, (k.shape[1], -1)).to(dtype), k.to(dtype), v.to(dtype)
    scores = rows @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).flatten(1, 2)


class DenseCache:
    """Contiguous K and V (B, Hkv, capacity, D) that hold all tokens; a mask hides the dropped ones.

    The baseline of a ragged cache, and the reference for its results. codes: None, or the type of the 8-bit codes whose
    rounding the rows get; they are held in full.
    """

    fused = evicts = False  # q and k arrive rotated

    def __init__(self, num_layers, capacity, codes=None):
        self.capacity, self.codes, self.pos = capacity, codes, None
        self.k, self.v, self.mask = [None] * num_layers, [None] * num_layers, [None] * num_layers
        self.lengths = [0] * num_layers  # later layers may see fewer tokens

    def pack(self, layer, k, v, keep=None):
        b, h, t, _ = k.shape
        self.k[layer], self.v[layer] = (F.pad(self.stored(x), (0, 0, 0, self.capacity - t)) for x in (k, v))
        if keep is not None:
            self.mask[layer] = F.pad(keep.view(b, h, 1, t), (0, self.capacity - t), value=True)
        self.lengths[layer] = t
        if self.pos is None:
            self.pos = torch.full((b,), t, device=k.device)

    def stored(self, x):
        return x if self.codes is None else dequantised(*quantise(x, self.codes), x.dtype)

    def grow(self, tokens=1, held=False):
        self.lengths = [n + tokens for n in self.lengths]
        self.pos += tokens

    def reserving(self, tokens):
        return nullcontext()  # a step that fails ends the benchmark

    def give_back(self):
        self.grow(-1)

    def append_attend(self, layer, q, k, v, rope):
        n, mask = self.lengths[layer], self.mask[layer]
        self.k[layer][:, :, n - 1], self.v[layer][:, :, n - 1] = self.stored(k), self.stored(v)
        return attention(q, *self.rows(layer), None if mask is None else mask[..., :n])

    def rows(self, layer):
        """K and V (B, Hkv, n, D) of a layer."""
        return [t[layer][:, :, : self.lengths[layer]] for t in (self.k, self.v)]


# ---------------------------------------------------------------- the clock and the memory


def timer(calls, device, repeatable=True):
    """(function () -> seconds per call, is it a graph?): one graph on CUDA, otherwise a loop over the calls.

    repeatable: False if each call changes the state of later ones.
    """
    if device.type == "cuda" and repeatable:  # at least 16 calls, to make the gap between two graphs negligible
        calls = calls * -(-16 // len(calls))

    def loop():
        for call in calls:
            call()

    graph = captured(calls, loop) if device.type == "cuda" else None
    run = loop if graph is None else graph.replay
    return lambda: seconds(run, device) / len(calls), graph is not None


def captured(calls, loop):
    """A CUDA graph of the loop over the calls; None if they synchronise."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up before the capture
        alone = waits(calls[0])
        for call in calls[1:]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    if alone:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()
    return graph


def waits(call):
    """Whether a call synchronises and thus cannot be captured. A failed capture would break later calls."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def seconds(run, device):
    """Duration of one run."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()  # keeps the device busy while the host enqueues the next run, so that launch time is not measured
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return 1e-3 * start.elapsed_time(stop)


def take_turns(runs, rounds):
    """Call {name: function} in turn -> ({name: its result in each round}, {name: the exception that stopped it})."""
    results, broken = {name: [] for name in runs}, {}
    for _ in range(rounds):
        for name in [name for name in runs if name not in broken]:
            try:
                results[name].append(runs[name]())
            except Exception as why:  # a third-party kernel may raise anything
                broken[name] = why
    return results, broken


def spread(times):
    """20th percentile, median and 80th percentile."""
    return torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()


def memory_bandwidth(device):
    """Bytes per second, the better of a copy and a read-only sum; on CUDA over 1 GiB, timed like the kernels."""
    if device.type != "cuda":
        return measure_bandwidth(device)
    x, best = torch.ones(2**28, device=device), 0.0
    y = torch.empty_like(x)
    for work, moved in ((lambda: y.copy_(x), 2 * x.nbytes), (x.sum, x.nbytes)):
        duration, _ = timer([work], device)
        best = max(best, *(moved / duration() for _ in range(5)))
    return best


def reset_peak(device):
    """Forget the peak that `peak_memory` reports."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Peak bytes since the reset: of the allocator on CUDA, of this process without mapped files on Linux, else 0."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return 0
    kilobytes = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    return 1024 * (int(kilobytes["VmHWM"]) - int(kilobytes["RssFile"]) - int(kilobytes["RssShmem"]))


# ---------------------------------------------------------------- the check


def judge(checks, place=str):
    """(what is wrong with a provider over all copies, or None; its largest error against float64).

    checks: functions () -> (result, the same in plain PyTorch, float64 reference); place: words for an index into a
    result, a tuple.
    """
    try:
        results = [check() for check in checks]
        if not all(isinstance(got, torch.Tensor) and got.shape == exact.shape for got, _, exact in results):
            return "no tensor of the expected shape", None
        got, plain, exact = (torch.cat([t.flatten() for t in outputs]) for outputs in zip(*results, strict=True))
        shapes = [got.shape for got, *_ in results]
        wrong = what_is_wrong(got, plain, exact, lambda element: located(element, shapes, place))
        return wrong, float((got.double() - exact).abs().max())
    except Exception as broken:  # a third-party kernel may raise anything
        return said(broken), None


def what_is_wrong(got, plain, exact, where):
    """Error, number of wrong values and the first of `got` (n,); None within the tolerance of the tests: twice the
    error of plain PyTorch plus two ulp of the result's dtype. where: words for an element."""
    ulp = ULP.get(got.dtype, 2**-23) * exact.abs().max()
    error, most = (got.double() - exact).abs(), 2 * (plain.double() - exact).abs().max() + 2 * ulp
    wrong = ~(error <= most)  # NaN too
    if not wrong.any():
        return None
    first = int(wrong.int().argmax())
    off = f"off by {error.max():.1e} where {most:.1e} is allowed" if got.isfinite().all() else "not finite"
    values = f"got {got[first]:.6g}, wanted {exact[first]:.6g}"
    return f"{off}, {int(wrong.sum())} of {len(got)} values, first in {where(first)}: {values}"


def located(element, shapes, place):
    """Words for an element of several flattened results of these shapes: the result's number, if not 0, and `place`."""
    copy = 0
    while element >= shapes[copy].numel():
        element -= shapes[copy].numel()
        copy += 1
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(element), shapes[copy]))
    return f"copy {copy}, " * (copy > 0) + place(index)


def said(broken):
    """An exception as one short line."""
    if "0 active drivers" in str(broken):  # Triton's error without a GPU
        return NEEDS_CUDA
    return f"{type(broken).__name__}: {one_line(broken)[:200]}"


# ---------------------------------------------------------------- the machine and the report


def about_run(tool, words, device, dtype, rounds):
    """Machine, versions and settings of a run of this tool with these arguments. Measures the bandwidth."""
    bandwidth = memory_bandwidth(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the children of bench_decode.py need the memory
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "triton": version("triton"), "dtype": dtype,
        "bandwidth_GBps": round(bandwidth / 1e9, 1), "rounds": rounds, "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", f"tools/{tool}.py", *words]),
    }  # fmt: skip


def version(package):
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name():
    """The processor's name from /proc/cpuinfo, otherwise from `platform`."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def save(args, about, rows):
    """Write --json and --csv. Called after each case, so that an interrupted run keeps its results."""
    if args.json:
        write_json(args.json, {"about": about, "rows": rows})
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in [*rows, about] for key in row)))
            writer.writeheader()
            for row in rows:
                nested = {key: json.dumps(value) for key, value in row.items() if isinstance(value, dict)}
                writer.writerow(row | nested | about)


def table(rows, names, columns, notes):
    """Lines of a table, one per row. A row that is wrong (`right` False) or was not timed (None) has no numbers.

    names: {key: width} of the cells with text; columns: (title, key, factor, width, format) of the others;
    notes: function (row) -> what ends its line.
    """
    yield " ".join([" ", *(f"{'':{width}}" for width in names.values()), *(f"{t:>{w}}" for t, _, _, w, _ in columns)])
    for row in rows:
        line = " ".join([" ", *(f"{row[key]:{width}}" for key, width in names.items())])
        if not row["right"]:
            wrong = "WRONG, " if row["right"] is False and row["why"] != NEEDS_CUDA else ""
            yield f"{line} {wrong}not timed: {row['why']}"
            continue
        for _, key, factor, width, form in columns:
            value = row.get(key)
            line += f" {'-':>{width}}" if value is None else f" {factor * value:{width}{form}}"
        yield line + notes(row)
