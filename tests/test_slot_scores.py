"""add_scores and evict: what tokens attend to per slot, and which row moves where; on a CPU Triton's interpreter."""

import pytest
import torch

from kernels import (
    add_scores,
    add_scores_ref,
    decode_plan,
    evict,
    evict_ref,
    quantise,
    ragged_decode,
    rotated,
    slot_scores,
)
from kernels.quantise import dequantised
from tests.oracle import assert_near
from tests.seeds import torch_random

NAN = float("nan")


def problem(lengths, hkv, group, d, seed=0, slack=3, codes=None):
    """q, arenas (k, v, scales), score, token, kv_start, kv_len, pos, plan: NaN and -7 in every free slot."""
    generator, device = torch_random(seed), torch.get_default_device()
    length = torch.tensor(lengths, dtype=torch.int32)
    cap = length + slack
    start = cap.cumsum(0, dtype=torch.int32) - cap
    slots = int(cap.sum())
    k, v = torch.randn(2, slots, d, generator=generator, device="cpu").to(device).unbind()
    score = torch.rand(slots, generator=generator, device="cpu").to(device)
    token = torch.full((slots,), -7, dtype=torch.int32)
    free = torch.ones(slots, dtype=torch.bool)
    for a, n in zip(start.tolist(), lengths, strict=True):
        token[a : a + n] = torch.randperm(10 * n, generator=generator, device="cpu")[:n].to(device, torch.int32)
        free[a : a + n] = False
    score[free] = k[free] = v[free] = NAN
    (k, k_scale), (v, v_scale) = ((x, None) if codes is None else quantise(x, codes) for x in (k, v))
    q = torch.randn(len(lengths) // hkv, hkv * group, d, generator=generator, device="cpu").to(device)
    pos = torch.arange(len(q)) * 17 + 5000
    return q, (k, v, k_scale, v_scale), score, token, start, length, pos, decode_plan(start, cap, split=32)


def by_hand(q, k, score, start, length, rows=1):
    """The sums in float64: q (B, T, Hq, D) rotated, k in full precision."""
    sums, group = score.double(), q.shape[2] * len(q) // len(start)
    for s, (a, n) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
        b, h = divmod(s, len(start) // len(q))
        sums[a + n - rows : a + n] = 0
        for t in range(rows):
            seen = k[a : a + n - rows + 1 + t].double()
            for g in range(group):
                logits = seen @ q[b, t, h * group + g].double() * q.shape[-1] ** -0.5
                sums[a : a + len(seen)] += logits.softmax(0) / group
    return sums


CASES = [([5, 70, 33, 1], 2, 2, 32), ([100, 3], 1, 4, 64), ([64, 63, 1, 200], 2, 1, 128), ([40, 31], 2, 20, 16)]
CASES += [([70, 5], 2, 7, 64), ([33, 65], 1, 7, 128)]  # Qwen2's groups are no power of two


@pytest.mark.parametrize("codes", [None, torch.int8])
@pytest.mark.parametrize("case", CASES)
def test_scores_grow_by_the_mean_attention_of_the_group(backend, case, codes):
    q, (k, *_, k_scale, _), score, token, start, length, pos, plan = problem(*case, codes=codes)
    _, arenas, *_ = problem(*case, codes=codes)
    rope = torch.randn(2, len(q), 1, q.shape[2], generator=torch_random(1), device="cpu").to(q.device).unbind()
    turned, full = rotated(q, rope), dequantised(k, k_scale, torch.float64)
    exact = by_hand(turned[:, None], full, score, start, length)
    scales = {"k_scale": arenas[2], "v_scale": arenas[3]}
    _, lse = ragged_decode(turned, *arenas[:2], start, length, plan=plan, return_lse=True, backend=backend, **scales)
    ours, reference = ([score.clone(), token.clone()] for _ in "ab")
    add_scores(q, k, *ours, length, pos, plan, backend, lse=lse, rope=rope, k_scale=k_scale)
    add_scores_ref(q, k, *reference, start, length, pos, rope=rope, k_scale=k_scale)
    free = score.isnan()
    newest = (start + length - 1).long()
    for sums, places in (ours, reference):
        assert torch.equal(sums.isnan(), free)
        assert_near(sums[~free], exact[~free], 1e-6 + 1e-5 * exact[~free])
        wanted = token.index_copy(0, newest, (pos - 1).repeat_interleave(len(start) // len(q)).int())
        assert torch.equal(places, wanted)


@pytest.mark.parametrize("stored", [2**24, 200])
def test_each_of_several_tokens_sees_the_segment_up_to_itself(stored, monkeypatch):
    """Also in blocks of few rows."""
    monkeypatch.setattr(slot_scores, "ROWS", stored)
    _, (k, *_), score, token, start, length, pos, plan = problem([9, 70, 33, 6], 2, 2, 16)
    q = torch.randn(2, 5, 4, 16, generator=torch_random(3))
    exact, free = by_hand(q, k, score, start, length, 5), score.isnan()
    reference = score.clone()
    add_scores_ref(q, k, reference, token.clone(), start, length, pos)
    add_scores(q, k, score, token, length, pos, plan, "torch")
    for sums in (score, reference):
        assert torch.equal(sums.isnan(), free)
        assert_near(sums[~free], exact[~free], 1e-6 + 1e-5 * exact[~free])
    for s, (a, n) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
        assert token[a + n - 5 : a + n].tolist() == list(range(int(pos[s // 2]) - 5, int(pos[s // 2])))


@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("seed", range(4))
def test_the_lowest_score_goes_and_the_last_row_takes_its_slot(backend, seed, codes):
    """With equal scores, newest and protected tokens, segments below their limit, and some without a victim."""
    _, arenas, score, token, start, length, _, plan = problem([5, 700, 33, 1, 64, 9], 2, 1, 16, seed, codes=codes)
    taken = ~score.isnan()
    score[::3], score[1::7] = 0.25, float("inf")
    score[~taken] = NAN
    score[start[5] : start[5] + 9] = float("inf")
    limit = length - torch.tensor([0, 1, -1, 0, 0, 0], dtype=torch.int32)
    before = torch.tensor([30, 3000, 1000, 1000, 100 * seed, 1000], dtype=torch.int32)
    wanted = [None if t is None else t.clone() for t in (*arenas, score, token)]
    fewer = length.clone()
    evict_ref(wanted[:4], *wanted[4:], start, fewer, limit, before)
    evict(arenas, score, token, length, limit, before, plan, backend)
    assert torch.equal(length, fewer) and 0 < (fewer < plan.kv_cap - 3).sum() < 6
    for got, want in zip((*arenas, score, token), wanted, strict=True):
        if got is not None:
            got, want = (t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t for t in (got, want))
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_of_equal_scores_the_earlier_token_stays(backend):
    """As in a choice after the prompt, which prefers lower indices; wherever the tokens lie."""
    _, arenas, score, token, _, length, _, plan = problem([4], 1, 1, 16)
    score[:4] = torch.tensor([0.5, 0.2, 0.2, 0.2])
    token[:4] = torch.tensor([3, 7, 9, 8], dtype=torch.int32)
    evict(arenas, score, token, length, length.clone(), torch.tensor([100], dtype=torch.int32), plan, backend)
    assert token[:3].tolist() == [3, 7, 8] and length.tolist() == [3]


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_segment_is_scored_alike_whatever_its_neighbours(backend):
    q, (k, *_), score, token, start, length, pos, plan = problem([70, 33, 40, 9], 2, 2, 32)
    _, lse = ragged_decode(q, k, k, start, length, plan=plan, return_lse=True, backend=backend)
    alone = score.clone()
    first = decode_plan(start[:2], plan.kv_cap[:2], split=32)
    add_scores(q[:1], k, alone, token.clone(), length[:2], pos[:1], first, backend, lse=lse[:1])
    add_scores(q, k, score, token, length, pos, plan, backend, lse=lse)
    end = int(start[2])
    torch.testing.assert_close(alone[:end], score[:end], rtol=0, atol=0, equal_nan=True)
