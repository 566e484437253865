"""Draw what each head of each layer kept of a picture.

    python tools/show_pruning.py --image assets/demo.png --prompt "Describe the picture." --prune plphp --out kept.png
    python tools/show_pruning.py ... --html kept.html      # one page: step through layers and heads, point at tokens
    python tools/show_pruning.py ... --second "Spell the word on the sign."     # what another question keeps instead

Panels show the picture as the model sees it, with what a head dropped under a veil. Beside them: kept tokens per layer
and head, and the layer scores with the two thresholds of PLPHP (`--prune plphp`).
"""

import argparse
import base64
import dataclasses
import io
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Generation, InputError, Sampling, load  # noqa: E402
from model.pruning import make_method  # noqa: E402
from run import as_command, choose_device  # noqa: E402
from tools.calibrate import gammas_of  # noqa: E402
from tools.replay import asked_by  # noqa: E402

CLASSES = {"attentive": "#0072B2", "balanced": "#999999", "indifferent": "#D55E00"}  # Okabe and Ito


@dataclasses.dataclass
class Shown:
    """What a method did to one prompt.

    pictures     PIL images, square, as the model sees them
    keep         (L, Hkv, n, P) bool: is token p of picture i kept by head h of layer l?
    gammas       L numbers, the attention to pictures of the last prompt row, or of the look-ahead rows if these rank
    thresholds   (alpha, beta) of PLPHP, None for other methods
    bytes_full, bytes_held     K and V of the prompt
    """

    prompt: str
    method: str
    pictures: list
    keep: torch.Tensor
    gammas: list
    thresholds: tuple
    bytes_full: int
    bytes_held: int
    rows: str = "the last prompt row"  # whose attention gammas are

    @property
    def side(self):
        """Tokens along one side of a picture."""
        return round(self.keep.shape[-1] ** 0.5)


@torch.inference_mode()
def look(checkpoint, prompt, images, method, image_mode="auto"):
    """Prune a prompt's cache and remember what each head kept -> Shown."""
    generation = Generation(checkpoint, prompt, images, Sampling(1), image_mode=image_mode, prune=method)
    if generation.image_settings.mode == "anyres":
        raise InputError("pictures in tiles are not drawn; give --image-mode pad or crop")
    if not generation.squares:
        raise InputError("there is no picture to draw on; give --image")
    asked = asked_by(generation, [])
    (full, *_), (cache, keeps, _) = asked.cache(None), asked.cache(method)
    layout = asked.layout
    everything = torch.ones(layout.kv_heads, layout.tokens, dtype=torch.bool)
    keep = torch.stack([everything if k is None else k.cpu() for k in keeps])
    keep = torch.stack([keep[:, :, start:stop] for start, stop in layout.spans], 2)
    thresholds = (method.settings["alpha"], method.settings["beta"]) if "alpha" in method.settings else None
    gammas = gammas_of(asked, checkpoint.lookahead if method.looks_ahead else None)
    rows = "the look-ahead rows" if method.looks_ahead else Shown.rows
    sizes = full.nbytes_held, cache.nbytes_held
    return Shown(prompt, method.name, generation.squares, keep, gammas, thresholds, *sizes, rows)


def layer_class(gamma, thresholds):
    """The name of a layer's class in PLPHP."""
    alpha, beta = thresholds
    return "attentive" if gamma >= alpha else "indifferent" if gamma < beta else "balanced"


# ---------------------------------------------------------------- one picture


def veiled(picture, keep, veil=0.82):
    """A square PIL picture with its dropped tokens, ~keep (P,), under a light veil -> (S, S, 3) fp32 in 0..1."""
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8).float() / 255
    pixels = pixels.view(picture.height, picture.width, 3)
    side = round(len(keep) ** 0.5)
    grid = keep.view(side, side).float()
    rows = torch.arange(picture.height) * side // picture.height
    columns = torch.arange(picture.width) * side // picture.width
    clear = grid[rows][:, columns, None]
    grey = pixels.mean(2, keepdim=True).expand_as(pixels)
    return clear * pixels + (1 - clear) * (veil + (1 - veil) * grey)


