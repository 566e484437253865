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

import argparse
import contextlib
import copy
import csv
import functools
import importlib.metadata
import importlib.util
import inspect
import io
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import types
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kernels  # noqa: E402
from kernels.backend import choose_backend, interpreted  # noqa: E402
from model import InputError, load  # noqa: E402
from model.cache import RaggedCache  # noqa: E402
from model.config import TextConfig  # noqa: E402
from model.console import as_command  # noqa: E402
from model.fast import arrange  # noqa: E402
from model.flags import Parser, choose_device, number  # noqa: E402
from model.llama import Llama  # noqa: E402
from model.lookahead import Lookahead  # noqa: E402
from model.pruning import make_method  # noqa: E402
from model.pruning.plphp import PlphpAda  # noqa: E402
from model.report import measure_bandwidth  # noqa: E402
from model.view import Layout, Pruner  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# B, Hkv, G, D of a layer
SHAPES = {
    "demo": (1, 4, 2, 32), "7b": (1, 32, 1, 128), "gqa8": (1, 8, 4, 128), "gqa8 x 8": (8, 8, 4, 128),
    "qwen": (1, 4, 7, 128), "g8": (1, 8, 8, 128),
}  # fmt: skip
DEFAULT_SHAPES = ("demo", "7b", "gqa8")
ATTENTION = ("ragged_decode", "ragged_decode_append")
OPS = (*ATTENTION, "window_scores", "ragged_pack", "prefill", "decode")
METHODS = (
    "random",
    "shared",
    "plphp",
    "plphp-ada",
    "snapkv",
    "plphp:values=true,window=32",
    "plphp:query=lookahead",
)  # timed by prefill
LONGEST = 2**15  # kept tokens per head (mean, or of a skewed head) above which --mbytes uses more sequences
SLACK = 64  # free slots per segment
LAYOUTS = ("equal", "ragged", "plphp", "zipf", "giant")  # see `lengths_of`
NEEDS_CUDA = "needs CUDA; TRITON_INTERPRET=1 checks it without a GPU"  # a Triton kernel
PAGE = 16  # slots per page of FlashInfer's cache, vLLM's default
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
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(OPS)} or all (default ragged_decode)")
    p.add_argument("--preset", choices=PRESETS, help="a set of ops and cases: gpu (minutes) or smoke (quick test)")
    p.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        metavar="SHAPE",
        help="default demo, 7b and gqa8; prefill: demo (default, the model) or 7b (two layers of that shape)",
    )
    p.add_argument("--tokens", nargs="+", type=number(int, 1), default=[640, 2048], metavar="T", help="before pruning")
    p.add_argument(
        "--mbytes", nargs="+", type=number(float, 0, open_low=True), metavar="MB",
        help="kept K and V per layer, instead of --tokens; adds sequences to stay below 32k tokens per head",
    )  # fmt: skip
    p.add_argument("--retention", nargs="+", type=number(float, 0, 1, open_low=True), default=[1.0, 0.3], metavar="F")
    p.add_argument(
        "--layouts", nargs="+", metavar="LAYOUT",
        help="how a layer's kept rows are distributed over its heads, with equal totals: equal; ragged, 0.25 to 1.75 "
             "times the mean; plphp, PLPHP's three rates over several sequences, or plphp-ada over the heads of one; "
             "zipf, 1/rank; giant, one head keeps everything, the others share the rest (default equal and ragged). "
             "With --skew: the cases of the sweep to run, such as 'skew 4'",
    )  # fmt: skip
    p.add_argument(
        "--skew", nargs="*", type=number(float, 1), metavar="R",
        help="instead of --retention: one head R times as long as the mean, total bytes fixed (default 1 2 4 8)",
    )  # fmt: skip
    p.add_argument(
        "--batch", nargs="+", type=number(int, 1), default=[1], metavar="B", help="sequences of decode (default 1)"
    )
    p.add_argument("--dtype", choices=DTYPES, help="default fp32 on a CPU, bf16 on CUDA")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=number(int, 1), default=15, help="timed rounds (default 15)")
    p.add_argument("--copies", type=number(int, 1), help="copies of each problem (default: more than the cache holds)")
    p.add_argument("--kernel", metavar="FILE.py", help="also time the function of the op's name in this file")
    p.add_argument("--base", metavar="REV", help="also time the kernels of this commit (not for prefill and decode)")
    p.add_argument("--no-flex", action="store_true", help="skip FlexAttention, which compiles for every case")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--csv", metavar="FILE")
    return p


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Commit:
    """The kernels of another commit: rev as given to --base, its hash, and the imported package."""

    rev: str
    sha: str
    package: types.ModuleType


@dataclass(frozen=True)
class Setting:
    """Settings shared by all cases. own: op -> (name, function) from --kernel; copies: None for `copies_for`."""

    dtype: torch.dtype
    device: torch.device
    own: dict
    copies: int | None
    base: Commit | None = None
    flex: bool = True  # False: skip FlexAttention

    @property
    def matrix_units(self):
        """Whether the device multiplies this dtype on matrix units."""
        return self.device.type == "cuda" and self.dtype.itemsize == 2


@dataclass
class Case:
    """One problem in several copies with separate buffers: calls[provider][i]() runs copy i."""

    name: str
    bytes: int  # useful bytes: must be read or written
    baseline: str
    shape: str = ""
    layout: str = ""  # of the lengths: one of LAYOUTS or "skew R"
    family: str = ""  # shared by the cases of a skew sweep
    reads_more: str | None = None  # provider that reads more than `bytes`, because it does not prune
    repeatable: bool = True  # False: a call changes the state of later calls
    calls: dict = field(default_factory=dict)  # provider -> list of functions
    checks: dict = field(default_factory=dict)  # provider -> functions () -> (result, plain PyTorch, float64 reference)
    missing: dict = field(default_factory=dict)  # provider -> why it cannot be timed here
    rivals: set = field(default_factory=set)  # providers besides the baseline to compute speeds over
    own: str = ""  # the provider from --kernel
    guests: set = field(default_factory=set)  # rivals that we do not maintain: an error there does not fail the run

    def add(self, provider, call, check, rival=False):
        """check: function (call) -> (result, plain PyTorch, float64 reference)."""
        self.calls.setdefault(provider, []).append(call)
        self.checks.setdefault(provider, []).append(partial(check, call))
        if rival:
            self.rivals.add(provider)

    def add_guest(self, provider, why, build, check):
        """Add a rival that may not support this case; its error is then the reason in `missing`. build: () -> call."""
        self.guests.add(provider)
        if provider in self.missing:  # failed on an earlier copy
            return
        try:
            if not why:
                call = build()
                call()  # triggers compilation
        except Exception as broken:
            why = said(broken)
        if why:
            self.missing[provider] = why
            self.calls.pop(provider, None)
            self.checks.pop(provider, None)
        else:
            self.add(provider, call, check, rival=True)

    def add_ours(self, op, setting, arguments, options, check):
        """Add this project's backends, those of --base, and the function from --kernel.

        options: function (package) -> keyword arguments; it takes the package because a plan works only with the
        kernels of its own commit. Options that a function does not accept are dropped.
        """
        ours = options(kernels)
        self.own = setting.own[op][0] if op in setting.own else ""
        for provider, function, why in contenders(op, setting):
            if why:
                self.missing[provider] = why
            else:
                self.add(provider, bound(function, arguments, ours), check)
        for provider, function, why in base_contenders(op, setting):

            def build(function=function):
                return bound(function, arguments, options(setting.base.package))

            self.add_guest(provider, why, build, check)


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer's cache: (B, Hkv, G, D) and the kept tokens (S,) of S = B * Hkv segments."""

    name: str
    shape: str
    sizes: tuple
    tokens: int  # per head before pruning
    lengths: torch.Tensor
    layout: str
    family: str
    flags: list  # of the command that selects only this layer


