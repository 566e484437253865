"""How many tokens to keep, and which, from scores: what the methods share."""

import math

import torch


def budget(tokens, retention=1.0, keep_tokens=None):
    """Tokens to keep of a picture's `tokens`: keep_tokens if given, else the fraction retention, half rounded up.

    At least one and at most all.
    """
    wanted = math.floor(retention * tokens + 0.5) if keep_tokens is None else keep_tokens
    return max(1, min(wanted, tokens))


def best(scores, count):
    """scores (..., n) -> bool (..., n): the `count` highest along the last dimension, ties to the lower index."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order, True)
