"""The adapter for lmms-eval: answers, log-probabilities, settings, what is refused and what is counted.

With lmms-eval installed, all of it runs against the real package, and a task runs through its command line. Otherwise
a stand-in has the part of its interface that the adapter uses, as documented in 0.7.3.
"""

import abc
import importlib.util
import json
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import IMAGE_ID, refusal
from PIL import Image

from model import Generation, Sampling
from tests.paths import DEMO, DEMO_PICTURE, ROOT
from tools.command import imported
from tools.score_pope import read_lines

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
ADAPTER = ROOT / "tools" / "lmms_eval_adapter.py"
QUESTIONS = "How many objects are there?", "Is there a red cross?", "Is there a red square?", "Describe the picture."


# ---------------------------------------------------------------- the interface


class Documented(abc.ABC):
    """lmms_eval.api.model.lmms"""

    def __init__(self):
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    def clean(self):
        self.cleaned = True


@dataclass
class Result:
    """lmms_eval.api.instance.GenerationResult"""

    text: str
    token_counts: object = None


def smallest(task, doc, results):
    """The choice of ConfigurableTask.process_results in 0.7.3."""
    numbers = [number for number, _ in results]
    return {"acc": float(numbers.index(min(numbers)) == task.doc_to_target(doc))}


def largest(task, doc, results):
    numbers = [number for number, _ in results]
    return {"acc": float(numbers.index(max(numbers)) == task.doc_to_target(doc))}


def stand_in():
    """{name: module} of the package as documented."""
    counts = namedtuple("TokenCounts", "input_tokens output_tokens")
    names = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Documented},
        "lmms_eval.api.instance": {"GenerationResult": Result, "TokenCounts": counts},
        "lmms_eval.api.task": {"ConfigurableTask": type("ConfigurableTask", (), {"process_results": smallest})},
    }  # fmt: skip
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        vars(module).update(names[name])
    return modules


@pytest.fixture(scope="module")
def adapter():
    """The module of the adapter, with lmms-eval or its stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in {} if INSTALLED else stand_in().items():
            patch.setitem(sys.modules, name, module)
        yield imported("lmms_eval_adapter", ADAPTER, "read the error")


DOCS = [{"text": text, "image": Image.open(DEMO_PICTURE)} for text in QUESTIONS]
DOCS += [{"text": "What happens?", "image": "clip.mp4"}, {"text": "Where?", "image": None}]


def visual(doc):
    return [doc["image"]] if doc["image"] else []


@pytest.fixture
def make(adapter, monkeypatch):
    """Function (model arguments) -> the model, with the documents as the split `test` of the task `t`."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def make(pretrained=DEMO, **arguments):
        lm = adapter.Plphp(str(pretrained), **{"dtype": "fp32", "device": "cpu"} | arguments)
        lm.task_dict["t"] = {"test": DOCS}
        return lm

    return make


def request(number, second, idx=0, see=visual):
    """An Instance: second is the generation_kwargs, or the continuation or a function that gives it."""
    return SimpleNamespace(args=(DOCS[number]["text"], second, see, number, "t", "test"), idx=idx)