def layers(args, itemsize):
    """Yield the Layer of each case."""
    for shape in args.shapes or DEFAULT_SHAPES:
        for size in args.mbytes or args.tokens:
            b, mean = fit(args, shape, size, itemsize)
            flags = ["--shapes", shape, "--mbytes" if args.mbytes else "--tokens", size]
            if args.skew:
                yield from skewed_layers(args, shape, b, mean, flags)
                continue
            for retention in args.retention:
                tokens = round(mean / retention) if args.mbytes else size
                for layout in layouts_of(args, retention):
                    sizes, generator = (b, *SHAPES[shape][1:]), torch.Generator().manual_seed(0)
                    lengths = lengths_of(layout, b, sizes[1], tokens, retention, generator)
                    name = f"{labelled(shape, b)}, {tokens} tokens, {retention:g} kept, {layout}"
                    more = ["--retention", retention, "--layouts", layout]
                    yield Layer(name, shape, sizes, tokens, lengths, layout, name, flags + more)


def layouts_of(args, retention):
    """The layouts to time at a retention: only one if everything is kept."""
    return dict.fromkeys(args.layouts or ("equal", "ragged")) if retention < 1 else ("equal",)


def fit(args, shape, size, itemsize):
    """(sequences, mean tokens per head) for a `size` of --mbytes or --tokens."""
    (b, hkv, _, d), ratio = SHAPES[shape], max(args.skew or [1])
    mean = size * 1e6 / (2 * b * hkv * d * itemsize) if args.mbytes else size
    # a skewed head must not hold most of the rows; with --mbytes no head may exceed LONGEST
    while b * hkv < 2 * ratio or (args.mbytes and ratio * mean > LONGEST):
        b, mean = 2 * b, mean / 2 if args.mbytes else mean
    return b, max(1, round(mean))


def skewed_layers(args, shape, b, mean, flags):
    """One head `ratio` times as long as the mean, all others equally shorter; the total number of rows is fixed."""
    sizes, family = (b, *SHAPES[shape][1:]), f"{labelled(shape, b)}, {mean} tokens on average"
    for ratio in sorted({1.0, *args.skew}):
        lengths = one_long(b * sizes[1], b * sizes[1] * mean, round(ratio * mean))
        layout, name = f"skew {ratio:g}", f"{family}, skew {ratio:g}"
        if not args.layouts or layout in args.layouts:
            # the whole sweep, because `fit` depends on its largest ratio
            more = ["--skew", *args.skew, "--layouts", layout]
            yield Layer(name, shape, sizes, int(lengths.max()), lengths, layout, family, flags + more)


def labelled(shape, b):
    """The shape's name, followed by the number of sequences if it is not the shape's own."""
    return shape if b == SHAPES[shape][0] else f"{shape} x {b}"


def lengths_of(layout, b, hkv, tokens, retention, generator):
    """Kept tokens per segment (S,), S = b * hkv: 1 to `tokens` in each, with the same sum in every layout.

    equal    the mean in all heads: a layer under PLPHP, one sequence
    ragged   random, between 0.25 and 1.75 times the mean
    plphp    several sequences: PLPHP's three rates, the same for all heads of a sequence (each has its own gamma);
             one sequence: plphp-ada on heads whose attention differs in sharpness
    zipf     proportional to 1 / rank, in random order
    giant    one head keeps everything, up to leaving one row per other head; the others share the rest equally
    """
    segments, mean = b * hkv, max(1, round(retention * tokens))
    if layout == "equal":
        return torch.full((segments,), mean)
    if layout == "giant":
        return one_long(segments, segments * mean, tokens)
    if layout == "plphp":
        return three_rates(b, hkv, tokens, mean) if b > 1 else pooled_heads(hkv, tokens, mean, generator)
    if layout == "zipf":
        share = 1 / (1 + torch.randperm(segments, generator=generator))
    else:
        share = 0.25 + 1.5 * torch.rand(segments, generator=generator)
    return divided(segments * mean, share.double(), tokens)


def one_long(segments, total, longest):
    """Lengths (S,) that sum to `total`: first `longest`, then the rest as equal as possible, at least 1 each."""
    longest = min(longest, total - (segments - 1))
    each, over = divmod(total - longest, segments - 1)
    return torch.tensor([longest] + over * [each + 1] + (segments - 1 - over) * [each])


def three_rates(b, hkv, tokens, mean):
    """Lengths (b * hkv,) under PLPHP: a third of the sequences keeps mean - dr, a third mean + dr, the others mean."""
    dr = min(round(0.3 * tokens), mean - 1, tokens - mean)  # PLPHP's dr = 0.3, limited to 1 .. tokens kept
    lengths, third = torch.full((b,), mean), (b + 1) // 3
    lengths[:third] -= dr
    lengths[b - third :] += dr
    return lengths.repeat_interleave(hkv)


def pooled_heads(hkv, tokens, mean, generator):
    """Lengths (hkv,) of a layer under plphp-ada.

    Scores are the softmax of normal numbers with standard deviation 0.5 (flattest head) to 3 (sharpest). At retention
    0.2 the longest head is then 1.7 to 1.9 times the mean; in the demo model's layers it is 1.1 to 3.4 times.
    """
    sharpness = torch.linspace(0.5, 3, hkv)[torch.randperm(hkv, generator=generator), None]
    scores = (sharpness * torch.randn(hkv, tokens, generator=generator)).softmax(-1)
    return PlphpAda().choose(scores, mean).sum(1)


