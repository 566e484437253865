"""Shared oracles: a small decoder, the design's tolerances, attention with an explicit mask."""

import copy

import pytest
import torch

from kernels import ragged_decode_append_ref
from model.config import TextConfig
from model.llama import Llama
from tests.seeds import BASE

ULP = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def small_llama(heads=4, kv_heads=2, seed=0, bias=False):
    """A decoder of 3 layers and 32 channels, with weights large enough to reveal a wrong angle or head."""
    config = TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=kv_heads, attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1000 * BASE)
        model = Llama(config).requires_grad_(False)
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
    return model


def reordered(model, channels, inner):
    """A copy of small_llama with its channels (C), or those inside its MLPs, in reverse order. It computes the same
    function, of x.flip(-1) with flipped output or of x, but sums in the reverse order."""
    twin = copy.deepcopy(model)
    wide, deep = ([0] if turn else [] for turn in (channels, inner))
    for layer in twin.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        sides = [(p, [], wide) for p in (attn.q_proj, attn.k_proj, attn.v_proj)] + [(attn.o_proj, wide, [])]
        sides += [(mlp.gate_proj, deep, wide), (mlp.up_proj, deep, wide), (mlp.down_proj, wide, deep)]
        for linear, outside, inside in sides:
            linear.weight.data = linear.weight.data.flip(outside).T.flip(inside).T.contiguous()
            if linear.bias is not None:
                linear.bias.data = linear.bias.data.flip(outside)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = norm.weight.data.flip(wide)
    twin.model.norm.weight.data = twin.model.norm.weight.data.flip(wide)
    return twin


def assert_as_exact(got, plain, exact, dtype, what="", floor=1e-3, place=str):
    """Assert that the error of `got` is at most twice that of `plain`, plus 2 ulp of the dtype (64 ulp in float64).

    plain: the same maths in plain PyTorch; several results, for other orders of the sums, may be stacked.

    exact: float64. NaN always fails; infinities must agree. floor: smallest magnitude whose ulp is used. place: words
    for an index into `got`.
    """
    finite = exact.isfinite()
    largest, off = (torch.where(finite, t.abs(), 0.0).max() for t in (exact, plain.double() - exact))
    ulps = 64 if dtype == torch.float64 else 2
    assert_near(got, exact, 2 * off + ulps * ULP[dtype] * largest.clamp(min=floor), what, place)


def assert_near(got, wanted, allowed, what="", place=str):
    """Assert that each value is at most `allowed` (a number or a tensor) away. The message names the worst value.

    NaN always fails; infinities must agree. place: words for an index into `got`.
    """
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    got, wanted = got.double(), wanted.double()
    error = torch.where(got == wanted, 0.0, (got - wanted).abs()).nan_to_num(float("inf"), float("inf"))
    allowed = torch.as_tensor(allowed, dtype=torch.float64, device=got.device).expand(got.shape)
    wrong = ~(error <= allowed)
    if wrong.any():
        at = tuple(int(i) for i in torch.unravel_index(torch.where(wrong, error - allowed, -1.0).argmax(), got.shape))
        raise AssertionError(
            f"{what}: {place(at)}: got {got[at]:.9g}, expected {wanted[at]:.9g}, error {error[at]:.3g}, "
            f"allowed {allowed[at]:.3g}; {wrong.sum()} of {wrong.numel()} values are wrong, shape {tuple(got.shape)}"
        )


def assert_attends(got, plain, exact, length, what=""):
    """`assert_as_exact` for [out, lse], or [out], of segments with `length` (S,) tokens. The message names the segment.

    out (B, [rows,] Hq, D), lse (B, [rows,] Hq). The rounding of a log-sum-exp is that of the partial sums of a score,
    D products of normal values times D**-0.5. They reach |q| |k| D**-0.5, about D**0.5, even if the score is small.
    """
    floors = (1e-3, exact[0].shape[-1] ** 0.5)
    for name, heads, floor, *results in zip(("out", "lse"), (-2, -1), floors, got, plain, exact, strict=False):
        place = of_segments(length, results[0].shape, heads)
        assert_as_exact(*results, results[0].dtype, f"{name} {what}".strip(), floor, place)


