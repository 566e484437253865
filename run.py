"""Ask a LLaVA about pictures, offline.

    python run.py --image assets/demo.png --prompt "Describe the picture."
    python run.py --model llava-hf/llava-1.5-7b-hf --image x.png --prompt "What is this?" --stats
    python run.py --questions questions.jsonl --image-folder pictures --answers answers.jsonl --batch 8

Without --prompt, run.py starts a conversation on a terminal. If stdin is not a terminal, each line of stdin is an
independent question about the pictures of --image, and each answer is printed as one line (its line breaks become
spaces; use --json for the exact text).

Only answers go to stdout. Exit codes: 0 answered; 1 failed while running; 2 invalid input (flags, paths, pictures,
prompt, checkpoint); 130 Ctrl-C (the text so far is kept).
"""

import argparse
import contextlib
import errno
import io
import itertools
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "assets" / "demo"
TEMPLATES = ("auto", "llava", "vicuna", "llava_v1", "mistral", "raw")
SUMMARY = """Ask a LLaVA about pictures, offline. Answers go to stdout, the rest to stderr.

  run.py --image assets/demo.png --prompt "Describe the picture."
  run.py --image assets/demo.png --prompt "Describe the picture." --prune plphp

Without --prompt: a conversation, or one question per line of a piped stdin."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: what is wrong; what to do."""

    def parse_args(self, args=None, namespace=None):
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
        """The error message for an argument that is neither a flag nor a flag's value, and the one that follows it."""
        from difflib import get_close_matches

        name, _, value = one_line(word).partition("=")
        if not name.startswith("-"):
            return f"{word[:80]!r} belongs to no flag; put text with spaces in quotes"
        key = name.lstrip("-").replace("-", "_")
        if "--" + key.replace("_", "-") not in self._option_string_actions and key in known_settings():
            value = value or (one_line(following)[:80] if not following.startswith("-") else "VALUE")
            return f"{key} is a setting of the method; write --set {key}={value}"
        flags = {flag.lstrip("-"): action.option_strings[0] for flag, action in self._option_string_actions.items()}
        near = get_close_matches(name.lstrip("-"), flags, 1, 0.85)  # a lower cutoff suggests --no-stream for --stream
        return f"there is no flag {name}" + (f"; did you mean {flags[near[0]]}?" if near else "")


def known_settings():
    """The names of all settings of the built-in methods; none if torch is not installed."""
    try:
        from model.pruning import COMMON, GUARDS, METHODS, settings_of
    except ImportError:
        return set()
    return {*COMMON, *GUARDS}.union(*(settings_of(method) for method in METHODS.values() if method))


