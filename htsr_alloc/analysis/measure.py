"""From a spectrum to the numbers of metrics.json: one record a matrix, one mean a layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr_alloc.checkpoints.layers import MatrixRef
from htsr_alloc.checkpoints.listing import FLOAT_DTYPES
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import FAILED, MARKED, OK, Matrix, Metrics, Settings
from htsr_alloc.records.facts import UNCERTIFIED
from htsr_alloc.records.means import summarise
from htsr_alloc.spectra.estimators import ESTIMATORS, Fit, alpha_hat, fit, stable_rank
from htsr_alloc.spectra.uncertainty import NOISE, uncertainty

if TYPE_CHECKING:
    from htsr_alloc.spectra.spectrum import Spectrum

# The distance from 1 to the next number, by the code in a header.
EPS = {
    "F64": 2.0**-52,
    "F32": 2.0**-23,
    "F16": 2.0**-10,
    "BF16": 2.0**-7,
    "F8_E4M3": 2.0**-3,
    "F8_E5M2": 2.0**-2,
}
SPREAD = 4.0
CODES = {name: code for code, (_, name) in FLOAT_DTYPES.items()}  # of torch dtypes


def eps_of(dtype: str) -> float:
    """``EPS``, and of what was quantised to b bits (``Q4_K``, ``INT8``) 2^(2 - b): half a step of
    a block whose largest entry is about three times its root mean square. At most 2^-2, above
    which independent entries would pass for equal singular values."""
    bits = re.search(r"[0-9]+", dtype)
    return EPS.get(dtype) or min(2.0**-2, 2.0 ** (2 - int(bits[0][:2] if bits else 0)))


def measure(matrix: MatrixRef, found: Spectrum, settings: Settings) -> Matrix:
    """One matrix of the metrics file, from its spectrum."""
    values = found.eigenvalues
    empty = found.reason is not None
    record = Matrix(
        tensor=matrix.name,
        layer=matrix.layer,
        role=matrix.role,
        expert=matrix.expert,
        shape=matrix.shape,
        dtype=matrix.ref.dtype,
        n_eigs=len(values),
        n_zero=found.n_zero,
        lambda_min=None if empty else float(values[0]),
        lambda_max=None if empty else float(values[-1]),
        pl_alpha_hill=None,
        alpha_hat=None,
        stable_rank=None if empty else stable_rank(values),
        xmin=None,
        k=None,
        ks_distance=None,
        peak_gap=None,
        engine=found.engine,
        status=FAILED if empty else OK,
        reason=found.reason,
    )
    if empty:
        return record
    tail = values if found.windows is None else found.windows
    return with_fit(record, tail, settings)


def with_noise(settings: Settings, noise: float | None = NOISE) -> Settings:
    """The settings with the noise of their standard errors: none with FARMS.

    The noise model is about W's singular values, and the windows that FARMS pools overlap, so that
    neither it nor Hill's error holds for their eigenvalues.
    """
    return replace(settings, noise=None if settings.farms else noise)


def fit_of(matrix: Matrix, tail: np.ndarray, estimator: str, bins: int) -> Fit:
    """The fit to a matrix's eigenvalues; failed where they, or its tail's, differ by rounding."""
    found = fit(tail, estimator, bins)
    if found.xmin is None or not is_flat(tail, matrix.shape, matrix.dtype, found.xmin):
        return found
    whole = is_flat(tail, matrix.shape, matrix.dtype)
    stored = FLOAT_DTYPES.get(matrix.dtype, (0, matrix.dtype))[1]
    which = "all eigenvalues" if whole else "the tail's eigenvalues"
    reason = f"{which} are equal within the rounding of {stored}"
    return Fit(None, None, None, None, None, FAILED, reason)


def is_flat(
    values: np.ndarray, shape: tuple[int, int], dtype: str, start: float | None = None
) -> bool:
    """Whether a spectrum's spread is what rounding gives a matrix of equal singular values.

    Storing an (m, n) matrix W, m >= n, adds an error to each entry, independent and at most
    eps/2 of it: a standard deviation of at most eps/sqrt(12) times the entries' root mean square
    w = ||W||_F / sqrt(m n). To first order that spreads equal singular values by the symmetric
    part of an (n, n) matrix of such errors, whose norm is sqrt(2n) times it, to both sides: by
    0.82 eps w sqrt(n) = 0.82 eps ||W||_F / sqrt(m). Measured: 0.6. ``SPREAD`` leaves room for
    errors that are not independent; independent entries spread by 2 w sqrt(n) and more, which is
    beyond it in every dtype. Computing (the matrix, and here its eigenvalues) adds n eps
    sigma_max, with the eps of float64 or else float32.

    Args:
        values: (n,) ascending eigenvalues, the squared singular values.
        dtype: as stored.
        start: the eigenvalue from which the spread is taken, of a tail; None for the least. There
            is no room left there: in fp8 it would take in tails of few eigenvalues.
    """
    if not len(values):
        return False
    least, largest = np.sqrt(values[0] if start is None else start), np.sqrt(values[-1])
    m, n = max(shape), min(shape)
    room = SPREAD if start is None else 1.0
    stored = room * eps_of(dtype) * np.sqrt(values.mean() * n / m)  # ||W||_F / sqrt(m)
    computed = n * min(eps_of(dtype), EPS["F32"]) * largest
    return bool(largest - least <= stored + computed)


def with_fit(matrix: Matrix, tail: np.ndarray, settings: Settings) -> Matrix:
    """The record with a fit; status and reason follow from it and from zero eigenvalues."""
    fitted = fit_of(matrix, tail, settings.estimator, settings.bins)
    reasons = [fitted.reason] if fitted.reason else []
    if matrix.n_zero:
        reasons.append(f"{matrix.n_zero} of {matrix.n_zero + matrix.n_eigs} eigenvalues are zero")
    status = fitted.status if fitted.status != OK else (MARKED if reasons else OK)
    alpha, largest = fitted.alpha, matrix.lambda_max
    return replace(
        matrix,
        pl_alpha_hill=alpha,
        alpha_hat=None if alpha is None or largest is None else alpha_hat(alpha, largest),
        xmin=fitted.xmin,
        k=fitted.k,
        ks_distance=fitted.ks_distance,
        peak_gap=fitted.peak_gap,
        status=status,
        reason="; ".join(reasons) or None,
        **errors_of(matrix, tail, settings, alpha is not None),
    )


def errors_of(matrix: Matrix, tail: np.ndarray, settings: Settings, fitted: bool) -> dict[str, Any]:
    """The standard errors of a fit, as fields of its record; None without a fit or a noise."""
    found = None
    if fitted and settings.noise is not None and matrix.stable_rank and matrix.lambda_max:
        rms = math.sqrt(matrix.stable_rank * matrix.lambda_max / math.prod(matrix.shape))
        estimator, bins, noise = settings.estimator, settings.bins, settings.noise
        found = uncertainty(tail, rms, estimator, bins, noise=noise)
    names = {"alpha_se": "se", "alpha_hill_se": "hill", "alpha_start_se": "start"}
    names |= {"k_low": "k_low", "k_high": "k_high"}
    return {key: getattr(found, name, None) for key, name in names.items()}


def keep_peaks(metrics: Metrics) -> bool:
    """Whether a histogram of every kept spectrum has its peak where float64 has it."""
    return not any(matrix.engine.endswith(UNCERTIFIED) for matrix in metrics.matrices)


def refitted(
    metrics: Metrics,
    spectra: Mapping[str, np.ndarray],
    estimator: str,
    bins: int,
    noise: float | None = NOISE,
) -> Metrics:
    """The metrics by another estimator, from the spectra that they were fitted to.

    Args:
        spectra: tensor -> its ascending eigenvalues (``results.open_spectra``).
        noise: of the standard errors; None computes none, in a seventeenth of the time.

    Raises:
        HtsrError: the spectrum of a matrix that has one is not there, or the estimator looks for
            a histogram's peak and the spectra do not keep it.
    """
    if not keep_peaks(metrics) and estimator in ESTIMATORS and not ESTIMATORS[estimator].smooth:
        smooth = ", ".join(name for name, row in ESTIMATORS.items() if row.smooth)
        raise HtsrError(
            f"{estimator} looks for a histogram's peak, which these float32 spectra may not have "
            f"where float64 has it; they were computed for {metrics.settings.estimator}.",
            f"Analyze again with `estimator` {estimator}, or choose from {smooth}.",
        )
    settings = replace(metrics.settings, estimator=estimator, bins=bins)
    settings = with_noise(settings, noise)
    matrices = []
    for matrix in metrics.matrices:
        values = spectra.get(matrix.tensor)
        if values is None and matrix.lambda_max is not None:
            raise HtsrError(f"The kept spectra lack that of {matrix.tensor}.", "Analyze again.")
        if values is not None:
            matrix = with_fit(matrix, values, settings)
        matrices.append(matrix)
    prefixes = [layer.prefix for layer in metrics.layers]
    return replace(
        metrics,
        settings=settings,
        matrices=tuple(matrices),
        layers=summarise(matrices, prefixes),
    )
