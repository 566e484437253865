"""Measure what pruning costs: on the demo world with ground truth, or on any checkpoint against its unpruned self.

    python tools/evaluate.py accuracy                # methods x retentions, all on the same questions
    python tools/evaluate.py second                  # prune for one question, then ask another one
    python tools/evaluate.py fidelity --model DIR --image x.png --prompt "..."      # against unpruned, no labels
    python tools/evaluate.py premise --model DIR --image x.png --prompt "..."       # attention found, by layer

Every method prunes a real cache (`model.cache.RaggedCache`); nothing is masked, and bytes are those that it holds.
Each prompt is computed once. The caches of all methods and retentions are joined into one ragged batch, and the answer
is fed to that batch. Greedy decoding gives an answer exactly if each token is the most likely one after those before
it, so this is the exact match of greedy decoding (a test compares it with real generations).

accuracy and second append one line per scene to a file; an interrupted run continues from there.
"""

import argparse
import csv
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import Generation, InputError, Sampling, load, open_checkpoint  # noqa: E402
from model.api import off_budget  # noqa: E402
from model.checkpoint import find_folder  # noqa: E402
from model.console import as_command, say  # noqa: E402
from model.flags import choose_device  # noqa: E402
from model.image import contrast_of, normalise, places_of, read_image, to_square  # noqa: E402
from model.lookahead import fill_lookahead, open_lookahead  # noqa: E402
from model.pruning import (  # noqa: E402
    ALIASES,
    AMOUNTS,
    METHODS,
    Method,
    MethodError,
    calibrated,
    make_method,
    named,
    sets_budget,
)  # fmt: skip
from model.pruning.plphp import Plphp  # noqa: E402
from model.tokenizer import build_prompt  # noqa: E402
from tools import figures, scenes  # noqa: E402
from tools.calibrate import gammas_of  # noqa: E402
from tools.controls import Evidence, Like, Ranked, ValuesDropped, neutral_rows, worth_of_rows  # noqa: E402
from tools.replay import along, asked_by, asked_with, replay  # noqa: E402
from tools.train_demo import HELD_OUT, TASKS, held_out_questions  # noqa: E402

FIRST = HELD_OUT + 100_000  # first scene: none that the demo's own table has seen, or training
RETENTIONS = (0.5, 0.3, 0.15)
IGNORED = -100
PERIOD = 10  # seconds between two lines of progress


# ---------------------------------------------------------------- conditions

TABLE = (  # conditions of the committed table; --only names others, or all
    "random", "grid", "objects", "topk", "shared", "snapkv", "adakv", "fastv", "plphp as shipped", "plphp", "plphp-ada",
    "topk rows+values", "shared rows+values", "plphp ahead", "plphp ahead+grid", "topk ahead", "shared ahead",
    "topk ahead+grid", "evidence", "hindsight",
)  # fmt: skip
AT_EQUAL = 3  # percentage points: two kept fractions that differ by more are not compared
GIVEN = "given: "  # prefix of the conditions that --methods adds
AHEAD = "query=lookahead"
ROWS_VALUES = "window=32,values=true"  # rank by all text rows behind the picture, times the norms of the values