GREEDY = {"max_new_tokens": 24, "temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}


# ---------------------------------------------------------------- answers


def test_answers_are_those_of_ask(make, demo, tmp_path, capsys):
    """In batches, around a question that fails, with the whole cache and a pruned one; bytes as in --json."""
    lm = make(prune='"topk:window=4,retention=0.5"', batch_size="3", log=f'"{tmp_path}/log.jsonl"')
    given = {**GREEDY}
    results = lm.generate_until([request(n, given) for n in (3, 4, 0, 1, 2, 0)])
    assert given == GREEDY
    how = {"prune": "topk:window=4,retention=0.5", "max_new_tokens": 24}
    texts = {n: demo.ask(QUESTIONS[n], DEMO_PICTURE, **how) for n in range(4)}
    assert [result.text for result in results] == [texts[3], "", *(texts[n] for n in (0, 1, 2, 0))]
    lines = read_lines(tmp_path / "log.jsonl", task=str, doc_id=int)
    assert sorted(line["doc_id"] for line in lines) == [0, 0, 1, 2, 3, 4] and lm.device == torch.device("cpu")
    for line in lines:
        if line["doc_id"] == 4:
            assert "path 'clip.mp4', a video" in line["error"]
            continue
        one = Generation(demo, QUESTIONS[line["doc_id"]], DEMO_PICTURE, Sampling(24), prune=how["prune"])
        "".join(one)
        full = 2 * sum(k.nbytes for k in whole_keys(demo, line["doc_id"]))
        assert (line["kv_bytes_full"], line["kv_bytes_held"]) == (full, one.bytes_held) and line["split"] == "test"
        assert (line["retention"], line["new_tokens"]) == (one.retention, len(one.token_ids))
        counts = results[[3, 4, 0, 1, 2, 0].index(line["doc_id"])].token_counts
        assert (counts.input_tokens, counts.output_tokens) == (one.prompt_tokens, line["new_tokens"])
    told = capsys.readouterr().err
    assert "note: t 4 failed: the task gives the path 'clip.mp4'" in told and "fp32" not in told
    lm.clean()
    full, held = (sum(line.get(f"kv_bytes_{name}", 0) for line in lines) / 5e6 for name in ("full", "held"))
    said = "topk, retention 0.5: 6 requests, 1 of them failed and are scored like answers; "
    said += f"50.0 % of the vision tokens kept; KV cache of a prompt {full:.3f} MB, held {held:.3f} MB\n"
    assert capsys.readouterr().err == said and lm.checkpoint is None


def whole_keys(checkpoint, number):
    """Keys of all layers of the unpruned prompt."""
    generation = Generation(checkpoint, QUESTIONS[number], DEMO_PICTURE, Sampling(1))
    with torch.inference_mode():
        generation.prefill()
    return [k[: int(n.sum())] for k, n in zip(generation.cache.k, generation.cache.kv_len, strict=True)]


def test_a_method_that_drops_nothing_is_noted(make, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def keep(view):\n    return None\n")
    lm = make(prune=f"{tmp_path}/mine.py::keep")
    lm.generate_until([request(0, GREEDY)])
    lm.clean()
    assert "mine.py::keep dropped no vision token" in capsys.readouterr().err.splitlines()[-1]


def test_an_answer_ends_at_the_strings_of_the_task(make):
    lm = make()
    (whole,), (cut,), (text,) = (
        lm.generate_until([request(3, {"max_new_tokens": 60, "until": until})]) for until in ([], " star", "")
    )
    assert " star" in whole.text and cut.text == whole.text.partition(" star")[0] and text.text == whole.text


def test_a_question_that_is_asked_again_gets_another_seed(make):
    lm, asked = make(), request(3, {"max_new_tokens": 20, "temperature": 3.0})
    results = [result.text for result in lm.generate_until([asked] * 3)]
    assert len(set(results)) == 3 and results == [result.text for result in lm.generate_until([asked] * 3)]


def test_a_question_without_a_picture_is_answered(make, demo):
    (result,) = make().generate_until([request(5, GREEDY)])
    assert result.text == demo.ask("Where?", max_new_tokens=24)


SETTINGS = {  # generation_kwargs -> the Sampling
    "nothing": ({}, Sampling(1024)),
    "as pope": ({**GREEDY, "max_new_tokens": 128}, Sampling(128, stop=["\n\n"])),
    "a temperature samples": ({"temperature": 0.5, "top_p": 0.9, "top_k": 0}, Sampling(1024, 0.5, None, 0.9)),
    "do_sample alone": ({"do_sample": True, "top_k": 7}, Sampling(1024, 1.0, 7)),
    "temperature 0 is greedy": ({"do_sample": True, "temperature": 0, "top_p": 0.5}, Sampling(1024)),
    "do_sample false is greedy": ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, Sampling(1024)),
    "neutral ones": ({"repetition_penalty": 1, "num_beams": 1, "min_p": None, "max_length": 20}, Sampling(1024)),
    "one string, a seed": ({"until": "x", "seed": 5, "temperature": 2.0}, Sampling(1024, 2.0, seed=5, stop="x")),
    "empty strings": ({"until": ["", "x"], "max_new_tokens": None}, Sampling(1024, stop=["x"])),
    "others": ({"image_aspect_ratio": "pad"}, Sampling(1024)),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_of_a_task(adapter, case):
    given, wanted = SETTINGS[case]
    sampling, notes = adapter.sampling_of(given)
    assert sampling == wanted
    said = {
        "do_sample false is greedy": ["generation_kwargs: do_sample is false, so temperature 0.7 has no effect"],
        "others": ["generation_kwargs: image_aspect_ratio 'pad' has no effect here"],
    }
    assert notes == said.get(case, [])


def test_settings_that_would_change_the_answer_are_refused_before_the_first_one(make, failing):
    lm = make()
    failing(Generation, "prefill", AssertionError("computed"))
    for given, wanted in (
        ({"num_beams": 4}, "num_beams 4, which is not implemented; override it with --gen_kwargs num_beams=1"),
        ({"repetition_penalty": 1.2}, "--gen_kwargs repetition_penalty=1.0"),
        ({"temperature": 0.5, "top_p": 0}, "top_p is 0; give a number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give an integer"),
    ):
        assert wanted in refusal(lm.generate_until, [request(0, GREEDY), request(1, given)])


# ---------------------------------------------------------------- likelihoods


@pytest.fixture(scope="module")
def random_pair(make_hf_checkpoint, tmp_path_factory):
    """(folder, transformers' model) with random weights."""
    folder = tmp_path_factory.mktemp("random")
    return folder, make_hf_checkpoint(folder, seed=3)


@pytest.mark.parametrize("text", ["no", " the red circle and a triangle", "\nyes"])
def test_the_unpruned_likelihood_is_that_of_transformers(make, random_pair, text):
    folder, hf = random_pair
    lm = make(folder)
    ((total, greedy),) = lm.loglikelihood([request(0, lambda doc: text)])
    checkpoint = lm.checkpoint
    prompt = f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:"
    before = checkpoint.tokenizer.encode(prompt)
    ids = checkpoint.tokenizer.encode(f"{prompt} {text.strip()}")
    assert ids[: len(before)] == before
    count = checkpoint.config.image_tokens
    whole = [i for token in ids for i in [token] * (count if token == IMAGE_ID else 1)]
    pixels = torch.stack(Generation(checkpoint, QUESTIONS[0], DEMO_PICTURE).pixels)
    with torch.inference_mode():
        rows = hf(input_ids=torch.tensor([whole]), pixel_values=pixels).logits[0].double()
    target = torch.tensor(ids[len(before) :])
    rows = rows[-len(target) - 1 : -1]
    assert total == pytest.approx(rows.log_softmax(-1)[torch.arange(len(target)), target].sum().item(), abs=2e-4)
    assert greedy == bool((rows.argmax(-1) == target).all()) and total < -0.5


@torch.inference_mode()
def in_steps(checkpoint, number, text, prune):
    """The log-probability of a text in single decode steps after a pruned prefill, and whether each step is greedy."""
    language = checkpoint.model.language_model
    generation = Generation(checkpoint, QUESTIONS[number], DEMO_PICTURE, prune=prune)
    logits, total, greedy = generation.prefill(), 0.0, True
    for token in checkpoint.tokenizer.encode(" " + text, follows=True):
        total += logits.double().log_softmax(-1)[token].item()
        greedy &= int(logits.argmax()) == token
        logits = language.step(torch.tensor([token]), generation.cache)[0]
    return total, greedy


@pytest.mark.parametrize("prune", ["none", "topk:retention=0.2", "divprune:retention=0.3", "h2o:retention=0.1"])
def test_a_pruned_likelihood_is_that_of_the_steps_after_the_pruned_prefill(make, demo, prune):
    lm = make(prune=prune)
    answer = demo.ask(QUESTIONS[3], DEMO_PICTURE, prune=prune, max_new_tokens=200)
    wrong = answer.replace("large", "small")
    assert wrong != answer
    found = lm.loglikelihood([request(3, lambda doc, text=text: text) for text in (answer, wrong, answer)])
    assert found[0] == found[2] and [greedy for _, greedy in found] == [True, False, True]
    for (total, greedy), text in zip(found, (answer, wrong), strict=False):
        exact, steps = in_steps(demo, 3, text, prune)
        assert total == pytest.approx(exact, abs=1e-3) and greedy == steps


def test_choices_share_one_prefill(make, failing):
    choices = [" yes", " no", " The picture has four objects."]
    alone = [make().loglikelihood([request(0, choice)])[0] for choice in choices]
    lm = make()
    failing(Generation, "prefill", AssertionError("a second prefill"), at=2)
    assert lm.loglikelihood([request(0, choice, idx) for idx, choice in enumerate(choices)]) == alone
    lm, questions = make(), [request(0, " yes"), request(1, " yes")]
    with pytest.raises(AssertionError, match="second"):
        lm.loglikelihood(questions)
    together = lm.loglikelihood(questions)
    assert together == [lm.loglikelihood([one])[0] for one in questions] and together[0] != together[1]


@pytest.mark.parametrize("chooses", [smallest, largest])
def test_the_sign_of_a_choice_is_the_one_that_lmms_eval_needs(make, monkeypatch, chooses, capsys):
    from lmms_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "process_results", chooses)
    lm = make()
    choices = " The picture has two objects.", " The picture has four objects.", " The picture has six objects."
    results = lm.loglikelihood([request(0, choice, idx) for idx, choice in enumerate(choices)])
    task = SimpleNamespace(doc_to_target=lambda doc: 1)
    assert chooses(task, {}, results) == {"acc": 1.0}
    (plain,) = lm.loglikelihood([request(0, lambda doc: choices[1])])
    assert plain == (-abs(results[1][0]), True) and ("smallest" in capsys.readouterr().err) == (chooses is smallest)


def test_the_installed_version_takes_the_smallest(adapter):
    """As 0.7.3, and so the stand-in, does; if a newer version fails here, read its process_results."""
    assert adapter.smallest_wins()
    from lmms_eval.api.task import ConfigurableTask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigurableTask, "process_results", lambda *_: {})
        assert "cannot tell" in refusal(adapter.smallest_wins)


