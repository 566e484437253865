"""Memory of prefill, counted by the allocator: activations, kept rows and one dense layer, nothing more."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import fast, open_checkpoint
from model.cache import RaggedCache
from model.config import TextConfig
from model.llama import Llama
from model.pruning import make_method
from model.report import free_memory, measure_bandwidth
from model.view import Pruning
from tests.test_cache import live_bytes
from tools.roofline import Shape

CONFIG = TextConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=30000,
)  # fmt: skip


def most_bytes(work):
    """Peak bytes allocated during work(), minus those before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    live = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert len(events) > 100
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
    assert abs(activations + x.nbytes - size * tokens * shape.prefill_numbers) < 0.03 * activations
    cache = RaggedCache(3, slack=64)

    def pruned():
        model.prefill(x, cache, prune=Pruning(make_method("plphp:dr=0,skip=0", 0.3), 3, spans))

    most = most_bytes(pruned)
    assert cache.nbytes_held == size * shape.kv_numbers * (tokens - 10 * each + round(0.3 * each) * 10)
    dense_layer = size * tokens * shape.kv_numbers // 3
    assert cache.nbytes_reserved < most <= activations + cache.nbytes_reserved + dense_layer
    assert cache.nbytes_reserved < 2 * dense_layer  # less than without pruning


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
