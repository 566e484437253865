"""Tensor parallel: several processes with gloo on this machine answer like one, and end together."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import VOCAB, refusal, write_json
from one_of_many import answered, sizes
from test_parity import noise
from test_replicas import run_ranks

import run
from model import Generation, load, open_checkpoint
from model.config import InputError
from model.parallel import split
from model.processes import ENDED, FINISHED, Team, Voice, connect, contents, with_patience
from model.pruning import make_method
from model.pruning.yopo import Looking
from model.report import introduce, step_bytes
from model.share import WHOLE, Share, checksum, gather_alike
from model.view import Pruning
from tests.paths import DEMO, DEMO_PICTURE, ROOT
from tools import parallel_model

LAYERS = 3
LIMIT = 240  # seconds for a group of processes; then all are killed, and the test fails
NEXT_GRID = [[28 * rows, 28 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def start(world, *argv, **environment):
    """Start `python *argv` for each rank as torchrun does -> list of Popen."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, argv)], cwd=ROOT, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | own | {"RANK": str(rank)} | environment,
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(processes, limit=LIMIT):
    """-> [(exit code, stdout, stderr)] of the processes. All are killed after the limit."""
    end = time.monotonic() + limit
    try:
        told = [p.communicate(timeout=max(0.1, end - time.monotonic())) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *streams) for p, streams in zip(processes, told, strict=True)]


def the_line(ended):
    """The only line that the processes printed about their end; only one of them printed any."""
    lines = [line for _, _, err in ended for line in err.splitlines() if line.startswith(("error:", "Traceback"))]
    assert len(lines) == 1 and re.fullmatch("error: .+[;,] .+", lines[0]), ended
    return lines[0]


ANY = ["plphp", "plphp-ada", "hired+plphp", "h2o", "fastv"]
YOPO = "yopo:neurons=1,threshold=0.5,heads=[[1,0,0,0,0,0,1,0],[0,0,1,0,1,0,0,0],[0,0,0,0,0,1,0,0]]"
SHAPES = {  # name: text config, vision config, top of config.json, methods
    "mha": ({"num_key_value_heads": 4, "vocab_size": VOCAB - 1}, {}, {}, [None, *ANY]),
    "gqa": ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "attention_bias": True},
            {}, {}, [None, *ANY, "topk:values=true", "zipvl", "sparsevlm", "pyramiddrop", YOPO]),
    "next": ({"num_key_value_heads": 4}, {}, {"model_type": "llava_next", "image_grid_pinpoints": NEXT_GRID},
             [None, "plphp", "h2o", "fastv"]),
    "onevision": (
        {"model_type": "qwen2", "num_key_value_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True},
        {"model_type": "siglip_vision_model", "patch_size": 9},
        {"model_type": "llava_onevision", "image_grid_pinpoints": NEXT_GRID}, [None, "plphp", "plphp-ada", "h2o"]),
}  # fmt: skip
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
QUICK = (None, "plphp", "h2o"), (None, "plphp", "plphp-ada", "hired+plphp")
COUNTED = [None, "plphp", "plphp-ada", "fastv", "h2o"]


@pytest.fixture(scope="module")
def cases(make_checkpoint, tmp_path_factory, pytestconfig, request):
    """{shape: case of one_of_many.py}; a folder with a checkpoint and a picture for each. Some methods need --all."""
    found, compiles = {}, COMPILER and any("compiled" in item.name for item in request.session.items)
    for name, (text, vision, top, methods) in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        methods = methods if pytestconfig.option.all else [m for m in methods if m in QUICK[name in ("mha", "gqa")]]
        make_checkpoint(folder, text | {"num_hidden_layers": LAYERS}, vision, top, seed=3)
        if "image_grid_pinpoints" in top:
            kind = {"next": "LlavaNextImageProcessor", "onevision": "LlavaOnevisionImageProcessor"}[name]
            size = {"height": 28, "width": 28} if name == "onevision" else {"shortest_edge": 28}
            more = {"image_processor_type": kind, "image_grid_pinpoints": NEXT_GRID, "size": size}
            write_json(folder / "preprocessor_config.json", more | {"crop_size": {"height": 28, "width": 28}})
        noise(60, 40, seed=1).save(folder / "picture.png")
        found[name] = {"folder": str(folder), "picture": str(folder / "picture.png"), "methods": methods}
        found[name]["counted"] = {"mha": COUNTED, "next": [None]}.get(name, [])
        found[name]["compiled"] = ["plphp"] if name == "mha" and compiles else []
    return found


