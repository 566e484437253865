"""Views: the result of an operation depends on a tensor's values, not on its memory layout.

Each argument of each operation is replaced by views with the same values: slices of a larger tensor, with offsets,
steps, permuted dimensions or expanded rows. The surrounding memory holds values that would show in the result. The
result must equal that for plain copies, or a one-line ValueError rejects the view.
"""

import functools

import pytest
import torch

from kernels import (
    decode_plan,
    merge_states,
    ragged_decode,
    ragged_decode_append,
    ragged_pack,
    rotated,
    window_scores,
)
from kernels.ragged_decode_torch import rectangle_step
from model.cache import RaggedCache


def poison(shape, dtype):
    """Memory full of values that would show: NaN, very large numbers, True."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.full(shape, 2**30 + 7, dtype=dtype)


def shifted(x, by):
    """Dense, starting `by` elements into its storage, with as many after it."""
    room = poison((x.numel() + 2 * by,), x.dtype)
    return room[by : by + x.numel()].view(x.shape).copy_(x)


def second(x):
    """The second of a pair, as of `k, v = torch.randn(2, N, D)`."""
    pair = poison((2, *x.shape), x.dtype)
    return pair[1].copy_(x)


def inside(x, dim):
    """A slice of a tensor twice as large in a dimension, like q in a packed q, k, v."""
    size = list(x.shape)
    size[dim] *= 3
    return poison(size, x.dtype).narrow(dim, x.shape[dim], x.shape[dim]).copy_(x)


def stepping(x, dim):
    """Every second element of a larger dimension."""
    size = list(x.shape)
    size[dim] *= 2
    room = poison(size, x.dtype)
    return room[(slice(None),) * dim + (slice(1, None, 2),)].copy_(x)


def swapped(x, a, b):
    """Stored with two dimensions swapped."""
    return shifted(x.transpose(a, b), 3).transpose(a, b)


def views(x):
    """{description: a view with the values of x}. The first three are dense."""
    found = {"pair": second(x), "offset": shifted(x, 16), "odd offset": shifted(x, 5)}
    for dim in range(x.ndim):
        found |= {f"inside {dim}": inside(x, dim), f"steps {dim}": stepping(x, dim)}
        found |= {f"swapped {dim} {other}": swapped(x, dim, other) for other in range(dim)}
    return found


DENSE = ("pair", "offset", "odd offset")


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def decoded(planned, q, k, v, start, length, cap, backend):
    plan = decode_plan(start, cap) if planned else None
    return ragged_decode(q, k, v, start, length, plan=plan, return_lse=True, backend=backend)


def some_call(name):
    """(function of tensors and a backend, its tensors by name, those that must be dense) for each operation."""
    hkv, group, d = 2, 2, 16
    lengths = {"equal": (7, 7, 7, 7), "runs": (7, 7, 9, 9), "uneven": (7, 0, 9, 3)}
    of = lengths.get(name.split()[-1], lengths["uneven"])
    cap = ints(*(n + 2 for n in of))
    tables = {"start": cap.cumsum(0, dtype=torch.int32) - cap, "length": ints(*of), "cap": cap}
    k, v = (torch.randn(int(cap.sum()), d) for _ in "kv")
    for a, n in zip(tables["start"].tolist(), of, strict=True):
        k[a + n : a + n + 2] = v[a + n : a + n + 2] = float("nan")
    q = torch.randn(*((2, 3) if name.startswith("turn ") else (2,)), hkv * group, d)
    if name.startswith(("decode", "turn ")):
        return functools.partial(decoded, "plan" in name), {"q": q, "k": k, "v": v} | tables
    if name.startswith("append"):
        new = {n: torch.randn(2, hkv, d) for n in ("k_new", "v_new")}
        rope = {n: torch.randn(2, 1, d) for n in ("cos", "sin")} if "rope" in name else {}
        return appended, {"q": q} | new | {"k": k, "v": v} | tables | rope
    if name.startswith("scores"):
        of = {"q": torch.randn(4, 3, d), "k": torch.randn(2, 11, d), "q_pos": torch.tensor([2, 6, 10])}
        return functools.partial(scored, name.split()[-1]), of
    if name.startswith("pack"):
        keep = torch.ones(2, 11, dtype=torch.bool)
        keep[:, 1 : 4 if "equal" in name else 2] = "all" in name
        keep[0, 9] = "equal" in name or "all" in name
        return packed, {"k": torch.randn(2, 11, d), "v": torch.randn(2, 11, d), "keep": keep}
    if name == "merge":
        parts = {"out_a": torch.randn(2, 4, 16), "lse_a": torch.randn(2, 4)}
        return merged, parts | {"out_b": torch.randn(2, 4, 16), "lse_b": torch.randn(2, 4)}
    if name == "rotated":
        return rotated_by, {"x": torch.randn(2, 4, 16), "cos": torch.randn(2, 1, 16), "sin": torch.randn(2, 1, 16)}
    if name == "rectangle":
        arenas = torch.randn(2, 4, 6, 8)
        q, k_new, v_new = torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 8)
        return functools.partial(stepped, arenas), {"q": q, "k_new": k_new, "v_new": v_new}
    raise KeyError(name)


def appended(q, k_new, v_new, k, v, start, length, cap, cos=None, sin=None, *, backend):
    rope = None if cos is None else (cos, sin)
    out = ragged_decode_append(
        q, k_new, v_new, k, v, start, length, cap, return_lse=True, rope=rope, backend=backend
    )  # fmt: skip
    return *out, k, v


def scored(group, q, k, q_pos, backend):
    return [window_scores(q, k, q_pos=q_pos, group=group, backend=backend)]


def merged(out_a, lse_a, out_b, lse_b, backend):
    return merge_states(out_a, lse_a, out_b, lse_b)


def rotated_by(x, cos, sin, backend):
    return [rotated(x, (cos, sin))]


def stepped(arenas, q, k_new, v_new, backend):
    return [rectangle_step(q, k_new, v_new, second(arenas[0]), shifted(arenas[1], 5), ints(3, 6, 1, 5))]


def packed(k, v, keep, backend):
    """Contents of the occupied slots, and their places."""
    k_arena, v_arena, start, length, pos = ragged_pack(k, v, keep, slack=2, backend=backend)
    return k_arena[pos >= 0], v_arena[pos >= 0], start, length, pos


CALLS = [
    "decode equal", "decode runs", "decode uneven", "decode plan equal", "decode plan uneven", "turn equal",
    "turn uneven", "append equal", "append uneven", "append rope uneven", "scores none", "scores mean", "scores max",
    "pack equal", "pack all", "pack uneven",
]  # fmt: skip
PARTS = ["merge", "rotated", "rectangle"]  # without a Triton kernel of their own


def said(function, tensors, backend):
    """The result, or None if a one-line error rejects the call."""
    try:
        return function(**tensors, backend=backend)
    except ValueError as refused:
        assert "\n" not in str(refused) and ";" in str(refused), refused
        return None


def around(view):
    """A copy of a view's storage with the view's own elements set to 0."""
    whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()).clone()
    whole.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return whole


@pytest.mark.parametrize("name", [*CALLS, *PARTS])
def test_a_view_is_its_values(backend, name):
    """One argument at a time; in the slow interpreter, all of them together."""
    function, tensors = some_call(name)
    wanted = function(**{n: t.clone() for n, t in tensors.items()}, backend=backend)
    kinds = {n: list(views(t)) for n, t in tensors.items()}
    if backend == "triton":
        tried = [dict.fromkeys(tensors, kind) for kind in max(kinds.values(), key=len)]
    else:
        tried = [{n: kind} for n in tensors for kind in kinds[n]]
    refused = []
    for change in tried:
        given = {n: views(t).get(change.get(n), t.clone()) for n, t in tensors.items()}
        before = {n: around(t) for n, t in given.items()}
        got = said(function, given, backend)
        for n, t in given.items():
            assert torch.equal(around(t).nan_to_num(9.0), before[n].nan_to_num(9.0)), f"{change}: beside {n}"
        if got is None:
            refused.append(change)
            continue
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, equal_nan=True, msg=f"{name}, {change}")
    dense = [change for change in refused if set(change.values()) <= set(DENSE)]
    assert not dense, f"dense views are accepted everywhere, but not {dense}"


@pytest.mark.parametrize("name", CALLS)
def test_one_row_for_all_is_as_good_as_copies_of_it(backend, name):
    """Stride 0. An arena cannot be expanded: it is written to, or read by slot."""
    function, tensors = some_call(name)
    for n in sorted({"q", "k_new", "v_new", "keep", "cos", "sin"} & tensors.keys()):
        one = tensors | {n: tensors[n][:1].expand_as(tensors[n])}
        copies = {m: t.clone(memory_format=torch.contiguous_format) for m, t in one.items()}
        wanted = function(**copies, backend=backend)
        one = {m: t if m == n else t.clone() for m, t in one.items()}
        got = said(function, one, backend)
        for a, b in zip(wanted, got or wanted, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, equal_nan=True, msg=f"{name}, {n}")


def test_the_two_halves_of_one_tensor():
    """The README's call, with an arena that starts where another ends."""
    k, v = torch.randn(2, 12, 64)
    q, start, length = torch.randn(1, 6, 64), ints(0, 4, 8), ints(4, 4, 4)
    scores = torch.einsum("hgd,hnd->hgn", q.view(3, 2, 64), k.view(3, 4, 64)) / 8
    wanted = torch.einsum("hgn,hnd->hgd", scores.softmax(-1), v.view(3, 4, 64)).view(1, 6, 64)
    for plan in (None, decode_plan(start, length)):
        torch.testing.assert_close(ragged_decode(q, k, v, start, length, plan=plan), wanted)


