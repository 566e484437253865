"""What several test files share: a small decoder, the tolerance of the design, attention written out with a mask."""

import torch

from model.config import TextConfig
from model.llama import Llama

ULP = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def small_llama(heads=4, kv_heads=2, seed=0):
    """A decoder of 3 layers and 32 channels, with weights large enough that a wrong angle or head shows."""
    torch.manual_seed(seed)
    config = TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=kv_heads,
    )  # fmt: skip
    model = Llama(config).requires_grad_(False)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


def assert_as_exact(got, plain, exact, dtype, what="", floor=1e-3):
    """Error of `got` at most twice that of `plain`, the same maths in plain PyTorch, plus two ulp of a dtype.

    exact: float64, which float64 can only be compared with as a neighbour. NaN is never right; infinities have to
    agree. floor: the least size that an ulp is taken of; 1 for a log-sum-exp, whose absolute error is what counts.
    """
    assert got.shape == exact.shape and not got.isnan().any(), what
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), what
    if finite.any():
        got, plain, exact = (t[finite].double() for t in (got, plain, exact))
        ulps = 64 if dtype == torch.float64 else 2
        allowed = 2 * (plain - exact).abs().max() + ulps * ULP[dtype] * exact.abs().max().clamp(min=floor)
        error = (got - exact).abs().max()
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def masked_attention(q, k, v, keep, scale=None):
    """Dense attention with a keep mask, in the dtype of q.

    q (B, T, Hq, D); k, v (B, Hkv, N, D); keep (B, Hkv, N) bool -> out (B, T, Hq, D), lse (B, T, Hq). A head that keeps
    nothing gives 0 and -inf.
    """
    group = q.shape[2] // k.shape[1]
    k, v, keep = (t.repeat_interleave(group, 1) for t in (k, v, keep))
    scores = torch.einsum("bthd,bhnd->bthn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~keep[:, None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bthn,bhnd->bthd", weights, v), scores.logsumexp(-1)