FEW = pytest.mark.skipif((os.cpu_count() or 1) < 4, reason="four processes take minutes on fewer than four cores")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=[pytest.mark.thorough, FEW])])
def shared(request, cases, tmp_path_factory):
    """(number of processes, {shape: what one_of_many.py found}). Of several workers of pytest-xdist one runs it, and
    the others wait for its result."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"answers-{request.param}"
    told, limit = folder / "ended.json", LIMIT * request.param
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + limit + 10
        while not told.exists() and time.monotonic() < end:
            time.sleep(0.1)
    else:
        (folder / "cases.json").write_text(json.dumps(list(cases.values())))
        ended = finish(start(request.param, ROOT / "tests" / "one_of_many.py", folder), limit)
        (folder / "new").write_text(json.dumps(ended))
        (folder / "new").rename(told)
    ended = json.loads(told.read_text())
    assert [code for code, _, _ in ended] == [0] * request.param, ended[0][2][-2000:]
    return request.param, dict(zip(cases, torch.load(folder / "answers.pt"), strict=True))


@pytest.fixture(scope="module")
def alone(cases):
    """{shape: the results of one process}."""
    return {name: answered(load(c["folder"], "fp32"), c["methods"], c["picture"]) for name, c in cases.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_several_processes_answer_like_one(shared, alone, shape):
    (found, batch), *_ = shared[1][shape]
    wanted, together = alone[shape]
    assert batch == together and len(batch) == 4
    for method, one in wanted.items():
        many = found[method]
        assert many["token_ids"] == one["token_ids"] and len(one["token_ids"]) == 32, method
        assert torch.equal(many["masks"], one["masks"]) and many["kept"] == one["kept"], method
        assert many["logits"].shape == one["logits"].shape and one["logits"].std() > 0.5
        torch.testing.assert_close(many["logits"], one["logits"], rtol=0, atol=1e-4)
        assert all(many[name] == one[name] for name in ("bytes_held", "bytes_reserved")), method  # 1.0 x in all
    assert len({str(one["kept"]) for one in wanted.values()}) >= 3  # the methods differ


@pytest.mark.parametrize("shape", SHAPES)
def test_no_process_holds_or_reads_much_more_than_its_part(shared, cases, shape):
    world, found = shared
    memory = found[shape][1]
    whole = load(cases[shape]["folder"], "bf16").model
    language, everything = sizes(whole.language_model), sizes(whole)
    assert language <= sum(own for own, _, _ in memory) <= 1.02 * language
    for own, held, peak in memory:
        assert own <= 0.6 * language if world == 2 else own <= 0.35 * language
        assert held == own + everything - language  # tower and projector are whole
        assert 0.9 * held <= peak <= 1.1 * held


def test_a_layer_has_two_all_reduces_and_a_method_one_all_gather(shared):
    """Beyond the layers: one all-reduce for the embedding, per run of text; one all-gather for the head."""
    counts = shared[1]["mha"][2]
    layers, pieces = LAYERS, 2  # text before and behind the picture
    plain = counts[None]
    ends = {"all_gather": 2, "all_reduce": pieces + 1}  # the head, kept tokens; the embedding, bytes
    assert plain[0] == {**ends, "all_reduce": ends["all_reduce"] + 2 * layers}
    assert plain[1] == {"all_reduce": 1 + 2 * layers, "all_gather": 1}
    for method, (prefill, step) in counts.items():
        assert step == plain[1] and prefill["all_reduce"] == plain[0]["all_reduce"], method
        more = prefill["all_gather"] - plain[0]["all_gather"]
        assert 0 < more <= layers if method else more == 0, (method, more)


@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")
def test_compiled_steps_with_collectives_answer_alike(shared, alone):
    found = shared[1]["mha"][3]
    assert found == {"plphp": alone["mha"][0]["plphp"]["token_ids"]}


def test_the_counts_of_the_roofline_are_those_of_a_run(shared, cases):
    """tools/roofline.py --tp calculates its times from them."""
    counts = shared[1]["mha"][2]
    config = open_checkpoint(cases["mha"]["folder"]).config.text_config
    prefill = partial(parallel_model.prefill, config, tokens=9, text=5, runs=2)
    assert counts[None] == [*map(parallel_model.counts, (prefill(), parallel_model.step(config)))]
    every = parallel_model.counts(prefill(measured=1))
    gathers = every.pop("all_gather")
    assert counts["plphp"][0] == every | {"all_gather": gathers - 1}  # it measures in all layers but one
    assert shared[1]["next"][2][None][0] == parallel_model.counts(prefill(vision=9))  # squares are divided


# ---------------------------------------------------------------- run.py

ASK = "run.py", "--image", DEMO_PICTURE, "--prompt", "How many objects are there?"


def test_one_process_prints_one_answer(cli):
    """With look-ahead rows, whose adapters are divided too; started by torchrun, as in tools/README.md."""
    command = sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"
    words = *map(str, ASK), "--prune", "plphp:query=lookahead", "--json"
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=True)
    _, out, err = cli(*words[1:])
    many, one = (json.loads(told) for told in (done.stdout, out))
    assert many["text"] == "The picture has four objects." and many["token_ids"] == one["token_ids"]
    assert many["prune"] == one["prune"] and many["ceiling_speedup"] == one["ceiling_speedup"] > 1
    assert done.stderr.splitlines()[-len(err.splitlines()) :] == err.splitlines()


def begun(process):
    """Wait until the process has printed the start of its answer -> that text."""
    read = process.stdout.read(3)
    assert read, process.communicate(timeout=LIMIT)
    return read


def slowed(folder, ranks="01"):
    """A program that runs run.py, where each decode step of these ranks takes half a second, so that a test can
    interrupt it. It imports torch before run.py could keep torch's C++ code from reporting each broken connection."""
    program = folder / "slowly.py"
    program.write_text(
        "import os; os.environ['TORCH_CPP_LOG_LEVEL'] = 'ERROR'\n"
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import run, model.llama as llama\n"
        "decode = llama.Llama.decode\n"
        "def slow(*args, **options): time.sleep(0.5); return decode(*args, **options)\n"
        f"if os.environ['RANK'] in '{ranks}': llama.Llama.decode = slow\nsys.exit(run.as_command(run.main))\n"
    )
    return program


