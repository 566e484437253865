"""Measure what pruning costs: on the demo world with ground truth, or on any checkpoint against its unpruned self.

    python tools/evaluate.py accuracy                # methods x retentions, all on the same questions
    python tools/evaluate.py second                  # prune for one question, then ask another one
    python tools/evaluate.py fidelity --model DIR --image x.png --prompt "..."      # against unpruned, no labels
    python tools/evaluate.py premise --model DIR --image x.png --prompt "..."       # attention found, by layer

Every method prunes a real cache (`model.cache.RaggedCache`); nothing is masked, and bytes are those that it holds.
Each prompt is computed once. The caches of all methods and retentions are joined into one ragged batch, and the answer
is fed to that batch. Greedy decoding gives an answer exactly if each token is the most likely one after those before
it, so this is the exact match of greedy decoding (a test compares it with real generations).

accuracy and second append one line per scene to a file. A later run, with other methods too, reuses what is in it.
"""

import csv
import functools
import hashlib
import inspect
import json
import os
import re
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Generation, InputError, Sampling, load, open_checkpoint  # noqa: E402
from model.api import choose_method, note_on_settings, off_budget  # noqa: E402
from model.console import note, say  # noqa: E402
from model.flags import choose_device  # noqa: E402
from model.image import prepare, read_image  # noqa: E402
from model.lookahead import fill_lookahead, open_lookahead  # noqa: E402
from model.picture import look, pick  # noqa: E402
from model.pruning import AMOUNTS, Method, calibrated, make_method, named, parts_of, sets_budget  # noqa: E402
from model.pruning.budget import later  # noqa: E402
from model.pruning.plphp import Plphp  # noqa: E402
from model.tokenizer import build_prompt  # noqa: E402
from tools import figures, scenes  # noqa: E402
from tools.command import as_command, exit_code, flags, model_flags, number, one_of  # noqa: E402
from tools.evaluation.controls import Evidence, Like, Ranked, ValuesDropped, coded, neutral_rows, worth_of_rows  # noqa: E402
from tools.evaluation.paired import interval, mcnemar, resamples  # noqa: E402
from tools.evaluation.replay import along, asked_by, asked_with, gammas_of, replay, terciles, three_rates  # noqa: E402
from tools.evaluation.runs import Lines, progress, table  # noqa: E402
from tools.train_demo import HELD_OUT, TASKS, held_out_questions  # noqa: E402

FIRST = HELD_OUT + 100_000  # first scene: none that the demo's own table has seen, or training
RETENTIONS = (0.5, 0.3, 0.15)
IGNORED = -100


# ---------------------------------------------------------------- conditions

TABLE = (  # conditions of the committed table; --only names others, or all
    "random", "grid", "objects", "topk", "shared", "snapkv", "adakv", "fastv", "plphp as shipped", "plphp", "plphp-ada",
    "topk rows+values", "shared rows+values", "plphp ahead", "plphp ahead+grid", "topk ahead", "shared ahead",
    "topk ahead+grid", "evidence", "hindsight",
)  # fmt: skip
AT_EQUAL = 3  # percentage points: two kept fractions that differ by more are not compared
GIVEN = "given: "  # prefix of the conditions that --methods adds
LABELS = {  # condition: its name in the first table and in the picture. In backquotes: what can be given to --prune,
    # where LAST and AHEAD stand for thresholds that are fitted to the model
    "none": "unpruned",
    "random": "`random`",
    "random, same in all heads": "`random:shared=true`",
    "grid": "`grid`",
    "objects": "`objects`",
    "plphp as shipped": "`plphp`, as shipped for the demo",
    "plphp": "`plphp:query=last,cover=0,LAST`, as published",
    "plphp-ada": "`plphp-ada:query=last,cover=0,LAST`",
    "random like plphp": "control: as many tokens as PLPHP as published, at random",
    "shared like plphp": "control: as many tokens as PLPHP as published, the same in all heads",
    "topk": "`topk`",
    "shared": "`shared`",
    "topk rows": "`topk:window=32`",
    "topk rows+values": "`topk:window=32,values=true`",
    "shared rows+values": "`shared:window=32,values=true`",
    "snapkv": "`snapkv`",
    "adakv": "`adakv`",
    "fastv": "`fastv`",
    "plphp ahead": "`plphp:query=lookahead,cover=0,AHEAD`",
    "plphp ahead+grid": "`plphp:query=lookahead,cover=0.5,AHEAD`",
    "topk ahead": "`topk:query=lookahead`",
    "topk ahead+grid": "`topk:query=lookahead,cover=0.5`",
    "shared ahead": "`shared:query=lookahead`",
    "topk ahead, another question": "control: look-ahead rows of another question",
    "topk ahead, another picture": "control: look-ahead rows of another picture",
    "topk neutral rows": "control: 8 untrained look-ahead rows",
    "topk answer rows 1 to 1": "oracle: attention of the first answer token",
    "topk answer rows 1 to 4": "oracle: attention of the first 4 answer tokens",
    "topk answer rows 1 to 8": "oracle: attention of the first 8 answer tokens",
    "evidence": "oracle: the evidence first",
    "anti-evidence": "oracle: the evidence last",
    "hindsight": "oracle: what the answer attends to",
}


