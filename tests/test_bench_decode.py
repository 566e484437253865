"""The end-to-end benchmark: correct rows from real runs, arithmetic on given numbers, no timing of wrong results."""

import csv
import itertools
import json
import os
import shutil
import sys
import types

import pytest
import torch

from model import InputError, load, report
from model.cache import KV_DTYPES, RaggedCache
from model.config import TextConfig
from tests.paths import DEMO
from tools import bench_decode, engines, harness, roofline, shapes
from tools.engines import Workload

SMALL = TextConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


class Local:
    """Replaces Child in this process; starting another takes seconds."""

    def __init__(self, task):
        self.replies = engines.replies(task, itertools.repeat("go"))

    def reply(self):
        return next(self.replies)

    ask = reply

    def close(self):
        self.replies.close()


def in_this_process(patch):
    """The benchmark in this process, on a machine of 10 GB/s."""
    patch.setattr(bench_decode, "Child", Local)
    patch.setattr(harness, "memory_bandwidth", lambda device: 1e10)


@pytest.fixture
def here(monkeypatch):
    in_this_process(monkeypatch)


def measured(path, *flags, code=0):
    """The file that --json writes. path: its folder."""
    path = path / "a.json"
    assert bench_decode.main([*flags, "--device", "cpu", "--json", str(path)]) == code
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of a.json and a.csv, written by --smoke for the demo model, ours and transformers."""
    pytest.importorskip("transformers", reason="transformers is the baseline")
    folder = tmp_path_factory.mktemp("smoke")
    flags = ["--engines", "ours", "hf-sdpa", "--prune", "plphp:dr=0,skip=1@0.5", "--new-tokens", "2"]
    with pytest.MonkeyPatch.context() as patch:
        in_this_process(patch)
        measured(folder, "--smoke", *flags, "--csv", str(folder / "a.csv"))
    return folder


@pytest.fixture
def told(here, monkeypatch, capsys):
    """Function (answers, flags) -> (exit code, rows, stdout); the engines reply with `answers`.

    answers: {(engine, prune): (facts, seconds of the first token, of each step) or an exception}.
    """

    def run(answers, *flags):
        def prepare(task):
            answer = answers[task.engine, task.prune]
            if isinstance(answer, BaseException):
                raise answer
            facts, first, steps = answer
            return facts, lambda: (first, steps)

        saved = []
        monkeypatch.setattr(engines, "prepare", prepare)
        monkeypatch.setattr(harness, "save", lambda args, about, rows: saved.append(rows))
        names_of_engines, prunes = (list(dict.fromkeys(key[i] for key in answers)) for i in (0, 1))
        names = "--engines", *names_of_engines, "--prune", *prunes
        asked = "--shape", "demo", "--workloads", "2x20+5", "--rounds", "3", "--device", "cpu", "--dtype", "fp32"
        code = bench_decode.main([*asked, *names, *flags])
        return code, saved[-1], capsys.readouterr().out

    return run


def facts(ids=((5, 6, 7), (5, 8, 9)), logits=((1.0, 2.0), (3.0, 1.0)), **more):
    """Facts of one of our runs without faults."""
    return {"ids": [*map(list, ids)], "logits": [*map(list, logits)], "finite": True, "kept": 1.0, "error": 0.0} | more


# ---------------------------------------------------------------- real runs


def test_the_smoke_run_has_all_rows(smoke):
    data = json.loads((smoke / "a.json").read_text())
    rows, about = data["rows"], data["about"]
    names = [(r["workload"], r["engine"], r["prune"]) for r in rows]
    runs = [("ours", "none"), ("ours", "plphp:dr=0,skip=1@0.5"), ("hf-sdpa", "none")]
    assert names == [(w, *run) for w in ("picture", "2x24,8+8") for run in runs]
    assert all(r["right"] and r["ms_per_token"] > 0 and r["ttft_ms"] > 0 for r in rows)
    assert {"machine", "torch", "transformers", "dtype", "bandwidth_GBps", "command", "rounds"} <= set(about)
    for r in rows:
        assert r["tokens_per_s"] == pytest.approx(1e3 * r["batch"] / r["ms_per_token"])
        assert r["ms_p20"] <= r["ms_per_token"] <= r["ms_p80"] and not r["beyond_context"]
        if r["engine"] == "ours":
            assert 50 < r["step_launches"] <= 25 * 6 + 25  # per layer, plus those of the step
            assert r["step_syncs"] == 0 and 0 < r["step_allocated_bytes"] < 500_000 and r["step_allocations"] <= 250
            assert r["decode_x_hf-sdpa"] > 0 and r["ttft_x_hf-sdpa"] > 0 and r["speedup"] > 0
    with open(smoke / "a.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(r["ms_per_token"]) for r in table] == [r["ms_per_token"] for r in rows]
    assert {r["machine"] for r in table} == {about["machine"]}


def test_bytes_are_those_of_the_kept_rows(smoke):
    """6 layers, 4 heads, K and V of 32 fp32 numbers each; the demo's PLPHP leaves the first layer unpruned."""
    row, rows = 2 * 4 * 32 * 4, json.loads((smoke / "a.json").read_text())["rows"]
    picture, pruned_picture, _, two, pruned_two, theirs = rows
    assert picture["kv_bytes_held"] == picture["kv_bytes_full"] == 6 * row * 269
    assert pruned_picture["kv_bytes_held"] == row * (269 + 5 * (128 + 13))
    assert two["kv_bytes_held"] == two["kv_bytes_full"] == theirs["kv_bytes_held"] == 2 * 6 * row * 40
    assert pruned_two["kv_bytes_held"] == 2 * row * (40 + 5 * (12 + 4 + 8))
    assert pruned_two["kept"] == pytest.approx((32 + 5 * 16) / (6 * 32))
    checkpoint = load(DEMO, "fp32")
    for r in rows:  # counted from the parameters, not from a shape
        wanted = report.step_bytes(checkpoint, r["kv_bytes_held"])
        assert r["bytes_per_step"] == wanted and r["roofline_ms"] == pytest.approx(1e3 * wanted / 1e10)
    full = report.step_bytes(checkpoint, two["kv_bytes_full"])
    assert pruned_two["ceiling_speedup"] == pytest.approx(full / pruned_two["bytes_per_step"]) and two["speedup"] == 1


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_keys_and_values_in_8_bits_have_their_bytes_and_their_reference(kind, here, tmp_path, monkeypatch):
    """6 layers, 4 heads, K and V of 32 codes and a scale of 2 bytes. The check is against the dequantised rows."""
    flags = ["--smoke", "--kv-dtype", kind, "--prune", "plphp:dr=0,skip=1@0.5", "--new-tokens", "3"]
    data = measured(tmp_path, *flags)
    rows, row = data["rows"], 2 * 4 * (32 + 2)
    assert data["about"]["kv_dtype"] == kind and all(r["kv_dtype"] == kind and r["right"] for r in rows)
    assert [r["engine"] for r in rows] == 4 * ["ours"]  # not transformers
    picture, pruned, two, pruned_two = rows
    assert picture["kv_bytes_held"] == picture["kv_bytes_full"] == pruned["kv_bytes_full"] == 6 * row * 269
    assert pruned["kv_bytes_held"] == row * (269 + 5 * (128 + 13))
    assert two["kv_bytes_held"] == two["kv_bytes_full"] == 2 * 6 * row * 40
    assert pruned_two["kv_bytes_held"] == 2 * row * (40 + 5 * (12 + 4 + 8))
    assert two["bytes_per_step"] == report.step_bytes(load(DEMO, "fp32"), two["kv_bytes_held"])
    monkeypatch.setattr(engines, "KV_DTYPES", dict.fromkeys(KV_DTYPES))  # the exact rows as reference
    wrong = [r for r in measured(tmp_path, *flags, code=1)["rows"] if r["workload"] == "2x24,8+8"]
    assert all("differ from dense attention over the dequantised rows" in r["why"] for r in wrong[1:]), wrong


