"""What bench_kernels.py times: one problem in several copies (`Case`), and the functions that solve it.

Attention over a layer whose heads kept different numbers of tokens, scoring, packing, and whole prefills and decode
steps of a model. Every provider comes with a check against plain PyTorch and float64.
"""

import copy
import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

import kernels
from kernels import dequantised, quantise
from kernels.backend import choose_backend, interpreted
from kernels.quantise import has_e4m3
from model import load
from model.cache import KV_DTYPES, RaggedCache
from model.config import TextConfig
from model.lookahead import Lookahead
from model.pruning import make_method
from model.pruning.plphp import PlphpAda

from . import harness, rivals
from .command import ROOT
from .harness import NEEDS_CUDA, DenseCache, attention, exact_attention, said
from .shapes import LAYERS, fit, one_long

DEFAULT_SHAPES = ("demo", "7b", "gqa8")
LAYOUTS = ("equal", "ragged", "plphp", "zipf", "giant")  # see `lengths_of`
METHODS = (  # timed by prefill
    "random", "shared", "plphp", "plphp-ada", "snapkv", "plphp:values=true,window=32", "plphp:query=lookahead",
)  # fmt: skip
SLACK = 64  # free slots per segment


# ---------------------------------------------------------------- cases and their providers


@dataclass(frozen=True)
class Setting:
    """Settings shared by all cases.

    own: op -> (name, function, package of kernels that it belongs to) from --kernel; copies: None for `copies_for`;
    base: (REV, its hash, its package of kernels) from --base, or None; flex: whether to time FlexAttention.
    """

    dtype: torch.dtype
    device: torch.device
    own: dict
    rounds: int
    copies: int | None
    base: tuple[str, str, types.ModuleType] | None = None
    flex: bool = True


@dataclass
class Case:
    """One problem in several copies with separate buffers: calls[provider][i]() runs copy i."""

    bytes: int  # useful bytes: must be read or written
    baseline: str
    shape: str = ""
    layout: str = ""  # of the lengths: one of LAYOUTS or "skew R"
    reads_more: str | None = None  # provider that reads more than `bytes`, because it does not prune
    repeatable: bool = True  # False: a call changes the state of later calls
    place: Callable = "element {}".format  # words for an index into a result
    calls: dict = field(default_factory=dict)  # provider -> list of functions
    checks: dict = field(default_factory=dict)  # provider -> functions () -> (result, plain PyTorch, float64 reference)
    missing: dict = field(default_factory=dict)  # provider -> why it cannot be timed here
    rivals: set = field(default_factory=set)  # providers to compute speeds over
    guests: set = field(default_factory=set)  # rivals that we do not maintain: an error there does not fail the run
    sizes: dict = field(default_factory=dict)  # provider -> its useful bytes, if not `bytes`

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
        """Add this project's backends, the function from --kernel, and the backends of --base.

        options: function (package) -> keyword arguments; it takes the package because a plan works only with the
        kernels of its own commit.
        """
        options = functools.cache(options)
        backends = backends_of(setting)
        for name, why in backends.items():
            if why:
                self.missing[f"ours, {name}"] = why
            else:
                self.add(f"ours, {name}", call_of(kernels, op, name, arguments, options), check)
        if op in setting.own:
            name, function, package = setting.own[op]
            if package is not kernels and backends[triton_name(setting.device)]:  # a copy of a file with kernels
                self.missing[name] = backends[triton_name(setting.device)]
            else:
                self.add(name, bound(function, arguments, options(package)), check)
        if setting.base:
            rev, _, package = setting.base
            for name, why in backends.items():
                build = partial(call_of, package, op, name, arguments, options)
                self.add_guest(f"base {rev}, {name}", why, build, check)


def backends_of(setting):
    """{name of our backend: the reason why it cannot run, or None}."""
    return {"torch": None, triton_name(setting.device): triton_missing(setting.dtype, setting.device)}


