"""Whether float32 eigenvalues of W^T W are good enough for a fit: how far each may be off, and
whether every spectrum that near has the same histogram peak.

Rounding mostly spreads over the whole matrix: an eigenvalue moves by u^T E u, where E's size goes
with ||W^T W||_F. Where a few columns or rows are very large, one eigenvalue or another takes up to
half of eps32 times the largest. So the bound is

    eps32 (NOISE r + TOP l_max + SELF l),    r = the root mean square of all eigenvalues.

It is a measured one: docs/PERFORMANCE.md says how much of it real and hard matrices use. It does
not hold for many equal eigenvalues, whose E is not spread; ``crowded`` finds those.
"""

from __future__ import annotations

import numpy as np

EPS32 = float(np.finfo(np.float32).eps)
NOISE, TOP, SELF = 12.0, 1.5, 32.0
LEAST = 8  # times its error that the least eigenvalue is, or the small ones mean too little
CLEAR = 1000  # times its error that an eigenvalue is which decides a fit
CROWD = 1 / 16  # of the eigenvalues that may lie within the error of one place
RANGE = 1e37  # most that all eigenvalues may sum to: float32's own end is 3e38
SMOOTH = 1e4  # times its error that the median is, where alpha is smooth in the eigenvalues


def float32_error(values: np.ndarray) -> np.ndarray:
    """Bound of the float32 route's error, an eigenvalue each."""
    everywhere = NOISE * np.sqrt(np.mean(values**2)) + TOP * values[-1]
    return EPS32 * (everywhere + SELF * np.abs(values))


def may_be_meaningful(diagonal: np.ndarray) -> bool:
    """Whether the diagonal of W^T W allows a least eigenvalue above LEAST times its error, and
    float32 has range for all of them.

    It is at most the diagonal's least, r is at least the diagonal's mean, and the largest
    eigenvalue its largest. They sum to the diagonal's sum.
    """
    diagonal = diagonal.astype(np.float64)
    everywhere = NOISE * diagonal.mean() + TOP * diagonal.max()
    floor = LEAST * EPS32 * everywhere
    return bool(diagonal.sum() < RANGE and diagonal.min() > floor > 1e-30)


def crowded(values: np.ndarray, error: np.ndarray) -> bool:
    """Whether so many eigenvalues agree within their errors that the errors are not bounded."""
    reach = np.searchsorted(values, values + 2 * error, side="right") - np.arange(len(values))
    return bool(reach.max() > max(2, CROWD * len(values)))


def peak_is_clear(values: np.ndarray, error: np.ndarray, bins: int) -> bool:
    """Whether the lower edge of the first fullest bin is far above the error there."""
    counts, edges = np.histogram(np.log(values), bins)
    peak = float(np.exp(edges[counts.argmax()]))
    return peak >= CLEAR * float(np.interp(peak, values, error))


def peak_is_certain(values: np.ndarray, error: np.ndarray, bins: int = 100) -> bool:
    """Whether every spectrum within ``error`` of this one has the same first fullest bin.

    Each eigenvalue is in one bin for sure, or in any of a range of bins. The peak is certain if
    its sure count is more than any earlier bin can have, and no less than any later one.
    """
    if len(values) < 3 or not values[0] > error[0]:
        return False
    low = np.log(np.maximum(values - error, values[0] - error[0]))  # none lies below the first
    high = np.log(values + error)
    # x = (v - a) / (b - a) falls with a and with b, for a <= v <= b, and rises with v
    first = np.floor((low - high[0]) / (high[-1] - high[0]) * bins)
    last = np.floor((high - low[0]) / (low[-1] - low[0]) * bins)
    first, last = (np.clip(x, 0, bins - 1).astype(int) for x in (first, last))
    last[0], first[-1] = 0, bins - 1  # the extremes are in the end bins, wherever those are
    sure = np.bincount(first[first == last], minlength=bins)
    unsure = first < last
    steps = np.bincount(first[unsure], minlength=bins + 1)
    steps -= np.bincount(last[unsure] + 1, minlength=bins + 1)
    most = sure + np.cumsum(steps)[:bins]
    top = int(sure.argmax())
    return bool((most[:top] < sure[top]).all() and (most[top + 1 :] <= sure[top]).all())


def band_error(values: np.ndarray) -> np.ndarray:
    """Bound of the error of a float32 band's eigenvalues: the singular values' is 2 eps32 s_max,
    which all real matrices keep to half but for their very least."""
    return 4 * EPS32 * np.sqrt(np.abs(values) * values[-1])


def is_smooth(values: np.ndarray, error: np.ndarray) -> bool:
    """Whether an alpha that is smooth in the eigenvalues is good to about 1 / SMOOTH."""
    middle = len(values) // 2
    return bool(values[middle] >= SMOOTH * error[middle])
