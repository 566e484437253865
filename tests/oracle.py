"""What several test files share: a small decoder, the tolerance of the design, attention written out with a mask."""

import pytest
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


def masked_ids(folder, generation, choose, count):
    """Greedy ids of transformers that hides from decoded tokens what each KV head of each layer dropped.

    choose(layer, attention) -> keep (Hkv, T) bool, once per layer; attention (Hq, T): that of the prompt's last row.
    Returns (ids, [keep of each layer]).
    """
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")
    kept = {}

    def attend(module, query, key, value, mask, scaling, **_):
        """query (1, Hq, T, D), key and value (1, Hkv, N, D)."""
        group, n, layer = query.shape[1] // key.shape[1], key.shape[2], module.layer_idx
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        if query.shape[2] == 1:
            keep = kept[layer]
            seen = torch.cat((keep, torch.ones(len(keep), n - keep.shape[1], dtype=torch.bool)), 1)
            scores = scores.masked_fill(~seen.repeat_interleave(group, 0)[None, :, None], float("-inf"))
        else:
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
            kept[layer] = choose(layer, scores[0, :, -1].softmax(-1))
        out = scores.softmax(-1) @ value.repeat_interleave(group, 1)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("dropped", attend)
    image, tokens = generation.checkpoint.config.image_token_index, generation.checkpoint.config.image_tokens
    ids = [i for t in generation.ids for i in [t] * (tokens if t == image else 1)]
    with torch.device("cpu"):
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        model.model.language_model.set_attn_implementation("dropped")
        ids = torch.tensor([ids])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.stack(generation.pixels),
            max_new_tokens=count, do_sample=False, eos_token_id=None, suppress_tokens=generation._never(),
        )  # fmt: skip
    return out[0, ids.shape[1] :].tolist(), [kept[layer] for layer in sorted(kept)]