def test_fp8_is_refused_where_the_gpu_has_none(monkeypatch):
    args = bench_decode.parser().parse_args(["--kv-dtype", "fp8"])
    assert bench_decode.in_8_bits(args, torch.device("cpu"), engines.ENGINES) == list(engines.OURS)
    monkeypatch.setattr(bench_decode, "has_e4m3", lambda device: False)
    with pytest.raises(InputError, match="cuda has no float8_e4m3fn; use int8"):
        bench_decode.in_8_bits(args, torch.device("cuda"), engines.ENGINES)
    args.backend = "torch"
    assert bench_decode.in_8_bits(args, torch.device("cuda"), ("ours",)) == ["ours"]


def test_engines_work_in_processes_of_their_own(tmp_path, capfd):
    """One of them runs a method from a file, which prints to stdout."""
    (tmp_path / "mine.py").write_text("def keep(view):\n    print('{', view.layer, flush=True)\n")
    mine = f"{tmp_path}/mine.py::keep"
    rows = measured(tmp_path, "--smoke", "--engines", "ours", "--prune", mine, "--workloads", "1x4+4")["rows"]
    assert [(r["right"], r["prune"]) for r in rows] == [(True, "none"), (True, mine)]
    assert sys.platform != "linux" or min(r["peak_bytes"] for r in rows) > 20e6
    said = capfd.readouterr()
    assert "1x4+4: 1 x (4 vision + 4 text) tokens" in said.out and said.out.count("per step: ") == 2
    assert "{" not in said.out and "{ 0" in said.err  # on stdout the tables only
    assert [line for line in said.err.splitlines() if "{" not in line] == ["1x4+4: ours, none", f"1x4+4: ours, {mine}"]


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_the_compiler_is_an_engine(tmp_path, pytestconfig):
    """Without --all only the unpruned model: each engine and method compiles in its own process.

    Its launches are not counted, because that would break up the compiled step for good.
    """
    flags = ["--workloads", "1x8+4", "--engines", "ours", "ours-compile", "--new-tokens", "4", "--rounds", "1"]
    methods = ["plphp:dr=0@0.5"] if pytestconfig.option.all else []
    rows, ran = measured(tmp_path, *flags, "--prune", "none", *methods)["rows"], 1 + len(methods)
    assert [(r["engine"], r["right"]) for r in rows] == ran * [("ours", True)] + ran * [("ours-compile", True)]
    assert rows[-1]["decode_x_ours"] > 0 and "step_launches" not in rows[-1]


