"""Draw what each head of each layer kept, as `run.py --show` does, with more about it.

    python tools/show_pruning.py --image assets/demo.png --prompt "Describe the picture." --prune plphp --out kept.png
    python tools/show_pruning.py ... --layers 0 5 --heads 2    # these panels
    python tools/show_pruning.py ... --html kept.html          # a page, to step through layers and heads
    python tools/show_pruning.py ... --second "Spell the word on the sign."    # what another question keeps instead

Beside the table of kept tokens stands gamma, the attention of each layer to the pictures, with PLPHP's two thresholds
(`--prune plphp`). With --second panels frame the tokens that only one of the two questions keeps.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Generation, InputError, Sampling, load  # noqa: E402
from model.console import fail, one_line, say  # noqa: E402
from model.flags import choose_device  # noqa: E402
from model.pruning import MethodError, make_method  # noqa: E402
from model.show import Shown, write  # noqa: E402
from tools.command import as_command, flags, one_of  # noqa: E402
from tools.evaluation.replay import asked_by, gammas_of  # noqa: E402


@torch.inference_mode()
def look(checkpoint, prompt, images, method, image_mode="auto"):
    """Prune a prompt's cache -> Shown, with gamma of every layer unless the method acts before them."""
    generation = Generation(checkpoint, prompt, images, Sampling(1), image_mode=image_mode, prune=method, remember=True)
    "".join(generation)
    shown = Shown.of(generation)
    if method.picks:  # gamma of a prompt that the language model did not get says nothing
        return shown
    shown.gammas = gammas_of(asked_by(generation, []), checkpoint.lookahead if method.looks_ahead else None)
    if method.looks_ahead:
        shown.rows = "the look-ahead rows"
    if "alpha" in method.settings:
        shown.thresholds = method.settings["alpha"], method.settings["beta"]
    return shown


def main(argv=None):
    parser = flags(__doc__)
    # fmt: off
    parser.add_argument("--model", default=str(ROOT / "assets" / "demo"))
    parser.add_argument("--image", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--prompt", required=True)
    modes = one_of("auto", "pad", "crop", "squash", "anyres")
    parser.add_argument("--image-mode", default="auto", type=modes, help="%(type)s")
    parser.add_argument("--second", metavar="TEXT", help="another question about the same pictures, to compare")
    parser.add_argument("--prune", default="plphp", metavar="SPEC", help="as in run.py (default plphp)")
    parser.add_argument("--retention", type=float, metavar="F")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE|@FILE.json")
    parser.add_argument("--layers", type=int, nargs="+", metavar="L", help="of the panels (default: three of them)")
    parser.add_argument("--heads", type=int, nargs="+", metavar="H", help="KV heads of the panels (default: 4)")
    parser.add_argument("--out", metavar="FILE.png", help="default: kept.png, none with --html")
    parser.add_argument("--html", metavar="FILE.html")
    parser.add_argument("--dtype", default="auto", type=one_of("auto", "bf16", "fp16", "fp32"), help="%(type)s")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]")
    # fmt: on
    args = parser.parse_args(argv)
    out = args.out or (None if args.html else "kept.png")
    try:
        if args.second is not None and not args.second.strip():
            raise InputError("--second is empty; give another question or leave it out")
        checkpoint = load(args.model, args.dtype, choose_device(args.device))
        method = make_method(args.prune, args.retention, settings=args.set, folder=checkpoint.folder)
        if method is None:
            raise InputError("--prune none drops nothing; give a method")
        questions = [args.prompt] if args.second is None else [args.prompt, args.second]
        shown, *second = [look(checkpoint, q, args.image, method, args.image_mode) for q in questions]
        layers, heads = shown.keep.shape[:2]
        for given, limit, word in ((args.layers, layers, "--layers"), (args.heads, heads, "--heads")):
            if not all(0 <= n < limit for n in given or ()):
                raise InputError(f"{word} is {given}, the model has {limit}; give numbers from 0 to {limit - 1}")
        if out:
            write(out, shown, *second, layers=args.layers, heads=args.heads)
        if args.html:
            write(args.html, shown, *second)
    except MethodError as wrong:
        return fail(wrong, 1)
    except (ValueError, OSError) as wrong:
        return fail(one_line(wrong), 2)
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        return 130
    print("\n".join(filter(None, (out, args.html))), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(as_command(main))