class Once(argparse.Action):
    """Stores the prompt. A second prompt is an error, because its aliases are also names of settings."""

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
    p = Parser(
        prog="run.py", usage="run.py --image PATH ... [--prompt TEXT] [flags]", description=SUMMARY,
        formatter_class=Help, allow_abbrev=False, add_help=False,
    )  # fmt: skip
    # -h shows a flag's first name and its one-letter form; the other names are aliases, as in other projects.
    # fmt: off
    ask = p.add_argument_group("ask")
    ask.add_argument("--model", "-m", "--model-path", "--weights", "--checkpoint", "--pretrained",
                     default=str(DEMO), metavar="DIR|ID",
                     help="folder or cached Hugging Face id (default: the demo)")
    ask.add_argument("--image", "--image-file", "--image_path", action="extend", nargs="+", default=[],
                     metavar="PATH ...", help='pictures; "-" is stdin, data: URIs work too')
    ask.add_argument("--prompt", "-p", "--query", "--question", action=Once, metavar="TEXT",
                     help='the question; "-" reads stdin, @FILE reads a file')

    answer = p.add_argument_group("the answer")
    answer.add_argument("--max-new-tokens", "-n", "--max_new_tokens", "--max-tokens", type=number(int, 1), default=256,
                        metavar="N", help="maximum length of the answer (default %(default)s)")
    answer.add_argument("--temperature", "--temp", type=number(float, 0, 10000), default=0.0, metavar="F",
                        help="%(type)s; 0, the default, is greedy")
    answer.add_argument("--top-p", "--top_p", type=number(float, 0, 1, open_low=True), metavar="F",
                        help="nucleus sampling, %(type)s")
    answer.add_argument("--top-k", type=number(int, 1), metavar="N", help="sample among the N most likely tokens")
    answer.add_argument("--seed", type=number(int, 0, 2**64 - 1), default=0, metavar="N",
                        help="seed of the sampling (default %(default)s)")
    answer.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end the answer before this text; may be repeated")

    prune = p.add_argument_group("pruning")
    prune.add_argument("--prune", "--method", default="none", metavar="SPEC",
                       help="METHOD or FILE.py::NAME, then :KEY=VALUE,...")
    prune.add_argument("--list-methods", nargs="?", const="", metavar="[NAME]",
                       help="list the methods, or the settings of one")
    prune.add_argument("--retention", type=number(float, 0, 1, open_low=True), metavar="F",
                       help="fraction of vision tokens kept, %(type)s")
    prune.add_argument("--keep-tokens", type=number(int, 1), metavar="N",
                       help="instead: vision tokens per KV head and picture")
    prune.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                       help="a setting of the method, or @FILE.json with several")
    prune.add_argument("--compare", action="store_true", help="also answer unpruned; print differences to stderr")

    look = p.add_argument_group("pictures and prompt")
    look.add_argument("--image-mode", type=one_of("auto", "pad", "crop", "anyres"), default="auto", metavar="MODE",
                      help="%(type)s (anyres: in tiles)")
    look.add_argument("--anyres-order", type=one_of("auto", "hf", "orig"), default="auto", metavar="NAME",
                      help="auto, hf (canvas height first), orig (width first)")
    look.add_argument("--template", "--conv-mode", "--chat-template", type=one_of(*TEMPLATES), default="auto",
                      metavar="NAME", help="%(type)s")
    look.add_argument("--system", metavar="TEXT", help="system text (default: that of the template)")

    many = p.add_argument_group("many questions")
    many.add_argument("--questions", "--question-file", metavar="FILE.jsonl",
                      help="JSON line per question: question_id, image, text")
    many.add_argument("--answers", "--answers-file", metavar="FILE.jsonl",
                      help="output file; an existing one is continued")
    many.add_argument("--image-folder", metavar="DIR", help="folder of the pictures (default: FILE.jsonl's)")
    many.add_argument("--batch", "--batch-size", type=number(int, 1), metavar="N",
                      help="questions answered together (default 1)")
    many.add_argument("--num-chunks", type=number(int, 1), metavar="N", help="split the questions into N parts ...")
    many.add_argument("--chunk-idx", type=number(int, 0), metavar="I", help="... and answer part I, counted from 0")
    many.add_argument("--keep-errors", action="store_true", help="do not retry questions that failed before")

    machine = p.add_argument_group("machine")
    machine.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    machine.add_argument("--dtype", "--precision", type=one_of("auto", "bf16", "fp16", "fp32"), default="auto",
                         metavar="TYPE", help="%(type)s (auto suits file and machine)")
    machine.add_argument("--backend", type=one_of("auto", "triton", "torch"), default="auto", metavar="NAME",
                         help="kernels: %(type)s (auto: triton on CUDA)")
    machine.add_argument("--compile", action="store_true", help="torch.compile: slow start, then faster on a CPU")
    machine.add_argument("--threads", type=number(int, 1, 1024), metavar="N",
                         help="CPU threads, %(type)s (default: one per core)")

    output = p.add_argument_group("output")
    output.add_argument("--stats", "--profile", action="store_true",
                        help="print times, memory and bandwidth limit to stderr")
    output.add_argument("--show", metavar="FILE", help="draw what each head kept into a .png or .html file")
    output.add_argument("--json", action="store_true", help="one JSON object on stdout instead of text")
    output.add_argument("--no-stream", action="store_true", help="print the answer when it is complete")
    output.add_argument("--debug", action="store_true", help="show the traceback of an error")
    output.add_argument("--version", action="store_true", help="print versions: plphp, python, torch, triton")
    output.add_argument("--help", "-h", action="help", help="print this list")
    # fmt: on
    return p


