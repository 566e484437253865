"""tools/bench_kernels.py: times correct kernels, rejects wrong ones, and writes its results. Also its plot."""

import csv
import functools
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import types

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from model.cache import RaggedCache
from model.config import TextConfig
from model.lookahead import Lookahead
from tests.paths import ROOT
from tests.seeds import torch_random
from tools import bench_kernels, harness, plot_bench, problems, rivals, shapes

SMALL = ["--shapes", "demo", "--tokens", "64", "--retention", "1", "0.3", "--rounds", "2", "--copies", "2"]
ONE = ["--shapes", "demo", "--tokens", "40", "--retention", "0.5", "--rounds", "1", "--copies", "2", "--layouts"]
OUR_TRITON_RIVALS = ("compactor-style", "fastdms-style")
BASELINES = {"sdpa, all tokens", "plain softmax", "indexing", "dense cache"}
NUMBERS = {"us", "p20_us", "p80_us", "GBps", "speed", "speeds", "ceiling", "max_error", "over_uniform"}
OWN = """
import torch, kernels
from kernels import ragged_decode as ours

calls = []

def ragged_decode(q, k, v, kv_start, kv_len):
    return {}

def ragged_decode_append(q, k_new, v_new, k, v, kv_start, kv_len, kv_cap):
    {}
"""

RIGHT = "ours(q, k, v, kv_start, kv_len)"
STEP = "return kernels.ragged_decode_append(q, k_new, v_new, {}, kv_start, kv_len, kv_cap)"


def own(folder, result="None", step="pass", name="mine.py"):
    """--kernel with a file whose ragged_decode returns `result`; step: body of its ragged_decode_append."""
    (folder / name).write_text(OWN.format(result, step))
    return ["--kernel", str(folder / name)]


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Skip the bandwidth measurement, run the interpreter only where a test asks for it, and use one thread, so that a
    busy machine cannot stall the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "measure_bandwidth", lambda device: 1e10)
        patch.setattr(problems, "interpreted", lambda: False)
        yield
    torch.set_num_threads(threads)


def measured(folder, *flags, code=0):
    """(about, rows) written by --json."""
    assert bench_kernels.main([*flags, "--device", "cpu", "--json", str(folder / "rows.json")]) == code
    data = json.loads((folder / "rows.json").read_text())
    return data["about"], data["rows"]


@pytest.fixture(scope="module")
def smoke(quick, tmp_path_factory):
    """The file written by `--preset smoke --json`."""
    folder = tmp_path_factory.mktemp("bench")
    measured(folder, "--preset", "smoke")
    return folder / "rows.json"


@pytest.fixture
def smoke_rows(smoke):
    return json.loads(smoke.read_text())["rows"]


def by_name(rows):
    return {row["provider"]: row for row in rows}


# ---------------------------------------------------------------- what gets timed


@pytest.mark.parametrize("op", [op for op in bench_kernels.OPS if op != "prefill"])
def test_every_op_is_checked_and_timed(op, tmp_path, capsys):
    about, rows = measured(tmp_path, op, *SMALL, "--csv", str(tmp_path / "a.csv"))
    with open(tmp_path / "a.csv", newline="") as f:
        table = list(csv.DictReader(f))
    assert [r["provider"] for r in table] == [r["provider"] for r in rows]
    for row, cells in zip(rows, table, strict=True):
        assert row["repro"] == cells["repro"] and f" {op} " in row["repro"]
        for key in NUMBERS - {"over_uniform", "speeds"}:
            assert cells[key] == ("" if row.get(key) is None else str(row[key]))
        assert not cells["speeds"] or json.loads(cells["speeds"]) == row["speeds"]
    timed = [r for r in rows if r["right"]]
    for row in timed:
        assert 0 < row["p20_us"] <= row["us"] <= row["p80_us"] and 0 <= row["max_error"] < 1e-4
        assert row["speed"] == row["speeds"][row["baseline"]]
        assert (row["GBps"] is None) == (row["ceiling"] is None)
        if row["GBps"] is not None:  # the fixture sets the bandwidth to 10 GB/s
            size = row["megabytes"] * (34 / 128 if row["provider"].endswith(", int8") else 1)  # D = 32 of fp32
            assert row["GBps"] == pytest.approx(1e3 * size / row["us"]) == pytest.approx(10 * row["ceiling"])
    assert {r["op"] for r in rows} == {op}
    baselines = [r for r in timed if r["provider"] in BASELINES]
    assert all(r["speed"] == 1 for r in baselines) and len(baselines) == len({r["case"] for r in rows})
    needs = {"ours, triton": harness.NEEDS_CUDA}
    if op in bench_kernels.ATTENTION:
        needs |= dict.fromkeys(OUR_TRITON_RIVALS, harness.NEEDS_CUDA)
        installed = importlib.util.find_spec("flashinfer") is not None
        needs["flashinfer"] = "needs CUDA" if installed else "flashinfer is not installed"
        flat = "varlen, heads as batch" if op == "ragged_decode" else "adakv-style"
        needs |= {flat: "needs CUDA", "flex attention": "needs CUDA"}
    assert {r["provider"]: r["why"] for r in rows if not r["right"]} == needs
    assert about["machine"] and about["bandwidth_GBps"] == 10 and op in about["command"]
    out = capsys.readouterr().out
    assert out.count(" not timed: ") == len(rows) - len(timed)
    for row in timed:
        provider, error = re.escape(row["provider"]), re.escape(f"{row['max_error']:.1e}")
        assert re.search(rf"^  {provider} +{row['us']:.1f} +{row['p20_us']:.1f} .* {error}", out, re.M)


