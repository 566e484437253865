"""Answer a file of questions in batches. Reads and writes LLaVA's JSONL; a run can be killed and resumed at any time.

Used by `run.py --questions FILE --image-folder DIR --answers FILE`. Input, per line: {"question_id", "image", "text"},
where "image" is a file name, a list of them, or absent, and likewise "frames", those of a video. Output, per line:
{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}, in the order of the questions, because LLaVA's
scorers read both files line by line. If a question cannot be answered, "text" is "" and metadata.error gives the
reason; the next run retries it, perhaps with other settings.
"""

import codecs
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from .api import off_budget
from .batch import answer_each, out_of_memory
from .checkpoint import open_checkpoint
from .config import InputError, decode_text
from .console import note, one_line, say
from .flags import DEMO, choose_device, options
from .generate import Generation
from .image import local_path, with_mode
from .report import CoreWait, introduce

try:
    import fcntl
except ImportError:  # Windows: two runs on one file go undetected
    fcntl = None

# in JSON: a key that stands for a picture in other formats, with a value, or a picture's file or URI as a value
PICTURE = re.compile(
    r'"[^"]*(image|img|picture|photo|video|\bpics?\b)[^"]*": (?!null|false|0[,}]|""|\[\]|\{\})'
    r'|"data:image/|[^\s"]\.(png|jpe?g|webp|gif|bmp|tiff?|avif|jp2|heic|heif|svg|ico|tga|ppm|psd|mp4|avi|mov|mkv|webm)'
    r'(\?[^"]+)?"',
    re.IGNORECASE,
)
FILES = "image", "frames"  # keys of a question with names of files
BLANK = b"\0\r\n\t "  # a power cut can leave NULs in place of the last lines


@dataclass(frozen=True)
class Question:
    id: object  # a number or a string, as in the file
    text: str
    images: tuple  # names, relative to the image folder
    frames: tuple = ()  # of a video, likewise

    @property
    def key(self):
        """Key that matches questions with answers. The id alone is not unique in some LLaVA files (TextVQA)."""
        return json.dumps(self.id), self.text, *self.names.values()

    @property
    def names(self):
        """Names of the pictures, and of the frames if there are any, in the answer's line: {"images": (name, ...)}.

        A data: URI is shortened to its type and a hash.
        """
        given = {"images": self.images} | ({"frames": self.frames} if self.frames else {})
        return {what: tuple(_short(name) if _is_data(name) else name for name in given[what]) for what in given}


def answer_file(args, team=None):
    """Answer --questions into --answers. team: of this process, if there are several. Returns the exit code."""
    questions = read_questions(args.questions, args.num_chunks or 1, args.chunk_idx or 0)
    device = choose_device(team.device(args.device) if team else args.device, args.backend, args.threads)
    checkpoint, replicas = open_checkpoint(args.model), None
    if team:
        checkpoint, replicas = divided(checkpoint, team, args.tp or 1, device)
        team.same("the file of questions", (repr(question).encode() for question in questions))
    given, folder = options(args, checkpoint), Path(args.image_folder or Path(args.questions).parent).resolve()
    # invalid options would fail for every question, so they are checked once here
    example = Generation(checkpoint, "?", **given)
    # of the only picture, and of each of several if that differs (LLaVA-OneVision)
    modes = dict.fromkeys(with_mode(checkpoint.image_settings, args.image_mode, several=n).mode for n in (False, True))
    settings = {
        "model": named_model(args.model, checkpoint.folder), "prune": named_method(example.prune),
        "prune_settings": example.prune.settings if example.prune else {},
        **asdict(example.sampling), "system": args.system, "template": example.template,
        "image_mode": " or ".join(modes), "anyres_order": example.image_settings.order,
        "image_folder": str(folder),
        "dtype": str(checkpoint.choose_dtype(args.dtype, device)).removeprefix("torch."),
        **({} if args.kv_dtype == "auto" else {"kv_dtype": args.kv_dtype}),  # not in files of earlier versions
    }  # fmt: skip

    def ask(question):
        images, frames = (
            [name if _is_data(name) else folder / local_path(name) for name in names]
            for names in (question.images, question.frames)
        )
        return Generation(checkpoint, question.text, images, frames=frames, **given)

    if team:
        team.same("model, folder of the pictures, dtype or another setting", [json.dumps(settings).encode()])
        if team.rank:
            checkpoint.read_weights(args.dtype, device)
            help_out(questions, ask, args, replicas)
            return 0
    with open_answers(args.answers) as file:
        answers = Answers(file, settings)  # checks the file before the weights are read
        checkpoint.read_weights(args.dtype, device)
        introduce(args, example)
        return run_file(questions, answers, ask, args, example.prune, CoreWait(device), replicas)


