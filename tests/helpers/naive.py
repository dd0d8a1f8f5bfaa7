"""METHODS 2 restated as plainly as possible, with nothing shared with the package."""

import math

import numpy as np


def peak(eigenvalues: list[float], bins: int = 100) -> float:
    """10 to the left edge of the first fullest of ``bins`` equal bins of log10 l."""
    logs = [math.log10(x) for x in eigenvalues]
    edges = np.linspace(min(logs), max(logs), bins + 1)
    counts = [0] * bins
    for x in logs:
        inside = [b for b in range(bins) if edges[b] <= x < edges[b + 1]]
        counts[inside[0] if inside else bins - 1] += 1
    return 10 ** edges[counts.index(max(counts))]


def tail(eigenvalues, i: int) -> tuple[float, float]:
    """(alpha_i, D_i) of the tail that starts at index i (from 0)."""
    values = np.asarray(eigenvalues[i:])
    n = len(values)
    spread = math.fsum(np.log(values)) - n * math.log(values[0])
    if spread <= 0:
        return math.inf, math.inf
    alpha = 1 + n / spread
    distance = np.abs(1 - (values / values[0]) ** (1 - alpha) - np.arange(n) / n).max()
    return alpha, float(distance)


def least_distance(eigenvalues: list[float], starts: list[int]) -> tuple[int, float, float]:
    """(i, alpha_i, D_i) of the first start with the least D."""
    tails = [(tail(eigenvalues, i)[1], i) for i in starts]
    best = min(tails, key=lambda pair: pair[0])[1]
    return best, *tail(eigenvalues, best)


def alpha(eigenvalues, estimator: str, bins: int = 100) -> float:
    """PL_Alpha_Hill by the table of METHODS 2."""
    values = [float(x) for x in eigenvalues]
    n = len(values)
    p = peak(values, bins)
    if estimator == "paper":
        k = min(sum(x > p for x in values), n - 1)
        return 1 + k / math.fsum(
            math.log(values[n - i] / values[n - k - 1]) for i in range(1, k + 1)
        )
    if estimator == "median":
        return tail(values, n // 2)[0]
    low = {"official": math.log10(0.95 * p), "band": 0.95 * p, "ks": -math.inf}[estimator]
    high = math.inf if estimator == "ks" else 1.5 * p
    starts = [i for i in range(n - 1) if low <= values[i] <= high]
    return least_distance(values, starts)[1]
