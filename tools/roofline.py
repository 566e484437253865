"""Compute bytes, flops and the resulting speed limits from shapes alone. Needs neither torch nor a GPU.

    python tools/roofline.py                                     # what pruning can win, as in benchmarks/README.md
    python tools/roofline.py --retention 0.5 0.3 --batch 1 8     # other fractions kept, other batches
    python tools/roofline.py --stages --gpu H200                 # every stage of a picture and a question, on a GPU
    python tools/roofline.py --stages --shape llava-1.5-7b --measure    # at the bandwidth of this machine
    python tools/roofline.py --stages --bandwidth 4300 --tflops 700     # at a given GB/s and TFLOP/s
    python tools/roofline.py --stages --shape next-mistral --vision 23000    # ten large pictures

A decode step reads the decoder's weights once and, for each sequence, the K and V of all its tokens:

    bytes   = weights + batch * tokens * 2 * layers * kv_heads * head_dim * bytes per number
    ceiling = bytes with everything kept / bytes with what is kept

A step reaches the ceiling only if memory bandwidth alone limits it. Time to the first token does not change: PLPHP
drops K and V after prefill has used them.

--stages counts, for each stage, the weights once, K and V read or written, and the multiplications and additions of all
matrix products, attention included (causal: half of the square). The least time is the larger of bytes / bandwidth and
flops / peak. Activations, norms and softmax are not counted, so real stages take longer.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.console import as_command  # noqa: E402
from model.flags import Parser, number  # noqa: E402


@dataclass(frozen=True)
class Tower:
    """A CLIP vision tower followed by LLaVA's projector."""

    layers: int  # layers that run, up to the one whose output LLaVA uses
    hidden: int
    intermediate: int
    patches: int  # per picture, equal to its tokens; inside the tower CLS is one more
    patch: int  # side in pixels

    @property
    def tower_numbers(self):
        """Weights and biases used: patch embedding, CLS, positions, the norm before the layers, the layers."""
        c, f = self.hidden, self.intermediate
        layer = 4 * (c * c + c) + (2 * c * f + f + c) + 4 * c  # attention, MLP, two norms
        return 3 * self.patch**2 * c + c + (self.patches + 1) * c + 2 * c + self.layers * layer

    def tower_flops(self, pictures):
        c, rows = self.hidden, self.patches + 1
        layer = 2 * rows * (4 * c * c + 2 * c * self.intermediate) + 4 * rows**2 * c
        return pictures * (2 * self.patches * 3 * self.patch**2 * c + self.layers * layer)

    def projector_numbers(self, wide):
        """Weights and biases. wide: channels of the decoder."""
        return (self.hidden + 1) * wide + (wide + 1) * wide

    def projector_flops(self, pictures, wide):
        return pictures * 2 * self.patches * (self.hidden + wide) * wide


CLIP_L_336 = Tower(23, 1024, 4096, 576, 14)  # the 24th layer does not run
DEMO_TOWER = Tower(4, 192, 768, 256, 14)


@dataclass(frozen=True)
class Shape:
    """A decoder and a typical prompt."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    vision: int  # tokens of the pictures
    text: int  # tokens of the rest
    tower: Tower = CLIP_L_336

    @property
    def layer_numbers(self):
        """Attention and MLP weights of all layers."""
        attention = 2 * self.hidden * (self.q_heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def weight_numbers(self):
        """Weights read in a step: attention and MLP of every layer, norms, the head, and one row of the embedding."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layer_numbers + norms + (self.vocabulary + 1) * self.hidden

    @property
    def kv_numbers(self):
        """K and V of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def prefill_numbers(self):
        """Peak of live numbers per token during prefill, reached in the MLP.

        Prompt, layer input and normed rows; q, k and v of the layer; cos and sin; four intermediate rows of the MLP.
        """
        attention = (self.q_heads + 2 * self.kv_heads) * self.head_dim
        return 3 * self.hidden + attention + 2 * self.head_dim + 4 * self.intermediate

    @property
    def pictures(self):
        """Pictures, or tiles of one, that the tower encodes."""
        return self.vision // self.tower.patches

    def prefill_flops(self):
        """Flops of one sequence; the head runs on the last token only."""
        tokens = self.vision + self.text
        attention = 2 * tokens**2 * self.layers * self.q_heads * self.head_dim
        return 2 * tokens * self.layer_numbers + attention + 2 * self.vocabulary * self.hidden

    def decode_flops(self, batch, kept=1.0):
        """Flops of one step of `batch` sequences that hold the fraction `kept` of their vision tokens."""
        tokens = self.text + kept * self.vision
        attention = 4 * tokens * self.layers * self.q_heads * self.head_dim
        return batch * (2 * (self.layer_numbers + self.vocabulary * self.hidden) + attention)


def shape_of(config, vision, text, name=""):
    """The Shape of a config with the fields of a Llama's config.json. Biases are not counted."""
    return Shape(
        name, config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.vocab_size, vision, text,
    )  # fmt: skip