def conditions(thresholds, layers, retentions=RETENTIONS, specs=(), folder=None, rows=None):
    """{name: function (asked, evidence, seed) -> Method}. Names are "none" and NAME@RETENTION.

    thresholds: (alpha, beta) of PLPHP that put a third of the model's layers into each class, and the same for its
    look-ahead rows, None without rows. layers: L. seed: of random choices, another for each question. specs: more
    methods, at each retention, or once if the SPEC sets its own budget. folder: of the checkpoint, whose plphp.json
    applies to these. rows: {name: more look-ahead rows}, each tried alone and with half of the budget on a grid.
    """
    made = {"none": lambda *_: None, "plphp, defaults": _spec("plphp")}
    plphp, ahead = (t and three_rates(t) for t in thresholds)
    for f in retentions:
        named = {
            "random": lambda asked, evidence, seed, f=f: make_method(f"random:seed={seed}", f),
            "random, same in all heads": lambda asked, evidence, seed, f=f: make_method(
                f"random:shared=true,seed={seed}", f
            ),
        }
        named["grid"] = _spec("grid", f)
        named["objects"] = lambda asked, evidence, seed, f=f: make_method(f"objects:seed={seed}", f)
        named |= {name: _spec(name, f) for name in ("topk", "shared", "snapkv", "adakv")}
        for layer in (2, 1):  # FastV prunes no earlier layer, so the later ones keep less
            rest = (layers * f - layer) / (layers - layer)
            if rest > 0.05:
                named["fastv"] = _spec(f"fastv:layer={layer}", rest)
                break
        named["plphp as shipped"] = _spec("plphp", f, folder)
        named["plphp"] = _spec(f"plphp:{plphp}", f)
        named["plphp dr=0.1"] = _spec(f"plphp:{plphp},dr=0.1", f)
        named["plphp-ada"] = _spec(f"plphp-ada:{plphp}", f)
        named["random like plphp"] = _obeying(Like, f"plphp:{plphp}", f, shared=False)
        named["shared like plphp"] = _obeying(Like, f"plphp:{plphp}", f, shared=True)
        named["plphp, values dropped only"] = _obeying(ValuesDropped, f"plphp:{plphp}", f)
        named["plphp rows+values"] = _spec(f"plphp:{ROWS_VALUES},{plphp}", f)
        named["topk rows"] = _spec("topk:window=32", f)
        named["topk rows+values"] = _spec(f"topk:{ROWS_VALUES}", f)
        named["shared rows+values"] = _spec(f"shared:{ROWS_VALUES}", f)
        if ahead:
            named["plphp ahead"] = _spec(f"plphp:{AHEAD},{ahead}", f)
            named["plphp ahead+grid"] = _spec(f"plphp:{AHEAD},{ahead},cover=0.5", f)
            named["topk ahead"] = _spec(f"topk:{AHEAD}", f)
            named["shared ahead"] = _spec(f"shared:{AHEAD}", f)
            named["topk ahead+grid"] = _spec(f"topk:{AHEAD},cover=0.5", f)
            for other in ("another question", "another picture"):
                named[f"topk ahead, {other}"] = _ranked(
                    f, lambda a, other=other: worth_of_rows(a, a.lookahead, a.others[other]())
                )
        named["topk neutral rows"] = _ranked(f, lambda asked: worth_of_rows(asked, asked.others["neutral rows"]()))
        for steps in (1, 4, 8):
            named[f"topk answer rows 1 to {steps}"] = _ranked(
                f, lambda asked, steps=steps: functools.partial(asked.attention_of_fed, first=steps)
            )
        for name, lookahead in (rows or {}).items():
            for cover in (0.0, 0.5):
                named[f"rows {name}" + "+grid" * (cover > 0)] = _ranked(
                    f, lambda asked, lookahead=lookahead: worth_of_rows(asked, lookahead), cover
                )
        for name, anti in (("evidence", False), ("anti-evidence", True)):
            named[name] = lambda asked, evidence, seed, f=f, anti=anti: Method(
                "evidence", Evidence(evidence, f, seed, anti), {}
            )
        named["hindsight"] = _ranked(f, lambda asked: asked.attention_of_fed)
        made |= {f"{name}@{f}": make for name, make in named.items()}
    for spec in specs:
        if sets_budget(spec):
            made[GIVEN + spec] = _spec(spec, folder=folder)
        else:
            made |= {f"{GIVEN}{spec}@{f}": _spec(spec, f, folder) for f in retentions}
    return made


def three_rates(thresholds):
    """Settings of PLPHP for fitted (alpha, beta), in the words of a SPEC."""
    return f"alpha={thresholds[0]},beta={thresholds[1]},skip=0"


def _spec(spec, retention=None, folder=None):
    method = make_method(spec, retention, folder=folder)
    return lambda *_: method


def _ranked(retention, worth, cover=0.0):
    """What each head attends to most by worth(asked), a function for `Ranked`."""

    def make(asked, evidence, seed):
        rule = Ranked(asked and worth(asked), retention, cover)  # asked is None where only the name is needed
        return Method("ranked", rule, {"retention": retention})

    return make


def _obeying(kind, spec, retention, **options):
    """A rule of tools/controls.py that modifies the choice of the method that a SPEC names."""
    method = make_method(spec, retention)

    def make(asked, evidence, seed):
        more = options | ({"seed": seed} if kind is Like else {})
        return dataclasses.replace(method, name=kind.__name__, rule=kind(method.rule, **more))

    return make


def label_specs(specs, folder, taken=()):
    """{SPEC of --methods: its name in tables}: as typed, but with the name of a file instead of its path.

    With all settings (`Method.spec`) where the checkpoint's own apply, or where the name is in `taken`: the methods of
    the table, whose settings differ. As typed where two names would be equal.
    """
    labels = {}
    for spec in specs:
        labels[spec] = _without_folder(spec)
        if own_settings(spec, folder) or labels[spec] in taken:
            method = make_method(spec, folder=folder)
            settings = {k: v for k, v in method.settings.items() if k not in AMOUNTS or sets_budget(spec)}
            labels[spec] = _without_folder(dataclasses.replace(method, settings=settings).spec)
    often = Counter(labels.values())
    return {spec: label if often[label] == 1 else spec for spec, label in labels.items()}


def _without_folder(spec):
    file, twice, rest = spec.rpartition("::")
    return Path(file).name + twice + rest


def own_settings(spec, folder):
    """The file with the checkpoint's own settings that a SPEC uses, or None."""
    return calibrated(folder, named(spec)[0])


def say_own_settings(specs, folder):
    """Say on stderr which SPECs use settings of the checkpoint."""
    for spec in specs:
        file = own_settings(spec, folder)
        if file:
            say(f"{spec} uses the settings in {file}; explicit settings override them")