def test_a_process_that_dies_is_told():
    child = bench_decode.Child("no task")
    child.process.kill()
    assert child.reply() == {"why": "its process exited with -9"} == child.ask()
    child.close()


def test_sequences_of_a_batch_answer_as_if_alone():
    language = harness.random_language(SMALL, torch.float32, "cpu")
    work = Workload("", 3, (6, 5), 7)
    x = engines.prompts(types.SimpleNamespace(workload=work, seed=0), language)
    assert work.spans == [(1, 7), (7, 12)] and x.shape == (3, 18, 64)
    method = engines.method_of("random@0.5")
    together = engines.answer(language, x, work.spans, method, "auto", 6, watched=6)
    for i in range(3):
        alone = engines.answer(language, x[i : i + 1], work.spans, method, "auto", 6, watched=6)
        assert [ids[0] for ids in alone.ids] == [ids[i] for ids in together.ids]
        assert alone.kept == pytest.approx(6 / 11)  # fraction of the prompt; later tokens do not count
    assert len(together.ids) == 6 and len(together.steps) == 5
    assert together.kept == pytest.approx(6 / 11)  # 3 of 6 and 3 of 5, rounded half up


def test_any_checkpoint_can_be_timed(here, make_checkpoint, tmp_path, capsys):
    """A checkpoint with tied embeddings, given by its folder; transformers gets the same weights."""
    pytest.importorskip("transformers", reason="transformers is the baseline")
    make_checkpoint(tmp_path / "model", top={"tie_word_embeddings": True})
    asked = ["--smoke", "--engines", "ours", "hf-eager", "--prune", "snapkv@0.5"]
    rows = measured(tmp_path, "--model", str(tmp_path / "model"), *asked)["rows"]
    lines = capsys.readouterr().out.splitlines()
    assert not any("not timed" in line or line.startswith("picture") for line in lines)
    shown = [("ours", "none"), ("ours", "snapkv@0.5"), ("hf-eager", "none")]
    assert [(r["engine"], r["prune"]) for r in rows] == shown
    assert [tuple(line.split()[:2]) for line in lines if "%" in line] == shown


