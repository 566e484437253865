"""tools/bench_kernels.py: it times what is right, refuses what is wrong, and writes what it measured. And its plot."""

import csv
import json
import types

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tools import bench_kernels, plot_bench

SMALL = ["--device", "cpu", "--shapes", "demo", "--tokens", "64", "--retention", "1", "0.3"]
SMALL += ["--rounds", "2", "--copies", "2"]
BASELINES = {"sdpa, all tokens", "plain softmax", "indexing", "dense cache"}
OWN = """
import torch, kernels
from kernels import ragged_decode as ours

def ragged_decode(q, k, v, kv_start, kv_len):
    return {result}
"""
OWN_STEP = """
import kernels

def ragged_decode_append(q, k_new, v_new, k, v, kv_start, kv_len, kv_cap):
    {body}
"""


@pytest.fixture(autouse=True, scope="module")
def quick():
    """The bandwidth is not measured anew each time, the interpreter runs only where a test asks for it, and one thread
    never waits for another that a busy machine has put aside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_kernels, "measure_bandwidth", lambda device: 1e10)
        patch.setattr(bench_kernels, "interpreted", lambda: False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def smoke(quick, tmp_path_factory):
    """The file that `--preset smoke --json` writes."""
    path = tmp_path_factory.mktemp("bench") / "smoke.json"
    assert bench_kernels.main(["--preset", "smoke", "--device", "cpu", "--json", str(path)]) == 0
    return path


# ---------------------------------------------------------------- what is timed


PREFILL = "prefill"  # whole models: no kernel of its own


@pytest.mark.parametrize("op", [op for op in bench_kernels.OPS if op != PREFILL])
def test_every_op_is_checked_and_timed(op, tmp_path, capsys):
    files = tmp_path / "a.json", tmp_path / "a.csv"
    assert bench_kernels.main([op, *SMALL, "--json", str(files[0]), "--csv", str(files[1])]) == 0
    data = json.loads(files[0].read_text())
    rows = data["rows"]
    with open(files[1], newline="") as f:
        assert [r["provider"] for r in csv.DictReader(f)] == [r["provider"] for r in rows]
    timed = [r for r in rows if r["right"]]
    assert {r["op"] for r in rows} == {op} and all(r["us"] > 0 for r in timed)
    baselines = [r for r in timed if r["provider"] in BASELINES]
    assert all(r["speed"] == 1 for r in baselines) and len(baselines) == len({r["case"] for r in rows})
    missing = {r["provider"]: r["why"] for r in rows if not r["right"]}
    wanted = {"ours, triton"} | ({"varlen, heads as batch"} if op == "ragged_decode" else set())
    assert missing == dict.fromkeys(wanted, "needs CUDA")
    assert data["about"]["machine"] and data["about"]["bandwidth_GBps"] == 10 and op in data["about"]["command"]
    out = capsys.readouterr().out
    assert out.count(" us   speed") == len(timed) and out.count("not timed: needs CUDA") == len(rows) - len(timed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="conftest.py asks for the interpreter only without CUDA")
@pytest.mark.parametrize("op", [op for op in bench_kernels.OPS if op not in ("decode", PREFILL)])
def test_triton_is_checked_in_the_interpreter(op, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "interpreted", lambda: True)
    flags = ["--shapes", "demo", "--tokens", "40", "--retention", "0.5", "--rounds", "1", "--copies", "1"]
    assert bench_kernels.main([op, *flags, "--json", str(tmp_path / "a.json")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [r["right"] for r in rows if r["provider"] == "ours, triton (interpreted)"] == [True] * len(
        {r["case"] for r in rows}
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_is_timed_on_cuda(tmp_path):
    assert bench_kernels.main(["--preset", "smoke", "--json", str(tmp_path / "a.json")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert all(r["right"] for r in rows if r["provider"] == "ours, triton")
    assert all(r["graph"] for r in rows if r["provider"] == "ours, triton")


def test_the_smoke_preset_runs_all_kernels(smoke):
    rows = json.loads(smoke.read_text())["rows"]
    assert {r["op"] for r in rows} == set(bench_kernels.OPS) - {"decode"}
    assert {r["shape"] for r in rows} == {"demo", "qwen", "g8", ""}
    steps = {r["provider"] for r in rows if r["op"] == "ragged_decode_append" and r["right"]}
    assert steps == {"sdpa, all tokens", "sdpa, rectangle", "sdpa, padded + mask", "adakv-style", "ours, torch"}


def test_prefill_is_timed_with_every_method(smoke):
    """Right hidden states and right caches, or no time."""
    rows = [r for r in json.loads(smoke.read_text())["rows"] if r["op"] == PREFILL]
    assert [r["provider"] for r in rows] == ["no cache", "kept all", *bench_kernels.METHODS]
    assert all(r["right"] and r["us"] > 0 for r in rows) and rows[0]["speed"] == 1


def test_a_skew_sweep_is_compared_with_equal_lengths(smoke):
    rows = [r for r in json.loads(smoke.read_text())["rows"] if r["layout"].startswith("skew") and r["right"]]
    uniform = {(r["op"], r["provider"]): r["us"] for r in rows if r["layout"] == "skew 1"}
    skewed = [r for r in rows if r["layout"] == "skew 2"]
    assert len(skewed) == len(uniform) == 7
    assert all(r["over_uniform"] == pytest.approx(r["us"] / uniform[r["op"], r["provider"]]) for r in skewed)
    assert len({(r["op"], r["megabytes"]) for r in rows}) == 2  # the same bytes


@pytest.mark.parametrize("mbytes", [4, 17, 65, 130, 512])
@pytest.mark.parametrize("shape", ["7b", "gqa8", "qwen"])
def test_layers_have_the_bytes_that_were_asked_for(shape, mbytes):
    flags = ["--shapes", shape, "--mbytes", str(mbytes), "--retention", "1", "0.2"]
    for extra in ([], ["--skew"]):
        (args,) = bench_kernels.parsed([*flags, *extra])
        found = list(bench_kernels.layers(args, itemsize=2))
        assert [x.layout for x in found] == (
            ["skew 1", "skew 2", "skew 4", "skew 8"] if extra else ["equal", "equal", "ragged"]
        )
        for layer in found:
            b, hkv, _, d = layer.sizes
            lengths = layer.lengths.double()
            assert len(lengths) == b * hkv and lengths.min() > 0 and lengths.max() <= layer.tokens
            assert 4 * d * lengths.sum() == pytest.approx(1e6 * mbytes, rel=0.01)
            if extra:
                assert lengths.max() / lengths.mean() == pytest.approx(float(layer.layout[5:]), rel=0.02)
                assert lengths.max() <= 1.02 * bench_kernels.LONGEST
            else:
                assert lengths.mean() <= bench_kernels.LONGEST


def test_large_problems_leave_room_on_the_device(monkeypatch):
    gib, setting = 2**30, bench_kernels.Setting(torch.bfloat16, torch.device("cuda"), {}, None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=60 * 2**20)
    )
    for free, size, held, wanted in (
        (139 * gib, 512e6, 5e9, 2),
        (139 * gib, 65e6, 600e6, 4),
        (139 * gib, 4e6, 40e6, 63),
        (139 * gib, 1e4, 1e5, 256),
        (10 * gib, 4e6, 400e6, 10),
        (1 * gib, 512e6, 5e9, 2),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 139 * gib))
        assert bench_kernels.copies_for(setting, size, held) == wanted


@pytest.mark.parametrize("knows_groups", [True, False], ids=["with enable_gqa", "without"])
@pytest.mark.parametrize("group", [1, 4])
def test_heads_become_sequences(group, knows_groups):
    """heads_as_batch around a stand-in for torch's varlen_attn, which needs CUDA."""

    def varlen(query, key, value, ends_q, ends_k, max_q, max_k, enable_gqa=False):
        assert query.shape[1] == key.shape[1] or enable_gqa
        assert max_q == ends_q.diff().max() and max_k == ends_k.diff().max()
        out = torch.empty_like(query)
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
            q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))  # (H, T, D)
            out[a:b] = F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa).transpose(0, 1)
        return out

    older = lambda q, k, v, ends_q, ends_k, max_q, max_k: varlen(q, k, v, ends_q, ends_k, max_q, max_k)  # noqa: E731
    lengths = torch.tensor([5, 1, 9, 3, 7, 2])  # B 2, Hkv 3
    q, k, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3 * group, 8), (27, 8), (27, 8)))
    attend = bench_kernels.heads_as_batch(varlen if knows_groups else older, lengths, group, q.device)
    mask = torch.arange(9) < lengths[:, None]
    keys, values = (torch.zeros(6, 9, 8, dtype=torch.float64) for _ in range(2))
    keys[mask], values[mask] = k, v
    wanted = bench_kernels.exact_attention(q, keys.view(2, 3, 9, 8), values.view(2, 3, 9, 8), mask.view(2, 3, 1, 9))
    assert torch.allclose(attend(q, k, v), wanted, rtol=1e-12)


