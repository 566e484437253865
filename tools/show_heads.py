"""Which heads work and which are parked: attention sinks, drained values and dormant heads of a model on a prompt.

    python tools/show_heads.py --image assets/demo.png --prompt "Describe the picture." --out heads.png --csv heads.csv

A head that has nothing to say on an input puts its attention on a token whose value is next to nothing (active-dormant
heads, arXiv 2410.13835; other scores for them: 2504.03889). Such a head needs few vision tokens, but the key on which
its attention is parked must stay: `--set sink_keys=1` of any pruning method guards it.
"""

import argparse
import csv
import dataclasses
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Generation, InputError, Sampling, load  # noqa: E402
from model.llama import rope_table  # noqa: E402
from run import as_command, choose_device  # noqa: E402

SEEN = 16  # rows that have to see a column before its mass counts: the last ones are seen by next to none


@dataclasses.dataclass
class Heads:
    """One layer, on a prompt of T tokens. All (Hq,), fp32, but for `where`.

    first     attention on token 0, mean over the rows that see it
    most      the same on the token that has most of it, and where that is (its index)
    drain     length of what that token's value adds to the residual stream, over the median token's
    out       length of what the head adds, mean over rows, over the mean of the layer's heads
    vision    the part of that which comes from pictures, rows behind them: length over the head's whole
    """

    first: torch.Tensor
    most: torch.Tensor
    where: torch.Tensor
    drain: torch.Tensor
    out: torch.Tensor
    vision: torch.Tensor


