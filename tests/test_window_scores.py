"""window_scores: against the softmax of the whole score matrix in float64."""

import functools
import importlib

import pytest
import torch

from kernels import window_scores, window_scores_ref
from tests.oracle import assert_near
from tests.seeds import python_random, torch_random


def exact_scores(q, k, positions, scale, group):
    """The full (Hq, W, T) matrix in float64, masked, softmaxed and averaged."""
    size = q.shape[0] // k.shape[0]
    scores = scale * q.double() @ k.double().repeat_interleave(size, 0).transpose(1, 2)
    hidden = torch.arange(k.shape[1], device=k.device) > torch.tensor(positions, device=k.device)[:, None]
    scores = scores.masked_fill(hidden, float("-inf")).softmax(-1).mean(1)
    grouped = scores.view(k.shape[0], size, -1)
    return {"none": scores, "mean": grouped.mean(1), "max": grouped.amax(1)}[group]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("group", ["none", "mean", "max"])
def test_scores_are_the_mean_attention_of_the_rows(backend, dtype, group, monkeypatch):
    if backend == "triton":
        if dtype == torch.float64:
            pytest.skip("Triton's kernels compute in fp32; float64 is refused, see below")
        monkeypatch.setattr(importlib.import_module("kernels.window_scores_triton"), "keys_per_split", lambda t: 64)
        empty = torch.empty  # rows that are never written show
        monkeypatch.setattr(torch, "empty", lambda *shape, **how: empty(*shape, **how).fill_(float("nan")))
    ours = functools.partial(window_scores, backend=backend)
    rng, device = python_random(0), torch.get_default_device()
    for seed in range(30 if backend == "torch" else 8):
        generator = torch_random(seed)
        hkv, size, t, d = (rng.choice(x) for x in ((1, 2, 4), (1, 2, 3, 8), (1, 5, 33, 150), (8, 20, 64)))
        if seed < 2:  # Qwen2's groups are no power of two
            hkv, size, t, d = 2, 7, 70, 64 * (seed + 1)
        w = rng.randint(1, min(t, 6))
        # the layout of a prefill: a slice with gaps between heads
        q, k = (
            torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
            for shape in ((hkv * size, t, d), (t, hkv, d))
        )
        q, k = q[:, t - w :], k.transpose(0, 1)
        positions = sorted(rng.sample(range(t), w)) if seed % 2 else list(range(t - w, t))
        gapped = torch.tensor(positions).repeat_interleave(2)[::2]  # like a column of a table
        q_pos, scale = gapped if seed % 2 else None, [None, 0.2][seed % 3 == 0]
        exact = exact_scores(q, k, positions, d**-0.5 if scale is None else scale, group)
        for op in (ours, window_scores_ref):
            got = op(q, k, q_pos=q_pos, scale=scale, group=group)
            assert got.dtype == torch.promote_types(dtype, torch.float32) and got.shape == exact.shape
            what = f"seed {seed}, q {tuple(q.shape)}, k {tuple(k.shape)}, rows at {positions}, (head, token)"
            assert_near(got, exact, 1e-7 + 2e-5 * exact, what)
            if group != "max":
                torch.testing.assert_close(got.sum(-1), torch.ones(len(got), dtype=got.dtype))


def test_a_head_is_scored_alike_whatever_its_neighbours(backend):
    """Parts of the shipped size: 256 of these 1,100 tokens, the last one cut short."""
    shapes = (4, 3, 16), (2, 1100, 16)
    q, k = (torch.randn(shape, generator=torch_random(seed), device="cpu") for seed, shape in enumerate(shapes))
    q, k = q.to(torch.get_default_device()), k.to(torch.get_default_device())
    both = window_scores(q, k, backend=backend)
    exact = exact_scores(q, k, [1097, 1098, 1099], 0.25, "mean")
    assert_near(both, exact, 1e-7 + 2e-5 * exact, "(head, token)")
    if backend == "triton":
        assert torch.equal(both[1:], window_scores(q[2:], k[1:], backend=backend))


def test_a_row_never_sees_what_comes_after_it(backend):
    q, k = torch.randn(4, 2, 8), torch.randn(2, 9, 8)
    k[:, 5:] = float("nan")
    scores = window_scores(q, k[:, :5], q_pos=torch.tensor([1, 4]), backend=backend)
    assert scores.shape == (2, 5) and scores.isfinite().all()
    late = window_scores(q, torch.randn(2, 9, 8), q_pos=torch.tensor([1, 4]), backend=backend)
    assert (late[:, 5:] == 0).all()


BAD = [
    ({"q": torch.zeros(3, 2, 8)}, "3 query heads"),
    ({"q": torch.zeros(4, 2, 16)}, "16"),
    ({"k": torch.zeros(9, 8)}, "(9, 8)"),
    ({"q": torch.zeros(4, 0, 8)}, "(4, 0, 8)"),
    ({"q": torch.zeros(4, 10, 8)}, "10 rows"),
    ({"k": torch.zeros(2, 9, 8).half()}, "float16"),
    ({"k": torch.zeros(2, 9, 8, device="meta")}, "meta"),
    ({"k": torch.zeros(2, 8, 9).transpose(1, 2)}, "non-contiguous"),
    ({"group": "sum"}, "'sum'"),
    ({"backend": "cuda"}, "'cuda'"),
    ({"q": torch.zeros(4, 2, 8).double(), "k": torch.zeros(2, 9, 8).double(), "backend": "triton"}, "float64"),
    ({"q_pos": torch.tensor([3])}, "(1,)"),
    ({"q_pos": torch.tensor([-1, 3])}, "-1"),
    ({"q_pos": torch.tensor([1.0, 3.0])}, "float32"),
]


@pytest.mark.parametrize(("change", "word"), BAD, ids=[word for _, word in BAD])
def test_bad_calls_are_refused_with_the_value(change, word):
    with pytest.raises(ValueError) as refused:
        window_scores(**{"q": torch.zeros(4, 2, 8), "k": torch.zeros(2, 9, 8)} | change)
    assert word in str(refused.value) and ";" in str(refused.value)
