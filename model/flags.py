"""The flags of run.py: what they are, what is checked before torch is imported, and what follows from them."""

import argparse
import contextlib
import itertools
import os
import re
import sys
from pathlib import Path

from .config import InputError, decode_text
from .console import one_line

DEMO = Path(__file__).resolve().parent.parent / "assets" / "demo"
TEMPLATES = ("auto", "llava", "vicuna", "llava_v1", "mistral", "onevision", "chatml", "raw")
# Flags that each process of several may have its own value of: places of files, whose contents are compared instead.
OF_PROCESS = (
    "model", "image", "frames", "prompt", "questions", "answers", "image_folder", "show", "threads", "debug", "lines"
)  # fmt: skip
SUMMARY = """Ask a LLaVA about pictures, offline. Answers go to stdout, the rest to stderr.

  run.py --image assets/demo.png --prompt "Describe the picture." [--prune plphp]

Without --prompt: a conversation, or one question per line of a piped stdin."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: what is wrong; what to do."""

    def parse_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if "\0" in word:
                self.error(f"{word[:200]!r} contains a NUL character, which no path can contain")
        args, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self._unknown(*rest[:2]))
        return args

    def error(self, message):
        # argparse puts all names of the flag first: "argument --top-p/--top_p: "
        message = re.sub(r"^argument ([^:/\s]+)\S*: ", r"\1 ", one_line(message))
        missing = re.fullmatch(r"(\S+) expected (at least )?one argument", message)
        if missing:
            message = f"{missing[1]} needs a value; write {missing[1]}=VALUE if the value begins with a dash"
        cure = "" if "; " in message else f"; see {self.prog} -h"
        self.exit(2, f"error: {message}{cure}\n")

    def _unknown(self, word, following="-"):
        """The error message for an argument that is neither a flag nor a value. following: the next argument."""
        from difflib import get_close_matches

        name, _, value = one_line(word).partition("=")
        if os.path.isfile(word):
            return f"{word[:200]!r} belongs to no flag; put --image before a picture"
        if not name.startswith("-"):
            return f"{word[:80]!r} belongs to no flag; put text with spaces in quotes"
        key = name.lstrip("-").replace("-", "_")
        if "--" + key.replace("_", "-") not in self._option_string_actions and is_setting(key):
            value = value or (one_line(following)[:80] if not following.startswith("-") else "VALUE")
            return f"{key} is a setting of the method; write --set {key}={value}"
        flags = {flag.lstrip("-"): action.option_strings[0] for flag, action in self._option_string_actions.items()}
        near = get_close_matches(name.lstrip("-"), flags, 1, 0.85)  # a lower cutoff suggests --no-stream for --stream
        return f"there is no flag {name}" + (f"; did you mean {flags[near[0]]}?" if near else "")


def is_setting(name):
    """Is it a setting of a built-in method? False without torch."""
    with contextlib.suppress(ImportError):
        from .api import known_settings

        return name in known_settings()
    return False


class Once(argparse.Action):
    """Stores the prompt. A second one is an error, because --query may be meant for --set."""

    def __call__(self, parser, namespace, value, name=None):
        if namespace.prompt is not None:
            parser.error(
                f"{name} gives a second prompt (--query and --question are other names of --prompt); give one prompt, "
                "and write the method's setting as --set query=VALUE"
            )
        namespace.prompt = value


