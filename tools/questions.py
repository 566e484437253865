"""A file of questions, answered many at a time: LLaVA's own JSONL in and out, resumable after anything.

`run.py --questions FILE --image-folder DIR --answers FILE` comes here. In: {"question_id", "image", "text"} per line,
where "image" is a file name, a list of them, or absent. Out: {"question_id", "prompt", "text", "answer_id", "model_id",
"metadata"} per line, in the order of the questions, because LLaVA's own scorers read both files side by side.
"""

import hashlib
import json
import math
import os
import stat
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from model import Batch, InputError
from model.generate import off_budget

try:
    import fcntl
except ImportError:  # Windows: two runs on one file are not noticed
    fcntl = None


@dataclass(frozen=True)
class Question:
    id: object  # a number or a string, as the file has it
    text: str
    images: tuple  # names, relative to the image folder

    @property
    def key(self):
        """What tells an answered question: LLaVA's own files (TextVQA) have several under one id."""
        return json.dumps(self.id), self.text, self.images


# ---------------------------------------------------------------- questions


def read_questions(path, chunks=1, index=0):
    """Questions of a JSONL file; of `chunks` equal parts the one of that index. InputError with the line's number."""
    questions = []
    for number, line in enumerate(_read(path, "questions").split("\n"), 1):
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
        raise InputError(f"{where} is not JSON ({broken}); mend it") from broken
    if not isinstance(raw, dict) or type(raw.get("question_id")) not in (str, int):
        raise InputError(f"{where} has no question_id; give a number or a string")
    images = raw.get("image")
    images = [] if images in (None, "") else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise InputError(f"the image in {where} is neither a file name nor a list of them; mend it")
    if not isinstance(raw.get("text"), str) or not (raw["text"].strip() or images):
        raise InputError(f"{where} has no text; mend it")
    try:
        raw["text"].encode()
    except UnicodeEncodeError as broken:  # half of a surrogate pair
        raise InputError(f"the text in {where} is no Unicode text ({broken}); mend it") from broken
    return Question(raw["question_id"], raw["text"], tuple(images))


def _read(path, what):
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as broken:
        raise InputError(f"cannot read the {what} in {path} ({broken}); give a JSONL file in UTF-8") from broken


# ---------------------------------------------------------------- answers


class Answers:
    """The file of answers, which only ever grows by whole lines. `done`: how often each question is in it already."""

    def __init__(self, path, settings):
        """Create the file, or go on with it: half a line, left by a kill, is cut off.

        settings: what the answers depend on; a dict. InputError if the file is of other ones, is not one of answers, or
        is being written by another run.
        """
        self.path, self.done = Path(path), Counter()
        self.settings = json.loads(json.dumps(settings))  # as a line will give them back
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        except OSError as broken:
            raise InputError(f"cannot write answers to {path} ({broken}); give another file") from broken
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise InputError(f"{path} is no regular file; give another for the answers")
            self._lock()
            self._go_on()
        except BaseException:
            self.close()
            raise

    def _lock(self):
        if fcntl:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"another run is writing {self.path}; wait for it, or give another file") from None

    def _go_on(self):
        """Count what is there, and stand at the end of the last whole line."""
        size = os.fstat(self._file).st_size
        data = bytearray()
        while len(data) < size:
            data += os.read(self._file, size - len(data))
        whole = data.rfind(b"\n") + 1
        lines = bytes(data[:whole]).split(b"\n")[:-1]
        rest = bytes(data[whole:])
        complete = _is_json(rest)  # then nobody was killed over it
        for number, line in enumerate(lines + [rest] * complete, 1):
            self._count(line, f"line {number} of {self.path}")
        # only now: a file that is not one of answers stays as it is
        if rest and not complete and rest[:14] != b'{"question_id"'[: len(rest)]:
            raise InputError(f"{self.path} holds something else than answers; give another file")
        os.ftruncate(self._file, size if complete else whole)
        os.lseek(self._file, 0, os.SEEK_END)
        if complete:
            os.write(self._file, b"\n")

    def _count(self, line, where):
        try:
            answer = json.loads(line)
            about = answer["metadata"]
            key, settings = (json.dumps(answer["question_id"]), answer["prompt"]), about["settings"]
            key = *key, tuple(about["images"])
        except (ValueError, KeyError, TypeError, RecursionError) as broken:
            raise InputError(f"{where} is no answer of this program ({broken!r}); give another file") from broken
        for name in {**self.settings, **settings}:
            if settings.get(name) != self.settings.get(name):
                raise InputError(
                    f"{where} was answered with {name} {settings.get(name)!r}, not {self.settings.get(name)!r}; give "
                    "the same options or another file"
                )
        self.done[key] += 1

    def write(self, question, text, metadata):
        """Append one answer."""
        about = json.dumps([question.key, self.settings], sort_keys=True)
        line = {
            "question_id": question.id,
            "prompt": question.text,
            "text": text,
            "answer_id": hashlib.sha256(about.encode()).hexdigest()[:22],
            "model_id": self.settings["model"],
            "metadata": {**metadata, "images": question.images, "settings": self.settings},
        }
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        while data:  # one call writes it all, unless the disk is full
            data = data[os.write(self._file, data) :]

    def close(self):
        os.close(self._file)