@pytest.mark.parametrize(("victim", "torchrun"), [
    pytest.param(1, False, id="1"), pytest.param(1, True, id="torchrun"),
    pytest.param(0, False, id="0", marks=pytest.mark.thorough),
])  # fmt: skip
def test_a_killed_process_ends_all_in_seconds_with_one_line(tmp_path, victim, torchrun):
    """With and without torchrun, which sends SIGTERM to the others."""
    processes = start(2, slowed(tmp_path), *ASK[1:])
    begun(processes[0])
    processes[victim].kill()
    killed = time.monotonic()
    if torchrun:
        processes[0].terminate()
    ended = finish(processes)
    assert time.monotonic() - killed < 10
    assert ended[1 - victim][0] == (128 + signal.SIGTERM if torchrun else 1) and "another process ended" in the_line(
        ended
    )


@pytest.mark.parametrize("slow", ["01", "1"])
def test_ctrl_c_ends_all_with_130_and_one_line(tmp_path, slow):
    """If process 1 alone is slow, process 0 waits for it in a collective, where it does not notice Ctrl-C."""
    processes = start(2, slowed(tmp_path, slow), *ASK[1:])
    text = begun(processes[0])
    for process in processes:
        process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    ended = finish(processes)
    assert time.monotonic() - sent < 10 and [code for code, _, _ in ended] == [130, 130]
    told = [line for _, _, err in ended for line in err.splitlines() if "interrupted" in line]
    assert len(told) == 1 and text in "The picture has four objects." and ended[1][1:] == ("", "")


