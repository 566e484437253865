"""Keys and values in 8 bits: quantisation, and attention over them against float64 over the dequantised rows.

The quantised rows are data: a result may differ from exact attention over them by what the compute dtype explains, as
in the other tests. Free slots hold a NaN scale and the largest or a NaN code.
"""

import pytest
import torch

import kernels.ragged_decode_torch as torch_way
from kernels import (
    decode_plan,
    dequantised,
    quantise,
    quantise_ref,
    ragged_decode,
    ragged_decode_append,
    ragged_decode_append_ref,
    ragged_decode_ref,
)
from kernels.backend import choose_backend, interpreted
from kernels.quantise import CODES, has_e4m3
from tests.oracle import assert_attends, assert_near
from tests.seeds import python_random, torch_random
from tests.test_ragged_decode import GOOD, STEP, case, dense, on_device

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
TYPES = pytest.mark.parametrize("codes", KINDS.values(), ids=KINDS)
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@pytest.fixture(autouse=True)
def fp8_is_there(request):
    """Skips Triton with fp8 on a GPU that has none."""
    given = getattr(request.node, "callspec", None) and request.node.callspec.params or {}
    fp8 = torch.cuda.is_available() and (given.get("backend"), given.get("codes")) == ("triton", KINDS["fp8"])
    if fp8 and not has_e4m3(torch.device("cuda")):
        pytest.skip("this GPU has no float8_e4m3fn")


def hostile_rows():
    """Rows (., 24) of all magnitudes, of zeros, with ties, with one large channel."""
    rows = torch.randn(300, 24, generator=torch_random(0)) * torch.logspace(-9, 4, 300)[:, None]
    ties = torch.arange(24) * 0.5 - 5
    ties[0] = 127.0  # the scale is 1
    spike = torch.full((24,), 1e-4)
    spike[3] = -9.0
    return torch.cat((rows, torch.zeros(1, 24), ties[None], spike[None]))


@TYPES
def test_rows_in_8_bits(codes):
    """The error is half a step; int8 rounds half to even; equal to the reference, bit by bit."""
    x = hostile_rows()
    got, scale = quantise(x, codes)
    wanted, wanted_scale = quantise_ref(x, codes)
    assert got.dtype == codes and scale.dtype == torch.float16 and scale.shape == x.shape[:1]
    assert torch.equal(got.view(torch.int8), wanted.view(torch.int8)) and torch.equal(scale, wanted_scale)
    step = scale.double()[:, None]
    if codes != torch.int8:  # e4m3: 3 bits after the first, smallest step 2^-9
        step = step * (2.0 ** (got.double().abs().log2().floor() - 3)).clamp(min=2.0**-9)
    top = x.double().abs().amax(1, keepdim=True)
    clipped = top * 2**-11 + CODES[codes] * 2**-25  # by the rounding of the scale to fp16
    error = (dequantised(got, scale, torch.float64) - x.double()).abs()
    assert (error <= step / 2 * (1 + 1e-6) + clipped).all()
    assert got[300].double().abs().max() == 0 and scale[300] > 0 and scale.isfinite().all()
    if codes == torch.int8:
        assert got[301, 1:].tolist() == (torch.arange(1, 24) * 0.5 - 5).round().tolist()
    heads = quantise(x[:300].view(10, 30, 24).transpose(0, 1), codes)  # any shape and strides
    assert torch.equal(heads[1], scale[:300].view(10, 30).T)


@TYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so(backend, codes, bad):
    q, k_new, v_new, arenas, tables = step_of([3], 1, 1, 16, torch.float32, codes)
    v_new[0, 0, 5] = bad
    out = ragged_decode_append(q, k_new, v_new, *arenas[:2], *tables, backend=backend, **scales_of(arenas))
    assert out.isnan().any() and not dequantised(*quantise(v_new, codes), torch.float32).isfinite().all()


def stored(k, v, start, length, codes):
    """Arenas (N, D) -> [k, v, k_scale, v_scale] in 8 bits, with hostile free slots."""
    (k, k_scale), (v, v_scale) = quantise(k, codes), quantise(v, codes)
    free = torch.ones(len(k), dtype=torch.bool, device=k.device)
    for a, n in zip(start.tolist(), length.tolist(), strict=True):
        free[a : a + n] = False
    for t, worst in ((k, 0x7F), (v, 0x7F)):  # int8: 127; e4m3: NaN
        t.view(torch.int8)[free] = worst
    k_scale[free] = v_scale[free] = float("nan")
    return [k, v, k_scale, v_scale]


def scales_of(arenas):
    return dict(zip(("k_scale", "v_scale"), arenas[2:], strict=True))