def call_of(package, op, name, arguments, options):
    """The op of a package of kernels on a backend, as a call. name: "torch" or `triton_name`."""
    return bound(partial(getattr(package, op), backend=name.split()[0]), arguments, options(package))


def bound(function, arguments, options):
    """The call as a partial, with the options that the function accepts."""
    known = inspect.signature(function).parameters
    return partial(function, *arguments, **{k: v for k, v in options.items() if k in known})


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


# ---------------------------------------------------------------- lengths of the heads of a layer


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer's cache: (B, Hkv, G, D) and the kept tokens (S,) of S = B * Hkv segments."""

    name: str  # of the case; in a skew sweep it ends with the layout
    shape: str
    sizes: tuple
    tokens: int  # per head before pruning
    lengths: torch.Tensor
    layout: str


def layers(args, itemsize):
    """Yield the Layer of each case."""
    for shape in args.shapes or DEFAULT_SHAPES:
        for size in args.mbytes or args.tokens:
            b, mean = fit(shape, size, itemsize, bool(args.mbytes), max(args.skew or [1]))
            sizes = b, hkv, *_ = (b, *LAYERS[shape][1:])
            label = shape if b == LAYERS[shape][0] else f"{shape} x {b}"
            # of a sweep: one head `ratio` times as long as the mean, all others equally shorter; the total is fixed
            for ratio in sorted({1.0, *args.skew}) if args.skew else ():
                layout = f"skew {ratio:g}"
                lengths = torch.tensor(one_long(b * hkv, b * hkv * mean, round(ratio * mean)))
                name = f"{label}, {mean} tokens on average, {layout}"
                yield Layer(name, shape, sizes, int(lengths.max()), lengths, layout)
            for retention in args.retention if not args.skew else ():
                tokens = round(mean / retention) if args.mbytes else size
                for layout in layouts_of(args, retention):
                    lengths = lengths_of(layout, b, hkv, tokens, retention, torch.Generator().manual_seed(0))
                    name = f"{label}, {tokens} tokens, {retention:g} kept, {layout}"
                    yield Layer(name, shape, sizes, tokens, lengths, layout)


def place_in(layer, index):
    """Words for an index (sequence, query head, channel) into the attention over a layer."""
    (_, hkv, group, _), (sequence, head, channel) = layer.sizes, index
    segment = sequence * hkv + head // group
    return (
        f"segment {segment} (sequence {sequence}, KV head {head // group}, {int(layer.lengths[segment])} tokens), "
        f"query head {head}, channel {channel}"
    )


def layouts_of(args, retention):
    """The layouts to time at a retention: only one if everything is kept."""
    return dict.fromkeys(args.layouts or ("equal", "ragged")) if retention < 1 else ("equal",)


def lengths_of_case(name):
    """(B, Hkv, G, D) and the kept tokens (S,) of a `Layer.name`: the way back from a file of results."""
    label, tokens, *kept, layout = name.split(", ")
    shape, _, b = (label, "", "") if label in LAYERS else label.rpartition(" x ")
    sizes = b, hkv, *_ = (int(b or LAYERS[shape][0]), *LAYERS[shape][1:])
    tokens = int(tokens.split()[0])
    if layout.startswith("skew "):
        return sizes, torch.tensor(one_long(b * hkv, b * hkv * tokens, round(float(layout[5:]) * tokens)))
    return sizes, lengths_of(layout, b, hkv, tokens, float(kept[0].split()[0]), torch.Generator().manual_seed(0))


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
        return torch.tensor(one_long(segments, segments * mean, tokens))
    if layout == "plphp":
        return three_rates(b, hkv, tokens, mean) if b > 1 else pooled_heads(hkv, tokens, mean, generator)
    if layout == "zipf":
        share = 1 / (1 + torch.randperm(segments, generator=generator))
    else:
        share = 0.25 + 1.5 * torch.rand(segments, generator=generator)
    return divided(segments * mean, share.double(), tokens)


