"""tools/roofline.py against numbers computed here in other ways."""

import subprocess
import sys

import pytest
import torch

from model.checkpoint import empty_model
from model.config import LlavaConfig, TextConfig, read_config
from tests.paths import DEMO, ROOT
from tools import roofline

SEVEN, THIRTEEN, TILES, EIGHT, MISTRAL, DEMO_SHAPE = roofline.SHAPES


@pytest.fixture(scope="module")
def models():
    """Name of a shape -> a whole LLaVA on the meta device."""
    configs = {s.name: LlavaConfig(text_config=TextConfig(**vars(s.config))) for s in (SEVEN, MISTRAL)}
    return {name: empty_model(config) for name, config in (configs | {DEMO_SHAPE.name: read_config(DEMO)}).items()}


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape", [SEVEN, MISTRAL, DEMO_SHAPE], ids=lambda s: s.name)
def test_weights_are_those_of_the_modules(models, shape):
    model = models[shape.name]
    language, tower = model.language_model, model.vision_tower.vision_model
    table = language.model.embed_tokens.weight
    assert shape.weight_numbers == count(language) - table.numel() + table.shape[1]  # one row of the embedding
    assert shape.tower.projector_numbers(shape.config.hidden_size) == count(model.multi_modal_projector)
    idle = [*tower.encoder.layers[shape.tower.layers :], tower.post_layernorm]  # after the layer that LLaVA uses
    assert shape.tower.layers == model.config.feature_layers[0]
    assert shape.tower.tower_numbers == count(tower) - sum(map(count, idle))
    assert (TILES.pictures, EIGHT.pictures) == (5, 8)


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
            pixels = torch.empty(shape.pictures, 3, side, side)
            features = torch.empty(shape.pictures, shape.tower.patches, shape.tower.hidden)
            x = torch.empty(1, tokens, c.hidden_size)
            tower = counted(model.vision_tower, pixels, model.config.feature_layers)
            projector = counted(model.multi_modal_projector, features)
            prefill = counted(lambda x, language=language: language.logits(language.prefill(x)[:, -1]), x)
        assert tower == shape.tower.tower_flops(shape.pictures)
        assert projector == shape.tower.projector_flops(shape.pictures, c.hidden_size)
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
        "import runpy, sys; sys.argv = ['roofline.py', '--stages', '--gpu', 'H100', '--shape', 'mistral']\n"
        "runpy.run_path('tools/roofline.py', run_name='__main__')\n"
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
    # 2 bytes x 23,064 tokens x (x, its copy and the normed rows, q + k + v, cos and sin, 4 MLP rows); 0.5 MiB a token
    assert f"at most {2e-6 * 23064 * (3 * 4096 + 3 * 4096 + 256 + 4 * 11008):,.1f} MB" in out
    assert f"{23064 * 0.524288:,.1f} / {(64 + 11500) * 0.524288:,.1f}" in out