def test_ctrl_c_ends_the_wait_for_processes_that_do_not_come():
    """Process 0 waits for another one, which comes later than the test can wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = free.getsockname()
    processes, end = start(1, *ASK, WORLD_SIZE="2", MASTER_PORT=str(place[1])), time.monotonic() + LIMIT
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(place):  # the store of process 0
            break
        time.sleep(0.1)
    time.sleep(0.5)
    processes[0].send_signal(signal.SIGINT)
    assert finish(processes, 10) == [(130, "", "error: interrupted; nothing was written\n")]


def test_ctrl_c_is_not_lost_while_torch_is_imported(tmp_path):
    """Parts of torch that are written in C discard any exception that a module raises which they import."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT); [*range(99)]\nexcept KeyboardInterrupt: pass\n"
    )
    processes = start(2, *ASK, PYTHONPATH=str(tmp_path))
    assert finish(processes, 20) == [(130, "", "error: interrupted; nothing was written\n"), (130, "", "")]


RANDOM = """
import os, numpy, torch

class Picked:
    def pick(self, picture):
        return torch.arange(9 + int(os.environ["RANK"]))

class Narrowed:
    def narrow(self, view):
        stay = view.text.clone()
        stay[view.spans[0][0]] = os.environ["RANK"] == "1"
        return stay

def keep(view):
    keep = torch.from_numpy(numpy.random.default_rng().random((view.kv_heads, view.tokens)) > 0.5)
    return keep | view.text
"""
OTHER_DTYPE = """
import torch
from model.checkpoint import Checkpoint
Checkpoint.choose_dtype = lambda *_: (torch.float32, torch.bfloat16)[rank]
"""
REFUSED = {  # words of the only line: (hook, more flags)
    "nowhere.png": ("if rank == 1: argv += ['--image', 'nowhere.png']",),
    "nothing": ("", "--prune", "nothing"),
    "gloo could not connect the processes": ("if rank: import os; os.environ['GLOO_SOCKET_IFNAME'] = 'none'",),
    "the checkpoint of process 1 differs": ("argv += ['--model', '{folder}/' + str(rank)]",),
    "--seed is 1 in process 1 and 0 in process 0": ("argv += ['--seed', str(rank)]", "--temperature", "1"),
    "--dtype auto of process 1 differs": (OTHER_DTYPE,),
    "the method chose other tokens in another process": ("", "--prune", "{folder}/mine.py::keep"),
    "chose other tokens in another process": ("", "--prune", "{folder}/mine.py::Picked"),
    "chose other tokens": ("", "--prune", "{folder}/mine.py::Narrowed"),
}


def test_each_failure_is_told_once(make_checkpoint, tmp_path):
    """One start of Python for all. An error of all processes or of one, and what would make them answer differently."""
    for rank in range(2):
        make_checkpoint(tmp_path / str(rank), {"num_hidden_layers": 1 + rank})
    (tmp_path / "mine.py").write_text(RANDOM)
    cases = [
        {"size": 2, "hook": hook, "argv": [*map(str, ASK[1:]), *more]}
        for hook, *more in ([words.replace("{folder}", str(tmp_path)) for words in case] for case in REFUSED.values())
    ]
    for words, result in zip(REFUSED, run_ranks(tmp_path, *cases), strict=True):
        (line,) = [line for line in result["err"].splitlines() if line.startswith(("error:", "Traceback"))]
        assert words in line and re.fullmatch("error: .+[;,] .+", line) and result["seconds"] < 20, result
        assert 2 in result["codes"] and 0 not in result["codes"], result