def parts(condition):
    """NAME@RETENTION -> (name, retention); retention is "" if the condition has none."""
    name, at, retention = condition.rpartition("@")
    return (name, retention) if at and retention.replace(".", "", 1).isdigit() else (condition, "")


# ---------------------------------------------------------------- the demo world


def pixels_of(checkpoint, drawn):
    """Scenes -> pixel values (n, 3, S, S)."""
    settings = checkpoint.image_settings
    pictures = [to_square(read_image(scenes.draw_scene(s)).image, settings) for s in drawn]
    return torch.stack([normalise(p, settings) for p in pictures])


def encode_scenes(checkpoint, drawn):
    """Scenes -> image tokens (n, P, C)."""
    return checkpoint.model.encode_images(pixels_of(checkpoint, drawn).to(checkpoint.device, checkpoint.dtype))


def views_of(checkpoint, drawn):
    """Scenes -> the arguments of `Asked` that describe their pictures."""
    tower, tokens = checkpoint.config.vision_config, checkpoint.config.image_tokens
    side, pixels = tower.image_size // tower.patch_size, pixels_of(checkpoint, drawn)
    return {
        "places": [places_of(side, tokens) for _ in drawn],
        "contrast": [contrast_of(p[None], side, tokens) for p in pixels],
    }


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
def evaluate_scene(checkpoint, made, number, mode):
    """All held-out questions of a scene under all conditions: one dict per question.

    results: {condition: [exact match 0|1, share of tokens >= 2 right, kept, [evidence kept per layer], [attention kept
    per layer]]}; attention kept: share of the answer's attention to the pictures that falls on kept tokens.
    bytes: K and V of [the prompt's text, its vision tokens].
    """
    drawn, questions = held_out_questions(number, is_pair(number), False, 0)
    image_tokens, views, result = encode_scenes(checkpoint, drawn), views_of(checkpoint, drawn), []
    for i, q in enumerate(questions):
        second = questions[(i + 1) % len(questions)] if mode == "second" else None
        counted = second or q
        ids, fed, targets = conversation(checkpoint, q, second, len(drawn))
        asked = asked_with(checkpoint, ids, image_tokens, fed, **views)
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
        others, _ = held_out_questions(number + 5, pictures > 1, False, 0)
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

    With them as many layers keep more as keep less, so the mean is the wanted fraction. The mixture of single pictures
    and pairs is that of the evaluation, because gamma differs between them. lookahead: use the gamma of these rows
    instead of the last prompt row's.
    """
    found, said = [], time.monotonic()
    for scene in range(number):
        if time.monotonic() > said + PERIOD:
            said = time.monotonic()
            say(f"thresholds of PLPHP: {scene}/{number} scenes")
        drawn, questions = held_out_questions(scene, is_pair(scene), False, 0)
        image_tokens = encode_scenes(checkpoint, drawn)
        for q in questions:
            ids, fed, _ = conversation(checkpoint, q, None, len(drawn))
            found += gammas_of(asked_with(checkpoint, ids, image_tokens, fed[:0]), lookahead)
    found.sort()
    return round(found[2 * len(found) // 3], 3), round(found[len(found) // 3], 3)


def is_pair(scene):
    """Does a scene have two pictures? One in five has."""
    return scene % 5 == 4


# ---------------------------------------------------------------- resumable runs


def fingerprint(folder):
    """Hash of all tensors in a folder, look-ahead rows included: answers of two models must not share a file."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def sources(specs, folder):
    """{file: hash} of other inputs: the model's plphp.json and the files of --methods FILE.py::NAME."""
    beside = [path for path in (calibrated(folder, name) for name in METHODS) if path]
    own = [spec.rpartition("::")[0] for spec in specs if "::" in spec]  # by full path: two files may share a name
    paths = {path.name: path for path in beside} | {path: Path(path) for path in own}
    return {name: _digest(path) for name, path in paths.items()}


