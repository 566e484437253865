"""Score answers to POPE (arXiv 2305.10355), yes/no questions about objects, by LLaVA's own rule.

    python tools/score_pope.py --questions llava_pope_test.jsonl --answers answers.jsonl --annotations coco/

An answer is "no" if its first sentence, without commas, contains the word No, no or not; any other answer is "yes".
Labels are the "label" field of the question file, or files coco_pope_<category>.json in the folder --annotations, whose
lines are in the order of that category's questions. The table has a row per category: counts with "yes" as positive,
accuracy, precision, recall, F1, share of yes answers, and errors. Errors are questions that could not be answered
(metadata.error); all other columns exclude them.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.command import as_command, flags  # noqa: E402


def main(argv=None):
    p = flags(__doc__)
    p.add_argument("--questions", "--question-file", required=True, metavar="FILE.jsonl")
    p.add_argument("--answers", "--result-file", required=True, metavar="FILE.jsonl")
    p.add_argument("--annotations", "--annotation-dir", type=Path, metavar="DIR")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = p.parse_args(argv)
    try:
        questions = read_lines(args.questions, question_id=(int, str), text=str, category=(str, type(None)))
        answers = read_lines(args.answers, question_id=(int, str), text=str)
        scores = score(questions, answers, args.annotations)
    except ValueError as wrong:
        p.error(str(wrong))
    errors = list(scores.values())[-1]["errors"]
    if errors:
        print(f"note: {errors} questions could not be answered (metadata.error); scores exclude them", file=sys.stderr)
    if args.json:
        print(json.dumps(scores))
    else:
        show(scores)
    return 0


def show(scores):
    """Print the table, with a column of errors only if there are any."""
    names = [name for name in next(iter(scores.values())) if name != "errors" or any(r[name] for r in scores.values())]
    print(f"{'category':12}" + "".join(f"{name:>11}" for name in names))
    for category, row in scores.items():
        cells = (f"{row[n]:11d}" if isinstance(row[n], int) else f"{row[n]:11.4f}" for n in names)
        print(f"{category:12}" + "".join(cells))


def score(questions, answers, annotations=None):
    """{category: row of counts and rates}; several categories are followed by "all"."""
    said = {}  # an answer replaces an earlier error
    for answer in sorted(answers, key=failed):
        before = said.setdefault(answer["question_id"], answer)
        if before is not answer and not failed(answer):
            raise ValueError(f"question {answer['question_id']} has two answers; score one run, with unique ids")
    by_category, pairs = {}, {}
    for question in questions:
        by_category.setdefault(question.get("category") or "(none)", []).append(question)
    for category, asked in by_category.items():
        pairs[category] = []
        for question, label in zip(asked, labels(category, asked, annotations), strict=True):
            answer = said.get(question["question_id"])
            if answer is None:
                raise ValueError(f"question {question['question_id']} has no answer; finish the run first")
            pairs[category].append(None if failed(answer) else (is_yes(answer["text"]), label))
    if len(pairs) > 1:
        if "all" in pairs:
            raise ValueError('a category is called "all", which names the total; rename it')
        pairs["all"] = [pair for row in pairs.values() for pair in row]
    if not any(any(row) for row in pairs.values()):
        raise ValueError("no question could be answered; fix the cause given in metadata.error and run again")
    return {category: rates(found) for category, found in pairs.items()}


def failed(answer):
    """Does the line hold an error instead of an answer?"""
    about = answer.get("metadata")
    return isinstance(about, dict) and bool(about.get("error"))


def labels(category, asked, annotations):
    """Labels of a category's questions, True for "yes"."""
    rows = asked
    if annotations is not None:
        rows = read_lines(annotations / f"coco_pope_{category}.json", text=(str, type(None)))
        pairs = zip(asked, rows, strict=False)
        if len(rows) != len(asked) or not all(q["text"].startswith(row.get("text") or "") for q, row in pairs):
            raise ValueError(f"the questions of {category} do not match its labels; give files of one release")
    for row in rows:
        if row.get("label") not in ("yes", "no"):
            raise ValueError(f"label {row.get('label')!r} is neither yes nor no; give --annotations DIR")
    return [row["label"] == "yes" for row in rows]


def is_yes(text):
    """Is the answer "yes" by LLaVA's rule?"""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def rates(pairs):
    """Counts and rates of (said yes, is yes); None is a question that could not be answered."""
    counted = [pair for pair in pairs if pair]
    tp, fp, tn, fn = (counted.count(which) for which in ((1, 1), (1, 0), (0, 0), (0, 1)))

    def share(part, whole):
        return part / whole if whole else 0.0

    precision, recall = share(tp, tp + fp), share(tp, tp + fn)
    return {
        "TP": tp, "FP": fp, "TN": tn, "FN": fn, "accuracy": share(tp + tn, len(counted)), "precision": precision,
        "recall": recall, "F1": share(2 * precision * recall, precision + recall), "yes": share(tp + fp, len(counted)),
        "errors": len(pairs) - len(counted),
    }  # fmt: skip


def read_lines(path, **wanted):
    """Objects of a JSONL file; ValueError with the line number. wanted: key=type, or types, of its value."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as broken:
        raise ValueError(f"cannot read {path} ({broken}); give a JSONL file") from broken
    # a power cut can leave NULs in place of the last lines
    found = [_object(line, f"line {n} of {path}", wanted) for n, line in enumerate(lines, 1) if line.strip("\0\r\t ")]
    if not found:
        raise ValueError(f"{path} is empty; give a JSONL file")
    return found


def _object(line, where, wanted):
    """The JSON object of a line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as broken:
        raise ValueError(f"{where} is not JSON ({broken}); fix it") from broken
    for key, kind in wanted.items():
        if not isinstance(value, dict) or not isinstance(value.get(key), kind):
            found = repr(value.get(key)) if isinstance(value, dict) else "no JSON object"
            raise ValueError(f"the {key} in {where} is {found}; fix it")
    return value


if __name__ == "__main__":
    sys.exit(as_command(main))