def three_rates(b, hkv, tokens, mean):
    """Lengths (b * hkv,) under PLPHP: a third of the sequences keeps mean - dr, a third mean + dr, the others mean."""
    dr = min(round(0.3 * tokens), mean - 1, tokens - mean)  # PLPHP's dr = 0.3, limited to 1 .. tokens kept
    third = (b + 1) // 3
    rates = torch.tensor(third * [mean - dr] + (b - 2 * third) * [mean] + third * [mean + dr])
    return rates.repeat_interleave(hkv)


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


# ---------------------------------------------------------------- attention over one layer


def attention_case(op, layer, setting):
    """ragged_decode or ragged_decode_append over a layer, beside SDPA on static caches, AdaKV's way and other kernels.

    The static caches hold all tokens, the packed rectangle (equal lengths only), or every head padded to the longest
    with a mask. ragged_decode_append is a whole step; kv_len is not advanced, so each call writes the same slot.
    """
    (b, hkv, group, d), dtype, device = layer.sizes, setting.dtype, setting.device
    append, rows, longest = op == "ragged_decode_append", int(layer.lengths.sum()), int(layer.lengths.max())
    lengths = layer.lengths + append  # that are attended to
    # compiled or planned once per case, because its copies have the same lengths
    flex = functools.cache(partial(rivals.flex_over, lengths, group, device))
    pages = functools.cache(partial(rivals.flashinfer_over, lengths, group, d, dtype, device))
    no_flashinfer = rivals.flashinfer_missing(dtype, device)
    row = 2 * d * dtype.itemsize  # of K and V
    size = row * (rows + 2 * b * hkv * append)  # the new token is read and written
    reads_more = "sdpa, all tokens" if rows < b * hkv * layer.tokens else None
    case = Case(size, "sdpa, all tokens", layer.shape, layer.layout, reads_more, place=partial(place_in, layer))
    for i in range(copies_for(setting, size, row * (b * hkv * (layer.tokens + longest + SLACK) + 4 * rows))):
        q, new, dense, arenas, (start, length, cap) = make_copy(layer, setting, append, i)
        padded = [t[:, :, : longest + append].clone() for t in dense]
        mask = torch.arange(longest + append, device=device) < length[:, None] + append
        masked = q, *padded, mask.view(b, hkv, 1, -1)
        end, behind = (slice(None), slice(None), -1), (torch.arange(b * hkv, device=device), length.long())
        padded_places = places([t.flatten(0, 1) for t in padded], behind, new)
        static = {"sdpa, all tokens": ((q, *dense), places(dense, end, new))}
        if layer.layout == "equal":
            static["sdpa, rectangle"] = masked[:3], places(padded, end, new)
        static["sdpa, padded + mask"] = masked, padded_places
        for provider, (arguments, where) in static.items():
            write(where)  # padded is also the reference of the other providers
            step = partial(write_and_attend, where, attention, *arguments)
            case.add(provider, step, attention_check(arguments, where), rival=True)
        add_flat(case, layer, setting, q, arenas, new, attention_check(masked))
        add_two_launches(case, layer, setting, masked, arenas, start, new)
        build = partial(guest_step, flex, padded_places, masked[:3])
        check = attention_check(masked, padded_places)
        case.add_guest("flex attention", rivals.flex_missing(device, setting.flex), build, check)
        paged = [] if no_flashinfer else [rivals.paged(t, lengths) for t in padded]
        where = places(paged, rivals.last_slots(lengths.to(device)), new)
        build = partial(guest_step, pages, where, (q, *paged))
        case.add_guest("flashinfer", no_flashinfer, build, attention_check(masked, where))
        where = places(arenas, start.long() + length, new)
        plan = partial(plan_of, start, cap)
        given = q, *new, *arenas, start, length, *((cap,) if append else ())
        case.add_ours(op, setting, given, plan, attention_check(masked, where))
        for kind in ("int8", "fp8") if device.type == "cuda" and has_e4m3(device) else ("int8",):
            add_coded(case, op, setting, kind, given, plan, masked, [index for _, index, _ in where[:1]])
    return case


