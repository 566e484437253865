"""ragged_pack: kept rows arrive in order, and nothing else is written."""

import functools

import pytest
import torch

from kernels import ragged_pack, ragged_pack_ref
from tests.oracle import assert_near
from tests.seeds import python_random


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reference", [False, True])
def test_kept_rows_arrive_in_order(backend, reference, dtype):
    op = ragged_pack_ref if reference else functools.partial(ragged_pack, backend=backend)
    rng = python_random(0)
    for _ in range(60):
        heads, tokens, d, slack = (rng.choice(x) for x in ((1, 2, 5), (1, 2, 31, 70), (4, 20, 64, 80, 128), (0, 1, 7)))
        k, v = torch.randn(tokens, heads, d).to(dtype), torch.randn(heads, tokens, d).to(dtype)
        k = k.transpose(0, 1)  # the layout that a prefill produces
        keep = torch.rand(heads, tokens) < rng.choice([0.0, 0.3, 0.9, 1.0])
        kept = keep.sum().item()
        k_arena, v_arena, start, length, pos = op(k, v, keep, slack=slack, total=rng.choice([None, kept]))
        assert k_arena.shape == v_arena.shape == (kept + heads * slack, d) and pos.shape == (len(k_arena),)
        assert start.dtype == length.dtype == pos.dtype == torch.int32 and start[0] == 0
        assert length.tolist() == keep.sum(1).tolist()
        assert start.diff().tolist() == (length[:-1] + slack).tolist()
        for h, (a, n) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
            what = f"head {h} of {heads}, {n} of {tokens} tokens kept, D {d}, slack {slack}"
            assert_near(pos[a : a + n], keep[h].nonzero()[:, 0], 0, f"pos of {what}")
            assert (pos[a + n : a + n + slack] == -1).all(), what
            for name, rows, source in (("k", k_arena, k), ("v", v_arena, v)):
                assert_near(rows[a : a + n], source[h, keep[h]], 0, f"{name} of {what}, (row, channel)")


def test_the_arenas_are_copies(backend):
    k, v = torch.ones(2, 2, 3, 4)
    k_arena, v_arena, *_ = ragged_pack(k, v, torch.ones(2, 3, dtype=torch.bool), slack=0, backend=backend)
    k.zero_(), v.zero_()
    assert (k_arena == 1).all() and (v_arena == 1).all()
    assert k_arena.untyped_storage().nbytes() == k_arena.nbytes  # not a view of a larger tensor


def test_nothing_is_written_behind_the_arenas(monkeypatch):
    """Not even with a `total` that is too small, which a GPU cannot detect."""
    way = pytest.importorskip("kernels.ragged_pack_triton", reason="triton has no wheel for this system")
    device, room, whole = "cuda" if torch.cuda.is_available() else "cpu", torch.Tensor.new_empty, []

    def larger(self, slots, *d, **how):
        if not d:  # a call of the interpreter
            return room(self, slots, **how)
        whole.append(room(self, slots + 50, *d).fill_(float("nan")))
        return whole[-1][:slots]

    monkeypatch.setattr(torch.Tensor, "new_empty", larger)
    k, v = torch.randn(2, 40, 20, device=device), torch.randn(2, 40, 20, device=device)
    k_arena, v_arena, *_ = way.pack(k, v, torch.ones(2, 40, dtype=torch.bool, device=device), 3, 70)
    assert len(k_arena) == 76 and not (k_arena[43:].isnan().any() or v_arena[43:].isnan().any())
    assert all(w[76:].isnan().all() for w in whole)


KEEP = torch.tensor([[True, False, True], [False, False, True]])
BAD = [
    ({"keep": KEEP[:, :2]}, "(2, 2)"),
    ({"keep": KEEP.int()}, "int32"),
    ({"v": torch.zeros(2, 4, 4)}, "(2, 4, 4)"),
    ({"v": torch.zeros(2, 3, 4).double()}, "float64"),
    ({"keep": KEEP.to("meta")}, "meta"),
    ({"k": torch.zeros(2, 4, 3).transpose(1, 2)}, "non-contiguous"),
    ({"k": torch.zeros(0, 3, 4), "v": torch.zeros(0, 3, 4), "keep": KEEP[:0]}, "(0, 3, 4)"),
    ({"slack": -1}, "-1"),
    ({"slack": 0.5}, "0.5"),
    ({"total": 4}, "3 rows"),
    ({"backend": "cuda"}, "'cuda'"),
]


@pytest.mark.parametrize(("change", "word"), BAD, ids=[word for _, word in BAD])
def test_bad_calls_are_refused_with_the_value(change, word):
    good = {"k": torch.zeros(2, 3, 4), "v": torch.zeros(2, 3, 4), "keep": KEEP, "slack": 1}
    with pytest.raises(ValueError) as refused:
        ragged_pack(**good | change)
    assert word in str(refused.value) and ";" in str(refused.value)