@pytest.mark.parametrize("room", [True, False])
def test_engines_take_turns_where_there_is_room(room, told, monkeypatch):
    calls, alive = [], []

    class Watched(Local):
        def __init__(self, task):
            super().__init__(task)
            self.name = task.engine
            alive.append(self.name)
            calls.append(tuple(alive))

        def ask(self):
            calls.append(self.name)
            return next(self.replies)

        def close(self):
            alive.remove(self.name)

    monkeypatch.setattr(bench_decode, "Child", Watched)
    monkeypatch.setattr(bench_decode, "fits", lambda size, pages: room)
    right = facts(), 0.1, [0.01]
    code, rows, _ = told({("ours", "none"): right, ("hf-sdpa", "none"): right}, "--rounds", "2")
    both = [("ours",), ("ours", "hf-sdpa"), "ours", "hf-sdpa", "ours", "hf-sdpa"]
    alone = [("ours",), "ours", "ours", ("hf-sdpa",), "hf-sdpa", "hf-sdpa"]
    assert code == 0 and all(r["right"] for r in rows) and calls == (both if room else alone) and not alive


def test_random_weights_are_made_in_their_dtype():
    language = harness.random_language(SMALL, torch.bfloat16, "cpu", seed=3)
    again = harness.random_language(SMALL, torch.bfloat16, "cpu", seed=3)
    for (name, p), q in zip(language.named_parameters(), again.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q)
        assert (p == 1).all() if p.ndim == 1 else p.float().std().item() == pytest.approx(0.02, rel=0.1), name
    for name in ("llava-1.5-7b", "llava-1.5-13b", "next-mistral-7b", "demo"):
        config = TextConfig(**shapes.SHAPES[name][0])
        shape = next(shape for shape in roofline.SHAPES if name in shape.name)
        assert roofline.Shape("", config, shape.vision, shape.text).weight_numbers == shape.weight_numbers
        assert vars(config).items() >= vars(shapes.text_config(name)).items()
    assert shapes.text_config("next-mistral-7b").num_key_value_heads == 8


def test_calls_that_do_something_are_counted():
    x = torch.zeros(4, 8)
    with engines.Calls() as calls:
        y = x + 1  # 128 bytes
        y.view(8, 4)[2:].t()
        y += 1
    assert (calls.launches, calls.new, calls.bytes) == (2, 1, 128)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 4])
def test_a_step_on_cuda_neither_allocates_nor_waits(batch):
    language = harness.random_language(SMALL, torch.bfloat16, "cuda")
    task = types.SimpleNamespace(workload=Workload("", batch, (40,), 9), seed=0)
    x = engines.prompts(task, language)
    checked = engines.answer(language, x, task.workload.spans, None, "auto", 8)
    cost = engines.step_cost(checked.step, checked.cache)
    assert cost["allocations"] == cost["mallocs"] == cost["syncs"] == 0
    assert cost["launches"] <= 3 and cost["kernels"] > 10  # the ids, and the graph


# ---------------------------------------------------------------- wrong results are not timed


def attend_wrongly(self, layer, q, k, v, rope=None, attend=RaggedCache.append_attend):
    """`RaggedCache.append_attend`, wrong only after pruning."""
    out = attend(self, layer, q, k, v, rope)
    return out if int(self.kv_len.min()) == int(self.pos.max()) else -out


