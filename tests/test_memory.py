"""What prefill needs of memory, counted by the allocator: activations, what is kept, one dense layer, nothing more."""

import pytest
import torch

from model.cache import RaggedCache
from model.config import TextConfig
from model.generate import Layout, Pruner
from model.llama import Llama
from model.pruning import make_method
from tools.roofline import shape_of

CONFIG = TextConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=30000,
)  # fmt: skip


def most_bytes(work):
    """The most bytes that were allocated at once while work() ran, beside those from before."""
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
    shape = shape_of(CONFIG, 10 * each, tokens - 10 * each)
    assert abs(activations + x.nbytes - size * tokens * shape.prefill_numbers) < 0.03 * activations
    cache = RaggedCache(3, slack=64)

    def pruned():
        layout = Layout(3, 2, 1, tokens, spans, x.device)
        pruner = Pruner(make_method("plphp:dr=0,skip=0", 0.3), layout)
        model.prefill(x, cache, choose=pruner.choose, narrow=pruner.narrow)

    most = most_bytes(pruned)
    assert cache.nbytes_held == size * shape.kv_numbers * (tokens - 10 * each + round(0.3 * each) * 10)
    dense_layer = size * tokens * shape.kv_numbers // 3
    assert cache.nbytes_reserved < most <= activations + cache.nbytes_reserved + dense_layer
    assert (
        activations + cache.nbytes_reserved + dense_layer < activations + 3 * dense_layer
    )  # less than without pruning