def step_of(lengths, hkv, group, d, dtype, codes, slack=3, seed=0):
    """q (B, Hq, D), k_new, v_new (B, Hkv, D), arenas, (kv_start, kv_len, kv_cap) of a decode step."""
    generator = torch_random(seed)
    length = torch.tensor(lengths, dtype=torch.int32, device="cpu")
    cap = length + slack
    start = cap.cumsum(0, dtype=torch.int32) - cap
    b = len(lengths) // hkv
    shapes = (b, hkv * group, d), (b, hkv, d), (b, hkv, d), (int(cap.sum()), d), (int(cap.sum()), d)
    q, k_new, v_new, k, v = (torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in shapes)
    q, k_new, v_new, k, v, *tables = on_device(q, k_new, v_new, k, v, start, length, cap)
    return q, k_new, v_new, stored(k, v, tables[0], tables[1], codes), tables


@TYPES
@FLOATS
def test_it_is_attention_over_the_dequantised_rows(backend, codes, dtype, monkeypatch):
    """The cases of test_ragged_decode.py: empty and full segments, any G, D no power of two, several rows."""
    for seed in range(40 if backend == "torch" else 10):
        monkeypatch.setattr(torch_way, "TILE", [2**19, 100][seed % 2])
        with torch.device("cpu"):
            made = case(seed, dtype)
        q, k, v, keep, k_arena, v_arena, start, length, cap = on_device(*made)
        k8, v8 = (dequantised(*quantise(t, codes), torch.float64) for t in (k, v))
        exact = dense(q.double(), k8, v8, keep)
        arenas = stored(k_arena, v_arena, start, length, codes)
        options = {"return_lse": True, **scales_of(arenas)}
        reference = ragged_decode_ref(q, *arenas[:2], start, length, **options)
        plan = decode_plan(start, cap, split=32) if seed % 3 else None
        got = ragged_decode(q, *arenas[:2], start, length, plan=plan, backend=backend, **options)
        assert got[0].dtype == dtype
        assert_attends(reference, [t.float() for t in reference], exact, length, f"reference, seed {seed}")
        assert_attends(got, reference, exact, length, f"seed {seed}")


@TYPES
@FLOATS
def test_a_step_stores_the_new_token_in_8_bits_and_attends_to_what_it_stored(backend, codes, dtype):
    """RoPE first, then quantisation. Some segments are full: they attend to the quantised token but store nothing."""
    rotates = backend == "torch" or dtype != torch.bfloat16 or not interpreted()  # the interpreter truncates to bf16
    for seed in range(24 if backend == "torch" else 9):
        rng = python_random(seed)
        hkv, group, d = rng.choice([1, 2, 3]), rng.choice([1, 3, 4, 7]), rng.choice([20, 32, 72])
        lengths = [rng.choice([0, 1, 5, 16, 33, 70]) for _ in range(hkv * rng.choice([1, 2]))]
        q, k_new, v_new, arenas, tables = step_of(lengths, hkv, group, d, dtype, codes, seed % 3, seed)
        rope = None
        if rotates and seed % 3:
            angles = torch.randn(len(q), 1, d // 2).repeat(1, 1, 2)
            rope = [angles.cos().to(dtype), angles.sin().to(dtype)]
        wanted, ours = ([t.clone() for t in arenas] for _ in "ab")
        options = {"return_lse": True, "rope": rope}
        plain = ragged_decode_append_ref(q, k_new, v_new, *wanted[:2], *tables, **options, **scales_of(wanted))
        plan = decode_plan(tables[0], tables[2], split=32)
        got = ragged_decode_append(
            q, k_new, v_new, *ours[:2], *tables, plan=plan, backend=backend, **options, **scales_of(ours)
        )
        for name, a, b in zip(("k", "v", "k_scale", "v_scale"), ours, wanted, strict=True):
            a, b = a.float(), b.float()
            # a GPU fuses multiplications and additions of the rotation, so that a code may be a neighbour
            off = 0 if rope is None or q.device.type == "cpu" else 0.13 * b.abs().nan_to_num() + 1
            assert_near(a.nan_to_num(-999), b.nan_to_num(-999), off, f"stored {name}, seed {seed}")
        rows = torch.cat([torch.arange(a, a + n) for a, n in zip(tables[0].tolist(), lengths, strict=True)])
        assert all(torch.equal(x[rows].float(), y[rows].float()) for x, y in zip(ours, arenas, strict=True))
        if q.device.type == "cpu" or rope is None:
            assert_attends(got, plain, exact_step(q, k_new, v_new, arenas, tables, rope), tables[1], f"seed {seed}")


def exact_step(q, k_new, v_new, arenas, tables, rope):
    """Out and lse in float64: dense attention over the dequantised old rows and the quantised new one of each segment.

    rope rotates q and k_new as in the model: in fp32, rounded to their dtype.
    """
    codes, hkv = arenas[0].dtype, k_new.shape[1]

    def turn(x):
        return x if rope is None else x * rope[0].to(x) + torch.cat(x.chunk(2, -1)[::-1], -1) * rope[1].to(x)

    compute = torch.promote_types(q.dtype, torch.float32)
    q = turn(q.to(compute)).to(q.dtype).double()
    new = [dequantised(*quantise(t, codes), torch.float64) for t in (turn(k_new.to(compute)).to(k_new.dtype), v_new)]
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape[:2], dtype=torch.float64)
    for s, (a, n) in enumerate(zip(tables[0].tolist(), tables[1].tolist(), strict=True)):
        b, h, group = s // hkv, s % hkv, q.shape[1] // hkv
        k, v = (
            torch.cat((dequantised(arenas[i][a : a + n], arenas[i + 2][a : a + n], torch.float64), new[i][b, h][None]))
            for i in (0, 1)
        )
        heads = slice(h * group, (h + 1) * group)
        scores = q.shape[2] ** -0.5 * q[b, heads] @ k.T
        out[b, heads], lse[b, heads] = scores.softmax(-1) @ v, scores.logsumexp(-1)
    return out, lse


