"""Keep an even grid of each picture, whatever it shows: the baseline for methods that use attention or pixels."""

from .budget import grid_phase, select, top


def grid_tokens(view, *, retention=0.5, keep_tokens=None, scope="image"):
    """A baseline: each head keeps evenly spaced tokens, with a different offset in each head.

    The order of the tokens is given by `budget.grid_phase`. Returns keep (Hkv, T) bool.
    """
    return select(-grid_phase(view), view, top(retention, keep_tokens), scope)