def add_coded(case, op, setting, kind, given, plan, masked, slot):
    """Add our backends, and a function of --kernel that takes scales, over the same rows in 8 bits. masked: q, K, V,
    mask of the reference; slot: [of the new token], or []. The check requires the scales of the new token, and
    attention over the dequantised rows."""
    (q, k, v, mask), codes, new = masked, KV_DTYPES[kind], given[1:3] if slot else ()
    at = 1 + len(new)
    coded = [quantise(arena, codes) for arena in given[at : at + 2]]
    arenas, scales = zip(*coded, strict=True)
    reference = q, *(dequantised(*quantise(t, codes), torch.float32) for t in (k, v)), mask
    where = places(scales, slot[0], [quantise(t, codes)[1] for t in new]) if slot else ()
    row = 2 * (q.shape[-1] + 2)
    rows = case.bytes // (2 * q.shape[-1] * q.itemsize)  # old and new tokens; the new one is also read in q's dtype
    arguments, backends = (*given[:at], *arenas, *given[at + 2 :]), backends_of(setting)
    slow = {"torch"} if setting.device.type == "cuda" else set()  # dequantises to fp32: up to 200 ms per call
    ways = {f"ours, {name}": (partial(getattr(kernels, op), backend=name.split()[0]), kernels)
            for name, why in backends.items() if not why and name not in slow}  # fmt: skip
    if op in setting.own:
        name, function, package = setting.own[op]
        runs = package is kernels or not backends[triton_name(setting.device)]
        if runs and {"k_scale", "v_scale"} <= inspect.signature(function).parameters.keys():
            ways[name] = function, package
    for name, (function, package) in ways.items():
        call = bound(function, arguments, {**plan(package), "k_scale": scales[0], "v_scale": scales[1]})
        case.add(f"{name}, {kind}", call, attention_check(reference, where))
        case.sizes[f"{name}, {kind}"] = row * rows


def plan_of(start, cap, package):
    return {"plan": package.decode_plan(start, cap)}


def make_copy(layer, setting, append, seed):
    """Random q (B, Hq, D); K and V of a new token (B, Hkv, D), if `append`; dense K and V (B, Hkv, tokens + append, D);
    arenas (N, D) with the first `lengths` tokens of each head (which ones does not matter for speed); (start, length,
    cap).
    """
    b, hkv, group, d = layer.sizes
    random = randoms(setting, seed)
    q, new = random(b, hkv * group, d), [random(b, hkv, d) for _ in range(2)]
    dense = [random(b, hkv, layer.tokens + append, d) for _ in range(2)]
    keep = (torch.arange(layer.tokens) < layer.lengths[:, None]).to(setting.device)
    rows = [t.flatten(0, 1)[:, : layer.tokens] for t in dense]
    *arenas, start, length, pos = kernels.ragged_pack(*rows, keep, slack=SLACK, backend="torch")
    for arena in arenas:
        arena[pos < 0] = float("nan")  # shows if a result depends on free slots
    return q, new if append else [], dense, arenas, (start, length, length + SLACK)


def places(tensors, index, new):
    """[(tensor, index, rows that a step writes there)] for K and V. new: [] or of the new token, (B, Hkv, D) each."""
    return [(t, index, rows.view_as(t[index])) for t, rows in zip(tensors, new, strict=False)]


def write(where):
    for tensor, index, rows in where:
        tensor[index] = rows


def write_and_attend(where, attend, *arguments):
    """A step of a static cache: store the new token, then attend."""
    write(where)
    return attend(*arguments)


def guest_step(make, where, arguments):
    """A step of a guest. make: () -> its attention over the lengths of the case."""
    return partial(write_and_attend, where, make(), *arguments)


