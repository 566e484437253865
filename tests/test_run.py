"""run.py as users see it: streams, exit codes, and one line for every mistake."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

import run
from model.console import as_command, explain
from model.flags import TEMPLATES, parser
from tests.paths import DEMO, DEMO_PICTURE, ROOT

PICTURE = str(DEMO_PICTURE)
ASK = ["--image", PICTURE, "--prompt", "Describe the picture."]


def cli(*args, **kwargs):
    """run.py in its own process."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *args], capture_output=True, text=True, timeout=120, **kwargs
    )


def inside(capsys, *args):
    """(exit code, stdout, stderr) of run.py in this process, which avoids importing torch again."""
    try:
        code = run.main(list(args))
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def refused(capsys):
    """Check that the arguments fail: exit 2, one line on stderr with cause and remedy, nothing on stdout."""

    def check(*args, naming=""):
        code, out, err = inside(capsys, *args)
        assert code == 2 and out == "", (code, out, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
        assert ";" in err or "," in err, err
        assert naming in err, err
        return err

    return check


# ---------------------------------------------------------------- answering


def test_the_answer_and_nothing_else_is_on_stdout(tmp_path):
    done = cli(*ASK, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0
    assert (
        done.stdout.startswith("There are four objects.")
        and done.stdout.endswith(".\n")
        and done.stdout.count("\n") == 1
    )
    assert "template llava" in done.stderr and "image mode crop" in done.stderr and "float32 on cpu" in done.stderr


def test_the_demo_reads_and_lists(capsys):
    code, out, _ = inside(capsys, "--image", PICTURE, "--prompt", "What does the sign say?")
    assert (code, out) == (0, "The sign says NET.\n")
    code, out, _ = inside(capsys, "--image", PICTURE, "--prompt", "List the objects row by row.", "--no-stream")
    assert out == "A small red cross, a large black star, a large blue square, a large orange star.\n"


def test_json_is_one_object_with_every_field(capsys):
    code, out, err = inside(capsys, *ASK, "--json", "--stats", "--seed", "7", "--device", "cpu")
    r = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert set(r) == {
        "text", "token_ids", "finish_reason", "model", "template", "image_mode", "images", "prompt_tokens",
        "vision_tokens", "new_tokens", "prune", "timing_ms", "peak_memory_bytes", "ceiling_speedup", "seed", "versions",
        "device", "dtype", "backend",
    }  # fmt: skip
    assert set(r["timing_ms"]) == {"load", "vision", "prefill", "prune", "decode_total", "decode_p50", "decode_p95"}
    assert r["images"] == [{"path": PICTURE, "size": [448, 448], "tiles": 1, "tokens": 256}]
    assert r["vision_tokens"] == 256 and r["new_tokens"] == len(r["token_ids"]) and r["finish_reason"] == "stop"
    row = 6 * 4 * 32 * 2 * 4  # layers, KV heads, D, K and V, bytes
    prune = r["prune"]
    assert prune["method"] == "none" and prune["retention_actual"] == 1.0 and prune["kept_per_layer"] == [256.0] * 6
    assert prune["kv_bytes_full"] == prune["kv_bytes_held"] == row * r["prompt_tokens"]
    slack = 64 * -(-(r["new_tokens"]) // 64)  # grows by 64 slots
    assert prune["kv_bytes_reserved"] == row * (r["prompt_tokens"] + slack)
    assert r["seed"] == 7 and r["ceiling_speedup"] == 1.0 and r["peak_memory_bytes"] > 5e7
    times = r["timing_ms"]
    assert 0 < times["decode_p50"] <= times["decode_p95"] and times["decode_total"] >= times["decode_p50"] * (
        r["new_tokens"] // 2
    )
    for word in ("time to first token", "95th percentile", "256 vision tokens", "GB/s (measured)", "MB  peak"):
        assert word in err
    steps, speed, total = re.search(r"decode +([\d.]+) ms  (\d+) steps of one token, ([\d.]+) tokens/s", err).group(
        2, 3, 1
    )
    assert float(speed) == pytest.approx(1e3 * int(steps) / times["decode_total"], abs=0.06)
    assert float(total) == pytest.approx(times["decode_total"], abs=0.06) and int(steps) == r["new_tokens"]
    assert re.search(r"per token +([\d.]+) ms  median", err)[1] == f"{times['decode_p50']:.2f}"
    assert re.search(r"KV cache +([\d.]+) MB  for the prompt; ", err)[1] == f"{1e-6 * prune['kv_bytes_held']:.2f}"
    assert "pruning" not in err and "unpruned" not in err


@pytest.mark.parametrize(
    ("flags", "requested", "kept"),
    [
        (["--prune", "random", "--retention", "0.5"], 0.5, 128),
        (["--prune", "random:retention=0.25,pooled=true"], 0.25, 64),
        (["--prune", "random", "--keep-tokens", "40", "--set", "seed=3"], None, 40),
    ],
)
def test_pruning_is_reported(capsys, flags, requested, kept):
    code, out, err = inside(capsys, *ASK, "--json", "--stats", "--device", "cpu", *flags)
    r = json.loads(out)
    prune, row = r["prune"], 6 * 4 * 32 * 2 * 4  # layers, KV heads, D, K and V, bytes
    assert code == 0 and prune["method"] == "random" and prune["retention_requested"] == requested
    assert prune["retention_actual"] == kept / 256 and prune["kept_per_layer"] == [kept] * 6
    held = row * (r["prompt_tokens"] - 256 + kept)
    assert prune["kv_bytes_full"] == row * r["prompt_tokens"] and prune["kv_bytes_held"] == held
    assert prune["kv_bytes_reserved"] == held + row * 64 * -(-r["new_tokens"] // 64)
    assert 1 < r["ceiling_speedup"] < 1.2 and 0 < r["timing_ms"]["prune"] < r["timing_ms"]["prefill"]
    assert f"random kept {100 * kept / 256:.1f} % of the vision tokens, {kept:.1f} per KV head" in err
    assert f"{1e-6 * held:.2f} MB  for the prompt ({1e-6 * prune['kv_bytes_full']:.2f} MB unpruned); " in err
    assert f"from the bytes read: {r['ceiling_speedup']:.2f}x\n" in err


@pytest.mark.parametrize(
    "spec",
    [
        "random:retention=0.02", "random:retention=0.9", "fastv:layer=1,retention=0.05",
        "topk:query=lookahead,retention=0.02",
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", ["256", "5"])
def test_compare_shows_both_answers_and_where_they_part(capsys, spec, tokens):
    asked = *ASK, "--max-new-tokens", tokens, "--json"
    plain = json.loads(inside(capsys, *asked)[1])
    code, out, err = inside(capsys, *asked, "--prune", spec, "--compare")
    r = json.loads(out)
    found = r["compare"]
    assert code == 0 and found["token_ids"] == plain["token_ids"] and found["text"] == plain["text"]
    ended = plain["finish_reason"] == "stop"
    assert found["steps"] == plain["new_tokens"] + ended and found["kv_bytes_held"] > r["prune"]["kv_bytes_held"]
    pairs = zip(
        [*plain["token_ids"], *[2] * ended], [*r["token_ids"], *[2] * (r["finish_reason"] == "stop")], strict=False
    )
    assert found["first_divergence"] == next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    assert found["same_text"] == (r["text"] == plain["text"]) and 0 < found["kl_mean"] <= found["kl_max"]
    assert f"unpruned {plain['text']}\npruned   {r['text']}\n" in err and "nats on average" in err


def test_compare_without_a_picture_or_with_ctrl_c(capsys, monkeypatch):
    from model import report

    code, out, err = inside(
        capsys, "--prompt", "What?", "--max-new-tokens", "3", "--prune", "fastv", "--compare", "--json"
    )
    assert code == 0 and "compare" not in json.loads(out) and "nothing to compare" in err and "nothing to drop" in err

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "logits_along", interrupt)
    code, out, err = inside(capsys, *ASK, "--prune", "random", "--compare", "--json")
    assert code == 130 and json.loads(out)["text"] and "the comparison is missing" in err


def test_prune_none_is_no_flag(capsys):
    plain, none = (json.loads(inside(capsys, *ASK, "--json", *more)[1]) for more in ((), ("--prune", "none")))
    for took in (plain, none):
        del took["timing_ms"], took["peak_memory_bytes"]
    assert plain == none


def test_plphp_answers_a_long_question_right_with_half_of_the_bytes(capsys):
    """The README's command, with the settings from the demo's folder."""
    question = "--image", str(DEMO_PICTURE), "--prompt", "Spell the word on the sign."
    code, out, err = inside(capsys, *question, "--prune", "plphp", "--stats", "--json")
    r = json.loads(out)
    assert code == 0 and r["text"] == "The sign says NET: N, E, T."
    assert r["prune"]["retention_actual"] < 0.51 and "upper bound on the decoding speed-up" in err


def test_stats_leave_out_what_there_is_nothing_to_say_about(capsys):
    """No pictures, a single token, a pruning that has nothing to prune; then several pictures."""
    _, _, err = inside(capsys, "--prompt", "What?", "-n", "1", "--prune", "topk", "--stats")
    assert not re.search(r"^(vision|pruning|decode)", err, flags=re.M) and "prefill" in err and "KV cache" in err
    _, _, err = inside(capsys, "--prompt", "What?", "-n", "2", "--stats")
    assert ", 1 step of one token, " in err.replace("ms  ", "ms, ") and "percentile" not in err
    _, _, err = inside(capsys, "--image", PICTURE, PICTURE, "-p", "Compare the two pictures.", "-n", "2", "--stats")
    assert "2 pictures, 512 vision tokens" in err and err.count("demo.png: 448 x 448 pixels, 256 tokens") == 2


def test_the_page_shows_the_stats_of_today(capsys):
    page = (ROOT / "benchmarks" / "README.md").read_text()
    shown = re.search(r"^### One answer.*?```text\n(.*?)```", page, flags=re.M | re.S)[1]
    _, _, err = inside(capsys, *ASK, "--stats", "--device", "cpu")
    said = [line for line in err.splitlines() if not line.startswith(("note: ", "the demo model: "))]
    assert [re.sub(r"[\d.]+", "N", " ".join(line.split())) for line in shown.splitlines()] == [
        re.sub(r"[\d.]+", "N", " ".join(line.split())) for line in said
    ]


def test_peak_memory_leaves_out_the_measurement_of_the_bandwidth():
    """It takes up to 512 MB, after the first answer."""
    asked = "How many objects are there?\nWhat does the sign say?\nHow many objects are there?\n"
    done = cli("--image", PICTURE, "--stats", "--device", "cpu", input=asked)
    first, *later = map(int, re.findall(r"^memory +(\d+) MB  peak", done.stderr, re.MULTILINE))
    assert len(later) == 2 and max(later) < first + 100


def test_what_pruning_did_and_a_cut_answer_are_said(capsys):
    _, _, err = inside(capsys, *ASK, "--prune", "topk", "--retention", "0.25", "-n", "3")
    assert "topk kept 25.0 % of the vision tokens: KV cache 0.47 MB instead of 1.6" in err
    assert "note: the answer was cut after 3 tokens; --max-new-tokens allows more" in err
    _, _, err = inside(capsys, *ASK)
    assert " kept " not in err and "cut" not in err


def test_without_a_picture_the_demo_says_so(capsys):
    for flags, said in (([], True), (["--image", PICTURE], False)):
        _, _, err = inside(capsys, "--prompt", "Describe the picture.", "-n", "1", *flags)
        assert ("there is no picture, and the demo model" in err) == said


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--image", "no.png", "-p", "a"], "check the path"),
        (["--image", "my", "picture.png", "-p", "a"], "check the path, and put it in quotes if it has spaces"),
        (["--image", PICTURE, "What is this?"], "if this is the question, put --prompt before it, else check the path"),
    ],
)
def test_a_missing_picture_comes_with_advice(refused, flags, advice):
    refused(*flags, naming=advice)


def test_an_import_that_ctrl_c_broke_off_is_an_interruption():
    assert explain(ImportError("cannot load module more than once per process"))[1] == 130


def test_only_the_demo_says_what_it_knows(capsys, tmp_path):
    for model, said in (("assets/demo", 1), (str(DEMO), 1), (str(copy_of_demo(tmp_path / "demo")), 0)):
        with contextlib.chdir(ROOT):
            code, _, err = inside(capsys, *ASK, "-n", "1", "--model", model)
        assert code == 0 and err.count("knows only drawn shapes") == said


def test_text_ids_and_stream_agree(capsys):
    from model import load

    _, streamed, _ = inside(capsys, *ASK)
    _, whole, _ = inside(capsys, *ASK, "--json")
    r = json.loads(whole)
    assert streamed == r["text"] + "\n" and load(DEMO).tokenizer.decode(r["token_ids"]) == r["text"]


def shown(encoding, *args):
    """(exit code, stdout, stderr) as bytes, from run.py as a command whose streams use this encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            code = as_command(lambda: run.main(list(args)))
        except SystemExit as stopped:
            code = stopped.code
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
    asked = "--image", os.fsdecode(picture), "--prompt", "What does the sign say?"
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


@pytest.mark.parametrize("flag", ["--image-file", "--image"])
def test_pictures_from_elsewhere(capsys, tmp_path, flag, monkeypatch):
    """A relative path, a picture on stdin, several after one flag."""
    shutil.copy(PICTURE, tmp_path / "a b.png")
    code, out, _ = inside(
        capsys, flag, str(tmp_path / "a b.png"), PICTURE, "-p", "Compare the two pictures.", "-n", "5", "--json"
    )
    assert code == 0 and len(json.loads(out)["images"]) == 2
    with open(PICTURE) as picture:  # read as bytes
        monkeypatch.setattr(sys, "stdin", picture)
        assert (
            inside(capsys, "--image", "-", "-p", "How many objects are there?")[1] == "The picture has four objects.\n"
        )


def test_the_prompt_may_come_from_a_file_and_place_the_picture(capsys, tmp_path):
    (tmp_path / "q.txt").write_text("<image>\nDescribe the picture.\n")
    _, from_file, _ = inside(capsys, "--image", PICTURE, "--prompt", f"@{tmp_path / 'q.txt'}")
    _, plain, _ = inside(capsys, *ASK)
    assert from_file == plain


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_windows_text_is_the_same_prompt(capsys, tmp_path, monkeypatch, source):
    asked = "--image", PICTURE, "--json", "-n", "1", "--template", "raw", "--prompt"
    text = "<image>\nWhat is\nthis?"
    wanted = json.loads(inside(capsys, *asked, text)[1])["prompt_tokens"]
    windows = text.replace("\n", "\r\n") + "\r\n"
    for form in (text + "\n", "\ufeff" + text, windows, text.replace("\n", "\r"), "\ufeff" + windows):
        (tmp_path / "q.txt").write_bytes(form.encode())
        with open(tmp_path / "q.txt", "rb") as file:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
            code, out, err = inside(capsys, *asked, "-" if source == "stdin" else f"@{tmp_path / 'q.txt'}")
        assert code == 0 and json.loads(out)["prompt_tokens"] == wanted, (form, err)


def test_windows_text_is_the_same_prompt_however_it_is_given():
    """Line ends and byte-order marks from a shell variable, from Python or in a line of questions."""
    from model import Generation, InputError, load
    from model.sampling import Sampling

    checkpoint, text = load(DEMO), "What is\nthis?"
    for template in ("auto", "raw"):
        wanted = Generation(checkpoint, text, template=template).ids
        for form in ("\ufeff" + text, text.replace("\n", "\r\n"), text.replace("\n", "\r")):
            assert Generation(checkpoint, form, template=template).ids == wanted, form
    for form in (text + "\n", text + "\r\n"):
        assert Generation(checkpoint, form).ids == Generation(checkpoint, text).ids
        assert Generation(checkpoint, form, template="raw").ids != wanted  # verbatim, including its last line end
    wanted = Generation(checkpoint, text, system="Be\nbrief.", template="vicuna").ids
    assert Generation(checkpoint, text, system="\ufeffBe\r\nbrief.", template="vicuna").ids == wanted
    assert Sampling(stop="\ufeff#\r\n").stop == ("#\n",)
    for empty in ("\ufeff", "\ufeff\r\n"):
        with pytest.raises(InputError, match="empty"):
            Generation(checkpoint, empty)
    with pytest.raises(InputError, match="non-empty"):
        Sampling(stop="\ufeff")


def test_windows_json_is_the_same_json(capsys, tmp_path):
    """All JSON files of a checkpoint, and that of --set."""
    folder = copy_of_demo(tmp_path / "demo")
    for path in folder.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    settings = '{\r\n"retention":\r\n0.25}'
    for data in (settings.encode(), ("\ufeff" + settings).encode(), settings.encode("utf-16")):
        (tmp_path / "set.json").write_bytes(data)
        flags = "--prune", "random", "--set", f"@{tmp_path / 'set.json'}", "--json", "-n", "4"
        code, out, err = inside(capsys, "--model", str(folder), *ASK, *flags)
        assert code == 0 and json.loads(out)["prune"]["kept_per_layer"] == [64] * 6, err


def test_an_empty_question_is_refused_wherever_it_comes_from(refused, tmp_path, monkeypatch):
    from model import Generation, InputError, load

    for content in (b"", b"\r\n \r\n", b"\xef\xbb\xbf"):
        (tmp_path / "q.txt").write_bytes(content)
        refused("--image", PICTURE, "--prompt", f"@{tmp_path / 'q.txt'}", naming="empty")
        with open(tmp_path / "q.txt", "rb") as file:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
            refused("--image", PICTURE, "--prompt", "-", naming="empty")
    monkeypatch.setattr(sys, "stdin", None)  # closed
    refused("--image", PICTURE, "--prompt", "-", naming="empty")
    (tmp_path / "q.txt").write_bytes("What is this?".encode("utf-16"))
    refused("--image", PICTURE, "--prompt", f"@{tmp_path / 'q.txt'}", naming="UTF-16")
    checkpoint = load(DEMO)
    for text in ("", " \n", "<image>"):
        with pytest.raises(InputError, match="empty"):
            Generation(checkpoint, text, [PICTURE])
    Generation(checkpoint, "<image>", [PICTURE], template="raw")  # raw accepts a prompt without a question


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "1e-46"], ["--temperature", "5e-324"], ["--temperature", "1e-400"], ["--temperature", "-0.0"],
        ["--temperature", "1e-38"], ["--temperature", "1", "--top-p", "1e-320"],
        ["--temperature", "1e4", "--top-k", "+1"],
        ["--temperature", "1e4", "--top-p", "5e-324", "--top-k", "999_999_999_999"],
        ["--temperature", "1e-46", "--top-p", "1e-320", "--top-k", "\u0661", "--seed", "18446744073709551615"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_tiny_numbers_give_the_greedy_answer(capsys, flags):
    code, out, _ = inside(capsys, *ASK, "-n", "9", *flags)
    assert (code, out) == (0, "There are four objects. A small red cross\n")


def test_pictures_by_address(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(PICTURE, tmp_path / "a b.png")
    for name in (
        "~/a b.png",
        f"file://{tmp_path}/a%20b.png",
        f"FILE://localhost{tmp_path}/a b.png",
        f"file:{tmp_path}/a b.png",
    ):
        code, out, err = inside(capsys, "--image", name, "--prompt", "What does the sign say?")
        assert (code, out) == (0, "The sign says NET.\n"), err


@pytest.mark.parametrize(("waits", "threads", "said"), [(1e4, 2, 1), (0.05, 2, 0), (1e4, 1, 0)])
@pytest.mark.parametrize("file", [False, True])
def test_threads_are_set_and_waiting_is_said_once(capsys, monkeypatch, tmp_path, waits, threads, said, file):
    from model import report

    seconds, seen = iter((0.0, waits, waits, waits)), []
    monkeypatch.setattr(report, "_waited", lambda: next(seconds))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "What?"}')
    asked = "--questions", str(tmp_path / "q.jsonl"), "--answers", str(tmp_path / "a.jsonl")
    code, _, err = inside(capsys, *(asked if file else ASK), "-n", "40", "--threads", str(threads), "--device", "cpu")
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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "not waiting;waiting;", done


def test_raw_takes_the_prompt_verbatim(capsys):
    _, plain, _ = inside(capsys, *ASK)
    _, raw, _ = inside(
        capsys, "--image", PICTURE, "--template", "raw", "--prompt", "USER: <image>\nDescribe the picture. ASSISTANT:"
    )
    assert raw == plain


def test_a_system_text_and_other_templates_change_the_prompt(capsys):
    counts = set()
    for extra in ([], ["--system", "Be brief."], ["--template", "vicuna"], ["--template", "raw"]):
        code, out, _ = inside(capsys, *ASK, "--json", "-n", "1", *extra)
        counts.add(json.loads(out)["prompt_tokens"])
    assert len(counts) == 4


def test_max_new_tokens_ends_with_length(capsys):
    _, out, _ = inside(capsys, *ASK, "--json", "-n", "3")
    assert json.loads(out)["finish_reason"] == "length" and json.loads(out)["new_tokens"] == 3


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_odd_pictures_are_answered(capsys, tmp_path, mode):
    for i, image in enumerate((Image.new("RGB", (1, 1)), Image.new("P", (10000, 3)), Image.new("CMYK", (30, 20)))):
        path = tmp_path / f"{i}.{'tif' if image.mode == 'CMYK' else 'png'}"
        image.save(path)
        code, out, err = inside(capsys, "--image", str(path), "-p", "What is this?", "-n", "2", "--image-mode", mode)
        assert code == 0 and out.endswith("\n") and ("CMYK" in err) == (image.mode == "CMYK")


def test_bf16_runs_on_a_cpu(capsys):
    code, out, err = inside(capsys, *ASK, "--dtype", "bf16")
    assert code == 0 and out.startswith("There are four objects.") and "bfloat16" in err


# ---------------------------------------------------------------- streams and interruptions


def test_help_needs_no_torch():
    code = (
        "import sys, run\ntry: run.main(['-h'])\nexcept SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--max-new-tokens" in done.stdout, done.stderr


def test_help_fits_on_a_screen_and_shows_each_flag_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = parser().format_help()
    flags = re.findall(r"^  (?:(-\w), )?(--[\w-]+)", text, flags=re.M)
    assert len(text.splitlines()) <= 60 and len(flags) == len(set(flags)) >= 37
    assert {("-m", "--model"), ("-n", "--max-new-tokens"), ("", "--top-p"), ("-h", "--help")} <= set(flags)
    for hidden in ("--model-path", "--image_path", "--query", "--top_p", "--conv-mode", "--profile"):
        assert hidden not in text
    assert text.count(" to 1024") == text.count("above 0 and up to 1\n") - 1 == 1 and "%" not in text


def test_versions_are_printed_without_a_model(capsys, monkeypatch):
    code, out, err = inside(capsys, "--version", "--model", "/nowhere")
    lines = dict(line.split(" ", 1) for line in out.splitlines())
    assert (code, err, set(lines)) == (0, "", {"plphp", "python", "torch", "triton"})
    assert lines["torch"] == torch.__version__ and re.fullmatch(r"\d+\.\d+\.\d+", lines["plphp"])
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton not installed\n" in inside(capsys, "--version")[1]


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


def test_ctrl_c_in_an_answer_still_reports(capsys, monkeypatch):
    import model.fast

    step, calls = model.fast.FastStep.__call__, []

    def interrupted(self, token):
        calls.append(token)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self, token)

    monkeypatch.setattr(model.fast.FastStep, "__call__", interrupted)
    code, out, err = inside(capsys, *ASK, "--json")
    r = json.loads(out)
    assert code == 130 and r["finish_reason"] == "interrupted" and r["new_tokens"] == 5 and "interrupted" in err
    assert r["text"] and r["timing_ms"]["decode_p50"] > 0


def test_ctrl_c_before_the_first_token_still_reports(capsys, monkeypatch):
    from model.llama import DecoderLayer

    prefill, calls = DecoderLayer.prefill, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prefill(self, *args)

    monkeypatch.setattr(DecoderLayer, "prefill", interrupted)
    code, out, _ = inside(capsys, *ASK, "--json", "--stats")
    r = json.loads(out)
    assert code == 130 and r["text"] == "" and r["finish_reason"] == "interrupted"


@pytest.mark.parametrize(
    ("argv", "code", "out"),
    [(["--image", PICTURE, "-p", "How many objects are there?", "--stats"], 0, "The picture has four objects.\n"),
     (["--model", "no/such", "-p", "a"], 2, ""), (["--unknown"], 2, "")],
)  # fmt: skip
def test_nothing_goes_to_stdout_instead_of_a_closed_stderr(capsys, monkeypatch, argv, code, out):
    monkeypatch.setattr(sys, "stderr", None)
    try:
        got = as_command(lambda: run.main(argv))
    except SystemExit as end:  # argparse
        got = end.code
    assert (got, capsys.readouterr().out) == (code, out)


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *ASK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0 and "Traceback" not in err and "BrokenPipe" not in err


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


def test_a_tool_that_loses_its_reader_is_quiet():
    words = [sys.executable, str(ROOT / "tools" / "roofline.py")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 0)


def test_a_process_that_cannot_write_says_so():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *ASK], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "error: " in done.stderr


def test_a_failure_while_running_is_exit_1(capsys, monkeypatch):
    import model.generate

    def fail(*_):
        raise RuntimeError("the model produced NaN\nor infinity; try --dtype fp32")

    monkeypatch.setattr(model.generate.Generation, "prefill", fail)
    code, out, err = inside(capsys, *ASK)
    assert code == 1 and err.splitlines()[-1].startswith("error: ") and "NaN or infinity" in err
    with pytest.raises(RuntimeError):
        run.main([*ASK, "--debug"])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("extra", "naming"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--max-new-tokens", "x"], "--max-new-tokens is 'x'; give a whole number of 1 or more\n"),
        (["-n", "1.5"], "--max-new-tokens is '1.5'; give a whole number"),
        (["--retention"], "--retention needs a value; write --retention=VALUE if the value begins with a dash\n"),
        (["--retntion", "0.5"], "there is no flag --retntion; did you mean --retention?\n"),
        (["--conv-modes=llava"], "there is no flag --conv-modes; did you mean --template?\n"),  # of a hidden name
        (["--stream"], "there is no flag --stream; see run.py -h\n"),  # not its opposite, --no-stream
        (["--window", "32"], "window is a setting of the method; write --set window=32\n"),
        (["--cover=0.5"], "cover is a setting of the method; write --set cover=0.5\n"),
        (["--sink-keys", "--stats"], "sink_keys is a setting of the method; write --set sink_keys=VALUE\n"),
        (["--keep_tokens", "9"], "there is no flag --keep_tokens; did you mean --keep-tokens?\n"),
        (["--prompt", "a?", "--query", "lookahead"], "write the method's setting as --set query=VALUE\n"),
        (["--question", "a?", "-p", "b?"], "write the method's setting as --set query=VALUE\n"),
        (["--gpu", "0"], "there is no flag --gpu; see run.py -h\n"),
        (["--xyz"], "there is no flag --xyz; see run.py -h\n"),
        (["stray"], "'stray' belongs to no flag; put text with spaces in quotes\n"),
        (["--json=yes"], "--json"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--seed", "18446744073709551616"], "--seed"),
        (["--system", "<image>"], "system text"),
        (["--system", "x", "--template", "raw"], "--system"),
        (["--prompt", "a\udcffb"], "UTF-8"),
        (["--prompt", ""], "empty"),
        (["--prompt", " \n\t"], "empty"),
        (["--prompt", "<image>"], "empty"),
        (["--prompt", " ", "--template", "raw"], "empty"),
        (["--prompt", "a\0b"], "NUL"),
        (["--model", "a\0b"], "NUL"),
        (["--image", "a\0b"], "NUL"),
        (["--prompt", "@a\0b"], "NUL"),
        (["--prune", "random", "--set", "@a\0b"], "NUL"),
        (["--prune", "a\0b.py::keep"], "NUL"),
        (["--questions", "a\0b", "--answers", "x"], "NUL"),
        (["--questions", PICTURE, "--answers", "a\0b"], "NUL"),
        (["--questions", PICTURE, "--answers", "x", "--image-folder", "a\0b"], "NUL"),
        (["--image", "HTTPS://example.com/x.png"], "downloaded"),
        (["--image", "ftp://example.com/x.png"], "downloaded"),
        (["--image", "file://example.com/x.png"], "another machine"),
        (["--image", "file:///nowhere/x.png"], "no picture at file:///nowhere/x.png"),
        (["--image", "~/nowhere/x.png"], "nowhere/x.png"),
        (["--threads", "0"], "--threads"),
        (["--threads", "9999"], "--threads is 9999; give a whole number from 1 to 1024\n"),
        (["--threads", "two"], "whole number"),
        (["--keep-errors"], "--questions"),
        (["--temperature", "1", "--top-p", "nan"], "--top-p"),
        (["--temperature", "1e9"], "--temperature"),
        (["--seed", "-1"], "--seed"),
        (["--image", "x" * 5000], "no picture"),
        (["--no-such\nflag"], "--no-such flag"),
        (["--top-p", "0.5"], "--temperature above 0"),
        (["--top-k", "5"], "--temperature above 0"),
        (["--temperature", "1", "--top-p", "0"], "--top-p"),
        (["--temperature", "1", "--top_p", "1.5"], "--top-p is 1.5; give a number above 0 and up to 1\n"),
        (["--stop", ""], "--stop"),
        (["--retention", "0.5"], "--prune"),
        (["--keep-tokens", "5"], "--prune"),
        (["--set", "seed=1"], "--prune"),
        (["--prune", "random", "--retention", "0.5", "--keep-tokens", "3"], "exclude"),
        (["--prune", "random", "--retention", "0"], "--retention"),
        (["--prune", "random", "--retention", "1.1"], "--retention"),
        (["--prune", "random", "--keep-tokens", "0"], "--keep-tokens"),
        (["--prune", "random:retention=0.3", "--keep-tokens", "4"], "one of them"),
        (["--prune", "random", "--set", "retention=null"], "None"),
        (["--compare"], "--prune"),
        (["--compare", "--prune", "random", "--temperature", "1"], "--temperature 0"),
        (["--prune", "fastx"], "fastx"),
        (["--prune", "plphp", "--retention", "1.5"], "--retention"),
        (["--prune", "plphp", "--set", "alpha=0.1", "beta=0.2"], "beta=0.2"),
        (["--prune", "plphp:alpha=0.1,beta=0.2"], "alpha"),
        (["--prune", "fastv:layer=6"], "layer is 6"),
        (["--prune", "random:speed=1"], "speed"),
        (["--prune", "random", "--set", "seed"], "KEY=VALUE"),
        (["--prune", "random", "--set", "@/nowhere.json"], "/nowhere.json"),
        (["--prune", "/nowhere.py::f"], "/nowhere.py"),
        (["--backend", "cuda"], "--backend"),
        (["--template", "chatml"], "--template is 'chatml'; use auto, llava, vicuna, llava_v1, mistral, raw\n"),
        (["--list-methods", "fastx"], "no method 'fastx'"),
        (["--list-methods", "/nowhere.py::f"], "/nowhere.py"),
        (["--list-methods", "plphp", "--model", "/nowhere"], "/nowhere"),
        (["--image-mode", "anyres"], "--image-mode"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "tpu"], "--device"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "meta"], "meta"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--image", "/nowhere/x.png"], "/nowhere/x.png"),
        (["--image", "https://example.com/x.png"], "downloaded"),
        (["--image", "-", "--image", "-"], "stdin"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--prompt", "@/nowhere/q.txt"], "/nowhere/q.txt"),
        (["--prompt", "<image> and <image>"], "2 <image>, and the number of pictures is 1;"),
        (["--prompt", "circle " * 2500], "2048"),
    ],
)
def test_bad_flags(refused, extra, naming):
    refused(*ASK[: 2 if "--prompt" in extra else None], *extra, naming=naming)


@pytest.mark.parametrize("alias", ["-m", "--model-path", "--weights", "--checkpoint", "--pretrained"])
def test_names_of_flags_from_other_projects_work(alias):
    args = parser().parse_args([alias, "x", "--image_path", "a", "--query", "q", "--max_new_tokens", "3", "--profile"])
    assert (args.model, args.image, args.prompt, args.max_new_tokens, args.stats) == ("x", ["a"], "q", 3, True)


def test_templates_are_those_of_the_tokenizer():
    from model.tokenizer import TEMPLATES as known

    assert ("auto", *known) == TEMPLATES


def test_triton_is_refused_without_cuda_before_anything_is_loaded(refused, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(*ASK, "--backend", "triton", "--device", "cpu", "--model", "/nowhere", naming="--backend 'triton'")


def test_triton_answers_like_torch(capsys):
    """In the interpreter on a CPU; the report names the backend used."""
    pytest.importorskip("triton", reason="triton has no wheel for this system")
    answers = []
    for backend, device in (("torch", "cpu"), ("triton", "cuda" if torch.cuda.is_available() else "cpu")):
        flags = "--max-new-tokens", "4", "--prune", "random", "--json", "--backend", backend, "--device", device
        code, out, err = inside(capsys, *ASK, *flags, "--dtype", "fp32")
        answers.append(json.loads(out))
        assert code == 0 and answers[-1]["backend"] == backend and f"backend {backend}" in err
    assert answers[0]["token_ids"] == answers[1]["token_ids"] and len(answers[0]["token_ids"]) == 4


def test_without_torch_it_says_what_to_do():
    done = subprocess.run([sys.executable, "-S", str(ROOT / "run.py"), *ASK], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "make run" in done.stderr and done.stderr.count("\n") == 1


def test_a_prompt_is_needed(refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    refused("--image", PICTURE, naming="--prompt")
    refused("--prompt", " ", naming="empty")
    refused("--questions", "", "--answers", "x", naming="no file")


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_bad_pictures(refused, tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    refused("--image", str(tmp_path / "x.png"), "--prompt", "What?", naming="x.png")


def copy_of_demo(folder):
    shutil.copytree(DEMO, folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def break_config(folder):
    (folder / "config.json").write_text("{")


def no_config(folder):
    (folder / "config.json").unlink()


def other_model(folder):
    edit(folder / "config.json", model_type="qwen2_vl")


def nonsense_config(folder):
    edit(folder / "config.json", text_config={"hidden_size": "wide", "num_attention_heads": 4})


def wrong_shape(folder):
    edit(
        folder / "config.json",
        text_config={**json.loads((folder / "config.json").read_text())["text_config"], "intermediate_size": 520},
    )


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def corrupt(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"\xff" * 64 + data[64:])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def missing_shard(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()  # it takes precedence over the index


def outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "whole.safetensors")  # an index beside it is ignored
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../demo/model.safetensors"}}))


def no_tokenizer(folder):
    (folder / "tokenizer.model").unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(b"nothing")


FAULTS = (
    break_config, no_config, other_model, nonsense_config, wrong_shape, truncated, corrupt, pickled, no_weights,
    missing_shard, outside, no_tokenizer, broken_tokenizer,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_bad_checkpoints(refused, tmp_path, fault):
    folder = copy_of_demo(tmp_path / "demo")
    fault(folder)
    refused("--model", str(folder), *ASK)


def test_what_can_be_refused_is_refused_before_weights_are_read(refused, monkeypatch):
    from model.checkpoint import Checkpoint

    def too_late(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read_weights", too_late)
    refused(*ASK[:2], "--prompt", "circle " * 2500, naming="2048")
    refused("--image", PICTURE, "--prompt", "<image><image>", naming="2 <image>")
    refused("--image", str(ROOT / "README.md"), "--prompt", "What?", naming="README.md")


# ---------------------------------------------------------------- waiting


@pytest.mark.parametrize("flags", [[], ["--no-stream"], ["--stats"], ["--json"], ["--compare"]])
def test_only_who_reports_times_waits_for_the_device(capsys, monkeypatch, flags):
    waits = []
    for module in ("generate", "view"):
        monkeypatch.setattr(f"model.{module}.clock", lambda device, wait: waits.append(wait) or 0.0)
    assert inside(capsys, *ASK, "--max-new-tokens", "2", "--prune", "fastv", *flags)[0] == 0
    assert len(waits) >= 5 and any(waits) == (flags not in ([], ["--no-stream"]))


def test_the_clock_waits_for_cuda_and_only_if_asked(monkeypatch):
    from model.view import clock

    waited = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    for device, wait in (("cuda", False), ("cpu", True), ("cuda:1", True)):
        assert clock(torch.device(device), wait) > 0
    assert waited == [torch.device("cuda:1")]
