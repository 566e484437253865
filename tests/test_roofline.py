"""tools/roofline.py and tools/kernel_model.py against numbers computed here in other ways, or measured."""

import math
import subprocess
import sys

import pytest
import torch

from kernels.ragged_decode_plan import split_size
from model.checkpoint import empty_model
from model.config import LlavaConfig, TextConfig, parse_config, read_config
from tests.paths import DEMO, ROOT
from tools import inspect_kernels, kernel_model, memory_model, roofline
from tools.make_checkpoint import config_json

SEVEN, THIRTEEN, TILES, EIGHT, MISTRAL, DEMO_SHAPE, HALF, QWEN_SEVEN = roofline.SHAPES


@pytest.fixture(scope="module")
def models():
    """Name of a shape -> a whole LLaVA on the meta device."""
    configs = {s.name: LlavaConfig(text_config=TextConfig(**vars(s.config))) for s in (SEVEN, MISTRAL)}
    configs |= {s.name: parse_config(config_json(s.name.partition(",")[0], "bf16")) for s in (HALF, QWEN_SEVEN)}
    return {name: empty_model(config) for name, config in (configs | {DEMO_SHAPE.name: read_config(DEMO)}).items()}


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape", [SEVEN, MISTRAL, DEMO_SHAPE, HALF, QWEN_SEVEN], ids=lambda s: s.name)
def test_weights_are_those_of_the_modules(models, shape):
    model = models[shape.name]
    language, tower = model.language_model, model.vision_tower.vision_model
    table = language.model.embed_tokens.weight
    rest = 0 if shape.tied else table.numel()
    assert shape.weight_numbers == count(language) - rest + table.shape[1]  # one row of the embedding
    assert shape.resident_numbers == count(model) - table.shape[1] * hasattr(model, "image_newline")
    assert shape.tower.projector_numbers(shape.config.hidden_size) == count(model.multi_modal_projector)
    idle = [*tower.encoder.layers[shape.tower.layers :], tower.post_layernorm]  # after the layer that LLaVA uses
    assert shape.tower.layers == model.config.feature_layers[0]
    assert shape.tower.tower_numbers == count(tower) - sum(map(count, idle))
    assert (TILES.squares, EIGHT.squares) == (5, 8)


def test_flops_are_those_that_pytorch_counts(models):
    from torch.utils.flop_counter import FlopCounterMode

    def counted(work, *arguments):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work(*arguments)
        return counter.get_total_flops()

    for shape in (SEVEN, MISTRAL, DEMO_SHAPE):
        model, c, tokens = models[shape.name], shape.config, shape.vision + shape.text
        language, side = model.language_model, model.config.vision_config.image_size
        with torch.device("meta"):
            pixels = torch.empty(shape.squares, 3, side, side)
            features = torch.empty(shape.squares, shape.tower.patches, shape.tower.hidden)
            x = torch.empty(1, tokens, c.hidden_size)
            tower = counted(model.vision_tower, pixels, model.config.feature_layers)
            projector = counted(model.multi_modal_projector, features)
            prefill = counted(lambda x, language=language: language.logits(language.prefill(x)[:, -1]), x)
        assert tower == shape.tower.tower_flops(shape.squares)
        assert projector == shape.tower.projector_flops(shape.squares, c.hidden_size)
        square = 4 * tokens**2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
        assert prefill - square / 2 == shape.prefill_flops()  # PyTorch counts the full square even if causal


def test_a_decode_step_of_7b_by_hand():
    """32 layers of 4 * 4096^2 + 3 * 4096 * 11008, 65 norms, a head of 32064 rows and one row of the embedding."""
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 65 * 4096 + 32065 * 4096
    assert roofline.step_bytes(SEVEN) == 2 * weights + 640 * 524288  # half a MiB of K and V per token
    stages = {s.name: s for s in roofline.stages(SEVEN, batches=(1, 8), retentions=(0.5,))}
    one, eight = stages["decode step, batch 1"], stages["decode step, batch 8, 0.5 kept"]
    assert (one.weights, one.kv) == (2 * weights, 640 * 524288)
    assert (eight.weights, eight.kv) == (2 * weights, 8 * (64 + 288) * 524288)
    products = 2 * (weights - 65 * 4096 - 4096)  # norms and the embedding are not matrix products
    assert one.flops == products + 640 * 32 * 32 * 4 * 128  # q by k and weights by v: 2 * 128 each, per head and layer
    assert eight.flops == 8 * (products + 352 * 32 * 32 * 4 * 128)
    assert stages["prefill, 640 tokens"].kv == one.kv


