"""Select the test cases that run without --all."""

from itertools import combinations


def pairs(case):
    """All pairs of (parameter, value) in a case {parameter: value}; a single parameter by itself."""
    return set(combinations(sorted(case.items()), min(2, len(case))))


def pairwise(cases):
    """Indices of cases, in order, that together cover every pair of values that occurs in any case."""
    missing = [pairs(case) for case in cases]
    chosen = []
    while any(missing):
        best = max(range(len(cases)), key=lambda i: len(missing[i]))
        chosen.append(best)
        found = missing[best]
        missing = [m - found for m in missing]
    return sorted(chosen)