SEVEN = (32, 4096, 11008, 32, 32, 128, 32064)
SHAPES = (
    Shape("llava-1.5-7b, 1 picture", *SEVEN, 576, 64),
    Shape("llava-1.5-13b, 1 picture", 40, 5120, 13824, 40, 40, 128, 32064, 576, 64),
    Shape("next-vicuna-7b, 1 picture in tiles", *SEVEN, 2880, 64),
    Shape("7b, 8 pictures", *SEVEN, 8 * 576, 64),
    Shape("next-mistral-7b, 1 picture in tiles", 32, 4096, 14336, 32, 8, 128, 32064, 2880, 64),
    Shape("the demo model", 6, 192, 512, 8, 4, 32, 640, 256, 13, DEMO_TOWER),
)


@dataclass(frozen=True)
class Machine:
    """Limits of a machine: memory bandwidth in bytes/s; flop/s of dense bf16 products, None if unknown."""

    name: str
    bandwidth: float
    flops: float | None


# Peaks from the vendors' data sheets: dense (no 2:4 sparsity) bf16 products accumulated in fp32. A copy reaches about
# 90 % of the bandwidth.
GPUS = {
    "H200": Machine("H200 SXM, data sheet", 4.8e12, 989e12),
    "H100": Machine("H100 SXM 80 GB, data sheet", 3.35e12, 989e12),
    "A100": Machine("A100 SXM 80 GB, data sheet", 2.039e12, 312e12),
    "L40S": Machine("L40S, data sheet", 0.864e12, 362e12),
    "L4": Machine("L4, data sheet", 0.3e12, 121e12),
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
            full = step_bytes(shape, batch)
            weights = 2 * shape.weight_numbers
            gains = [f"{ceiling(shape, batch, r):.2f}x" for r in retentions]
            share = f"{100 * (1 - weights / full):.1f} %"
            rows.append([shape.name, str(batch), share, *gains, f"{full / weights:.2f}x"])
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
        products = self.flops / machine.flops if machine.flops else 0.0
        return max((memory, "memory"), (products, "products"))


def stages(shape, batches=(1,), retentions=(), bytes_per_number=2):
    """The Stages of answering the shape's prompt. Stages before decoding run one sequence at a time."""
    size, tower, tokens = bytes_per_number, shape.tower, shape.vision + shape.text
    tower_bytes, projector_bytes = size * tower.tower_numbers, size * tower.projector_numbers(shape.hidden)
    weights, row = size * shape.weight_numbers, size * shape.kv_numbers
    seen = f"{shape.pictures} x {tower.patches + 1} tokens"
    yield Stage(f"vision tower, {seen}", tower_bytes, 0, tower.tower_flops(shape.pictures))
    yield Stage("projector", projector_bytes, 0, tower.projector_flops(shape.pictures, shape.hidden))
    yield Stage(f"prefill, {tokens} tokens", weights, tokens * row, shape.prefill_flops())
    for batch in batches:
        for kept in (1.0, *retentions):
            held = batch * (shape.text + kept * shape.vision)
            name = f"decode step, batch {batch}" + (f", {kept:g} kept" if kept < 1 else "")
            yield Stage(name, weights, held * row, shape.decode_flops(batch, kept))


def stage_table(shape, machine, batches, retentions):
    """Markdown. No times without a machine; without its flops, times follow from bytes alone."""
    head = [shape.name, "weights MB", "KV MB", "GFLOP", "flop/byte"]
    head += [] if machine is None else ["least ms", "set by"] if machine.flops else ["least ms, by bytes alone"]
    rows = []
    for stage in stages(shape, batches, retentions):
        numbers = 1e-6 * stage.weights, 1e-6 * stage.kv, 1e-9 * stage.flops, stage.flops / (stage.weights + stage.kv)
        row = [stage.name, *map(short, numbers)]
        if machine:
            seconds, bound = stage.seconds(machine)
            row += [short(1e3 * seconds), bound][: len(head) - 5]
        rows.append(row)
    return markdown(head, rows) + "\n\n" + prefill_memory(shape, retentions)


def prefill_memory(shape, retentions, bytes_per_number=2):
    """One line: peak memory of prefill besides the weights, and the memory of K and V in all layers."""
    tokens = shape.vision + shape.text
    working = bytes_per_number * tokens * shape.prefill_numbers
    held = [bytes_per_number * (shape.text + r * shape.vision) * shape.kv_numbers for r in (1, *retentions)]
    parts = " / ".join(short(1e-6 * n) for n in held)
    kept = " / ".join(f"{r:g}" for r in (1, *retentions))
    return f"Prefill needs at most {short(1e-6 * working)} MB besides the weights, plus {parts} MB for {kept} kept."


def short(x):
    return f"{x:,.1f}" if x >= 10 else f"{x:.3g}"


def measured(name):
    """The Machine of a torch device. Bandwidth: the faster of a copy and a read-only sum; flops are not measured."""
    import torch

    from model.flags import choose_device
    from model.report import measure_bandwidth

    device = choose_device(name)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    return Machine(f"{what}, measured", measure_bandwidth(device), None)


def chosen_machine(args):
    """The Machine from the flags, None without them. --bandwidth and --tflops override the others."""
    machine = GPUS[args.gpu] if args.gpu else measured("auto") if args.measure else Machine("", 0.0, None)
    if args.bandwidth:
        machine = replace(machine, name=f"{machine.name}, bandwidth given".strip(", "), bandwidth=1e9 * args.bandwidth)
    if args.tflops:
        machine = replace(machine, name=f"{machine.name}, flops given", flops=1e12 * args.tflops)
    return machine if machine.bandwidth else None


def parser():
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # fmt: off
    p.add_argument("--batch", type=number(int, 1), nargs="+", default=[1, 8, 32], metavar="B")
    p.add_argument("--retention", type=number(float, 0, 1), nargs="+", default=[0.5, 0.2], metavar="F",
                   help="fractions kept")
    p.add_argument("--shape", metavar="NAME", help="only shapes whose name contains NAME")
    p.add_argument("--vision", type=number(int, 1), metavar="N", help="vision tokens instead of the shape's default")
    p.add_argument("--stages", action="store_true", help="a row for each of tower, projector, prefill, decode step")
    p.add_argument("--gpu", choices=GPUS, help="for --stages: least times by this GPU's data sheet")
    p.add_argument("--measure", action="store_true", help="or at this machine's measured bandwidth (needs torch)")
    p.add_argument("--bandwidth", type=number(float, 0, open_low=True), metavar="GBps", help="or at this bandwidth")
    p.add_argument("--tflops", type=number(float, 0, open_low=True), metavar="T", help="peak of dense bf16 products")
    # fmt: on
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    shapes = [shape for shape in SHAPES if args.shape is None or args.shape in shape.name]
    if args.vision:
        names = [f"{shape.name.partition(',')[0]}, {args.vision} vision tokens" for shape in shapes]
        shapes = [replace(shape, name=name, vision=args.vision) for shape, name in zip(shapes, names, strict=True)]
    timed = args.gpu or args.measure or args.bandwidth
    if not shapes:
        p.error(f"no shape's name contains {args.shape}; use one of {'; '.join(shape.name for shape in SHAPES)}")
    if (timed or args.tflops) and not args.stages:
        p.error("--gpu, --measure, --bandwidth and --tflops need --stages; add it")
    if args.gpu and args.measure:
        p.error("--gpu and --measure exclude each other; give one")
    if args.tflops and not timed:
        p.error("--tflops needs a bandwidth too; add --bandwidth, --measure or --gpu")
    if not args.stages:
        print(table(args.batch, args.retention, shapes))
        return
    machine = chosen_machine(args)
    if machine:
        flops = f"{short(1e-12 * machine.flops)} TFLOP/s" if machine.flops else "flops unknown"
        print(f"{machine.name}: {short(1e-9 * machine.bandwidth)} GB/s, {flops}\n")
    print("\n\n".join(stage_table(shape, machine, args.batch, args.retention) for shape in shapes))


if __name__ == "__main__":
    sys.exit(as_command(main))
