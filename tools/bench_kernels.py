"""Time the kernels against what people would use instead. A wrong result is never timed.

    python tools/bench_kernels.py                            # ragged_decode on this machine
    python tools/bench_kernels.py decode                     # whole decode steps of the demo model
    python tools/bench_kernels.py prefill                    # its prefill, and what scoring, choosing and packing add
    python tools/bench_kernels.py all --json out.json --csv out.csv
    python tools/bench_kernels.py ragged_decode --kernel my.py    # my.py::ragged_decode beside ours
    python tools/bench_kernels.py --shapes gqa8 --mbytes 4 65     # as many tokens as make a layer's K and V so large
    python tools/bench_kernels.py --skew                     # the same bytes, in heads of ever less equal lengths
    python tools/bench_kernels.py --preset gpu --json gpu.json    # what one session with a GPU is for, in minutes

Every row is one provider on one case. `speed` is the baseline's time over the provider's, the median over rounds in
which all providers take turns, so a machine that slows down slows all of them. `ceiling` is the part of the measured
memory bandwidth that the useful bytes reach. A round calls every copy of the problem once, each with buffers of its
own, so that the caches hold little of it (a decode step reads what one model reads, over and over). On CUDA a round is
one captured graph, of 16 calls at least. Every copy is checked before the timing, two of them after it.
tools/plot_bench.py draws what --json has written.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import inspect
import json
import platform
import shlex
import statistics
import sys
import time
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
from model.generate import Layout, Pruner  # noqa: E402
from model.pruning import make_method  # noqa: E402
from run import choose_device, number  # noqa: E402
from tools.report import measure_bandwidth  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ULP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# B, Hkv, G, D of a layer
SHAPES = {
    "demo": (1, 4, 2, 32), "7b": (1, 32, 1, 128), "gqa8": (1, 8, 4, 128), "gqa8 x 8": (8, 8, 4, 128),
    "qwen": (1, 4, 7, 128), "g8": (1, 8, 8, 128),
}  # fmt: skip
ATTENTION = ("ragged_decode", "ragged_decode_append")
OPS = (*ATTENTION, "window_scores", "ragged_pack", "prefill", "decode")
METHODS = (
    "random",
    "shared",
    "plphp",
    "plphp-ada",
    "snapkv",
    "plphp:values=true,window=32",
)  # that prefill is timed with
LONGEST = 2**15  # kept tokens per head, on average or in a skewed head, from which --mbytes takes more sequences
SLACK = 64  # free slots per segment
# command lines; what is given beside --preset counts more
PRESETS = {
    "gpu": (
        "ragged_decode ragged_decode_append --shapes 7b gqa8 --mbytes 4 17 65 130 512 --retention 0.2",
        "ragged_decode ragged_decode_append --shapes 7b gqa8 --mbytes 65 --skew 1 2 4 8",
        "ragged_decode ragged_decode_append --shapes qwen g8 --mbytes 17 --retention 0.2",
        "window_scores ragged_pack --shapes 7b gqa8 --tokens 2048 8192 --retention 0.3",
        "prefill --tokens 640 2900",
    ),
    "smoke": (
        "ragged_decode ragged_decode_append --shapes demo qwen g8 --tokens 40 --retention 0.3 --copies 2 --rounds 2",
        "ragged_decode ragged_decode_append --shapes demo --mbytes 0.03 0.1 --retention 0.5 --copies 2 --rounds 2",
        "ragged_decode ragged_decode_append --shapes demo --tokens 40 --skew 1 2 --copies 2 --rounds 2",
        "window_scores ragged_pack --shapes demo --tokens 40 --retention 0.3 --copies 2 --rounds 2",
        "prefill --tokens 40 --rounds 2",
    ),
}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(OPS)} or all (default ragged_decode)")
    p.add_argument("--preset", choices=PRESETS, help="a set of ops and cases: one GPU session, or a quick look at all")
    p.add_argument("--shapes", nargs="+", default=["demo", "7b", "gqa8"], choices=SHAPES, metavar="SHAPE")
    p.add_argument("--tokens", nargs="+", type=number(int, 1), default=[640, 2048], metavar="T", help="before pruning")
    p.add_argument(
        "--mbytes", nargs="+", type=number(float, 0, open_low=True), metavar="MB",
        help="of K and V that a layer keeps, instead of --tokens; more sequences where it would be over 32k per head",
    )  # fmt: skip
    p.add_argument("--retention", nargs="+", type=number(float, 0, 1, open_low=True), default=[1.0, 0.3], metavar="F")
    p.add_argument(
        "--skew", nargs="*", type=number(float, 1), metavar="R",
        help="instead of --retention: one head R times as long as the mean, at the same bytes (default 1 2 4 8)",
    )  # fmt: skip
    p.add_argument(
        "--batch", nargs="+", type=number(int, 1), default=[1], metavar="B", help="sequences, of decode (default 1)"
    )
    p.add_argument("--dtype", choices=DTYPES, help="default fp32 on a CPU, bf16 on CUDA")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--rounds", type=number(int, 1), default=15, help="turns of each provider (default 15)")
    p.add_argument("--copies", type=number(int, 1), help="of each problem (default: more than the last cache holds)")
    p.add_argument("--kernel", metavar="FILE.py", help="also time the function of the op's name in this file")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--csv", metavar="FILE")
    return p


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Setting:
    """What all cases have in common. own: op -> (name, function) of somebody's file; copies: None for `copies_for`."""

    dtype: torch.dtype
    device: torch.device
    own: dict
    copies: int | None


