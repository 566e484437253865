"""A conversation on a terminal: `run.py` without --prompt. Answers go to stdout, everything else to stderr."""

import contextlib
import glob
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .api import change_budget, change_method, named_with_budget, note_on_settings
from .checkpoint import Checkpoint
from .config import InputError
from .console import explain, fail, note, say
from .generate import Generation
from .image import local_path, read_frames, read_image
from .report import note_without_picture
from .show import save
from .tokenizer import IMAGE

HELP = """\
/image PATH ...  add pictures to the next question; /image - takes the last one back
/frames PATH ... the frames of a video for the next question (LLaVA-OneVision); /frames - takes them back
/prune SPEC      prune with another method, as --prune; none keeps every token; alone: print the method in use
/retention F     keep this fraction of the vision tokens, now and after any later /prune
/fresh [on|off]  process the whole conversation again for each question; /fresh again turns it off
/show [FILE]     print how many vision tokens each layer kept, and draw them into FILE.png or FILE.html
/stats           print times and memory of the last answer
/clear [all]     start a new conversation about the same pictures; all: without pictures
/help            print this list
/quit            leave, like Ctrl-D. Ctrl-C stops an answer or clears the line; once more leaves"""


def command_of(line):
    """The command that a line begins with, or None."""
    first = line.split(maxsplit=1)[:1]
    return first[0] if first and first[0].lower() in ("/exit", *re.findall(r"^/\w+", HELP, re.MULTILINE)) else None


