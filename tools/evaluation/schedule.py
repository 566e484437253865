"""How many vision tokens each layer needs: the search of G-Search, the shapes of P-Sigmoid (arXiv 2412.00556), and
their premise. Our reconstruction: neither code nor equations of the paper are public."""

import itertools

import torch

from kernels import window_scores
from model.pruning.gsearch import GSearch

STEPS = 32  # fractions that the search distinguishes
AGREE = 0.7  # Kendall's tau from which on two rankings count as alike; the value is a review's
LOWS, HIGHS, SLOPES = (0.0, 0.1, 0.2), (0.8, 1.0), (3.0, 10.0, 30.0)  # of the sigmoid


def search(loss, num_layers, tolerance, steps=STEPS):
    """The least fraction in each layer, greedily from shallow to deep: a list of multiples of 1 / steps, from 1 down.

    loss(schedule) is that of a list of L fractions. While layer l is searched, all later layers have its fraction,
    because dropped tokens do not return. Layer l of 1..L-1 may lose l / (L - 1) of the tolerance: if it could lose all,
    nothing would be left for later layers. By bisection, so at most (L - 1) * ceil(log2(steps)) schedules are tried;
    this finds the least fraction if the loss never grows with it.
    """
    found = [steps]
    for layer in range(1, num_layers):
        misses, holds = 0, found[-1]
        while holds - misses > 1:
            middle = (misses + holds) // 2
            tried = [count / steps for count in found + [middle] * (num_layers - layer)]
            if loss(tried) <= tolerance * layer / (num_layers - 1):
                holds = middle
            else:
                misses = middle
        found.append(holds)
    return [count / steps for count in found]


def shapes(num_layers, retention, queries):
    """Settings of `GSearch` with this retention: sigmoids of different shapes for each query, a flat one first.

    Shapes whose limits exclude the retention, and those that give the same fractions, are left out.
    """
    for query in queries:
        seen = []
        for slope, low, high in [(0.0, 0.0, 1.0), *itertools.product(SLOPES, LOWS, HIGHS)]:
            found = {"lo": low, "hi": high, "steepness": slope, "query": query}
            shares = [round(share, 3) for share in GSearch(**found, retention=retention).shares(num_layers)]
            if shares not in seen and (num_layers < 2 or low <= shares[-1] and shares[1] <= high):
                seen.append(shares)
                yield found


def kendall_tau(a, b):
    """Kendall's tau-b of two rankings, a float from -1 to 1: concordant minus discordant pairs, corrected for ties.

    a, b: scores (n,). 0 if all scores of one are equal.
    """
    a, b = (torch.sign(scores[:, None] - scores) for scores in (a.double(), b.double()))
    pairs = (a.abs().sum() * b.abs().sum()).sqrt()
    return ((a * b).sum() / pairs).item() if pairs else 0.0


def agreements(asked):
    """[tau of the layers l and l + 1]: how alike they rank each picture's tokens by the last row's attention."""
    rows = [window_scores(q[0, :, -1:], k[0], group="none").mean(0) for q, k, _, _ in asked.layers]  # (T,) each
    return [
        sum(kendall_tau(one[a:b], two[a:b]) for a, b in asked.spans) / len(asked.spans)
        for one, two in itertools.pairwise(rows)
    ]