@dataclass
class Case:
    """One problem, several times over with buffers of its own: calls[provider][i]() runs copy i."""

    name: str
    bytes: int  # that have to be read and written
    baseline: str
    shape: str = ""
    layout: str = ""  # of the lengths: "equal", "ragged" or "skew R"
    family: str = ""  # the cases of a skew sweep share it
    reads_more: str | None = None  # provider that reads more than these bytes, being without pruning
    repeatable: bool = True  # does a call leave everything as it was?
    calls: dict = field(default_factory=dict)  # provider -> list of functions
    checks: dict = field(default_factory=dict)  # likewise, each: (what it gives, the same in plain PyTorch, in float64)
    missing: dict = field(default_factory=dict)  # provider -> why it cannot be timed here

    def add(self, provider, call, check):
        """check: function (call) -> the three."""
        self.calls.setdefault(provider, []).append(call)
        self.checks.setdefault(provider, []).append(partial(check, call))

    def add_ours(self, op, setting, arguments, options, check):
        """This project's backends and somebody's own function; options that the latter does not know are left out."""
        for provider, function, why in contenders(op, setting):
            if why:
                self.missing[provider] = why
                continue
            known = inspect.signature(function).parameters
            call = partial(function, *arguments, **{k: v for k, v in options.items() if k in known})
            self.add(provider, call, check)


@dataclass(frozen=True)
class Layer:
    """The numbers of one layer's cache: (B, Hkv, G, D) and the kept tokens (S,) of S = B * Hkv segments."""

    name: str
    shape: str
    sizes: tuple
    tokens: int  # per head before pruning
    lengths: torch.Tensor
    layout: str
    family: str


def layers(args, itemsize):
    """The caches to attend to, one after the other."""
    for shape in args.shapes:
        for size in args.mbytes or args.tokens:
            b, mean = fit(args, shape, size, itemsize)
            if args.skew:
                yield from skewed_layers(shape, b, mean, args.skew)
                continue
            for retention in args.retention:
                tokens = round(mean / retention) if args.mbytes else size
                for layout in ("equal", "ragged") if retention < 1 else ("equal",):
                    sizes, generator = (b, *SHAPES[shape][1:]), torch.Generator().manual_seed(0)
                    lengths = lengths_of(layout, b * sizes[1], tokens, retention, generator)
                    name = f"{labelled(shape, b)}, {tokens} tokens, {retention:g} kept, {layout}"
                    yield Layer(name, shape, sizes, tokens, lengths, layout, name)


def fit(args, shape, size, itemsize):
    """Sequences, and mean tokens per head, for a `size` of --mbytes or --tokens."""
    (b, hkv, _, d), ratio = SHAPES[shape], max(args.skew or [1])
    mean = size * 1e6 / (2 * b * hkv * d * itemsize) if args.mbytes else size
    # a skewed head must not be nearly everything; with --mbytes no head may be very long
    while b * hkv < 2 * ratio or (args.mbytes and ratio * mean > LONGEST):
        b, mean = 2 * b, mean / 2 if args.mbytes else mean
    return b, max(1, round(mean))