def as_command(main):
    """Run a command line's main() and return its exit code.

    Characters that the terminal's encoding lacks are written as escapes. A closed pipe, as in `... | head`, is not an
    error. If stderr is closed, output for it is discarded, because print(file=None) would write to stdout.
    """
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def main(argv=None):
    """Run the command line argv (default: that of the process) and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for word in argv:
        if "\0" in word:
            parser().error(f"{word[:200]!r} contains a NUL character, which no path can contain")
    args = parser().parse_args(argv)
    try:
        if args.version or args.list_methods is not None:
            print(versions() if args.version else methods(args))
            return 0
        check_flags(args)
        return answer(args) if args.questions is None else answer_file(args)
    except KeyboardInterrupt:  # while loading; `write` catches it during an answer
        return fail(interrupted(args), 130)
    except BrokenPipeError:
        raise  # see `as_command`
    except Exception as broken:
        if args.debug:
            raise
        return fail(*explain(broken))


def interrupted(args):
    """The message after Ctrl-C. Only one prompt or a file of questions could have written something."""
    return "interrupted" + ("; nothing was written" if args.prompt or args.questions else "")


def versions():
    """One line each for this project, Python, torch and Triton."""
    import torch

    from model import __version__

    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "not installed"
    return f"plphp {__version__}\npython {sys.version.split()[0]}\ntorch {torch.__version__}\ntriton {triton}"


def methods(args):
    """The text of --list-methods. InputError for an unknown method."""
    from model import InputError
    from model.checkpoint import find_folder
    from model.pruning.describe import describe, listing

    try:
        return describe(args.list_methods, find_folder(args.model)) if args.list_methods else listing()
    except ValueError as wrong:
        raise InputError(str(wrong)) from wrong


def check_flags(args):
    """Checks that argparse cannot express: flags that exclude or require each other. Exits with an error."""
    p = parser()
    if args.prompt is not None and args.questions is not None:
        p.error("give either --prompt or --questions")
    talk = args.prompt is None and args.questions is None
    check_questions(p, args)
    check_show(p, args)
    if args.temperature == 0 and (args.top_p is not None or args.top_k is not None):
        p.error("--top-p and --top-k need --temperature above 0")
    if [args.prompt, *args.image].count("-") + talk > 1:
        p.error("only one thing can be read from stdin")
    if args.retention is not None and args.keep_tokens is not None:
        p.error("--retention and --keep-tokens exclude each other")
    if args.prune == "none" and (args.retention is not None or args.keep_tokens is not None or args.set):
        p.error("--retention, --keep-tokens and --set need --prune METHOD; for example --prune plphp")
    if args.compare and talk:
        p.error("--compare needs --prompt")
    if args.compare and (args.prune == "none" or args.temperature > 0):
        p.error("--compare needs --prune METHOD and --temperature 0")
    if "" in args.stop:
        p.error("--stop needs text that is not empty")
    if args.system is not None and args.template == "raw":
        p.error("--system cannot be used with --template raw")
    args.prompt = args.prompt or ""
    try:
        if args.prompt == "-":
            args.prompt = read_text(sys.stdin.buffer if sys.stdin else io.BytesIO())
        elif args.prompt.startswith("@"):
            with open(args.prompt[1:], "rb") as file:
                args.prompt = read_text(file)
        "".join([args.prompt, args.system or "", *args.stop]).encode()
    except (OSError, ValueError) as broken:
        p.error(f"cannot read the prompt as UTF-8 text ({broken})")
    if args.questions is None and not talk and not args.prompt.strip():
        p.error("the prompt is empty; give a question")
    for path in args.image:  # checked before torch is imported; `local_path` checks other addresses
        if path != "-" and not re.match("~|data:|[A-Za-z][A-Za-z0-9+.-]+:/", path, re.I) and not os.path.exists(path):
            p.error(f"no picture at {path[:200]}; {path_advice(args, path)}")
    args.lines = questions_on_stdin(p) if talk and not (sys.stdin and sys.stdin.isatty()) else None


def path_advice(args, path):
    """What to do about a picture that is not there."""
    if args.prompt == "" and path == args.image[-1] and (len(args.image) > 1 or " " in path):
        return "if this is the question, put --prompt before it, else check the path"
    return "check the path" + (", and put it in quotes if it has spaces" if len(args.image) > 1 else "")


def questions_on_stdin(p):
    """Iterate over (number, bytes) of the lines of stdin that are not blank. Exits with an error if there are none."""
    with contextlib.suppress(OSError):
        lines = enumerate(sys.stdin.buffer if sys.stdin else (), 1)
        lines = ((number, line) for number, line in lines if line.strip())
        first = next(lines, None)
        if first is not None:
            return itertools.chain([first], lines)
    p.error("stdin is empty; give --prompt, --questions, or a question in each line of stdin")


def read_text(file):
    """The text of a file opened in binary mode, without newlines at its end. ValueError if it is not UTF-8."""
    data = file.read()
    from model.config import decode_text

    return decode_text(data).rstrip("\n")


def check_questions(p, args):
    """Check the flags that need --questions and those that cannot be combined with it."""
    of_files = ("image_folder", "answers", "batch", "num_chunks", "chunk_idx", "keep_errors")
    if args.questions is None:
        for name in of_files:
            if getattr(args, name) not in (None, False):
                p.error(f"--{name.replace('_', '-')} needs --questions")
        return
    if not args.answers:
        p.error("--questions needs --answers")
    if args.image or args.json or args.compare or args.compile or args.stats:
        p.error("--questions cannot be combined with --image, --json, --stats, --compare or --compile")
    if (args.num_chunks is None) != (args.chunk_idx is None) or (args.chunk_idx or 0) >= (args.num_chunks or 1):
        p.error("--num-chunks and --chunk-idx need each other, and the index must be below the number")
    if not os.path.exists(args.questions) or os.path.isdir(args.questions):
        p.error(f"no file {args.questions[:200]}; check the path")
    if args.image_folder is not None and not os.path.isdir(args.image_folder):
        p.error(f"no folder {args.image_folder[:200]}; check the path")
    if os.path.exists(args.answers) and os.path.samefile(args.questions, args.answers):
        p.error("--questions and --answers are the same file")


def check_show(p, args):
    """Check that the drawing can be written. `model.show` checks what depends on the checkpoint."""
    if args.show is None:
        return
    path = Path(args.show)
    if args.prompt is None or not args.image:
        p.error("--show draws on the pictures of one answer; give --image and --prompt (in a conversation: /show FILE)")
    if path.suffix.lower() not in (".png", ".html"):
        p.error(f"cannot draw --show {args.show[:200]!r}; give a name that ends in .png or .html")
    if not path.parent.is_dir():
        p.error(f"--show: there is no folder {str(path.parent)[:200]}; create it or give another")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        p.error(f"--show: {args.show[:200]} cannot be written; give another name")
    if any(os.path.exists(image) and path.exists() and path.samefile(image) for image in args.image):
        p.error(f"--show would replace the picture {args.show[:200]}; give another name")


def explain(broken):
    """(message, exit code) of an exception."""
    text = one_line(broken)
    if "cannot load module more than once" in text:  # an import, broken off by Ctrl-C, was tried again
        return "interrupted", 130
    if isinstance(broken, ImportError):
        return f"{text}; run `make run` once and then use .venv/bin/python", 2
    from model import InputError, out_of_memory
    from model.pruning import MethodError

    if isinstance(broken, InputError):
        return text, 2
    if out_of_memory(broken):
        return f"out of memory ({text[:200]}); try --dtype bf16, a smaller --max-new-tokens or fewer pictures", 1
    if isinstance(broken, MethodError):
        return f"{text[:400]}; run again with --debug to see where", 1
    if isinstance(broken, OSError) and broken.errno == errno.ENOSPC:
        return f"the disk is full ({text}); free some space and run the command again", 1
    if type(broken).__name__ in ("InductorError", "BackendCompilerFailed"):
        why = text.split(" Set TORCHDYNAMO_VERBOSE")[0][:200]
        return f"torch.compile failed ({why}); it needs a C++ compiler such as g++; run without --compile", 1
    return f"{type(broken).__name__}: {text[:300]}; run again with --debug to see where", 1


def one_line(text):
    return " ".join(str(text).split())


def fail(message, code):
    """Print an error to stderr -> code, the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def say(text):
    print(text, file=sys.stderr, flush=True)