def attention_check(reference, where=()):
    """A check for `Case.add`: the result against attention over `reference`, and that the call has written `where`."""

    def check(call):
        for tensor, index, _ in where:  # clear what other providers wrote
            tensor[index] = float("nan")
        got = call()
        if not all(torch.equal(tensor[index], rows) for tensor, index, rows in where):
            raise ValueError("the new token is not in the cache")
        return got, *(exact_attention(*reference, dtype=t) for t in (reference[0].dtype, torch.float64))

    return check


def add_flat(case, layer, setting, q, arenas, new, check):
    """Varlen attention over a flat cache without free slots; with new tokens, a whole step in AdaKV's manner.

    AdaKV allocates new arenas in each step and copies every row into them, with the new rows in between. This version
    is cheaper than AdaKV's: the views are made beforehand, one fused `cat` copies, and on CUDA its allocations are part
    of the graph.
    """
    provider = "adakv-style" if new else "varlen, heads as batch"
    if why := rivals.missing_16_bit_cuda(setting.dtype, setting.device):
        case.missing[provider] = why
        return
    attend = rivals.heads_as_batch(layer.lengths + bool(new), layer.sizes[2], setting.device)
    sizes, flat = [size for n in layer.lengths.tolist() for size in (n, SLACK)], []
    for i, arena in enumerate(arenas):
        parts = list(arena.split(sizes))  # views: the rows of a segment, its free slots, the rows of the next
        parts[1::2] = new[i].flatten(0, 1).split(1) if new else [x[:0] for x in parts[1::2]]
        flat.append(parts)
    step = (lambda: attend(q, *map(torch.cat, flat))) if new else partial(attend, q, *map(torch.cat, flat))
    case.add(provider, step, check, rival=True)