# ---------------------------------------------------------------- one's own kernel


def test_ones_own_kernel_is_timed_beside_ours(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(OWN.format(result="ours(q, k, v, kv_start, kv_len)"))
    assert bench_kernels.main([*SMALL, "--kernel", str(tmp_path / "mine.py")]) == 0
    assert capsys.readouterr().out.count("  mine  ") == 3


def test_a_wrong_kernel_is_not_timed(tmp_path, capsys):
    once = "ours(q, k, v, kv_start, kv_len) if len(calls.append(1) or calls) < 5 else q"  # right, then lazy
    for result, said in (
        ("ours(q, k, v, kv_start, kv_len) + 1e-4", "WRONG RESULT"),
        ("ours(q, k, v, kv_start, kv_len - 1)", "WRONG RESULT"),
        ("q * float('nan')", "WRONG RESULT"),
        ("(q, q)", "WRONG RESULT"),
        ("ours(q, k)", "TypeError"),
        (once, "WRONG RESULT"),
    ):
        (tmp_path / "bad.py").write_text("calls = []\n" + OWN.format(result=result))
        assert bench_kernels.main([*SMALL, "--kernel", str(tmp_path / "bad.py")]) == 1
        out = capsys.readouterr().out
        assert out.count(said) >= 3 and "bad" not in [x.split()[0] for x in out.splitlines() if "us  " in x]


def test_a_step_has_to_store_its_token(tmp_path, capsys):
    ours = "kernels.ragged_decode_append(q, k_new, v_new, {}, kv_start, kv_len, kv_cap)"
    late = "out = kernels.ragged_decode(q, k, v, kv_start, kv_len); " + ours.format("k, v") + "; return out"
    for body, said in (
        ("return " + ours.format("k.clone(), v.clone()"), "the new token is not in the cache"),
        ("return " + ours.format("k, v.clone()"), "the new token is not in the cache"),
        (late, "WRONG RESULT"),
        ("return " + ours.format("k, v"), " us   speed"),
    ):
        (tmp_path / "step.py").write_text(OWN_STEP.format(body=body))
        code = bench_kernels.main(["ragged_decode_append", *SMALL, "--kernel", str(tmp_path / "step.py")])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  step ")]
        assert len(lines) == 3 and all(said in line for line in lines) and code == ("us" not in said)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["flash"], "flash"),
        (["--kernel", "/nowhere.py"], "/nowhere.py"),
        (["--kernel", __file__], "ragged_decode"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "foo"], "foo"),
        (["--json", "/nowhere/x.json"], "/nowhere/x.json"),
        (["decode", "--preset", "smoke"], "smoke"),
    ],
)
def test_what_cannot_be_timed_is_said(flags, word):
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.main(flags)
    assert str(stopped.value).startswith("error: ") and word in str(stopped.value)