def _digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def open_answers(path, head):
    """Questions already answered, by scene. Drops an incomplete last line, and a file without answers.

    InputError for answers under another head, or if the file holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.read_bytes() if path.exists() else b""
    if not whole.startswith(HEAD[: len(whole)]):
        raise InputError(f"{path} is not a file of answers; give another --answers")
    end = whole.rfind(b"\n") + 1
    lines = [json.loads(line) for line in whole[:end].splitlines()]
    if len(lines) < 2:
        path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        return {}
    changed = changes(lines[0], json.loads(json.dumps(head)))
    if changed:
        raise InputError(f"{path} holds answers of another run ({changed}); give another --answers, or delete the file")
    os.truncate(path, end)
    return {line["scene"]: line["questions"] for line in lines[1:]}


HEAD = b'{"mode": '  # beginning of a file of answers


def changes(old, new):
    """What differs between two heads, in words; empty if nothing does."""
    found = []
    if old["mode"] != new["mode"]:
        found.append(f"of {old['mode']}")
    if old["weights"] != new["weights"]:
        found.append("other weights")
    if old["thresholds"] != new["thresholds"]:
        found.append("other thresholds of PLPHP")
    for what, a, b in (("without", old, new), ("with", new, old)):
        known = {parts(name)[0] for name in a["conditions"]}
        names = [name for name in b["conditions"] if name not in a["conditions"]]
        names = dict.fromkeys(name if parts(name)[0] in known else parts(name)[0] for name in names)
        if names:
            found.append(f"{what} {', '.join(name.removeprefix(GIVEN) for name in names)}")
    if not found and old["conditions"] != new["conditions"]:
        found.append("methods in another order")
    files = old["files"] | new["files"]
    found += [f"{name} has changed" for name in files if old["files"].get(name) != new["files"].get(name)]
    return "; ".join(found)


worker = {}  # of a worker process: checkpoint and conditions, too large to send with every scene


def start_worker(model, device, dtype, thresholds, mode, only, retentions, specs, rows):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    torch.set_num_threads(1)  # the tensors are too small for more
    checkpoint = load(model, dtype, device)
    layers = checkpoint.config.text_config.num_hidden_layers
    language = checkpoint.model.language_model
    more = {path: open_lookahead(path, language) for path in rows}
    for path, lookahead in more.items():
        fill_lookahead(lookahead, path, language)
    made = conditions(thresholds, layers, retentions, specs, checkpoint.folder, more)
    worker.update(checkpoint=checkpoint, mode=mode, made={k: v for k, v in made.items() if chosen(k, only)})


def chosen(name, only):
    """Is a condition evaluated? Unpruned, and what --methods and --rows add, always is."""
    if name == "none" or name.startswith((GIVEN, "rows ")):
        return True
    return "all" in only or name in only or parts(name)[0] in only


def is_fitted(name):
    """Does a condition use the thresholds that are fitted to the model?"""
    return "@" in name and "plphp" in name and not name.startswith((GIVEN, "rows ", "plphp as shipped"))


def of_today(name):
    """A condition with the current name of its method."""
    first, space, rest = name.partition(" ")
    first, at, retention = first.partition("@")
    return ALIASES.get(first, first) + at + retention + space + rest


def work(number):
    return number, evaluate_scene(worker["checkpoint"], worker["made"], number, worker["mode"])


def scenes_for(questions):
    """Numbers of the first scenes that have at least so many questions."""
    numbers, count = [], 0
    while count < questions:
        numbers.append(FIRST + len(numbers))
        count += len(held_out_questions(numbers[-1], is_pair(numbers[-1]), False, 0)[1])
    return numbers


def run_scenes(args, path):
    """Answer at least args.questions questions -> (head, {scene: questions}, {condition: function as in `conditions`}).

    MethodError if a method raises an exception.
    """
    checkpoint = open_checkpoint(args.model)  # errors appear here once, not in each worker
    text = checkpoint.config.text_config
    lookahead = checkpoint.lookahead
    every = conditions(
        ((1, 0), lookahead and (1, 0)), text.num_hidden_layers, args.retentions, args.methods, checkpoint.folder,
        {path: open_lookahead(path, checkpoint.model.language_model) for path in args.rows},
    )  # fmt: skip
    args.only = [of_today(name) for name in args.only]
    known = dict.fromkeys(parts(name)[0] for name in every)
    for name in args.only:
        if name not in known and name not in every and name != "all":
            raise InputError(f"--only: there is no method {name!r}; use all, or some of {', '.join(known)}")
    args.only = args.only or list(TABLE)
    for method in {id(m): m for m in (every[name](None, (), 0) for name in every if name.startswith(GIVEN))}.values():
        if method:
            method.check(text.num_hidden_layers, text.num_key_value_heads)
    say_own_settings(args.methods, checkpoint.folder)
    names = [name for name in every if chosen(name, args.only)]
    found = ((1, 0), lookahead and (1, 0))
    if any(map(is_fitted, names)):
        say(f"{args.stage}: fitting the thresholds of PLPHP")
        checkpoint.read_weights(args.dtype, args.device)
        found = thresholds(checkpoint), lookahead and thresholds(checkpoint, lookahead)
    head = {"mode": args.stage, "weights": fingerprint(checkpoint.folder), "thresholds": found, "conditions": names}
    head["files"] = sources(args.methods, checkpoint.folder) | {path: _digest(path) for path in args.rows}
    done, numbers = open_answers(path, head), scenes_for(args.questions)
    todo = [n for n in numbers if n not in done]
    setup = (
        str(checkpoint.folder), args.device, args.dtype, found, args.stage, args.only, args.retentions, args.methods,
        args.rows,
    )  # fmt: skip
    pool = torch.multiprocessing.get_context("spawn").Pool(args.workers, start_worker, setup)
    with open(path, "a", encoding="utf-8") as file, pool:
        for number, questions in with_progress(pool.imap_unordered(work, todo), len(todo), args.stage):
            done[number] = questions
            file.write(json.dumps({"scene": number, "questions": questions}) + "\n")
            file.flush()
    return head, {n: done[n] for n in numbers}, every


def with_progress(answers, number, stage, every=PERIOD):
    """The answers of a pool, `number` of them. A line on stderr at the end, and before that every so many seconds."""
    started = said = time.monotonic()
    for i in range(1, number + 1):
        while True:
            try:
                answer = answers.next(timeout=max(0, said + every - time.monotonic()))
                break
            except multiprocessing.TimeoutError:
                said = _say_progress(stage, i - 1, number, started)
        yield answer
        if i == number or time.monotonic() >= said + every:
            said = _say_progress(stage, i, number, started)


def _say_progress(stage, i, number, started):
    now = time.monotonic()
    left = f"{(now - started) / i * (number - i) / 60:.1f} min left" if i else "starting"
    say(f"{stage}: {i}/{number} scenes, {left}")
    return now


# ---------------------------------------------------------------- tables


def columns_of(done):
    """Long answers only, all, and each task: {group: {condition: tensors}} with the scene of each question."""
    flat = [(scene, q) for scene, questions in sorted(done.items()) for q in questions]
    place = {scene: i for i, scene in enumerate(sorted(done))}
    group = torch.tensor([place[scene] for scene, _ in flat])
    long = torch.tensor([q["words"] >= 6 for _, q in flat])
    task = [q["task"] for _, q in flat]
    names = list(flat[0][1]["results"])
    data = {}
    for name in names:
        rows = [q["results"][name] for _, q in flat]
        data[name] = {
            "exact": torch.tensor([r[0] for r in rows]),
            "tokens": torch.tensor([r[1] for r in rows]),
            "kept": torch.tensor([r[2] for r in rows]),
            "evidence": torch.tensor([r[3] for r in rows]),
            "attention": torch.tensor([r[4] for r in rows]),
        }
    return data, group, long, task


def summarise(head, done, folder, name, labels=None, made=None):
    """Print the tables of the answers and write folder/name.csv, .md and .png.

    labels: of --methods, as in `label_specs`. made: the conditions, to say on stderr which missed their budget.
    """
    from tools.paired import resamples

    data, group, long, task = columns_of(done)
    weights, sizes = resamples(int(group.max()) + 1), mean_bytes(done)
    rows = [row_of(condition, data, group, long, task, weights, sizes) for condition in data]
    for row in rows:
        row["label"] = label_of(row["method"], head["thresholds"], labels)
    folder.mkdir(parents=True, exist_ok=True)
    header = list(dict.fromkeys(k for row in rows for k in row))
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = markdown(head, rows, data, group, long, weights, labels)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    figures.pruning(rows, second=head["mode"] == "second").savefig(folder / f"{name}.png")
    print(text)
    for row in rows if made else ():
        missed = missed_budget(row, made, labels)
        if missed:
            say(f"note: {missed}")
    say(f"written: {', '.join(str(folder / (name + suffix)) for suffix in ('.csv', '.md', '.png'))}")


def missed_budget(row, made, labels=None):
    """What `off_budget` says of a row, or None."""
    if not row["retention"]:
        return None
    method = made[f"{row['method']}@{row['retention']}"](None, (), 0)
    method = dataclasses.replace(method, name=title(row["method"], labels).removeprefix(GIVEN))
    return off_budget(method, float(row["kept"]) / 100, float(row["retention"]))


def mean_bytes(done):
    """K and V bytes of text and of vision tokens, mean over questions."""
    sizes = [q["bytes"] for questions in done.values() for q in questions]
    return [sum(column) / len(sizes) for column in zip(*sizes, strict=True)]


def row_of(condition, data, group, long, task, weights, sizes):
    """One row of the CSV; percent, except for bytes."""
    from tools.paired import interval, mcnemar

    d, (method, retention) = data[condition], parts(condition)
    kept = d["kept"].mean().item()
    row = {
        "method": method, "retention": retention, "kept": f"{100 * kept:.1f}",
        "kv bytes": round(sizes[0] + kept * sizes[1]), "kv bytes, all kept": round(sum(sizes)),
    }  # fmt: skip
    for label, where in (("long", long), ("short", ~long), ("all", torch.ones_like(long))):
        if not where.any():
            continue
        mean, low, high = interval(d["exact"][where], group[where], weights)
        row |= {label: f"{100 * mean:.1f}", f"{label} low": f"{100 * low:.1f}", f"{label} high": f"{100 * high:.1f}"}
    lost = interval((d["exact"] - data["none"]["exact"])[long], group[long], weights)
    row |= dict(zip(("loss", "loss low", "loss high"), (f"{100 * v:+.2f}" for v in lost), strict=True))
    for against, other in (("full", "none"), ("random", f"random@{retention}"), ("grid", f"grid@{retention}")):
        if other in data:
            pair = data[other]["exact"].bool()[long], d["exact"].bool()[long]
            row[f"p against {against}"] = f"{mcnemar(*pair)[2]:.2g}"
    row["tokens >= 2"] = f"{100 * d['tokens'].mean():.1f}"
    for share in ("evidence", "attention"):
        row[share] = " ".join(f"{100 * r:.0f}" for r in d[share].mean(0))
    for t in TASKS:
        where = torch.tensor([name == t for name in task])
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
    ("topk rows", "topk"), ("topk rows+values", "topk rows"), ("topk rows+values", "random"),
    ("topk rows+values", "shared rows+values"), ("topk rows+values", "plphp rows+values"),
    ("topk rows+values", "snapkv"),
)  # fmt: skip
AGAINST = ("random", "grid", "objects")  # baselines of each of --methods


LABELS = {  # condition: its name in the table and in the picture; what can be given to --prune is in backquotes
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


def label_of(name, thresholds, labels=None):
    """The name of a condition in the first table and in plots, or None if it is not there.

    thresholds: as in `conditions`. labels: of --methods, as in `label_specs`.
    """
    if name.startswith((GIVEN, "rows ")):
        return f"`{title(name, labels).removeprefix(GIVEN)}`"
    label = LABELS.get(name)
    for word, fitted in zip(("LAST", "AHEAD"), thresholds, strict=True):
        if label and fitted:
            label = label.replace(word, f"{three_rates(fitted)},dr={Plphp.dr}")
    return label


def title(name, labels=None):
    """The name of a condition in the other tables; labels: of --methods, as in `label_specs`."""
    spec = name.removeprefix(GIVEN)
    return GIVEN + (labels or {}).get(spec, spec) if name.startswith(GIVEN) else name


def taken_labels(names, thresholds):
    """Names that the table gives to the methods of these conditions, except for those of --methods."""
    found = {parts(name)[0] for name in names if not name.startswith(GIVEN)}
    return [label.strip("`") for label in (label_of(name, thresholds) for name in found) if label]


def pairs_of(rows):
    """PAIRS, and each of --methods against the baselines."""
    given = dict.fromkeys(r["method"] for r in rows if r["method"].startswith(GIVEN))
    return [*PAIRS, *((name, other) for name in given for other in AGAINST)]


def nearest(row, retentions):
    """[the retention closest to what a row kept], or [] without retentions."""
    return sorted(retentions, key=lambda r: abs(100 * float(r) - float(row["kept"])))[:1]


def short(rows):
    """Exact match of long answers, one row per method, one column per retention; 95 % intervals.

    A method of --methods with its own budget is in the column nearest to what it kept.
    """
    retentions = list(dict.fromkeys(r["retention"] for r in rows if r["retention"]))
    lines = ["| long answers right, % | " + " | ".join(f"{r} kept" for r in retentions) + " |"]
    lines.append("|---|" + "---:|" * len(retentions))
    by_name = {(r["method"], r["retention"]): r for r in rows}
    for method, label in in_order(rows).items():
        once = by_name.get((method, ""))
        places = nearest(once, retentions) if once and method != "none" else retentions
        found = [once if once and r in places else by_name.get((method, r)) for r in retentions]
        cells = (_cell(row, r) if row else "" for row, r in zip(found, retentions, strict=True))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_order(rows):
    """{method: label} of the rows that have one, in the order of LABELS; those of --methods last."""
    labels = {r["method"]: r["label"] for r in rows if r["label"]}
    return {name: labels[name] for name in [*LABELS, *labels] if name in labels}


def _cell(row, retention):
    """Exact match, followed by what a method of --methods kept if that is not what the column says."""
    kept = float(row["kept"])
    given = row["method"].startswith(GIVEN)
    off = given and (not row["retention"] or abs(kept - 100 * float(retention)) > AT_EQUAL)
    return _with_interval(row) + (f", {kept:.0f} % kept" if off else "")


def _with_interval(row):
    return f"{row['long']} ({float(row['long low']):.0f}–{float(row['long high']):.0f})"


def markdown(head, rows, data, group, long, weights, labels=None):
    """The short table, the full table, and the pairwise comparisons."""
    from tools.paired import interval, mcnemar

    questions, scenes_seen = len(group), int(group.max()) + 1
    (alpha, beta), ahead = head["thresholds"]
    more = f", with look-ahead rows alpha {ahead[0]}, beta {ahead[1]}" if ahead else ""
    plphp = f"PLPHP with alpha {alpha}, beta {beta}{more}; " if any(map(is_fitted, data)) else ""
    lines = [
        f"{questions} questions about {scenes_seen} scenes, {int(long.sum())} of them with long answers; {plphp}"
        f"weights {head['weights']}.",
        "",
        short(rows),
        "",
        "| method | wanted | kept | long answers | all answers | tokens >= 2 | evidence kept | attention kept |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {title(r['method'], labels)} | {r['retention']} | {r['kept']} | {_with_interval(r)} | {r['all']} | "
            f"{r['tokens >= 2']} | {r['evidence']} | {r['attention']} |"
        )
    lines += [
        "",
        f"Compared where the two kept within {AT_EQUAL} points of each other:",
        "",
        "| long answers, exact match | retention | points | 95 % | only the first right | only the second | p |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    retentions = list(dict.fromkeys(r["retention"] for r in rows if r["retention"]))
    once = {r["method"]: nearest(r, retentions) for r in rows if r["method"].startswith(GIVEN) and not r["retention"]}
    for a, b in pairs_of(rows):
        for retention in once.get(a, retentions):
            one, two = data.get(a if a in once else f"{a}@{retention}"), data.get(f"{b}@{retention}")
            if one is None or two is None:
                continue
            bytes_kept = [100 * d["kept"].mean().item() for d in (one, two)]
            if abs(bytes_kept[0] - bytes_kept[1]) > AT_EQUAL:
                continue
            one, two = one["exact"][long], two["exact"][long]
            mean, low, high = (100 * v for v in interval(one - two, group[long], weights))
            first, second, p = mcnemar(one.bool(), two.bool())
            lines.append(
                f"| {title(a, labels)} against {title(b, labels)} | {retention} | {mean:+.1f} | "
                f"{low:+.1f} to {high:+.1f} | {first} | {second} | {p:.2g} |"
            )
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- any checkpoint, without labels


def premise(args):
    """Print, by layer, the share of the answer's attention to pictures that falls on what each method keeps."""
    checkpoint = open_checkpoint(args.model)
    specs = args.methods
    if specs is PREMISE["methods"] and not checkpoint.lookahead:  # the default list
        specs = [spec for spec in specs if "lookahead" not in spec]
    reference = Generation(checkpoint, args.prompt, args.image, Sampling(args.max_new_tokens), backend=args.backend)
    labels = label_specs(specs, checkpoint.folder)
    chosen = {  # None: those with their own budget
        f: {spec: make_method(spec, f, folder=checkpoint.folder) for spec in specs if sets_budget(spec) == (f is None)}
        for f in (None, *args.retentions)
    }
    for method in (method for methods in chosen.values() for method in methods.values() if method):
        reference.check_method(method)
    say_own_settings(specs, checkpoint.folder)
    checkpoint.read_weights(args.dtype, args.device)
    answer = "".join(reference)
    if len(reference.token_ids) < 2:
        raise InputError("the answer has fewer than two tokens, so none attends to the picture; ask for more")
    print(f"unpruned: {answer}", file=sys.stderr)
    asked = asked_by(reference, reference.token_ids[:-1])
    attention = [asked.attention_of_fed(layer) for layer in range(asked.num_layers)]
    layers = " | ".join(f"layer {i}" for i in range(len(attention)))
    lines = [f"| attention of the answer found, % | kept, % | mean | {layers} |"]
    lines.append("|---|" + "---:|" * (len(attention) + 2))
    for f, methods in chosen.items():
        rows = [(labels[spec], method) for spec, method in methods.items()]
        if f is not None:
            told = Method("told", Ranked(asked.attention_of_fed, f), {"retention": f})
            rows.append(("told what the answer attends to", told))
        for label, method in rows:
            (share,), (keeps,) = replay(asked, [method])[1:]
            found = [100 * _attention_kept(k, asked.spans, a) for k, a in zip(keeps, attention, strict=True)]
            numbers = " | ".join(f"{x:.0f}" for x in [100 * share, sum(found) / len(found), *found])
            lines.append(f"| {label}{'' if f is None else f', {f:g} asked for'} | {numbers} |")
    print("\n".join(lines))
    print(
        "\nA diagnostic, not a verdict: a ranking that finds more of the attention need not answer better.\n"
        "The verdict is `evaluate.py fidelity`, against random and grid at equal bytes."
    )


