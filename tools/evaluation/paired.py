"""Statistics of paired answers: the same questions under several conditions."""

import functools
import math

import torch


@functools.cache
def resamples(groups, times=2000, seed=0):
    """Bootstrap weights (times, G) fp64: how often each group is drawn when G groups are drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(times, groups, dtype=torch.float64)
    for row in weights:
        row += torch.bincount(torch.randint(groups, (groups,), generator=generator), minlength=groups)
    return weights


def interval(values, group, weights, level=0.95):
    """Mean of values (n,) and its percentile bootstrap interval: (mean, low, high).

    group (n,): group index of each value. Whole groups are drawn, because questions about one picture are not
    independent. weights: from `resamples`.
    """
    sums = torch.zeros(2, weights.shape[1], dtype=torch.float64)
    sums[0].index_add_(0, group, values.double())
    sums[1].index_add_(0, group, torch.ones(len(values), dtype=torch.float64))
    drawn, count = weights @ sums[0], weights @ sums[1]
    means = (drawn / count)[count > 0].sort().values
    if not len(values) or not len(means):
        return math.nan, math.nan, math.nan
    edge = (1 - level) / 2
    low, high = (means[min(len(means) - 1, int(q * len(means)))].item() for q in (edge, 1 - edge))
    return values.double().mean().item(), low, high


def mcnemar(a, b):
    """Exact two-sided McNemar test of paired outcomes a, b (n,) bool: (only a right, only b right, p).

    p: probability of a split at least this uneven of the questions where a and b differ, if each were a coin toss.
    """
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n, fewer = only_a + only_b, min(only_a, only_b)
    log_choose = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(fewer + 1)]
    tail = sum(math.exp(c - n * math.log(2)) for c in log_choose)
    return only_a, only_b, min(1.0, 2 * tail)
