"""The attention and the MLP of a prefill in which vision tokens and heads see only a part (the stage `attend`).

`looking` is what the method returned, see `model.pruning.yopo.Looking`. T tokens, of which those in `spans` are vision.
No tensor has Hq * T * T elements.
"""

import torch
import torch.nn.functional as F

ROWS = 128  # vision tokens that are processed together, with the neighbours of all of them
TEXT_ROWS = 512  # text tokens that are processed together, with a mask for all earlier tokens


def looking_attention(q, k, v, looking, spans, places, sides):
    """q (1, Hq, T, D), k and v (1, Hkv, T, D) -> (1, Hq, T, D).

    spans: [(start, stop)] of the pictures; places: row and column of each of their tokens, (n, 2) each; sides: for each
    picture the first row of the second square, the map of LLaVA-NeXT's tiles.
    """
    y, sees = torch.zeros_like(q), looking.heads.to(q.device)
    text = text_of(q.shape[2], spans, q.device)
    for heads in (sees, ~sees):
        if heads.any():
            asking = heads.repeat_interleave(q.shape[1] // k.shape[1])
            own = q[:, asking], k[:, heads], v[:, heads]
            if heads is not sees:
                y[:, asking] = _blind(*own, text, looking.renormalise)
            elif looking.radius is None:
                y[:, asking] = _attention(*own)
            else:
                cells = [_cells(*one, looking.radius).to(q.device) for one in zip(places, sides, strict=True)]
                y[:, asking] = _windowed(*own, text, spans, cells, looking.radius)
    return y


def looking_mlp(module, x, neurons, spans):
    """The MLP of x (1, T, C), where vision tokens use only the first neurons, this share of all -> like x."""
    y, text = torch.empty_like(x), text_of(x.shape[1], spans, x.device)
    first = int(neurons * module.gate_proj.out_features)
    y[:, text] = module(x[:, text])
    gate, up = (
        F.linear(x[:, ~text], part.weight[:first], None if part.bias is None else part.bias[:first])
        for part in (module.gate_proj, module.up_proj)
    )
    y[:, ~text] = F.linear(F.silu(gate) * up, module.down_proj.weight[:, :first], module.down_proj.bias)
    return y


def text_of(tokens, spans, device):
    """(T,) bool: True outside the spans."""
    text = torch.ones(tokens, dtype=torch.bool, device=device)
    for start, stop in spans:
        text[start:stop] = False
    return text


def _attention(q, k, v, mask=None):
    """Causal attention, or with a mask (rows, keys) bool."""
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)


def _blind(q, k, v, text, renormalise):
    """Text sees only text; the rows of vision tokens are 0."""
    if not renormalise:  # values of 0: the weights of vision tokens are in the sum that divides the others, and lost
        y = _attention(q, k, v * text[:, None])
        return y * text[:, None]
    at, y = text.nonzero()[:, 0], torch.zeros_like(q)
    y[:, :, at] = _attention(q[:, :, at], k[:, :, at], v[:, :, at])
    return y


def _windowed(q, k, v, text, spans, cells, radius):
    """Text sees all tokens before it; vision tokens see the text before them and their neighbours."""
    y, at = torch.empty_like(q), text.nonzero()[:, 0]
    for rows in at.split(TEXT_ROWS):
        stop = int(rows[-1]) + 1
        mask = torch.arange(stop, device=q.device) <= rows[:, None]
        y[:, :, rows] = _attention(q[:, :, rows], k[:, :, :stop], v[:, :, :stop], mask)
    for (start, stop), own in zip(spans, cells, strict=True):
        before = at[at < start]
        for rows in torch.arange(stop - start, device=q.device).split(ROWS):
            near = (own[rows, None] - own).abs().amax(2) <= radius  # (rows, n)
            seen = near.any(0).nonzero()[:, 0]
            keys, mask = torch.cat((before, start + seen)), F.pad(near[:, seen], (len(before), 0), value=True)
            y[:, :, start + rows] = _attention(q[:, :, start + rows], k[:, :, keys], v[:, :, keys], mask)
    return y


def _cells(places, side, radius):
    """places (n, 2) -> (n, 3): the third coordinate keeps the two squares further than radius apart."""
    second = (places[:, :1] >= side).long()
    return torch.cat((places, second * (radius + 1)), 1)
