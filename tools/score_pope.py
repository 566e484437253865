"""Score answers to POPE (arXiv 2305.10355), yes/no questions about objects, by LLaVA's own rule.

    python tools/score_pope.py --questions llava_pope_test.jsonl --answers answers.jsonl --annotations coco/

An answer is a "no" if the first sentence, without commas, has the word No, no or not in it; anything else is a "yes".
Labels are "label" in the question file itself, or in --annotations: a folder of coco_pope_<category>.json, whose lines
stand in the order of the questions of that category. One row per category: counts with "yes" as positive, accuracy,
precision, recall, F1, share of answers that are yes, and errors: questions that could not be answered (metadata.error),
which are in none of the other numbers.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run import Parser, as_command  # noqa: E402


def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--questions", "--question-file", required=True, metavar="FILE.jsonl")
    p.add_argument("--answers", "--result-file", required=True, metavar="FILE.jsonl")
    p.add_argument("--annotations", "--annotation-dir", type=Path, metavar="DIR")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = p.parse_args(argv)
    try:
        questions = read_lines(args.questions, question_id=(int, str), text=str, category=(str, type(None)))
        answers = read_lines(args.answers, question_id=(int, str), text=str)
        scores = score(questions, answers, args.annotations)
    except ValueError as wrong:
        p.error(str(wrong))
    errors = list(scores.values())[-1]["errors"]
    if errors:
        print(
            f"note: {errors} questions could not be answered (metadata.error); scores are without them", file=sys.stderr
        )
    if args.json:
        print(json.dumps(scores))
    else:
        show(scores)
    return 0


def show(scores):
    """The table; its column of errors only if there are any."""
    names = [name for name in next(iter(scores.values())) if name != "errors" or any(r[name] for r in scores.values())]
    print(f"{'category':12}" + "".join(f"{name:>11}" for name in names))
    for category, row in scores.items():
        cells = (f"{row[n]:11d}" if isinstance(row[n], int) else f"{row[n]:11.4f}" for n in names)
        print(f"{category:12}" + "".join(cells))


def score(questions, answers, annotations=None):
    """{category: row} of the counts and rates; "all" at the end where there are several categories."""
    said = {}  # an error that was made good does not count
    for answer in sorted(answers, key=failed):
        before = said.setdefault(answer["question_id"], answer)
        if before is not answer and not failed(answer):
            raise ValueError(f"question {answer['question_id']} has two answers; score one run at a time")
    pairs = {}
    for category, asked in by_category(questions).items():
        for question, label in zip(asked, labels(category, asked, annotations), strict=True):
            answer = said.get(question["question_id"])
            if answer is None:
                raise ValueError(f"question {question['question_id']} has no answer; finish the run first")
            pairs.setdefault(category, []).append(None if failed(answer) else (is_yes(answer["text"]), label))
    if len(pairs) > 1 and "all" in pairs:
        raise ValueError('one category of several is called "all", as the total is; give it another name')
    if len(pairs) > 1:
        pairs["all"] = [pair for row in pairs.values() for pair in row]
    if not any(any(row) for row in pairs.values()):
        raise ValueError("no question could be answered (metadata.error says why); mend that and run it again")
    return {category: rates(found) for category, found in pairs.items()}


def failed(answer):
    """Does the line say why there is no answer?"""
    about = answer.get("metadata")
    return isinstance(about, dict) and bool(about.get("error"))


def by_category(questions):
    """{category: its questions}, in the order of the file."""
    found = {}
    for question in questions:
        found.setdefault(question.get("category") or "(none)", []).append(question)
    return found


def labels(category, asked, annotations):
    """True for "yes", one per question of a category."""
    if annotations is None:
        rows = asked
    else:
        rows = read_lines(annotations / f"coco_pope_{category}.json", text=(str, type(None)))
        if len(rows) != len(asked):
            raise ValueError(f"{len(asked)} questions and {len(rows)} labels of {category}; give files of one release")
        for question, row in zip(asked, rows, strict=True):
            if not question["text"].startswith(row.get("text") or ""):
                raise ValueError(
                    f"question {question['question_id']} is not that of its label; give files of one release"
                )
    for row in rows:
        if row.get("label") not in ("yes", "no"):
            raise ValueError(f"label {row.get('label')!r} is neither yes nor no; give --annotations DIR")
    return [row["label"] == "yes" for row in rows]


def is_yes(text):
    """LLaVA's reading of an answer."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def rates(pairs):
    """Counts and rates of (said yes, is yes); None is a question that could not be answered."""
    asked, pairs = len(pairs), [pair for pair in pairs if pair]
    tp, fp, tn, fn = (sum(pair == which for pair in pairs) for which in ((1, 1), (1, 0), (0, 0), (0, 1)))

    def share(part, whole):
        return part / whole if whole else 0.0

    precision, recall = share(tp, tp + fp), share(tp, tp + fn)
    return {
        "TP": tp, "FP": fp, "TN": tn, "FN": fn, "accuracy": share(tp + tn, len(pairs)), "precision": precision,
        "recall": recall, "F1": share(2 * precision * recall, precision + recall), "yes": share(tp + fp, len(pairs)),
        "errors": asked - len(pairs),
    }  # fmt: skip


def read_lines(path, **wanted):
    """Objects of a JSONL file; ValueError with the line's number. wanted: key=type or types of its value."""
    found = []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as broken:
        raise ValueError(f"cannot read {path} ({broken}); give a JSONL file") from broken
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip("\0\r\t "):  # NULs are what a power cut leaves of the last lines
            found.append(_object(line, f"line {number} of {path}", wanted))
    if not found:
        raise ValueError(f"{path} is empty; give a JSONL file")
    return found


def _object(line, where, wanted):
    """The JSON object of a line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as broken:
        raise ValueError(f"{where} is not JSON ({broken}); mend it") from broken
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object; mend it")
    for key, kind in wanted.items():
        if not isinstance(value.get(key), kind):
            raise ValueError(f"the {key} in {where} is {value.get(key)!r}; mend it")
    return value


if __name__ == "__main__":
    sys.exit(as_command(main))