def add_two_launches(case, layer, setting, masked, arenas, start, new):
    """Pages with a table per head, and splits for a passed maximum length (rivals_triton.py); with new tokens, steps.

    masked: q, K and V padded to the longest, and the mask; arenas, start: as of `make_copy`.
    """
    if why := triton_missing(setting.dtype, setting.device):
        case.missing |= dict.fromkeys(("compactor-style", "fastdms-style"), why)
        return
    from . import rivals_triton as two

    q, *padded, _ = masked
    lengths, device = layer.lengths + bool(new), setting.device
    length, longest = lengths.int().to(device), int(lengths.max())
    pools, table, last = rivals.scattered(padded, lengths, two.PAGE)
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    splits = two.split_count(len(lengths), longest, units)
    step = partial(two.decode, q, new, *pools, table, length, splits, two.TILE, two.PAGE)
    case.add("compactor-style", step, attention_check(masked, places(pools, last, new)), rival=True)
    step = partial(two.decode, q, new, *arenas, start, length, -(-longest // two.SPLIT), two.SPLIT, 0)
    behind = start.long() + length - 1
    case.add("fastdms-style", step, attention_check(masked, places(arenas, behind, new)), rival=True)


# ---------------------------------------------------------------- the other ops


def scores_case(shape, tokens, setting):
    """window_scores of the last row of a prompt, beside a plain softmax."""
    _, hkv, group, d = LAYERS[shape]
    size = hkv * tokens * d * setting.dtype.itemsize
    case = Case(size, "plain softmax", shape)
    for i in range(copies_for(setting, size, 2 * size)):
        random = randoms(setting, i)
        q, k = random(hkv * group, 1, d), random(hkv, tokens, d)

        def plain(q=q, k=k, compute=torch.float32, product=torch.matmul):
            scores = product(q.to(compute), k.to(compute).repeat_interleave(group, 0).transpose(1, 2)) * d**-0.5
            return scores.softmax(-1)[:, 0]

        def check(call, plain=plain):
            units = setting.device.type == "cuda" and setting.dtype.itemsize == 2
            allowed = plain(compute=setting.dtype, product=on_matrix_units) if units else plain()
            return call(), allowed, plain(compute=torch.float64)

        case.add("plain softmax", plain, check, rival=True)
        case.add_ours("window_scores", setting, (q, k), lambda package: {"group": "none"}, check)
    return case


def on_matrix_units(q, k):
    """q (H, W, D) times k (H, D, T) in 16 bits with fp32 sums: PyTorch's own product on CUDA. Its matrix units round
    these sums less carefully than fp32 arithmetic."""
    return torch.bmm(q, k, out_dtype=torch.float32)


def pack_case(shape, tokens, retention, setting):
    """ragged_pack of one layer, beside indexing (which leaves no free slots for new tokens)."""
    _, hkv, _, d = LAYERS[shape]
    row = 2 * d * setting.dtype.itemsize  # of K and V
    size = 2 * row * round(retention * hkv * tokens)  # read and written
    case = Case(size, "indexing", shape)
    for i in range(copies_for(setting, size, row * hkv * tokens)):
        random = randoms(setting, i)
        k, v = random(hkv, tokens, d), random(hkv, tokens, d)
        draw = torch.rand(hkv, tokens, generator=torch.Generator().manual_seed(i))
        keep = (draw < retention).to(setting.device)
        options = {"slack": SLACK, "total": int(keep.sum())}

        def index(k=k, v=v, keep=keep, total=options["total"]):
            rows = keep.flatten().nonzero_static(size=total)[:, 0]  # like k[keep], without a synchronisation
            return torch.cat((k.flatten(0, 1)[rows], v.flatten(0, 1)[rows]))

        def check(call, index=index):
            return kept_rows(call()), index(), index().double()

        case.add("indexing", index, check, rival=True)
        case.add_ours("ragged_pack", setting, (k, v, keep), lambda package, options=options: options, check)
    return case


def kept_rows(packed):
    """The arenas of ragged_pack without free slots; the result of `index` unchanged."""
    if isinstance(packed, torch.Tensor):
        return packed
    k_arena, v_arena, _, _, kv_pos = packed
    return torch.cat((k_arena[kv_pos >= 0], v_arena[kv_pos >= 0]))


# ---------------------------------------------------------------- whole models


def step_case(tokens, retention, layout, setting):
    """One decode step of the demo model on a prompt of `tokens`: dense cache with all tokens, and ragged caches."""
    checkpoint = load(ROOT / "assets" / "demo", "fp32", setting.device)
    model, config = checkpoint.model.language_model, checkpoint.config.text_config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 600, (1, tokens), generator=generator)
    x = model.model.embed_tokens.weight[ids.to(setting.device)]
    layers, heads, steps = config.num_hidden_layers, config.num_key_value_heads, 2 * setting.rounds + 8

    def prune(layer, *_):
        generator = torch.Generator().manual_seed(layer)  # same choice for every cache
        lengths = lengths_of(layout, 1, heads, tokens, retention, generator)
        draw = torch.rand(heads, tokens, generator=generator).argsort(-1).argsort(-1)
        return (draw < lengths[:, None]).to(setting.device), None

    caches = {"dense cache": DenseCache(layers, tokens + steps)}
    caches["ours, torch"] = ragged = RaggedCache(layers, slack=steps, backend="torch")
    triton, why = f"ours, {triton_name(setting.device)}", triton_missing(torch.float32, setting.device)
    if not why:
        caches[triton] = RaggedCache(layers, slack=steps, backend="triton")
    for name, cache in caches.items():
        model.prefill(x, cache, prune=prune if retention < 1 and name != "dense cache" else None)
    q = torch.randn(1, config.num_attention_heads, config.head_dim, generator=generator).to(setting.device)
    weights = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith(("lm_head", "model.embed_tokens")))
    case = Case(weights + ragged.nbytes_held, "dense cache", layout=layout, reads_more="dense cache", repeatable=False)
    case.missing = {triton: why} if why else {}
    for name, cache in caches.items():
        check = partial(attended, cache, q)
        case.add(name, partial(model.decode, x[:, 0], cache), lambda _, check=check: check(), name == case.baseline)
    return case