def of_segments(length, shape, heads):
    """Words for an index into a result of this shape; length (S,): tokens per segment; heads: the dimension of Hq."""

    def place(index):
        kv_heads, head = len(length) // shape[0], index[heads]
        kv_head = head * kv_heads // shape[heads]
        segment = index[0] * kv_heads + kv_head
        row = f", row {index[1]}" if len(shape) + heads == 2 else ""
        channel = f", channel {index[-1]}" if heads == -2 else ""
        return (
            f"segment {segment} (sequence {index[0]}, KV head {kv_head}, {int(length[segment])} tokens)"
            f", query head {head}{row}{channel}"
        )

    return place


def assert_stored(got, wanted, start, length, cap, what="", rtol=0.0, atol=0.0):
    """Assert that arenas [k, v] of segments (S,) hold the same, NaN where nothing was stored."""

    def place(index):
        for s, (a, n, c) in enumerate(zip(start.tolist(), length.tolist(), cap.tolist(), strict=True)):
            if a <= index[0] < a + c:
                return f"segment {s} ({n} tokens, {c} slots), slot {index[0] - a}, channel {index[1]}"
        return f"slot {index[0]}, which is of no segment, channel {index[1]}"

    for name, a, b in zip("kv", got, wanted, strict=True):
        unset = a.isnan() & b.isnan()
        a, b = a.masked_fill(unset, 0.0), b.masked_fill(unset, 0.0)
        assert_near(a, b, atol + rtol * b.abs().nan_to_num(), f"stored {name} {what}".strip(), place)


def check_step(step, q, new, arenas, tables, what="", off=None, **options):
    """Check a decode step(q, *new, *arenas, *tables, return_lse=True, **options) -> [out, lse] or [out], against
    `ragged_decode_append_ref`: its results, and what it stores in a copy of the arenas.

    tables: kv_start, kv_len, kv_cap; off: tolerances of the stored values; options: scale and rope.
    """

    def reference(to, stored):
        given = options if options.get("rope") is None else options | {"rope": [to(t) for t in options["rope"]]}
        return ragged_decode_append_ref(to(q), *map(to, new), *stored, *tables, return_lse=True, **given)

    exact = reference(torch.Tensor.double, [a.double() for a in arenas])
    wanted, ours = ([a.clone() for a in arenas] for _ in "ab")
    plain = reference(torch.Tensor.clone, wanted)
    got = step(q, *new, *ours, *tables, return_lse=True, **options)
    assert_attends(got, plain, exact, tables[1], what)
    assert_stored(ours, wanted, *tables, what, **(off or {}))
    return ours


def assert_within(got, exact, terms, count, dtype=torch.float32):
    """Assert that sums of `count` products are within the rounding bound for any order, fused or not: gamma_n * terms.

    terms: sums of the absolute products, sum |a||b|; exact: float64 (Higham, Accuracy and Stability, 3.1).
    """
    rounding = count * ULP[dtype] / 2
    off = (got.double() - exact).abs() - rounding / (1 - rounding) * terms
    assert not got.isnan().any() and (off <= 0).all(), f"{off.max():.3g} more than rounding explains"


def poison(cache, value=float("nan")):
    """Write NaN, or another value, into every free slot. In 8 bits: the largest or a NaN code and a NaN scale."""
    for layer in range(len(cache.k)):
        arenas = [t for t in cache.rows(layer) if t is not None]
        taken = torch.zeros(len(arenas[0]), dtype=torch.bool)
        tables = (table[layer].tolist() for table in (cache.kv_start, cache.kv_len, cache.kv_cap))
        for start, length, capacity in zip(*tables, strict=True):
            assert 0 <= length <= capacity <= len(taken) - start, "a segment does not fit"
            assert not taken[start : start + length].any(), "segments overlap"
            taken[start : start + length] = True
        for arena in arenas:
            if arena.itemsize == 1:
                arena.view(torch.int8)[~taken] = 0x7F
            elif arena.dtype == torch.int32:  # positions
                arena[~taken] = -1
            else:
                arena[~taken] = value


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


def masked_ids(folder, generation, choose, count, rows=1, narrow=None):
    """Greedy ids of transformers with the dropped tokens of each layer and KV head masked for decoded tokens.

    choose(layer, attention) -> keep (Hkv, T) bool, once per layer; attention (Hq, T) of the prompt's last row, or
    (Hq, rows, T) of its last rows if rows > 1. narrow(layer, attention) -> keep (T,) bool or None: later layers mask
    all other columns for every row, including the prompt's. Returns (ids, [keep of each layer]).
    """
    return masked_batch(folder, [generation], [choose], count, rows, narrow)[0]