def divided(checkpoint, team, tp, device):
    """(this process's part of the opened Checkpoint, Replicas): the processes of a Team form replicas of tp each."""
    from .parallel import split
    from .processes import contents
    from .replicas import Replicas

    team.divide(tp, device.type)
    team.same("the checkpoint", contents(checkpoint.folder))
    return split(checkpoint, team.mesh["tp"]) if tp > 1 else checkpoint, Replicas(team, tp)


def named_model(name, folder):
    """The model's name in an answers file: for a folder its absolute path, whatever the working directory."""
    if folder.resolve() == DEMO:
        return "demo"
    return str(folder.resolve()) if Path(name).expanduser().is_dir() else str(name)


def named_method(prune):
    """The method's name in an answers file; FILE.py::NAME with the file's absolute path."""
    split = [part.name.rpartition("::") for part in prune.parts] if prune else [("", "", "none")]
    return "+".join(f"{Path(file).resolve()}::{name}" if colons else name for file, colons, name in split)


# ---------------------------------------------------------------- questions


def read_questions(path, chunks=1, index=0):
    """Questions of a JSONL file, or part `index` of `chunks` equal parts. InputError with the line number."""
    try:
        text = decode_text(Path(path).read_bytes())
    except (OSError, ValueError) as broken:
        raise InputError(f"cannot read the questions in {path} ({broken}); give a JSONL file in UTF-8") from broken
    if text.lstrip().startswith("["):
        raise InputError(f"{path} is a JSON array; give JSONL, one object on each line")
    lines = enumerate(text.split("\n"), 1)
    questions = [_question(line, f"line {number} of {path}") for number, line in lines if line.strip()]
    if not questions:
        raise InputError(f"{path} has no questions; give a JSONL file")
    size = math.ceil(len(questions) / chunks)
    return questions[index * size : (index + 1) * size]


def _question(line, where):
    """Question of one line."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as broken:
        raise InputError(f"{where} is not JSON ({broken}); give one object on each line") from broken
    if not isinstance(raw, dict) or type(raw.get("question_id")) not in (str, int):
        raise InputError(f"{where} has no question_id that is a whole number or a string; add one")
    images, frames = (_names(raw, key, where) for key in FILES)
    rest = [key for key in raw if key not in (*FILES, "text") and PICTURE.search(json.dumps({key: raw[key]}))]
    if not images and not frames and rest:
        raise InputError(
            f'{where} has {rest[0][:50]!r} and no "image"; name the picture in "image" (or the frames of a video in '
            '"frames"), or drop this key'
        )
    if not isinstance(raw.get("text"), str) or not raw["text"].strip():
        raise InputError(f"{where} has no text, which is a string with the question; add it")
    try:
        raw["text"].encode()
    except UnicodeEncodeError as broken:  # half of a surrogate pair
        raise InputError(f"the text in {where} is not valid Unicode ({broken}); fix it") from broken
    return Question(raw["question_id"], raw["text"], images, frames)


def _names(raw, key, where):
    """The names in one of `FILES` of a question."""
    names = raw.get(key)
    names = [] if names in (None, "") else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"the {key} in {where} is neither a file name nor a list of them; fix it")
    return tuple(names)


def _is_data(name):
    return name[:5].lower() == "data:"


def _short(uri):
    digest = hashlib.sha256(uri.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{uri.partition(',')[0][:50]},sha256={digest[:22]}"


# ---------------------------------------------------------------- answers


def open_answers(path):
    """Open or create a file of answers, which no other run can then write. InputError if that is not possible."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{path} is not a regular file; give another for the answers")
        file = open(path, "a+b")  # noqa: SIM115 (the caller closes it)
    except OSError as broken:
        raise InputError(f"cannot write answers to {path} ({broken}); give another file") from broken
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))  # another run may have replaced the file
    except OSError:
        ours = False
    if not ours:
        file.close()
        raise InputError(f"another run is writing {path}, or its disk has no file locks; wait, or give another file")
    return file