def conditions(thresholds, layers, retentions=RETENTIONS, specs=(), folder=None, rows=None):
    """{name: function (asked, evidence, seed) -> Method}. Names are "none" and NAME@RETENTION.

    thresholds: (alpha, beta) of PLPHP that put a third of the model's layers into each class, and the same for its
    look-ahead rows, None without rows. layers: L. seed: of random choices, another for each question. specs: more
    methods, at each retention, or once if the SPEC sets its own budget. folder: of the checkpoint, whose plphp.json
    applies to these. rows: {name: more look-ahead rows}, each tried alone and with half of the budget on a grid.
    """
    made = {"none": lambda *_: None, "plphp, defaults": _spec("plphp")}
    for f in retentions:
        made |= {f"{name}@{f}": make for name, make in _at(f, thresholds, layers, folder, rows or {}).items()}
    for spec in specs:
        for f in budgets(spec, retentions):
            made[GIVEN + spec + (f"@{f}" if f else "")] = _spec(spec, f, folder)
    return made


def _at(f, thresholds, layers, folder, rows):
    """The conditions at retention f, except for those of --methods."""
    plphp = f"plphp:{three_rates(thresholds[0])}"
    rule = make_method(plphp, f).rule

    def labelled(*names):
        return {name: _spec(label_of(name, thresholds).split("`")[1], f) for name in names}

    def seeded(spec):
        return lambda asked, evidence, seed: make_method(spec, f, settings={"seed": seed})

    def control(rule_of):
        return lambda asked, evidence, seed: Method("control", rule_of(asked, evidence, seed), {})

    def by_rows(lookahead, cover=0.0):
        return control(lambda asked, *_: Ranked(worth_of_rows(asked, lookahead), f, cover))

    def by_rows_of(other):
        return control(lambda asked, *_: Ranked(worth_of_rows(asked, asked.lookahead, asked.others[other]()), f))

    def by_answer(first=None):
        return control(lambda asked, *_: Ranked(functools.partial(asked.attention_of_fed, first=first), f))

    made = {"random": seeded("random"), "random, same in all heads": seeded("random:shared=true")}
    made |= labelled("grid") | {"objects": seeded("objects")} | labelled("topk", "shared", "snapkv", "adakv")
    for layer in (1, 2):
        rest = later(f, layer, layers)  # FastV prunes no earlier layer
        if rest > 0.05:
            made["fastv"] = _spec(f"fastv:layer={layer}", rest)
    made["plphp as shipped"] = _spec("plphp", f, folder)
    made |= {f"plphp as shipped, {kind}": _coded(made["plphp as shipped"], kind) for kind in ("int8", "fp8")}
    made |= labelled("plphp") | {"plphp dr=0.1": _spec(f"{plphp},dr=0.1", f)} | labelled("plphp-ada")
    made["random like plphp"] = control(lambda asked, evidence, seed: Like(rule, False, seed))
    made["shared like plphp"] = control(lambda *_: Like(rule, True))
    made["plphp, values dropped only"] = control(lambda *_: ValuesDropped(rule))
    made["plphp rows+values"] = _spec(f"{plphp},window=32,values=true", f)
    made |= labelled("topk rows", "topk rows+values", "shared rows+values")
    if thresholds[1]:
        made |= labelled("plphp ahead", "plphp ahead+grid", "topk ahead", "shared ahead", "topk ahead+grid")
        made |= {f"topk ahead, {other}": by_rows_of(other) for other in ("another question", "another picture")}
    made["topk neutral rows"] = control(lambda a, *_: Ranked(worth_of_rows(a, a.others["neutral rows"]()), f))
    made |= {f"topk answer rows 1 to {first}": by_answer(first) for first in (1, 4, 8)}
    for name, lookahead in rows.items():
        made |= {f"rows {name}": by_rows(lookahead), f"rows {name}+grid": by_rows(lookahead, cover=0.5)}
    made["evidence"] = control(lambda asked, evidence, seed: Evidence(evidence, f, seed))
    made["anti-evidence"] = control(lambda asked, evidence, seed: Evidence(evidence, f, seed, anti=True))
    made["hindsight"] = by_answer()
    return made


def _spec(spec, retention=None, folder=None):
    method = make_method(spec, retention, folder=folder)
    return lambda *_: method


def _coded(make, kind):
    method = coded(make(), kind)
    return lambda *_: method


def budgets(spec, retentions):
    """The retentions at which a method is measured; None if it sets its own budget."""
    return [None] if sets_budget(spec) else retentions


def parts(condition):
    """NAME@RETENTION -> (name, retention); retention is "" if the condition has none."""
    name, at, retention = condition.rpartition("@")
    return (name, retention) if at and retention.replace(".", "", 1).isdigit() else (condition, "")


def chosen(name, only):
    """Is a condition evaluated? Unpruned, and what --methods and --rows add, always is."""
    if name == "none" or name.startswith((GIVEN, "rows ")):
        return True
    return "all" in only or name in only or parts(name)[0] in only


def is_fitted(name):
    """Does a condition use the thresholds that are fitted to the model?"""
    return "@" in name and "plphp" in name and not name.startswith((GIVEN, "rows ", "plphp as shipped"))


def written_out(spec, folder):
    """A SPEC in full: with all settings if a file in the checkpoint's folder has some. InputError."""
    method = choose_method(spec, folder)
    if note_on_settings(method, folder) is None:
        return spec
    hidden = () if sets_budget(spec) else AMOUNTS  # the file's budget, which --retentions replaces
    *before, last = method.parts
    shown = replace(last, settings={k: v for k, v in last.settings.items() if k not in hidden})
    return "+".join(part.spec for part in (*before, shown))