def fidelity(args):
    """Print how far each method is from the unpruned answer: share of equal tokens, first divergence, KL."""
    checkpoint = open_checkpoint(args.model)
    names = [(s, f) for s in args.methods for f in ([None] if sets_budget(s) else args.retentions)]
    methods = [make_method(spec, retention, folder=checkpoint.folder) for spec, retention in names]
    reference = Generation(checkpoint, args.prompt, args.image, Sampling(args.max_new_tokens), backend=args.backend)
    for method in filter(None, methods):
        reference.check_method(method)
    labels = label_specs(args.methods, checkpoint.folder)
    say_own_settings(args.methods, checkpoint.folder)
    checkpoint.read_weights(args.dtype, args.device)
    print(f"unpruned: {''.join(reference)}", file=sys.stderr)
    lines = ["| method | retention | kept | same token | first divergence | KL mean | KL max |", "|---|" + "---:|" * 6]
    for (spec, retention), found in zip(names, along(reference, methods, args.batch), strict=True):
        wanted = "" if retention is None else retention
        where = "never" if found["diverges"] is None else f"token {found['diverges'] + 1}"
        lines.append(
            f"| {labels[spec]} | {wanted} | {100 * found['kept']:.1f} % | {100 * found['same']:.1f} % | {where} | "
            f"{found['kl'].mean():.4f} | {found['kl'].max():.4f} |"
        )
    pictures = f"{reference.vision_tokens} vision tokens of {len(args.image)} pictures"
    print(f"{len(reference.token_ids)} tokens, {pictures}\n\n" + "\n".join(lines))