def grow_too_far(self, tokens=1, held=False, grow=RaggedCache.grow):
    """`RaggedCache.grow`, but the cache loses the newest position."""
    self.pos += 1
    grow(self, tokens, held)


@pytest.mark.parametrize(
    ("name", "broken", "right", "words"),
    [
        ("grow", grow_too_far, [False, False, False], ["one long prefill", "mask", "mask"]),
        ("append_attend", attend_wrongly, [True, False, False], [None, "mask", "mask"]),  # detected by dense attention
    ],
)
def test_a_broken_step_is_not_timed(name, broken, right, words, here, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(RaggedCache, name, broken)
    flags = ["--workloads", "2x24,8+8", "--engines", "ours", "--new-tokens", "4", "--rounds", "1"]
    rows = measured(tmp_path, *flags, "--prune", "random@0.5", "fastv:layer=2@0.5", code=1)["rows"]
    assert [r["right"] for r in rows] == right
    assert all(r["why"] is word or word in r["why"] for r, word in zip(rows, words, strict=True))
    assert not any("ms" in key or "tokens_per_s" in key for r in rows if not r["right"] for key in r)
    assert capsys.readouterr().out.count("WRONG, not timed") == right.count(False)


def test_what_differs_from_transformers_is_not_timed(told):
    right = facts(), 0.1, [0.01]
    for broken, flags, said in (
        (facts(ids=((5, 6, 7), (5, 8, 1))), (), "greedy ids"),
        (facts(logits=((1.0, 2.1), (3.0, 1.0))), (), "logits differ from hf-eager by 0.045"),
        (facts(logits=((1.0, 2.0), (3.0, 1.1))), (), "logits differ from hf-eager"),
        (facts(finite=False), (), "not finite"),
        (facts(error=0.01), (), "one long prefill"),
        (facts(error=float("nan")), (), "one long prefill"),
        (facts(ids=((1, 6), (5, 8)), logits=((2.0, 1.0),)), ("--dtype", "bf16"), "logits differ"),
    ):
        answers = {("ours", "none"): (broken, 0.1, [0.01]), ("hf-eager", "none"): right, ("hf-sdpa", "none"): right}
        code, rows, out = told(answers, *flags)
        assert (code, [r["right"] for r in rows]) == (1, [False, True, True]), said
        assert said in rows[0]["why"] and "ms_per_token" not in rows[0] and "WRONG, not timed: " in out
    close = facts(ids=((5, 9, 7), (5, 8, 9)), logits=((1.0, 2.0001), (3.0, 1.0)))  # equal in 16 bits
    code, rows, _ = told({("ours", "none"): (close, 0.1, [0.01]), ("hf-sdpa", "none"): right}, "--dtype", "bf16")
    assert code == 0 and all(r["right"] for r in rows)


def test_what_differs_from_another_run_of_ours_is_not_timed(told):
    """A pruned run begins as the unpruned one, unless the method changes the prefill. Compiling changes no ids."""
    right, other = (facts(), 0.1, [0.01]), (facts(ids=((5, 6, 7), (6, 8, 9)), kept=0.5), 0.1, [0.01])
    runs = {("ours", "none"): right, ("ours", "random@0.5"): other, ("ours", "fastv@0.5"): other}
    code, rows, _ = told(runs)
    assert code == 1 and [r["right"] for r in rows] == [True, False, True]
    assert rows[1]["why"] == "the first token differs from the unpruned run"
    late = facts(ids=((5, 6, 7), (5, 8, 8))), 0.1, [0.01]
    runs = {(engine, prune): right for engine in engines.OURS for prune in ("none", "plphp@0.5")}
    code, rows, _ = told(runs | {("ours-compile", "plphp@0.5"): late})
    assert code == 1 and [r["right"] for r in rows] == [True, True, True, False]
    assert "without the compiler" in rows[3]["why"]
    code, rows, _ = told(runs | {("ours-compile", "none"): late})  # then its pruned run is not believed either
    assert [r["right"] for r in rows] == [True, True, False, False] and "unpruned run is wrong" in rows[3]["why"]


def test_an_error_that_is_no_number_is_not_overlooked(monkeypatch):
    """It may be in any of the steps, and max() would pass over it."""
    language = harness.random_language(SMALL, torch.float32, "cpu")
    x, spans = torch.randn(1, 6, 64), [(1, 4)]
    checked = engines.answer(language, x, spans, None, "auto", 3, watched=3)
    assert engines.error_of_steps(language, x[0], spans, None, None, checked) < 1e-5
    errors = iter([0.0, float("nan"), 0.0])
    monkeypatch.setattr(engines, "error", lambda got, wanted: next(errors))
    found = facts(error=engines.error_of_steps(language, x[0], spans, None, None, checked))
    task = types.SimpleNamespace(prune="none", dtype="fp32", kv_dtype="auto")
    assert "one long prefill" in bench_decode.is_wrong(task, found, None, None)


def test_an_engine_that_fails_is_told(told):
    right = facts(), 0.1, [0.01]
    missing = ModuleNotFoundError("No module named 'transformers'")
    for ours, theirs, code, found, said in (
        (right, missing, 0, [True, None], " not timed: No module named 'transformers'; see requirements-test.txt"),
        (RuntimeError("CUDA out of memory"), right, 0, [None, True], " not timed: RuntimeError: CUDA out of memory"),
        (right, (facts(), 0.1, []), 0, [True, None], " not timed: the answer has a single token"),
        (TypeError("no\nsuch"), right, 1, [False, True], " WRONG, not timed: TypeError: no such"),
    ):
        exit_code, rows, out = told({("ours", "none"): ours, ("hf-sdpa", "none"): theirs})
        assert (exit_code, [r["right"] for r in rows]) == (code, found) and said in out, said


# ---------------------------------------------------------------- arithmetic of the rows


def test_speeds_are_medians_and_their_ratios(told):
    held = 4 * 2 * 1536 * 15  # fp32, 2 sequences of 15 tokens; 1536 numbers of a token in the demo's shape
    answers = {
        ("ours", "none"): (facts(kv_bytes_held=4 * 2 * 1536 * 25, step={"launches": 9}), 0.1, [0.010, 0.040, 0.020]),
        ("ours", "random@0.5"): (facts(kept=0.5, kv_bytes_held=held), 0.2, [0.010, 0.016, 0.004]),
        ("hf-sdpa", "none"): (facts(), 0.4, [0.05, 0.05, 0.05]),
    }
    code, (none, pruned, hf), out = told(answers)
    assert code == 0 and (none["ms_per_token"], none["ms_p20"], none["ms_p80"]) == (20, 10, 40)
    assert none["tokens_per_s"] == 100 and none["step_launches"] == 9 and "per step: 9 launches" in out
    weights = report.step_bytes(load(DEMO, "fp32"), 0)
    ceiling = (weights + 4 * 2 * 1536 * 25) / (weights + held)
    assert pruned["ceiling_speedup"] == pytest.approx(ceiling) and pruned["speedup"] == 2
    assert pruned["ceiling_reached"] == pytest.approx(2 / ceiling)
    assert pruned["roofline_reached"] == pytest.approx((weights + held) / 1e10 / 0.010)
    assert (pruned["decode_x_hf-sdpa"], pruned["ttft_x_hf-sdpa"]) == (5, 2)
    assert hf["kv_bytes_held"] == hf["kv_bytes_full"] == none["kv_bytes_held"] and "speedup" not in hf


def test_prompts_beyond_the_context_are_marked(told):
    answers = {("ours", "none"): (facts(), 0.1, [0.01])}
    for workload, beyond in (("1x2000+16", False), ("1x2000+17", True), ("1x1000,1000+17", True)):
        _, (row,), out = told(answers, "--workloads", workload)  # plus 32 new tokens in a context of 2048
        assert row["beyond_context"] == beyond == ("LONGER THAN THE MODEL'S CONTEXT" in out)


def test_ctrl_c_keeps_what_was_measured(here, monkeypatch, tmp_path, capsys):
    def prepare(task):
        if task.workload.name == "1x5+5":
            raise KeyboardInterrupt
        return facts(), lambda: (0.1, [0.01])

    monkeypatch.setattr(engines, "prepare", prepare)
    flags = ["--workloads", "1x4+4", "1x5+5", "--engines", "ours", "--prune", "none"]
    rows = measured(tmp_path, "--shape", "demo", *flags, code=130)["rows"]
    assert [r["workload"] for r in rows] == ["1x4+4"]
    said = f"interrupted; the results so far are in {tmp_path / 'a.json'}"
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--workloads two", "'two'"),
        ("--shape demo --workloads picture", "--image"),
        ("--workloads 0x5+5", "'0x5+5'"),
        ("--prune nothing", "nothing"),
        ("--prune plphp@1.5", "1.5"),
        ("--prune fastv:layer=9@0.5", "layer"),
        ("--shape demo --image x.png", "--shape"),
        ("--model /nowhere", "/nowhere"),
        ("--image /nowhere.png", "/nowhere.png"),
        ("--json /nowhere/a.json", "/nowhere/a.json"),
        ("--device foo", "foo"),
        ("--device cpu --growth --prune plphp", "--prune"),
        ("--device cpu --growth --csv a.csv", "--csv"),
        ("--plot a.png", "--plot"),
        ("--new-tokens 1", "--new-tokens"),
        ("--rounds 0", "--rounds"),
        ("--engines vllm", "vllm"),
        ("--shape 70b", "70b"),
        ("--dtype int8", "int8"),
        ("--kv-dtype int4", "int4"),
        ("--kv-dtype int8 --engines ours hf-sdpa", "not for hf-sdpa; give ours or ours-compile"),
        ("--device cpu --growth --kv-dtype int8", "--kv-dtype"),
    ],
)
def test_what_cannot_be_run_is_said(flags, word, here, capsys):
    try:
        code = bench_decode.main(flags.split())
    except SystemExit as stopped:  # by argparse
        code = stopped.code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and word in said.err
    assert said.err.startswith("error: ") and len(said.err.splitlines()) == 1