def test_a_plan_keeps_its_own_tables():
    """After overwriting the tables that a plan was made from, a call raises an error or gives the same result."""
    table = torch.stack((ints(0, 4, 8), ints(4, 4, 4)))
    plan = decode_plan(*table)
    k, v, q = torch.randn(12, 8), torch.randn(12, 8), torch.randn(1, 3, 8)
    wanted = ragged_decode(q, k, v, plan.kv_start, ints(4, 4, 4), plan=plan)
    old, table[0] = table[0].clone(), ints(8, 4, 0)
    with pytest.raises(ValueError, match="starts"):
        ragged_decode(q, k, v, table[0], ints(4, 4, 4), plan=plan)
    assert torch.equal(ragged_decode(q, k, v, old, ints(4, 4, 4), plan=plan), wanted)


def test_a_new_token_may_lie_in_the_arena():
    """In free slots that are about to be filled; each of two tokens is stored in the slot that the other will fill."""
    q, k, v = torch.randn(1, 4, 16), *torch.randn(2, 8, 16)
    tables = ints(4, 0), ints(0, 3), ints(4, 4)
    for which in (0, 1):
        arenas = [k.clone(), v.clone()]
        new = [torch.randn(1, 2, 16), torch.randn(1, 2, 16)]
        new[which] = arenas[which][3:5].view(1, 2, 16)
        wanted = ragged_decode_append(q, *(t.clone() for t in new), k.clone(), v.clone(), *tables)
        torch.testing.assert_close(ragged_decode_append(q, *new, *arenas, *tables), wanted)


