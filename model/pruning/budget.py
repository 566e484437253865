"""How many vision tokens a head keeps, and which: the parts that methods are composed of.

    how many     budget     a fraction or a number of the n tokens: 1 .. n, half rounded up
                 by_head    the same for each head, from a table of fractions per layer or per layer and head
    which        best       in each head its own highest scores
                 shared     in all heads the same tokens
                 pooled     the heads share one budget, with a floor for each: their numbers differ
                 mass       in each head the fewest tokens that hold a share of its attention
    of what      select     each picture by itself, or all vision tokens together
                 cover      a share of each head's tokens on an even grid, whatever the scores say

Text is outside of all this: it stays. Every method here rounds and breaks ties in the same way, whatever its original
does, so that equal budgets are equal bytes.
"""

import math

import torch

SCOPES = ("image", "vision")
GROUPS = ("mean", "max")
QUERIES = ("last", "lookahead")  # whose attention ranks: the last prompt rows', or the look-ahead rows'

# Steps along rows and columns of the R2 sequence: the powers of 1 / 1.3247..., which solves x**3 = x + 1. And the
# golden ratio, for the shift from head to head.
DOWN, RIGHT, SHIFT = 0.5698402909980532, 0.7548776662466927, 0.6180339887498949


def budget(tokens, retention=1.0, keep_tokens=None):
    """Tokens to keep of `tokens`: keep_tokens if given, else the fraction retention, half rounded up.

    At least one and at most all.
    """
    wanted = math.floor(retention * tokens + 0.5) if keep_tokens is None else keep_tokens
    return max(1, min(wanted, tokens))


def by_head(rates, layer, heads, tokens):
    """Tokens to keep of `tokens` in each head, (heads, 1) integers.

    rates: for each layer a fraction, or a list of one per head.
    """
    row = rates[layer] if isinstance(rates[layer], list) else [rates[layer]] * heads
    return torch.tensor([[budget(tokens, rate)] for rate in row], device="cpu")


def best(scores, count):
    """scores (H, n) -> bool (H, n): the `count` highest of each row, ties to the lower index.

    count: a number, or integers (H, 1).
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    if isinstance(count, int):
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order[..., :count], True)
    taken = torch.arange(scores.shape[-1], device=scores.device) < count.to(scores.device)
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def shared(scores, count):
    """scores (H, n) -> bool (H, n): in every row the `count` best of the rows' mean."""
    return best(scores.mean(0, keepdim=True), count).expand(scores.shape)


def pooled(scores, count, floor):
    """scores (H, n) -> bool (H, n): the H * count best (row, token) pairs, at least int(floor * count) in each row.

    As AdaKV divides a budget (arXiv 2407.11550), its floor being the safeguard; one token in every row at the least.
    """
    safe = best(scores, max(1, int(floor * count)))
    everything = scores.masked_fill(safe, float("inf")).flatten()
    return best(everything[None], count * len(scores)).view_as(safe)


def check_floor(floor):
    """ValueError for a floor that `pooled` cannot keep."""
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is {floor}; give a number from 0 to 1")


def mass(scores, share):
    """scores (H, n) -> bool (H, n): the fewest of each row that hold `share` of its sum, and at least one."""
    ordered, order = scores.double().sort(dim=-1, descending=True, stable=True)  # in fp32 the sums would round
    before = ordered.cumsum(-1) - ordered  # what all better ones hold
    taken = before < share * ordered.sum(-1, keepdim=True)
    taken[..., 0] = True
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def grid_phase(layer, layout):
    """(Hkv, T) float64: the order of an even grid over each picture, another one in each head of each layer; low first.

    A token at row y and column x has the phase y * DOWN + x * RIGHT, plus SHIFT for each head before this one, modulo
    1. However many of the lowest are taken, they lie evenly in both directions.
    """
    phase = torch.zeros(layout.kv_heads, layout.tokens, dtype=torch.float64, device="cpu")
    heads = torch.arange(layout.kv_heads, device="cpu").double()[:, None] + layer * layout.kv_heads
    for i, (start, stop) in enumerate(layout.spans):
        rows, columns = layout.places[i].T if layout.places else (0, torch.arange(stop - start, device="cpu"))
        phase[:, start:stop] = (rows * DOWN + columns * RIGHT + heads * SHIFT) % 1
    return phase.to(layout.device)


def covered(scores, keep, phase, share):
    """As many tokens as `keep` has in each head, `share` of them on the grid and the others by scores.

    scores, phase (H, n), keep (H, n) bool -> bool (H, n).
    """
    count = keep.sum(1, keepdim=True)
    grid = best(-phase, (share * count).int())
    return best(scores.masked_fill(grid, float("inf")), count)


def select(scores, layout, choose, scope="image", cover=0.0, phase=None):
    """scores (Hkv, T) -> keep (Hkv, T): all text, and of the vision tokens what choose(scores (Hkv, n)) -> bool keeps.

    scope: "image" asks once for each picture, so that none can be starved by another; "vision" once for all of them.
    cover: this share of what each head keeps is the first of phase (Hkv, T), `grid_phase`, instead.
    phase is needed where cover is not 0.
    """
    keep = torch.ones(layout.kv_heads, layout.tokens, dtype=torch.bool, device=layout.device)
    for columns in _columns(layout, scope):
        chosen = choose(scores[:, columns])
        keep[:, columns] = covered(scores[:, columns], chosen, phase[:, columns], cover) if cover else chosen
    return keep


def _columns(layout, scope):
    """Indices into T of what is chosen among at once: a slice for each picture, or one tensor for all."""
    pictures = [slice(start, stop) for start, stop in layout.spans]
    if scope == "vision" and len(pictures) > 1:
        return [torch.cat([torch.arange(s.start, s.stop) for s in pictures]).to(layout.device)]
    return pictures


def by_kv_head(scores, layout, group="mean", values=False):
    """scores (Hq, T) of query heads -> (Hkv, T): the mean or the largest over those that read the same KV head.

    values: times the L1 norm of the token's value row, as VATP does (arXiv 2406.12335). What a head reads is attention
    times value, and heads park the attention that they have no use for on tokens whose values are next to nothing.
    """
    heads = scores.view(layout.kv_heads, -1, layout.tokens)  # (Hkv, G, T)
    heads = heads.mean(1) if group == "mean" else heads.amax(1)
    return heads * layout.norms if values else heads
