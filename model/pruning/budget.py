"""Building blocks for methods: how many vision tokens a head keeps, and which.

    where        at_depth   a layer in proportion to the depth of the model
    by what      ranking    attention, combined for the query heads that share a KV head
    how many     budget     from a fraction or a number of tokens: 1 to n tokens of n; half is rounded up
                 later      the fraction for the later layers, if the first ones keep everything
                 by_head    a budget per head, from a table of fractions per layer, or per layer and head
                 divided    a number of tokens, divided in proportion to weights
                 top        `budget` and a choice (default `best`), combined into one function of the scores
    which        best       each head keeps its own highest scores
                 pooled     the heads share one budget, with a minimum for each, so their lengths differ
                 mass       each head keeps the fewest tokens that hold a given share of its attention
    among        select     each picture separately, each of its parts, or all vision tokens together
                 covered    a share of each head's tokens lies on an even grid, independent of the scores

Text is always kept. All methods here round and break ties in the same way, even if the original implementation
differs, so that equal budgets mean equal bytes.
"""

import math

import torch

# Steps along rows and columns: those of the R2 sequence, which spreads points evenly over a square. They are powers of
# 1 / 1.3247..., where 1.3247... solves x**3 = x + 1. The shift from head to head is the golden ratio minus 1.
DOWN, RIGHT, SHIFT = 0.5698402909980532, 0.7548776662466927, 0.6180339887498949


def budget(tokens, retention=1.0, keep_tokens=None):
    """Number of tokens to keep of `tokens`: keep_tokens if given, else the fraction retention, half rounded up.

    It is at least 1 and at most `tokens`.
    """
    wanted = math.floor(retention * tokens + 0.5) if keep_tokens is None else keep_tokens
    return max(1, min(wanted, tokens))


def later(retention, layer, num_layers):
    """The fraction that each layer from `layer` on may keep (0 or more), so that with the earlier ones, which keep
    everything, the mean of all layers is retention."""
    return max(0.0, (retention * num_layers - layer) / (num_layers - layer))


def at_depth(layer, num_layers, of=32, first=1):
    """The layer of a model with num_layers that is as deep as `layer` in one with `of`: in proportion, half rounded up,
    from `first` to num_layers - 1."""
    return max(first, min(math.floor(layer * num_layers / of + 0.5), num_layers - 1))


def check_stages(stages, ratios):
    """ValueError unless the settings stages and ratios, lists or None, are ascending layers and falling fractions."""
    layers = all(type(layer) is int and layer > 0 for layer in stages or ())
    if stages and not (layers and stages == sorted({*stages})):
        raise ValueError(f"stages is {stages}; give whole numbers of 1 or more, in ascending order")
    fractions = all(type(ratio) in (int, float) and 0 < ratio <= 1 for ratio in ratios or ())
    if ratios and not (fractions and ratios == sorted(ratios, reverse=True)):
        raise ValueError(f"ratios is {ratios}; give numbers above 0 and up to 1, none above the one before it")


def check_depths(stages, num_layers, retention):
    """ValueError if the model has no such layer, or if everything before the first stage is more than the retention."""
    if max(stages, default=0) >= num_layers:
        raise ValueError(f"stages has layer {max(stages)}, the model has {num_layers}; give 1 to {num_layers - 1}")
    first = min(stages, default=num_layers)
    if retention is not None and retention < 1 and retention * num_layers <= first:
        raise ValueError(
            f"retention is {retention:g}, but the first {first} of {num_layers} layers keep everything; "
            f"give more than {first / num_layers:.4g}, or earlier stages"
        )


def by_head(rates, layer, heads, tokens):
    """Number of tokens to keep of `tokens` in each head, (heads, 1) int64 on the CPU.

    rates: for each layer a fraction from 0 to 1, or a list with one fraction per head.
    """
    row = rates[layer] if isinstance(rates[layer], list) else [rates[layer]] * heads
    return torch.tensor([[budget(tokens, rate)] for rate in row], device="cpu")


