"""Compute bytes, flops and the resulting speed limits from shapes alone. Needs neither torch nor a GPU.

    python tools/roofline.py                                     # what pruning can win, as in benchmarks/README.md
    python tools/roofline.py --retention 0.5 0.3 --batch 1 8     # other fractions kept, other batches
    python tools/roofline.py --stages --gpu H200                 # every stage of a picture and a question, on a GPU
    python tools/roofline.py --stages --shape next-mistral --vision 23000    # ten large pictures
    python tools/roofline.py --tp 1 2 4 8 16 --batch 1 32        # a model divided among GPUs of one node, and of two
    python tools/roofline.py --tp 8 --link 25 --latency 20       # with 25 GB/s from GPU to GPU, 20 us per collective
    python tools/roofline.py --kernel --gpu H100 A100            # predicted times of a decode step's attention
    python tools/roofline.py --kernel --gpu H100 --kv-dtype int8    # with K and V in 8 bits
    python tools/roofline.py --kernel --loads 4 --measured benchmarks/kernels-h200.json    # beside measured times

A decode step reads the decoder's weights once and, for each sequence, the K and V of all its tokens:

    bytes   = weights + batch * tokens * 2 * layers * kv_heads * head_dim * bytes per number
    ceiling = bytes with everything kept / bytes with what is kept

A step reaches the ceiling only if memory bandwidth alone limits it. Time to the first token does not change: PLPHP
drops K and V after prefill has used them.

--stages counts, for each stage, the weights once, K and V read or written, and the multiplications and additions of all
matrix products, attention included (causal: half of the square). The least time is the larger of bytes / bandwidth and
flops / peak. Activations, norms and softmax are not counted, so real stages take longer. A second table has the peak
memory of each stage, for the first --batch and everything kept, from the tensors that the code holds
(tools/memory_model.py); then a line for each --retention says which stage needs most.

--tp prints the time of a decode step and of a prefill when several GPUs share the model, and what each of them holds
(tools/parallel_model.py has the arithmetic, and sources of the links). Launching kernels is not counted, and our steps
with collectives are not captured in a graph: real steps take longer.

--kernel predicts the time of a call of ragged_decode_append's Triton kernel, one layer, and first prints what it
assumes, with sources (tools/kernel_model.py). One row per case:

    work items         programs with work, of which so many per multiprocessor; waves: work items / places for them
    chain              time if bandwidth and places were unlimited: the longest chain of dependent loads
    bytes              time of the bytes of K and V alone
    of bandwidth       bytes / predicted
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import kernel_model, memory_model, parallel_model  # noqa: E402
from tools.command import as_command, flags, number  # noqa: E402
from tools.shapes import LAYERS, TIED, text_config  # noqa: E402
from tools.shapes import SHAPES as CONFIGS  # noqa: E402

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # per number


@dataclass(frozen=True)
class Tower:
    """A vision tower, CLIP or SigLIP, followed by LLaVA's projector."""

    layers: int  # layers that run, up to the one whose output LLaVA uses
    hidden: int
    intermediate: int
    patches: int  # per square, equal to its tokens; inside CLIP, CLS is one more
    patch: int  # side in pixels
    side: int  # of a square, in pixels
    cls: int  # 1 for CLIP, 0 for SigLIP
    idle: int  # layers that are loaded but do not run

    @property
    def layer_numbers(self):
        """Weights and biases of a layer: attention, MLP, two norms."""
        c, f = self.hidden, self.intermediate
        return 4 * (c * c + c) + (2 * c * f + f + c) + 4 * c

    @property
    def tower_numbers(self):
        """Weights and biases used: patch embedding, CLS or a bias, positions, CLIP's norm before the layers, layers."""
        c = self.hidden
        embedding = 3 * self.patch**2 * c + c + (self.patches + self.cls) * c
        return embedding + 2 * c * self.cls + self.layers * self.layer_numbers

    @property
    def sigmoid(self):
        """True if the MLP's activation is OpenAI's GELU, which is computed with a sigmoid."""
        return bool(self.cls)

    def tower_flops(self, pictures):
        c, rows = self.hidden, self.patches + self.cls
        layer = 2 * rows * (4 * c * c + 2 * c * self.intermediate) + 4 * rows**2 * c
        return pictures * (2 * self.patches * 3 * self.patch**2 * c + self.layers * layer)

    def projector_numbers(self, wide):
        """Weights and biases. wide: channels of the decoder."""
        return (self.hidden + 1) * wide + (wide + 1) * wide

    def projector_flops(self, pictures, wide):
        return pictures * 2 * self.patches * (self.hidden + wide) * wide


