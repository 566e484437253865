"""What pruning can win at most when decoding: bytes per step, from shapes alone. Needs neither torch nor a GPU.

    python tools/roofline.py                                     # the table of the README
    python tools/roofline.py --retention 0.5 0.3 --batch 1 8     # other fractions kept, other batches

A decode step reads the decoder's weights once and, for each sequence, the K and V of all its tokens:

    bytes   = weights + batch * tokens * 2 * layers * kv_heads * head_dim * bytes per number
    ceiling = bytes with everything kept / bytes with what is kept

It is reached only where memory bandwidth is all that counts. The time to the first token stays the same: PLPHP drops K
and V after prefill has used them.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder and a usual prompt for it."""

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

    @property
    def weight_numbers(self):
        """Read in a step: attention and MLP of every layer, norms, the head; of the embedding only one row."""
        attention = 2 * self.hidden * (self.q_heads + self.kv_heads) * self.head_dim
        mlp = 3 * self.hidden * self.intermediate
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * (attention + mlp) + norms + (self.vocabulary + 1) * self.hidden

    @property
    def kv_numbers(self):
        """K and V of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


SEVEN = (32, 4096, 11008, 32, 32, 128, 32064)
SHAPES = (
    Shape("llava-1.5-7b, 1 picture", *SEVEN, 576, 64),
    Shape("llava-1.5-13b, 1 picture", 40, 5120, 13824, 40, 40, 128, 32064, 576, 64),
    Shape("next-vicuna-7b, 1 picture in tiles", *SEVEN, 2880, 64),
    Shape("7b, 8 pictures", *SEVEN, 8 * 576, 64),
    Shape("next-mistral-7b, 1 picture in tiles", 32, 4096, 14336, 32, 8, 128, 32064, 2880, 64),
    Shape("the demo model", 6, 192, 512, 8, 4, 32, 640, 256, 13),
)


def step_bytes(shape, batch=1, kept=1.0, bytes_per_number=2):
    """Bytes that one decode step reads when the fraction `kept` of the vision tokens is in the cache."""
    tokens = shape.text + kept * shape.vision
    return bytes_per_number * (shape.weight_numbers + batch * tokens * shape.kv_numbers)


def ceiling(shape, batch, kept):
    """How many times faster decoding can get by keeping that fraction."""
    return step_bytes(shape, batch) / step_bytes(shape, batch, kept)


def table(batches, retentions):
    """Markdown: one row per shape and batch."""
    head = ["model and prompt", "batch", "KV of all bytes", *(f"{r:g} kept" for r in retentions), "no KV at all"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for shape in SHAPES:
        for batch in batches:
            full = step_bytes(shape, batch)
            weights = 2 * shape.weight_numbers
            gains = [f"{ceiling(shape, batch, r):.2f}x" for r in retentions]
            cells = [shape.name, str(batch), f"{100 * (1 - weights / full):.1f} %", *gains, f"{full / weights:.2f}x"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="B")
    parser.add_argument("--retention", type=float, nargs="+", default=[0.5, 0.2], metavar="F", help="fractions kept")
    args = parser.parse_args()
    if min(args.batch) < 1 or not all(0 <= r <= 1 for r in args.retention):
        parser.exit(2, "error: a batch is at least 1 and a retention from 0 to 1; change --batch or --retention\n")
    print(table(args.batch, args.retention))


if __name__ == "__main__":
    main()