@pytest.mark.skipif(torch.cuda.is_available(), reason="conftest.py sets the interpreter only without CUDA")
@pytest.mark.parametrize("op", [op for op in bench_kernels.OPS if op not in ("decode", "prefill")])
def test_triton_is_checked_in_the_interpreter(op, tmp_path, monkeypatch):
    monkeypatch.setattr(problems, "interpreted", lambda: True)
    _, rows = measured(tmp_path, op, *ONE, "equal", "ragged", "--copies", "1")
    names = ("ours, triton (interpreted)", *(OUR_TRITON_RIVALS if op in bench_kernels.ATTENTION else ()))
    found = [(r["case"], r["provider"]) for r in rows if r["right"] and r["provider"] in names]
    assert len(found) == len(set(found)) == len(names) * len({r["case"] for r in rows})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_everything_is_timed_on_cuda(tmp_path):
    assert bench_kernels.main(["--preset", "smoke", "--json", str(tmp_path / "a.json")]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert all(r["right"] and r["graph"] for r in rows if r["provider"] == "ours, triton")


def test_the_smoke_preset_runs_all_kernels(smoke_rows):
    """Prefill with every method, and a skew sweep, which is compared with equal lengths."""
    assert {r["op"] for r in smoke_rows} == set(bench_kernels.OPS) - {"decode"}
    assert {r["shape"] for r in smoke_rows} == {"demo", "qwen", "g8", ""}
    steps = {r["provider"] for r in smoke_rows if r["op"] == "ragged_decode_append" and r["right"]}
    assert steps == {"sdpa, all tokens", "sdpa, rectangle", "sdpa, padded + mask", "ours, torch", "ours, torch, int8"}
    prefill = [r for r in smoke_rows if r["op"] == "prefill"]
    assert [r["provider"] for r in prefill] == ["no cache", "kept all", *problems.METHODS]
    assert all(r["right"] and r["us"] > 0 for r in prefill) and prefill[0]["speed"] == 1
    rows = [r for r in smoke_rows if r["layout"].startswith("skew") and r["right"]]
    uniform = {(r["op"], r["provider"]): r["us"] for r in rows if r["layout"] == "skew 1"}
    skewed = [r for r in rows if r["layout"] == "skew 2"]
    assert len(skewed) == len(uniform) == 8
    assert all(r["over_uniform"] == pytest.approx(r["us"] / uniform[r["op"], r["provider"]]) for r in skewed)
    assert len({(r["op"], r["megabytes"]) for r in rows}) == 2  # the same bytes


def test_in_16_bits_too_prefill_is_wrong_if_its_cache_is(monkeypatch):
    """Hidden states are larger than attention outputs; their rounding error must not hide a wrong cache."""
    config = TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = harness.random_language(config, torch.bfloat16, "cpu")
    rows = Lookahead(model, 2, 2).to(torch.bfloat16).requires_grad_(False)
    monkeypatch.setattr(problems, "prefill_model", lambda shape, setting: (model, rows))
    setting, right = problems.Setting(torch.bfloat16, torch.device("cpu"), {}, 1, 1), RaggedCache.append_attend
    with torch.inference_mode():
        case = problems.prefill_case("7b", 60, setting)
        assert [harness.judge(checks)[0] for checks in case.checks.values()] == [None] * len(case.checks)
        monkeypatch.setattr(RaggedCache, "append_attend", lambda *given, **more: 0.7 * right(*given, **more))
        for name in ("kept all", *problems.METHODS):
            assert harness.judge(case.checks[name])[0].startswith("off by"), name


@pytest.mark.parametrize("mbytes", [4, 17, 65, 130, 512])
@pytest.mark.parametrize("shape", ["7b", "gqa8", "qwen"])
def test_layers_have_the_bytes_that_were_asked_for(shape, mbytes):
    def found(*flags):
        (args,) = bench_kernels.parsed(["--shapes", shape, "--mbytes", str(mbytes), *flags])
        return list(problems.layers(args, itemsize=2))

    kept, skewed = found("--retention", "1", "0.2"), found("--skew")
    assert [x.layout for x in kept] == ["equal", "equal", "ragged"]
    assert [x.layout for x in skewed] == ["skew 1", "skew 2", "skew 4", "skew 8"]
    for layer in kept + skewed:
        (b, hkv, _, d), lengths = layer.sizes, layer.lengths.double()
        assert len(lengths) == b * hkv and lengths.min() > 0 and lengths.max() <= layer.tokens
        assert 4 * d * lengths.sum() == pytest.approx(1e6 * mbytes, rel=0.01)
    assert all(x.lengths.double().mean() <= shapes.LONGEST for x in kept)
    for layer in skewed:
        longest, mean = layer.lengths.max(), layer.lengths.double().mean()
        assert longest / mean == pytest.approx(float(layer.layout[5:]), rel=0.02) and longest <= 1.02 * shapes.LONGEST


@pytest.mark.parametrize("layout", problems.LAYOUTS)
@pytest.mark.parametrize("retention", [0.02, 0.2, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("b", "hkv"), [(1, 4), (1, 32), (2, 4), (3, 8), (8, 8)])
def test_layouts_hold_the_same_rows(layout, retention, b, hkv):
    for tokens in (1, 7, 64, 1000):
        args = layout, b, hkv, tokens, retention
        lengths = problems.lengths_of(*args, torch_random(3))
        assert lengths.shape == (b * hkv,) and lengths.dtype == torch.int64
        assert lengths.sum() == b * hkv * max(1, round(retention * tokens))
        assert lengths.min() >= 1 and lengths.max() <= tokens
        assert torch.equal(lengths, problems.lengths_of(*args, torch_random(3)))


def test_layouts_are_what_their_names_say():
    def lengths(layout, b, hkv, tokens, retention):
        generator = torch_random(0)
        return problems.lengths_of(layout, b, hkv, tokens, retention, generator)

    # proportional to 1 / rank, but in another order
    zipf = lengths("zipf", 1, 8, 2000, 0.3)
    ordered = zipf.sort(descending=True).values
    assert (ordered * torch.arange(1, 9) - ordered[0]).abs().max() <= 8 and not torch.equal(zipf, ordered)
    # where the first ranks cannot hold their share, they hold everything; the rest is still proportional to 1 / rank
    ordered = lengths("zipf", 1, 32, 1000, 0.3).sort(descending=True).values
    assert (ordered[:2] == 1000).all() and abs(ordered[4] * 5 - ordered[9] * 10) < 15
    # everything in some heads and the rest shared equally, or all but one row of each of the others
    giant = lengths("giant", 1, 8, 1000, 0.2)
    assert giant.max() == 1000 and set((giant.sort().values[:-1]).tolist()) == {85, 86}
    assert lengths("giant", 1, 8, 1000, 0.05).sort().values.tolist() == 7 * [1] + [393]
    # three rates from r = 0.4 and dr = 0.3, one per sequence; dr is at most r
    assert lengths("plphp", 3, 4, 1000, 0.4).view(3, 4).tolist() == [4 * [100], 4 * [400], 4 * [700]]
    assert lengths("plphp", 8, 1, 1000, 0.4).bincount()[[100, 400, 700]].tolist() == [3, 2, 3]
    assert lengths("plphp", 2, 1, 1000, 0.2).tolist() == [1, 399]
    # one sequence: plphp-ada keeps at least 0.2 in every head, and heads differ
    ada = lengths("plphp", 1, 8, 1000, 0.2)
    assert ada.min() >= 40 and 1.5 * 200 < ada.max() < 4 * 200 and len(set(ada.tolist())) > 4
    ragged = lengths("ragged", 1, 32, 1000, 0.2)
    assert ragged.max() > 1.3 * 200 and ragged.min() < 0.7 * 200 and ragged.max() < 7.1 * ragged.min()


def test_layouts_are_a_choice(tmp_path):
    (args,) = bench_kernels.parsed(["--shapes", "demo", "--tokens", "9", "--layouts", "zipf", "giant", "zipf"])
    assert [x.layout for x in problems.layers(args, itemsize=4)] == ["equal", "zipf", "giant"]  # keeping 1 and 0.3
    _, rows = measured(tmp_path, "decode", *ONE, "zipf")
    assert {r["layout"] for r in rows} == {"zipf"} and any(r["right"] for r in rows)


def test_a_wrong_step_is_not_timed(monkeypatch, tmp_path):
    """The timed step is the checked one: append and attend, not attend alone."""
    monkeypatch.setattr(problems.RaggedCache, "append_attend", lambda self, layer, q, k, v, rope: 0 * q + 7)
    _, rows = measured(tmp_path, "decode", *ONE, "zipf", code=1)
    ours = by_name(rows)["ours, torch"]
    assert ours["right"] is False and "us" not in ours


def test_large_problems_leave_room_on_the_device(monkeypatch):
    gib, setting = 2**30, problems.Setting(torch.bfloat16, torch.device("cuda"), {}, 1, None)
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
        assert problems.copies_for(setting, size, held) == wanted


# ---------------------------------------------------------------- other libraries, with stand-ins for what needs CUDA


def varlen(query, key, value, ends_q, ends_k, max_q, max_k, enable_gqa=False):
    """A stand-in for torch's varlen_attn."""
    assert query.shape[1] == key.shape[1] or enable_gqa
    assert max_q == ends_q.diff().max() and max_k == ends_k.diff().max()
    out = torch.empty_like(query)
    for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))  # (H, T, D)
        out[a:b] = F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa).transpose(0, 1)
    return out