def as_json(value):
    """One line of JSON, with escapes for all but ASCII unless the encoding of stdout is UTF-8."""
    plain = getattr(sys.stdout, "encoding", "") in ("utf-8", "UTF-8", "utf8")
    return json.dumps(value, ensure_ascii=not plain, default=str)


# ---------------------------------------------------------------- one answer


def answer(args):
    """Load, ask, print. Returns the exit code."""
    start = time.perf_counter()
    import torch

    from model import Generation, open_checkpoint
    from model.image import read_image
    from model.report import CoreWait, Memory

    device = choose_device(args.device)
    use_threads(args.threads)
    check_backend(args.backend, device)
    pictures = [read_image(path) for path in args.image]
    checkpoint = open_checkpoint(args.model)
    # without --prompt, a generation with the prompt "?" checks the flags before the first question
    given = options(args, checkpoint) | {
        "compile": args.compile,
        "timed": args.stats or args.json or args.compare or not args.prompt,  # for /stats
        "remember": args.show is not None or not (args.prompt or args.lines),  # for /show
    }
    generation = Generation(checkpoint, args.prompt or "?", pictures, **given)
    if args.show is not None:
        from model import show

        show.check_path(args.show, generation)
    checkpoint.read_weights(args.dtype, device)
    load_seconds = time.perf_counter() - start
    introduce(args, checkpoint, generation)
    if args.compile:
        say("note: the second token waits for the compiler, up to a minute the first time, a few seconds after that")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wait, memory = CoreWait(device), Memory(device)
    if args.prompt or args.lines:
        for note in generation.notes:
            say(f"note: {note}")
    if args.prompt:
        if args.max_new_tokens > generation.room:
            say(f"note: the context leaves room for {generation.room} of {args.max_new_tokens} new tokens")
        code = deliver(args, generation, load_seconds, memory)
    elif args.lines:
        ask = partial(Generation, checkpoint, images=pictures, **given)
        code = answer_lines(args, ask, load_seconds, memory)
    else:
        code = converse(args, checkpoint, given, pictures, load_seconds, memory)
    note = wait.note()
    if note:
        say(note)
    return code


