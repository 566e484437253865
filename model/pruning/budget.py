"""How many vision tokens a head keeps, and which: the parts that methods are composed of.

    how many     budget     a fraction or a number of the n tokens: 1 .. n, half rounded up
                 by_head    the same for each head, from a table of fractions per layer or per layer and head
    which        best       in each head its own highest scores
                 shared     in all heads the same tokens
                 pooled     the heads share one budget, with a floor for each: their numbers differ
                 mass       in each head the fewest tokens that hold a share of its attention
    of what      select     each picture by itself, or all vision tokens together

Text is outside of all this: it stays. Every method here rounds and breaks ties in the same way, whatever its original
does, so that equal budgets are equal bytes.
"""

import math

import torch

SCOPES = ("image", "vision")
GROUPS = ("mean", "max")


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
    return torch.tensor([[budget(tokens, rate)] for rate in row])


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
        raise ValueError(f"floor is {floor}; give a fraction from 0 to 1")


def mass(scores, share):
    """scores (H, n) -> bool (H, n): the fewest of each row that hold `share` of its sum, and at least one."""
    ordered, order = scores.double().sort(dim=-1, descending=True, stable=True)  # in fp32 the sums would round
    before = ordered.cumsum(-1) - ordered  # what all better ones hold
    taken = before < share * ordered.sum(-1, keepdim=True)
    taken[..., 0] = True
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def select(scores, layout, choose, scope="image"):
    """scores (Hkv, T) -> keep (Hkv, T): all text, and of the vision tokens what choose(scores (Hkv, n)) -> bool keeps.

    scope: "image" asks once for each picture, so that none can be starved by another; "vision" once for all of them.
    """
    keep = torch.ones(layout.kv_heads, layout.tokens, dtype=torch.bool, device=layout.device)
    if scope == "vision" and len(layout.spans) > 1:
        columns = torch.cat([torch.arange(start, stop) for start, stop in layout.spans]).to(layout.device)
        keep[:, columns] = choose(scores[:, columns])
        return keep
    for start, stop in layout.spans:
        keep[:, start:stop] = choose(scores[:, start:stop])
    return keep


def by_kv_head(scores, layout, group="mean", values=False):
    """scores (Hq, T) of query heads -> (Hkv, T): the mean or the largest over those that read the same KV head.

    values: times the L1 norm of the token's value row, as VATP does (arXiv 2406.12335). What a head reads is attention
    times value, and heads park the attention that they have no use for on tokens whose values are next to nothing.
    """
    heads = scores.view(layout.kv_heads, -1, layout.tokens)  # (Hkv, G, T)
    heads = heads.mean(1) if group == "mean" else heads.amax(1)
    return heads * layout.norms if values else heads