class Help(argparse.RawDescriptionHelpFormatter):
    """Lists a flag by its first name and its one-letter form. Aliases for names in other projects are not shown."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=27)

    def _format_action_invocation(self, action):
        first, *others = action.option_strings
        letters = [name for name in others if len(name) == 2]
        return ", ".join([*letters, first]) + (f" {action.metavar}" if action.metavar else "")


def number(kind, low, high=None, open_low=False):
    """An argparse type: an int or a float within bounds. In help texts, %(type)s is replaced by the bounds."""
    bounds = f"above {low}" if open_low else f"from {low}" if high is not None else f"of {low} or more"
    if high is not None:
        bounds += f" and up to {high}" if open_low else f" to {high}"
    wanted = f"a {'whole ' if kind is int else ''}number {bounds}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text[:80]!r}; give {wanted}") from None
        if not (value > low if open_low else value >= low) or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"is {text}; give {wanted}")
        return value

    parse.__name__ = bounds
    return parse


def one_of(*names):
    """An argparse type: one of the names. In help texts, %(type)s is replaced by the list of them."""

    def parse(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"is {text[:80]!r}; use {', '.join(names)}")
        return text

    parse.__name__ = ", ".join(names)
    return parse


def parser():
    """The parser of run.py's flags, in the groups of `-h`."""
    p = Parser(
        prog="run.py", usage="run.py --image PATH ... [--prompt TEXT] [flags]", description=SUMMARY,
        formatter_class=Help, allow_abbrev=False, add_help=False,
    )  # fmt: skip
    count, share = number(int, 1), number(float, 0, 1, open_low=True)
    # -h shows a flag's first name and its one-letter form; the other names are aliases, as in other projects.
    # fmt: off
    add = p.add_argument_group("ask").add_argument
    add("--model", "-m", "--model-path", "--weights", "--checkpoint", "--pretrained", default=str(DEMO),
        metavar="DIR|ID", help="folder or cached Hugging Face id (default: the demo)")
    add("--image", "--image-file", "--image_path", action="extend", nargs="+", default=[], metavar="PATH ...",
        help='pictures; "-" is stdin, data: URIs work too')
    add("--frames", action="extend", nargs="+", default=[], metavar="PATH ...",
        help="frames of a video, or one file (GIF, TIFF) of them")
    add("--prompt", "-p", "--query", "--question", action=Once, metavar="TEXT",
        help='the question; "-" reads stdin, @FILE reads a file')

    add = p.add_argument_group("the answer").add_argument
    add("--max-new-tokens", "-n", "--max_new_tokens", "--max-tokens", type=count, default=256, metavar="N",
        help="maximum length of the answer (default %(default)s)")
    add("--temperature", "--temp", type=number(float, 0, 10000), default=0.0, metavar="F",
        help="%(type)s; 0, the default, is greedy")
    add("--top-p", "--top_p", type=share, metavar="F", help="nucleus sampling, %(type)s")
    add("--top-k", type=count, metavar="N", help="sample among the N most likely tokens")
    add("--seed", type=number(int, 0, 2**64 - 1), default=0, metavar="N",
        help="seed of the sampling (default %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT",
        help="end the answer before this text; may be repeated")

    add = p.add_argument_group("pruning").add_argument
    add("--prune", "--method", default="none", metavar="SPEC", help="NAME or FILE.py::NAME, :KEY=VALUE,...; A+B: both")
    add("--list-methods", nargs="?", const="", metavar="[NAME]", help="list the methods, or the settings of one")
    add("--retention", type=share, metavar="F", help="fraction of vision tokens kept, %(type)s")
    add("--keep-tokens", type=count, metavar="N", help="instead: keep N tokens per KV head and picture")
    add("--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of the method, or @FILE.json with several")
    add("--compare", action="store_true", help="also answer unpruned; print differences to stderr")

    add = p.add_argument_group("pictures and prompt").add_argument
    add("--image-mode", type=one_of("auto", "pad", "crop", "squash", "anyres"), default="auto",
        metavar="MODE", help="%(type)s (anyres: in tiles)")
    add("--anyres-order", type=one_of("auto", "hf", "orig"), default="auto", metavar="NAME",
        help="auto, hf (canvas height first), orig (width first)")
    add("--template", "--conv-mode", "--chat-template", type=one_of(*TEMPLATES), default="auto", metavar="NAME",
        help="%(type)s")
    add("--system", metavar="TEXT", help="system text (default: that of the template)")

    add = p.add_argument_group("many questions").add_argument
    add("--questions", "--question-file", metavar="FILE.jsonl",
        help="JSON line per question: question_id, image, text")
    add("--answers", "--answers-file", metavar="FILE.jsonl", help="output file; an existing one is continued")
    add("--image-folder", metavar="DIR", help="folder of the pictures (default: FILE.jsonl's)")
    add("--batch", "--batch-size", type=count, metavar="N", help="questions answered together (default 1)")
    add("--num-chunks", type=count, metavar="N", help="split the questions into N parts ...")
    add("--chunk-idx", type=number(int, 0), metavar="I", help="... and answer part I, counted from 0")
    add("--keep-errors", action="store_true", help="do not retry questions that failed before")

    add = p.add_argument_group("machine").add_argument
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    add("--dtype", "--precision", type=one_of("auto", "bf16", "fp16", "fp32"), default="auto", metavar="TYPE",
        help="%(type)s (auto: by file and machine)")
    add("--backend", type=one_of("auto", "triton", "torch"), default="auto", metavar="NAME",
        help="kernels: %(type)s (auto: triton on CUDA)")
    add("--kv-dtype", type=one_of("auto", "int8", "fp8"), default="auto", metavar="TYPE",
        help="cached K and V: %(type)s (auto: as --dtype)")
    add("--compile", action="store_true", help="torch.compile: slow start, then faster on a CPU")
    add("--tp", type=count, metavar="N", help="processes per model, under torchrun (default: all; --questions: 1)")
    add("--threads", type=number(int, 1, 1024), metavar="N", help="CPU threads, %(type)s (default: one per core)")

    add = p.add_argument_group("output").add_argument
    add("--stats", "--profile", action="store_true", help="print times, memory and bandwidth limit to stderr")
    add("--show", metavar="FILE", help="draw what each head kept into a .png or .html file")
    add("--json", action="store_true", help="one JSON object on stdout instead of text")
    add("--no-stream", action="store_true", help="print the answer when it is complete")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="store_true", help="print versions: plphp, python, torch, triton")
    add("--help", "-h", action="help", help="print this list")
    # fmt: on
    return p