def deliver(args, generation, load_seconds, memory):
    """Print the answer as it is generated, then the output of --json, --compare and --stats. Returns the exit code."""
    from model.generate import off_budget
    from model.report import report, stats

    stream = not (args.json or args.no_stream or args.lines)
    code = write(generation, stream)
    if code == 130 and (args.prompt or args.lines):  # a conversation prints its own message
        say("interrupted; the text so far is kept")
    off = off_budget(generation.prune, generation.retention, generation.wanted)
    if off and generation.timing["prune"]:  # a later turn of a conversation keeps every new token
        say(f"note: {off}")
    took = report(generation, args.model, args.seed, load_seconds, memory.peak())
    if code == 0 and not args.lines:
        say_outcome(args, generation, took["prune"])
    if args.compare and code == 0:
        code = compare(generation, took)
    if args.json:
        print(as_json(took), flush=True)
    elif not stream:
        print(one_line(generation.text) if args.lines else generation.text, flush=True)
    if args.stats:
        say(stats(took, memory.bandwidth(), generation))
    if args.show is not None and generation.masks is not None:  # None after Ctrl-C during the prefill
        try:
            say(draw(generation, args.show))
        except OSError as broken:
            return fail(broken, 1)
    return code


def say_outcome(args, generation, pruned):
    """Notes after an answer: what pruning did in its prefill, and whether the answer was cut."""
    if generation.images and generation.timing["prune"]:  # not in a later turn, which keeps everything
        held, full = 1e-6 * pruned["kv_bytes_held"], 1e-6 * pruned["kv_bytes_full"]
        say(f"{pruned['method']} kept {100 * generation.retention:.1f} % of the vision tokens: "
            f"KV cache {held:.2f} MB instead of {full:.2f} MB")  # fmt: skip
    if args.prompt and generation.finish_reason == "length":  # a conversation says it in its own words
        why = "; --max-new-tokens allows more" if generation.limit < generation.room else "; the context is full"
        say(f"note: the answer was cut after {generation.limit} tokens{why}")