def given_methods(args, generation):
    """{(SPEC of --methods, retention or None): Method or None}. Says whose settings come from the checkpoint's folder.

    Writes these out in args.methods, which becomes {SPEC: as it was given}.

    generation: any Generation of the checkpoint. InputError for a method that does not exist or fit the model.
    """
    folder, methods = generation.checkpoint.folder, {}
    args.methods = {written_out(spec, folder): spec for spec in args.methods}
    for spec in args.methods:
        methods |= {(spec, f): choose_method(spec, folder, f) for f in budgets(spec, args.retentions)}
    for method in filter(None, methods.values()):
        generation.check_method(method)
    for text in dict.fromkeys(note_on_settings(method, folder) for method in methods.values()):
        if text:
            say(text)
    return methods


def legend(given):
    """The SPEC of each method that a table names as it was given, for `given_methods`'s args.methods."""
    return "".join(f"\n`{name}` is `{spec}`\n" for spec, name in given.items() if name != spec)


def warn(methods, kept):
    """A note for each of `given_methods` that kept another fraction than asked for. kept: the fraction of each."""
    for ((_, f), method), share in zip(methods.items(), kept, strict=True):
        if f and (off := off_budget(method, share, f)):
            note(off)


# ---------------------------------------------------------------- the demo world


def questions_of(number):
    """(scenes, questions) of a held-out sample. One in five has two pictures."""
    return held_out_questions(number, number % 5 == 4, False, 0)


def pictures_of(checkpoint, drawn):
    """Scenes -> their `model.image.Prepared`."""
    tower = checkpoint.config.vision_config
    settings, side = checkpoint.image_settings, tower.image_size // tower.patch_size
    cls = checkpoint.config.image_tokens - tower.num_patches
    return [prepare(read_image(scenes.draw_scene(s)), settings, side, cls) for s in drawn]


def encode_scenes(checkpoint, drawn):
    """Scenes -> image tokens (n, P, C)."""
    pixels = torch.cat([picture.pixels for picture in pictures_of(checkpoint, drawn)])
    return checkpoint.model.encode_images(pixels.to(checkpoint.device, checkpoint.dtype))


def views_of(checkpoint, drawn):
    """Scenes -> the arguments of `Asked` that describe their pictures."""
    pictures = pictures_of(checkpoint, drawn)
    return {"places": [picture.layout.places for picture in pictures], "contrast": [p.contrast for p in pictures]}


def picker_of(checkpoint, drawn):
    """Scenes -> `Asked.pick`. What a method picks does not depend on the question, so it is computed once."""
    pictures, found = pictures_of(checkpoint, drawn), {}

    def pick_of(method):
        first = method.parts[0]
        if first.spec not in found:
            pixels = [picture.pixels.to(checkpoint.device, checkpoint.dtype) for picture in pictures]
            views = [look(first, checkpoint.model, p, i, pixels[i]) for i, p in enumerate(pictures)]
            found[first.spec] = tuple(zip(*(pick(first, view) for view in views), strict=True))
        return found[first.spec]

    return pick_of


def conversation(checkpoint, first, second, pictures):
    """Token ids of the prompt, ids fed after it, and the target of each step, IGNORED before the second answer.

    first, second: Questions. Without a second question the answer to the first is scored.
    """
    tokenizer = checkpoint.tokenizer
    prompt = build_prompt(first.question, pictures, "llava")
    text = f"{prompt} {first.answer}</s>"
    ids, whole = tokenizer.encode(prompt), tokenizer.encode(text)
    answer = len(ids)
    if second:
        text += f"USER: {second.question} ASSISTANT:"
        answer = len(tokenizer.encode(text))
        whole = tokenizer.encode(f"{text} {second.answer}</s>")
    assert whole[: len(ids)] == ids
    return ids, whole[len(ids) : -1], [IGNORED] * (answer - len(ids)) + whole[answer:]


@torch.inference_mode()
def evaluate_scene(checkpoint, made, number, stage):
    """All held-out questions of a scene under all conditions: one dict per question.

    results: {condition: [exact match 0|1, share of tokens >= 2 right, kept, [evidence kept per layer], [attention kept
    per layer]]}; attention kept: share of the answer's attention to the pictures that falls on kept tokens.
    bytes: K and V of [the prompt's text, its vision tokens].
    """
    drawn, questions = questions_of(number)
    image_tokens, views, result = encode_scenes(checkpoint, drawn), views_of(checkpoint, drawn), []
    pick_of = picker_of(checkpoint, drawn)
    for i, q in enumerate(questions):
        second = questions[(i + 1) % len(questions)] if stage == "second" else None
        counted = second or q
        ids, fed, targets = conversation(checkpoint, q, second, len(drawn))
        asked = asked_with(checkpoint, ids, image_tokens, fed, **views)
        asked.pick = pick_of
        another = questions[(i + 2) % len(questions)]  # differs from the second question too
        asked.others = others_of(checkpoint, ids, image_tokens, another, number, len(drawn))
        seed = 10 * number + i  # draws of its own for each question
        logits, kept, keeps = replay(asked, [make(asked, q.evidence, seed) for make in made.values()])
        targets = torch.tensor(targets, device=logits.device)
        rows = targets != IGNORED
        right = (logits[:, rows].argmax(-1) == targets[rows]).cpu()
        attention = [asked.attention_of_fed(layer) for layer in range(asked.num_layers)]
        results = {}
        for name, hits, share, layers in zip(made, right, kept, keeps, strict=True):
            shown = [_evidence_kept(k, asked.spans, counted.evidence) for k in layers]
            looked = [_attention_kept(k, asked.spans, a) for k, a in zip(layers, attention, strict=True)]
            tokens = round(hits[1:].float().mean().item(), 4)
            results[name] = [int(hits.all()), tokens, round(share, 4), shown, looked]
        row = sum(2 * k[0, :, 0].numel() * k.element_size() for _, k, _, _ in asked.layers)  # bytes of a token
        vision = sum(stop - start for start, stop in asked.spans)
        size = [row * (asked.tokens - vision), row * vision]
        result.append({"task": counted.task, "words": counted.dependent_words, "bytes": size, "results": results})
    return result