# ---------------------------------------------------------------- answering


class Desk:
    """Takes finished answers in any order, writes them in the order of the questions, says how far it is.

    totals: sums over this run: "failed" questions, "tokens" of answers
    """

    def __init__(self, answers, questions, done, say):
        self.answers, self.questions, self.done, self.say = answers, questions, done, say
        self.method = None  # that prunes, see count_kept
        self.waiting, self.next, self.totals = {}, 0, Counter()  # waiting: number -> (text, metadata)
        self.start = self.said = time.perf_counter()

    def hand_in(self, number, text, metadata):
        """The answer to questions[number]. What was waiting for it is written too."""
        self.waiting[number] = text, metadata
        while self.next in self.waiting:
            self.answers.write(self.questions[self.next], *self.waiting.pop(self.next))
            self.next += 1
        self.totals["failed"] += "error" in metadata
        self.totals["tokens"] += metadata.get("new_tokens", 0)
        self._progress()

    def _progress(self):
        now = time.perf_counter()
        if now - self.said >= (0.2 if sys.stderr.isatty() else 10):
            rate, left = self.next / (now - self.start), len(self.questions) - self.next
            eta = f"{left / rate / 60:.1f} min left" if rate else "..."
            self.say(f"answered {self.done + self.next} of {self.done + len(self.questions)}, {eta}")
            self.said = now

    def count_kept(self, generation):
        """Of how many vision tokens what part was kept, and what part was asked for."""
        if generation.kept and generation.wanted is not None:
            self.method, weight = generation.prune, generation.vision_tokens
            parts = {"vision": weight, "kept": weight * generation.retention, "wanted": weight * generation.wanted}
            self.totals.update(parts)

    def off_budget(self):
        """One line if the run as a whole kept clearly more or less than was asked for, else None."""
        vision = self.totals["vision"]
        return off_budget(self.method, self.totals["kept"] / vision, self.totals["wanted"] / vision) if vision else None

    def summary(self):
        """One line about this run."""
        seconds, totals = time.perf_counter() - self.start, self.totals
        rate = self.next / seconds
        line = f"{self.next} questions in {seconds:.1f} s ({rate:.2f} per second, {totals['tokens']} tokens)"
        if self.done:
            line += f", {self.done} had been answered before"
        if totals["failed"]:
            line += f"; {totals['failed']} could not be answered, their lines say why (metadata.error)"
        return line


def answer_all(questions, answers, ask, size, say):
    """Answer what `answers` lacks, `size` questions at a time -> the Desk. Progress goes through say(text).

    ask(question): its Generation, or an InputError, which becomes the question's answer: "" with metadata.error.
    """
    left = answers.done.copy()
    missing = []
    for question in questions:
        if left[question.key]:
            left[question.key] -= 1
        else:
            missing.append(question)
    if left.total():
        say(f"note: {left.total()} answers in {answers.path} are to no question here; they stay")
    desk = Desk(answers, missing, len(questions) - len(missing), say)
    batch, numbers, waiting = Batch(), {}, iter(enumerate(missing))
    more = True
    while more or batch:
        while more and len(batch) < size:
            number, question = next(waiting, (None, None))
            more = number is not None
            if more:
                try:
                    generation = ask(question)
                    batch.add(generation)
                except InputError as wrong:
                    desk.hand_in(number, "", {"error": " ".join(str(wrong).split())})
                else:
                    numbers[id(generation)] = number
        for generation in batch.advance():
            failed = {"error": " ".join(str(generation.failure).split())} if generation.failure else None
            text = "" if failed else generation.text
            desk.hand_in(numbers.pop(id(generation)), text, failed or about(generation))
            desk.count_kept(generation)
    return desk


def about(generation):
    """What the answer's line says of how it came about."""
    return {
        "finish_reason": generation.finish_reason,
        "new_tokens": len(generation.token_ids),
        "prompt_tokens": generation.prompt_tokens,
        "vision_tokens": generation.vision_tokens,
        "kv_bytes_held": generation.bytes_held,
    }


def run_file(questions, answers, ask, size, say):
    """All of it, with one line at the end -> exit code. What was written before an interruption stays written."""
    try:
        desk = answer_all(questions, answers, ask, size, say)
    except KeyboardInterrupt:
        say(f"interrupted; {answers.path} holds what was answered, the same command goes on from there")
        return 130
    say(desk.summary())
    if desk.off_budget():
        say(f"note: {desk.off_budget()}")
    return 0


def _is_json(data):
    """Is it one whole JSON value?"""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True
