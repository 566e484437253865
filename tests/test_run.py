"""run.py as users see it: streams, exit codes, and one line for every mistake."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import run
from model import Checkpoint, Generation, InputError, Sampling
from model.clip import VisionTower
from model.console import as_command, explain
from model.fast import FastStep
from model.flags import TEMPLATES, parser
from model.llama import DecoderLayer
from tests.paths import DEMO, DEMO_PICTURE, ROOT

PICTURE = str(DEMO_PICTURE)
ASK = ["--image", PICTURE, "--prompt", "Describe the picture."]
SIGN = ["--image", PICTURE, "--prompt", "What does the sign say?"]
ROW = 6 * 4 * 32 * 2 * 4  # bytes of a token: layers, KV heads, D, K and V, fp32


def process(*words, cwd=ROOT, stdout=subprocess.PIPE, **options):
    """A command in its own process."""
    words = [sys.executable, *words]
    return subprocess.run(words, cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120, **options)


@pytest.fixture
def reported(cli):
    """Function (flags) -> (the object of --json, stderr) of "Describe the picture." about the demo's picture."""

    def reported(*flags, code=0):
        ended, out, err = cli(*ASK, "--json", *flags)
        assert ended == code and out.count("\n") == 1, err
        return json.loads(out), err

    return reported


# ---------------------------------------------------------------- answering