def others_of(checkpoint, ids, image_tokens, another, number, pictures):
    """{name: function () -> what a control ranks by instead}, each computed on first use.

    "another question": about the same pictures; "another picture": the same question about as many other pictures;
    "neutral rows": untrained look-ahead rows.
    """

    def of_question():
        return asked_with(checkpoint, conversation(checkpoint, another, None, pictures)[0], image_tokens, [])

    def of_picture():
        others, _ = questions_of(number + 5)
        return asked_with(checkpoint, ids, encode_scenes(checkpoint, others), [])

    found = {
        "another question": of_question, "another picture": of_picture,
        "neutral rows": lambda: neutral_rows(checkpoint),
    }  # fmt: skip
    return {name: functools.cache(make) for name, make in found.items()}


def _attention_kept(keep, spans, attention):
    """Share of the attention (Hkv, T) to pictures that falls on what is kept."""
    if keep is None:
        return 1.0
    pictures = [slice(start, stop) for start, stop in spans]
    held = sum((attention[:, s] * keep[:, s]).sum() for s in pictures)
    return round((held / sum(attention[:, s].sum() for s in pictures)).item(), 3)


def _evidence_kept(keep, spans, evidence):
    """Share of the evidence patches that a layer's heads keep, on average."""
    if keep is None:
        return 1.0
    columns = [start + p for (start, _), patches in zip(spans, evidence, strict=True) for p in patches]
    return round(keep[:, columns].float().mean().item(), 3) if columns else 1.0


@torch.inference_mode()
def thresholds(checkpoint, lookahead=None, number=100):
    """(alpha, beta): the upper and lower tercile of gamma over all layers, on scenes that are not evaluated.

    The mixture of single pictures and pairs is that of the evaluation, because gamma differs between them. lookahead:
    use the gamma of these rows instead of the last prompt row's.
    """
    found = []
    for scene in progress(range(number), "thresholds of PLPHP, scenes"):
        drawn, questions = questions_of(scene)
        image_tokens = encode_scenes(checkpoint, drawn)
        for q in questions:
            ids, *_ = conversation(checkpoint, q, None, len(drawn))
            found += gammas_of(asked_with(checkpoint, ids, image_tokens, []), lookahead)
    return terciles(found)


# ---------------------------------------------------------------- resumable runs


def fingerprint(folder):
    """Hash of all tensors in a folder, look-ahead rows included: answers of two models must not share a file."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def world():
    """Hash of the first scenes, with their pictures and questions: another one if others are drawn."""
    seen = [questions_of(number) for number in range(FIRST, FIRST + 5)]
    pictures = [scenes.draw_scene(scene).tobytes() for drawn, _ in seen for scene in drawn]
    return hashlib.sha256(repr((seen, pictures)).encode()).hexdigest()[:16]


def files_of(name):
    """The files that a condition's results depend on: methods' code, look-ahead rows or plphp.json."""
    about, _ = parts(name)
    if about.startswith("rows "):
        return [about.removeprefix("rows ").removesuffix("+grid")]
    if about.startswith(GIVEN):
        rules = [(spec.rpartition("::")[0], spec) for spec in parts_of(about.removeprefix(GIVEN))]
        return [file or inspect.getsourcefile(named(spec)[1]) for file, spec in rules if file or named(spec)[1]]
    return ["plphp.json"] if about == "plphp as shipped" else []


def sources(names, folder):
    """{file: hash} of `files_of` these conditions. folder: of the checkpoint, for its plphp.json."""
    files = dict.fromkeys(file for name in names for file in files_of(name))
    paths = {file: calibrated(folder, "plphp") if file == "plphp.json" else file for file in files}
    return {file: code(Path(path)) for file, path in paths.items() if path}


def code(path):
    """Hash of a file and, if it is Python, of the Python files beside it that it names, such as those it imports."""
    files = [path]
    for file in files:  # which grows
        words = set(re.findall(rb"\w+", file.read_bytes())) if file.suffix == ".py" else ()
        beside = [other for other in sorted(file.parent.glob("*.py")) if other.stem.encode() in words]
        files += [other for other in beside if other not in files]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


BEGINNING = b'{"mode": '  # of a file of answers
SHARED = {"mode": "the stage", "weights": "the model", "dtype": "--dtype", "world": "the demo world"}  # in a file


def open_answers(path, head):
    """The `Lines` of a file of answers: the head of each run, then its results, a line per scene.

    A file without answers begins anew. InputError if SHARED differs, or if the file holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not BEGINNING.startswith(path.read_bytes()[: len(BEGINNING)]):
        raise InputError(f"{path} is not a file of answers; give another --answers")
    lines = Lines(path)
    heads = [line for line in lines.values if "mode" in line]
    if len(heads) == len(lines.values):
        path.write_bytes(b"")
        lines, heads = Lines(path), []
    for old in heads:
        old = {"dtype": "fp32", "world": head["world"]} | old  # the first files did not say
        if changed := [what for key, what in SHARED.items() if old[key] != head[key]]:
            raise InputError(f"{changed[0]} changed since {path} was written; give another --answers, or delete it")
    if heads[-1:] != [head]:
        lines.add(head)
    return lines