def measure(q, k, v, out_weight, spans):
    """Heads of a layer from q (Hq, T, D), k and v (Hkv, T, D), its output projection (C, Hq * D) and picture spans."""
    hq, tokens, d = q.shape
    group = hq // len(k)
    q, k, v, out_weight = (t.float() for t in (q, k, v, out_weight))
    seen = torch.arange(tokens, 0, -1, device=q.device)  # rows that see each column
    vision = torch.zeros(tokens, dtype=torch.bool, device=q.device)
    for start, stop in spans:
        vision[start:stop] = True
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    rows = []
    for h in range(hq):  # one T x T matrix at a time
        weights = (q[h] @ k[h // group].T * d**-0.5).masked_fill(future, float("-inf")).softmax(-1)
        mass = weights.sum(0) / seen
        counted = mass.masked_fill(seen < min(SEEN, tokens), -1)
        where = counted.argmax()
        out = out_weight[:, h * d : (h + 1) * d]  # (C, D): this head's part of the projection
        value = v[h // group] @ out.T  # (T, C): what a token adds if it has all the attention
        size, added = value.norm(dim=-1), weights @ value
        behind = slice(spans[-1][1], None) if spans and spans[-1][1] < tokens else slice(-1, None)
        pictures = (weights[behind] * vision) @ value
        share = pictures.norm(dim=-1).mean() / added[behind].norm(dim=-1).mean().clamp(min=1e-12)
        drain = size[where] / size.median().clamp(min=1e-12)
        rows.append(torch.stack([mass[0], mass[where], where.float(), drain, added.norm(dim=-1).mean(), share]))
    first, most, where, drain, added, share = torch.stack(rows, 1).cpu()
    return Heads(first, most, where.long(), drain, added / added.mean(), share)


@torch.inference_mode()
def diagnose(checkpoint, prompt, images):
    """(Heads of every layer, peaks (L,), tokens of the prompt, spans) of a question about pictures; see `look_at`."""
    generation = Generation(checkpoint, prompt, images, Sampling(1))
    x, spans = checkpoint.model.splice(generation.ids, generation.encode_images())
    return *look_at(checkpoint.model.language_model, x, spans), len(x), spans


@torch.inference_mode()
def look_at(language, x, spans):
    """(Heads of every layer, peaks (L,)) of a `Llama` on embedded tokens x (T, C) with spans [(start, stop)].

    peaks: length of token 0's residual state behind each layer, over the largest of the other tokens.
    """
    x = x[None]
    rope = rope_table(torch.arange(x.shape[1], device=x.device), language.config, x.dtype)
    heads, peaks = [], []
    for layer in language.model.layers:
        x, q, k, v = layer.prefill(x, rope)
        heads.append(measure(q[0], k[0], v[0], layer.self_attn.o_proj.weight, spans))
        lengths = x[0].float().norm(dim=-1)
        peaks.append((lengths[0] / lengths[1:].max()).item())
    return heads, peaks


def summary(heads, spans, dormant):
    """One line: how many heads are dormant, and how many attend most to the first token, and to one of the spans."""
    found = [(h.out[i], h.where[i]) for h in heads for i in range(len(h.out))]
    idle = sum(int(out < dormant) for out, _ in found)
    first = sum(int(where == 0) for _, where in found)
    inside = sum(any(a <= where < b for a, b in spans) for _, where in found)
    return (
        f"{idle} of {len(found)} heads dormant; the most attended token is the first in {first} and one of a picture "
        f"in {inside}"
    )


MAPS = (  # field, title, how far the colours reach
    ("first", "attention on the first token", None),  # None: as far as the largest of the next map
    ("most", "attention on the most attended token", None),
    ("drain", "its value, over the median token's", 2.0),
    ("out", "what the head adds, over the layer's mean", 2.0),
    ("vision", "part of that from pictures", 1.0),
)


def draw(heads, peaks, spans, dormant, path):
    """Five maps of layers by query heads, and the residual peaks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(heads[0].first)
    figure, axes = plt.subplots(
        2, 3, figsize=(max(10.5, 0.9 * count + 4), 1.2 + min(12, 0.75 * max(6, len(heads)))), layout="constrained"
    )
    for axis, (name, title, top) in zip(axes.flat, MAPS, strict=False):
        values = torch.stack([getattr(h, name) for h in heads])
        top = top or max(h.most.max().item() for h in heads)
        shown = axis.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto")
        figure.colorbar(shown, ax=axis, extend="max" if values.max() > top else "neither")
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="query head", ylabel="layer")
        for locator in (axis.xaxis.get_major_locator(), axis.yaxis.get_major_locator()):
            locator.set_params(integer=True)
        for layer, h in enumerate(heads):
            for head in range(count):
                mark = ""
                if name == "most":
                    mark = "v" if any(a <= h.where[head] < b for a, b in spans) else ""
                elif name == "out" and h.out[head] < dormant:
                    mark = "d"
                colour = "black" if values[layer, head] > 0.6 * top else "white"
                axis.text(head, layer, mark, ha="center", va="center", fontsize=8, color=colour)
    last = axes.flat[5]
    last.bar(range(len(peaks)), peaks, color="#0072B2")
    last.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
    last.set_title("residual state of token 0, over the largest other", fontsize=9)
    last.set(xlabel="behind layer")
    last.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(
        f"v: that token is a picture's    d: dormant, adds less than {dormant:g} of the layer's mean", fontsize=9
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save(heads, path):
    """One row per layer and query head."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["layer", "head", "first", "most", "where", "drain", "out", "vision"])
        for layer, h in enumerate(heads):
            for head in range(len(h.first)):
                numbers = [f"{getattr(h, n)[head]:.4f}" for n in ("drain", "out", "vision")]
                writer.writerow(
                    [layer, head, f"{h.first[head]:.4f}", f"{h.most[head]:.4f}", int(h.where[head]), *numbers]
                )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # fmt: off
    parser.add_argument("--model", default=str(ROOT / "assets" / "demo"))
    parser.add_argument("--image", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--dormant", type=float, default=0.3, metavar="F", help="a head adding less than this part of "
                        "its layer's mean is marked (default 0.3, ours)")
    parser.add_argument("--out", default="heads.png", metavar="FILE.png")
    parser.add_argument("--csv", metavar="FILE.csv")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]")
    # fmt: on
    args = parser.parse_args(argv)
    try:
        heads, peaks, tokens, spans = diagnose(
            load(args.model, args.dtype, choose_device(args.device)), args.prompt, args.image
        )
        draw(heads, peaks, spans, args.dormant, args.out)
        if args.csv:
            save(heads, args.csv)
    except (InputError, OSError) as wrong:
        parser.exit(2, f"error: {' '.join(str(wrong).split())}\n")
    except ImportError as missing:
        parser.exit(2, f"error: {missing}; install matplotlib, or run `make test` once\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; nothing was written\n")
    print(f"{tokens} tokens; {summary(heads, spans, args.dormant)}")
    print("\n".join(filter(None, (args.out, args.csv))), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(as_command(main))