@pytest.mark.parametrize(
    "flags",
    ["--rounds 0", "--tokens 0", "--tokens -4", "--retention 7", "--retention 0", "--mbytes 0", "--skew 0.5"],
)
def test_numbers_out_of_range_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.main(flags.split())
    assert stopped.value.code == 2 and "out of range" in capsys.readouterr().err


# ---------------------------------------------------------------- the plot


def test_what_was_measured_can_be_drawn(smoke, tmp_path, capsys):
    for flags, said in (
        ([], "ragged_decode, demo, ragged"),
        (["--op", "ragged_decode_append", "--layout", "equal"], "ragged_decode_append, demo, equal"),
        (["--shape", "qwen"], "ragged_decode, qwen, ragged"),  # without a skew sweep
    ):
        out = tmp_path / "a.png"
        assert plot_bench.main([str(smoke), *flags, "--out", str(out)]) == 0
        assert said in capsys.readouterr().out
        with Image.open(out) as picture:
            assert picture.size == (1800, 860) and len(picture.convert("RGB").getcolors(2**16)) > 50


def test_points_of_the_plot_are_the_measured_ones(smoke):
    _, rows = plot_bench.read([smoke])
    rows = [r for r in rows if r["op"] == "ragged_decode" and r["shape"] == "demo"]
    points = plot_bench.lines(
        [r for r in rows if r["layout"] == "ragged"], lambda r: r["megabytes"], lambda r: r["ceiling"]
    )
    assert list(points) == ["ours, torch", "sdpa, padded + mask"]  # of all tokens it reads more than the rest
    assert [x for x, _ in points["ours, torch"]] == sorted(
        {r["megabytes"] for r in rows if r["layout"] == "ragged"}
    ) and len(points["ours, torch"]) == 3
    skews = plot_bench.lines(
        [r for r in rows if "over_uniform" in r], lambda r: r["layout"], lambda r: r["over_uniform"]
    )
    assert skews["ours, torch"][0] == ("skew 1", 1.0)


def test_what_cannot_be_drawn_is_said(smoke, tmp_path):
    (tmp_path / "text.json").write_text("no json")
    other = json.loads(smoke.read_text())
    other["about"]["machine"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(other))
    for flags, word in (
        (["/nowhere.json"], "/nowhere.json"),
        ([str(tmp_path / "text.json")], "text.json"),
        ([str(smoke), str(tmp_path / "other.json")], "machine"),
        ([str(smoke), "--shape", "7b"], "7b"),
        ([str(smoke), "--layout", "flat"], "flat"),
        ([str(smoke), "--op", "window_scores"], "window_scores"),
        ([str(smoke), "--out", "/nowhere/x.png"], "/nowhere/x.png"),
    ):
        with pytest.raises(SystemExit) as stopped:
            plot_bench.main(flags)
        assert str(stopped.value).startswith("error: ") and word in str(stopped.value)