def divided(total, share, most):
    """Divide `total` into integers proportional to `share` (S,), each clamped to 1 .. `most`."""
    low, high = 0.0, most / float(share.min())
    for _ in range(100):  # bisect the scale at which the clamped numbers sum to total
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * share).clamp(1, most).sum() < total else (low, middle)
    exact = (high * share).clamp(1, most)
    lengths = exact.floor().long()
    largest = (exact - lengths).argsort(descending=True)  # fractional parts; clamped numbers have none
    lengths[largest[: total - int(lengths.sum())]] += 1
    return lengths


def copies_for(setting, size, held):
    """Copies of a problem of `size` bytes that exceed the last-level cache, 2 to 256. held: memory of one, bytes."""
    if setting.copies:
        return setting.copies
    if setting.device.type != "cuda":
        return 2 if interpreted() else max(2, min(256, -(-(2**26) // size)))
    torch.cuda.empty_cache()
    fit_in = int(0.4 * torch.cuda.mem_get_info(setting.device)[0] / held)  # leaves memory for checks and results
    cache = torch.cuda.get_device_properties(setting.device).L2_cache_size
    return max(2, min(256, fit_in, -(-4 * cache // size)))


def randoms(setting, seed):
    """Function (*shape) -> normal random numbers, generated on the device."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=setting.device, dtype=setting.dtype)


def contenders(op, setting):
    """Yield (provider, function, why it cannot run here or None): this project's backends and --kernel's function."""
    function, why = getattr(kernels, op), triton_missing(setting.dtype, setting.device)
    yield "ours, torch", partial(function, backend="torch"), None
    yield f"ours, {triton_name(setting.device)}", partial(function, backend="triton"), why
    if op in setting.own:
        yield *setting.own[op], None


def base_contenders(op, setting):
    """Yield the same for the kernels of --base, which may lack the op."""
    if setting.base is None:
        return
    function, name = getattr(setting.base.package, op, None), f"base {setting.base.rev}"
    lacks = None if function else f"{setting.base.sha} has no {op}"
    yield f"{name}, torch", function and partial(function, backend="torch"), lacks
    why = lacks or triton_missing(setting.dtype, setting.device)
    yield f"{name}, {triton_name(setting.device)}", function and partial(function, backend="triton"), why


def bound(function, arguments, options):
    """The call as a partial, with the options that the function accepts."""
    known = inspect.signature(function).parameters
    return partial(function, *arguments, **{k: v for k, v in options.items() if k in known})


def said(broken):
    """An exception as one short line."""
    if "0 active drivers" in str(broken):  # Triton's error without a GPU
        return NEEDS_CUDA
    return f"{type(broken).__name__}: {' '.join(str(broken).split())[:80]}"


def triton_name(device):
    """Name of the Triton backend; marks times of the interpreter, which say nothing about the kernels."""
    return "triton (interpreted)" if device.type == "cpu" and interpreted() else "triton"


def triton_missing(dtype, device):
    """The reason why the Triton kernels cannot run here; None if they can."""
    if device.type != "cuda" and not interpreted():
        return NEEDS_CUDA
    try:
        choose_backend("triton", device, dtype)
    except ValueError as why:
        return str(why)
    return None


# ---------------------------------------------------------------- attention over one layer


def attention_case(op, layer, setting):
    """ragged_decode or ragged_decode_append over a layer, beside SDPA on static caches, AdaKV's way and other kernels.

    The static caches hold all tokens, the packed rectangle (equal lengths only), or every head padded to the longest
    with a mask. ragged_decode_append is a whole step; kv_len is not advanced, so each call writes the same slot.
    """
    b, hkv, group, d = layer.sizes
    append, rows, longest = op == "ragged_decode_append", int(layer.lengths.sum()), int(layer.lengths.max())
    # compiled or planned once per case, because its copies have the same lengths
    lengths = layer.lengths + append
    flex = functools.cache(partial(flex_over, lengths, group, setting.device))
    pages = functools.cache(partial(flashinfer_over, lengths, group, d, setting))
    row = 2 * d * setting.dtype.itemsize  # of K and V
    size = row * (rows + 2 * b * hkv * append)  # the new token is read and written
    reads_more = "sdpa, all tokens" if rows < b * hkv * layer.tokens else None
    case = Case(layer.name, size, "sdpa, all tokens", layer.shape, layer.layout, layer.family, reads_more)
    for i in range(copies_for(setting, size, row * (b * hkv * (layer.tokens + longest + SLACK) + 3 * rows))):
        q, new, dense, arenas, (start, length, cap) = make_copy(layer, setting, append, i)
        padded = [t[:, :, : longest + append].clone() for t in dense]
        mask = torch.arange(longest + append, device=setting.device) < length[:, None] + append
        masked = q, *padded, mask.view(b, hkv, 1, -1)

        def places(tensors, *index, new=new):
            """[(tensor, index, value that a step writes there)] for K and V."""
            shape = (b, hkv, d) if tensors[0].ndim == 4 else (b * hkv, d)
            return [(t, index, x.view(shape)) for t, x in zip(tensors, new, strict=True)] if append else []

        end = slice(None), slice(None), -1
        behind = torch.arange(b * hkv, device=setting.device), length.long()
        static = {"sdpa, all tokens": ((q, *dense), places(dense, *end))}
        if layer.layout == "equal":
            static["sdpa, rectangle"] = masked[:3], places(padded, *end)
        static["sdpa, padded + mask"] = masked, places([t.flatten(0, 1) for t in padded], *behind)
        for provider, (arguments, where) in static.items():
            write(where)  # padded is also the reference of the other providers
            call = partial(write_and_attend, where, attention, *arguments)
            case.add(provider, call, attention_check(arguments, where), rival=True)
        add_flat(case, layer, setting, q, arenas, new if append else None, attention_check(masked))
        add_flex(case, setting, flex, masked, where)  # where: the last above, of the padded heads
        add_flashinfer(case, setting, pages, masked, lengths, new if append else ())
        where = start, length, *((cap,) if append else ())
        check = attention_check(masked, places(arenas, start.long() + length))
        plan = partial(plan_of, start, cap)
        case.add_ours(op, setting, (q, *(new if append else ()), *arenas, *where), plan, check)
    return case


def plan_of(start, cap, package):
    return {"plan": package.decode_plan(start, cap)}


def make_copy(layer, setting, room, seed):
    """Random q (B, Hq, D); K and V of a new token (B, Hkv, D); dense K and V (B, Hkv, tokens + room, D); arenas (N, D)
    with the first `lengths` tokens of each head (which ones does not matter for speed); (start, length, cap).
    """
    b, hkv, group, d = layer.sizes
    random = randoms(setting, seed)
    q, new = random(b, hkv * group, d), [random(b, hkv, d) for _ in range(2)]
    dense = [random(b, hkv, layer.tokens + room, d) for _ in range(2)]
    keep = (torch.arange(layer.tokens) < layer.lengths[:, None]).to(setting.device)
    rows = [t.flatten(0, 1)[:, : layer.tokens] for t in dense]
    *arenas, start, length, pos = kernels.ragged_pack(*rows, keep, slack=SLACK, backend="torch")
    for arena in arenas:
        arena[pos < 0] = float("nan")  # shows if a result depends on free slots
    return q, new, dense, arenas, (start, length, length + SLACK)


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


def write(places):
    for tensor, index, new in places:
        tensor[index] = new


def write_and_attend(places, attend, *arguments):
    """A step of a static cache: store the new token, then attend."""
    write(places)
    return attend(*arguments)


def attention_check(reference, places=()):
    """A check for `Case.add`: the result against attention over `reference`, and that the call has written `places`."""

    def check(call):
        for tensor, index, _ in places:  # clear what other providers wrote
            tensor[index] = float("nan")
        got = call()
        if not all(torch.equal(tensor[index], row) for tensor, index, row in places):
            raise ValueError("the new token is not in the cache")
        return got, *(exact_attention(*reference, dtype=t) for t in (reference[0].dtype, torch.float64))

    return check


def add_flat(case, layer, setting, q, arenas, new, check):
    """Varlen attention over a flat cache without free slots; with new tokens, a whole step in AdaKV's manner.

    AdaKV allocates new arenas in each step and copies every row into them, with the new rows in between. This version
    is cheaper than AdaKV's: the views are made beforehand, one fused `cat` copies, and on CUDA its allocations are part
    of the graph. A CPU has no varlen attention, so there our torch backend attends to the new arenas.
    """
    append, why = new is not None, varlen_missing(setting)
    provider, lengths = "adakv-style" if append else "varlen, heads as batch", layer.lengths + append
    if not why:
        attend = heads_as_batch(varlen_attn(), lengths, layer.sizes[2], setting.device)
    elif append and setting.device.type == "cpu":
        attend = over_segments(lengths)
    else:
        case.missing[provider] = why
        return
    flat = [pieces(arena, layer.lengths, new[i] if append else None) for i, arena in enumerate(arenas)]
    call = (lambda: attend(q, *map(torch.cat, flat))) if append else partial(attend, q, *map(torch.cat, flat))
    case.add(provider, call, check, rival=True)


def pieces(arena, lengths, new):
    """Views of each segment's rows, each followed by its row of `new` unless that is None."""
    segments = arena.split((lengths + SLACK).tolist())
    rows = [x[:n] for x, n in zip(segments, lengths.tolist(), strict=True)]
    if new is None:
        return rows
    return [x for pair in zip(rows, new.flatten(0, 1).split(1), strict=True) for x in pair]


def varlen_attn():
    """torch's attention over sequences of different lengths; None before torch 2.10, which introduced it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def varlen_missing(setting):
    """The reason why varlen attention cannot run here; None if it can."""
    if setting.device.type != "cuda":
        return "needs CUDA"
    if varlen_attn() is None:
        return f"torch {torch.__version__} has no varlen_attn"
    return None if setting.dtype.itemsize == 2 else "needs bf16 or fp16"


def heads_as_batch(attend, lengths, group, device):
    """Each segment as a separate sequence: function (q (B, Hq, D), k and v (n, D) without free slots) -> like q.

    attend: `varlen_attn`. Some versions lack enable_gqa. The G heads of a group are then passed as G query tokens of
    one head, which is equivalent without a causal mask.
    """
    one_token = group == 1 or "enable_gqa" in inspect.signature(attend).parameters
    tokens, heads = (1, group) if one_token else (group, 1)
    segments, longest = len(lengths), int(lengths.max())
    ends_q = torch.arange(0, tokens * segments + 1, tokens, dtype=torch.int32, device=device)
    ends_k = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    options = {"enable_gqa": True} if heads > 1 else {}

    def call(q, k, v):
        rows = q.view(-1, heads, q.shape[-1])
        return attend(rows, k[:, None], v[:, None], ends_q, ends_k, tokens, longest, **options).view(q.shape)

    return call


def over_segments(lengths):
    """`heads_as_batch` with our torch backend, on a CPU."""
    start, length = (lengths.cumsum(0) - lengths).int(), lengths.int()
    plan = kernels.decode_plan(start, length)
    return lambda q, k, v: kernels.ragged_decode(q, k, v, start, length, plan=plan, backend="torch")


# ---------------------------------------------------------------- third-party kernels


def add_flex(case, setting, make, masked, where):
    """FlexAttention on padded heads; it skips blocks after each head's end. make: () -> `flex_over` these lengths."""
    q, k, v, _ = masked

    def build():
        return partial(write_and_attend, where, make(), q, k, v)

    case.add_guest("flex attention", flex_missing(setting), build, attention_check(masked, where))


def flex_missing(setting):
    """The reason why FlexAttention is not timed here; None if it is."""
    if setting.device.type != "cuda":
        return "needs CUDA"
    return None if setting.flex else "skipped by --no-flex"


def flex_over(lengths, group, device):
    """FlexAttention over segments of `lengths` (S,): function (q (B, Hq, D), k and v (B, Hkv, n, D)) -> like q.

    n is the longest length. Segments are passed as the batch and a group's heads as query rows of one head, so that
    every group size gets FlexDecoding, the kernel that splits the keys. With heads as heads, their different masks
    would select the prefill kernel.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # each case compiles anew; dynamo stops after eight recompilations
    attend, ends, n = torch.compile(flex_attention, dynamic=False), lengths.to(device), int(lengths.max())
    mask = create_block_mask(lambda s, h, i, j: j < ends[s], len(ends), None, group, n, device=device)

    def call(q, k, v):
        rows = q.view(len(ends), 1, group, -1)  # (S, 1, G, D)
        return attend(rows, *(t.flatten(0, 1)[:, None] for t in (k, v)), block_mask=mask).view(q.shape)

    return call


def add_flashinfer(case, setting, make, masked, lengths, new):
    """FlashInfer on pages that each hold rows of one head; a step also stores the new token in its page.

    make: () -> `flashinfer_over` these lengths (S,), which count the new token; new: its K and V (B, Hkv, D), or ().
    """
    why, (q, *padded, _) = flashinfer_missing(setting), masked
    caches = [] if why else [paged(t, lengths) for t in padded]
    slots = last_slots(lengths.to(q.device))
    where = [(t, slots, x.flatten(0, 1)) for t, x in zip(caches, new, strict=False)]

    def build():
        return partial(write_and_attend, where, make(), q, *caches)

    case.add_guest("flashinfer", why, build, attention_check(masked, where))


def flashinfer_missing(setting):
    """The reason why FlashInfer is not timed here; None if it is."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    if setting.device.type != "cuda":
        return "needs CUDA"
    return None if setting.dtype.itemsize == 2 else "needs bf16 or fp16"


def flashinfer_over(lengths, group, d, setting):
    """Segments of `lengths` (S,) as requests with one KV head: function (q (B, Hq, D), k and v of `paged`) -> like q.

    In a real step its plan would be rebuilt for every layer, with a synchronisation. Here it is built once, untimed.
    """
    import flashinfer

    ends = F.pad((-(-lengths // PAGE)).cumsum(0), (1, 0))
    tables = ends, torch.arange(int(ends[-1])), (lengths - 1) % PAGE + 1  # page offsets, pages, rows in last pages
    workspace = torch.zeros(2**27, dtype=torch.uint8, device=setting.device)
    # tensor cores: usual from 4 query heads per KV head on; the other kernel lacks groups such as 7
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=group >= 4)
    tables = [t.int().to(setting.device) for t in tables]
    wrapper.plan(*tables, group, 1, d, PAGE, q_data_type=setting.dtype, kv_data_type=setting.dtype)
    return lambda q, k, v: wrapper.run(q.view(-1, group, d), (k, v)).view(q.shape)


def paged(padded, lengths):
    """Copy the first `lengths` rows of each segment, in order, into pages: (B, Hkv, n, D) -> (pages, PAGE, 1, D)."""
    rows = F.pad(padded.flatten(0, 1), (0, 0, 0, -padded.shape[2] % PAGE)).unflatten(1, (-1, PAGE))
    taken = torch.arange(rows.shape[1]) < -(-lengths // PAGE)[:, None]  # (S, pages)
    return rows[taken.to(rows.device)][:, :, None]


def last_slots(lengths):
    """Position of each segment's last row in `paged`: (page (S,), slot (S,), head)."""
    return (-(-lengths // PAGE)).cumsum(0) - 1, (lengths - 1) % PAGE, 0


# ---------------------------------------------------------------- the other ops


def scores_case(shape, tokens, setting, rows=1):
    """window_scores of the last rows of a prompt, beside a plain softmax."""
    _, hkv, group, d = SHAPES[shape]
    size = hkv * tokens * d * setting.dtype.itemsize
    case = Case(f"{shape}, {tokens} tokens, {rows} rows", size, "plain softmax", shape)
    for i in range(copies_for(setting, size, 2 * size)):
        random = randoms(setting, i)
        q, k = random(hkv * group, rows, d), random(hkv, tokens, d)

        def plain(q=q, k=k, compute=torch.float32, product=torch.matmul):
            scores = product(q.to(compute), k.to(compute).repeat_interleave(group, 0).transpose(1, 2)) * d**-0.5
            column = torch.arange(tokens, device=q.device)
            return scores.masked_fill(column > column[-rows:, None], float("-inf")).softmax(-1).mean(1)

        def check(call, plain=plain):
            allowed = plain(compute=setting.dtype, product=on_matrix_units) if setting.matrix_units else plain()
            return call(), allowed, plain(compute=torch.float64)

        case.add("plain softmax", plain, check)
        case.add_ours("window_scores", setting, (q, k), lambda package: {"group": "none"}, check)
    return case


def on_matrix_units(q, k):
    """q (H, W, D) times k (H, D, T) in 16 bits with fp32 sums: PyTorch's own product on CUDA. Its matrix units round
    these sums less carefully than fp32 arithmetic."""
    return torch.bmm(q, k, out_dtype=torch.float32)


def pack_case(shape, tokens, retention, setting):
    """ragged_pack of one layer, beside indexing (which leaves no free slots for new tokens)."""
    _, hkv, _, d = SHAPES[shape]
    row = 2 * d * setting.dtype.itemsize  # of K and V
    size = 2 * row * round(retention * hkv * tokens)  # read and written
    case = Case(f"{shape}, {tokens} tokens, {retention:g} kept", size, "indexing", shape)
    for i in range(copies_for(setting, size, row * hkv * tokens)):
        random = randoms(setting, i)
        k, v = random(hkv, tokens, d), random(hkv, tokens, d)
        draw = torch.rand(hkv, tokens, generator=torch.Generator().manual_seed(i))
        keep = (draw < retention).to(setting.device)
        total = int(keep.sum())

        def index(k=k, v=v, keep=keep, total=total):
            rows = keep.flatten().nonzero_static(size=total)[:, 0]  # like k[keep], without a synchronisation
            return torch.cat((k.flatten(0, 1)[rows], v.flatten(0, 1)[rows]))

        def check(call, index=index):
            return kept_rows(call()), index(), index().double()

        case.add("indexing", index, check)
        options = {"slack": SLACK, "total": total}
        case.add_ours("ragged_pack", setting, (k, v, keep), lambda package, options=options: options, check)
    return case


def kept_rows(packed):
    """The arenas of ragged_pack without free slots; the result of `index` unchanged."""
    if isinstance(packed, torch.Tensor):
        return packed
    k_arena, v_arena, _, _, kv_pos = packed
    return torch.cat((k_arena[kv_pos >= 0], v_arena[kv_pos >= 0]))


# ---------------------------------------------------------------- whole steps of the demo model


class DenseCache:
    """The baseline: contiguous K and V (B, Hkv, capacity, D) in which every head keeps all tokens."""

    fused = False  # q and k arrive rotated

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

    def give_back(self):
        self.length -= 1
        self.pos -= 1

    def append_attend(self, layer, q, k, v, rope):
        self.k[layer][:, :, self.length - 1], self.v[layer][:, :, self.length - 1] = k, v
        return self.attend(layer, q)

    def attend(self, layer, q):
        n = self.length
        return attention(q, self.k[layer][:, :, :n], self.v[layer][:, :, :n])


def step_case(batch, tokens, retention, layout, rounds, setting):
    """One decode step of the demo model on prompts of `tokens`: dense cache with all tokens, and ragged caches."""
    checkpoint = load(ROOT / "assets" / "demo", "fp32", setting.device)
    model, config = checkpoint.model.language_model, checkpoint.config.text_config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 600, (batch, tokens), generator=generator)
    x = model.model.embed_tokens.weight[ids.to(setting.device)]
    heads, steps = config.num_key_value_heads, 2 * rounds + 8

    def choose(layer, q, k, v):
        generator = torch.Generator().manual_seed(layer)  # same choice for every cache
        lengths = lengths_of(layout, batch, heads, tokens, retention, generator)
        draw = torch.rand(batch * heads, tokens, generator=generator).argsort(-1).argsort(-1)
        return (draw < lengths[:, None]).to(setting.device)

    caches = {"dense cache": DenseCache(config.num_hidden_layers, tokens + steps)}
    caches["ours, torch"] = ragged = RaggedCache(config.num_hidden_layers, slack=steps, backend="torch")
    why = triton_missing(torch.float32, setting.device)
    if not why:
        name = f"ours, {triton_name(setting.device)}"
        caches[name] = RaggedCache(config.num_hidden_layers, slack=steps, backend="triton")
    for cache in caches.values():
        model.prefill(x, cache, choose=choose if retention < 1 and cache is not caches["dense cache"] else None)
    q = torch.randn(batch, config.num_attention_heads, config.head_dim, generator=generator).to(setting.device)
    weights = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith(("lm_head", "model.embed_tokens")))
    name = f"demo model, {batch} x {tokens} tokens, {retention:g} kept, {layout}"
    case = Case(name, weights + ragged.nbytes_held, "dense cache", layout=layout, repeatable=False)
    case.reads_more = "dense cache"
    case.missing = {"ours, triton": why} if why else {}
    for name, cache in caches.items():
        case.add(name, partial(model.decode, x[:, 0], cache), lambda _, cache=cache: attended(cache, q))
    return case


def prefill_model(shape, setting):
    """(name, Llama, look-ahead rows): the demo model in fp32, or two layers of the 7B shape with random weights."""
    if shape == "demo":
        checkpoint = load(ROOT / "assets" / "demo", "fp32", setting.device)
        return "demo model", checkpoint.model.language_model, checkpoint.lookahead
    language = random_language(TextConfig(num_hidden_layers=2), setting.dtype, setting.device)
    arrange(language)
    lookahead = Lookahead(language).to(setting.device, setting.dtype).requires_grad_(False)
    return "2 layers of the 7B shape", language, lookahead


def random_language(config, dtype, device, seed=0):
    """A Llama with random weights, generated on the device in their dtype, so that no tensor exists twice."""
    with torch.device("meta"):
        language = Llama(config).to(dtype).requires_grad_(False)
    language.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for p in language.parameters():
        p.fill_(1.0) if p.ndim == 1 else p.normal_(0, 0.02, generator=generator)
    return language


def prefill_case(shape, tokens, setting):
    """Prefill of `tokens` positions, all but 16 of them a picture: without a cache, with all kept, and pruned."""
    name, model, rows = prefill_model(shape, setting)
    config, dtype = model.config, model.model.norm.weight.dtype
    heads = config.num_attention_heads, config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, config.hidden_size, generator=generator).to(setting.device, dtype)
    q = torch.randn(1, heads[0], config.head_dim, generator=generator).to(setting.device, dtype)
    span = min(4, tokens - 1), max(5, tokens - 12)
    layout = Layout(config.num_hidden_layers, *heads, tokens, [span], setting.device)
    plain = model.prefill(x)
    wider = copy.deepcopy(model).to(torch.float64 if dtype == torch.float32 else torch.float32)
    exact = wider.prefill(x.to(wider.model.norm.weight.dtype)).double()
    del wider

    def prefill(method):
        cache = RaggedCache(config.num_hidden_layers)
        if method is None:
            return cache, model.prefill(x, cache)
        lookahead = rows if method.looks_ahead else None
        pruner = Pruner(method, layout, ahead=lookahead.rows if lookahead else 0)
        return cache, model.prefill(x, cache, choose=pruner.choose, lookahead=lookahead)

    def check(call):
        """Checks the hidden states against a prefill without a cache, and attention over the cache against its rows.

        Both are divided by their largest value, so that one bound fits both.
        """
        cache, hidden = call()
        given, states = attended(cache, q), (hidden, plain, exact)
        scales = [float(parts[2].abs().max()) for parts in (given, states)]
        both = zip(given, states, strict=True)  # result, plain, float64 reference
        return [torch.cat((a.flatten() / scales[0], b.flatten() / scales[1])) for a, b in both]

    case = Case(f"{name}, prefill of {tokens} tokens", 0, "no cache")
    case.add("no cache", partial(model.prefill, x), lambda call: (call(), plain, exact))
    case.add("kept all", partial(prefill, None), check)
    for spec in METHODS:
        case.add(spec, partial(prefill, make_method(spec, 0.5)), check)
    case.rivals = {"plphp"}  # the same method without look-ahead rows
    return case


def attended(cache, q):
    """(result, plain PyTorch, float64 reference) of a decode step's attention in all layers, for q (B, Hq, D).

    Random new tokens are appended and the step is undone afterwards. If the cache rotates q, the references do too.
    """
    dense, (b, _, d) = isinstance(cache, DenseCache), q.shape
    heads = cache.k[0].shape[1] if dense else cache.kv_len.shape[1] // b
    k_new, v_new = torch.randn(2, b, heads, d, dtype=q.dtype).to(q.device)
    angles = torch.rand(b, 1, d, dtype=q.dtype).to(q.device)
    rope = angles.cos(), angles.sin()
    turned = kernels.turned(q, rope) if cache.fused else q
    got, plain, exact = [], [], []
    cache.grow()
    for layer in range(len(cache.k)):
        got.append(cache.append_attend(layer, q, k_new, v_new, rope))
        if dense:
            arguments = q, *(t[layer][:, :, : cache.length] for t in (cache.k, cache.v))
            plain.append(exact_attention(*arguments, dtype=torch.float32))
            exact.append(exact_attention(*arguments))
            continue
        k, v, where = cache.k[layer], cache.v[layer], (cache.kv_start[layer], cache.kv_len[layer])
        plain.append(kernels.ragged_decode_ref(turned, k, v, *where))
        exact.append(kernels.ragged_decode_ref(turned.double(), k.double(), v.double(), *where))
    cache.give_back()
    return torch.stack(got), torch.stack(plain), torch.stack(exact)


# ---------------------------------------------------------------- check, time, print


def judge(checks):
    """(what is wrong with a provider over all copies, or None; its largest error against float64)."""
    try:
        results = [check() for check in checks]
        if not all(isinstance(got, torch.Tensor) and got.shape == exact.shape for got, _, exact in results):
            return "WRONG RESULT: no tensor of the expected shape", None
        got, plain, exact = (torch.cat([t.flatten() for t in outputs]) for outputs in zip(*results, strict=True))
        wrong = what_is_wrong(got, plain, exact)
        return wrong and f"WRONG RESULT: {wrong}", float((got.double() - exact).abs().max())
    except Exception as broken:  # a third-party kernel may raise anything
        return said(broken), None


def what_is_wrong(got, plain, exact):
    """Error and first wrong element of `got` (n,); None within the tolerance of the tests: twice the error of plain
    PyTorch plus two ulp of the result's dtype."""
    if not got.isfinite().all():
        return f"{got[~got.isfinite()][0]:g} in element {int(got.isfinite().int().argmin())}"
    ulp = ULP.get(got.dtype, 2**-23) * exact.abs().max()
    error, most = (got.double() - exact).abs(), 2 * (plain.double() - exact).abs().max() + 2 * ulp
    if error.max() <= most:
        return None
    return (
        f"off by {error.max():.1e} where {most:.1e} is allowed, first in element {int((error > most).int().argmax())}"
    )


def captured(calls, device, repeatable=True):
    """(run, calls per run, is it a graph?): one graph on CUDA, a loop over the calls on a CPU."""
    if device.type != "cuda":
        return lambda: [call() for call in calls], len(calls), False
    if repeatable:  # at least 16 calls, to make the gap between two graphs negligible
        calls = calls * -(-16 // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up before the capture
        alone = waits(calls[0])
        for call in calls[1:]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    if alone:
        return lambda: [call() for call in calls], len(calls), False
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay, len(calls), True


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


def memory_bandwidth(device):
    """Bytes per second, the better of a copy and a read-only sum; on CUDA over 1 GiB, timed like the kernels."""
    if device.type != "cuda":
        return measure_bandwidth(device)
    x, best = torch.ones(2**28, device=device), 0.0
    y = torch.empty_like(x)
    for work, moved in ((lambda: y.copy_(x), 2 * x.nbytes), (x.sum, x.nbytes)):
        run, count, _ = captured([work], device)
        best = max(best, *(count * moved / seconds(run, device) for _ in range(5)))
    return best


def take_turns(case, names, rounds, device):
    """({provider: seconds per call in each round}, {provider: is it a graph?}, {provider: error that stopped it})."""
    runs, broken = {}, {}
    for name in names:
        try:
            runs[name] = captured(case.calls[name], device, case.repeatable)
        except Exception as why:
            broken[name] = said(why)
    times = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in [name for name in runs if name not in broken]:
            run, count, _ = runs[name]
            try:
                t = seconds(run, device) / count
            except Exception as why:
                broken[name] = said(why)
                continue
            if i:  # the first round warms up
                times[name].append(t)
    return times, {name: graph for name, (_, _, graph) in runs.items()}, broken


def measure(op, case, rounds, bandwidth, device, again):
    """Rows of one case, one per provider. again: the command that reproduces the case."""
    verdicts = {name: judge(checks) for name, checks in case.checks.items()}
    wrong = {name: why for name, (why, _) in verdicts.items()}
    times, graphs, broken = take_turns(case, [name for name in case.calls if not wrong[name]], rounds, device)
    wrong |= {name: broken.get(name) or judge(case.checks[name][:2])[0] for name in times | broken}  # check again
    about = {"op": op, "case": case.name, "shape": case.shape, "layout": case.layout, "megabytes": case.bytes / 1e6}
    about |= {"repro": again, "baseline": case.baseline}
    rivals = [name for name in case.calls if name in case.rivals | {case.baseline} and not wrong[name]]
    rows = []
    for name in case.calls:
        row = about | {"provider": name, "guest": name in case.guests, "right": not wrong[name], "why": wrong[name]}
        if not wrong[name]:
            us = 1e6 * torch.tensor(times[name], dtype=torch.float64)
            low, median, high = us.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
            ours = [other for other in times if other.startswith("ours, ") and not wrong[other] and name == case.own]
            speeds = {rival: times_over(times[rival], times[name]) for rival in rivals + ours}
            useful = None if name == case.reads_more or not case.bytes else case.bytes / (1e-6 * median)  # bytes/s
            row |= {"us": median, "p20_us": low, "p80_us": high, "speed": speeds.get(case.baseline), "speeds": speeds}
            row |= {"GBps": useful and useful / 1e9, "ceiling": useful and useful / bandwidth}
            row |= {"max_error": verdicts[name][1], "graph": graphs[name]}
        rows.append(row)
    for name, why in case.missing.items():
        rows.append(about | {"provider": name, "guest": name in case.guests, "right": None, "why": why})
    return rows


def times_over(times, others):
    """Median over the rounds of times / others."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def against_uniform(rows, family, uniform):
    """Add to the rows of a skew sweep the ratio of their time to that at equal lengths, which `uniform` stores."""
    for row in rows:
        if "us" not in row or not row["layout"].startswith("skew"):
            continue
        key = row["op"], family, row["provider"]
        if row["layout"] == "skew 1":
            uniform[key] = row["us"]
        if key in uniform:
            row["over_uniform"] = row["us"] / uniform[key]


def show(rows, device):
    """Yield the lines of a case's table; a provider that is wrong or cannot run here has no numbers."""
    wide = max(27, *(len(row["provider"]) for row in rows))
    yield f"  {'':{wide}} {'us':>10} {'20 %':>10} {'80 %':>10} {'speed':>7} {'ceiling':>8} {'GB/s':>7}  max error"
    for row in rows:
        if "us" not in row:
            text = f"not timed: {row['why']}" if row["right"] is None else f"{row['why']}, not timed"
            yield f"  {row['provider']:{wide}} {text}"
            continue
        speed = "-" if row["speed"] is None else f"{row['speed']:.2f}"
        ceiling, gbps = "-", "-"
        if row["ceiling"] is not None:
            ceiling, gbps = f"{100 * row['ceiling']:.1f} %", f"{row['GBps']:.1f}"
        line = f"  {row['provider']:{wide}} {row['us']:10.1f} {row['p20_us']:10.1f} {row['p80_us']:10.1f} {speed:>7}"
        line += f" {ceiling:>8} {gbps:>7} {row['max_error']:10.1e}"
        line += "".join(f"   {row['speeds'][rival]:.2f} x {rival}" for rival in strongest(row))
        if "over_uniform" in row:
            line += f"   {row['over_uniform']:5.2f} x the time at equal lengths"
        if device.type == "cuda" and not row["graph"]:
            line += "   (no CUDA graph: it synchronises)"
        yield line


def strongest(row):
    """Providers to compare a row of ours with: the fastest rival besides the baseline, and its backend of --base; for
    the function of --kernel also our backends."""
    if row["provider"] in row["speeds"]:
        return []
    ours = [name for name in row["speeds"] if name.startswith("ours, ")]
    others = [name for name in row["speeds"] if name not in (row["baseline"], *ours) and not name.startswith("base ")]
    backend = row["provider"].removeprefix("ours")  # ", torch"
    past = [name for name in row["speeds"] if name.startswith("base ") and name.endswith(backend)]
    return [*sorted(others, key=row["speeds"].get)[:1], *past, *ours]


def cases(args, setting):
    """Yield (function that builds a Case, op and flags that select only this case)."""
    for op in args.ops:
        if op in ATTENTION:
            for layer in layers(args, setting.dtype.itemsize):
                yield partial(attention_case, op, layer, setting), [op, *layer.flags]
        elif op == "prefill":
            for shape in args.shapes or ("demo",):
                for tokens in args.tokens:
                    yield partial(prefill_case, shape, tokens, setting), [op, "--shapes", shape, "--tokens", tokens]
        elif op == "decode":
            for tokens in args.tokens:
                for retention in args.retention:
                    for layout in layouts_of(args, retention):
                        for batch in args.batch:
                            flags = ["--tokens", tokens, "--retention", retention, "--layouts", layout]
                            build = partial(step_case, batch, tokens, retention, layout, args.rounds, setting)
                            yield build, [op, *flags, "--batch", batch]
        else:
            for shape in args.shapes or DEFAULT_SHAPES:
                for tokens in args.tokens:
                    flags = [op, "--shapes", shape, "--tokens", tokens]
                    if op == "window_scores":
                        yield partial(scores_case, shape, tokens, setting), flags
                        continue
                    for retention in args.retention:
                        build = partial(pack_case, shape, tokens, retention, setting)
                        yield build, [*flags, "--retention", retention]


def command(flags, args, setting):
    """The command that runs one case alone. flags: from `cases`."""
    dtype = next(name for name, dtype in DTYPES.items() if dtype == setting.dtype)
    words = ["python", "tools/bench_kernels.py", *flags, "--dtype", dtype, "--device", setting.device]
    words += ["--rounds", args.rounds, *(["--no-flex"] if args.no_flex else [])]
    base = setting.base.sha if setting.base else None  # the hash, because HEAD moves
    for flag, value in (("--copies", args.copies), ("--kernel", args.kernel), ("--base", base)):
        words += [flag, value] if value else []
    interpreter = "TRITON_INTERPRET=1 " if setting.device.type == "cpu" and interpreted() else ""
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


@contextlib.contextmanager
def kernels_of(rev):
    """The Commit `rev` of this repository, with its kernels in a temporary folder; None for None."""
    if rev is None:
        yield None
        return
    wanted = f"--base {rev} is not a commit with kernels"
    sha = git(wanted, "rev-parse", "--verify", "--short", "--end-of-options", f"{rev}^{{commit}}").decode().strip()
    files = git(wanted, "archive", "--format=zip", sha, "kernels")
    # kept until the end, because triton reads the source when a kernel is first called
    with tempfile.TemporaryDirectory(prefix=f"kernels_at_{sha}_") as folder:
        zipfile.ZipFile(io.BytesIO(files)).extractall(folder)
        try:
            package = imported(Path(folder).name, Path(folder) / "kernels" / "__init__.py")
        except Exception as broken:
            raise InputError(f"cannot import the kernels of {rev} ({said(broken)}); give another commit") from broken
        yield Commit(rev, sha, package)


def git(wanted, *words):
    """Output of git, bytes. wanted: beginning of the error message if git fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
    except OSError as broken:
        raise InputError(f"{wanted} ({broken}); install git") from None
    if done.returncode:
        *_, why = done.stderr.decode(errors="replace").splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"{wanted} ({why}); choose one from git log -- kernels")
    return done.stdout


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
        if unknown := [op for op in args.ops if op not in OPS]:
            raise InputError(f"unknown op {unknown[0]!r}; use {', '.join(OPS)} or all")
        if "prefill" in args.ops and set(args.shapes or ()) - {"demo", "7b"}:
            raise InputError(f"prefill has no shape {' '.join(args.shapes)}; use demo, 7b")
        known = [f"skew {ratio:g}" for ratio in sorted({1.0, *args.skew})] if args.skew else LAYOUTS
        if unknown := [layout for layout in args.layouts or () if layout not in known]:
            where = " in this --skew sweep" if args.skew else ""
            raise InputError(f"unknown layout {unknown[0]!r}{where}; use {', '.join(known)}")
    return found


def one_case(build, flags, args, setting, bandwidth, uniform):
    """Build, time and print one case -> its rows. Its buffers are freed on return."""
    case, again = build(), command(flags, args, setting)
    print(f"\n{flags[0]}: {case.name}, {case.bytes / 1e6:.2f} MB\n  {again}", flush=True)
    rows = measure(flags[0], case, args.rounds, bandwidth, setting.device, again)
    against_uniform(rows, case.family, uniform)
    print("\n".join(show(rows, setting.device)), flush=True)
    return rows


def save(args, about, rows):
    """Write --json and --csv. Called after each case, so that an interrupted run keeps its results."""
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if args.csv:
        columns = ["op", "case", "shape", "layout", "megabytes", "provider", "guest", "right", "why"]
        columns += ["us", "p20_us", "p80_us", "GBps", "ceiling", "max_error", "baseline", "speed", "speeds", "graph"]
        with open(args.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, [*columns, "over_uniform", "repro", *about])
            writer.writeheader()
            for row in rows:
                speeds = {"speeds": json.dumps(row["speeds"])} if "speeds" in row else {}
                writer.writerow(row | speeds | about)


@torch.inference_mode()
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        parts = parsed(argv)
        with kernels_of(parts[0].base) as base:
            return bench(parts, base, argv)
    except InputError as wrong:
        parser().exit(2, f"error: {' '.join(str(wrong).split())}\n")


def bench(parts, base, argv):
    """Run all cases -> the exit code: 1 if a provider that is not a guest was wrong."""
    begin, args = time.perf_counter(), parts[0]
    device = choose_device(args.device)
    try:
        for path in filter(None, (args.json, args.csv)):  # fail before the measurements
            open(path, "a").close()
    except OSError as wrong:
        raise InputError(f"cannot write the output ({wrong}); give another file") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams, events and graphs belong to the current device
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    own = load_own(args.kernel, {op for part in parts for op in part.ops})
    bandwidth = memory_bandwidth(device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    about = {
        "machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__, "triton": version("triton"),
        "dtype": str(dtype), "bandwidth_GBps": round(bandwidth / 1e9, 1), "rounds": args.rounds,
        "date": time.strftime("%Y-%m-%d"), "command": shlex.join(["python", "tools/bench_kernels.py", *argv]),
    } | ({"base": base.sha} if base else {})  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows, uniform = [], {}
    for part in parts:
        setting = Setting(dtype, device, own, part.copies, base, not part.no_flex)
        for build, flags in cases(part, setting):
            rows += one_case(build, flags, part, setting, bandwidth, uniform)
            save(args, about, rows)
    print(f"\n{time.perf_counter() - begin:.0f} s")
    return 1 if any(row["right"] is False and not row["guest"] for row in rows) else 0


def version(package):
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name():
    """The processor's name from /proc/cpuinfo, otherwise from `platform`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(as_command(main))