class Line(NamedTuple):
    """A line of the file of answers."""

    key: tuple  # of the question
    failed: bool  # an error, no answer
    data: bytes


class Answers:
    """The file of answers. It grows by whole lines; `settle` sorts them at the end of a run.

    lines   all of them, in the order of the file
    """

    def __init__(self, file, settings):
        """Read the file of `open_answers`, and cut off a partial last line, left by a kill.

        settings: dict of the options that answers depend on. InputError for an answer with other settings (an error may
        have others) or other contents; the file is then unchanged.
        """
        self.file, self.path = file, Path(file.name)
        self.settings = json.loads(json.dumps(settings))  # as they are read back from a line
        file.seek(0)
        data = file.read()
        text = data.rstrip(BLANK)
        lines, ended = text.split(b"\n"), data[len(text) :].startswith((b"\n", b"\r\n"))
        if not text or not ended and _is_partial(lines[-1]):  # a kill leaves no line end
            del lines[-1]
        stripped = [(number, line.strip(BLANK)) for number, line in enumerate(lines, 1)]
        self.lines = [self._line(line, f"line {number} of {self.path}") for number, line in stripped if line]
        whole = b"\n".join(lines) + b"\n" * bool(lines)
        if whole != data:
            file.truncate(max(0, len(whole) - 1))
            file.write(whole[-1:])  # the line end, which an editor may have removed
            file.flush()

    def _line(self, data, where):
        """Line for its bytes."""
        try:
            answer = json.loads(data)
            about = answer["metadata"]
            key, settings = (json.dumps(answer["question_id"]), answer["prompt"]), about["settings"]
            key = *key, tuple(about["images"]), *([tuple(about["frames"])] if "frames" in about else [])
            hash(key)
            other = [name for name in {**self.settings, **settings} if settings.get(name) != self.settings.get(name)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as broken:
            raise InputError(f"{where} is not an answer of this program ({broken!r}); give another file") from broken
        if other and "error" not in about:  # an error is retried with the new settings
            theirs, ours = settings.get(other[0]), self.settings.get(other[0])
            raise InputError(
                f"{where} was answered with {other[0]} {theirs!r}, not {ours!r}; give the same options or another file"
            )
        return Line(key, "error" in about, data.removeprefix(codecs.BOM_UTF8))

    def missing(self, questions, keep_errors):
        """(numbers of the questions to be answered, number of those with an answer). keep_errors: do not retry failed
        ones."""
        done, failed = (Counter(line.key for line in self.lines if line.failed is kind) for kind in (False, True))
        missing, errors, answers = [], 0, done.total()
        for number, question in enumerate(questions):
            if done[question.key]:
                done[question.key] -= 1
                continue
            before = failed[question.key] > 0
            failed[question.key] -= before
            errors += before
            if not (before and keep_errors):
                missing.append(number)
        if errors:
            fate = "are kept (--keep-errors)" if keep_errors else "are tried again; --keep-errors skips them"
            note(f"{errors} questions that could not be answered before {fate}")
        if done.total():
            note(f"{done.total()} answers in {self.path} belong to no question of this file; they stay")
        return missing, answers - done.total()

    def write(self, question, text, metadata):
        """Append one answer."""
        about = json.dumps([question.key, self.settings], sort_keys=True)
        line = {
            "question_id": question.id,
            "prompt": question.text,
            "text": text,
            "answer_id": hashlib.sha256(about.encode()).hexdigest()[:22],
            "model_id": self.settings["model"],
            "metadata": {**metadata, **question.names, "settings": self.settings},
        }
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self.file.write(data + b"\n")
        self.file.flush()
        self.lines.append(Line(question.key, "error" in metadata, data))

    def settle(self, questions):
        """Put the lines in the order of the questions and drop errors answered since.

        The file is replaced atomically: a kill leaves either the old or the new one. OSError if that fails.
        """
        answers, errors = ([line for line in self.lines if line.failed is kind] for kind in (False, True))
        found = defaultdict(deque)
        for line in (*answers, *reversed(errors)):  # the newest error is the one that stays
            found[line.key].append(line)
        asked = {question.key for question in questions}
        ordered = [found[question.key].popleft() for question in questions if found[question.key]]
        placed = set(map(id, ordered))
        left = [line for line in self.lines if id(line) not in placed]  # answers to other questions stay, at the end
        ordered += [line for line in left if not line.failed or line.key not in asked]
        data = b"".join(line.data + b"\n" for line in ordered)
        if data == self.path.read_bytes():
            return
        path = self.path.resolve()  # replace the target of a link, not the link
        new = path.with_name(path.name + ".new")
        try:
            with open(new, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(path, new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


def _is_partial(line):
    """Is it the beginning of an answer, or nothing?"""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return b'{"question_id"'.startswith(line[:14])
    return False


# ---------------------------------------------------------------- answering


def run_file(questions, answers, ask, args, method, wait, replicas=None):
    """Answer what is missing and print a summary -> exit code. Answers written before an interruption stay.

    ask(question) returns its Generation. If it raises InputError, or memory runs out, the answer is "" with
    metadata.error. Each line is written when its answer is finished; at the end the lines are sorted. method: of
    pruning, or None; wait: a `CoreWait`; replicas: those of process 0, if several processes answer.
    """
    note_repeated_ids(questions)
    missing, done = answers.missing(questions, args.keep_errors)
    progress = Progress(questions, answers, len(missing), done, wait)
    try:
        if replicas:
            replicas.offer(missing)
            answer_some(questions, missing, ask, args, progress.add, note, replicas, lambda: progress.hear(replicas))
            while progress.count < len(missing):
                time.sleep(0.02)
                progress.hear(replicas)
        else:
            answer_some(questions, missing, ask, args, progress.add, note)
        try:
            answers.settle(questions)
        except OSError as broken:
            note(f"the lines of {answers.path} are not in the order of the questions ({broken})")
    except KeyboardInterrupt:
        say(f"interrupted; {answers.path} holds the answers so far, the same command resumes")
        return 130
    wait.warn()
    progress.sum_up(method, f" by {replicas.said}" if replicas else "")
    return 0


def help_out(questions, ask, args, replicas):
    """Answer questions in another process than 0, which writes them."""
    answer_some(questions, replicas.offered(), ask, args, replicas.send, replicas.send, replicas)


def answer_some(questions, numbers, ask, args, found, tell, replicas=None, meanwhile=None):
    """Answer the questions with these numbers, or of several replicas those that this one takes.

    found(number, text, metadata, counts) is called for each, see `outcome`; tell(text) for a note; meanwhile() before
    each step.
    """
    taken = []

    def asked():
        for number in replicas.take(numbers) if replicas else numbers:
            taken.append(number)
            yield questions[number]

    def begin(question):
        return replicas.agreed(ask, question) if replicas else ask(question)

    def crowded(number):
        tell(f"out of memory with {number} questions at once, retrying one by one; lower --batch")

    # the processes of a replica could not go on together if memory runs out in one of them
    crowded = None if replicas and replicas.shared else crowded
    for i, answer in answer_each(begin, asked(), args.batch or 1, crowded, meanwhile):
        if replicas and isinstance(answer, InputError):
            replicas.fail_alike(taken[i], answer)
        found(taken[i], *outcome(answer))


class Progress:
    """Writes the answers, counts them, and says how far the run is.

    count       lines written in this run
    """

    def __init__(self, questions, answers, missing, done, wait):
        """missing, done: how many questions have no answer, and how many have one already."""
        self.questions, self.answers, self.missing, self.done, self.wait = questions, answers, missing, done, wait
        self.count, self.totals, self.why = 0, Counter(), None
        self.start = self.said = time.perf_counter()

    def add(self, number, text, metadata, counts):
        """Write an answer; see `outcome`."""
        self.answers.write(self.questions[number], text, metadata)
        self.totals.update(counts)
        self.count, self.why, now = self.count + 1, self.why or metadata.get("error"), time.perf_counter()
        if now - self.said >= (0.2 if sys.stderr.isatty() else 10):
            left = (self.missing - self.count) * (now - self.start) / self.count / 60
            say(f"answered {self.done + self.count} of {self.done + self.missing}, {left:.1f} min left")
            self.said = now
            self.wait.warn()

    def hear(self, replicas):
        """Write what other replicas have answered, and say their notes."""
        for message in replicas.receive():
            if len(message) == 1:
                note(*message)
            else:
                self.add(*message)

    def sum_up(self, method, who):
        """The last line, and a note if the method kept another share than was asked for."""
        seconds, totals = time.perf_counter() - self.start, self.totals
        line = "1 question" if self.count == 1 else f"{self.count} questions"
        line += f" in {seconds:.1f} s{who} ({self.count / seconds:.2f} per second, {totals['tokens']} tokens)"
        if self.done:
            line += f", {self.done} already answered"
        if failed := totals["failed"]:
            line += f"; {failed} could not be answered, see metadata.error in their lines (the first: {self.why})"
        say(line)
        if vision := totals["vision"]:
            off = off_budget(method, totals["kept"] / vision, totals["wanted"] / vision or None)
            if off:
                note(off)


def note_repeated_ids(questions):
    """A note if several questions have the same id. Some LLaVA files have such ids (TextVQA)."""
    repeated = [name for name, count in Counter(json.dumps(q.id) for q in questions).items() if count > 1]
    if repeated:
        note(
            f"{len(repeated)} of the question_ids belong to several questions, the first is {repeated[0][:50]}; "
            "answers are also told apart by text and picture, but a scorer may read only the id"
        )


def outcome(answer):
    """(text, metadata, counts) of a finished Generation or an exception.

    counts: "failed" questions, "tokens" of answers, and vision tokens: in all ("vision"), "kept" and "wanted" (0 if no
    setting requests a number).
    """
    failure, counts = answer if isinstance(answer, Exception) else answer.failure, {}
    if failure is not answer and answer.kept and answer.prune:
        weight, wanted = answer.vision_tokens, answer.wanted or 0
        counts = {"vision": weight, "kept": weight * answer.retention, "wanted": weight * wanted}
    if failure:
        memory = f"out of memory ({str(failure)[:200]}); try --dtype bf16"
        error = memory if out_of_memory(failure) else one_line(failure)
        return "", {"error": error}, counts | {"failed": 1}
    return answer.text, {
        "finish_reason": answer.finish_reason, "new_tokens": len(answer.token_ids),
        "prompt_tokens": answer.prompt_tokens, "vision_tokens": answer.vision_tokens,
        "kv_bytes_held": answer.bytes_held,
    }, counts | {"tokens": len(answer.token_ids)}  # fmt: skip