def older_varlen(query, key, value, ends_q, ends_k, max_q, max_k):
    return varlen(query, key, value, ends_q, ends_k, max_q, max_k)


class FlashInfer:
    """A stand-in for flashinfer and its wrapper, in plain PyTorch. scale: factor on the result (1 is correct); fails:
    the call in which it raises."""

    plans, runs, scale, fails = 0, 0, 1.0, None

    def BatchDecodeWithPagedKVCacheWrapper(self, workspace, layout, use_tensor_cores):  # noqa: N802
        assert layout == "NHD" and workspace.nbytes >= 2**27
        return self

    def plan(self, indptr, indices, last, q_heads, kv_heads, d, page_size, *, q_data_type, kv_data_type):
        assert kv_heads == 1 and {indptr.dtype, indices.dtype, last.dtype} == {torch.int32}
        assert len(indices) == indptr[-1] and last.min() >= 1 and last.max() <= page_size
        self.table, self.plans = (indptr, indices, last, page_size), self.plans + 1

    def run(self, q, caches):
        self.runs += 1
        if self.runs == self.fails:
            raise NotImplementedError("no groups\nof 2")
        indptr, indices, last, page_size = self.table
        lengths = (indptr.diff() - 1) * page_size + last
        k, v = (q.new_zeros(len(last), int(lengths.max()), q.shape[-1]) for _ in range(2))
        for dense, pages in zip((k, v), caches, strict=True):
            assert pages.shape[1:] == (page_size, 1, q.shape[-1])
            for s, n in enumerate(lengths.tolist()):
                dense[s, :n] = pages[indices[indptr[s] : indptr[s + 1]].long()].flatten(0, 2)[:n]
        mask = torch.arange(k.shape[1]) < lengths[:, None]
        return self.scale * F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])