def attended_in_fp16(q, arenas, lift):
    """What the Triton kernel computes on a GPU for fp16 q (G, D) over one segment: out (G, D), fp32.

    Tile by tile of 64 slots. Products of fp16 numbers are exact in fp32, in which they are summed, as by a tensor core.
    Only the weights, times V's scale and `lift`, are rounded to fp16.
    """
    k, v, k_scale, v_scale = (t.float() for t in arenas)
    m, total, acc = torch.full((len(q), 1), float("-inf")), torch.zeros(len(q), 1), torch.zeros(q.shape)
    for at in range(0, len(k), 64):
        tile = slice(at, at + 64)
        s = q.float() @ k[tile].T * q.shape[1] ** -0.5 * k_scale[tile]
        top = torch.maximum(m, s.amax(1, keepdim=True))
        p, fade = (s - top).exp(), (m - top).exp()
        total, m = total * fade + p.sum(1, keepdim=True), top
        acc = acc * fade + (p * (v_scale[tile] * lift)).half().float() @ v[tile]
    return acc / lift / total


@TYPES
def test_fp16_weights_times_a_scale_stay_in_range(codes):
    """On a GPU only: the interpreter computes in fp32. A scale of V must be below 1,000, as `ragged_decode` says."""
    lift = pytest.importorskip("kernels.ragged_decode_triton").LIFT.value
    generator, n, d = torch_random(6), 300, 64
    q = torch.randn(4, d, generator=generator).half()
    k, k_scale = quantise(2 * torch.randn(n, d, generator=generator), codes)
    rows, _ = quantise(torch.randn(n, d, generator=generator), codes)
    weights = (q.double() @ dequantised(k, k_scale, torch.float64).T * d**-0.5).softmax(1)
    for unit in (2.0**-18, 2.0**-12, 1.0, 999.0):
        v_scale = torch.full((n,), unit).half()
        v = dequantised(rows, v_scale, torch.float64)
        got = attended_in_fp16(q, (k, rows, k_scale, v_scale), lift)
        # half an ulp of each weight; 4 times as much where a weight times a scale is subnormal in fp16
        error = ((got - weights @ v).abs() / (weights @ v.abs())).max()
        assert error < 2**-11 * (4 if unit < 1e-5 else 1), f"scale {unit}: {error}"
    beyond = attended_in_fp16(q, (k, rows, k_scale, torch.full((n,), 1024.0).half()), lift)
    assert not beyond.isfinite().all()
    assert "v_scale must be below 1,000" in ragged_decode.__doc__


@TYPES
def test_the_error_of_8_bits_is_bounded(codes):
    """Against the exact rows. A score moves by at most d, so a weight by a factor of at most e^2d."""
    q, _, _, _, (start, length, _) = step_of([60, 9, 33, 1], 2, 4, 64, torch.float32, codes)
    k, v = torch.randn(2, int(start[-1] + length[-1]), 64, generator=torch_random(4))
    (k8, k_scale), (v8, v_scale) = quantise(k, codes), quantise(v, codes)
    out = ragged_decode(q, k8, v8, start, length, k_scale=k_scale, v_scale=v_scale)
    exact = ragged_decode_ref(q.double(), k.double(), v.double(), start, length)
    relative = {torch.int8: 0.6 / 127, torch.float8_e4m3fn: 2**-4}[codes]  # of a row's largest number; of each number
    d = 64**-0.5 * q.abs().sum(-1).max() * relative * k.abs().max()
    bound = (2 * d).expm1() * v.abs().max() + relative * v.abs().max()
    error = (out - exact).abs().max()
    assert 1e-4 < error < bound  # 1e-4: the rows were not passed on unquantised
    assert error < {torch.int8: 0.03, torch.float8_e4m3fn: 0.12}[codes]  # far below the bound, which is pessimistic