# ---------------------------------------------------------------- refusals in this process


def test_late_differences_of_large_files_are_noticed(tmp_path):
    """Files of equal size that differ only behind their first million bytes, and in the last one."""
    said = []
    for late in (b"\0" * 2_000_000, b"\1" * 2_000_000, b"\0" * 1_999_999 + b"\1"):
        (tmp_path / "model.safetensors").write_bytes(bytes(10**6) + late)
        said.append(b"".join(contents(tmp_path)))
    assert len(set(said)) == 3 and len({len(one) for one in said}) == 1


def test_only_the_first_process_tells():
    store = dist.HashStore()
    zero, one = (
        SimpleNamespace(store=store, rank=rank, lock=threading.Lock(), told=False, voice=Voice(io.StringIO(), rank))
        for rank in range(2)
    )
    Team.tell(one, "error: a\n", 0)
    start = time.monotonic()
    Team.tell(zero, "error: b\n", 0)
    assert time.monotonic() - start > 0.3  # or others could not see in its store that one has told
    assert [team.voice.stream.getvalue() for team in (zero, one)] == ["", "error: a\n"]


@pytest.mark.parametrize("rank", [0, 1])
def test_no_process_waits_at_the_end_for_one_that_is_lost(monkeypatch, capsys, rank):
    """Process 1 has not come; or process 0, with the store, has ended."""
    monkeypatch.setattr("model.processes.LEAVE", 0.05)

    def gone(*_):
        raise dist.DistNetworkError("Connection reset")

    store = SimpleNamespace(add=gone) if rank else dist.HashStore()
    team = SimpleNamespace(rank=rank, size=2, over=threading.Event(), watch=threading.Thread(), store=store)
    team.watch.start()
    assert Team.finish(team) == 1 and team.over.is_set()
    assert capsys.readouterr().err.startswith("error: another process ended")


@pytest.mark.parametrize(("line", "said"), [
    ("NCCL error: remote process exited or there was a network error", ENDED),
    ("NCCL error: unhandled system error; run again", "NCCL error: unhandled system error; run again"),
])  # fmt: skip
def test_only_an_error_that_another_process_caused_is_replaced(line, said):
    team, told = SimpleNamespace(rank=0, voice=SimpleNamespace(error=f"error: {line}\n")), []
    team.tell = lambda line, patience: told.append(line)
    with_patience(team, 1)
    assert told == [f"error: {said}\n"]


def test_process_0_ends_at_once_if_another_has_told_why(capsys):
    store, start = dist.HashStore(), time.monotonic()
    store.set("told", "")
    team = SimpleNamespace(rank=0, size=2, over=threading.Event(), watch=threading.Thread(), store=store)
    team.watch.start()
    assert Team.finish(team) == 1 and time.monotonic() < start + 10 and capsys.readouterr().err == ""


def test_a_process_of_which_nothing_is_heard_is_lost(monkeypatch):
    """Replicas exchange nothing while they answer. One that has finished is silent, too, and so is 4, still to come."""
    monkeypatch.setattr("model.processes.SILENT", 0.1)
    monkeypatch.setattr("model.processes.BEAT", 0.1)
    team, heard = SimpleNamespace(listening=dist.HashStore(), size=5), {}
    for rank in range(4):
        team.listening.add(f"beats {rank}", 5)
    team.listening.add("beats 1", FINISHED)
    assert Team._lost(team, heard) is None
    time.sleep(0.3)  # process 0 was suspended and looks before the others' next beat
    assert Team._lost(team, heard) is None
    for rank in (0, 2):
        team.listening.add(f"beats {rank}", 1)
    assert Team._lost(team, heard) == 3
    team.listening.add("beats 3", 1)
    assert Team._lost(team, heard) is None