def test_a_pair_passes_the_evaluator(adapter):
    """Which takes `text` of a GenerationResult; its cache would return a list, and stores nothing without strip()."""
    pair = adapter.Likelihood((-1.5, True))
    assert pair == pair.text == (-1.5, True) and isinstance(pair, adapter.GenerationResult)
    assert not pair.text.strip() and json.dumps(pair.text) == "[-1.5, true]" and pair.token_counts is None
    if INSTALLED:
        from lmms_eval.api.instance import unwrap_generation_output

        assert unwrap_generation_output(pair) == (pair, None) and unwrap_generation_output((-1.5, True))[0] != pair


def test_white_space_before_a_continuation_is_the_templates(adapter, demo):
    def ids(text, template="auto", prompt="Why?"):
        return adapter.continuation(Generation(demo, prompt, template=template), text)

    assert ids("yes") == ids(" yes") == ids("\n yes") == demo.tokenizer.encode("ASSISTANT: yes")[-len(ids("yes")) :]
    assert ids("yes", "raw") != ids(" yes", "raw") == ids("yes")
    for text in ("", "  ", None, ["yes"], 3):
        assert "the continuation is" in refusal(ids, text)
    context = demo.config.text_config.context
    assert "the continuation has" in refusal(ids, "yes " * context)