def skewed_layers(shape, b, mean, ratios):
    """One head `ratio` times as long as the mean, all others equally shorter: always the same number of rows."""
    sizes, family = (b, *SHAPES[shape][1:]), f"{labelled(shape, b)}, {mean} tokens on average"
    segments = b * sizes[1]
    for ratio in sorted({1.0, *ratios}):
        longest = min(round(ratio * mean), segments * mean - (segments - 1))  # the others have at least one
        each, over = divmod(segments * mean - longest, segments - 1)
        lengths = torch.tensor([longest] + over * [each + 1] + (segments - 1 - over) * [each])
        layout = f"skew {ratio:g}"
        yield Layer(f"{family}, {layout}", shape, sizes, int(lengths.max()), lengths, layout, family)


def labelled(shape, b):
    """The shape's name, with the number of sequences where that is not its own."""
    return shape if b == SHAPES[shape][0] else f"{shape} x {b}"


def lengths_of(layout, segments, tokens, retention, generator):
    """Kept tokens per segment (S,): all equal, or between 0.25 and 1.75 of the mean, with the same sum."""
    mean = max(1, round(retention * tokens))
    if layout == "equal":
        return torch.full((segments,), mean)
    share = 0.25 + 1.5 * torch.rand(segments, generator=generator)
    lengths = (share / share.sum() * mean * segments).round().long()
    lengths[-1] += mean * segments - lengths.sum()
    return lengths.clamp(1, tokens)