# ---------------------------------------------------------------- growth


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_growth_is_measured_and_drawn(here, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_decode, "free_at_once", lambda: None)  # would slow down later tests
    plot = tmp_path / "a.png"
    data = measured(tmp_path, "--growth", "--smoke", "--plot", str(plot))
    assert data["tokens"] == [64, 128, 192] and plot.stat().st_size > 10000
    for what in ("decode ms", "prefill MB"):
        assert len(data[what]["values"]) == 3 and min(data[what]["values"]) >= 0 and data[what]["r2"] <= 1
    assert capsys.readouterr().out.count("R^2") == 2


def test_the_line_through_the_points():
    fit = bench_decode.fitted([1, 2, 4], [5.0, 7.0, 11.0])
    assert (fit["slope"], fit["intercept"], fit["r2"]) == pytest.approx((2, 3, 1))
    assert bench_decode.fitted([1, 2, 4, 8, 16], [1.0, 4.0, 16.0, 64.0, 256.0])["r2"] < 0.96  # a square is not a line


def test_growth_times_what_was_kept(monkeypatch):
    """The timed cache holds the requested number of rows per head, with different tokens in each head."""
    seen = []
    pack = RaggedCache.pack

    def watched(self, layer, k, v, keep=None):
        seen.append(keep)
        pack(self, layer, k, v, keep)

    monkeypatch.setattr(RaggedCache, "pack", watched)
    language = harness.random_language(SMALL, torch.float32, "cpu")
    assert len(bench_decode.decode_seconds(language, [7, 10], 1)) == 2
    assert [keep.sum(1).tolist() for keep in seen] == [[7, 7], [7, 7], [10, 10], [10, 10]]  # two layers of two heads
    assert seen[0].shape == (2, 20) and not torch.equal(seen[0][0], seen[0][1])
