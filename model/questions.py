"""Answer a file of questions in batches. Reads and writes LLaVA's JSONL; a run can be killed and resumed at any time.

Used by `run.py --questions FILE --image-folder DIR --answers FILE`. Input, per line: {"question_id", "image", "text"},
where "image" is a file name, a list of them, or absent. Output, per line: {"question_id", "prompt", "text",
"answer_id", "model_id", "metadata"}, in the order of the questions, because LLaVA's scorers read both files line by
line. If a question cannot be answered, "text" is "" and metadata.error gives the reason; the next run retries it.
"""

import codecs
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path

from .api import off_budget
from .batch import Batch, out_of_memory
from .checkpoint import open_checkpoint
from .config import InputError, decode_text
from .console import note, one_line, say
from .flags import DEMO, choose_device, options
from .generate import Generation
from .image import local_path
from .report import CoreWait, introduce

try:
    import fcntl
except ImportError:  # Windows: two runs on one file go undetected
    fcntl = None

# keys and values that other formats use for "image"
PICTURE_KEY = re.compile(r"image|img|picture|photo|\bpics?\b", re.IGNORECASE)
PICTURE_FILE = re.compile(
    r"^data:image/|\.(png|jpe?g|webp|gif|bmp|tiff?|avif|jp2|heic|heif|svg|ico|tga|ppm|psd)(\?.*)?$", re.IGNORECASE
)
BLANK = b"\0\r\n\t "  # a power cut can leave NULs in place of the last lines
PLACES = ("model", "prune", "image_folder")  # settings that may be paths


@dataclass(frozen=True)
class Question:
    id: object  # a number or a string, as in the file
    text: str
    images: tuple  # names, relative to the image folder

    @property
    def key(self):
        """Key that matches questions with answers. The id alone is not unique in some LLaVA files (TextVQA)."""
        return json.dumps(self.id), self.text, self.image_names

    @property
    def image_names(self):
        """Names of the pictures in the answer's line; a data: URI is shortened to its type and a hash."""
        return tuple(_short(name) if _is_data(name) else name for name in self.images)


def answer_file(args):
    """Answer --questions into --answers. Returns the exit code."""
    questions = read_questions(args.questions, args.num_chunks or 1, args.chunk_idx or 0)
    device = choose_device(args.device, args.backend, args.threads)
    checkpoint = open_checkpoint(args.model)
    given, folder = options(args, checkpoint), Path(args.image_folder or Path(args.questions).parent).resolve()
    # invalid options would fail for every question, so they are checked once here
    example = Generation(checkpoint, "?", **given)
    settings = {
        "model": named_model(args.model, checkpoint.folder), "prune": named_method(example.prune),
        "prune_settings": example.prune.settings if example.prune else {},
        **asdict(example.sampling), "system": args.system, "template": example.template,
        "image_mode": example.image_settings.mode, "anyres_order": example.image_settings.order,
        "image_folder": str(folder),
        "dtype": str(checkpoint.choose_dtype(args.dtype, device)).removeprefix("torch."),
    }  # fmt: skip

    def ask(question):
        return Generation(checkpoint, question.text, [in_folder(name, folder) for name in question.images], **given)

    answers = Answers(args.answers, settings, args.keep_errors)  # checks the file before the weights are read
    with contextlib.closing(answers):
        checkpoint.read_weights(args.dtype, device)
        introduce(args, example)
        return run_file(questions, answers, ask, args.batch or 1, CoreWait(device))


def named_model(name, folder):
    """The model's name in an answers file: for a folder its absolute path, whatever the working directory."""
    if folder.resolve() == DEMO:
        return "demo"
    return str(folder.resolve()) if Path(name).expanduser().is_dir() else str(name)


def named_method(prune):
    """The method's name in an answers file; FILE.py::NAME with the file's absolute path."""
    file, colons, function = (prune.name if prune else "none").rpartition("::")
    return f"{Path(file).resolve()}::{function}" if colons else function


# ---------------------------------------------------------------- questions