def tower_of(vision):
    """The Tower of a vision_config, a dict. LLaVA uses the output of CLIP's last layer but one, of SigLIP's last."""
    side, patch, cls = vision["image_size"], vision["patch_size"], int(vision["model_type"] == "clip_vision_model")
    layers = vision["num_hidden_layers"] - cls
    return Tower(
        layers, vision["hidden_size"], vision["intermediate_size"], (side // patch) ** 2, patch, side, cls, idle=cls
    )


@dataclass(frozen=True)
class Shape:
    """A decoder and a typical prompt. config: has the fields of a Llama's config.json.

    several: squares that the tower encodes, if they give more tokens than the prompt has. tied: the head is the
    embedding matrix.
    """

    name: str
    config: object
    vision: int  # tokens of the pictures
    text: int  # tokens of the rest
    tower: Tower | None = None
    several: int | None = None
    tied: bool = False

    @property
    def layer_numbers(self):
        """Attention and MLP weights of all layers."""
        c = self.config
        attention = 2 * c.hidden_size * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
        return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    @property
    def head_numbers(self):
        """Weights of the output head."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def weight_numbers(self):
        """Weights read in a step: attention and MLP of every layer, norms, the head, and one row of the embedding."""
        norms_and_row = (2 * self.config.num_hidden_layers + 1 + 1) * self.config.hidden_size
        return self.layer_numbers + self.bias_numbers + self.head_numbers + norms_and_row

    @property
    def bias_numbers(self):
        """Biases of q, k and v, which Qwen2 has."""
        c = self.config
        heads = c.num_attention_heads + 2 * c.num_key_value_heads
        return c.num_hidden_layers * heads * c.head_dim * getattr(c, "attention_bias", False)

    @property
    def resident_numbers(self):
        """All weights that are loaded: those of a step, the rest of the embedding, the tower and the projector."""
        rest = 0 if self.tied else self.head_numbers
        rest -= self.config.hidden_size  # the row that `weight_numbers` counts
        if self.tower:
            unused = self.tower.idle * self.tower.layer_numbers + 2 * self.tower.hidden  # and the norm after the layers
            rest += self.tower.tower_numbers + unused + self.tower.projector_numbers(self.config.hidden_size)
        return self.weight_numbers + rest

    @property
    def kv_numbers(self):
        """K and V of one token, all layers."""
        return 2 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim

    @property
    def squares(self):
        """Pictures, or tiles of one, that the tower encodes."""
        return self.several or self.vision // self.tower.patches

    def attention_flops(self, rows, tokens):
        """Flops of `rows` query rows that each attend to `tokens` tokens, all layers."""
        c = self.config
        return 4 * rows * tokens * c.num_hidden_layers * c.num_attention_heads * c.head_dim

    def prefill_flops(self):
        """Flops of one sequence; attention is causal, and the head runs on the last token only."""
        tokens = self.vision + self.text
        return 2 * tokens * self.layer_numbers + self.attention_flops(tokens, tokens) // 2 + 2 * self.head_numbers

    def decode_flops(self, batch, kept=1.0):
        """Flops of one step of `batch` sequences that hold the fraction `kept` of their vision tokens."""
        tokens = self.text + kept * self.vision
        return batch * (2 * (self.layer_numbers + self.head_numbers) + self.attention_flops(1, tokens))


SHAPES = tuple(
    Shape(name, text_config(config), vision, text, tower_of(CONFIGS[config][1]), *several, tied=config in TIED)
    for config, name, vision, text, *several in (
        ("llava-1.5-7b", "llava-1.5-7b, 1 picture", 576, 64),
        ("llava-1.5-13b", "llava-1.5-13b, 1 picture", 576, 64),
        ("next-vicuna-7b", "next-vicuna-7b, 1 picture in tiles", 2880, 64),
        ("llava-1.5-7b", "7b, 8 pictures", 8 * 576, 64),
        ("next-mistral-7b", "next-mistral-7b, 1 picture in tiles", 2880, 64),
        ("demo", "the demo model", 256, 13),
        ("onevision-0.5b", "onevision-0.5b, 1 picture in tiles", 8765, 64, 13),
        ("onevision-7b", "onevision-7b, 1 picture in tiles", 8765, 64, 13),
    )
)


@dataclass(frozen=True)
class Machine:
    """Limits of a machine: memory bandwidth in bytes/s; flop/s of dense bf16 products."""

    name: str
    bandwidth: float
    flops: float


# Peaks from the vendors' data sheets: dense (no 2:4 sparsity) bf16 products accumulated in fp32. A copy reaches about
# 90 % of the bandwidth.
GPUS = {
    "H200": Machine("H200 SXM, data sheet", 4.8e12, 989e12),
    "H100": Machine("H100 SXM 80 GB, data sheet", 3.35e12, 989e12),
    "A100": Machine("A100 SXM 80 GB, data sheet", 2.039e12, 312e12),
    "L40S": Machine("L40S, data sheet", 0.864e12, 362e12),
    "L4": Machine("L4, data sheet", 0.3e12, 121e12),
    "MI300X": Machine("MI300X, data sheet", 5.3e12, 1307e12),
    "RTX4090": Machine("GeForce RTX 4090, data sheet", 1.008e12, 165e12),
}


# ---------------------------------------------------------------- what pruning can win


def step_bytes(shape, batch=1, kept=1.0, bytes_per_number=2):
    """Bytes that one decode step reads when the fraction `kept` of the vision tokens is in the cache."""
    tokens = shape.text + kept * shape.vision
    return bytes_per_number * (shape.weight_numbers + batch * tokens * shape.kv_numbers)


def ceiling(shape, batch, kept):
    """Largest speed-up of decoding with this fraction kept."""
    return step_bytes(shape, batch) / step_bytes(shape, batch, kept)


def table(batches, retentions, shapes=SHAPES):
    """Markdown: one row per shape and batch."""
    head = ["model and prompt", "batch", "share of KV in bytes", *(f"{r:g} kept" for r in retentions), "no KV at all"]
    rows = []
    for shape in shapes:
        for batch in batches:
            full, weights = step_bytes(shape, batch), step_bytes(shape, 0)
            gains = [ceiling(shape, batch, r) for r in retentions] + [full / weights]
            share = f"{100 * (1 - weights / full):.1f} %"
            rows.append([shape.name, str(batch), share, *(f"{gain:.2f}x" for gain in gains)])
    return markdown(head, rows)


def markdown(head, rows):
    """A table with its number columns right-aligned."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])


# ---------------------------------------------------------------- every stage


@dataclass(frozen=True)
class Stage:
    """weights, kv: bytes to read or write; flops: of its matrix products."""

    name: str
    weights: float
    kv: float
    flops: float

    def seconds(self, machine):
        """(least time, what limits it: "memory" or "products")."""
        memory = (self.weights + self.kv) / machine.bandwidth
        return max((memory, "memory"), (self.flops / machine.flops, "products"))


def stages(shape, batches=(1,), retentions=(), size=2):
    """The Stages of answering the shape's prompt, one sequence at a time before decoding. size: bytes per number."""
    tower, wide, tokens = shape.tower, shape.config.hidden_size, shape.vision + shape.text
    weights, row = size * shape.weight_numbers, size * shape.kv_numbers
    name = f"vision tower, {shape.squares} x {tower.patches + tower.cls} tokens"
    yield Stage(name, size * tower.tower_numbers, 0, tower.tower_flops(shape.squares))
    yield Stage("projector", size * tower.projector_numbers(wide), 0, tower.projector_flops(shape.squares, wide))
    yield Stage(f"prefill, {tokens} tokens", weights, tokens * row, shape.prefill_flops())
    for batch in batches:
        for kept in (1.0, *retentions):
            held = batch * (shape.text + kept * shape.vision)
            name = f"decode step, batch {batch}" + (f", {kept:g} kept" if kept < 1 else "")
            yield Stage(name, weights, held * row, shape.decode_flops(batch, kept))


def stage_table(shape, machine, batches, retentions, size):
    """Markdown. No times without a machine."""
    head = [shape.name, "weights MB", "KV MB", "GFLOP", "flop/byte", *(["least ms", "set by"] if machine else [])]
    rows = []
    for stage in stages(shape, batches, retentions, size):
        numbers = 1e-6 * stage.weights, 1e-6 * stage.kv, 1e-9 * stage.flops, stage.flops / (stage.weights + stage.kv)
        row = [stage.name, *map(short, numbers)]
        if machine:
            least, bound = stage.seconds(machine)
            row += [short(1e3 * least), bound]
        rows.append(row)
    return markdown(head, rows)


def memory_tables(shape, batch, retentions, size):
    """Markdown: a table of `memory_model.needs`, and a line for each share kept."""
    head, rows = memory_model.table(shape, batch, size)
    said = [f"- {kept:g} kept: {memory_model.peak(shape, batch, kept, size)}" for kept in (1, *retentions)]
    return "\n\n".join([markdown(head, rows), "\n".join(said)])


def short(x):
    return f"{x:,.1f}" if x >= 10 else f"{x:.3g}"


# ---------------------------------------------------------------- several GPUs

DIVIDED = [shape for shape in SHAPES if shape.name.split(",")[0] in ("llava-1.5-7b", "llava-1.5-13b", "onevision-7b")]


def parallel_tables(args, shapes):
    """Print a table for each shape: a row for each --batch and number of ranks."""
    machine, size = GPUS[(args.gpu or ["H100"])[0]], BYTES[args.dtype]

    def links(ranks):
        link, latency = args.link and 1e9 * args.link, None if args.latency is None else 1e-6 * args.latency
        return parallel_model.link_of(ranks, link, latency)

    said = {f"{link.name}: {short(1e-9 * link.bandwidth)} GB/s, {1e6 * link.latency:g} us per collective"
            for link in map(links, args.tp)}  # fmt: skip
    print(f"{machine.name}; " + "; ".join(sorted(said, reverse=True)))
    for shape in shapes:
        rows = [row for batch in args.batch for row in parallel_model.rows(shape, machine, args.tp, batch, links, size)]
        print(f"\n{shape.name}\n\n{markdown(parallel_model.HEAD, rows)}\n")
        for batch in args.batch:
            fastest, half = parallel_model.verdict(shape, machine, args.tp, batch, links, size)
            print(f"batch {batch}: fastest with {fastest}; with up to {half}, each does half of what one does alone")


def parallel_summary(numbers=(1, 2, 4, 8, 16), batches=(1, 32)):
    """Markdown for benchmarks/README.md: times of a step on H100s, and where more of them stop to pay."""
    head = ["model and prompt", "batch", *(f"{n} GPU{'s' * (n > 1)}, ms" for n in numbers), "fastest", "half each"]
    lines = []
    for shape in DIVIDED:
        for batch in batches:
            rows = list(parallel_model.rows(shape, GPUS["H100"], numbers, batch))
            verdict = map(str, parallel_model.verdict(shape, GPUS["H100"], numbers, batch))
            lines.append([shape.name, str(batch), *(row[5] or "-" for row in rows), *verdict])
    return markdown(head, lines)


# ---------------------------------------------------------------- the kernel of a decode step


def kernel_report(args, found):
    """Print the assumptions and a table of predictions per GPU. found: measured cases to print beside them, or None."""
    rows_of = kernel_model.ROWS[args.kv_dtype]
    print("\n".join(kernel_model.assumptions(args.gpu, args.loads, args.kv_dtype)))
    for name in args.gpu:
        device = kernel_model.DEVICES[name]
        if found:
            rows = []
            for case, lengths, us in found:
                cells = kernel_model.row(case, lengths, device, args.loads, rows_of)
                rows.append([*cells[:-1], f"{us:.1f}", f"{us / float(cells[-2]):.2f}"])
            head = [*kernel_model.HEAD[:-1], "measured us", "measured / predicted"]
        else:
            cases = kernel_model.cases(args.shapes, args.mbytes, args.skew)
            head, rows = kernel_model.HEAD, [kernel_model.row(*case, device, args.loads, rows_of) for case in cases]
        print(f"\n{name}\n\n{markdown(head, rows)}")


def main(argv=None):
    p = flags(__doc__)
    wide = [name for name, (*_, d) in LAYERS.items() if d == kernel_model.D]
    # fmt: off
    p.add_argument("--batch", type=number(int, 1), nargs="+", default=[1, 8, 32], metavar="B")
    p.add_argument("--retention", type=number(float, 0, 1), nargs="+", default=[0.5, 0.2], metavar="F",
                   help="fractions kept")
    p.add_argument("--shape", default="", metavar="NAME", help="only shapes whose name contains NAME")
    p.add_argument("--vision", type=number(int, 1), metavar="N", help="vision tokens instead of the shape's default")
    p.add_argument("--stages", action="store_true",
                   help="a row for each of tower, projector, prefill, decode step: costs, and peak memory")
    p.add_argument("--dtype", choices=BYTES, default="bf16", help="for --stages and --tp (default bf16)")
    p.add_argument("--gpu", choices=GPUS, nargs="+", metavar="GPU",
                   help=f"for --stages and --tp: least times by the data sheet of {', '.join(GPUS)}; for --kernel: "
                        f"{', '.join(kernel_model.DEVICES)} (default H200)")
    p.add_argument("--tp", type=number(int, 1), nargs="+", metavar="N", help="GPUs that share one model")
    p.add_argument("--link", type=number(float, 0, open_low=True), metavar="GB/S",
                   help="for --tp: from each GPU to the next, in one direction (default: NVLink, and InfiniBand for "
                        f"more than {parallel_model.NODE} GPUs)")
    p.add_argument("--latency", type=number(float, 0), metavar="US",
                   help="for --tp: microseconds of a collective without bytes "
                        f"(default {1e6 * parallel_model.NVLINK.latency:g}, "
                        f"for more than {parallel_model.NODE} GPUs {1e6 * parallel_model.INFINIBAND.latency:g})")
    p.add_argument("--kernel", action="store_true", help="predict times of ragged_decode_append's Triton kernel")
    p.add_argument("--shapes", choices=wide, nargs="+", default=["7b", "gqa8"], metavar="SHAPE",
                   help="for --kernel: layers, as in bench_kernels.py (default 7b gqa8)")
    p.add_argument("--mbytes", type=number(float, 0, open_low=True), nargs="+", default=[4, 17, 65, 130, 512],
                   metavar="MB", help="for --kernel: K and V per layer (default 4 17 65 130 512)")
    p.add_argument("--skew", type=number(float, 1), nargs="+", default=[1], metavar="R",
                   help="for --kernel: one head R times as long as the mean (default 1)")
    p.add_argument("--loads", type=number(int, 3, 4), default=kernel_model.LOADS, metavar="N",
                   help="for --kernel: loads that wait for each other up to the first tile of K (default %(default)s; "
                        "4 for kernels-h200.json)")
    p.add_argument("--kv-dtype", choices=kernel_model.ROWS, default="auto",
                   help="for --kernel: K and V in 8 bits, over the same segments (default auto: bf16)")
    p.add_argument("--measured", type=Path, metavar="FILE", help="for --kernel: the cases of bench_kernels.py --json "
                   "FILE, beside what was measured; needs torch")
    # fmt: on
    args = p.parse_args(argv)
    if args.kernel:
        args.gpu = args.gpu or ["H200"]
        if unknown := set(args.gpu) - set(kernel_model.DEVICES):
            p.error(f"--kernel knows no {' '.join(unknown)}; use {', '.join(kernel_model.DEVICES)}")
        if refused := [name for name in args.gpu if args.kv_dtype == "fp8" and not kernel_model.DEVICES[name].fp8]:
            p.error(f"--kv-dtype fp8 is refused on {' '.join(refused)}; use int8")
        try:
            found = [*kernel_model.measured(args.measured, args.kv_dtype)] if args.measured else None
        except (OSError, ValueError, KeyError, TypeError):
            p.error(f"--measured {args.measured} cannot be read; give a file written by bench_kernels.py --json")
        if found == []:
            p.error(
                f"--measured {args.measured} has no time of ragged_decode_append in Triton with --kv-dtype "
                f"{args.kv_dtype} and {kernel_model.D} channels; give another file or type"
            )
        kernel_report(args, found)
        return
    shapes = [shape for shape in SHAPES if args.shape in shape.name]
    if not shapes:
        p.error(f"no shape's name contains {args.shape}; use one of {'; '.join(shape.name for shape in SHAPES)}")
    if args.vision:
        names = [f"{shape.name.partition(',')[0]}, {args.vision} vision tokens" for shape in shapes]
        shapes = [replace(shape, name=name, vision=args.vision) for shape, name in zip(shapes, names, strict=True)]
    if args.kv_dtype != "auto":
        p.error("--kv-dtype needs --kernel; add it")
    if args.tp is None and (args.link is not None or args.latency is not None):
        p.error("--link and --latency need --tp; add it")
    if args.gpu and not args.stages and not args.tp:
        p.error("--gpu needs --stages, --tp or --kernel; add one")
    if args.gpu and args.dtype == "fp32":
        p.error("--gpu has peaks of 16-bit products; leave out --dtype fp32")
    if args.dtype != "bf16" and not args.stages and not args.tp:
        p.error("--dtype needs --stages or --tp; add one")
    if args.tp:
        if args.dtype == "fp32" or len(args.gpu or ()) > 1:
            p.error("--tp is for one kind of GPU, whose peak is of 16-bit products; give one --gpu and no --dtype fp32")
        parallel_tables(args, shapes if args.shape else [replace(s, vision=args.vision or s.vision) for s in DIVIDED])
        return
    if not args.stages:
        print(table(args.batch, args.retention, shapes))
        return
    for machine in [GPUS[name] for name in args.gpu or ()] or [None]:
        if machine:
            print(f"{machine.name}: {short(1e-9 * machine.bandwidth)} GB/s, {short(1e-12 * machine.flops)} TFLOP/s\n")
        for shape in shapes:
            print(stage_table(shape, machine, args.batch, args.retention, BYTES[args.dtype]), end="\n\n")
            print(memory_tables(shape, args.batch[0], args.retention, BYTES[args.dtype]), end="\n\n")


if __name__ == "__main__":
    sys.exit(as_command(main))
