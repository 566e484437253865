"""Show attention sinks, small sink values and dormant heads of a model on one prompt.

    python tools/show_heads.py --image assets/demo.png --prompt "Describe the picture." --out heads.png --csv heads.csv

A head that contributes nothing on an input attends to an attention sink: a token whose value is almost zero
(active-dormant heads, arXiv 2410.13835; other scores for them: 2504.03889). Such a head needs few vision tokens, but
the sink's key must stay; `--set sink_keys=1` of any pruning method keeps it.
"""

import csv
import dataclasses
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Generation, Sampling, load  # noqa: E402
from model.console import fail, one_line, say  # noqa: E402
from model.flags import choose_device  # noqa: E402
from model.llama import rope_table  # noqa: E402
from tools.command import as_command, flags, one_of  # noqa: E402

SEEN = 16  # columns seen by fewer rows are ignored, such as the last ones


@dataclasses.dataclass
class Heads:
    """One layer on a prompt. All (Hq,), fp32 except `where`. "Length" is the norm in the residual stream."""

    first: torch.Tensor  # attention on token 0, mean over the rows that see it
    most: torch.Tensor  # the same for the most attended token
    where: torch.Tensor  # index of the most attended token
    drain: torch.Tensor  # length of the most attended token's value, relative to the median token's
    out: torch.Tensor  # length of the head's output, mean over rows, relative to the mean of the layer's heads
    vision: torch.Tensor  # length of the output from pictures relative to all of it, over rows after the pictures


def measure(q, k, v, out_weight, spans):
    """Heads of a layer. q (Hq, T, D), k and v (Hkv, T, D), out_weight (C, Hq * D); spans: of the pictures."""
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
        value = v[h // group] @ out.T  # (T, C): the head's output if all attention is on one token
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
    """(Heads of every layer, peaks (L,), number of prompt tokens, spans) for a question on pictures; see `look_at`."""
    generation = Generation(checkpoint, prompt, images, Sampling(1))
    x, spans = checkpoint.model.splice(generation.ids, generation.encode_images())
    return *look_at(checkpoint.model.language_model, x, spans), len(x), spans


@torch.inference_mode()
def look_at(language, x, spans):
    """(Heads of every layer, peaks (L,)) of a `Llama` on embedded tokens x (T, C) with spans [(start, stop)].

    peaks: norm of token 0's residual state after each layer, relative to the largest of the other tokens.
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


def inside(where, spans):
    """Is this token in one of the spans?"""
    return any(start <= where < stop for start, stop in spans)


def summary(heads, spans, dormant, what="a picture"):
    """One line: number of dormant heads, of heads that attend most to the first token, and to a token in the spans.

    what: the spans are.
    """
    out, where = torch.cat([h.out for h in heads]), torch.cat([h.where for h in heads]).tolist()
    return (
        f"{(out < dormant).sum()} of {len(where)} heads dormant; the most attended token is the first in "
        f"{where.count(0)} and one of {what} in {sum(inside(w, spans) for w in where)}"
    )


MAPS = (  # field, title, top of the colour scale; None: the maximum of `most`
    ("first", "attention on the first token", None),
    ("most", "attention on\nthe most attended token\nv: that token is one of {what}", None),
    ("drain", "norm of\nthe most attended token's value\n/ median token's", 2.0),
    ("out", "norm of the head's output\n/ layer mean\nd: dormant, below {dormant:g}", 2.0),
    ("vision", "fraction of the output\nfrom {what}", 1.0),
)


def draw(heads, peaks, spans, dormant, path, what="a picture"):
    """Draw five maps of layers by query heads, and the residual peaks. what: the spans are. Returns the figure."""
    from matplotlib.figure import Figure

    count = len(heads[0].first)
    size = max(9, 0.5 * count + 4), 1.2 + min(10, 0.75 * max(6, len(heads)))
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (name, title, top) in zip(axes.flat, MAPS, strict=False):
        values = torch.stack([getattr(h, name) for h in heads])
        top = top or max(h.most.max().item() for h in heads)
        shown = axis.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto")
        labels = ("0", f"{top / 2:.2g}", "≥ " * bool(values.max() > top) + f"{top:.2g}")
        figure.colorbar(shown, ax=axis, aspect=30).set_ticks((0, top / 2, top), labels=labels)
        axis.set_title(title.format(what=what, dormant=dormant), fontsize=10)
        axis.set(xlabel="query head", ylabel="layer")
        for locator in (axis.xaxis.get_major_locator(), axis.yaxis.get_major_locator()):
            locator.set_params(integer=True)
        for layer, h in enumerate(heads):
            for head in range(count):
                mark = ""
                if name == "most" and inside(h.where[head], spans):
                    mark = "v"
                elif name == "out" and h.out[head] < dormant:
                    mark = "d"
                colour = "black" if values[layer, head] > 0.6 * top else "white"
                axis.text(head, layer, mark, ha="center", va="center", fontsize=9, color=colour)
    last = axes.flat[5]
    last.bar(range(len(peaks)), peaks, color="#0072B2")
    last.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
    last.set_title("residual norm of the first token\n/ largest other token\ndashed: equal", fontsize=10)
    last.set(xlabel="after layer")
    last.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)
    return figure


def save(heads, path):
    """Write a CSV with one row per layer and query head."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        names = [field.name for field in dataclasses.fields(Heads)]
        writer.writerow(["layer", "head", *names])
        for layer, h in enumerate(heads):
            for head, row in enumerate(zip(*(getattr(h, name).tolist() for name in names), strict=True)):
                writer.writerow([layer, head, *(x if isinstance(x, int) else f"{x:.4f}" for x in row)])


def main(argv=None):
    parser = flags(__doc__)
    # fmt: off
    parser.add_argument("--model", default=str(ROOT / "assets" / "demo"))
    parser.add_argument("--image", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--dormant", type=float, default=0.3, metavar="F", help="mark heads whose output is below F "
                        "times the layer mean (default 0.3, our choice)")
    parser.add_argument("--out", default="heads.png", metavar="FILE.png")
    parser.add_argument("--csv", metavar="FILE.csv")
    parser.add_argument("--dtype", default="auto", type=one_of("auto", "bf16", "fp16", "fp32"), help="%(type)s")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]")
    # fmt: on
    args = parser.parse_args(argv)
    try:
        checkpoint = load(args.model, args.dtype, choose_device(args.device))
        heads, peaks, tokens, spans = diagnose(checkpoint, args.prompt, args.image)
        draw(heads, peaks, spans, args.dormant, args.out)
        if args.csv:
            save(heads, args.csv)
    except (ValueError, OSError) as wrong:
        return fail(one_line(wrong), 2)
    except ImportError as missing:
        return fail(f"{missing}; install matplotlib, or run `make test` once", 2)
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        return 130
    print(f"{tokens} tokens; {summary(heads, spans, args.dormant)}")
    print("\n".join(filter(None, (args.out, args.csv))), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(as_command(main))