def valid_answers(lines, head):
    """{scene: its questions}, with those results in the lines of a file of answers that are valid under a head.

    A question has all of the head's conditions, in their order; None instead of a result that is not there.
    """
    found, none = {}, dict.fromkeys(head["conditions"])
    for line in lines:
        if "mode" in line:
            valid = {name for name in none.keys() & line["conditions"] if inputs(line, name) == inputs(head, name)}
            continue
        questions = found.setdefault(line["scene"], [q | {"results": none} for q in line["questions"]])
        for question, more in zip(questions, line["questions"], strict=True):
            results = more["results"]
            question["results"] = question["results"] | {name: results[name] for name in valid & results.keys()}
    return found


def inputs(head, name):
    """What the results of a condition depend on, besides SHARED."""
    return [head["files"].get(file) for file in files_of(name)], head["thresholds"] if is_fitted(name) else None


worker = {}  # of a worker process: checkpoint, conditions and stage, too large to send with every scene


def start_worker(args, fitted):
    """Load the model and make the conditions; the arguments are as in `conditions_of`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    torch.set_num_threads(1)  # the tensors are too small for more
    checkpoint = load(args.model, args.dtype, args.device)
    worker.update(checkpoint=checkpoint, made=conditions_of(args, checkpoint, fitted, loaded=True), stage=args.stage)


def conditions_of(args, checkpoint, fitted, loaded=False):
    """`conditions` for the flags and thresholds. loaded: the weights are there, so those of --rows are read too."""
    language, rows = checkpoint.model.language_model, {}
    for path in args.rows:
        rows[path] = open_lookahead(path, language)
        if loaded:
            fill_lookahead(rows[path], path, language)
    layers = checkpoint.config.text_config.num_hidden_layers
    return conditions(fitted, layers, args.retentions, args.methods, checkpoint.folder, rows)


def work(task):
    """A line of a file of answers. task: number of a scene, and the names of the conditions to evaluate."""
    number, names = task
    made = {name: worker["made"][name] for name in names}
    return {"scene": number, "questions": evaluate_scene(worker["checkpoint"], made, number, worker["stage"])}


def scenes_for(questions):
    """Numbers of the first scenes that have at least so many questions."""
    numbers, count = [], 0
    while count < questions:
        numbers.append(FIRST + len(numbers))
        count += len(questions_of(numbers[-1])[1])
    return numbers


def run_scenes(args):
    """The stages accuracy and second: answer at least args.questions questions, and write the tables."""
    checkpoint = open_checkpoint(args.model)  # errors appear here once, not in each worker
    methods = given_methods(args, Generation(checkpoint, "?"))
    lookahead = checkpoint.lookahead
    fitted = (1, 0), lookahead and (1, 0)
    every = conditions_of(args, checkpoint, fitted)
    known = dict.fromkeys(parts(name)[0] for name in every)
    for name in args.only:
        if name not in known and name not in every and name != "all":
            cure = f"give --methods FILE.py::NAME for your own, or all or some of {', '.join(map(shlex.quote, known))}"
            raise InputError(f"--only: there is no method {name!r}; {cure}")
    names = [name for name in every if chosen(name, args.only)]
    if any(map(is_fitted, names)):
        checkpoint.read_weights(args.dtype, args.device)
        fitted = thresholds(checkpoint), lookahead and thresholds(checkpoint, lookahead)
    head = {"mode": args.stage, "weights": fingerprint(checkpoint.folder), "dtype": args.dtype, "world": world()}
    head |= {"thresholds": fitted, "conditions": names, "files": sources(names, checkpoint.folder)}
    head = json.loads(json.dumps(head))  # as it will be read
    path = args.answers or ROOT / "runs" / "evaluate" / f"{args.stage}.jsonl"
    answers, numbers = open_answers(path, head), scenes_for(args.questions)
    done = valid_answers(answers.values, head)
    missing = {n: [name for name in names if n not in done or not done[n][0]["results"][name]] for n in numbers}
    todo = [task for task in missing.items() if task[1]]
    if done:
        say(f"{sum(map(len, missing.values()))} of {len(names) * len(numbers)} results are not yet in {path}")
    pool = torch.multiprocessing.get_context("spawn").Pool(args.workers, start_worker, (args, fitted))
    with pool:
        for line in progress(pool.imap_unordered(work, todo), f"{args.stage}, scenes", len(todo)):
            answers.add(line)
    say(f"answers: {path}")
    done = valid_answers(answers.values, head)
    out, name = args.out or path.parent, f"pruning-{args.stage}"
    rows = summarise(head, {n: done[n] for n in numbers}, out, name, args.methods)
    kept = {(row["method"], row["retention"]): float(row["kept"]) / 100 for row in rows}
    warn(methods, [kept[GIVEN + spec, "" if f is None else str(f)] for spec, f in methods])


# ---------------------------------------------------------------- tables


class Results:
    """The answers to n questions in tensors.

    data     {condition: {"exact", "tokens", "kept": (n,), "evidence", "attention": (n, L)}}, as in `evaluate_scene`
    group    (n,) int64: which scene each question is about
    long     (n,) bool: is it a long answer?
    task     of each question
    bytes    K and V of the text and of the vision tokens, mean over questions
    """

    def __init__(self, done):
        """done: {scene: questions}."""
        flat = [(i, q) for i, scene in enumerate(sorted(done)) for q in done[scene]]
        self.group = torch.tensor([i for i, _ in flat])
        self.long = torch.tensor([q["words"] >= 6 for _, q in flat])
        self.task = [q["task"] for _, q in flat]
        self.bytes = [sum(column) / len(flat) for column in zip(*(q["bytes"] for _, q in flat), strict=True)]
        self.data = {}
        for name in flat[0][1]["results"]:
            columns = zip(*(q["results"][name] for _, q in flat), strict=True)
            keys = "exact", "tokens", "kept", "evidence", "attention"
            self.data[name] = dict(zip(keys, map(torch.tensor, columns), strict=True))
        self.weights = resamples(len(done))

    def interval(self, values, where):
        """`interval` of the values (n,) of some questions, in percent."""
        return [100 * value for value in interval(values[where], self.group[where], self.weights)]


def summarise(head, done, folder, name, given=None):
    """Print the tables of the answers and write folder/name.csv, .md and .png -> rows of the CSV.

    given: {SPEC: as it was given} of --methods; the CSV alone has the SPEC in each row.
    """
    given = given or {}
    names = {GIVEN + spec: GIVEN + short for spec, short in given.items()}
    results = Results(done)
    rows = [row_of(condition, results) for condition in results.data]
    for row in rows:
        row["label"] = label_of(names.get(row["method"], row["method"]), head["thresholds"])
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.{kind}" for kind in ("csv", "md", "png")]
    with open(files[0], "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = markdown(head, rows, results, names) + legend(given)
    files[1].write_text(text, encoding="utf-8")
    figures.pruning(rows, second=head["mode"] == "second").savefig(files[2])
    print(text)
    say(f"written: {', '.join(map(str, files))}")
    return rows


def row_of(condition, results):
    """One row of the CSV; percent, except for bytes."""
    data, long, (method, retention) = results.data, results.long, parts(condition)
    d, kept = data[condition], data[condition]["kept"].mean().item()
    row = {
        "method": method, "retention": retention, "kept": f"{100 * kept:.1f}",
        "kv bytes": round(results.bytes[0] + kept * results.bytes[1]), "kv bytes, all kept": round(sum(results.bytes)),
    }  # fmt: skip
    for label, where in (("long", long), ("short", ~long), ("all", torch.ones_like(long))):
        if where.any():
            found = (f"{value:.1f}" for value in results.interval(d["exact"], where))
            row |= dict(zip((label, f"{label} low", f"{label} high"), found, strict=True))
    lost = results.interval(d["exact"] - data["none"]["exact"], long)
    row |= dict(zip(("loss", "loss low", "loss high"), (f"{value:+.2f}" for value in lost), strict=True))
    for against, other in (("full", "none"), ("random", f"random@{retention}"), ("grid", f"grid@{retention}")):
        if other in data:
            pair = data[other]["exact"].bool()[long], d["exact"].bool()[long]
            row[f"p against {against}"] = f"{mcnemar(*pair)[2]:.2g}"
    row["tokens >= 2"] = f"{100 * d['tokens'].mean():.1f}"
    for share in ("evidence", "attention"):
        row[share] = " ".join(f"{100 * r:.0f}" for r in d[share].mean(0))
    for t in TASKS:
        where = torch.tensor([name == t for name in results.task])
        for label, key in ((t, "exact"), (f"{t}, tokens >= 2", "tokens")):
            row[label] = f"{100 * d[key][where].float().mean():.1f}" if where.any() else ""
    return row


PAIRS = (  # compared on the long answers: the first minus the second
    ("hindsight", "random"), ("evidence", "random"), ("anti-evidence", "random"), ("hindsight", "evidence"),
    ("random", "random, same in all heads"), ("grid", "random"), ("objects", "random"), ("evidence", "grid"),
    ("evidence", "objects"), ("plphp", "random like plphp"), ("plphp", "shared like plphp"), ("plphp", "random"),
    ("plphp as shipped", "random"), ("plphp as shipped", "grid"), ("plphp as shipped", "plphp"), ("plphp", "topk"),
    ("plphp ahead", "topk ahead"), ("plphp ahead+grid", "topk ahead+grid"), ("plphp ahead+grid", "grid"),
    ("topk ahead", "shared ahead"), ("topk ahead+grid", "topk ahead"),
    ("topk ahead", "topk ahead, another question"), ("topk ahead", "topk ahead, another picture"),
    ("topk neutral rows", "topk"), ("topk ahead", "random"), ("topk ahead", "grid"), ("topk ahead", "hindsight"),
    ("plphp ahead", "plphp"), ("plphp dr=0.1", "plphp"), ("plphp-ada", "plphp"),
    ("plphp, values dropped only", "plphp"),
    ("plphp as shipped, int8", "plphp as shipped"), ("plphp as shipped, fp8", "plphp as shipped"),
    ("topk rows", "topk"), ("topk rows+values", "topk rows"), ("topk rows+values", "random"),
    ("topk rows+values", "shared rows+values"), ("topk rows+values", "plphp rows+values"),
    ("topk rows+values", "snapkv"),
)  # fmt: skip
AGAINST = ("random", "grid", "objects")  # baselines of each of --methods


def label_of(name, thresholds):
    """The name of a condition in the first table and in plots, or None if it is not there; thresholds as in
    `conditions`."""
    if name.startswith(GIVEN):
        return f"{GIVEN}`{name.removeprefix(GIVEN)}`"
    label = f"`{name}`" if name.startswith("rows ") else LABELS.get(name)
    for word, fitted in zip(("LAST", "AHEAD"), thresholds, strict=True):
        if label and fitted:
            label = label.replace(word, f"{three_rates(fitted)},dr={Plphp.dr}")
    return label


def placed(rows):
    """({method: {retention: row}}, retentions), the columns of a table by method.

    Unpruned is in all columns; a method of --methods with its own budget is in the one nearest to what it kept.
    """
    columns, found = list(dict.fromkeys(row["retention"] for row in rows if row["retention"])), {}
    for row in rows:
        where = [row["retention"]]
        if not row["retention"]:
            where = sorted(columns, key=lambda column: abs(100 * float(column) - float(row["kept"])))[:1]
        for column in columns if row["method"] == "none" else where:
            found.setdefault(row["method"], {})[column] = row
    return found, columns


def short(rows):
    """Exact match of long answers, one row per method, one column per retention; 95 % intervals."""
    found, columns = placed(rows)
    labels = {row["method"]: row["label"] for row in rows if row["label"]}
    order = [name for name in dict.fromkeys((*LABELS, *labels)) if name in labels]  # those of --methods last
    lines = [[labels[name], *(_cell(found.get(name, {}).get(column), column) for column in columns)] for name in order]
    return table(["long answers right, %", *(f"{column} kept" for column in columns)], lines)


def _cell(row, column):
    """Exact match, followed by what a method of --methods kept if that is not what the column says."""
    if row is None:
        return ""
    kept = float(row["kept"])
    off = not row["retention"] or abs(kept - 100 * float(column)) > AT_EQUAL
    return _with_interval(row) + (f", {kept:.0f} % kept" if off and row["method"].startswith(GIVEN) else "")


def _with_interval(row):
    return f"{row['long']} ({float(row['long low']):.0f}–{float(row['long high']):.0f})"


def markdown(head, rows, results, names):
    """The short table, the full table, and the pairwise comparisons. names: of some methods, instead of their own."""
    (alpha, beta), ahead = head["thresholds"]
    more = f", with look-ahead rows alpha {ahead[0]}, beta {ahead[1]}" if ahead else ""
    plphp = f"PLPHP with alpha {alpha}, beta {beta}{more}; " if any(map(is_fitted, results.data)) else ""
    questions, scenes_seen = len(results.group), int(results.group.max()) + 1
    about = (
        f"{questions} questions about {scenes_seen} scenes, {int(results.long.sum())} of them with long answers; "
        f"{plphp}weights {head['weights']}."
    )
    pairs = [*differences(rows, results, names)] or [["none", *" " * 6]]
    columns = ["method", "wanted", "kept", "long answers", "all answers", "tokens >= 2"]
    lines = [
        [names.get(r["method"], r["method"]), r["retention"], r["kept"], _with_interval(r), r["all"], r["tokens >= 2"],
         r["evidence"], r["attention"]] for r in rows
    ]  # fmt: skip
    compared = ["long answers, exact match", "retention", "points", "95 %", "only the first right"]
    texts = [
        about, short(rows), table([*columns, "evidence kept", "attention kept"], lines, "lrrrrrll"),
        f"Compared where the two kept within {AT_EQUAL} points of each other:",
        table([*compared, "only the second", "p"], pairs, "lrrlrrr"),
    ]  # fmt: skip
    return "\n\n".join(texts) + "\n"


def differences(rows, results, names):
    """Rows of the table of PAIRS, and of each of --methods against the baselines."""
    found, columns = placed(rows)
    own = [(name, other) for name in found if name.startswith(GIVEN) for other in AGAINST]
    for a, b, column in ((a, b, column) for a, b in (*PAIRS, *own) for column in columns):
        pair = [found.get(name, {}).get(column) for name in (a, b)]
        if None in pair:
            continue
        one, two = (results.data["@".join(filter(None, (row["method"], row["retention"])))] for row in pair)
        if abs(100 * one["kept"].mean().item() - 100 * two["kept"].mean().item()) > AT_EQUAL:
            continue
        mean, low, high = results.interval(one["exact"] - two["exact"], results.long)
        first, second, p = mcnemar(*(d["exact"][results.long].bool() for d in (one, two)))
        cells = column, f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}", first, second, f"{p:.2g}"
        yield [f"{names.get(a, a)} against {b}", *cells]


# ---------------------------------------------------------------- any checkpoint, without labels


def answered(args, default):
    """The finished unpruned Generation of --prompt and --image, and `given_methods`; default: methods to measure."""
    checkpoint = open_checkpoint(args.model)
    args.methods = args.methods or [spec for spec in default if checkpoint.lookahead or "lookahead" not in spec]
    reference = Generation(checkpoint, args.prompt, args.image, Sampling(args.max_new_tokens), backend=args.backend)
    methods = given_methods(args, reference)
    checkpoint.read_weights(args.dtype, args.device)
    answer = "".join(reference)
    if len(reference.token_ids) < 2 and args.stage == "premise":
        raise InputError("the answer has fewer than two tokens, so none attends to the picture; ask for more")
    say(f"unpruned: {answer}")
    return reference, methods


def premise(args):
    """Print, by layer, the share of the answer's attention to pictures that falls on what each method keeps."""
    reference, methods = answered(args, PREMISE)
    asked = asked_by(reference, reference.token_ids[:-1])
    attention = [asked.attention_of_fed(layer) for layer in range(asked.num_layers)]
    lines = []
    for f in (None, *args.retentions):
        rows = [(args.methods[spec], method) for (spec, retention), method in methods.items() if retention == f]
        if f is not None:
            best = Method("told", Ranked(asked.attention_of_fed, f), {})
            rows.append(("told what the answer attends to", best))
        for label, method in rows:
            (share,), (keeps,) = replay(asked, [method])[1:]
            found = [100 * _attention_kept(k, asked.spans, a) for k, a in zip(keeps, attention, strict=True)]
            numbers = [f"{x:.0f}" for x in (100 * share, sum(found) / len(found), *found)]
            lines.append([label if f is None else f"{label}, {f:g} asked for", *numbers])
    layers = (f"layer {i}" for i in range(len(attention)))
    print(table(["attention of the answer found, %", "kept, %", "mean", *layers], lines))
    print(legend(args.methods))
    print(
        "A diagnostic, not a verdict: a ranking that finds more of the attention need not answer better.\n"
        "The verdict is `evaluate.py fidelity`, against random and grid at equal bytes."
    )