def test_least_times_are_the_larger_of_two():
    h200 = roofline.GPUS["H200"]
    assert (h200.bandwidth, h200.flops) == (4.8e12, 989e12)
    stages = {s.name: s for s in roofline.stages(SEVEN)}
    decode, prefill = stages["decode step, batch 1"], stages["prefill, 640 tokens"]
    assert decode.seconds(h200) == ((decode.weights + decode.kv) / 4.8e12, "memory")
    assert prefill.seconds(h200) == (prefill.flops / 989e12, "products")
    slow = roofline.Machine("", 1e9, 989e12)
    assert prefill.seconds(slow) == ((prefill.weights + prefill.kv) / 1e9, "memory")


def test_neither_torch_nor_a_gpu_is_needed():
    code = (
        "import runpy, sys\n"
        "for words in ('--stages --gpu H100 --shape mistral', '--kernel --gpu H100 --mbytes 4'):\n"
        "    sys.argv = ['roofline.py', *words.split()]\n"
        "    try: runpy.run_path('tools/roofline.py', run_name='__main__')\n"
        "    except SystemExit as left: assert not left.code\n"
        "assert not {'torch', 'numpy', 'triton'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "H100 SXM 80 GB, data sheet: 3,350.0 GB/s, 989.0 TFLOP/s" in done.stdout
    assert done.stdout.count("next-mistral-7b") == 1 and "llava-1.5-7b" not in done.stdout
    step = 1e3 * roofline.step_bytes(MISTRAL) / 3.35e12
    assert f"| {step:.3g} | memory |" in done.stdout


def test_without_flags_it_is_the_table_of_the_page(capsys):
    roofline.main([])
    assert capsys.readouterr().out in (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--stages --gpu H300", "H300"),
        ("--gpu H100", "--stages"),
        ("--kernel --gpu L40S", "L40S"),
        ("--kernel --shapes demo", "demo"),
        ("--kernel --skew 0.5", "--skew is 0.5"),
        ("--kernel --loads 2", "--loads is 2"),
        ("--kernel --gpu H100 A100 --kv-dtype fp8", "fp8 is refused on A100; use int8"),
        ("--kv-dtype int8", "--kv-dtype needs --kernel"),
        ("--kernel --measured /nowhere.json", "/nowhere.json cannot be read"),
        (f"--kernel --measured {ROOT}/README.md", "cannot be read"),
        (f"--kernel --measured {ROOT}/benchmarks/steps-cpu.json", "give"),
        (f"--kernel --kv-dtype int8 --measured {ROOT}/benchmarks/kernels-h200.json", "--kv-dtype int8 and 128"),
        ("--stages --vision 0", "--vision is 0; give a whole number of 1 or more"),
        ("--shape 70b", "70b"),
        ("--batch 0", "--batch is 0; give a whole number of 1 or more"),
        ("--retention 1.5", "--retention is 1.5; give a number from 0 to 1"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        roofline.main(flags.split())
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and said.err.startswith("error: ") and word in said.err
    assert len(said.err.splitlines()) == 1


def test_a_prompt_of_any_size(capsys):
    roofline.main(["--stages", "--shape", "llava-1.5-7b", "--vision", "23000"])
    out = capsys.readouterr().out
    assert "least ms" not in out  # without --gpu
    assert "| llava-1.5-7b, 23000 vision tokens |" in out and "prefill, 23064 tokens" in out
    # 2 bytes: the prompt, x before and after attention, the MLP's blocks apart and joined; q, k, v; cos and sin
    assert "| rotation: T (3 C + 3 q + kv) |" in out  # as much
    assert f"| {2e-6 * 23064 * (5 * 4096 + 3 * 4096 + 256):,.1f} |" in out
    assert f"| {23128 * 0.524288 * 31 / 32:,.1f} |" in out and "it fits in 32 GB" in out


def test_the_peak_is_that_of_the_largest_stage():
    needs = list(memory_model.needs(HALF, batch=3, kept=0.5))
    most = max(needs, key=lambda need: need.weights + need.kv + need.activations)
    said = memory_model.peak(HALF, 3, 0.5, 2)
    assert most.name in said and f"{1e-9 * most.total:.2f} GB" in said
    cache = 2 * HALF.kv_numbers * (64 + 8765 / 2 + 64)
    assert (
        needs[-1].kv == 3 * cache and next(n.kv for n in needs if n.name.startswith("prefill")) == (2 + 23 / 24) * cache
    )


# ---------------------------------------------------------------- the kernel of a decode step

H200 = kernel_model.DEVICES["H200"]


def test_segments_are_split_as_the_kernel_splits_them():
    assert all(split_size(cap) == kernel_model.split_size(cap) for cap in range(200_000))
    items = kernel_model.items_of([100, 64, 2000])  # capacities 164, 128, 2064: splits of 64, 64 and 192
    assert [i.segment for i in items] == 3 * [0] + 2 * [1] + 11 * [2]
    assert [i.parts for i in items] == [2, 2, 0] + [1, 0] + 11 * [11]
    assert [i.bytes // 512 for i in items] == [64, 36, 0] + [64, 0] + 10 * [192] + [80]


def test_work_items_and_chains_are_those_of_the_notes(monkeypatch):
    """For 132 multiprocessors, by the splits of commit 60b5e67 and of today. A chain: loads, tiles of the longest item,
    parts to merge."""
    equal = [(f"8 KV heads x {n:,} tokens", 8 * [n]) for n in (640, 2048)]
    page = [(name, lengths) for name, lengths, _ in kernel_model.measured(ROOT / "benchmarks" / "kernels-h200.json")]
    notes = (ROOT / "kernels" / "NOTES.md").read_text()
    rules = (4, lambda cap: min(1024, max(128, 64 * -(-cap // 2048)))), (kernel_model.LOADS, split_size)
    for name, lengths in equal + page[:10]:
        cells = [name]
        for loads, rule in rules:
            monkeypatch.setattr(kernel_model, "split_size", rule)
            live = [item for item in kernel_model.items_of(lengths) if item.parts]
            tiles = max(-(-item.bytes // (64 * 512)) for item in live)
            parts = max(item.parts for item in live)
            chain = f"{loads} + {tiles} + {parts if parts > 1 else 0}"
            cells += [str(len(live)), f"{len(live) / 132:.2f}", chain]
        assert f"| {' | '.join(cells)} |\n" in notes, cells


def test_as_many_programs_fit_as_the_binaries_leave_room_for():
    """Shared memory and registers by tools/inspect_kernels.py, D = 128, G = 4 in bf16, and with int8: (KB, per
    thread)."""
    for name, (shared, registers), (shared_coded, coded), threads in (
        ("H100", (67, 90), (34, 96), 128), ("A100", (35, 96), (18, 128), 128), ("L4", (35, 96), (18, 128), 128),
        ("MI300X", (33, 170), (17, 224), 256),
    ):  # fmt: skip
        device, file = kernel_model.DEVICES[name], 65536 if threads == 128 else 4 * 64 * 512
        assert device.registers <= file // (registers * threads) and device.coded == file // (coded * threads)
        assert kernel_model.places(device) == min(device.shared // (shared + 1), file // (registers * threads))
        places = kernel_model.places(device, kernel_model.ROWS["int8"])
        assert places == min(device.shared // (shared_coded + 1), file // (coded * threads))


def test_the_chain_is_the_one_that_the_gate_counts():
    assert inspect_kernels.KERNELS["append_kernel"].chain == kernel_model.LOADS


def test_a_prediction_by_hand(monkeypatch):
    """One program; three that stream at once; more than there are places for."""
    device = kernel_model.Device(1, 1e11, 1e9, 1e-6, 1e-7, 105, 2, 3, 2, True, "")
    monkeypatch.setattr(kernel_model, "START", 0.0)
    arithmetic = 4 * 396e-9
    begin = 1e-6 + 3e-6 + 300e-9  # node; work item, length and query, tile; cycles
    slow = 64 * 512 / arithmetic  # bytes/s of one program: bound by instructions
    one = kernel_model.seconds(kernel_model.items_of([64])[:1], device)
    assert one == pytest.approx(begin + 64 * 512 / slow + arithmetic + 1e-7)
    items = [kernel_model.Item(s, 1, 32768) for s in range(3)]
    assert kernel_model.places(device) == 3 and 3 * slow < 1e11
    assert kernel_model.seconds(items, device) == pytest.approx(one)
    assert kernel_model.seconds(items, device, bandwidth=1e9) == pytest.approx(begin + 3 * 32768e-9 + arithmetic + 1e-7)
    assert kernel_model.seconds(items, device, loads=4) == pytest.approx(one + 1e-6)
    second = 1e-7 + 2e-6 + 300e-9 + 64 * 512 / slow + arithmetic + 1e-7  # finds its work item in L2
    assert kernel_model.seconds([*items, items[0]], device) == pytest.approx(one + second)
    both = kernel_model.seconds([kernel_model.Item(0, 2, 16384), kernel_model.Item(0, 2, 32768)], device)
    assert both == pytest.approx(one + 1e-7 + (2 + 1) * 1e-7)  # ticket; log-sum-exps, parts, result
    rows = kernel_model.ROWS["int8"]  # a byte per element, 2 per row for the scale; 22 barriers of 30 cycles
    coded = kernel_model.items_of([64], rows)[:1]
    assert coded[0].bytes == 64 * 2 * (128 + 2) and kernel_model.places(device, rows) == 2
    begin += 360e-9
    assert kernel_model.seconds(coded, device, rows=rows) == pytest.approx(begin + 2 * 4 * 691e-9 + 1e-7)
    slow = kernel_model.seconds(coded, device, bandwidth=1e9, rows=rows)
    assert slow == pytest.approx(begin + 64 * 260e-9 + 4 * 691e-9 + 1e-7)


def test_predictions_are_near_what_an_h200_measured():
    """1.5 is the factor that is promised. The chain had four loads then."""
    cases = list(kernel_model.measured(ROOT / "benchmarks" / "kernels-h200.json"))
    assert len(cases) == 27
    for name, lengths, us in cases:
        ratio = us / (1e6 * kernel_model.seconds(kernel_model.items_of(lengths), H200, loads=4))
        assert 1 / 1.5 < ratio < 1.5, (name, ratio)


@pytest.mark.parametrize(
    ("heads", "mean", "us"),
    [
        (8, 300, 7.3), (8, 640, 8.3), (8, 2048, 10.8), (8, 8192, 19.4), (8, 32768, 58.5), (64, 640, 15.3),
        (64, 4096, 53.5), (32, 192, 7.3), (32, 640, 10.8), (32, 2048, 18.8), (32, 8192, 52.3),
    ],
)  # fmt: skip
def test_predictions_are_near_what_an_h100_measured(heads, mean, us):
    """kernels/NOTES.md, first GPU."""
    lengths = [round(mean * (0.25 + 1.5 * (i + 0.5) / heads)) for i in range(heads)]
    predicted = 1e6 * kernel_model.seconds(kernel_model.items_of(lengths), kernel_model.DEVICES["H100"], loads=4)
    assert 1 / 1.25 < us / predicted < 1.25


@pytest.mark.parametrize("kv", kernel_model.ROWS)
@pytest.mark.parametrize("name", kernel_model.DEVICES)
def test_no_prediction_is_faster_than_its_bytes_or_its_chain(name, kv):
    device, before, rows = kernel_model.DEVICES[name], 0.0, kernel_model.ROWS[kv]
    for mbytes in (1, 4, 17, 65, 130, 512):
        ((case, lengths),) = kernel_model.cases(["gqa8"], [mbytes], [1])
        items = kernel_model.items_of(lengths, rows)
        time, chain = (kernel_model.seconds(items, device, *given, rows=rows) for given in ((), (math.inf, len(items))))
        assert time >= max(chain, 2 * rows.row * sum(lengths) / device.bandwidth) and time > before, case
        before = time


def test_the_kernel_report_prints_its_assumptions_first(capsys):
    roofline.main(["--kernel", "--gpu", "A100", "MI300X", "--shapes", "gqa8", "--mbytes", "4", "--skew", "1", "8"])
    head, *tables = capsys.readouterr().out.split("\n\n")
    assert "fitted" in head and "- A100: 108 multiprocessors" in head and "- MI300X: 304" in head
    assert [t for t in tables if "|" not in t] == ["A100", "MI300X"] and tables[1].count("| gqa8 x 2, 488 ") == 2
    roofline.main(["--kernel", "--kv-dtype", "fp8", "--shapes", "gqa8", "--mbytes", "65"])
    head, _, rows = capsys.readouterr().out.split("\n\n")
    assert "1 byte per element and 2 per row" in head and "720 instructions per tile and warp, 324 of them" in head
    ((_, lengths),) = kernel_model.cases(["gqa8"], [65], [1])
    assert f"| {1e6 * 260 * sum(lengths) / 4.386e12:.1f} |" in rows
    roofline.main(["--kernel", "--loads", "4", "--measured", str(ROOT / "benchmarks" / "kernels-h200.json")])
    assert "| 14.4 |" in next(row for row in capsys.readouterr().out.splitlines() if "gqa8, 20750 tokens, 0.2" in row)