def draw(generation, path):
    """Draw what each head kept into the file `path`; return a one-line message. OSError, in one line, if that fails."""
    from model import show

    try:
        show.save(generation, path)
    except OSError as broken:
        raise OSError(f"{path} cannot be written ({broken.strerror}); give another name") from broken
    return f"{path}: which vision tokens each head kept"


def answer_lines(args, ask, load_seconds, memory):
    """Answer each line of stdin independently, until one fails. ask: (text) -> Generation. Returns the exit code."""
    from model import InputError
    from model.config import decode_text

    for number, line in args.lines:
        try:
            code = deliver(args, ask(decode_text(line)), load_seconds, memory)
        except ValueError as wrong:  # an InputError, or a decoding error
            what = wrong if isinstance(wrong, InputError) else f"not UTF-8 text ({wrong}); save it as UTF-8"
            raise InputError(f"line {number} of stdin: {what}") from wrong
        if code:
            return code
    return 0


def converse(args, checkpoint, given, pictures, load_seconds, memory):
    """A conversation on the terminal. Returns the exit code."""
    from model.chat import Chat
    from model.report import report, stats

    def numbers(generation):
        took = report(generation, args.model, args.seed, load_seconds, memory.peak())
        return stats(took, memory.bandwidth(), generation)

    def failed(broken):
        if args.debug:
            raise broken
        fail(*explain(broken))

    return Chat(
        checkpoint, given, pictures, stats=numbers, fail=failed, show=draw,
        budget={"retention": args.retention, "keep_tokens": args.keep_tokens},
        deliver=lambda generation: deliver(args, generation, load_seconds, memory),
    ).run()  # fmt: skip


def options(args, checkpoint):
    """Keyword arguments of `Generation` that follow from the flags."""
    from model import Sampling

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, tuple(args.stop))
    return {
        "sampling": sampling, "template": args.template, "image_mode": args.image_mode, "system": args.system,
        "prune": choose_method(args, checkpoint.folder), "backend": args.backend, "anyres_order": args.anyres_order,
    }  # fmt: skip


def introduce(args, checkpoint, generation):
    """Print to stderr the model and the settings chosen for it, then notes on its limits and files."""
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    demo = checkpoint.folder.resolve() == DEMO
    what = "the demo model" if demo else args.model
    found = checkpoint.template_note if args.template == "auto" else "asked for"
    settings = generation.image_settings
    order = f" (order {settings.order})" if settings.mode == "anyres" else ""
    say(f"{what}: {dtype} on {checkpoint.device}, template {generation.template} ({found}), "
        f"image mode {settings.mode}{order}, backend {generation.way}")  # fmt: skip
    if demo:
        say("note: the demo model knows only drawn shapes and signs, and single questions as in assets/README.md; "
            "--model loads another")  # fmt: skip
        if not generation.images and args.questions is None:
            say("note: there is no picture, and the demo model can answer only questions about pictures")
    for note in checkpoint.notes:
        say(f"note: {note}")


# ---------------------------------------------------------------- a file of questions


