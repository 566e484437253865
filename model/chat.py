"""A conversation on a terminal: `run.py` without --prompt. Answers go to stdout, everything else to stderr."""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .config import InputError
from .generate import Generation
from .image import read_image
from .load import Checkpoint

HELP = """\
/image PATH ...  add pictures to the next question
/prune SPEC      prune with another method, as --prune; none keeps every token
/retention F     keep this fraction of the picture tokens
/fresh           read the conversation and its pictures anew for each question; again to switch it off
/show [FILE]     how many picture tokens each layer kept; draws them into FILE.png or FILE.html
/stats           times and bytes of the last answer
/clear [all]     start a new conversation about the same pictures; all: without pictures
/help            this list
/quit            leave, like Ctrl-D. Ctrl-C stops an answer; at the prompt it leaves"""


@dataclass
class Chat:
    """The state of a conversation, and its commands.

    Each question continues in the cache of the previous answer. The whole conversation is prefilled again only if
    /fresh asks for it, if the pruning has changed, or if new pictures are to be pruned: pruning happens in a prefill.
    """

    checkpoint: Checkpoint
    options: dict  # keyword arguments of every `Generation`
    pictures: list  # pictures for the next question
    deliver: Callable  # (generation) -> exit code: prints the answer while it is written; 130 where Ctrl-C broke it off
    choose: Callable  # (SPEC, or None for that of the command line; retention or None) -> Method or None
    stats: Callable  # (generation) -> text
    fail: Callable  # (exception) -> None: prints the error in one line
    show: Callable  # (generation, path) -> one line: draws the kept tokens into a file
    seen: list = field(default_factory=list, init=False)  # pictures of the conversation so far
    last: Generation = field(default=None, init=False)  # the answer that the next question follows
    turn: int = field(default=0, init=False)
    spec: str = field(default=None, init=False)  # of the last /prune
    fresh: bool = field(default=False, init=False)
    changed: bool = field(default=False, init=False)  # has the pruning changed since the last full prefill?
    noted: bool = field(default=False, init=False)  # was the user told what that prefill dropped?

    # ------------------------------------------------------------ questions

    def ask(self, question):
        """Answer one question. InputError leaves the conversation as it was."""
        sampling = self.options["sampling"]
        sampling = replace(sampling, seed=(sampling.seed + self.turn) % 2**64)  # other random numbers in each turn
        options = self.options | {"sampling": sampling, "before": self.last}
        generation = Generation(self.checkpoint, question, self.pictures, **options)
        for note in generation.notes:
            say(f"note: {note}")
        if self.last:
            self.choose_way()
        with stopped_by_ctrl_c(generation):
            code = self.deliver(generation)
        if generation.finish_reason == "interrupted" and not generation.token_ids:
            say("stopped; the question is dropped")
            return
        if code == 130:  # in the middle of a step
            generation.cache = None
        self.end_turn(generation)

    def choose_way(self):
        """Continue in the cache, or free it so that everything is prefilled again. Prints what the user should know."""
        why = self.why_anew()
        if why is not None:
            self.last.cache, self.changed, self.noted = None, False, False
            say(f"note: the conversation is read anew, {why}")
        elif self.last.retention < 0.995 and not self.noted:
            self.noted, dropped = True, 1 - self.last.retention
            say(f"note: {100 * dropped:.0f} % of the picture tokens were dropped for an earlier question; "
                "/fresh reads them anew for each question")  # fmt: skip

    def why_anew(self):
        """Why the whole conversation has to be prefilled again; None if the cache continues."""
        if self.fresh:
            return "as /fresh asks"
        if self.changed:
            return "because the pruning has changed"
        if self.pictures and self.options["prune"]:
            return f"so that {self.options['prune'].name} can prune the new pictures"
        return None if self.last.goes_on else "because the last answer was broken off"

    def end_turn(self, generation):
        """Make the answer part of the conversation."""
        self.last, self.turn = generation, self.turn + 1
        self.seen, self.pictures = self.seen + self.pictures, []
        if generation.finish_reason == "interrupted":
            say("stopped; the conversation goes on from what was said")
        elif generation.finish_reason == "length":
            context = self.checkpoint.config.text_config.context
            full = f"the context of {context} tokens is full; /clear starts a new conversation"
            cut = f"the answer was cut after {generation.limit} tokens; --max-new-tokens allows more"
            say(f"note: {full if generation.limit == generation.room else cut}")

    # ------------------------------------------------------------ commands

    def command(self, line):
        """Run a line that starts with a slash -> True to leave."""
        name, rest = (*line[1:].split(maxsplit=1), "", "")[:2]
        name = name.lower()
        commands = {
            "image": self.add_pictures, "prune": self.set_prune, "retention": self.set_retention,
            "fresh": self.toggle_fresh, "show": self.show_kept, "clear": self.clear,
            "stats": lambda _: say(self.stats(self.answered())), "help": lambda _: say(HELP),
        }  # fmt: skip
        if name in ("quit", "exit"):
            return True
        if name not in commands:
            raise InputError(f"there is no command /{name[:40]}; /help lists them")
        commands[name](rest.strip())
        return False

    def add_pictures(self, text):
        """/image: read the pictures of the next question. text: one path, or several quoted as in a shell."""
        paths = [text] if os.path.exists(text) else split(text)
        if not paths:
            raise InputError("/image needs a path; give /image PATH")
        if "-" in paths:
            raise InputError("a picture cannot be read from the terminal; give the path of a picture")
        self.pictures = self.pictures + [read_image(path) for path in paths]
        say(f"pictures for the next question: {', '.join(picture.path for picture in self.pictures)}")

    def set_prune(self, spec):
        """/prune: another method, with its own or the command line's retention."""
        if not spec:
            raise InputError("/prune needs a method; give /prune SPEC, as in --prune")
        self.use(self.choose(spec, None))
        self.spec = spec

    def set_retention(self, text):
        """/retention: another fraction for the method in use."""
        if not self.options["prune"]:
            raise InputError("no method prunes here; give /prune METHOD first")
        try:
            share = float(text)
        except ValueError:
            raise InputError("/retention needs a fraction above 0, up to 1; give for example /retention 0.5") from None
        self.use(self.choose(self.spec, share))

    def use(self, prune):
        """Prune with this method from the next question on. InputError if it does not fit the model."""
        Generation(self.checkpoint, "?", **self.options | {"prune": prune})
        self.options, self.changed = self.options | {"prune": prune}, self.last is not None
        share = prune and prune.settings.get("retention")
        say(f"from the next question on: {prune.name if prune else 'no pruning'}"
            + (f", retention {share:g}" if share else ""))  # fmt: skip

    def toggle_fresh(self, _):
        """/fresh: prefill the whole conversation for each question, or stop doing so."""
        self.fresh = not self.fresh
        say("each question reads the conversation and its pictures anew" if self.fresh
            else "each question continues in the cache of the previous answer")  # fmt: skip

    def show_kept(self, path):
        """/show: print how many picture tokens each layer kept, and draw them into a file if a path is given."""
        last = self.answered()
        if not last.vision_tokens:
            raise InputError("the conversation has no picture; add one with /image PATH")
        try:
            drawn = self.show(last, path) if path else "/show FILE.png or FILE.html draws them"
        except OSError as broken:
            raise InputError(str(broken)) from broken
        kept = " ".join(f"{round(n, 1):g}" for n in last.kept)
        say(f"picture tokens that a KV head keeps, of {last.vision_tokens}, layer by layer: {kept}")
        say(drawn)

    def answered(self):
        """The last answer. InputError if there is none, or if its cache is gone."""
        if self.last is None or self.last.cache is None:
            raise InputError("there is no answer to report on; ask a question first")
        return self.last

    def clear(self, which):
        """/clear: forget the conversation; its pictures go with the next question, unless `which` is "all"."""
        if which not in ("", "all"):
            raise InputError(f"/clear {which[:40]} is unknown; give /clear, or /clear all to forget the pictures too")
        kept = [] if which else self.seen + self.pictures
        self.pictures, self.seen = kept, []
        self.last, self.turn, self.changed, self.noted = None, 0, False, False
        say(f"new conversation about {', '.join(picture.path for picture in kept)}" if kept
            else "new conversation, without pictures; /image PATH adds one")  # fmt: skip

    # ------------------------------------------------------------ the loop

    def run(self):
        """Read lines until the user leaves -> exit code: 0, or 130 for Ctrl-C at the prompt."""
        with contextlib.suppress(ImportError):  # gives `input` a history; not on every system
            import readline  # noqa: F401
        given = f" about {', '.join(picture.path for picture in self.pictures)}" if self.pictures else ""
        say(f"Ask a question{given}; /image PATH adds a picture. /help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                line = read_line()
            except (EOFError, KeyboardInterrupt) as left:
                say("")
                return 0 if isinstance(left, EOFError) else 130
            except UnicodeDecodeError:
                say("error: the line is not UTF-8 text; type it again")
                continue
            try:
                if line.startswith("/"):
                    if self.command(line):
                        return 0
                elif line.strip() in ("help", "quit", "exit"):
                    say(f"commands begin with a slash: /{line.strip()}")
                elif line.strip():
                    self.ask(line)
            except KeyboardInterrupt:
                say("stopped")
            except BrokenPipeError:
                raise
            except Exception as broken:  # an error does not end the conversation
                self.fail(broken)


@contextlib.contextmanager
def stopped_by_ctrl_c(generation):
    """Ctrl-C ends the answer after the current token, so that the cache stays consistent.

    Before the first token, and the second time, it raises KeyboardInterrupt at once.
    """

    def stop(*_):
        if generation.cancelled or not generation.token_ids:
            raise KeyboardInterrupt
        generation.cancelled = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def read_line():
    """One line from the user. EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
    if sys.stdout and sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)  # stdout is a file, for answers only
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def split(text):
    """The paths of a line, quoted as in a shell."""
    try:
        return shlex.split(text, posix=os.name != "nt")
    except ValueError as wrong:
        raise InputError(f"the paths cannot be read ({wrong}); close the quotes") from None


def say(text):
    print(text, file=sys.stderr, flush=True)