# ---------------------------------------------------------------- checks before torch is imported


def check(args, error):
    """Checks that argparse cannot express: flags that exclude or require each other. error(message) ends the process.

    Reads the prompt if it is in a file or on stdin. Sets args.talk (is it a conversation?) and args.lines, the numbered
    questions on stdin, or None.
    """
    if args.prompt is not None and args.questions is not None:
        error("give either --prompt or --questions")
    later = args.prompt is None and args.questions is None  # questions come from stdin
    check_questions(args, error)
    if args.show is not None:
        check_show(args, error)
    if args.temperature == 0 and (args.top_p is not None or args.top_k is not None):
        error("--top-p and --top-k need --temperature above 0")
    if [args.prompt, *args.image, *args.frames].count("-") + later > 1:
        error("only one thing can be read from stdin")
    if args.retention is not None and args.keep_tokens is not None:
        error("--retention and --keep-tokens exclude each other")
    if args.prune == "none" and (args.retention is not None or args.keep_tokens is not None or args.set):
        error("--retention, --keep-tokens and --set need --prune METHOD; for example --prune plphp")
    if args.compare and later:
        error("--compare needs --prompt")
    if args.compare and (args.prune == "none" or args.temperature > 0):
        error("--compare needs --prune METHOD and --temperature 0; for example --prune plphp")
    if "" in args.stop:
        error("--stop needs text that is not empty")
    if args.system is not None and args.template == "raw":
        error("--system cannot be used with --template raw")
    args.prompt = args.prompt or ""
    try:
        if args.prompt == "-":
            args.prompt = decode_text(sys.stdin.buffer.read() if sys.stdin else b"").rstrip("\n")
        elif args.prompt.startswith("@"):
            args.prompt = decode_text(Path(args.prompt[1:]).read_bytes()).rstrip("\n")
        "".join([args.prompt, args.system or "", *args.stop]).encode()
    except (OSError, ValueError) as broken:
        error(f"cannot read --prompt, --system or --stop as UTF-8 ({broken}); @ in front of a prompt names a file")
    if args.questions is None and not later and not args.prompt.strip():
        error("the prompt is empty; give a question")
    if args.frames and not args.image and not later and args.image_mode != "auto":
        error("--image-mode is for pictures, and --frames have a mode of their own; leave it out")
    for path in (*args.image, *args.frames):  # checked before torch is imported; `local_path` checks other addresses
        if path != "-" and not re.match("~|data:|[A-Za-z][A-Za-z0-9+.-]+:/", path, re.I) and not os.path.exists(path):
            given = args.image if path in args.image else args.frames
            question = later and path == given[-1] and (len(given) > 1 or " " in path)
            advice = "if this is the question, put --prompt before it, else " if question else ""
            error(f"no picture at {path[:200]}; {advice}check the path, and put it in quotes if it has spaces")
    args.talk = later and sys.stdin is not None and sys.stdin.isatty()
    args.lines = questions_on_stdin(error) if later and not args.talk else None