def expanded(generation):
    """Prompt ids for transformers: each picture's id repeated once per token of the picture; `<video>` for frames."""
    config, pictures = generation.checkpoint.config, iter(generation.pictures)
    ids = []
    for token in generation.ids:
        picture = next(pictures) if token == config.image_token_index else None
        token = config.video_token_index if picture and is_frame(picture) else token
        ids += [token] * (picture.tokens if picture else 1)
    return ids


def is_frame(picture):
    """True for a frame of a video."""
    return picture.settings.mode == "frame"


def hf_pictures(generations):
    """Picture arguments for transformers' models. All videos must have the same number of frames."""
    config = generations[0].checkpoint.config
    found = [[picture for picture in g.pictures if not is_frame(picture)] for g in generations]
    videos = [[]]
    for frame in (picture for g in generations for picture in g.pictures if is_frame(picture)):
        videos[-1].append(frame.pixels[0])
        videos += [[]] if frame.layout.newline else []  # the last frame of its video
    pictures = [picture for some in found for picture in some]
    inputs = {}
    if any(videos):
        inputs["pixel_values_videos"] = torch.stack([torch.stack(video) for video in videos[:-1]])
    if not pictures:
        return inputs
    pixels = [picture.pixels for picture in pictures]
    if not config.image_grid_pinpoints:
        return {"pixel_values": torch.cat(pixels)}
    inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True)  # (n, most tiles, 3, S, S)
    inputs["image_sizes"] = torch.tensor([picture.size[::-1] for picture in pictures])
    if config.max_tiles:
        inputs["batch_num_images"] = torch.tensor([len(some) for some in found if some])
    return inputs


def hf_kind(config):
    """The name in transformers of the architecture of a LlavaConfig."""
    return "LlavaOnevision" if config.max_tiles else "LlavaNext" if config.image_grid_pinpoints else "Llava"


def masked_batch(folder, generations, chooses, count, rows=1, narrow=None):
    """`masked_ids` for several prompts, padded on the left: [(ids, [keep of each layer])], one per prompt."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")
    prompts = [expanded(g) for g in generations]
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    hidden = torch.arange(longest, device="cpu") < torch.tensor(pads, device="cpu")[:, None]  # (B, N), from all rows
    kept = {}

    def attend(module, query, key, value, mask, scaling, **_):
        """query (B, Hq, T, D), key and value (B, Hkv, N, D)."""
        group, n, layer = query.shape[1] // key.shape[1], key.shape[2], module.layer_idx
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        if query.shape[2] == 1:
            new = torch.ones(*key.shape[:2], n - longest, dtype=torch.bool)
            seen = torch.cat((kept[layer], new), 2).repeat_interleave(group, 1)[:, :, None]
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        else:  # a hidden row attends to itself, because a softmax over no keys is NaN
            seen = torch.ones(n, n, dtype=torch.bool).tril() & ~hidden[:, None, None] | torch.eye(n, dtype=torch.bool)
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            kept[layer] = (~hidden)[:, None].repeat(1, key.shape[1], 1)
            for b, pad in enumerate(pads):
                attention = weights[b, :, -rows:, pad:].squeeze(1)
                kept[layer][b, :, pad:] &= chooses[b](layer, attention)
                stays = narrow(layer, attention) if narrow else None
                if stays is not None:
                    hidden[b, pad:] |= ~stays
        out = weights @ value.repeat_interleave(group, 1)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("dropped", attend)
    with torch.device("cpu"):
        model = getattr(transformers, hf_kind(generations[0].checkpoint.config) + "ForConditionalGeneration")
        model = model.from_pretrained(folder, dtype=torch.float32).eval()
        model.model.language_model.set_attn_implementation("dropped")
        out = model.generate(
            input_ids=torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]),
            attention_mask=(~hidden).long(), **hf_pictures(generations),
            max_new_tokens=count, do_sample=False, eos_token_id=None,
            suppress_tokens=generations[0].checkpoint.never_ids,
        )  # fmt: skip
    ids = out[:, longest:].tolist()
    return [(ids[b], [kept[i][b, :, pad:] for i in sorted(kept)]) for b, pad in enumerate(pads)]