def copies_for(setting, size, held):
    """How many copies of a problem of `size` bytes are more than the last cache holds; 2 to 256. held: bytes of one."""
    if setting.copies:
        return setting.copies
    if setting.device.type != "cuda":
        return 2 if interpreted() else max(2, min(256, -(-(2**26) // size)))
    torch.cuda.empty_cache()
    fit_in = int(0.4 * torch.cuda.mem_get_info(setting.device)[0] / held)  # the rest is for checks and results
    cache = torch.cuda.get_device_properties(setting.device).L2_cache_size
    return max(2, min(256, fit_in, -(-4 * cache // size)))


def randoms(setting, seed):
    """Function (*shape) -> normal random numbers, made where they are needed."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=setting.device, dtype=setting.dtype)


def contenders(op, setting):
    """(provider, function, why it cannot run here or None) of everybody whom `Case.add_ours` adds."""
    function, why = getattr(kernels, op), triton_missing(setting.dtype, setting.device)
    yield "ours, torch", partial(function, backend="torch"), None
    yield triton_name(setting.device), partial(function, backend="triton"), why
    if op in setting.own:
        yield *setting.own[op], None


def triton_name(device):
    """Times of the interpreter must not be taken for the kernels'."""
    return "ours, triton (interpreted)" if device.type == "cpu" and interpreted() else "ours, triton"


def triton_missing(dtype, device):
    """Why the Triton kernels cannot run here; None if they can."""
    if device.type != "cuda" and not interpreted():
        return "needs CUDA"
    try:
        choose_backend("triton", device, dtype)
    except ValueError as why:
        return str(why)
    return None


# ---------------------------------------------------------------- attention over one layer


def attention_case(op, layer, setting):
    """One of the two ragged_decode over a layer, beside SDPA on static caches and what AdaKV does.

    The static caches hold all tokens, the packed rectangle if there is one, or every head padded to the longest and
    masked. ragged_decode_append is a whole step; kv_len is not advanced, so that each call writes the same slot.
    """
    b, hkv, group, d = layer.sizes
    append, rows, longest = op == "ragged_decode_append", int(layer.lengths.sum()), int(layer.lengths.max())
    row = 2 * d * setting.dtype.itemsize  # of K and V
    size = row * (rows + 2 * b * hkv * append)  # the new token is read and written
    reads_more = "sdpa, all tokens" if rows < b * hkv * layer.tokens else None
    case = Case(layer.name, size, "sdpa, all tokens", layer.shape, layer.layout, layer.family, reads_more)
    for i in range(copies_for(setting, size, row * (b * hkv * (layer.tokens + longest + SLACK) + 2 * rows))):
        q, new, dense, arenas, (start, length, plan) = make_copy(layer, setting, append, i)
        padded = [t[:, :, : longest + append].clone() for t in dense]
        mask = torch.arange(longest + append, device=setting.device) < length[:, None] + append
        masked = q, *padded, mask.view(b, hkv, 1, -1)

        def places(tensors, *index, new=new):
            """(tensor, index, what a step writes there), for K and for V."""
            shape = (b, hkv, d) if tensors[0].ndim == 4 else (b * hkv, d)
            return [(t, index, x.view(shape)) for t, x in zip(tensors, new, strict=True)] if append else []

        end = slice(None), slice(None), -1
        behind = torch.arange(b * hkv, device=setting.device), length.long()
        static = {"sdpa, all tokens": ((q, *dense), places(dense, *end))}
        if layer.layout == "equal":
            static["sdpa, rectangle"] = masked[:3], places(padded, *end)
        static["sdpa, padded + mask"] = masked, places([t.flatten(0, 1) for t in padded], *behind)
        for provider, (arguments, where) in static.items():
            write(where)  # it is the reference of the others
            case.add(provider, partial(write_and_attend, where, *arguments), attention_check(arguments, where))
        add_flat(case, layer, setting, q, arenas, new if append else None, attention_check(masked))
        where = start, length, *((plan.kv_cap,) if append else ())
        check = attention_check(masked, places(arenas, start.long() + length))
        case.add_ours(op, setting, (q, *(new if append else ()), *arenas, *where), {"plan": plan}, check)
    return case


def make_copy(layer, setting, room, seed):
    """Random q (B, Hq, D); K and V of a new token (B, Hkv, D); dense K and V (B, Hkv, tokens + room, D), of which each
    head keeps its first tokens (which ones does not matter for speed); these in arenas (N, D); (start, length, plan).
    """
    b, hkv, group, d = layer.sizes
    random = randoms(setting, seed)
    q, new = random(b, hkv * group, d), [random(b, hkv, d) for _ in range(2)]
    dense = [random(b, hkv, layer.tokens + room, d) for _ in range(2)]
    keep = (torch.arange(layer.tokens) < layer.lengths[:, None]).to(setting.device)
    rows = [t.flatten(0, 1)[:, : layer.tokens] for t in dense]
    *arenas, start, length, pos = kernels.ragged_pack(*rows, keep, slack=SLACK, backend="torch")
    for arena in arenas:
        arena[pos < 0] = float("nan")  # no result may depend on free slots
    return q, new, dense, arenas, (start, length, kernels.decode_plan(start, length + SLACK))


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


def write(places):
    for tensor, index, new in places:
        tensor[index] = new


def write_and_attend(places, q, k, v, mask=None):
    """A step of a static cache: the new token in its place, then attention."""
    write(places)
    return attention(q, k, v, mask)


def attention_check(reference, places=()):
    """A check for `Case.add`: the call against attention over `reference`, and has it written what `places` say?"""

    def check(call):
        for tensor, index, _ in places:  # where others have written the same
            tensor[index] = float("nan")
        got = call()
        if not all(torch.equal(tensor[index], row) for tensor, index, row in places):
            raise ValueError("the new token is not in the cache")
        return got, *(exact_attention(*reference, dtype=t) for t in (reference[0].dtype, torch.float64))

    return check


def add_flat(case, layer, setting, q, arenas, new, check):
    """Varlen attention over a flat cache without free slots; with new tokens, a whole step as AdaKV does it.

    That is: new arenas in each step, every row copied into them, the new ones in between. Made kinder than it is: the
    pieces are views made beforehand, one fused `cat` copies, and on CUDA its allocations are part of the graph. On a
    CPU, which has no varlen attention, our torch backend attends to the new arenas.
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
    case.add(provider, call, check)


def pieces(arena, lengths, new):
    """Views of each segment's rows and, unless `new` is None, of the one that comes behind them."""
    segments = arena.split((lengths + SLACK).tolist())
    rows = [x[:n] for x, n in zip(segments, lengths.tolist(), strict=True)]
    if new is None:
        return rows
    return [x for pair in zip(rows, new.flatten(0, 1).split(1), strict=True) for x in pair]


def varlen_attn():
    """torch's attention over sequences of different lengths; None where this torch has none (before 2.10)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def varlen_missing(setting):
    """Why varlen attention cannot run here; None if it can."""
    if setting.device.type != "cuda":
        return "needs CUDA"
    if varlen_attn() is None:
        return f"torch {torch.__version__} has no varlen_attn"
    return None if setting.dtype.itemsize == 2 else "needs bf16 or fp16"


def heads_as_batch(attend, lengths, group, device):
    """Every segment as a sequence of its own: function (q (B, Hq, D), k and v (n, D) without free slots) -> like q.

    attend: `varlen_attn`. Its options came one by one; without enable_gqa the G heads of a group become G query tokens
    of one head, which is the same as long as nothing is causal.
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
    """The same by our torch backend, on a CPU."""
    start, length = (lengths.cumsum(0) - lengths).int(), lengths.int()
    plan = kernels.decode_plan(start, length)
    return lambda q, k, v: kernels.ragged_decode(q, k, v, start, length, plan=plan, backend="torch")


# ---------------------------------------------------------------- the other ops


def scores_case(shape, tokens, setting, rows=1):
    """window_scores of the last rows of a prompt, beside the written-out softmax."""
    _, hkv, group, d = SHAPES[shape]
    size = hkv * tokens * d * setting.dtype.itemsize
    case = Case(f"{shape}, {tokens} tokens, {rows} rows", size, "plain softmax", shape)
    for i in range(copies_for(setting, size, 2 * size)):
        random = randoms(setting, i)
        q, k = random(hkv * group, rows, d), random(hkv, tokens, d)

        def plain(q=q, k=k, compute=torch.float32):
            scores = q.to(compute) @ k.to(compute).repeat_interleave(group, 0).transpose(1, 2) * d**-0.5
            column = torch.arange(tokens, device=q.device)
            return scores.masked_fill(column > column[-rows:, None], float("-inf")).softmax(-1).mean(1)

        def check(call, plain=plain):
            return call(), plain(), plain(compute=torch.float64)

        case.add("plain softmax", plain, check)
        case.add_ours("window_scores", setting, (q, k), {"group": "none"}, check)
    return case


def pack_case(shape, tokens, retention, setting):
    """ragged_pack of one layer, beside indexing (which leaves no room for new tokens)."""
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
            rows = keep.flatten().nonzero_static(size=total)[:, 0]  # as k[keep], but without waiting for the device
            return torch.cat((k.flatten(0, 1)[rows], v.flatten(0, 1)[rows]))

        def check(call, index=index):
            return kept_rows(call()), index(), index().double()

        case.add("indexing", index, check)
        case.add_ours("ragged_pack", setting, (k, v, keep), {"slack": SLACK, "total": total}, check)
    return case


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

    def give_back(self):
        self.length -= 1
        self.pos -= 1

    def append_attend(self, layer, q, k, v):
        self.k[layer][:, :, self.length - 1], self.v[layer][:, :, self.length - 1] = k, v
        return self.attend(layer, q)

    def attend(self, layer, q):
        n = self.length
        return attention(q, self.k[layer][:, :, :n], self.v[layer][:, :, :n])


def step_case(batch, tokens, retention, layout, rounds, setting):
    """One decode step of the demo model on prompts of `tokens`: the dense cache of all of it, and the ragged ones."""
    checkpoint = load(ROOT / "assets" / "demo", "fp32", setting.device)
    model, config = checkpoint.model.language_model, checkpoint.config.text_config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 600, (batch, tokens), generator=generator)
    x = model.model.embed_tokens.weight[ids.to(setting.device)]
    segments, steps = batch * config.num_key_value_heads, 2 * rounds + 8

    def choose(layer, q, k, v):
        generator = torch.Generator().manual_seed(layer)  # the same for every cache
        lengths = lengths_of(layout, segments, tokens, retention, generator)
        draw = torch.rand(segments, tokens, generator=generator).argsort(-1).argsort(-1)
        return (draw < lengths[:, None]).to(setting.device)

    caches = {"dense cache": DenseCache(config.num_hidden_layers, tokens + steps)}
    caches["ours, torch"] = ragged = RaggedCache(config.num_hidden_layers, slack=steps, backend="torch")
    why = triton_missing(torch.float32, setting.device)
    if not why:
        caches[triton_name(setting.device)] = RaggedCache(config.num_hidden_layers, slack=steps, backend="triton")
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


def prefill_case(tokens, setting):
    """Prefill of the demo model on `tokens`, all but 16 of them a picture: without a cache, packed, and pruned."""
    checkpoint = load(ROOT / "assets" / "demo", "fp32", setting.device)
    model, config = checkpoint.model.language_model, checkpoint.config.text_config
    heads = config.num_attention_heads, config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, config.hidden_size, generator=generator).to(setting.device)
    q = torch.randn(1, heads[0], config.head_dim, generator=generator).to(setting.device)
    span = min(4, tokens - 1), max(5, tokens - 12)
    layout = Layout(config.num_hidden_layers, *heads, tokens, [span], setting.device)
    plain = model.prefill(x).double()

    def prefill(method):
        cache = RaggedCache(config.num_hidden_layers)
        pruner = Pruner(method, layout) if method else None
        return cache, model.prefill(x, cache, choose=pruner.choose if pruner else None)

    def check(call):
        """The hidden states are those without a cache, and the cache gives what its rows say."""
        cache, hidden = call()
        given = attended(cache, q)
        return [torch.cat((a.flatten(), b.flatten())) for a, b in zip(given, (hidden, plain, plain), strict=True)]

    case = Case(f"demo model, prefill of {tokens} tokens", 0, "no cache")
    case.add("no cache", partial(model.prefill, x), lambda call: (call(), plain, plain))
    case.add("kept all", partial(prefill, None), check)
    for spec in METHODS:
        case.add(spec, partial(prefill, make_method(spec, 0.5)), check)
    return case


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


def captured(calls, device, repeatable=True):
    """(run, number of calls in it, is it a graph?): on CUDA one graph, on a CPU the calls, one after the other."""
    if device.type != "cuda":
        return lambda: [call() for call in calls], len(calls), False
    if repeatable:  # what lies between two graphs is then a small part
        calls = calls * -(-16 // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up outside of the capture
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
    """Does a call wait for the device, so that no graph can hold it? A capture that breaks off would harm the rest."""
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
    run()  # while the device is busy with it, the host gets ahead: its launch is not what is timed
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return 1e-3 * start.elapsed_time(stop)


def memory_bandwidth(device):
    """Bytes per second: the better of a copy and a read-only sum; on CUDA of 1 GiB, timed as the kernels are."""
    if device.type != "cuda":
        return measure_bandwidth(device)
    x, best = torch.ones(2**28, device=device), 0.0
    y = torch.empty_like(x)
    for work, moved in ((lambda: y.copy_(x), 2 * x.nbytes), (x.sum, x.nbytes)):
        run, count, _ = captured([work], device)
        best = max(best, *(count * moved / seconds(run, device) for _ in range(5)))
    return best


def measure(op, case, rounds, bandwidth, device):
    """Rows of one case, one per provider."""
    wrong = {name: is_wrong(checks) for name, checks in case.checks.items()}
    right = [name for name in case.calls if not wrong[name]]
    runs = {name: captured(case.calls[name], device, case.repeatable) for name in right}
    times = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, (run, count, _) in runs.items():
            t = seconds(run, device) / count
            if i:  # the first round warms up
                times[name].append(t)
    wrong |= {name: is_wrong(case.checks[name][:2]) for name in runs}  # still?
    about = {"op": op, "case": case.name, "shape": case.shape, "layout": case.layout, "megabytes": case.bytes / 1e6}
    rows = []
    for name in case.calls:
        row = about | {"provider": name, "right": not wrong[name], "why": wrong[name]}
        if not wrong[name]:
            median = statistics.median(times[name])
            base = times[case.baseline] if not wrong[case.baseline] else times[name]
            speed = statistics.median(a / b for a, b in zip(base, times[name], strict=True))
            reached = None if name == case.reads_more or not case.bytes else case.bytes / median / bandwidth
            row |= {"us": 1e6 * median, "speed": speed, "ceiling": reached, "graph": runs[name][2]}
        rows.append(row)
    return rows + [about | {"provider": name, "right": None, "why": why} for name, why in case.missing.items()]


def against_uniform(rows, family, uniform):
    """Add to the rows of a skew sweep the time over that at equal lengths, which `uniform` remembers."""
    for row in rows:
        if "us" not in row or not row["layout"].startswith("skew"):
            continue
        key = row["op"], family, row["provider"]
        if row["layout"] == "skew 1":
            uniform[key] = row["us"]
        if key in uniform:
            row["over_uniform"] = row["us"] / uniform[key]


def show(rows, device):
    """One table per case; a provider that is wrong or cannot run here has no numbers."""
    for row in rows:
        if "us" not in row:
            said = f"not timed: {row['why']}" if row["right"] is None else f"{row['why']}, not timed"
            yield f"  {row['provider']:27} {said}"
            continue
        ceiling = f"{100 * row['ceiling']:5.1f} %" if row["ceiling"] is not None else "      -"
        line = f"  {row['provider']:27} {row['us']:10.1f} us   speed {row['speed']:5.2f}   ceiling {ceiling}"
        if "over_uniform" in row:
            line += f"   {row['over_uniform']:5.2f} x the time of uniform"
        if device.type == "cuda" and not row["graph"]:
            line += "   (no graph: it waits for the device)"
        yield line


def cases(args, setting):
    """(op, function that builds a Case) one after the other."""
    for op in args.ops:
        if op in ATTENTION:
            for layer in layers(args, setting.dtype.itemsize):
                yield op, partial(attention_case, op, layer, setting)
        elif op == "prefill":
            for tokens in args.tokens:
                yield op, partial(prefill_case, tokens, setting)
        elif op == "decode":
            for tokens in args.tokens:
                for retention in args.retention:
                    for layout in ("equal", "ragged") if retention < 1 else ("equal",):
                        for batch in args.batch:
                            yield op, partial(step_case, batch, tokens, retention, layout, args.rounds, setting)
        else:
            for shape in args.shapes:
                for tokens in args.tokens:
                    if op == "window_scores":
                        yield op, partial(scores_case, shape, tokens, setting)
                        continue
                    for retention in args.retention:
                        yield op, partial(pack_case, shape, tokens, retention, setting)


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


def parsed(argv):
    """One Namespace per command line of the preset; without one just what was given."""
    given = parser().parse_args(argv)
    if given.preset and given.ops:
        raise SystemExit(f"error: --preset {given.preset} chooses the ops itself; give one or the other")
    lines = [line.split() for line in PRESETS[given.preset]] if given.preset else [[]]
    found = [parser().parse_args(line + argv) for line in lines]
    for args in found:
        args.ops = list(OPS) if "all" in args.ops else args.ops or ["ragged_decode"]
        args.skew = [1.0, 2.0, 4.0, 8.0] if args.skew == [] else args.skew
        if unknown := [op for op in args.ops if op not in OPS]:
            raise SystemExit(f"error: there is no op {unknown[0]!r}; use {', '.join(OPS)} or all")
    return found


def one_case(op, build, rounds, bandwidth, device, uniform):
    """Build, time and print one case -> its rows. Its buffers are free before the next one is built."""
    case = build()
    print(f"\n{op}: {case.name}, {case.bytes / 1e6:.2f} MB", flush=True)
    rows = measure(op, case, rounds, bandwidth, device)
    against_uniform(rows, case.family, uniform)
    print("\n".join(show(rows, device)), flush=True)
    return rows


def save(args, about, rows):
    """The files of --json and --csv. After each case, so that a session which ends early has something to show."""
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if args.csv:
        columns = ["op", "case", "shape", "layout", "megabytes", "provider", "right", "why", "us", "speed", "ceiling"]
        with open(args.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, [*columns, "graph", "over_uniform", *about])
            writer.writeheader()
            writer.writerows(row | about for row in rows)


@torch.inference_mode()
def main(argv=None):
    begin, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    args, *more = parsed(argv)
    try:
        device = choose_device(args.device)
        for path in filter(None, (args.json, args.csv)):  # before anything is measured
            open(path, "a").close()
    except (InputError, OSError) as wrong:
        raise SystemExit(f"error: {wrong}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams, events and graphs are the current device's
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    own = load_own(args.kernel, {op for a in (args, *more) for op in a.ops})
    setting = Setting(dtype, device, own, args.copies)
    bandwidth = memory_bandwidth(device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    about = {
        "machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__, "triton": version("triton"),
        "dtype": str(dtype), "bandwidth_GBps": round(bandwidth / 1e9, 1), "rounds": args.rounds,
        "date": time.strftime("%Y-%m-%d"), "command": shlex.join(["python", "tools/bench_kernels.py", *argv]),
    }  # fmt: skip
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows, uniform = [], {}
    for part in (args, *more):
        for op, build in cases(part, setting):
            rows += one_case(op, build, part.rounds, bandwidth, device, uniform)
            save(args, about, rows)
    print(f"\n{time.perf_counter() - begin:.0f} s")
    return 1 if any(row["right"] is False for row in rows) else 0


def version(package):
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name():
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