def divided(total, weights, room):
    """Divide `total` in proportion to whole weights, at most room[i] to part i: integers with the sum min(total, sum of
    room). What rounding and limits leave over goes one by one to the part furthest below its proportion, the first of
    equals."""
    whole = max(1, sum(weights))
    counts = [min(total * weight // whole, limit) for weight, limit in zip(weights, room, strict=True)]
    for _ in range(min(total, sum(room)) - sum(counts)):
        free = [i for i, limit in enumerate(room) if counts[i] < limit]
        counts[max(free, key=lambda i: total * weights[i] - counts[i] * whole)] += 1
    return counts


def best(scores, count):
    """scores (H, n) -> bool (H, n): the `count` highest of each row; of equal scores, the lower index first.

    count: an integer, or integers (H, 1).
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    if isinstance(count, int):
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order[..., :count], True)
    taken = torch.arange(scores.shape[-1], device=scores.device) < count.to(scores.device)
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def pooled(scores, count, floor):
    """scores (H, n) -> bool (H, n): the H * count best (row, token) pairs, with a minimum for each row.

    The minimum is int(floor * count), but at least 1; floor is from 0 to 1. AdaKV (arXiv 2407.11550), which divides a
    budget in this way, calls it the safeguard.
    """
    safe = best(scores, max(1, int(floor * count)))
    raised = scores.masked_fill(safe, float("inf")).flatten()
    return best(raised[None], count * len(scores)).view_as(safe)


def top(retention=1.0, keep_tokens=None, choose=best):
    """-> function scores (H, n) -> bool (H, n): choose(scores, count), where count is the `budget` of n."""
    return lambda scores: choose(scores, budget(scores.shape[1], retention, keep_tokens))


def check_fraction(name, value):
    """ValueError unless a setting is a number from 0 to 1."""
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; give a number from 0 to 1")


def mass(scores, share):
    """scores (H, n) -> bool (H, n): in each row the fewest tokens with `share` (0 to 1) of its sum, at least one."""
    ordered, order = scores.double().sort(dim=-1, descending=True, stable=True)  # fp32 sums would round
    before = ordered.cumsum(-1) - ordered  # sum of all higher scores
    taken = before < share * ordered.sum(-1, keepdim=True)
    taken[..., 0] = True
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def grid_phase(view):
    """(Hkv, T) float64: a phase per vision token; the tokens with the lowest phases form an even grid in each picture.

    A token at row y and column x has the phase y * DOWN + x * RIGHT + h * SHIFT, modulo 1, where h numbers all heads of
    all layers, so that every head has a different grid. For any n, the n lowest phases are evenly spaced.
    """
    phase = torch.zeros(view.kv_heads, view.tokens, dtype=torch.float64, device="cpu")
    heads = torch.arange(view.kv_heads, device="cpu").double()[:, None] + view.layer * view.kv_heads
    for (start, stop), places in zip(view.spans, view.places, strict=True):
        phase[:, start:stop] = (along_grid(places) + heads * SHIFT) % 1
    return phase.to(view.device)


def along_grid(places):
    """places (n, 2), rows and columns -> (n,) float64: y * DOWN + x * RIGHT; see `grid_phase`."""
    rows, columns = places.T
    return rows.double() * DOWN + columns.double() * RIGHT


def covered(scores, keep, phase, share):
    """Choose as many tokens as each head keeps, but `share` of them (rounded down) on the grid, the rest by scores.

    scores (H, n), keep (H, n) bool, phase (H, n) -> bool (H, n).
    """
    count = keep.sum(1, keepdim=True)
    grid = best(-phase, (share * count).int())
    return best(scores.masked_fill(grid, float("inf")), count)


def select(scores, view, choose, scope="image", cover=0.0):
    """scores (H, T) -> keep (H, T) bool: all text, and the vision tokens that choose(scores (H, n)) returns.

    H is Hkv, or 1 if all heads keep the same tokens; `expand` the result then. scope: "image" calls choose once per
    picture, so that every picture keeps its share; "part" once for each of the `parts`; "vision" once for all
    pictures. cover: this share of each head's
    tokens is chosen from an even grid (`grid_phase`) instead of by scores. ValueError if scores hold NaN.
    """
    check_scores(scores, view)
    keep = torch.ones(scores.shape, dtype=torch.bool, device=view.device)
    phase = grid_phase(view)[: len(scores)] if cover else None  # if H is 1, that of the first head
    spans = view.parts if scope == "part" else view.spans
    parts = [~view.text] if scope == "vision" and spans else [slice(*span) for span in spans]
    for part in parts:
        chosen = choose(scores[:, part])
        keep[:, part] = covered(scores[:, part], chosen, phase[:, part], cover) if cover else chosen
    return keep


def check_scores(scores, view):
    """ValueError if scores hold NaN."""
    if scores.isnan().any():
        raise ValueError(f"the scores of layer {view.layer} hold NaN, which has no rank; check for 0 / 0")


def ranking(view, rows=1, query="last", group="mean", values=False):
    """(Hkv, T) fp32: `view.attention(rows, query)`, its mean or maximum (group) over the query heads of each KV head.

    values: multiply by the L1 norm of each token's value vector, as in VATP (arXiv 2406.12335), because a head's output
    is attention times value, and surplus attention goes to tokens whose values are near zero.
    """
    heads = by_kv_head(view.attention(rows, query), view.kv_heads, group)
    return heads * view.value_norms() if values else heads


def by_kv_head(scores, kv_heads, group="mean"):
    """scores (Hq, T) -> (Hkv, T): the mean or maximum (group) over the query heads of each KV head."""
    heads = scores.unflatten(0, (kv_heads, -1))  # (Hkv, G, T)
    return heads.mean(1) if group == "mean" else heads.amax(1)