def test_the_torch_path_dequantises_in_tiles(monkeypatch):
    """Never more than TILE elements, or one segment."""
    monkeypatch.setattr(torch_way, "TILE", 3 * 40 * 16)
    most, plain = [], torch_way.dequantised

    def watched(codes, scale, dtype):
        most.append(codes.numel())
        return plain(codes, scale, dtype)

    monkeypatch.setattr(torch_way, "dequantised", watched)
    for lengths, largest in (([40] * 8, 3 * 40 * 16), ([5, 200, 7, 0], 200 * 16)):
        q, _, _, arenas, (start, length, _) = step_of(lengths, 4, 2, 16, torch.float32, torch.int8)
        most.clear()
        ragged_decode(q, *arenas[:2], start, length, **scales_of(arenas))
        assert max(most) == largest


SCALES = {"k_scale": torch.ones(40).half(), "v_scale": torch.ones(40).half()}
CODED = {"k": torch.zeros(40, 8, dtype=torch.int8), "v": torch.zeros(40, 8, dtype=torch.int8)}


@pytest.mark.parametrize("op, good", [(ragged_decode, GOOD), (ragged_decode_append, STEP)])
@pytest.mark.parametrize("change, word", [
    ({"k_scale": None}, "k_scale is no contiguous fp16"),
    ({"v_scale": SCALES["v_scale"].float()}, "v_scale is no"),
    ({"v_scale": SCALES["v_scale"][:39]}, "(40,)"),
    ({"k_scale": SCALES["k_scale"].to("meta")}, "on cpu"),
    ({"k_scale": torch.ones(80).half()[::2]}, "contiguous"),
    ({"k": torch.zeros(40, 8)}, "k is torch.float32"),
    ({"v": torch.zeros(40, 8).to(torch.float8_e4m3fn)}, "v is torch.float8_e4m3fn"),
    ({"k_scale": None, "v_scale": None}, "k is torch.int8 but q is torch.float32"),
    ({"v": torch.zeros(321, dtype=torch.int8)[1:].view(40, 8)}, "v begins at an odd byte"),
])  # fmt: skip
def test_scales_that_do_not_fit_are_refused(op, good, change, word):
    arguments = good | CODED | SCALES
    op(**arguments)
    with pytest.raises(ValueError) as wrong:
        op(**arguments | change)
    assert word in str(wrong.value) and "; " in str(wrong.value)


def test_an_odd_number_of_channels_may_begin_anywhere(backend):
    """Only pairs of codes need an even offset."""
    codes, scale = quantise(torch.randn(2, 12, 33), torch.int8)
    q, start, length = torch.randn(1, 4, 33), *torch.tensor([[0, 6], [5, 3]], dtype=torch.int32)
    views, scales = (codes[0, 1:], codes[1, 1:]), {"k_scale": scale[0, 1:], "v_scale": scale[1, 1:]}
    got = ragged_decode(q, *views, start, length, backend=backend, **scales)
    assert torch.allclose(got, ragged_decode_ref(q, *views, start, length, **scales), atol=1e-5)


def test_fp8_is_refused_where_a_gpu_has_none(monkeypatch):
    for capability, hip, runs in (
        ((8, 0), None, False),
        ((8, 9), None, True),
        ((9, 0), None, True),
        ((9, 4), "6", False),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        given = torch.device("cuda"), torch.float16
        assert choose_backend("auto", *given, stored=torch.float8_e4m3fn) == ("triton" if runs else "torch")
        assert choose_backend("triton", *given, stored=torch.int8) == "triton"
        if not runs:
            with pytest.raises(ValueError, match=r"no float8_e4m3fn .*; use int8 or 'torch'"):
                choose_backend("triton", *given, stored=torch.float8_e4m3fn)


@TYPES
def test_odd_rows_are_not_read_in_pairs(backend, codes):
    """Triton reads codes of V in pairs, unless a pair would lie across two rows."""
    for d in (33, 65):
        q, _, _, arenas, (start, length, _) = step_of([40, 7], 1, 2, d, torch.float32, codes)
        rows = (dequantised(arenas[i], arenas[i + 2], torch.float64) for i in (0, 1))
        exact = ragged_decode_ref(q.double(), *rows, start, length, return_lse=True)
        options = {"return_lse": True, **scales_of(arenas)}
        plain = ragged_decode_ref(q, *arenas[:2], start, length, **options)
        got = ragged_decode(q, *arenas[:2], start, length, backend=backend, **options)
        assert_attends(got, plain, exact, length, f"D {d}")
