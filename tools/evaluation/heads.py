"""YOPO's table: how much each head looks at pictures, from samples of `tools/calibrate.py`."""

import torch

from kernels import window_scores

WON = 0.4  # an active head wins more than this share of the samples


def ratios(asked):
    """(L, Hq) float64: attention to the pictures divided by attention to the prompt's text, of one `Asked`.

    Both are summed over the rows that read the pruned cache or come right before: the text after the last picture, and
    the answer's tokens, whose attention to each other is left out.
    """
    vision = torch.zeros(asked.tokens, dtype=torch.bool, device=asked.x.device)
    for start, stop in asked.spans:
        vision[start:stop] = True
    found = []
    for q, k, _, fed in asked.layers:
        end = torch.full((fed.shape[2],), asked.tokens - 1, device=k.device)
        mass = q.shape[2] * window_scores(q[0], k[0], group="none").double()
        if len(end):
            mass += len(end) * window_scores(fed[0], k[0], q_pos=end, group="none")
        found.append(mass[:, vision].sum(1) / mass[:, ~vision].sum(1))
    return torch.stack(found)


def table_of(found):
    """(N, L, Hq) ratios of N samples -> (L, Hq): the ratio that a head exceeds or reaches in more than WON of them.

    So a head wins the vote "ratio > threshold" exactly if its entry is above the threshold.
    """
    return found.sort(0, descending=True).values[int(WON * len(found))]


def threshold_of(table, kv_heads, skip, retention):
    """The threshold with which the fraction of active KV heads, the first `skip` layers included, is closest to
    retention; in the middle between two entries."""
    looks = table.unflatten(1, (kv_heads, -1)).amax(2)
    free = looks[skip:].flatten().sort(descending=True).values.tolist()
    count = max(0, min(len(free), round(retention * looks.numel()) - skip * kv_heads))
    above, below = ([2 * free[0], *free][count], [*free, 0.0][count])
    return (above + below) / 2