def read_questions(path, chunks=1, index=0):
    """Questions of a JSONL file, or part `index` of `chunks` equal parts. InputError with the line number."""
    questions, text = [], _read(path)
    if text.lstrip().startswith("["):
        raise InputError(f"{path} is a JSON array; give JSONL, one object on each line")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            questions.append(_question(line, f"line {number} of {path}"))
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
        raise InputError(f"{where} has no question_id; give a number or a string")
    images = raw.get("image")
    images = [] if images in (None, "") else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise InputError(f"the image in {where} is neither a file name nor a list of them; fix it")
    other = [key for key, value in raw.items() if _is_picture(key, value)]
    if not images and other:
        raise InputError(f'{where} has {other[0][:50]!r} and no "image"; give the picture under the key "image"')
    if not isinstance(raw.get("text"), str) or not raw["text"].strip():
        raise InputError(f"{where} has no text; add it")
    try:
        raw["text"].encode()
    except UnicodeEncodeError as broken:  # half of a surrogate pair
        raise InputError(f"the text in {where} is not valid Unicode ({broken}); fix it") from broken
    return Question(raw["question_id"], raw["text"], tuple(images))


def _is_picture(key, value):
    """Does an entry other than image and text name a picture?"""
    return key not in ("image", "text") and bool(value) and (bool(PICTURE_KEY.search(key)) or _holds_picture(value))


def _holds_picture(value):
    """Does a JSON value contain a picture's file name, or a key that stands for one?"""
    if isinstance(value, dict):
        return any(inner and (PICTURE_KEY.search(key) or _holds_picture(inner)) for key, inner in value.items())
    if isinstance(value, list):
        return any(map(_holds_picture, value))
    return isinstance(value, str) and bool(PICTURE_FILE.search(value))


def _read(path):
    try:
        return decode_text(Path(path).read_bytes())
    except (OSError, ValueError) as broken:
        raise InputError(f"cannot read the questions in {path} ({broken}); give a JSONL file in UTF-8") from broken


def in_folder(name, folder):
    """A question's picture in the form that `Generation` takes: a data: URI, or a path relative to the folder."""
    return name if _is_data(name) else folder / local_path(name)


def _is_data(name):
    return name[:5].lower() == "data:"