@pytest.mark.skipif(torch.cuda.is_available(), reason="conftest.py sets the interpreter only without CUDA")
@pytest.mark.parametrize(("group", "d"), [(1, 32), (4, 32), (7, 96)])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("step", [True, False], ids=["step", "attention"])
@pytest.mark.parametrize("way", OUR_TRITON_RIVALS)
def test_rivals_in_triton_attend_to_what_heads_keep(way, step, splits, group, d):
    """Two sequences of two heads, lengths at the borders of tiles and pages; NaN where nothing may be read."""
    rivals_triton = pytest.importorskip("tools.rivals_triton")
    lengths, generator = torch.tensor([1, 128, 300, 65]), torch_random(0)
    q, (k_new, v_new) = torch.randn(2, 2 * group, d, generator=generator), torch.randn(2, 2, 2, d, generator=generator)
    padded = [torch.randn(2, 2, 300, d, generator=generator) for _ in range(2)]
    free = (torch.arange(300) >= lengths[:, None]).view(2, 2, 300)
    for t, new in zip(padded, (k_new, v_new), strict=True):
        t[free] = float("nan")
        if step:  # the reference has the new token already
            t.flatten(0, 1)[torch.arange(4), lengths - 1] = new.flatten(0, 1)
    exact = harness.exact_attention(q, *(t.nan_to_num() for t in padded), ~free[:, :, None])
    if way == "compactor-style":
        stored, where, last = rivals.scattered(padded, lengths, rivals_triton.PAGE)
        given = where, lengths.int(), splits, rivals_triton.TILE, rivals_triton.PAGE
        assert where.shape == (4, 3) and len(stored[0]) == 6 * 128 and (where[2].diff() != 1).any()
    else:
        stored, starts = [t.flatten(0, 2).clone() for t in padded], 300 * torch.arange(4, dtype=torch.int32)
        last = starts.long() + lengths - 1
        given = starts, lengths.int(), -(-300 // (128 * splits)), 128 * splits, 0
    before = [t.clone() for t in stored]
    for t in stored if step else ():
        t[last] = float("nan")
    out = rivals_triton.decode(q, [k_new, v_new] if step else [], *stored, *given)
    assert (out - exact).abs().max() < 2e-6
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(stored, before, strict=True))


def test_as_many_splits_as_fill_the_device():
    """By hand: an H100 has 132 multiprocessors."""
    count = pytest.importorskip("tools.rivals_triton").split_count
    assert count(106, 30000, 132) == 1 and count(8, 1000, 132) == 1  # nearly full; short
    assert count(8, 1024, 132) == 3  # 2,048 / 3 slots; 4 splits would have 512
    assert count(8, 30000, 132) == 9  # 12 splits fill 96 / 132 of a wave, 9 fill 75 % of that
    assert count(64, 30000, 132) == 2  # 128 of 132