def test_a_cache_takes_keys_as_a_product_leaves_them(backend):
    """q, k and v side by side, with arenas that are views of a larger tensor."""
    side = torch.randn(2, 5, 8, 16)  # (B, T, Hq + 2 Hkv, D)
    k, v = (t.transpose(1, 2) for t in side.split((4, 2, 2), 2)[1:])
    keep = torch.rand(4, 5) < 0.7
    caches = [RaggedCache(1, 3, backend) for _ in "ab"]
    caches[0].pack(0, k, v, stepping(keep, 1))
    caches[1].pack(0, k.contiguous(), v.contiguous(), keep)
    caches[0].k[0], caches[0].v[0] = second(caches[0].k[0]), shifted(caches[0].v[0], 5)
    packed = torch.randn(2, 8, 16)
    q, k_new, v_new = packed.split((4, 2, 2), 1)
    results = []
    for cache, new in zip(caches, ((q, k_new, v_new), (q.clone(), k_new.clone(), v_new.clone())), strict=True):
        cache.grow()
        results.append(cache.append_attend(0, *new))
        for a, n in zip(cache.kv_start[0].tolist(), cache.kv_len[0].tolist(), strict=True):
            results.append(torch.cat((cache.k[0][a : a + n], cache.v[0][a : a + n])))
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_kept_or_refused(backend, name):
    """Triton's kernels have no gradients: they raise an error unless gradients are off."""
    function, tensors = some_call(name)
    for n in [n for n, t in tensors.items() if t.dtype.is_floating_point]:
        given = {m: t.clone().requires_grad_(m == n) for m, t in tensors.items()}
        if name.startswith("append"):  # an arena that is written to is not a leaf
            given[n] = given[n] * 1
        if backend == "triton":
            with pytest.raises(ValueError, match="no backward pass") as refused:
                function(**given, backend=backend)
            assert "\n" not in str(refused.value) and "; " in str(refused.value)
            continue
        got = function(**given, backend=backend)
        assert any(t.requires_grad for t in got), n
    with torch.no_grad():
        function(**given, backend=backend)
    with torch.inference_mode():
        function(**{m: t.clone() for m, t in tensors.items()}, backend=backend)


@pytest.mark.parametrize("name", CALLS)
def test_lazily_negated_views_are_values_or_refused(backend, name):
    """`x.conj().imag` holds the negated values in memory."""
    function, tensors = some_call(name)
    for n in [n for n, t in tensors.items() if t.dtype.is_floating_point]:
        given = {m: t.clone() for m, t in tensors.items()}
        given[n] = torch._neg_view(-given[n])  # with dense rows, unlike .imag
        assert given[n].is_neg()
        torch.testing.assert_close(given[n], tensors[n], rtol=0, atol=0, equal_nan=True)
        if backend == "triton":
            with pytest.raises(ValueError, match="resolve_neg"):
                function(**given, backend=backend)
        elif not name.startswith("append"):  # an arena that is written to must be plain memory
            got, plain = (function(**x, backend=backend) for x in (given, {m: t.clone() for m, t in tensors.items()}))
            for a, b in zip(got, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