def test_what_a_method_chose_is_compared_without_a_second_collective():
    """The order of what it chose counts, and so does which tokens they are."""
    a, b = torch.tensor([[True, False, True]]), torch.tensor([[False, True, True]])
    none, one = torch.arange(0), torch.arange(1)
    sums = {int(checksum(0, chosen)) for chosen in ([a], [b], [a, b], [b, a], [a.T.long() * 2], [], [one], [one, none])}
    assert len(sums) == 8 and all(0 <= one < 2**31 - 1 for one in sums)
    own, asked = torch.tensor([[3, 4], [5, 6]], dtype=torch.int32), []

    def share(other):
        def gather(mine):
            asked.append(mine)
            theirs = mine.clone()
            theirs[:, -1] = other
            return torch.cat((mine, theirs))

        return SimpleNamespace(ranks=2, gather=gather)

    mark = checksum(0, [a])
    assert torch.equal(gather_alike(share(int(mark)), own, mark), torch.cat((own, own))) and len(asked) == 1
    assert "chose other tokens" in refusal(gather_alike, share(int(checksum(0, [b]))), own, mark)


@pytest.mark.parametrize(("world", "fit"), [(3, "use 1, 2, 4"), (8, "use 1, 2, 4")])
def test_world_sizes_that_do_not_fit_the_heads_are_refused(world, fit):
    assert refusal(split, open_checkpoint(DEMO), mesh(0, world)).endswith(fit)


def mesh(rank, ranks):
    return SimpleNamespace(
        size=lambda: ranks, get_local_rank=lambda: rank, get_group=lambda: None, device_type="cpu"
    )  # fmt: skip