@pytest.fixture
def guests(monkeypatch):
    """FlexAttention uncompiled, and stand-ins for varlen_attn and FlashInfer, which is returned."""
    stand_in = FlashInfer()
    for name in ("flex_missing", "flashinfer_missing", "missing_16_bit_cuda"):
        monkeypatch.setattr(rivals, name, lambda *_: None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=varlen))
    stand_in.compiled = []  # names; flex_attention compiles something itself
    monkeypatch.setattr(torch, "compile", lambda f, **_: stand_in.compiled.append(f.__name__) or f)
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    return stand_in


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("op", bench_kernels.ATTENTION)
@pytest.mark.parametrize("attend", [varlen, older_varlen])
def test_other_libraries_attend_to_what_heads_keep(op, attend, guests, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["torch.nn.attention.varlen"], "varlen_attn", attend)
    flags = ["--shapes", "demo", "qwen", "--tokens", "32", "--retention", "0.5"]  # equal lengths fill a page
    _, rows = measured(tmp_path, op, *ONE, "equal", "zipf", *flags)
    flat = "varlen, heads as batch" if op == "ragged_decode" else "adakv-style"
    assert guests.plans == guests.compiled.count("flex_attention") == 4  # once per case, not per copy
    for row in rows:  # beside every baseline
        rivals_of_case = {"sdpa, all tokens", "sdpa, padded + mask", "flex attention", "flashinfer", flat}
        rivals_of_case |= {"sdpa, rectangle"} if row["layout"] == "equal" else set()
        assert row["right"] and set(row["speeds"]) == rivals_of_case or row["why"] == harness.NEEDS_CUDA
        assert row["guest"] == (row["provider"] in ("flex attention", "flashinfer"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("fails", [1, 2], ids=["first copy", "second copy"])
def test_what_guests_cannot_do_is_said(fails, guests, tmp_path, monkeypatch, capsys):
    def no_flex(*_):
        raise ValueError("no masks")

    guests.fails = fails
    monkeypatch.setattr(rivals, "flex_over", no_flex)
    _, rows = measured(tmp_path, *ONE, "zipf")
    found = by_name(rows)
    assert len(found) == len(rows) and found["ours, torch"]["right"]
    assert found["flashinfer"]["why"] == "NotImplementedError: no groups of 2" and found["flashinfer"]["right"] is None
    assert found["flex attention"]["why"] == "ValueError: no masks" and not NUMBERS & set(found["flex attention"])
    assert " not timed: NotImplementedError: no groups of 2" in capsys.readouterr().out


def test_why_guests_are_left_out():
    assert rivals.flex_missing(torch.device("cuda"), True) is None
    assert rivals.flex_missing(torch.device("cuda"), False) == "skipped by --no-flex"


def test_a_wrong_guest_is_no_failure_of_ours(guests, tmp_path, capsys):
    guests.scale = 1.01
    _, rows = measured(tmp_path, *ONE, "equal")
    rows = by_name(rows)
    assert rows["flashinfer"]["why"].startswith("off by ") and not NUMBERS & set(rows["flashinfer"])
    assert not any("flashinfer" in row.get("speeds", ()) for row in rows.values()) and rows["ours, torch"]["right"]
    assert re.search(r"^  flashinfer +WRONG, not timed: off by ", capsys.readouterr().out, re.M)


# ---------------------------------------------------------------- reports


def test_percentiles_and_speeds_are_those_of_the_rounds(monkeypatch, capsys):
    times = {"plain": [4e-6, 2e-6, 6e-6, 8e-6, 10e-6, 12e-6], "other": [4e-6] * 6, "ours, torch": [2e-6] * 6}
    times |= {"base X, torch": [3e-6] * 6, "base X, triton": [1e-6] * 6}
    case = problems.Case(8000, "plain")
    for name in times:
        check = lambda call: (torch.ones(2), torch.zeros(2), torch.tensor([1, 1 + 1e-9], dtype=torch.float64))  # noqa: E731
        case.add(name, None, check, rival=name != "ours, torch")
    warm = {name: [1.0, *found] for name, found in times.items()}
    monkeypatch.setattr(harness, "take_turns", lambda runs, rounds: (warm, {}))
    rows = bench_kernels.measure({"repro": "again"}, case, 6, 1e10, torch.device("cpu"))
    plain, _, ours, *_ = rows
    assert [plain[k] for k in ("p20_us", "us", "p80_us")] == pytest.approx([4, 7, 10])
    assert ours["GBps"] == pytest.approx(4) and ours["ceiling"] == pytest.approx(0.4) and ours["repro"] == "again"
    assert ours["max_error"] == pytest.approx(1e-9)
    base = {"base X, torch": 1.5, "base X, triton": 0.5}
    assert ours["speeds"] == pytest.approx({"plain": 3.5, "other": 2, **base}) and ours["speed"] == 3.5
    assert plain["speeds"]["plain"] == 1 and plain["speeds"]["other"] == pytest.approx(7 / 12)
    assert bench_kernels.notes(plain, torch.device("cpu")) == "   noisy: 2.5 x between rounds"
    assert bench_kernels.notes(plain | {"p80_us": 6.0}, torch.device("cpu")) == ""  # 1.5 is not
    assert bench_kernels.notes(ours, torch.device("cpu")) == "   2.00 x other   1.50 x base X, torch"  # not its triton


@pytest.mark.parametrize(
    "flags",
    ["--preset smoke", "--preset gpu", "all --layouts ragged plphp", "--skew 3 1.23 --shapes 'gqa8 x 8' --mbytes 7"],
)
def test_titles_are_those_of_one_case(flags, monkeypatch):
    monkeypatch.setattr(problems, "lengths_of", lambda *_: torch.ones(1))  # takes seconds in large layers
    setting = problems.Setting(torch.bfloat16, torch.device("cpu"), {}, 1, 1)
    parts = bench_kernels.parsed(shlex.split(flags))
    titles = [title for part in parts for title, _ in bench_kernels.cases(part, setting)]
    assert len(set(titles)) == len(titles) >= 3


def test_repro_lines_are_printed_and_run(tmp_path, capsys):
    flags = [*ONE[:-1], "--skew", "2", *own(tmp_path, RIGHT, name="a b.py"), f"--csv={tmp_path / 'a.csv'}"]
    _, rows = measured(tmp_path, *flags)
    out = capsys.readouterr().out
    wanted = [row for row in rows if row["layout"] == "skew 2"]
    command = wanted[0]["repro"]
    assert f"\n  {command}\n" in out and "--json" not in command and "--csv" not in command  # overwrites nothing
    _, rows = measured(tmp_path, *shlex.split(command)[2:])
    assert [(r["case"], r["provider"]) for r in rows] == [(r["case"], r["provider"]) for r in wanted]
    assert rows[0]["repro"].replace("--device cpu ", "", 1) == command and command.count("--only") == 1


# ---------------------------------------------------------------- another commit


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A repository with two commits: our kernels with a wrong ragged_decode; none."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path_factory.mktemp("history")

    def git(*words):
        command = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@x", *words]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    shutil.copytree(ROOT / "kernels", root / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    with (root / "kernels" / "__init__.py").open("a") as file:
        file.write("\nright = ragged_decode\n\ndef ragged_decode(*given, **more):\n")
        file.write("    return 1.01 * right(*given, **more)\n")
    git("add", "-A")
    git("commit", "-m", "x")
    git("mv", "kernels", "other")
    git("commit", "-m", "x")
    return root


def test_the_kernels_of_another_commit_are_timed_beside_ours(history, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_kernels, "ROOT", history)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ops = ["ragged_decode", "ragged_decode_append", "window_scores", "ragged_pack"]
    about, rows = measured(tmp_path, *ops, *ONE, "zipf", "--base", "HEAD~1")
    sha = subprocess.run(["git", "-C", str(history), "rev-parse", "HEAD~1"], capture_output=True, text=True).stdout
    assert len(about["base"]) >= 4 and sha.startswith(about["base"])
    for op in ops:
        found, right = by_name(row for row in rows if row["op"] == op), op != "ragged_decode"
        base, ours = found["base HEAD~1, torch"], found["ours, torch"]
        assert base["right"] == right == ("base HEAD~1, torch" in ours["speeds"]) and ours["right"]
        assert right or (base["why"].startswith("off by ") and not NUMBERS & set(base))
        assert found["base HEAD~1, triton"]["why"] == harness.NEEDS_CUDA
        assert f"--base {about['base']}" in ours["repro"] and ours["repro"].count("--base") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]  # nothing is left


def test_a_commit_without_kernels_is_refused(history, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_kernels, "ROOT", history)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for rev in ("HEAD", "nosuch", "-x", "HEAD:kernels"):
        assert bench_kernels.main([f"--base={rev}"]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: --base") and err.count("\n") == 1
        assert f" {rev} " in err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- a kernel of your own


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (RIGHT, r"e-\d\d   .*   \d+\.\d\d x ours, torch(   noisy|$)"),  # its error, and its speed
        (f"{RIGHT} + 1e-4", r"WRONG, not timed: off by 1\.0e-04 where .* is allowed, 512 of 512 values, first in "),
        ("ours(q, k, v, kv_start, kv_len - 1)", r"first in segment 0 \(sequence 0, KV head 0, \d+ tokens\), query "),
        ("q * float('nan')", r"WRONG, not timed: not finite, 512 of 512 values, first .*channel 0: got nan, wanted "),
        ("(q, q)", "WRONG, not timed: no tensor"),
        ("ours(q, k)", "WRONG, not timed: TypeError"),
        (f"{RIGHT} if len(calls.append(1) or calls) < 5 else q", "WRONG, not timed: off by"),  # correct, then lazy
        (f"{RIGHT} if len(calls.append(1) or calls) < 5 else 1 / 0", "WRONG, not timed: ZeroDivisionError"),
        ("exec('raise RuntimeError(\"0 active drivers ([])\")')", "needs CUDA; TRITON_INTERPRET=1 checks it"),
    ],
)
def test_ones_own_kernel_is_timed_beside_ours_if_it_is_right(result, said, tmp_path, capsys):
    _, rows = measured(tmp_path, *SMALL, *own(tmp_path, result), code=int(result != RIGHT))
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.startswith("  mine ")]
    assert (result == RIGHT) == ("no right result in 3 rows, first mine: " not in printed.err)
    assert len(lines) == 3 and all(re.search(said, line) for line in lines)
    for row in rows:
        if row["provider"] == "mine":
            assert row["right"] is (result == RIGHT) and (row["right"] or not NUMBERS & set(row))
        assert row["provider"] != "ours, torch" or (row["right"] and row["us"] > 0)