# flags of some stages, with their defaults
FIDELITY = {
    "methods": ["random", "grid", "objects", "shared", "snapkv", "plphp"], "image": [], "prompt": None,
    "max_new_tokens": 64, "backend": "auto", "batch": 8,
}  # fmt: skip
PREMISE = {name: default for name, default in FIDELITY.items() if name != "batch"} | {
    "methods": ["topk", "topk:window=32", "topk:window=32,values=true", "topk:query=lookahead", "random", "grid"]
}
SCENES = {
    "methods": [], "rows": [], "questions": 10000, "only": [], "answers": None, "out": None,
    "workers": 1 if torch.cuda.is_available() else os.cpu_count() or 1,
}  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # fmt: off
    parser.add_argument("stage", choices=("accuracy", "second", "fidelity", "premise"))
    parser.add_argument("--model", default=str(ROOT / "assets" / "demo"), metavar="DIR|ID",
                        help="folder or cached Hugging Face id (default: the demo)")
    parser.add_argument("--device", default="auto", metavar="NAME",
                        help="auto, cpu, cuda or cuda:N (default auto: CUDA if there is a GPU)")
    parser.add_argument("--dtype", default="fp32", choices=("auto", "bf16", "fp16", "fp32"), help="default fp32")
    parser.add_argument("--methods", nargs="+", metavar="SPEC",
                        help="methods to measure, as for run.py's --prune. accuracy, second: in addition to those of "
                             f"--only (default: none); fidelity: default {' '.join(FIDELITY['methods'])}; premise: "
                             f"default {' '.join(PREMISE['methods'])}")
    parser.add_argument("--retentions", nargs="+", type=float, default=list(RETENTIONS), metavar="F",
                        help="fractions of the vision tokens to keep, for the methods whose SPEC sets no budget "
                             f"(default {' '.join(map(str, RETENTIONS))})")
    parser.add_argument("--questions", type=int, help="accuracy, second: at least so many (default 10000)")
    parser.add_argument("--only", nargs="+", metavar="NAME",
                        help="accuracy, second: methods of the evaluation to measure, or all; a wrong name lists every "
                             "NAME. The unpruned model is always measured. The default is the committed table: "
                             + ", ".join(f"'{name}'" if " " in name else name for name in TABLE))
    parser.add_argument("--rows", nargs="+", metavar="FILE",
                        help="accuracy, second: files of look-ahead rows (tools/train_lookahead.py) to compare")
    parser.add_argument("--answers", type=Path, help="accuracy, second: file of the answers (default "
                                                     "runs/evaluate/STAGE.jsonl)")
    parser.add_argument("--out", type=Path, help="accuracy, second: folder of the tables (default beside the answers)")
    parser.add_argument("--workers", type=int, help="accuracy, second: processes (default one per core; with CUDA one)")
    parser.add_argument("--image", nargs="+", help="fidelity, premise: pictures")
    parser.add_argument("--prompt", help="fidelity, premise: the question")
    parser.add_argument("--max-new-tokens", type=int, help="fidelity, premise: longest answer (default 64)")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), help="fidelity, premise: default auto")
    parser.add_argument("--batch", type=int, help="fidelity: caches that are decoded together (default 8)")
    # fmt: on
    args = parser.parse_args(argv)
    try:
        of_one = {"fidelity": FIDELITY, "premise": PREMISE}.get(args.stage)
        own, others = of_one or SCENES, FIDELITY | SCENES
        for name in others:
            if name not in own and getattr(args, name) is not None:
                raise InputError(f"{args.stage} does not take --{name.replace('_', '-')}; leave it out")
        for name, default in own.items():
            setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
        args.device = choose_device(args.device)
        for name in ("questions", "workers", "batch", "max_new_tokens"):
            if name in own and getattr(args, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give 1 or more")
        args.retentions = list(dict.fromkeys(args.retentions))
        if of_one:
            if not args.prompt or not args.image:
                raise InputError(f"{args.stage} needs --image and --prompt; give both")
            return (premise if args.stage == "premise" else fidelity)(args)
        answers = args.answers or ROOT / "runs" / "evaluate" / f"{args.stage}.jsonl"
        head, done, made = run_scenes(args, answers)
        labels = label_specs(
            args.methods, find_folder(args.model), taken_labels(head["conditions"], head["thresholds"])
        )
        say(f"answers: {answers}")
        summarise(head, done, args.out or answers.parent, f"pruning-{args.stage}", labels, made)
    except MethodError as wrong:
        parser.exit(1, f"error: {wrong}\n")
    except BrokenPipeError:
        raise  # see `as_command`
    except (InputError, ValueError, OSError) as wrong:
        parser.exit(2, f"error: {' '.join(str(wrong).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the answers so far are kept, run the same command to continue\n")


if __name__ == "__main__":
    sys.exit(as_command(main))