@pytest.mark.parametrize("shape", ["mha", "gqa"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_samples_of_a_divided_model_are_those_of_the_whole(cases, monkeypatch, shape, ranks):
    """By which look-ahead rows are known to fit; and `--dtype auto` goes by the size of the whole model."""
    monkeypatch.setattr(Share, "total", lambda self, own: own)
    folder = cases[shape]["folder"]
    parts = [split(open_checkpoint(folder), mesh(rank, ranks)).read_weights("fp32") for rank in range(ranks)]
    one = load(folder, "fp32")
    assert {step_bytes(part, 7) for part in parts} == {step_bytes(one, 7)}  # the bounds of --stats and --json
    for name, whole in one.model.language_model.named_parameters():
        full = f"language_model.{name}"
        found = [(p.share, p.model.language_model.get_parameter(name)) for p in parts]
        samples = [share.sample(name, own, 8) for share, own in found]
        sample = sum(samples) if full in parts[0].share.parts else samples[-1]
        assert torch.equal(sample, WHOLE.sample(name, whole, 8)), name
        assert all(share.size(full, own) == whole.numel() for share, own in found), name


@pytest.mark.parametrize("counts", [[], [1], [5], [1, 1, 1], [2, 1, 4]])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_squares_of_all_pictures_are_divided(monkeypatch, ranks, counts):
    """Evenly; one alone is encoded by all. Some processes may have none, and so may a question."""
    pictures = [*torch.rand(sum(counts), 2, 3).split(counts)] if counts else []
    sent, done = [], []

    def encode(squares):
        done.append(len(squares))
        return 2 * squares.sum(2, keepdim=True)

    monkeypatch.setattr(Share, "gather", lambda self, own: sent.append(own) or own.repeat(ranks, 1, 1))
    for rank in range(ranks):
        before = sum(done)
        found = [*Share(mesh(rank, ranks)).each(encode, iter(pictures), counts)]
        assert [f.shape for f in found] == [(n, 2, 1) for n in counts]
        assert min(1, len(counts)) <= sum(done) - before <= -(-sum(counts) // ranks)
    if sum(counts) <= 1:
        assert not sent and all(map(torch.equal, found, map(encode, pictures)))
    else:
        assert torch.equal(torch.cat(sent)[: sum(counts)], encode(torch.cat(pictures)))


def test_steps_with_collectives_are_not_captured():
    cache = SimpleNamespace(fused=True, pos=SimpleNamespace(is_cuda=True, is_cpu=False))
    language = open_checkpoint(DEMO).model.language_model
    captured = open_checkpoint(DEMO).step(language, cache)
    checkpoint = split(open_checkpoint(DEMO), mesh(1, 2))
    assert captured.captures and not checkpoint.step(checkpoint.model.language_model, cache).captures


@pytest.mark.parametrize(("device", "ranks"), [("cuda", 2), ("cuda", 1), ("cpu", 2)])
def test_a_note_says_that_steps_are_not_captured(monkeypatch, capsys, device, ranks):
    """On this machine's CPU, which is called a GPU."""
    generation = Generation(load(DEMO, "fp32"), "What is this?", [DEMO_PICTURE])
    split_up = replace(generation.checkpoint, share=SimpleNamespace(ranks=ranks))
    monkeypatch.setattr(type(split_up), "device", torch.device(device))
    monkeypatch.setattr(generation, "checkpoint", split_up)
    monkeypatch.setattr(Generation, "backend", "torch")
    introduce(run.parser().parse_args([*map(str, ASK[1:])]), generation)
    assert ("steps are not captured" in capsys.readouterr().err) == (device == "cuda" and ranks == 2)


ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(("name", "value", "said"), [
    ("MASTER_ADDR", "", "MASTER_ADDR is not set"), ("MASTER_PORT", "", "MASTER_PORT is not set"),
    ("MASTER_PORT", "x", "MASTER_PORT is x"), ("RANK", "", "RANK is not set"), ("RANK", "2", "RANK is 2"),
    ("WORLD_SIZE", "two", "WORLD_SIZE is two"), ("MASTER_ADDR", "nowhere.invalid", "nowhere.invalid has no address"),
])  # fmt: skip
def test_what_torchrun_would_have_set_is_needed(monkeypatch, refused, name, value, said):
    for key, given in (ENVIRONMENT | {name: value}).items():
        monkeypatch.setenv(key, given)
    if (name, value) == ("RANK", "2"):
        with pytest.raises(InputError, match="RANK is 2"):
            connect()
    else:
        assert said in refused(*ASK[1:])
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_port_of_another_program_is_refused(monkeypatch, refused):
    with socket.create_server(("localhost", 0)) as other:
        for key, given in (ENVIRONMENT | {"MASTER_PORT": str(other.getsockname()[1])}).items():
            monkeypatch.setenv(key, given)
        assert "is used by another program; give another" in refused(*ASK[1:])


@pytest.mark.parametrize(("words", "said"), [
    (["--tp", "2"], "torchrun --nproc-per-node 2"), (["--tp", "0"], "--tp is 0"),
])  # fmt: skip
def test_one_process_cannot_share_a_model(refused, words, said):
    assert said in refused(*ASK[1:], *words)


@pytest.mark.parametrize(("words", "said"), [
    ([], "stdin belongs to none"), (["--prompt", "-"], "stdin belongs to none"),
    (["--prompt", "x", "--tp", "1"], "--tp 1 is not the number"),
])  # fmt: skip
def test_what_several_processes_cannot_do_is_refused(capsys, words, said):
    with pytest.raises(SystemExit):
        run.command(words, team=SimpleNamespace(size=2))
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("neurons", [0.5, 1.0])
def test_a_part_of_the_neurons_is_refused(neurons):
    share = SimpleNamespace(ranks=2, own=lambda heads: heads)
    pruning = Pruning(make_method("yopo:heads=[[1]]"), 1, [(0, 2)], share=share)
    q = torch.zeros(1, 1, 4, 8)
    looking = Looking(torch.ones(1, dtype=torch.bool), neurons=neurons)
    if neurons < 1:
        assert "neurons=1" in refusal(pruning._look, q, q, q, looking)
    else:
        assert pruning._look(q, q, q, looking).shape == q.shape
