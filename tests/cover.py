"""Which cases of a test run when not all of them do."""

from itertools import combinations


def pairs(case):
    """Every two (parameter, value) of a case {parameter: value}; the only one where there is but one."""
    return set(combinations(sorted(case.items()), min(2, len(case))))


def pairwise(cases):
    """Indices of cases, in order, in which each pair of values that meets in any case meets in one of them."""
    missing = [pairs(case) for case in cases]
    chosen = []
    while any(missing):
        best = max(range(len(cases)), key=lambda i: len(missing[i]))
        chosen.append(best)
        found = missing[best]
        missing = [m - found for m in missing]
    return sorted(chosen)