def prefill_model(shape, setting):
    """(Llama, look-ahead rows): the demo model in fp32, or two layers of the 7B shape with random weights."""
    if shape == "demo":
        checkpoint = load(ROOT / "assets" / "demo", "fp32", setting.device)
        return checkpoint.model.language_model, checkpoint.lookahead
    language = harness.random_language(TextConfig(num_hidden_layers=2), setting.dtype, setting.device)
    lookahead = Lookahead(language).to(setting.device, setting.dtype).requires_grad_(False)
    return language, lookahead


def prefill_case(shape, tokens, setting):
    """Prefill of `tokens` positions, all but 16 of them a picture: without a cache, with all kept, and pruned."""
    model, rows = prefill_model(shape, setting)
    config, dtype = model.config, model.model.norm.weight.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, config.hidden_size, generator=generator).to(setting.device, dtype)
    q = torch.randn(1, config.num_attention_heads, config.head_dim, generator=generator).to(setting.device, dtype)
    spans = [(min(4, tokens - 1), max(5, tokens - 12))]
    plain = model.prefill(x)
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    exact = copy.deepcopy(model).to(wider).prefill(x.to(wider)).double()

    def prefill(method):
        cache = RaggedCache(config.num_hidden_layers)
        return cache, harness.prefill(model, x, cache, method, spans, lookahead=rows)

    def check(call):
        """Checks the hidden states against a prefill without a cache, and attention over the cache against its rows.

        Both are divided by their largest value, so that one bound fits both.
        """
        cache, hidden = call()
        given, states = attended(cache, q), (hidden, plain, exact)
        scales = [float(parts[2].abs().max()) for parts in (given, states)]
        both = zip(given, states, strict=True)  # result, plain, float64 reference
        return [torch.cat((a.flatten() / scales[0], b.flatten() / scales[1])) for a, b in both]

    case = Case(0, "no cache")
    case.add("no cache", partial(model.prefill, x), lambda call: (call(), plain, exact), rival=True)
    case.add("kept all", partial(prefill, None), check)
    for spec in METHODS:
        case.add(spec, partial(prefill, make_method(spec, 0.5)), check)
    case.rivals.add("plphp")  # the same method without look-ahead rows
    return case


def attended(cache, q):
    """(result, plain PyTorch, float64 reference) of a decode step's attention in all layers, for q (1, Hq, D).

    Random new tokens are appended and the step is undone afterwards. If the cache rotates q, the references do too.
    """
    dense, d = isinstance(cache, DenseCache), q.shape[-1]
    heads = cache.k[0].shape[1] if dense else cache.kv_len.shape[1]
    k_new, v_new = torch.randn(2, 1, heads, d, dtype=q.dtype).to(q.device)
    angles = torch.rand(1, 1, d, dtype=q.dtype).to(q.device)
    rope = angles.cos(), angles.sin()
    rotated = kernels.rotated(q, rope) if cache.fused else q
    got, plain, exact = [], [], []
    cache.grow()
    for layer in range(len(cache.k)):
        got.append(cache.append_attend(layer, q, k_new, v_new, rope))
        if dense:
            plain.append(exact_attention(q, *cache.rows(layer), dtype=torch.float32))
            exact.append(exact_attention(q, *cache.rows(layer)))
        else:
            k, v, where = cache.k[layer], cache.v[layer], (cache.kv_start[layer], cache.kv_len[layer])
            plain.append(kernels.ragged_decode_ref(rotated, k, v, *where))
            exact.append(kernels.ragged_decode_ref(rotated.double(), k.double(), v.double(), *where))
    cache.give_back()
    return torch.stack(got), torch.stack(plain), torch.stack(exact)
