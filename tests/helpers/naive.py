"""METHODS 2 restated as plainly as possible, with nothing shared with the package."""

import math

import numpy as np
from scipy.optimize import brentq


def peak(eigenvalues: list[float], bins: int = 100) -> float:
    """10 to the left edge of the first fullest of ``bins`` equal bins of log10 l."""
    logs = [math.log10(x) for x in eigenvalues]
    edges = np.linspace(min(logs), max(logs), bins + 1)
    counts = [0] * bins
    for x in logs:
        inside = [b for b in range(bins) if edges[b] <= x < edges[b + 1]]
        counts[inside[0] if inside else bins - 1] += 1
    return 10 ** edges[counts.index(max(counts))]


def kernel_peak(eigenvalues: list[float], h: float = 0.15) -> float:
    """10 to the mode of the Gaussian kernel density of log10 l; the lowest of equal modes."""
    x = np.log10(eigenvalues)

    def density(at: float) -> float:
        return float(np.exp(-0.5 * ((at - x) / h) ** 2).sum())

    def slope(at: float) -> float:
        return float(((x - at) * np.exp(-0.5 * ((at - x) / h) ** 2)).sum())

    grid = np.arange(x.min() - h / 7, x.max() + h / 7, h / 30)
    heights = [density(at) for at in grid]
    tops, highest = [], max(heights)
    for i in range(1, len(grid) - 1):
        if heights[i] >= max(heights[i - 1], heights[i + 1], 0.99 * highest):
            top = brentq(slope, grid[i - 1], grid[i + 1], xtol=1e-14)
            tops.append((density(top), top))
    return 10 ** min(top for height, top in tops if height >= (1 - 1e-9) * max(tops)[0])


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
    p = kernel_peak(values) if estimator.startswith("kde") else peak(values, bins)
    if estimator in ("paper", "kde"):
        bound = p * (1 + 1e-9) if estimator == "kde" else p
        k = min(sum(x > bound for x in values), n - 1)
        return 1 + k / math.fsum(
            math.log(values[n - i] / values[n - k - 1]) for i in range(1, k + 1)
        )
    if estimator == "median":
        return tail(values, n // 2)[0]
    low, high = 0.95 * p, 1.5 * p
    if estimator == "official":
        low = math.log10(0.95 * p)
    if estimator == "ks":
        low, high = -math.inf, math.inf
    starts = [i for i in range(n - 1) if low <= values[i] <= high]
    if estimator == "kde-mean":
        alphas = [tail(values, i)[0] for i in starts]
        logs = [math.log(a - 1) for a in alphas if a < math.inf]
        return 1 + math.exp(math.fsum(logs) / len(logs))
    return least_distance(values, starts)[1]