# ---------------------------------------------------------------- failures


def broken(doc):
    raise KeyError("image")


def test_a_failed_request_does_not_lose_the_others(make, capsys):
    lm = make()
    asked = [request(0, " yes"), request(0, " yes", see=broken), request(4, " yes"), request(0, " yes")]
    results = lm.loglikelihood(asked)
    assert results[0] == results[3] and [abs(total) for total, _ in results[1:3]] == [float("inf")] * 2
    assert abs(results[0][0]) < 100 and results[1][0] * results[0][0] > 0  # of the same sign: never the best choice
    told = capsys.readouterr().err
    assert "the task failed to give the pictures (KeyError: 'image'); check its data" in told
    assert "2 of them failed" in lm.summary
    texts = lm.generate_until([request(0, GREEDY, see=broken), request(0, GREEDY)])
    assert texts[0].text == "" and texts[1].text


@pytest.mark.parametrize(("ask", "second"), [("generate_until", GREEDY), ("loglikelihood", " yes")])
def test_a_run_without_any_answer_is_no_result(make, ask, second, capsys):
    with pytest.raises(RuntimeError, match="all 2 requests failed"):
        getattr(make(), ask)([request(0, second, see=broken), request(4, second)])
    lm = make()
    lm.checkpoint.model.language_model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="all 2 requests failed"):
        getattr(lm, ask)([request(0, second), request(1, second)])
    assert capsys.readouterr().err.count("the model produced NaN") == 1  # the same reason is noted once