@dataclass
class Chat:
    """The state of a conversation, and its commands.

    Each question reuses the cache of the previous answer. The whole conversation is prefilled again only if /fresh is
    on, the pruning has changed, or new pictures have to be pruned, because pruning happens during a prefill.
    """

    checkpoint: Checkpoint
    options: dict  # keyword arguments of every `Generation`
    pictures: list  # pictures for the next question
    frames: list  # of a video for the next question
    budget: dict  # {"retention": F or None, "keep_tokens": N or None}, of the command line or the last /retention
    deliver: Callable  # (generation) -> exit code: prints the answer as it is generated; 130 if Ctrl-C interrupted it
    stats: Callable  # (generation) -> the text of /stats
    debug: bool  # raise errors, instead of printing them in one line?
    seen: list = field(default_factory=list, init=False)  # pictures of the conversation so far
    watched: list = field(default_factory=list, init=False)  # frames of its last video so far
    last: Generation = field(default=None, init=False)  # the answer that the next question follows
    turn: int = field(default=0, init=False)
    fresh: bool = field(default=False, init=False)
    pressed: bool = field(default=False, init=False)  # was Ctrl-C the last thing that the user did?
    changed: bool = field(default=False, init=False)  # has the pruning changed since the last full prefill?
    noted: bool = field(default=False, init=False)  # was the user told what that prefill dropped?

    # ------------------------------------------------------------ questions

    def ask(self, question):
        """Answer one question. After an InputError the conversation is unchanged."""
        found, new = question.count(IMAGE), len(self.pictures)
        if found not in (0, new):
            raise InputError(
                f"the question has {found} {IMAGE}, and the number of new pictures is {new}; "
                f"add pictures with /image PATH, or leave {IMAGE} out"
            )
        sampling = self.options["sampling"]
        sampling = replace(sampling, seed=(sampling.seed + self.turn) % 2**64)  # different random numbers in each turn
        options = self.options | {"sampling": sampling, "before": self.last}
        generation = Generation(self.checkpoint, question, self.pictures, frames=self.frames, **options)
        for text in generation.notes:
            note(text)
        own = self.checkpoint.image_settings.mode
        if self.last and self.pictures and options["image_mode"] == "auto" and generation.image_settings.mode != own:
            tiled = any(picture.layout.grid for picture in self.last.pictures)
            which = "the first picture stays in tiles, a later one" if tiled else "each of several pictures"
            note(f"{which} is one padded square; --image-mode anyres cuts every picture into tiles")
        if self.last:
            self.choose_way()
        with stopped_by_ctrl_c(generation):
            code = self.deliver(generation)
        self.pressed = stopped = generation.finish_reason == "interrupted"
        if stopped and not generation.token_ids:
            say("stopped; the question is dropped")
            return
        if code == 130:  # interrupted in the middle of a step
            generation.cache = None
        self.last, self.turn = generation, self.turn + 1
        self.seen, self.pictures = self.seen + self.pictures, []
        self.watched, self.frames = self.frames or self.watched, []
        if stopped:
            say("stopped; the conversation continues from the text so far")

    def choose_way(self):
        """Keep the last answer's cache, or free it so that everything is prefilled again. Prints which."""
        prune = self.options["prune"]
        if self.fresh:
            why = "as /fresh asks"
        elif self.changed:
            why = "because the pruning has changed"
        elif (self.pictures or self.frames) and prune:
            why = f"so that {prune.name} can prune the new pictures"
        else:
            why = None if self.last.goes_on else "because the last answer was interrupted"
        if why is not None:
            self.last.cache, self.changed, self.noted = None, False, False
            note(f"the whole conversation is processed again, {why}")
        elif self.last.retention < 0.995 and not self.noted:
            self.noted, dropped = True, 1 - self.last.retention
            note(f"{100 * dropped:.0f} % of the vision tokens were dropped for an earlier question; "
                 "/fresh processes the whole conversation again for each question")  # fmt: skip

    # ------------------------------------------------------------ commands

    def take(self, line):
        """Run a command or answer a question. Returns True if it ends the conversation."""
        text = line.strip()
        path = text.strip("'\"")
        if os.path.isfile(path if " " in path else local_path(path)):  # such as a path that was dragged into the window
            raise InputError(f"{text[:200]} is a file; add it as a picture with /image {text[:200]}")
        if text.startswith("/"):
            return self.command(text)
        if text in ("help", "quit", "exit", "?", "-h", "--help"):
            say("commands begin with a slash: /help lists them, /quit leaves")
        elif text:
            self.ask(line)
        return False

    def command(self, line):
        """Run a line that starts with a slash. Returns True if it ends the conversation."""
        name, rest = (*line[1:].split(maxsplit=1), "", "")[:2]
        name, rest = name.lower(), rest.strip()
        commands = {
            "image": self.add_pictures, "frames": self.set_frames, "prune": self.set_prune,
            "retention": self.set_retention, "fresh": self.toggle_fresh, "show": self.show_kept, "clear": self.clear,
            "stats": lambda _: say(self.stats(self.answered())), "help": lambda _: say(HELP),
        }  # fmt: skip
        if name in ("quit", "exit"):
            return True
        if name not in commands:
            raise InputError(f"there is no command /{name[:40]}; /help lists them")
        if name in ("prune", "retention") and not rest:
            self.say_pruning("in use: ")
        else:
            had = self.about()
            commands[name](rest)
            if had and not self.about():
                note_without_picture(self.checkpoint)
        return False

    def add_pictures(self, text):
        """/image: read pictures for the next question. text: one path, or several quoted as in a shell."""
        paths = paths_of(text, "/image")
        if paths == ["-"] and not self.pictures:
            raise InputError("no picture waits for the next question; /image PATH adds one")
        if paths == ["-"]:
            self.pictures = self.pictures[:-1]
        elif "-" in paths:
            raise InputError("a picture cannot be read from the terminal; give the path of a picture")
        else:
            self.pictures = self.pictures + [read_image(path) for path in paths]
        names = [picture.path for picture in self.pictures]
        beside = "; the earlier ones stay (without them: /clear all, then /image)" if self.seen and names else ""
        say(f"pictures for the next question: {', '.join(names) or 'none'}{beside}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice and paths != ["-"]:
            note(f"{', '.join(twice)} was added more than once; /image - takes the last picture back")

    def set_frames(self, text):
        """/frames: read the frames of a video for the next question, in place of those that wait for it."""
        paths = paths_of(text, "/frames")
        if not self.checkpoint.config.max_tiles:
            raise InputError("only LLaVA-OneVision takes the frames of a video; give them as pictures with /image")
        if paths == ["-"] and not self.frames:
            raise InputError("no frames wait for the next question; /frames PATH ... adds them")
        if "-" in paths and len(paths) > 1:
            raise InputError("a frame cannot be read from the terminal; give the paths of the frames")
        self.frames = [] if paths == ["-"] else read_frames(paths)
        say(f"frames for the next question: {len(self.frames) or 'none'}")

    def set_prune(self, spec):
        """/prune: use another method, with the budget in its SPEC, else that of /retention or the command line."""
        method, without_effect = change_method(spec, self.checkpoint.folder, self.budget)
        self.use(method)
        if without_effect:
            note(without_effect)

    def set_retention(self, text):
        """/retention: change the fraction kept by the method in use and those of later /prune."""
        if not self.options["prune"]:
            raise InputError("no pruning method is set; give /prune METHOD first")
        try:
            share = float(text)
        except ValueError:
            raise InputError("/retention needs a fraction above 0, up to 1; give for example /retention 0.5") from None
        budget = {"retention": share, "keep_tokens": None}
        self.use(change_budget(self.options["prune"], self.checkpoint.folder, budget))
        self.budget = budget

    def use(self, prune):
        """Prune with this method from the next question on. InputError if it does not fit the model."""
        Generation(self.checkpoint, "?", **self.options | {"prune": prune})
        before = self.options["prune"]
        same = str(before and before.spec) == str(prune and prune.spec) and "::" not in str(prune and prune.name)
        if not same:
            self.options, self.changed = self.options | {"prune": prune}, self.last is not None
        settings = note_on_settings(prune, self.checkpoint.folder)
        if settings and (before is None or before.name != prune.name):
            say(settings)
        self.say_pruning("as before: " if same else "from the next question on: ")

    def say_pruning(self, when):
        """Print the method in use and its budget."""
        prune = self.options["prune"]
        say(when + (named_with_budget(prune) if prune else "no pruning"))

    def toggle_fresh(self, which):
        """/fresh: prefill the whole conversation for each question, or stop doing so. which: "", "on" or "off"."""
        if which not in ("", "on", "off"):
            raise InputError(f"/fresh {which[:40]} is unknown; give /fresh on or /fresh off")
        self.fresh = which == "on" or not (which or self.fresh)
        say("each question processes the whole conversation again" if self.fresh
            else "each question reuses the cache of the previous answer")  # fmt: skip

    def show_kept(self, path):
        """/show: print how many vision tokens each layer kept, and draw them into a file if a path is given."""
        last = self.answered()
        if not last.vision_tokens:
            raise InputError("the conversation has no picture; add one with /image PATH")
        try:
            drawn = save(last, path) if path else "/show FILE.png or /show FILE.html draws them"
        except OSError as broken:
            raise InputError(str(broken)) from broken
        kept = " ".join(f"{round(n, 1):g}" for n in last.kept)
        say(f"vision tokens that a KV head keeps, of {last.vision_tokens}, layer by layer: {kept}")
        say(drawn)

    def answered(self):
        """The last answer. InputError if there is none, or if its cache is gone."""
        if self.last is None or self.last.cache is None:
            raise InputError("there is no answer to report on; ask a question first")
        return self.last

    def clear(self, which):
        """/clear: forget the conversation; the next question uses its pictures, unless `which` is "all"."""
        if which not in ("", "all"):
            raise InputError(f"/clear {which[:40]} is unknown; give /clear, or /clear all to forget the pictures too")
        self.pictures, self.frames = ([], []) if which else (self.seen + self.pictures, self.frames or self.watched)
        self.seen, self.watched = [], []
        self.last, self.turn, self.changed, self.noted = None, 0, False, False
        say(f"new conversation about {self.about()}" if self.about()
            else "new conversation, without pictures; /image PATH adds one")  # fmt: skip

    def about(self):
        """The pictures and the video of the conversation and of the next question, as text; "" if there are none."""
        frames = self.frames or self.watched
        video = [f"{len(frames)} frame{'s' * (len(frames) > 1)} of a video"] if frames else []
        return ", ".join([picture.path for picture in self.seen + self.pictures] + video)

    # ------------------------------------------------------------ the loop

    def run(self):
        """Read lines until the user leaves -> exit code: 0, or 130 for Ctrl-C at the prompt."""
        with contextlib.suppress(ImportError):  # gives `input` a history; not available on every system
            import readline

            readline.set_completer(complete_path)
            readline.set_completer_delims(" ")
            readline.parse_and_bind("bind ^I rl_complete" if "libedit" in str(readline.__doc__) else "tab: complete")
        given = f" about {self.about()}" if self.about() else ""
        say(f"Ask a question{given}; /image PATH adds a picture. /help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                line = read_line()
            except EOFError:
                say("")
                return 0
            except KeyboardInterrupt:
                say("")
                if not typed():
                    if self.pressed:
                        return 130
                    say("Ctrl-C again, or Ctrl-D, leaves")
                self.pressed = True
                continue
            except UnicodeDecodeError:
                say("error: the line is not UTF-8 text; type it again")
                continue
            self.pressed = False
            try:
                if self.take(line):
                    return 0
            except KeyboardInterrupt:
                say("stopped")
            except BrokenPipeError:
                raise
            except Exception as broken:  # an error does not end the conversation
                if self.debug:
                    raise
                fail(*explain(broken))


def paths_of(text, command):
    """The paths behind a command: one path, or several quoted as in a shell. InputError if there is none."""
    try:
        paths = [text] if os.path.exists(text) else shlex.split(text, posix=os.name != "nt")
    except ValueError as wrong:
        raise InputError(f"the paths cannot be read ({wrong}); close the quotes") from None
    if not paths:
        raise InputError(f"{command} needs a path; give {command} PATH")
    return paths


@contextlib.contextmanager
def stopped_by_ctrl_c(generation):
    """Ctrl-C ends the answer after the current token, so that the cache stays consistent.

    Before the first token, or if pressed again, it raises KeyboardInterrupt at once.
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
    print("> ", end="", file=sys.stderr, flush=True)  # stdout is not a terminal: it gets answers only
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def complete_path(start, number):
    """What Tab completes the beginning of a path to, the `number`-th choice or None; `readline` calls it."""
    found = sorted(glob.glob(glob.escape(os.path.expanduser(start)) + "*"))[number : number + 1]
    return found[0] + "/" * os.path.isdir(found[0]) if found else None


def typed():
    """What was typed before Ctrl-C; None if that is unknown, because `input` does not use `readline`."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline and sys.stdout and sys.stdout.isatty() else None
