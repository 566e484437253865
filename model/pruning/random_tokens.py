"""Keep vision tokens at random: the floor that every method has to beat."""

import torch

from .budget import best, budget


def random_tokens(layer, scores, layout, *, retention=0.5, keep_tokens=None, pooled=False, seed=0):
    """Every KV head of every layer draws its own tokens of each picture; text stays.

    retention: fraction kept of each picture; keep_tokens: that many per head and picture instead; pooled: the heads
    of a layer share one budget, so that their numbers of tokens differ too. Returns keep (Hkv, T) bool.
    """
    number = (seed * layout.num_layers + layer) % 2**63
    generator = torch.Generator().manual_seed(number)  # on the CPU: the same on every device
    keep = torch.ones(layout.kv_heads, layout.tokens, dtype=torch.bool)
    for start, stop in layout.spans:
        count = budget(stop - start, retention, keep_tokens)
        draw = torch.rand(layout.kv_heads, stop - start, generator=generator)
        if pooled:
            keep[:, start:stop] = best(draw.flatten(), count * layout.kv_heads).view(draw.shape)
        else:
            keep[:, start:stop] = best(draw, count)
    return keep.to(layout.device)