def _short(uri):
    digest = hashlib.sha256(uri.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{uri.partition(',')[0][:50]},sha256={digest[:22]}"


# ---------------------------------------------------------------- answers


class Answers:
    """The file of answers. It grows by whole lines; `settle` sorts them at the end of a run.

    done    number of answers to each question
    failed  number of error lines of each question
    """

    def __init__(self, path, settings, keep_errors=False):
        """Create the file or resume it; a partial last line, left by a kill, is removed.

        settings: dict of the options that answers depend on. keep_errors: do not retry questions that failed.
        InputError if the file has other settings, does not hold answers, or is being written by another run.
        """
        self.path, self.keep_errors = Path(path), keep_errors
        self.done, self.failed = Counter(), Counter()
        self.settings = json.loads(json.dumps(settings))  # as they are read back from a line
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        except (OSError, ValueError) as broken:
            raise InputError(f"cannot write answers to {path} ({broken}); give another file") from broken
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise InputError(f"{path} is not a regular file; give another for the answers")
            self._lock()
            self._go_on()
        except BaseException:
            self.close()
            raise

    def _lock(self):
        if fcntl:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ours = os.path.samestat(os.fstat(self._file), os.stat(self.path))  # another run may have replaced it
            except OSError:
                ours = False
            if not ours:
                raise InputError(f"another run is writing {self.path}; wait for it, or give another file")

    def _go_on(self):
        """Count the answers in the file, and cut it off after the last whole line."""
        data = self._data()
        text = data.rstrip(BLANK)
        start = text.rfind(b"\n") + 1  # of the last line
        last, behind = text[start:], data[len(text) :]
        # an editor may remove the last line end, but a kill leaves a partial object
        whole = bool(last) and (behind.startswith((b"\n", b"\r\n")) or _is_json(last))
        for number, line in enumerate(data[: len(text) if whole else start].split(b"\n"), 1):
            if line.strip(BLANK):
                key, failed = self._about(line.strip(BLANK), f"line {number} of {self.path}")
                (self.failed if failed else self.done)[key] += 1
        # nothing is written before this check, so a file with other contents stays unchanged
        if not whole and last[:14] != b'{"question_id"'[: len(last)]:
            raise InputError(f"{self.path} does not hold answers; give another file")
        if not whole:
            os.ftruncate(self._file, start)
        elif behind != b"\n":
            os.ftruncate(self._file, len(text))
        os.lseek(self._file, 0, os.SEEK_END)
        if whole and behind != b"\n":
            os.write(self._file, b"\n")

    def _data(self):
        """All bytes of the file."""
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def _about(self, line, where):
        """(key of its question, is it an error?) of a line."""
        try:
            answer = json.loads(line)
            about = answer["metadata"]
            key, settings = (json.dumps(answer["question_id"]), answer["prompt"]), about["settings"]
            key = *key, tuple(about["images"])
            hash(key)
            other = [name for name in {**self.settings, **settings} if not self._agrees(name, settings.get(name))]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as broken:
            raise InputError(f"{where} is not an answer of this program ({broken!r}); give another file") from broken
        if other:
            theirs, ours = settings.get(other[0]), self.settings.get(other[0])
            raise InputError(
                f"{where} was answered with {other[0]} {theirs!r}, not {ours!r}; give the same options or another file"
            )
        return key, "error" in about

    def _agrees(self, name, value):
        """Does a line's setting equal that of this run? Paths are resolved first."""
        ours = self.settings.get(name)
        paths = name in PLACES and isinstance(value, str) and isinstance(ours, str)
        return value == ours or (paths and os.path.realpath(value) == os.path.realpath(ours))

    def settle(self, questions):
        """Put the lines in the order of the questions and drop errors answered since -> did the order change?

        The file is replaced atomically: a kill leaves either the old or the new one. OSError if that fails.
        """
        data = self._data()
        lines = [line for line in (line.strip(BLANK) for line in data.split(b"\n")) if line]
        about = [self._about(line, f"line {number} of {self.path}") for number, line in enumerate(lines, 1)]
        found = {}  # key: numbers of its lines, answers before errors, the newest error first
        for number in sorted(range(len(lines)), key=lambda i: (about[i][1], -i if about[i][1] else i)):
            found.setdefault(about[number][0], deque()).append(number)
        order = [found[question.key].popleft() for question in questions if found.get(question.key)]
        asked = {question.key for question in questions}
        # answers to other questions stay, at the end
        order += sorted(i for left in found.values() for i in left if not about[i][1] or about[i][0] not in asked)
        ordered = b"".join(lines[i].removeprefix(codecs.BOM_UTF8) + b"\n" for i in order)
        if ordered != data:
            self._replace(ordered)
        return order != sorted(order)

    def _replace(self, data):
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

    def write(self, question, text, metadata):
        """Append one answer."""
        about = json.dumps([question.key, self.settings], sort_keys=True)
        line = {
            "question_id": question.id,
            "prompt": question.text,
            "text": text,
            "answer_id": hashlib.sha256(about.encode()).hexdigest()[:22],
            "model_id": self.settings["model"],
            "metadata": {**metadata, "images": question.image_names, "settings": self.settings},
        }
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        while data:  # one call writes everything unless the disk is full
            data = data[os.write(self._file, data) :]

    def close(self):
        os.close(self._file)


# ---------------------------------------------------------------- answering


class Desk:
    """Takes finished answers in any order, writes them in the order of the questions, and reports progress.

    totals: sums over this run: "failed" questions, "tokens" of answers, and vision tokens: in all ("vision"),
    "kept" and "wanted" (if a setting requests it)
    """

    def __init__(self, answers, questions, done, wait):
        self.answers, self.questions, self.done, self.wait = answers, questions, done, wait
        self.method = None  # of pruning; set by take
        self.waiting, self.next, self.totals = {}, 0, Counter()  # waiting: number -> (text, metadata)
        self.start = self.said = time.perf_counter()

    def take(self, number, generation):
        """Take the finished answer to questions[number]."""
        if generation.kept and generation.prune:
            self.method, weight = generation.prune, generation.vision_tokens
            self.totals.update({"vision": weight, "kept": weight * generation.retention})
            if generation.wanted is not None:
                self.totals["wanted"] += weight * generation.wanted
        if generation.failure:
            self.fail(number, generation.failure)
            return
        self.totals["tokens"] += len(generation.token_ids)
        self._hand_in(number, generation.text, {
            "finish_reason": generation.finish_reason, "new_tokens": len(generation.token_ids),
            "prompt_tokens": generation.prompt_tokens, "vision_tokens": generation.vision_tokens,
            "kv_bytes_held": generation.bytes_held,
        })  # fmt: skip

    def fail(self, number, broken):
        """questions[number] cannot be answered. broken: the error or its text."""
        self.totals["failed"] += 1
        self._hand_in(number, "", {"error": one_line(broken)})

    def _hand_in(self, number, text, metadata):
        """Write this and all waiting answers that are next in order."""
        self.waiting[number] = text, metadata
        while self.next in self.waiting:
            self.answers.write(self.questions[self.next], *self.waiting.pop(self.next))
            self.next += 1
        self._progress()

    def _progress(self):
        now = time.perf_counter()
        if now - self.said >= (0.2 if sys.stderr.isatty() else 10):
            rate, left = self.next / (now - self.start), len(self.questions) - self.next
            eta = f"{left / rate / 60:.1f} min left" if rate else "..."
            say(f"answered {self.done + self.next} of {self.done + len(self.questions)}, {eta}")
            self.said = now
            self.wait.warn()

    def off_budget(self):
        """One line if the whole run kept nothing or clearly more or less than requested, else None."""
        totals, vision = self.totals, self.totals["vision"]
        wanted = totals["wanted"] / vision if "wanted" in totals and vision else None
        return off_budget(self.method, totals["kept"] / vision, wanted) if vision else None

    def summary(self):
        """One line about this run."""
        seconds, totals = time.perf_counter() - self.start, self.totals
        rate = self.next / seconds
        count = "1 question" if self.next == 1 else f"{self.next} questions"
        line = f"{count} in {seconds:.1f} s ({rate:.2f} per second, {totals['tokens']} tokens)"
        if self.done:
            line += f", {self.done} already answered"
        if totals["failed"]:
            line += f"; {totals['failed']} could not be answered, see metadata.error in their lines"
        return line


def answer_all(questions, answers, ask, size, wait):
    """Answer the questions missing from `answers`, `size` at a time -> the Desk.

    ask(question) returns its Generation. If it raises InputError, or memory runs out, the answer is "" with
    metadata.error. wait: a `CoreWait`.
    """
    missing, done = _missing(questions, answers)
    desk = Desk(answers, missing, done, wait)
    queue, alone = deque(range(len(missing))), set()  # alone: questions that did not fit in memory with others
    batch, running = Batch(), {}  # number of the question -> its generation

    def fits(number):
        return not running or (len(running) < size and number not in alone and not alone.intersection(running))

    while queue or running:
        try:
            while queue and fits(queue[0]):
                number = queue.popleft()
                running[number] = None
                try:
                    running[number] = ask(missing[number])
                    batch.add(running[number])
                except InputError as wrong:
                    del running[number]
                    desk.fail(number, wrong)
            for generation in batch.advance():
                number = next(n for n, other in running.items() if other is generation)
                desk.take(number, generation)
                del running[number]
        except Exception as broken:
            if not out_of_memory(broken):
                raise
            batch, tried, running = Batch(), sorted(running), {}  # the cache may be inconsistent
            if len(tried) == 1:
                desk.fail(tried[0], f"out of memory ({str(broken)[:200]}); try --dtype bf16")
            else:
                note(f"out of memory with {len(tried)} questions at once, retrying one by one; lower --batch")
                queue.extendleft(reversed(tried))
                alone.update(tried)
    return desk


def _missing(questions, answers):
    """(questions without an answer, number of questions with one)."""
    done, failed = answers.done.copy(), answers.failed.copy()
    missing, errors, before = [], 0, done.total()
    for question in questions:
        if done[question.key]:
            done[question.key] -= 1
            continue
        if failed[question.key]:
            failed[question.key] -= 1
            errors += 1
            if answers.keep_errors:
                continue
        missing.append(question)
    if errors:
        fate = "are kept (--keep-errors)" if answers.keep_errors else "are tried again; --keep-errors skips them"
        note(f"{errors} questions that could not be answered before {fate}")
    if done.total():
        note(f"{done.total()} answers in {answers.path} belong to no question of this file; they stay")
    return missing, before - done.total()


def repeated_ids(questions):
    """One line if several questions have the same id, else None. Some LLaVA files have such ids (TextVQA)."""
    repeated = [name for name, count in Counter(json.dumps(q.id) for q in questions).items() if count > 1]
    if not repeated:
        return None
    return (
        f"{len(repeated)} of the question_ids belong to several questions, the first is {repeated[0][:50]}; "
        "answers are also told apart by text and picture, but a scorer may read only the id"
    )


def run_file(questions, answers, ask, size, wait):
    """Answer all questions and print a summary -> exit code. Answers written before an interruption stay."""
    if repeated := repeated_ids(questions):
        note(repeated)
    try:
        desk = answer_all(questions, answers, ask, size, wait)
        try:
            if answers.settle(questions):
                note(f"sorted the lines of {answers.path} in the order of the questions")
        except OSError as broken:
            note(f"the lines of {answers.path} are not in the order of the questions ({broken})")
    except KeyboardInterrupt:
        say(f"interrupted; {answers.path} holds the answers so far, the same command resumes")
        return 130
    wait.warn()
    say(desk.summary())
    if off := desk.off_budget():
        note(off)
    return 0


def _is_json(data):
    """Is it one complete JSON value?"""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True