COPIES = {  # of a file with kernels: ops that use it, and a change that spoils it
    "ragged_decode_triton": (bench_kernels.ATTENTION, ("scale * LOG2_E", "0.9 * scale * LOG2_E")),
    "window_scores_triton": (("window_scores",), ("scale * LOG2_E", "0.9 * scale * LOG2_E")),
    "ragged_pack_triton": (("ragged_pack",), ("values = tl.load(v +", "values = tl.load(k +")),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="conftest.py sets the interpreter only without CUDA")
@pytest.mark.parametrize("name", COPIES)
def test_a_changed_copy_of_a_file_with_kernels_is_timed(name, tmp_path, monkeypatch):
    """Its relative imports work; what ships is not touched by it."""
    ops, (old, new) = COPIES[name]
    monkeypatch.setattr(problems, "interpreted", lambda: True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = (ROOT / "kernels" / f"{name}.py").read_text()
    assert "from .backend import" in source and old in source
    for text, right in ((source, True), (source.replace(old, new), False)):
        (tmp_path / "my.py").write_text(text)
        flags = [*ops, *ONE, "ragged", "--copies", "1", "--kernel", str(tmp_path / "my.py")]
        _, rows = measured(tmp_path, *flags, code=int(not right))
        assert [row["right"] for row in rows if row["provider"] == "my"] == len(ops) * [right]
        assert all(row["right"] for row in rows if row["provider"] == "ours, triton (interpreted)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my.py", "rows.json"]


def test_a_changed_copy_is_checked_over_arenas_in_8_bits(tmp_path, monkeypatch):
    """A fault that 16 bits do not show. It is timed beside ours in 8 bits."""
    monkeypatch.setattr(problems, "interpreted", lambda: True)
    source, old = (ROOT / "kernels" / "ragged_decode_triton.py").read_text(), "s *= k_unit"
    assert source.count(old) == 1
    for text, right in ((source, True), (source.replace(old, "s *= v_unit"), False)):
        (tmp_path / "my.py").write_text(text)
        flags = ["ragged_decode_append", *ONE, "ragged", "--copies", "1", "--kernel", str(tmp_path / "my.py")]
        _, rows = measured(tmp_path, *flags, code=int(not right))
        found = by_name(rows)
        assert found["my"]["right"] and found["my, int8"]["right"] == right
        assert "ours, triton (interpreted), int8" not in found["my"]["speeds"]
        if right:
            assert "ours, triton (interpreted), int8" in found["my, int8"]["speeds"]
    (tmp_path / "my.py").write_text("def ragged_decode(q, k, v, kv_start, kv_len, plan=None): pass\n")
    _, rows = measured(tmp_path, *ONE, "ragged", "--kernel", str(tmp_path / "my.py"), code=1)
    assert "my" in by_name(rows) and "my, int8" not in by_name(rows)  # it takes no scales


def test_a_copy_needs_cuda_or_the_interpreter(tmp_path, capsys):
    _, rows = measured(tmp_path, *ONE, "equal", "--kernel", str(ROOT / "kernels" / "ragged_decode_triton.py"))
    found = by_name(rows)["ragged_decode_triton"]
    assert (found["right"], found["why"]) == (None, harness.NEEDS_CUDA)


def test_a_file_without_the_op_or_its_launcher_is_refused(tmp_path, capsys):
    (tmp_path / "my.py").write_text("from .backend import interpreted\n\ndef attend(): pass\n")
    assert bench_kernels.main(["ragged_decode_append", "--kernel", str(tmp_path / "my.py")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert "my.py has none of append_attend, ragged_decode_append; name the function after the op, or copy " in err
    (tmp_path / "my.py").write_text("from .nowhere import x\n")
    assert bench_kernels.main(["--kernel", str(tmp_path / "my.py")]) == 2
    assert "ModuleNotFoundError: No module named 'kernels.nowhere'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="conftest.py sets the interpreter only without CUDA")
def test_channels_that_are_no_power_of_two_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(problems, "interpreted", lambda: True)
    flags = ["--shapes", "phi3", "--copies", "1", "--tokens", "20"]
    _, rows = measured(tmp_path, "ragged_decode_append", *ONE, "ragged", *flags)
    assert shapes.LAYERS["phi3"][-1] == 96 and by_name(rows)["ours, triton (interpreted)"]["right"]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (STEP.format("k, v"), r" \d\.\de-\d\d "),
        (STEP.format("k.clone(), v.clone()"), "the new token is not in the cache"),
        (STEP.format("k, v.clone()"), "the new token is not in the cache"),
        (
            "out = ours(q, k, v, kv_start, kv_len); " + STEP.format("k, v").replace("return", "_ =") + "; return out",
            "off by",
        ),
    ],
)
def test_a_step_has_to_store_its_token(step, said, tmp_path, capsys):
    code = int(step != STEP.format("k, v"))
    measured(tmp_path, "ragged_decode_append", *SMALL, *own(tmp_path, step=step), code=code)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  mine ")]
    assert len(lines) == 3 and all(re.search(said, line) for line in lines)


def test_the_first_wrong_value_is_named(tmp_path, capsys):
    """In the second copy: segment 6 of two sequences with four KV heads, one of two query heads, one channel."""
    lengths = torch.arange(40, 48)
    layer = problems.Layer("", "demo", (2, 4, 2, 32), 64, lengths, "ragged")
    place = functools.partial(problems.place_in, layer)
    exact = torch.randn(2, 8, 32, dtype=torch.float64, generator=torch_random(0))
    spoilt = exact.float()
    spoilt[1, 5, 17] += 1
    checks = [lambda: (exact.float(), exact.float(), exact), lambda: (spoilt, exact.float(), exact)]
    wrong, error = harness.judge(checks, place)
    assert error == pytest.approx(1, rel=1e-5) and "1 of 1024 values, first in copy 1, segment 6 (" in wrong
    assert wrong.endswith(
        f"(sequence 1, KV head 2, 46 tokens), query head 5, channel 17: "
        f"got {spoilt[1, 5, 17]:.6g}, wanted {exact[1, 5, 17]:.6g}"
    )
    assert harness.judge(checks[:1], place) == (None, pytest.approx(0, abs=1e-6))
    wrong, _ = harness.judge(checks[1:], "element {}".format)
    assert "first in element (1, 5, 17): got " in wrong


def test_a_case_is_announced_before_it_is_built(tmp_path, capsys):
    measured(tmp_path, *ONE, "equal", "ragged")
    title = "ragged_decode: demo, 40 tokens, 0.5 kept, "
    assert capsys.readouterr().err == f"case 1 of 2: {title}equal\ncase 2 of 2: {title}ragged\n"


def test_by_default_a_cpu_is_asked_for_little():
    """Nine cases of 640 tokens; 2,048 take three times as long and are left to CUDA."""
    setting = problems.Setting(torch.float32, torch.device("cpu"), {}, 1, 1)
    (args,) = bench_kernels.parsed(["--device", "cpu"])
    titles = [title for title, _ in bench_kernels.cases(args, setting)]
    assert len(titles) == 9 and all(", 640 tokens, " in title for title in titles)
    assert [part.tokens for part in bench_kernels.parsed(["--device", "cuda:0"])] == [[640, 2048]]
    assert [part.tokens for part in bench_kernels.parsed(["--tokens", "7"])] == [[7]]


def test_what_is_wrong_has_no_numbers_anywhere(tmp_path, monkeypatch, capsys):
    right, masks = problems.attention, []
    lazy = lambda mask: mask is not None and len(masks.append(1) or masks) > 2  # noqa: E731, wrong once it is trusted
    for wrong, bad in (
        (lambda q, k, v, mask=None: right(q, k, v, mask) + (mask is not None), {"sdpa, padded + mask"}),
        (lambda q, k, v, mask=None: right(q, k, v, mask) + lazy(mask), {"sdpa, padded + mask"}),
        (lambda q, k, v, mask=None: right(q, k, v, mask) + (k.shape[2] == 40), {"sdpa, all tokens"}),  # the baseline
    ):
        monkeypatch.setattr(problems, "attention", wrong)
        _, rows = measured(tmp_path, *ONE, "equal", code=1)
        assert {row["provider"] for row in rows if row["right"] is False} == bad
        assert not any(NUMBERS & set(row) for row in rows if not row["right"])
        assert all(not bad & set(row["speeds"]) for row in rows if row["right"])
        ours = by_name(rows)["ours, torch"]
        assert ours["us"] > 0 and (ours["speed"] is None) == (bad == {"sdpa, all tokens"})
        assert (ours["provider"] + " ") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("flash", "flash"),
        ("--kernel /nowhere.py", "/nowhere.py"),
        (f"--kernel {__file__}", "ragged_decode"),
        ("--device cuda:99", "cuda:99"),
        ("--device foo", "foo"),
        ("--only 'flash: 7b'", "--only flash: 7b"),
        ("--json /nowhere/x.json", "/nowhere/x.json"),
        ("decode --preset smoke", "smoke"),
        ("prefill --base HEAD", "--base is not for prefill; time them without it"),
        ("decode --base HEAD", "--base is not for decode; time them without it"),
        ("--layouts zipf flat", "no layout flat"),
        ("--layouts zipf --skew", "no layout zipf"),
        ("--no-such-flag", "--no-such-flag"),
        ("--rounds 0", "; give a "),
        ("--tokens 0", "; give a "),
        ("--tokens -4", "; give a "),
        ("--retention 7", "; give a "),
        ("--retention 0", "; give a "),
        ("--mbytes 0", "; give a "),
        ("--skew 0.5", "; give a "),
    ],
)
def test_what_cannot_be_timed_is_said(flags, word, capsys):
    try:
        code = bench_kernels.main(shlex.split(flags))
    except SystemExit as stopped:  # by argparse
        code = stopped.code
    out, err = capsys.readouterr()
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err


