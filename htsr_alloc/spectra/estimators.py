"""PL_Alpha_Hill: the power-law exponent of a spectrum's tail, by rules for where it starts.

With eigenvalues l_1 <= ... <= l_N, a tail that starts at i has n_i = N - i + 1 values and

    alpha_i = 1 + n_i / (sum_{j>=i} ln l_j - n_i ln l_i)                     (Hill)
    D_i     = max_{j>=i} | 1 - (l_j / l_i)^(1 - alpha_i) - (j - i) / n_i |   (KS distance)

The peak p of the histogram of log10 l in ``bins`` equal bins over [min, max] is 10 to the left
edge of its first fullest bin. The kernel peak q is 10 to the mode of a Gaussian kernel density of
log10 l with a bandwidth in decades. numpy only, no loop over eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import FAILED, MARKED, OK
from htsr_alloc.spectra.density import mode

FEW = 50  # a fit to fewer eigenvalues is marked (METHODS 2)
PROBES = 16  # values at which a start's distance is bounded first
FIRST = 8  # starts computed in full at once; then twice as many each time, up to CHUNK
CHUNK = 1 << 17  # elements of the starts x eigenvalues array made at a time (1 MiB)
BANDWIDTH = 0.15  # decades; docs/ESTIMATORS.md says why
NARROWEST = 0.01  # decades: narrower, a kernel density shows single eigenvalues
EPS64 = float(np.finfo(np.float64).eps)
AT_PEAK = 1e-9  # relative: an eigenvalue this near the kernel peak is at it, not above it


@dataclass(frozen=True)
class Fit:
    """A fitted tail. On status ``failed`` every number is None and ``reason`` says why.

    Attributes:
        alpha: PL_Alpha_Hill.
        xmin: the eigenvalue at which the tail starts.
        k: the number of eigenvalues in the tail (for ``paper`` and ``kde``, those above xmin; for
            ``kde-mean``, those of the middle start).
        ks_distance: D of the tail.
        peak_gap: count of the fullest bin less that of the second; 0 is a tie, which the first
            bin wins. A rounding error that moves one eigenvalue can move the peak then.
        status: ``ok``, ``marked`` (the number stands, ``reason`` warns) or ``failed``.
    """

    alpha: float | None
    xmin: float | None
    k: int | None
    ks_distance: float | None
    peak_gap: int | None
    status: str
    reason: str | None


@dataclass(frozen=True)
class _Tails:
    """What the rules need of a spectrum: ascending values, their logs, each alpha_i."""

    values: np.ndarray
    logs: np.ndarray
    alphas: np.ndarray  # alphas[i] of the tail values[i:]; inf where it has no spread
    peak: float  # of the histogram
    bandwidth: float  # of the kernel density, in decades

    def kernel_peak(self) -> float:
        return 10.0 ** mode(np.log10(self.values), self.bandwidth)


@dataclass(frozen=True)
class _Tail:
    """xmin = values[start]; the tail is values[first:]; alpha where it is not Hill's of those."""

    start: int
    first: int
    alpha: float | None = None


@dataclass(frozen=True)
class Estimator:
    """A rule for the start of the tail, and whether alpha is smooth in the eigenvalues: no
    histogram's peak decides, so that their rounding to float32 moves alpha by 1e-4 at most."""

    rule: Callable[[_Tails], _Tail | None]
    smooth: bool = False


