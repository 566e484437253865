"""Memory of prefill, counted by the allocator: activations, kept rows and one dense layer, nothing more."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import clip, fast, llama, open_checkpoint, view
from model.cache import RaggedCache
from model.checkpoint import DTYPES, empty_model
from model.config import TextConfig, parse_config
from model.image import ImageSettings
from model.layout import layout_of
from model.llama import Llama
from model.lookahead import Lookahead
from model.pruning import make_method
from model.report import free_memory, measure_bandwidth
from model.view import Pruning
from tests.oracle import assert_near
from tests.sizes import Sizes
from tests.test_cache import live_bytes
from tools import memory_model, roofline
from tools.make_checkpoint import config_json
from tools.roofline import Shape
from tools.shapes import SHAPES, TIED, text_config

CONFIG = TextConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=30000,
)  # fmt: skip


def most_bytes(work, least=100):
    """Peak bytes allocated during work(), minus those before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    live = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert len(events) > least
    return most


@pytest.mark.parametrize("each", [230, 2300])
@torch.inference_mode()
def test_prefill_of_ten_pictures_holds_what_is_kept_one_dense_layer_and_activations(each):
    model = Llama(CONFIG).requires_grad_(False)
    spans = [(5 + i * (each + 1), 5 + i * (each + 1) + each) for i in range(10)]
    tokens = spans[-1][1] + 20
    x, size = torch.randn(1, tokens, 32), 4
    activations = most_bytes(lambda: model.prefill(x))
    shape = Shape("", CONFIG, 10 * each, tokens - 10 * each)
    needed = max(numbers for _, numbers in memory_model.prefill(shape, tokens))
    assert abs(activations + x.nbytes - size * needed) < 0.03 * activations
    cache = RaggedCache(3, slack=64)

    def pruned():
        model.prefill(x, cache, prune=Pruning(make_method("plphp:dr=0,skip=0", 0.3), 3, spans))

    most = most_bytes(pruned)
    assert cache.nbytes_held == size * shape.kv_numbers * (tokens - 10 * each + round(0.3 * each) * 10)
    dense_layer = size * tokens * shape.kv_numbers // 3
    assert cache.nbytes_reserved < most <= activations + cache.nbytes_reserved + dense_layer
    assert cache.nbytes_reserved < 2 * dense_layer  # less than without pruning


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of the MLP of 512 rows, so that a small prompt has several."""
    assert (memory_model.ROWS, memory_model.SQUARES, memory_model.CHOSEN) == (llama.ROWS, clip.SQUARES, view.ROWS)
    monkeypatch.setattr(llama, "ROWS", 512)
    monkeypatch.setattr(memory_model, "ROWS", 512)


PREFILL = "prefill", "pack", "final norm"  # stages in which a prefill without much of a choice peaks


@pytest.mark.parametrize(
    ("name", "dtype", "squares", "tokens"),
    [
        ("tiny-next", "fp32", 5, 2100),
        ("tiny-onevision", "fp32", 37, 2100),
        ("tiny-onevision", "bf16", 37, 4000),
        ("thin-onevision", "fp32", 2, 1300),
    ],
)
@torch.inference_mode()
def test_every_stage_holds_what_the_formula_says(name, dtype, squares, tokens, blocks):
    """Within 3 %, for a picture of so many squares and a prompt of so many tokens; `joined`, an upper bound, within
    40 %. Unpruned, with plphp, whose choice reads one row, and once with h2o, whose choice reads all rows."""
    kind, config = DTYPES[dtype], parse_config(config_json(name, dtype))
    model, tower = empty_model(config).to(kind).to_empty(device="cpu").requires_grad_(False), config.vision_config
    for p in model.parameters():
        p.normal_(0, 0.02)
    settings = ImageSettings(
        tower.image_size, "anyres", pinpoints=config.image_grid_pinpoints, max_tiles=config.max_tiles
    )
    layout = layout_of((330, 320), settings, tower.image_size // tower.patch_size, 0)
    assert squares == 1 + layout.grid[0] * layout.grid[1]
    shape = Shape("", text_config(name), layout.tokens, 64, roofline.tower_of(SHAPES[name][1]), squares, name in TIED)
    assert sum(p.nbytes for p in model.parameters()) == pytest.approx(kind.itemsize * shape.resident_numbers, rel=1e-3)

    def holds(stage, measured, of=shape, kept=1.0):
        needs = [n for n in memory_model.needs(of, 1, kept, kind.itemsize) if n.name.startswith(stage)]
        need = max(needs, key=lambda need: need.total)
        assert measured == pytest.approx(need.kv + need.activations, rel=0.03), need

    pixels = torch.randn(squares, 3, tower.image_size, tower.image_size).to(kind)
    if dtype == "fp32":  # in 16 bits, PyTorch's convolution copies the pixels, which are most of so small a tower
        holds("vision tower", pixels.nbytes + most_bytes(lambda: model.see(pixels)))
    features = model.see(pixels)[0]
    holds("projector", pixels.nbytes + features.nbytes + most_bytes(lambda: model.project(features), 1))
    y = model.project(features)
    joined = y.nbytes + most_bytes(lambda: model.join(y, layout), 1)
    said = kind.itemsize * max(n for _, n in memory_model.joined(shape.tower, squares, layout.tokens, y.shape[2]))
    assert 0.6 * said < joined <= 1.001 * said  # less if the map is shrunk or cut
    x = torch.randn(1, tokens, config.text_config.hidden_size).to(kind)
    long, layers = Shape("", shape.config, tokens - 64, 64), config.text_config.num_hidden_layers
    cases = [(None, PREFILL), ("plphp:dr=0,skip=0", PREFILL)]
    for spec, stages in cases + [("h2o", ("choice", *PREFILL))] * (name == "tiny-onevision"):
        cache = RaggedCache(layers, slack=memory_model.SLACK)
        prune = spec and Pruning(make_method(spec, 0.5), layers, [(10, tokens - 54)])
        most = x.nbytes + most_bytes(lambda c=cache, p=prune: model.language_model.prefill(x, c, prune=p))
        holds(stages, most, long, 0.5 if spec else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lookahead_rows", [0, 3])
@torch.inference_mode()
def test_blocks_of_a_prefill_give_what_one_piece_gives(lookahead_rows, dtype, monkeypatch):
    """Kept tokens, and logits with and without look-ahead rows, which are in the last block. In bf16 a product of
    fewer rows may be rounded differently, which may exchange tokens of nearly equal scores."""
    model = Llama(CONFIG).requires_grad_(False)
    for p in model.parameters():
        p.normal_(0, 0.3)
    ahead = Lookahead(model, lookahead_rows, 4).requires_grad_(False) if lookahead_rows else None
    for p in ahead.parameters() if ahead else ():
        p.normal_(0, 0.3)
    model, ahead = model.to(dtype), ahead and ahead.to(dtype)
    x, found = torch.randn(1, 4200, 32).to(dtype), []
    spec = "plphp:dr=0,skip=0" + ",query=lookahead" * bool(ahead)
    for rows in (10**6, llama.ROWS):
        monkeypatch.setattr(llama, "ROWS", rows)
        cache = RaggedCache(3)
        prune = Pruning(make_method(spec, 0.4), 3, [(5, 4190)], ahead=lookahead_rows, remember=True)
        hidden = model.prefill(x, cache, prune=prune, lookahead=ahead)
        found.append((model.logits(hidden), torch.stack(prune.masks)))
    (whole, kept), (blocks, same) = found
    exact = dtype == torch.float32
    assert_near(blocks, whole, whole.abs().max().item() * (1e-5 if exact else 0.05))
    assert not kept.all() and (kept != same).float().mean() <= (0 if exact else 0.01)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@torch.inference_mode()
def test_groups_of_squares_give_what_all_give(dtype, off, monkeypatch):
    tower = clip.VisionTower(parse_config(config_json("tiny-onevision", "fp32")).vision_config).to(dtype)
    pixels, found = torch.randn(11, 3, 56, 56).to(dtype), []
    for squares in (11, 3):
        monkeypatch.setattr(clip, "SQUARES", squares)
        found.append(tower(pixels, (0, 3, 1), lambda layer, x: x[:, 1:] if layer == 1 else x))
    for whole, grouped in zip(*found, strict=True):
        assert_near(grouped, whole, off)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 7])
@torch.inference_mode()
def test_attention_stores_no_square_of_tokens(dtype, group):
    q, k, v = (torch.randn(2, 1500, heads, 16).transpose(1, 2).to(dtype) for heads in (2 * group, 2, 2))
    with Sizes() as sizes:
        y = llama.dense_attention(q, k, v)
    assert sizes.largest <= q.numel() and y.shape == q.shape
    kwargs = {"is_causal": True, "enable_gqa": True}
    assert torch.equal(y, torch.nn.functional.scaled_dot_product_attention(q, k, v, **kwargs))


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
def test_loading_holds_every_weight_once(make_checkpoint, tmp_path, wanted, monkeypatch):
    """`arrange` copies a layer's weights side by side and frees each original at once."""
    tensors, seen = make_checkpoint(tmp_path, text={"num_hidden_layers": 9}), []
    stored = torch.float32 if wanted == "bf16" else torch.bfloat16  # so that every weight is cast, not mapped
    save_file({name: t.to(stored) for name, t in tensors.items()}, tmp_path / "model.safetensors")

    lay = fast.lay

    def watched(layers):
        lay(layers)
        seen.append(live_bytes()[0])

    monkeypatch.setattr(fast, "lay", watched)
    model = open_checkpoint(tmp_path).read_weights(wanted).model.language_model
    copied = sum(p.nbytes for p in model.model.layers.parameters())
    assert len(seen) > 9 and max(seen) - min(seen) < copied // 9


# ---------------------------------------------------------------- memory of --stats


@pytest.mark.parametrize(("device", "most"), [("cuda", 2**28), ("cpu", 2**26)])
@pytest.mark.parametrize("free", [0, 10**7, 3 * 2**25, 2**32, 2**40])
def test_the_bandwidth_is_measured_within_what_is_free(monkeypatch, device, most, free):
    taken, small = [], torch.ones(10)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**41))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(Path, "read_text", lambda self: f"MemTotal: {2**31} kB\nMemAvailable: {free // 1024} kB\n")
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(torch, "ones", lambda size, **how: taken.append(size) or small)
    speed = measure_bandwidth(torch.device(device))
    assert (speed > 0) == bool(taken) == (free >= 2**25)
    assert sum(2 * 4 * size for size in taken) <= free // 2  # x and its copy, fp32
    assert free < 2**40 or taken == [most]
    assert free_memory(torch.device("cpu")) == free // 1024 * 1024