def test_memory_that_runs_out_fails_one_request(make, failing):
    lm = make()
    failing(Generation, "prefill", RuntimeError("CUDA out of memory"), at=2)
    results = lm.loglikelihood([request(n, lambda doc: "yes") for n in (0, 1, 2)])
    assert [total > float("-inf") for total, _ in results] == [True, False, True]


def test_another_error_is_not_hidden(make, failing):
    lm = make()
    failing(Generation, "prefill", RuntimeError("a bug"))
    for ask, second in (("generate_until", GREEDY), ("loglikelihood", " yes")):
        with pytest.raises(RuntimeError, match="a bug"):
            getattr(lm, ask)([request(0, second)])


def test_what_the_adapter_refuses(make, monkeypatch, tmp_path):
    for wrong, wanted in (
        ({"batch_size": "auto"}, "batch_size is auto, max_batch_size None; give --batch_size N alone"),
        ({"max_batch_size": 8}, "max_batch_size 8"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prune": "nothing-like-it"}, "nothing-like-it"),
        ({"keep_tokens": 4, "retention": 0.5, "prune": "topk"}, "keep_tokens"),
        ({"template": "x"}, "template 'x' is unknown"),
        ({"log": str(tmp_path / "no" / "log.jsonl")}, "cannot write log="),
        ({"device": "tpu"}, "device tpu is unknown"),
        ({"dtype": "int4"}, "dtype int4"),
    ):
        assert wanted in refusal(make, **wrong)
    assert "several rounds" in refusal(make().generate_until_multi_round, [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several processes" in refusal(make)


@pytest.mark.parametrize("visuals", [["a.mp4"], [[Image.new("RGB", (2, 2))]], [{"array": []}], [b"bytes"]])
def test_only_pictures_are_pictures(adapter, visuals):
    assert "a video or sound; only tasks with pictures" in refusal(adapter.pictures_of, visuals)


def test_quotes_protect_commas(adapter):
    same = "a", '"a', '"', None, 0.5
    for given, wanted in (('"a,b"', "a,b"), ("'a'", "a"), *zip(same, same, strict=True)):
        assert adapter.unquoted(given) == wanted
    if INSTALLED:
        from lmms_eval.utils import simple_parse_args_string

        parsed = simple_parse_args_string('pretrained=m,prune="topk:window=4,retention=0.5",log=x')
        assert adapter.unquoted(parsed["prune"]) == "topk:window=4,retention=0.5" and parsed["log"] == "x"


# ---------------------------------------------------------------- the command


def test_without_lmms_eval_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    module = imported("lmms_eval_adapter_alone", ADAPTER, "read the error")
    assert module.main(["--tasks", "pope"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: cannot import lmms-eval (") and told.endswith("; pip install lmms-eval==0.7.3\n")


TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s/ten.jsonl}}
task: %s
test_split: test
output_type: %s
doc_to_visual: !function ten.visual
doc_to_text: question
doc_to_target: %s
metric_list: [{metric: %s}]
"""
FUNCTIONS = """
from PIL import Image
def visual(doc): return [Image.open(doc["image"])]
def choices(doc): return doc["choices"]
def right(doc, results): return {"right": float(results[0] == doc["answer"])}
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with the tasks `ten` and `ten_choices`: ten questions about scenes, and answers to choose from."""
    from tools.scenes import draw_scene, sample

    lines = []
    for seed in range(10):
        scenes, (question,) = sample(2000 + seed, ["count"])
        draw_scene(scenes[0], 448).save(tmp_path / f"{seed}.png")
        words = ["two", "three", "four", "five", "six"]
        choices = [f"The picture has {word} objects." for word in words]
        right = choices.index(question.answer)
        lines.append({"image": f"{tmp_path}/{seed}.png", "question": question.question, "answer": question.answer,
                      "choices": choices, "right": right})  # fmt: skip
    (tmp_path / "ten.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "ten.py").write_text(FUNCTIONS)
    made = (
        TASK % (tmp_path, "ten", "generate_until", "answer", "right, aggregation: mean, higher_is_better: true")
        + "process_results: !function ten.right\n"
    )
    made += "generation_kwargs: {max_new_tokens: 32, temperature: 0, do_sample: false}\n"
    (tmp_path / "ten.yaml").write_text(made)
    made = TASK % (tmp_path, "ten_choices", "multiple_choice", "right", "acc")
    (tmp_path / "ten_choices.yaml").write_text(made + "doc_to_choice: !function ten.choices\n")
    return tmp_path


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed; the other tests use a stand-in")
@pytest.mark.parametrize("registered", ["by the command", "by an entry point"])
def test_tasks_run_through_lmms_evals_command_line(tasks, registered):
    about = tasks / "site" / "about-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: about\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[lmms_eval.models]\nplphp = tools.lmms_eval_adapter:manifest\n")
    command, path = [str(ADAPTER)], []
    if registered == "by an entry point":
        command, path = ["-m", "lmms_eval", "--model", "plphp"], [str(about.parent), str(ROOT)]
    model = f'pretrained={DEMO},dtype=fp32,prune="topk:window=4,retention=0.5",log={tasks}/log.jsonl'
    command += ["--include_path", str(tasks), "--tasks", "ten,ten_choices", "--batch_size", "4", "--device", "cpu"]
    path = os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command, "--model_args", model], capture_output=True, text=True, cwd=tasks,
                          env=os.environ | {"PYTHONPATH": path, "HF_HOME": f"{tasks}/hf"})  # fmt: skip
    values = [float(line.split("|")[6]) for line in done.stdout.splitlines() if line.startswith("|ten")]
    assert len(values) == 2 and min(values) >= 0.8, done.stdout + done.stderr
    assert "topk, retention 0.5: 60 requests; 50.0 % of the vision tokens kept" in done.stderr
    lines = read_lines(tasks / "log.jsonl", task=str)
    assert [line["task"] for line in lines].count("ten") == 10 and len(lines) == 60
