"""The attention and the MLP of a prefill in which vision tokens and heads see only a part (the stage `attend`).

`looking` is what the method returned, see `model.pruning.yopo.Looking`. T tokens, of which those in `spans` are vision.
No tensor has Hq * T * T elements. Indices are made on the CPU, so that a device does not wait for them.
"""

import torch
import torch.nn.functional as F

from .llama import dense_attention

ROWS = 128  # vision tokens that are processed together, with the neighbours of all of them
TEXT_ROWS = 512  # text tokens that are processed together, with a mask for all earlier tokens


def looking_attention(q, k, v, looking, spans, places, sides):
    """q (1, Hq, T, D), k and v (1, Hkv, T, D) -> (1, Hq, T, D).

    spans: [(start, stop)] of the pictures; places: row and column of each of their tokens, (n, 2) each, on the CPU;
    sides: for each picture the first row of its second part, the map of its tiles; None if it has none.
    """
    y, sees, group = torch.empty_like(q), looking.heads.cpu(), q.shape[1] // k.shape[1]
    for heads, seeing in ((sees, True), (~sees, False)):
        if not heads.any():
            continue
        own, asking = (index.nonzero()[:, 0].to(q.device) for index in (heads, heads.repeat_interleave(group)))
        rows = q[:, asking], k[:, own], v[:, own]
        if not seeing:
            y[:, asking] = _blind(*rows, spans, looking.renormalise)
        elif looking.radius is None:
            y[:, asking] = dense_attention(*rows)
        else:
            cells = [_cells(*one, looking.radius) for one in zip(places, sides, strict=True)]
            y[:, asking] = _windowed(*rows, spans, cells, looking.radius)
    return y


def looking_mlp(module, x, neurons, spans):
    """The MLP of x (1, T, C), where vision tokens use only the first neurons, this share of all -> like x."""
    y, (text, vision) = torch.empty_like(x), (at.to(x.device) for at in _parts(x.shape[1], spans))
    first = int(neurons * module.gate_proj.out_features)
    y[:, text] = module(x[:, text])
    gate, up = (
        F.linear(x[:, vision], part.weight[:first], None if part.bias is None else part.bias[:first])
        for part in (module.gate_proj, module.up_proj)
    )
    y[:, vision] = F.linear(F.silu(gate) * up, module.down_proj.weight[:, :first], module.down_proj.bias)
    return y


def _parts(tokens, spans):
    """Indices of the text and of the vision tokens, on the CPU."""
    text = torch.ones(tokens, dtype=torch.bool, device="cpu")
    for start, stop in spans:
        text[start:stop] = False
    return text.nonzero()[:, 0], (~text).nonzero()[:, 0]


def _blind(q, k, v, spans, renormalise):
    """Text sees only text; the rows of vision tokens are 0."""
    text, vision = (at.to(q.device) for at in _parts(q.shape[2], spans))
    if not renormalise:  # values of 0: vision tokens have their share of the weights, which is lost
        y = dense_attention(q, k, v.index_fill(2, vision, 0.0))
        return y.index_fill_(2, vision, 0.0)
    seen = dense_attention(q[:, :, text], k[:, :, text], v[:, :, text])
    return torch.zeros_like(q).index_copy_(2, text, seen)


def _windowed(q, k, v, spans, cells, radius):
    """Text sees all tokens before it; vision tokens see the text before them and their neighbours."""
    y, text = torch.empty_like(q), _parts(q.shape[2], spans)[0]

    def fill(rows, keys, mask):
        rows, keys, mask = (index.to(q.device) for index in (rows, keys, mask))
        y[:, :, rows] = dense_attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask)

    for rows in text.split(TEXT_ROWS):
        keys = torch.arange(int(rows[-1]) + 1, device="cpu")
        fill(rows, keys, keys <= rows[:, None])
    for (start, stop), own in zip(spans, cells, strict=True):
        before = text[text < start]
        for rows in torch.arange(stop - start, device="cpu").split(ROWS):
            near = (own[rows, None] - own).abs().amax(2) <= radius  # (rows, n)
            seen = near.any(0).nonzero()[:, 0]
            fill(start + rows, torch.cat((before, start + seen)), F.pad(near[:, seen], (len(before), 0), value=True))
    return y


def _cells(places, side, radius):
    """places (n, 2) -> (n, 3): the third coordinate keeps the two parts further than radius apart."""
    if side is None:
        return places  # one part
    second = (places[:, :1] >= side).long()
    return torch.cat((places, second * (radius + 1)), 1)