def fit(
    eigenvalues: np.ndarray,
    estimator: str = "official",
    bins: int = 100,
    bandwidth: float = BANDWIDTH,
) -> Fit:
    """Fit the tail of a spectrum.

    Args:
        eigenvalues: (N,) positive, ascending, float64.
        estimator: a key of ``ESTIMATORS``:

            * official: the start with the least D among log10(0.95 p) <= l_i <= 1.5 p, the
              last eigenvalue excepted. AlphaLoRA's released script, AlphaPruning's
              ``alpha_peak``; the log10 on one side only is theirs, and WeightWatcher's
              (``xmin_peak``).
            * paper: AlphaLoRA eq. 5, "Fix-finger": l_min is the largest eigenvalue not above
              the peak, k the number above it (at most N - 1).
            * band: ``official`` with the bound it meant, 0.95 p <= l_i <= 1.5 p.
            * median: the start is i = floor(N / 2), counted from 0 (TempBalance, FARMS).
            * ks: the start with the least D of all but the last (Clauset, Shalizi and Newman;
              the default of WeightWatcher and ``powerlaw``).
            * kde: ``paper`` with the kernel peak q in place of p.
            * kde-band: ``band`` with q in place of p.
            * kde-mean: ln(alpha - 1) is its mean over all starts in 0.95 q <= l_i <= 1.5 q, the
              last eigenvalue excepted. No search, so that it is smooth in the eigenvalues.
        bins: of the histogram that gives p.
        bandwidth: of the kernel density that gives q, in decades.

    Raises:
        HtsrError: unknown estimator, bins < 1, bandwidth < 0.01.
    """
    if estimator not in ESTIMATORS:
        raise HtsrError(
            f"There is no estimator {estimator!r}.", f"Choose from {', '.join(ESTIMATORS)}."
        )
    if bins < 1:
        raise HtsrError(f"A histogram needs at least one bin, not {bins}.")
    if not bandwidth >= NARROWEST:
        raise HtsrError(f"The bandwidth must be at least {NARROWEST} decades, not {bandwidth}.")
    values = np.asarray(eigenvalues, dtype=np.float64)
    n = len(values)
    if n < 3:
        return _failed(f"only {n} eigenvalues (a tail needs 3)")
    if not (np.isfinite(values[-1]) and values[0] > 0):
        return _failed("eigenvalues are not positive and finite")
    if values[0] == values[-1]:
        return _failed("all eigenvalues are equal")
    if values[-1] - values[0] <= n * EPS64 * values[-1]:  # what an engine's error can make of it
        return _failed("all eigenvalues are equal within the rounding of float64")
    logs = np.log(values)
    counts, edges = _histogram(np.log10(values), bins)
    top = int(counts.argmax())
    peak = float(10.0 ** edges[top])
    gap = int(counts[top] - np.delete(counts, top).max()) if bins > 1 else n
    tail = ESTIMATORS[estimator].rule(_Tails(values, logs, _hill(logs), peak, bandwidth))
    if tail is None:
        return _failed(f"no eigenvalue qualifies as {estimator}'s start of the tail")
    above = logs[tail.first :] - logs[tail.start]
    k = n - tail.first
    if not above.sum() > 0:
        return _failed("the tail's eigenvalues are all equal")
    alpha = tail.alpha or 1 + k / float(above.sum())
    distance = float(np.abs(1 - np.exp((1 - alpha) * above) - np.arange(k) / k).max())
    reason = f"only {n} eigenvalues (< {FEW})" if n < FEW else None
    status = MARKED if reason else OK
    return Fit(alpha, float(values[tail.start]), k, distance, gap, status, reason)


def alpha_hat(alpha: float, lambda_max: float) -> float:
    """Alpha_Hat = alpha log10 lambda_max (AlphaLoRA eq. 11; base 10 as in its code family)."""
    return alpha * float(np.log10(lambda_max))


def stable_rank(eigenvalues: np.ndarray) -> float:
    """||W||_F^2 / ||W||_2^2 = sum(l) / l_N of ascending eigenvalues."""
    return float((eigenvalues / eigenvalues[-1]).sum())


def _failed(reason: str) -> Fit:
    return Fit(None, None, None, None, None, FAILED, reason)