# ---------------------------------------------------------------- the plot


def test_what_was_measured_can_be_drawn(smoke, tmp_path, capsys):
    for flags, said in (
        ([], "ragged_decode, demo, ragged"),
        (["--op", "ragged_decode_append", "--layout", "equal"], "ragged_decode_append, demo, equal"),
        (["--shape", "qwen"], "ragged_decode, qwen, ragged"),  # without a skew sweep
        (["--layout", "zipf"], "ragged_decode, demo, zipf"),
    ):
        out = tmp_path / "a.png"
        assert plot_bench.main([str(smoke), *flags, "--out", str(out)]) == 0
        assert said in capsys.readouterr().out
        with Image.open(out) as picture:
            assert picture.size == (1260, 810) and len(picture.convert("RGB").getcolors(2**16)) > 50


def test_points_of_the_plot_are_the_measured_ones(smoke):
    _, rows = plot_bench.read([smoke])
    rows = [r for r in rows if r["op"] == "ragged_decode" and r["shape"] == "demo"]
    ragged = [r for r in rows if r["layout"] == "ragged"]
    points = plot_bench.lines(ragged, lambda r: r["megabytes"], lambda r: r["ceiling"])
    # "sdpa, all tokens" reads more bytes than the others
    assert list(points) == ["ours, torch", "sdpa, padded + mask", "ours, torch, int8"]
    assert [x for x, _ in points["ours, torch"]] == sorted({r["megabytes"] for r in ragged})
    assert len(points["ours, torch"]) == 3
    assert len({plot_bench.style(name)[1:] for name in (*plot_bench.STYLES, "base x, y, torch", "mine")}) == 14
    assert plot_bench.style("base x, triton (interpreted)") == plot_bench.style("base HEAD~1, triton")
    swept = [r for r in rows if "over_uniform" in r]
    skews = plot_bench.lines(swept, lambda r: r["layout"], lambda r: r["over_uniform"])
    assert skews["ours, torch"][0] == ("skew 1", 1.0)