def check_processes(args, error, processes):
    """Check what several processes cannot do. processes: of torchrun, or None."""
    if processes is None and (args.tp or 1) > 1:
        error(f"--tp {args.tp} needs as many processes; start it with torchrun --nproc-per-node {args.tp} run.py ...")
    if processes is None or args.questions is not None:
        return
    if args.prompt is None or "-" in (args.prompt, *args.image, *args.frames):
        error(f"stdin belongs to none of the {processes} processes; give --prompt TEXT or @FILE, and files")
    if args.tp not in (None, processes):
        error(f"--tp {args.tp} is not the number of processes, {processes}, which all share one answer; leave it out")


def questions_on_stdin(error):
    """Iterate over (number, text) of the lines of stdin that are not blank. Exits with an error if there are none."""
    with contextlib.suppress(OSError):
        lines = _lines(sys.stdin.buffer if sys.stdin else ())
        for first in lines:
            return itertools.chain([first], lines)
    error("stdin is empty; give --prompt, --questions, or a question in each line of stdin")


def _lines(file):
    """Yield (number, text) of the lines that are not blank. InputError if one is not UTF-8."""
    for number, line in enumerate(file, 1):
        try:
            if line.strip():
                yield number, decode_text(line)
        except ValueError as wrong:
            raise InputError(f"line {number} of stdin: not UTF-8 text ({wrong}); save it as UTF-8") from wrong


def check_questions(args, error):
    """Check the flags that need --questions and those that cannot be combined with it."""
    if args.questions is None:
        for name in ("image_folder", "answers", "batch", "num_chunks", "chunk_idx", "keep_errors"):
            if getattr(args, name) not in (None, False):
                error(f"--{name.replace('_', '-')} needs --questions")
        return
    if not args.answers:
        error("--questions needs --answers")
    if args.image or args.frames or args.json or args.compare or args.compile or args.stats:
        error("--questions cannot be combined with --image, --frames, --json, --stats, --compare or --compile")
    if (args.num_chunks is None) != (args.chunk_idx is None) or (args.chunk_idx or 0) >= (args.num_chunks or 1):
        error("--num-chunks and --chunk-idx need each other, and the index must be below the number")
    if not os.path.exists(args.questions) or os.path.isdir(args.questions):
        error(f"no file {args.questions[:200]}; check the path")
    if args.image_folder is not None and not os.path.isdir(args.image_folder):
        error(f"no folder {args.image_folder[:200]}; check the path")
    if os.path.exists(args.answers) and os.path.samefile(args.questions, args.answers):
        error("--questions and --answers are the same file")


def check_show(args, error):
    """Check --show as far as possible without the checkpoint; see `model.show.check_path`."""
    if args.prompt is None or not (args.image or args.frames):
        error("--show draws on the pictures of one answer; give --image and --prompt (in a conversation: /show FILE)")
    try:
        check_drawing(args.show, (*args.image, *args.frames))
    except InputError as wrong:
        error(str(wrong))


def check_drawing(path, files):
    """InputError if the path of a drawing cannot be written, has another suffix, or is one of the files."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".html"):
        raise InputError(f"cannot draw {str(path)[:200]!r}; give a name that ends in .png or .html")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{str(path)[:200]} cannot be written; give another name")
    for file in files:
        if path.exists() and os.path.exists(file) and path.samefile(file):
            raise InputError(f"the drawing would replace {str(file)[:200]}, which this run reads; give another name")


# ---------------------------------------------------------------- what follows from the flags


def choose_device(name, backend="auto", threads=None):
    """The torch.device of --device, with --threads set. InputError if it, or --backend on it, is not available."""
    import torch

    from kernels.backend import choose_backend

    from . import checkpoint

    try:
        device = checkpoint.choose_device(name)
        choose_backend(backend, device, torch.float32)  # any dtype of --dtype gives the same result
    except ValueError as wrong:
        raise InputError(f"--{wrong}") from None
    if threads is not None:
        torch.set_num_threads(threads)
    return device


def options(args, checkpoint):
    """Keyword arguments of `Generation` that follow from the flags."""
    from .api import choose_method
    from .sampling import Sampling

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, tuple(args.stop))
    return {
        "sampling": sampling, "template": args.template, "image_mode": args.image_mode, "system": args.system,
        "prune": choose_method(args.prune, checkpoint.folder, args.retention, args.keep_tokens, args.set),
        "backend": args.backend, "compile": args.compile, "anyres_order": args.anyres_order,
        "timed": args.stats or args.json or args.compare or args.talk,  # for /stats
        "remember": args.show is not None or args.talk,  # for /show
        "kv_dtype": args.kv_dtype,
    }  # fmt: skip