def draw(shown, second, layers, heads, path):
    """The figure: panels of the chosen layers (rows) and heads (columns), maps and scores below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = len(shown.pictures)
    columns = len(heads) * pictures
    width = max(7.5, 1.9 * columns + 0.8)
    figure = plt.figure(figsize=(width, 2.05 * len(layers) + 3.9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.05 * len(layers) + 0.4, 3.5])
    grid = above.subplots(len(layers), columns, squeeze=False)
    for row, layer in zip(grid, layers, strict=True):
        for i, axis in enumerate(row):
            head, picture = heads[i // pictures], i % pictures
            kept = shown.keep[layer, head, picture]
            axis.imshow(veiled(shown.pictures[picture], kept), interpolation="nearest")
            which = f", picture {picture + 1}" if pictures > 1 else ""
            axis.set_title(f"layer {layer}, head {head}{which}: {int(kept.sum())} of {len(kept)}", fontsize=8)
            if second is not None:
                _outline(axis, kept, second.keep[layer, head, picture], shown.pictures[picture].width)
            axis.set(xticks=[], yticks=[])
    title = f"{shown.method}: “{shown.prompt}”"
    if second is not None:
        title += f"\nframed: kept only for “{second.prompt}” (blue), only for the first (orange)"
    above.suptitle(title, fontsize=10)
    counts, scores = below.subplots(1, 2)
    _count_map(counts, shown)
    _layer_scores(scores, shown)
    saved = f"K and V of the prompt: {shown.bytes_full / 1e6:.2f} MB, {shown.bytes_held / 1e6:.2f} MB held"
    below.supxlabel(saved, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _outline(axis, first, second, size):
    """Frames around the tokens that only one of two questions keeps."""
    from matplotlib.patches import Rectangle

    side = round(len(first) ** 0.5)
    step = size / side
    for token in (first ^ second).nonzero()[:, 0].tolist():
        colour = "#D55E00" if first[token] else "#0072B2"
        corner = (token % side * step - 0.5 + 0.1 * step, token // side * step - 0.5 + 0.1 * step)
        axis.add_patch(Rectangle(corner, 0.8 * step, 0.8 * step, fill=False, edgecolor=colour, linewidth=0.8))


def _count_map(axis, shown):
    """Kept tokens per layer and head, as a map with numbers where they fit."""
    counts = shown.keep.sum((2, 3))
    most = shown.keep.shape[2] * shown.keep.shape[3]
    axis.imshow(counts, cmap="cividis", vmin=0, vmax=most, aspect="auto")
    if counts.numel() <= 128:
        for (layer, head), n in zip(
            torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist(), counts.flatten().tolist(), strict=True
        ):
            axis.text(
                head, layer, str(n), ha="center", va="center", fontsize=8, color="black" if n > 0.6 * most else "white"
            )
    axis.set(xlabel="KV head", ylabel="layer")
    axis.set_title(f"tokens kept, of {most}", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)


def _layer_scores(axis, shown):
    """gamma of each layer, coloured and marked by its class, and the thresholds."""
    markers = {"attentive": "^", "balanced": "o", "indifferent": "v"}
    layers = range(len(shown.gammas))
    axis.plot(layers, shown.gammas, color="0.75", linewidth=1, zorder=1)
    names = [layer_class(g, shown.thresholds) if shown.thresholds else "balanced" for g in shown.gammas]
    for name in dict.fromkeys(names):
        chosen = [i for i in layers if names[i] == name]
        label = name if shown.thresholds else None
        axis.scatter(
            chosen, [shown.gammas[i] for i in chosen], color=CLASSES[name], marker=markers[name], s=40, label=label
        )
    for value, word in zip(shown.thresholds or (), ("alpha", "beta"), strict=False):
        axis.axhline(value, color="0.4", linewidth=0.8, linestyle="--")
        axis.annotate(f"{word} {value:g}", (len(shown.gammas) - 1, value), xytext=(0, 2), textcoords="offset points",
                      ha="right", fontsize=7, color="0.3")  # fmt: skip
    axis.set(xlabel="layer", ylabel="gamma", ylim=(0, 1))
    axis.set_title(f"attention of {shown.rows} to pictures", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if shown.thresholds:
        axis.legend(fontsize=7, loc="best")


# ---------------------------------------------------------------- one page


def page(shown, second=None):
    """A self-contained HTML page of one or two Shown: no network, no framework."""
    data = {"side": shown.side, "pictures": [_data_url(p) for p in shown.pictures], "questions": []}
    for s in filter(None, (shown, second)):
        classes = [layer_class(g, s.thresholds) if s.thresholds else "" for g in s.gammas]
        data["questions"].append(
            {
                "prompt": s.prompt,
                "keep": [
                    [["".join("01"[k] for k in picture) for picture in head] for head in layer]
                    for layer in s.keep.int().tolist()
                ],
                "gammas": [round(g, 4) for g in s.gammas],
                "classes": classes,
                "bytes": [s.bytes_full, s.bytes_held],
            }
        )
    text = PAGE.replace("@@METHOD@@", _escaped(shown.method))
    return text.replace("@@DATA@@", json.dumps(data).replace("</", "<\\/"))


def _escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _data_url(picture):
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


PAGE = (Path(__file__).parent / "show_pruning.html").read_text(encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # fmt: off
    parser.add_argument("--model", default=str(ROOT / "assets" / "demo"))
    parser.add_argument("--image", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image-mode", default="auto", choices=("auto", "pad", "crop"), help="as in run.py")
    parser.add_argument("--second", metavar="TEXT", help="another question about the same pictures, to compare")
    parser.add_argument("--prune", default="plphp", metavar="SPEC", help="as in run.py (default plphp)")
    parser.add_argument("--retention", type=float, metavar="F")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE|@FILE.json")
    parser.add_argument("--layers", type=int, nargs="+", metavar="L", help="of the panels (default: three of them)")
    parser.add_argument("--heads", type=int, nargs="+", metavar="H", help="KV heads of the panels (default: 4)")
    parser.add_argument("--out", default="kept.png", metavar="FILE.png")
    parser.add_argument("--html", metavar="FILE.html")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]")
    # fmt: on
    args = parser.parse_args(argv)
    try:
        if args.second is not None and not args.second.strip():
            raise InputError("--second is empty; give another question or leave it out")
        checkpoint = load(args.model, args.dtype, choose_device(args.device))
        method = make_method(args.prune, args.retention, settings=args.set, folder=checkpoint.folder)
        if method is None:
            raise InputError("--prune none drops nothing; give a method")
        shown, second = (
            look(checkpoint, prompt, args.image, method, args.image_mode) if prompt is not None else None
            for prompt in (args.prompt, args.second)
        )
        layers, heads = shown.keep.shape[:2]
        chosen = args.layers or sorted({min(1, layers - 1), layers // 2, layers - 1})
        chosen_heads = args.heads or list(range(min(4, heads)))
        for given, limit, word in ((chosen, layers, "--layers"), (chosen_heads, heads, "--heads")):
            if not all(0 <= n < limit for n in given):
                raise InputError(f"{word} is {given}, the model has {limit}; give numbers from 0 to {limit - 1}")
        draw(shown, second, chosen, chosen_heads, args.out)
        if args.html:
            Path(args.html).write_text(page(shown, second), encoding="utf-8")
    except (InputError, ValueError, OSError) as wrong:
        parser.exit(2, f"error: {' '.join(str(wrong).split())}\n")
    except ImportError as missing:
        parser.exit(2, f"error: {missing}; install matplotlib, or run `make test` once\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; nothing was written\n")
    print("\n".join(filter(None, (args.out, args.html))), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(as_command(main))