def _histogram(x: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """``np.histogram(x, bins)`` of ascending x, by a search for each edge: a tenth of its time."""
    edges = np.linspace(x[0], x[-1], bins + 1)
    below = np.searchsorted(x, edges[:-1])
    return np.diff(below, append=len(x)), edges


def _hill(logs: np.ndarray) -> np.ndarray:
    """alpha_i of every tail logs[i:]. (N,) -> (N,)"""
    n = np.arange(len(logs), 0, -1)
    # Distances from the top, not the logs, are summed: the two terms then cancel less.
    below = logs[-1] - logs
    spread = n * below - np.cumsum(below[::-1])[::-1]
    with np.errstate(divide="ignore"):
        return np.where(spread > 0, 1 + n / np.where(spread > 0, spread, 1), np.inf)


def _deviations(tails: _Tails, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """| model - empirical | of D_i at j, where j >= i; 0 where j < i. Broadcasts i with j."""
    total = len(tails.logs)
    ratio = np.maximum(tails.logs[j] - tails.logs[i], 0)
    found = np.abs(1 - np.exp((1 - tails.alphas[i]) * ratio) - (j - i) / (total - i))
    return np.where(j >= i, found, 0)


def _best(tails: _Tails, allowed: np.ndarray) -> _Tail | None:
    """The first start with the least D among the allowed ones, the last value excepted.

    Deviations at a few j bound D_i from below, which rules most starts out: the rest, in the
    order of their bounds, are computed in full until no bound is left below the best.
    """
    starts = np.flatnonzero(allowed[:-1] & np.isfinite(tails.alphas[:-1]))
    if not len(starts):
        return None
    total = len(tails.logs)
    probes = starts[:, None] + (total - 1 - starts[:, None]) * np.arange(PROBES) // (PROBES - 1)
    bounds = _deviations(tails, starts[:, None], probes).max(axis=1)
    order = np.argsort(bounds, kind="stable")
    least, best, at, step = np.inf, -1, 0, FIRST
    while at < len(order):
        part = order[at : at + step]
        at, step = at + len(part), max(1, min(2 * step, CHUNK // total))
        if bounds[part[0]] > least * (1 + 1e-9):  # more than exp's rounding can hide
            break
        j = np.arange(int(starts[part].min()), total)[None, :]
        full = _deviations(tails, starts[part][:, None], j).max(axis=1)
        nearest = full.min()
        first = int(starts[part][full == nearest].min())
        if nearest < least or (nearest == least and first < best):
            least, best = nearest, first
    return _Tail(best, best)


def _between(tails: _Tails, peak: float) -> np.ndarray:
    """Which starts are in 0.95 peak <= l_i <= 1.5 peak. (N,) bool"""
    return (tails.values >= 0.95 * peak) & (tails.values <= 1.5 * peak)


def _above(tails: _Tails, bound: float) -> _Tail:
    """Eq. 5: the k eigenvalues above a bound, and as l_min the next one, which is not counted."""
    start = max(len(tails.values) - int((tails.values > bound).sum()) - 1, 0)
    return _Tail(start, start + 1)


def _mean(tails: _Tails, allowed: np.ndarray) -> _Tail | None:
    """The mean of ln(alpha_i - 1) over the allowed starts; the middle one stands for them."""
    starts = np.flatnonzero(allowed[:-1] & np.isfinite(tails.alphas[:-1]))
    if not len(starts):
        return None
    middle = int(starts[len(starts) // 2])
    alpha = 1 + float(np.exp(np.log(tails.alphas[starts] - 1).mean()))
    return _Tail(middle, middle, alpha)


def _official(tails: _Tails) -> _Tail | None:
    above = tails.values >= np.log10(0.95 * tails.peak)
    return _best(tails, above & (tails.values <= 1.5 * tails.peak))


def _median(tails: _Tails) -> _Tail:
    middle = len(tails.values) // 2
    return _Tail(middle, middle)


# Those that look for the same place, the bulk's peak, so that their values are comparable.
AT_PEAKS = ("official", "paper", "band", "kde", "kde-band", "kde-mean")

ESTIMATORS: dict[str, Estimator] = {
    "official": Estimator(_official),
    "paper": Estimator(lambda tails: _above(tails, tails.peak)),
    "band": Estimator(lambda tails: _best(tails, _between(tails, tails.peak))),
    "median": Estimator(_median, smooth=True),
    "ks": Estimator(lambda tails: _best(tails, np.ones(len(tails.values), dtype=bool))),
    "kde": Estimator(lambda tails: _above(tails, tails.kernel_peak() * (1 + AT_PEAK)), smooth=True),
    "kde-band": Estimator(
        lambda tails: _best(tails, _between(tails, tails.kernel_peak())), smooth=True
    ),
    "kde-mean": Estimator(
        lambda tails: _mean(tails, _between(tails, tails.kernel_peak())), smooth=True
    ),
}