def test_the_answer_and_nothing_else_is_on_stdout(tmp_path):
    done = process(str(ROOT / "run.py"), *ASK, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0 and re.fullmatch(r"There are four objects\..*\.\n", done.stdout)
    for words in ("template llava", "image mode crop", "float32 on cpu"):
        assert words in done.stderr


def test_json_is_one_object_with_every_field(reported):
    r, err = reported("--stats", "--seed", "7", "--device", "cpu")
    assert set(r) == {
        "text", "token_ids", "finish_reason", "model", "template", "image_mode", "images", "prompt_tokens",
        "vision_tokens", "new_tokens", "prune", "timing_ms", "peak_memory_bytes", "ceiling_speedup", "seed", "versions",
        "device", "dtype", "kv_dtype", "backend",
    }  # fmt: skip
    times, prune = r["timing_ms"], r["prune"]
    assert set(times) == {"load", "vision", "prefill", "prune", "decode_total", "decode_p50", "decode_p95"}
    assert r["images"] == [{"path": PICTURE, "size": [448, 448], "mode": "crop", "tiles": 1, "tokens": 256}]
    assert r["vision_tokens"] == 256 and r["new_tokens"] == len(r["token_ids"]) and r["finish_reason"] == "stop"
    assert prune["method"] == "none" and prune["retention_actual"] == 1.0 and prune["kept_per_layer"] == [256.0] * 6
    assert prune["kv_bytes_full"] == prune["kv_bytes_held"] == ROW * r["prompt_tokens"]
    slack = 64 * -(-r["new_tokens"] // 64)  # grows by 64 slots
    assert prune["kv_bytes_reserved"] == ROW * (r["prompt_tokens"] + slack)
    assert r["seed"] == 7 and r["ceiling_speedup"] == 1.0 and r["peak_memory_bytes"] > 5e7
    assert 0 < times["decode_p50"] <= times["decode_p95"]
    assert times["decode_total"] >= times["decode_p50"] * (r["new_tokens"] // 2)
    for word in ("time to first token", "95th percentile", "256 vision tokens", "GB/s (measured)", "MB  peak"):
        assert word in err
    total, steps, speed = re.search(r"decode +(\S+) ms  (\d+) steps of one token, (\S+) tokens/s", err).groups()
    assert float(speed) == pytest.approx(1e3 * int(steps) / times["decode_total"], abs=0.06)
    assert float(total) == pytest.approx(times["decode_total"], abs=0.06) and int(steps) == r["new_tokens"]
    assert re.search(r"per token +([\d.]+) ms  median", err)[1] == f"{times['decode_p50']:.2f}"
    assert re.search(r"KV cache +([\d.]+) MB  for the prompt; ", err)[1] == f"{1e-6 * prune['kv_bytes_held']:.2f}"
    assert "pruning" not in err and "unpruned" not in err


@pytest.mark.parametrize(
    ("flags", "requested", "kept"),
    [
        ("random --retention 0.5", 0.5, 128),
        ("random:retention=0.25,pooled=true", 0.25, 64),
        ("random --keep-tokens 40 --set seed=3", None, 40),
    ],
)
def test_pruning_is_reported(reported, flags, requested, kept):
    r, err = reported("--stats", "--device", "cpu", "--prune", *flags.split())
    prune, full = r["prune"], ROW * r["prompt_tokens"]
    assert prune["method"] == "random" and prune["retention_requested"] == requested
    assert prune["retention_actual"] == kept / 256 and prune["kept_per_layer"] == [kept] * 6
    held = full - ROW * (256 - kept)
    assert prune["kv_bytes_full"] == full and prune["kv_bytes_held"] == held
    assert prune["kv_bytes_reserved"] == held + ROW * 64 * -(-r["new_tokens"] // 64)
    assert 1 < r["ceiling_speedup"] < 1.2 and 0 < r["timing_ms"]["prune"] < r["timing_ms"]["prefill"]
    assert f"random kept {100 * kept / 256:.1f} % of the vision tokens, {kept:.1f} per KV head" in err
    assert f"{1e-6 * held:.2f} MB  for the prompt ({1e-6 * full:.2f} MB unpruned); " in err
    assert f"from the bytes read: {r['ceiling_speedup']:.2f}x\n" in err


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_keys_and_values_in_8_bits_are_reported(reported, codes):
    """Codes of 32 channels and a scale of 2 bytes, instead of 32 fp32 numbers."""
    r, err = reported("--stats", "--device", "cpu", "--prune", "random", "--retention", "0.5", "--kv-dtype", codes)
    prune, kept = r["prune"], (ROW * (r["prompt_tokens"] - 128)) * 34 // 128
    assert r["kv_dtype"] == codes and r["dtype"] == "float32"
    assert prune["kv_bytes_full"] == ROW * r["prompt_tokens"] and prune["kv_bytes_held"] == kept
    assert f"{1e-6 * kept:.2f} MB  for the prompt ({1e-6 * prune['kv_bytes_full']:.2f} MB unpruned in float32); " in err


SPECS = ["random:retention=0.02", "random:retention=0.9", "fastv:layer=1,retention=0.05"]


@pytest.mark.parametrize("spec", [*SPECS, "topk:query=lookahead,retention=0.02"])
@pytest.mark.parametrize("tokens", ["256", "5"])
def test_compare_shows_both_answers_and_where_they_part(reported, spec, tokens):
    plain, _ = reported("-n", tokens)
    r, err = reported("-n", tokens, "--prune", spec, "--compare")
    found = r["compare"]
    assert found["token_ids"] == plain["token_ids"] and found["text"] == plain["text"]
    ids = [[*one["token_ids"], *[2] * (one["finish_reason"] == "stop")] for one in (plain, r)]
    assert found["steps"] == len(ids[0]) and found["kv_bytes_held"] > r["prune"]["kv_bytes_held"]
    parted = (i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    assert found["first_divergence"] == next(parted, None)
    assert found["same_text"] == (r["text"] == plain["text"]) and 0 < found["kl_mean"] <= found["kl_max"]
    assert f"unpruned {plain['text']}\npruned   {r['text']}\n" in err and "nats on average" in err


def test_compare_without_a_picture_or_with_ctrl_c(cli, reported, failing):
    code, out, err = cli("--prompt", "What?", "-n", "3", "--prune", "fastv", "--compare", "--json")
    assert code == 0 and "compare" not in json.loads(out) and "nothing to compare" in err and "nothing to drop" in err
    failing(Generation, "again", KeyboardInterrupt())
    r, err = reported("--prune", "random", "--compare", code=130)
    assert r["text"] and "the comparison is missing" in err


def test_prune_none_is_no_flag(reported):
    plain, none = (reported(*more)[0] for more in ((), ("--prune", "none")))
    for took in (plain, none):
        del took["timing_ms"], took["peak_memory_bytes"]
    assert plain == none


def test_stats_leave_out_what_there_is_nothing_to_say_about(cli):
    """No pictures, a single token, a pruning that has nothing to prune; then several pictures."""
    _, _, err = cli("--prompt", "What?", "-n", "1", "--prune", "topk", "--stats")
    assert not re.search(r"^(vision|pruning|decode)", err, flags=re.M) and "prefill" in err and "KV cache" in err
    _, _, err = cli("--prompt", "What?", "-n", "2", "--stats")
    assert "ms  1 step of one token, " in err and "percentile" not in err
    _, _, err = cli(*ASK, "-n", "2", "--prune", "plphp", "--stats")
    assert " look-ahead rows; time to first token" in err
    _, _, err = cli("--image", PICTURE, PICTURE, "-p", "Compare the two pictures.", "-n", "2", "--stats")
    assert "2 pictures, 512 vision tokens" in err and err.count("demo.png: 448 x 448 pixels, 256 tokens") == 2


def test_the_page_shows_the_stats_of_today(cli):
    page = (ROOT / "benchmarks" / "README.md").read_text()
    shown = re.search(r"^### One answer.*?```text\n(.*?)```", page, flags=re.M | re.S)[1]
    _, _, err = cli(*ASK, "--stats", "--device", "cpu")
    said = [line for line in err.splitlines() if not line.startswith(("note: ", "the demo model: "))]
    shapes = [[re.sub(r"[\d.]+", "N", " ".join(line.split())) for line in one] for one in (shown.splitlines(), said)]
    assert shapes[0] == shapes[1]


def test_peak_memory_leaves_out_the_measurement_of_the_bandwidth():
    """It takes up to 512 MB, after the first answer."""
    asked = "How many objects are there?\nWhat does the sign say?\nHow many objects are there?\n"
    done = process("run.py", "--image", PICTURE, "--stats", "--device", "cpu", input=asked)
    first, *later = map(int, re.findall(r"^memory +(\d+) MB  peak", done.stderr, re.MULTILINE))
    assert len(later) == 2 and max(later) < first + 100


def test_what_pruning_did_and_a_cut_answer_are_said(reported, cli):
    r, err = reported("--prune", "topk", "--retention", "0.25", "-n", "3")
    assert r["finish_reason"] == "length" and r["new_tokens"] == 3
    assert "topk kept 25.0 % of the vision tokens: KV cache 0.47 MB instead of 1.6" in err
    assert "note: the answer was cut after 3 tokens; --max-new-tokens allows more" in err
    _, _, err = cli(*ASK)
    assert " kept " not in err and "cut" not in err


def test_only_the_demo_says_what_it_knows(cli, tmp_path):
    shutil.copytree(DEMO, tmp_path / "demo")
    for model, said in (("assets/demo", 1), (DEMO, 1), (tmp_path / "demo", 0)):
        with contextlib.chdir(ROOT):
            code, _, err = cli(*ASK, "-n", "1", "--model", model)
        assert code == 0 and err.count("knows only drawn shapes") == said
        assert "there is no picture, and the demo model" not in err
    assert "there is no picture, and the demo model" in cli(*ASK[2:], "-n", "1")[2]


def test_text_ids_and_stream_agree(cli, reported, demo):
    r, _ = reported()
    assert cli(*ASK)[1] == r["text"] + "\n" and demo.tokenizer.decode(r["token_ids"]) == r["text"]


def ended(argv):
    """Exit code of run.py as a command in this process."""
    try:
        return as_command(lambda: run.main([*argv]))
    except SystemExit as stopped:  # of argparse
        return stopped.code


def shown(encoding, *args):
    """(exit code, stdout, stderr) as bytes, from run.py as a command whose streams use this encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        code = ended(args)
    for stream in streams:
        stream.flush()
    return code, *(stream.buffer.getvalue() for stream in streams)


@pytest.mark.parametrize(
    ("encoding", "end"), [("utf-8", "é→😀"), ("cp1252", "é\\u2192\\U0001f600"), ("ascii", "\\xe9\\u2192\\U0001f600")]
)
def test_an_answer_that_the_terminal_cannot_show_is_not_lost(monkeypatch, tmp_path, encoding, end):
    import model.sampling

    flush = model.sampling.Writer.flush
    monkeypatch.setattr(model.sampling.Writer, "flush", lambda writer: flush(writer) + "é→😀")
    picture = os.fsencode(tmp_path) + b"/\xff.png"  # not UTF-8
    try:
        shutil.copy(PICTURE, picture)
    except OSError:
        pytest.skip("this file system has no such names")
    asked = "--image", os.fsdecode(picture), *SIGN[2:]
    for extra in ([], ["--no-stream"]):
        code, out, _ = shown(encoding, *asked, *extra)
        assert (code, out.decode(encoding)) == (0, f"The sign says NET.{end}\n")
    code, out, err = shown(encoding, *asked, "--json", "--prune", "random", "--compare")
    r = json.loads(out.decode(encoding))
    assert code == 0 and r["text"].endswith(".é→😀") and os.fsencode(r["images"][0]["path"]) == picture
    assert f"unpruned The sign says NET.{end}" in err.decode(encoding)
    os.unlink(picture)
    code, out, err = shown(encoding, *asked)
    assert (code, out) == (2, b"") and b"no picture at" in err and b"\\udcff.png" in err and err.count(b"\n") == 1


def test_pictures_from_elsewhere(cli, stdin, tmp_path, monkeypatch):
    """Several after one flag, from stdin, and by address."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(PICTURE, tmp_path / "a b.png")
    _, out, _ = cli("--image-file", tmp_path / "a b.png", PICTURE, "-p", "Compare the pictures.", "-n", "5", "--json")
    assert len(json.loads(out)["images"]) == 2
    stdin(DEMO_PICTURE.read_bytes())
    addresses = f"file://{tmp_path}/a%20b.png", f"FILE://localhost{tmp_path}/a b.png", f"file:{tmp_path}/a b.png"
    for name in ("-", "~/a b.png", *addresses):
        code, out, err = cli("--image", name, *SIGN[2:])
        assert (code, out) == (0, "The sign says NET.\n"), err


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_windows_text_is_the_same_prompt(cli, stdin, tmp_path, source):
    asked = "--image", PICTURE, "--json", "-n", "1", "--template", "raw", "--prompt"
    text, path = "<image>\nWhat is\nthis?", tmp_path / "q.txt"
    wanted = json.loads(cli(*asked, text)[1])["prompt_tokens"]
    windows = text.replace("\n", "\r\n") + "\r\n"
    for form in (text + "\n", "\ufeff" + text, windows, text.replace("\n", "\r"), "\ufeff" + windows):
        path.write_bytes(form.encode())
        stdin(form.encode())
        code, out, err = cli(*asked, "-" if source == "stdin" else f"@{path}")
        assert code == 0 and json.loads(out)["prompt_tokens"] == wanted, (form, err)


def test_windows_text_is_the_same_prompt_however_it_is_given(demo):
    """Line ends and byte-order marks from a shell variable, from Python or in a line of questions."""
    text = "What is\nthis?"

    def ids(text, **options):
        return Generation(demo, text, **options).ids

    for template in ("auto", "raw"):
        for form in ("\ufeff" + text, text.replace("\n", "\r\n"), text.replace("\n", "\r")):
            assert ids(form, template=template) == ids(text, template=template), form
    for form in (text + "\n", text + "\r\n"):
        assert ids(form) == ids(text)
        assert ids(form, template="raw") != ids(text, template="raw")  # verbatim, including its last line end
    wanted = ids(text, system="Be\nbrief.", template="vicuna")
    assert ids(text, system="\ufeffBe\r\nbrief.", template="vicuna") == wanted
    assert Sampling(stop="\ufeff#\r\n").stop == ("#\n",)
    with pytest.raises(InputError, match="non-empty"):
        Sampling(stop="\ufeff")


def test_windows_json_is_the_same_json(reported, tmp_path):
    """All JSON files of a checkpoint, and that of --set."""
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    settings, file = '{\r\n"retention":\r\n0.25}', tmp_path / "set.json"
    for data in (settings.encode(), ("\ufeff" + settings).encode(), settings.encode("utf-16")):
        file.write_bytes(data)
        r, _ = reported("--model", folder, "--prune", "random", "--set", f"@{file}", "-n", "4")
        assert r["prune"]["kept_per_layer"] == [64] * 6


def test_an_empty_question_is_refused_wherever_it_comes_from(refused, stdin, tmp_path, demo):
    path = tmp_path / "q.txt"
    for content in (b"", b"\r\n \r\n", b"\xef\xbb\xbf", None):
        path.write_bytes(content or b"")
        stdin(content)
        for prompt in (f"@{path}", "-"):
            assert "empty" in refused("--image", PICTURE, "--prompt", prompt)
    path.write_bytes("What is this?".encode("utf-16"))
    assert "UTF-16" in refused("--image", PICTURE, "--prompt", f"@{path}")
    for text in ("", " \n", "<image>", "\ufeff\r\n<image>"):
        with pytest.raises(InputError, match="empty"):
            Generation(demo, text, [PICTURE])
    Generation(demo, "<image>", [PICTURE], template="raw")  # raw accepts a prompt without a question


@pytest.mark.parametrize(
    "flags",
    [
        "--temperature 1e-400", "--temperature -0.0", "--temperature 1 --top-p 1e-320", "--temperature 1e4 --top-k +1",
        "--temperature 1e4 --top-p 5e-324 --top-k 999_999_999_999",
        "--temperature 1e-46 --top-p 1e-320 --top-k \u0661 --seed 18446744073709551615",
    ],
)  # fmt: skip
def test_tiny_numbers_give_the_greedy_answer(cli, flags):
    assert cli(*ASK, "-n", "9", *flags.split())[:2] == (0, "There are four objects. A small red cross\n")


@pytest.mark.parametrize(("waits", "threads", "said"), [(1e4, 2, 1), (0.05, 2, 0), (1e4, 1, 0)])
@pytest.mark.parametrize("file", [False, True])
def test_threads_are_set_and_waiting_is_said_once(cli, monkeypatch, tmp_path, waits, threads, said, file):
    seconds, seen = iter((0.0, waits, waits, waits)), []
    monkeypatch.setattr("model.report._waited", lambda: next(seconds))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "What?"}')
    asked = "--questions", tmp_path / "q.jsonl", "--answers", tmp_path / "a.jsonl"
    code, _, err = cli(*(asked if file else ASK), "-n", "40", "--threads", threads, "--device", "cpu")
    assert code == 0 and seen == [threads] and err.count("--threads 1 may be") == said, err


def test_waiting_is_what_the_system_counts():
    """Threads that share one core wait for each other; sleeping threads do not."""
    if not os.path.exists("/proc/self/schedstat") or not hasattr(os, "sched_setaffinity"):
        pytest.skip("the system does not say how long threads wait")
    code = (
        "import os, threading, time, torch; from model.report import CoreWait\n"
        "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); torch.set_num_threads(2)\n"
        "def compute():\n"
        "    while not over: torch.ones(400, 400).mm(torch.ones(400, 400))\n"
        "def sleep():\n"
        "    while not over: time.sleep(0.01)\n"
        "for work in (sleep, compute):\n"
        "    over, threads = False, [threading.Thread(target=work) for _ in range(3)]\n"
        "    for thread in threads: thread.start()\n"
        "    wait = CoreWait(torch.device('cpu')); time.sleep(0.6)\n"
        "    print('waiting' if wait.note() else 'not waiting', end=';'); over = True\n"
        "    for thread in threads: thread.join()\n"
    )
    done = process("-c", code)
    assert done.stdout == "not waiting;waiting;", done


def test_templates_and_the_system_text_change_the_prompt(cli, reported):
    more = [], ["--system", "Be brief."], ["--template", "vicuna"], ["--template", "raw"]
    assert len({reported("-n", "1", *flags)[0]["prompt_tokens"] for flags in more}) == 4
    verbatim = "--template", "raw", "--prompt", "USER: <image>\nDescribe the picture. ASSISTANT:"
    assert cli("--image", PICTURE, *verbatim)[1] == cli(*ASK)[1]


def test_bf16_runs_on_a_cpu(cli):
    code, out, err = cli(*ASK, "--dtype", "bf16")
    assert code == 0 and out.startswith("There are four objects.") and "bfloat16" in err


def test_triton_answers_like_torch(reported):
    """In the interpreter on a CPU; the report names the backend used."""
    pytest.importorskip("triton", reason="triton has no wheel for this system")
    answers = []
    for backend, device in (("torch", "cpu"), ("triton", "cuda" if torch.cuda.is_available() else "cpu")):
        flags = "-n", "4", "--prune", "random", "--backend", backend, "--device", device, "--dtype", "fp32"
        r, err = reported(*flags)
        answers.append(r["token_ids"])
        assert r["backend"] == backend and f"backend {backend}" in err
    assert answers[0] == answers[1] and len(answers[0]) == 4


# ---------------------------------------------------------------- help and versions


def test_help_needs_no_torch():
    code = (
        "import sys, run\ntry: run.main(['-h'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'PIL'} & set(sys.modules)"
    )
    done = process("-c", code)
    assert done.returncode == 0 and "--max-new-tokens" in done.stdout, done.stderr


def test_help_fits_on_a_screen_and_shows_each_flag_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = parser().format_help()
    flags = re.findall(r"^  (?:(-\w), )?(--[\w-]+)", text, flags=re.M)
    assert len(text.splitlines()) <= 64 and len(flags) == len(set(flags)) >= 37
    assert {("-m", "--model"), ("-n", "--max-new-tokens"), ("", "--top-p"), ("-h", "--help")} <= set(flags)
    for hidden in ("--model-path", "--image_path", "--query", "--top_p", "--conv-mode", "--profile"):
        assert hidden not in text
    assert text.count(" to 1024") == text.count("above 0 and up to 1\n") - 1 == 1 and "%" not in text


@pytest.mark.parametrize("alias", ["-m", "--model-path", "--weights", "--checkpoint", "--pretrained"])
def test_names_of_flags_from_other_projects_work(alias):
    args = parser().parse_args([alias, "x", "--image_path", "a", "--query", "q", "--max_new_tokens", "3", "--profile"])
    assert (args.model, args.image, args.prompt, args.max_new_tokens, args.stats) == ("x", ["a"], "q", 3, True)


def test_templates_are_those_of_the_tokenizer():
    from model.tokenizer import TEMPLATES as known

    assert ("auto", *known) == TEMPLATES


def test_versions_are_printed_without_a_model(cli, monkeypatch):
    code, out, err = cli("--version", "--model", "/nowhere")
    lines = dict(line.split(" ", 1) for line in out.splitlines())
    assert (code, err, set(lines)) == (0, "", {"plphp", "python", "torch", "triton"})
    assert lines["torch"] == torch.__version__ and re.fullmatch(r"\d+\.\d+\.\d+", lines["plphp"])
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton not installed\n" in cli("--version")[1]


# ---------------------------------------------------------------- streams, interruptions and failures


def test_ctrl_c_keeps_what_was_written():
    """After the first letter of a long answer."""
    command = [sys.executable, "-u", str(ROOT / "run.py"), *ASK, "-n", "1700", "--temperature", "30"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert first and "Traceback" not in err
    # the answer may end before the signal arrives
    assert process.returncode == 130 and "interrupted" in err or process.returncode in (0, -2)
    assert process.returncode == -2 or out.endswith("\n")


def test_ctrl_c_in_an_answer_still_reports(reported, failing):
    failing(FastStep, "__call__", KeyboardInterrupt(), at=5)
    r, err = reported(code=130)
    assert r["finish_reason"] == "interrupted" and r["new_tokens"] == 5 and "interrupted" in err
    assert r["text"] and r["timing_ms"]["decode_p50"] > 0


@pytest.mark.parametrize(("where", "name", "at"), [(VisionTower, "forward", 1), (DecoderLayer, "prefill", 3)])
def test_ctrl_c_before_the_first_token_still_reports(reported, failing, where, name, at):
    failing(where, name, KeyboardInterrupt(), at=at)
    r, _ = reported("--stats", code=130)
    assert r["text"] == "" and r["finish_reason"] == "interrupted"


@pytest.mark.parametrize(
    ("argv", "code", "out"),
    [([*SIGN, "--stats"], 0, "The sign says NET.\n"), (["--model", "no/such", "-p", "a"], 2, ""), (["--new"], 2, "")],
)
def test_nothing_goes_to_stdout_instead_of_a_closed_stderr(capsys, monkeypatch, argv, code, out):
    monkeypatch.setattr(sys, "stderr", None)
    assert (ended(argv), capsys.readouterr().out) == (code, out)


def test_every_command_may_lose_its_reader(monkeypatch):
    commands = [path for path in (ROOT / "run.py", *(ROOT / "tools").glob("*.py")) if "__main__" in path.read_text()]
    assert len(commands) > 15
    for path in commands:
        assert path.read_text().endswith('if __name__ == "__main__":\n    sys.exit(as_command(main))\n'), path
    for size in (10, 10**6):  # fails at the final flush; fails while writing
        for leave in (lambda: None, lambda: sys.exit(0)):
            reader, writer = os.pipe()
            os.close(reader)
            with os.fdopen(writer, "w") as stream:
                monkeypatch.setattr(sys, "stdout", stream)
                assert as_command(lambda: (print("x" * size), leave())) == 0  # noqa: B023
            monkeypatch.undo()
    monkeypatch.setattr(sys, "stdout", None)  # closed, so nothing to flush
    assert as_command(lambda: 3) == 3


def test_a_process_that_cannot_write_says_so():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        done = process("run.py", *ASK, stdout=full)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "error: " in done.stderr


def test_a_failure_while_running_is_exit_1(cli, failing):
    failing(Generation, "prefill", RuntimeError("the model produced NaN\nor infinity; try --dtype fp32"))
    code, out, err = cli(*ASK)
    assert code == 1 and err.splitlines()[-1].startswith("error: ") and "NaN or infinity" in err
    with pytest.raises(RuntimeError):
        run.main([*ASK, "--debug"])


def test_an_import_that_ctrl_c_broke_off_is_an_interruption():
    assert explain(ImportError("cannot load module more than once per process"))[1] == 130


def test_without_torch_it_says_what_to_do():
    done = process("-S", "run.py", *ASK)
    assert done.returncode == 2 and done.stdout == "" and "make run" in done.stderr and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- errors

# words of the error: flags that cause it, in lines; a picture and, unless they have one, a prompt come before them
BAD_FLAGS = {
    "--max-new-tokens is 'x'; give a whole number of 1 or more\n": "--max-new-tokens x",
    "--max-new-tokens is '1.5'; give a whole number": "-n 1.5",
    "--max-new-tokens is 0": "-n 0",
    "--temperature is ": "--temperature -1 \n --temperature nan \n --temperature inf \n --temperature 1e9",
    "--top-p is 1.5; give a number above 0 and up to 1\n": "--temperature 1 --top_p 1.5",
    "--top-p is ": "--temperature 1 --top-p nan \n --temperature 1 --top-p 0",
    "--seed": "--seed 18446744073709551616 \n --seed -1",
    "--threads is 9999; give a whole number from 1 to 1024\n": "--threads 9999",
    "--threads is ": "--threads 0 \n --threads two",
    "--retention is ": "--prune random --retention 0 \n --prune random --retention 1.1",
    "--keep-tokens is 0": "--prune random --keep-tokens 0",
    "--template is 'llama3'; use auto, llava, vicuna, llava_v1, mistral, onevision, chatml, raw\n": "--template llama3",
    "--backend is 'cuda'; use ": "--backend cuda",
    "--dtype is 'int8'; use ": "--dtype int8",
    "--retention needs a value; write --retention=VALUE if the value begins with a dash\n": "--retention",
    "--json": "--json=yes",
    "there is no flag --retntion; did you mean --retention?\n": "--retntion 0.5",
    "there is no flag --conv-modes; did you mean --template?\n": "--conv-modes=llava",  # of a hidden name
    "there is no flag --keep_tokens; did you mean --keep-tokens?\n": "--keep_tokens 9",
    "there is no flag --stream; see run.py -h\n": "--stream",  # not its opposite, --no-stream
    "there is no flag --gpu; see run.py -h\n": "--gpu 0",
    "there is no flag --no-such flag": "'--no-such\x0bflag'",
    "window is a setting of the method; write --set window=32\n": "--window 32",
    "cover is a setting of the method; write --set cover=0.5\n": "--cover=0.5",
    "sink_keys is a setting of the method; write --set sink_keys=VALUE\n": "--sink-keys --stats",
    "write the method's setting as --set query=VALUE\n": "--prompt a? --query lookahead \n --question a? --prompt b?",
    "'stray' belongs to no flag; put text with spaces in quotes\n": "stray",
    "'beta=0.2' belongs to no flag": "--prune plphp --set alpha=0.1 beta=0.2",
    "system text": "--system '<image>'",
    "--system": "--system x --template raw",
    "UTF-8": "--prompt a\udcffb",
    "empty": "--prompt '' \n --prompt ' ' \n --prompt '\t\x0b' \n --prompt '<image>' \n --prompt ' ' --template raw",
    "NUL": "--prompt a\0b \n --model a\0b \n --image a\0b \n --prompt @a\0b \n --prune random --set @a\0b \n"
    "--prune a\0b.py::keep \n --questions a\0b --answers x --prompt x \n --questions x --answers a\0b --prompt x \n"
    "--questions x --image-folder a\0b --prompt x",
    "nothing is downloaded": "--image HTTPS://example.com/x.png \n --image ftp://example.com/x.png",
    "another machine": "--image file://example.com/x.png",
    "; @ in front of a prompt names a file": "--prompt @/nowhere/q.txt",
    "no picture at file:///nowhere/x.png": "--image file:///nowhere/x.png",
    "/nowhere": "--image /nowhere/x.png \n --image ~/nowhere/x.png \n --model /nowhere \n --prompt @/nowhere/q.txt \n"
    "--prune random --set @/nowhere.json \n --prune /nowhere.py::f \n --list-methods /nowhere.py::f \n"
    "--list-methods plphp --model /nowhere",
    "no picture": f"--image {'x' * 5000}",
    "stdin": "--image - --image -",
    "nobody/nothing": "--model nobody/nothing",
    "--questions": "--keep-errors",
    "--temperature above 0": "--top-p 0.5 \n --top-k 5",
    "--stop": "--stop ''",
    "need --prune METHOD": "--retention 0.5 \n --keep-tokens 5 \n --set seed=1",
    "exclude": "--prune random --retention 0.5 --keep-tokens 3",
    "one of them": "--prune random:retention=0.3 --keep-tokens 4",
    "None": "--prune random --set retention=null",
    "--prune METHOD and --temperature 0": "--compare \n --compare --prune random --temperature 1",
    "fastx": "--prune fastx \n --list-methods fastx",
    "alpha": "--prune plphp:alpha=0.1,beta=0.2",
    "layer is 6": "--prune fastv:layer=6",
    "speed": "--prune random:speed=1",
    "KEY=VALUE": "--prune random --set seed",
    "--image-mode": "--image-mode anyres",
    "tpu": "--device tpu",
    "cuda:99": "--device cuda:99",
    "meta": "--device meta",
    "2 <image>, and the number of pictures is 1;": "--prompt '<image> and <image>'",
    "2048": f"--prompt '{'circle ' * 2500}'",
}


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_bad_flags(refused, words):
    for flags in BAD_FLAGS[words].split("\n"):
        given = shlex.split(flags)
        assert words in refused(*ASK[: 2 if "--prompt" in given else None], *given), flags


def test_a_missing_picture_comes_with_advice(refused):
    for images, advice in (
        (["no.png", "-p", "a"], "check the path"),
        (["my", "picture.png", "-p", "a"], "check the path, and put it in quotes if it has spaces"),
        ([PICTURE, "What is this?"], "if this is the question, put --prompt before it, else check the path"),
    ):
        assert advice in refused("--image", *images)


def test_triton_is_refused_without_cuda_before_anything_is_loaded(refused, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "--backend 'triton'" in refused(*ASK, "--backend", "triton", "--device", "cpu", "--model", "/nowhere")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("config.json", rb"\{", b""),
        ("config.json", rb'"llava"', b'"qwen2_vl"'),
        ("config.json", rb'("intermediate_size": )\d+', rb"\g<1>520"),  # a wrong shape
        ("model.safetensors", rb".{1000}\Z", b""),
        ("model.safetensors", rb"\A.{64}", b"\xff" * 64),
        ("tokenizer.model", rb".+", b"nothing"),
        *((file, None, None) for file in ("config.json", "model.safetensors", "tokenizer.model")),  # no such file
    ],
)
def test_bad_checkpoints(refused, tmp_path, file, old, new):
    """test_checkpoint.py has all that is refused."""
    path = shutil.copytree(DEMO, tmp_path / "demo") / file
    data = path.read_bytes()
    path.unlink()
    if old is not None:
        path.write_bytes(re.sub(old, new, data, count=1, flags=re.S))
        assert path.read_bytes() != data
    refused("--model", path.parent, *ASK)


def test_what_can_be_refused_is_refused_before_weights_are_read(refused, failing):
    failing(Checkpoint, "read_weights", AssertionError("weights were read"))
    assert "2048" in refused("--image", PICTURE, "--prompt", "circle " * 2500)
    assert "2 <image>" in refused("--image", PICTURE, "--prompt", "<image><image>")
    assert "README.md" in refused("--image", ROOT / "README.md", "--prompt", "What?")


# ---------------------------------------------------------------- waiting


@pytest.mark.parametrize("flags", [[], ["--no-stream"], ["--stats"], ["--json"], ["--compare"]])
def test_only_who_reports_times_waits_for_the_device(cli, monkeypatch, flags):
    waits = []
    for module in ("generate", "view"):
        monkeypatch.setattr(f"model.{module}.clock", lambda device, wait: waits.append(wait) or 0.0)
    assert cli(*ASK, "--max-new-tokens", "2", "--prune", "fastv", *flags)[0] == 0
    assert len(waits) >= 5 and any(waits) == (flags not in ([], ["--no-stream"]))


def test_the_clock_waits_for_cuda_and_only_if_asked(monkeypatch):
    from model.view import clock

    waited = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    for device, wait in (("cuda", False), ("cpu", True), ("cuda:1", True)):
        assert clock(torch.device(device), wait) > 0
    assert waited == [torch.device("cuda:1")]