def test_the_committed_figure_says_whose_lengths_and_what_is_absent():
    about, rows = plot_bench.read([ROOT / "benchmarks" / "kernels-h200.json"])
    page = plot_bench.figure(about, rows, "ragged_decode_append", "gqa8", "plphp")
    assert page.get_suptitle().startswith("ragged_decode_append --shapes gqa8 --layouts plphp:\n")
    size, skew = page.axes
    assert "lengths as in a layer of plphp-ada;\n512 MB: several sequences, plphp" in size.get_title()
    assert "(SDPA, nothing dropped: not drawn, it reads all)" in size.get_xlabel()
    assert "(FlexAttention: not measured here)" in skew.get_xlabel()


def decode_rows(tmp_path, *names):
    """A file in the format of bench_decode.py with two workloads."""
    shape = {"batch": 1, "vision_tokens": 8, "text_tokens": 4}
    rows = [
        shape | {"engine": e, "prune": p, "workload": w, "ms_per_token": ms, "ceiling_speedup": 1.5}
        for w in ("a", "b")
        for e, p, ms in names
    ]
    rows.append(shape | {"engine": "hf-static", "prune": "none", "workload": "b", "right": None})  # not timed
    about = {"machine": "this", "dtype": "fp32", "model": "small"}
    path = tmp_path / "decode.json"
    path.write_text(json.dumps({"about": about, "rows": rows}))
    return path


def test_decoding_can_be_drawn(tmp_path, capsys):
    path = decode_rows(
        tmp_path, ("ours", "none", 4), ("ours", "plphp@0.5", 2), ("hf-eager", "none", 9), ("hf-sdpa", "none", 8)
    )
    about, rows = plot_bench.read([path])
    page = plot_bench.decode_figure(about, rows)
    assert len(page.axes) == 2 and page.axes[0].get_xlim() == page.axes[1].get_xlim()
    labels = [label.get_text() for label in page.axes[0].get_yticklabels()]
    assert labels == ["ours", "ours\n--prune plphp\n--retention 0.5", "transformers eager", "transformers sdpa"]
    assert "black line" in page.get_supxlabel() and "not a bound" in page.get_supxlabel()
    for axes in page.axes:
        assert [bar.get_width() for bar in axes.patches] == [2, 4, 8 / 9, 1]  # relative to hf-sdpa
        assert [line.get_xdata()[0] for line in axes.lines] == [3]  # 1.5 times the unpruned speed
    assert plot_bench.main([str(path), "--out", str(tmp_path / "a.png")]) == 0
    assert "decode" in capsys.readouterr().out
    assert plot_bench.base_of([("ours", "none"), ("hf-eager", "none")])[0] == "hf-eager"
    assert plot_bench.base_of([("ours", "none")]) == ("ours", "none")


def test_what_cannot_be_drawn_is_said(smoke, tmp_path):
    decode_rows(tmp_path, ("ours", "none", 4))
    decode = json.loads((tmp_path / "decode.json").read_text())
    decode["about"] = json.loads(smoke.read_text())["about"]
    (tmp_path / "decode.json").write_text(json.dumps(decode))
    (tmp_path / "text.json").write_text("no json")
    other = json.loads(smoke.read_text())
    other["about"]["machine"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(other))
    for flags, word in (
        (["/nowhere.json"], "/nowhere.json"),
        ([str(tmp_path / "text.json")], "text.json"),
        ([str(smoke), str(tmp_path / "other.json")], "machine"),
        ([str(smoke), str(tmp_path / "decode.json")], "from both benchmarks"),
        ([str(smoke), "--shape", "7b"], "7b"),
        ([str(smoke), "--layout", "flat"], "flat"),
        ([str(smoke), "--op", "window_scores"], "window_scores"),
        ([str(smoke), "--out", "/nowhere/x.png"], "/nowhere/x.png"),
    ):
        with pytest.raises(SystemExit) as stopped:
            plot_bench.main(flags)
        assert str(stopped.value).startswith("error: ") and word in str(stopped.value)