def fidelity(args):
    """Print how far each method is from the unpruned answer: share of equal tokens, first divergence, KL."""
    reference, methods = answered(args, FIDELITY)
    lines, results = [], along(reference, list(methods.values()), args.batch)
    for (spec, f), found in zip(methods, results, strict=True):
        where = "never" if found["diverges"] is None else f"token {found['diverges'] + 1}"
        kept, same = (f"{100 * found[what]:.1f} %" for what in ("kept", "same"))
        kl = (f"{value:.4f}" for value in (found["kl"].mean(), found["kl"].max()))
        lines.append([args.methods[spec], "" if f is None else f, kept, same, where, *kl])
    pictures = f"{reference.vision_tokens} vision tokens of {len(args.image)} pictures"
    print(f"{len(reference.token_ids)} tokens, {pictures}\n")
    print(table(["method", "retention", "kept", "same token", "first divergence", "KL mean", "KL max"], lines))
    print(end=legend(args.methods))
    warn(methods, [found["kept"] for found in results])


# ---------------------------------------------------------------- command

FIDELITY = ["random", "grid", "objects", "shared", "snapkv", "plphp"]  # default --methods
PREMISE = ["topk", "topk:window=32", "topk:window=32,values=true", "topk:query=lookahead", "random", "grid"]
STAGES = {"accuracy": run_scenes, "second": run_scenes, "fidelity": fidelity, "premise": premise}
FLAGS = {  # of some stages; the others refuse them
    ("accuracy", "second"): ("questions", "only", "rows", "answers", "out", "workers"),
    ("fidelity", "premise"): ("image", "prompt", "max_new_tokens", "backend"),
    ("fidelity",): ("batch",),
}