def answer_file(args):
    """Answer --questions into --answers. Returns the exit code."""
    from model import Generation, open_checkpoint
    from model.questions import Answers, in_folder, read_questions, run_file
    from model.report import CoreWait

    questions = read_questions(args.questions, args.num_chunks or 1, args.chunk_idx or 0)
    device = choose_device(args.device)
    use_threads(args.threads)
    check_backend(args.backend, device)
    checkpoint = open_checkpoint(args.model)
    given = options(args, checkpoint)
    # invalid options would fail for every question, so they are checked once here
    example = Generation(checkpoint, "?", **given)
    prune, folder = given["prune"], Path(args.image_folder or Path(args.questions).parent).resolve()
    settings = {
        "model": named_model(args.model, checkpoint.folder), "prune": named_method(prune),
        "prune_settings": prune.settings if prune else {},
        "max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k,
        "top_p": args.top_p, "seed": args.seed, "stop": args.stop, "system": args.system,
        "template": example.template, "image_mode": example.image_settings.mode,
        "anyres_order": example.image_settings.order, "image_folder": str(folder),
        "dtype": str(checkpoint.choose_dtype(args.dtype, device)).removeprefix("torch."),
    }  # fmt: skip

    def ask(question):
        return Generation(checkpoint, question.text, [in_folder(name, folder) for name in question.images], **given)

    answers = Answers(args.answers, settings, args.keep_errors)  # checks the file before the weights are read
    with contextlib.closing(answers):
        checkpoint.read_weights(args.dtype, device)
        introduce(args, checkpoint, example)
        return run_file(questions, answers, ask, args.batch or 1, say, CoreWait(device))


def named_model(name, folder):
    """The model's name in an answers file: for a folder its absolute path, whatever the working directory."""
    if folder.resolve() == DEMO:
        return "demo"
    return str(folder.resolve()) if Path(name).expanduser().is_dir() else str(name)


def named_method(prune):
    """The method's name in an answers file; FILE.py::NAME with the file's absolute path."""
    file, colons, function = (prune.name if prune else "none").rpartition("::")
    return f"{Path(file).resolve()}::{function}" if colons else function


def compare(generation, took):
    """Answer again without pruning; print the differences to stderr and add them to `took`. Returns the exit code."""
    from model.report import comparison, differences

    if not generation.vision_tokens:
        say("there is no picture, so there is nothing to compare")
        return 0
    try:
        reference = generation.again(None)
        "".join(reference)
        took["compare"] = comparison(generation, reference)
    except KeyboardInterrupt:
        say("interrupted; the comparison is missing")
        return 130
    say(differences(took["compare"], took))
    return 0


def choose_method(args, folder):
    """The pruning method of --prune, or None; InputError if there is no such method."""
    from model import api

    method = api.choose_method(args.prune, folder, args.retention, args.keep_tokens, args.set)
    note = api.note_on_settings(method, folder)
    if note:
        say(note)
    return method


def choose_device(name):
    """The torch.device of --device; InputError if it is not available."""
    from model import InputError
    from model.checkpoint import choose_device

    try:
        return choose_device(name)
    except InputError as wrong:
        raise InputError(f"--{wrong}") from None


def use_threads(number):
    """Set torch's number of CPU threads; None keeps torch's default."""
    import torch

    if number is not None:
        torch.set_num_threads(number)


def check_backend(name, device):
    """InputError if --backend cannot work on the device, before anything is loaded."""
    import torch

    from kernels.backend import choose_backend
    from model import InputError

    try:
        choose_backend(name, device, torch.float32)  # any dtype of --dtype gives the same result
    except ValueError as wrong:
        raise InputError(f"--{wrong}") from None


def write(generation, stream):
    """Run the generation; with stream, print its text as it comes. Returns the exit code, 130 after Ctrl-C."""
    code = 0
    try:
        for piece in generation:
            if stream:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        code = 130
    if stream:
        print(flush=True)
    return code


if __name__ == "__main__":
    sys.exit(as_command(main))