def parser():
    p = model_flags(flags(__doc__), dtype="fp32")
    whole, retention = number(int, 1), number(float, 0, 1, open_low=True)
    # fmt: off
    p.add_argument("stage", choices=STAGES)
    p.add_argument("--methods", nargs="+", metavar="SPEC", default=[],
                   help="methods to measure, as for run.py's --prune. accuracy, second: besides those of --only; "
                        f"fidelity: default {' '.join(FIDELITY)}; premise: default {' '.join(PREMISE)}")
    p.add_argument("--retentions", nargs="+", type=retention, default=RETENTIONS, metavar="F",
                   help="fractions of the vision tokens to keep, for the methods whose SPEC sets no budget "
                        f"(default {' '.join(map(str, RETENTIONS))})")
    group = p.add_argument_group("accuracy, second")
    group.add_argument("--questions", type=whole, default=10000, metavar="N", help="at least so many (default 10000)")
    group.add_argument("--only", nargs="+", metavar="NAME", default=TABLE,
                       help="methods of the evaluation to measure, or all; a wrong name lists every NAME. The unpruned "
                            "model is always measured. The default is the committed table: "
                            + ", ".join(f"'{name}'" if " " in name else name for name in TABLE))
    group.add_argument("--rows", nargs="+", metavar="FILE", default=[],
                       help="files of look-ahead rows (tools/train_lookahead.py) to compare")
    group.add_argument("--answers", type=Path, metavar="FILE",
                       help="file of the answers (default runs/evaluate/STAGE.jsonl)")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder of the tables (default beside the answers)")
    group.add_argument("--workers", type=whole, default=1 if torch.cuda.is_available() else os.cpu_count() or 1,
                       metavar="N", help="processes (default one per core; with CUDA one)")
    group = p.add_argument_group("fidelity, premise")
    group.add_argument("--image", nargs="+", metavar="PATH", help="pictures")
    group.add_argument("--prompt", metavar="TEXT", help="the question")
    group.add_argument("--max-new-tokens", type=whole, default=64, metavar="N", help="longest answer (default 64)")
    group.add_argument("--backend", type=one_of("auto", "triton", "torch"), default="auto", metavar="NAME",
                       help="%(type)s (default auto)")
    group.add_argument("--batch", type=whole, default=8, metavar="N",
                       help="fidelity: caches that are decoded together (default 8)")
    # fmt: on
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    for stages, names in FLAGS.items():
        for name in names:
            if args.stage not in stages and getattr(args, name) != p.get_default(name):
                p.error(f"{args.stage} does not take --{name.replace('_', '-')}; leave it out")
    if args.out and args.out.exists() and not args.out.is_dir():
        p.error(f"--out {args.out} is a file; give a folder")
    if args.stage in ("fidelity", "premise") and not (args.prompt and args.image):
        p.error(f"{args.stage} needs --image and --prompt; give both")
    args.retentions = list(dict.fromkeys(args.retentions))
    resumes = STAGES[args.stage] is run_scenes
    kept = "the answers so far are kept, the same command resumes" if resumes else "nothing is kept"
    return exit_code(run, args, interrupted=f"interrupted; {kept}")


def run(args):
    args.device = choose_device(args.device)
    STAGES[args.stage](args)


if __name__ == "__main__":
    sys.exit(as_command(main))
