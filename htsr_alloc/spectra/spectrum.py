"""A weight matrix's spectrum: the eigenvalues of W^T W, exactly.

Engines (engines.py) compute eigenvalues. This module decides, for all of them, which eigenvalues
count as zero and which matrices have no spectrum.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace

import numpy as np
import torch

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Farms
from htsr_alloc.spectra import ROW_CHUNK
from htsr_alloc.spectra.engines import ENGINES, check_engine
from htsr_alloc.spectra.smallest import REACH, smallest

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

EPS = float(np.finfo(np.float64).eps)
ONE_SVD = threading.Lock()  # an SVD takes several times the memory of anything else


@dataclass(frozen=True)
class Spectrum:
    """The empirical spectral density of one matrix.

    Attributes:
        eigenvalues: float64, ascending, those of W^T W that are not zero; with FARMS the
            pooled ones of its windows are in ``windows``.
        n_zero: how many of the min(m, n) eigenvalues are zero (dead rows, low rank).
        engine: what computed it, and why if not the one asked for.
        reason: why there is no spectrum (NaN weights, all zero); None otherwise.
    """

    eigenvalues: np.ndarray
    n_zero: int = 0
    engine: str = ""
    windows: np.ndarray | None = None
    reason: str | None = None


def spectrum(
    weight: torch.Tensor,
    *,
    engine: str = "auto",
    device: str | torch.device = "cpu",
    farms: Farms | None = None,
    bins: int | None = 100,
) -> Spectrum:
    """Eigenvalues of W^T W for one matrix (METHODS: the squared singular values).

    Args:
        weight: (m, n), any float dtype; upcast to float64 in chunks, never as a whole.
        engine: a key of ``ENGINES``.
        device: where the float64 work runs. Without enough GPU memory the CPU is used, and
            ``Spectrum.engine`` says so.
        bins: of the histogram that will be fitted: ``auto`` uses float32 only where that moves
            no eigenvalue into or out of its peak. None where no peak will be looked for
            (``Estimator.smooth``): then also where it may move.
        farms: also pool the eigenvalues of these windows (float64 svdvals of each).

    Returns:
        The spectrum; for an empty, all-zero or non-finite matrix an empty one with a reason.

    Raises:
        HtsrError: unknown engine, or not a matrix.

    Eigenvalues of the Gram matrix are good to e = min(m, n) * eps * lambda_max. When there are any
    up to 100 e, those are computed again without a Gram matrix, by inverse iteration; where that
    fails and one is below e, all are, by float64 svdvals. Singular values at or below max(m, n) *
    eps * s_max are then zeros and dropped, and all others are squared.
    """
    check_engine(engine, device)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise HtsrError(f"A spectrum needs a float matrix, not {weight.ndim}-d {weight.dtype}.")
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    problem, exponent = _inspect(tall)
    if problem is not None:
        return Spectrum(np.empty(0), engine=engine, reason=problem)
    tall = _scaled(tall, exponent)
    device = torch.device(device)
    try:
        result = _decompose(tall.to(device), engine, bins)
    except (torch.OutOfMemoryError, LinAlgError) as error:
        if device.type == "cpu":
            raise
        why = "no convergence" if isinstance(error, LinAlgError) else "out of memory"
        fallback = _decompose(tall, engine, bins)
        result = replace(fallback, engine=f"{fallback.engine} on the CPU ({device}: {why})")
    windows = _windows(_scaled(weight, exponent), farms) if farms else None
    with np.errstate(over="ignore", under="ignore"):
        values = np.ldexp(result.eigenvalues, 2 * exponent)  # exact: the scale was a power of 2
    if not (values[0] >= np.finfo(np.float64).tiny and np.isfinite(values[-1])):
        return Spectrum(np.empty(0), engine=engine, reason="eigenvalues out of float64's range")
    if windows is not None:
        windows = np.ldexp(windows, 2 * exponent)
    return replace(result, eigenvalues=values, windows=windows)


def _inspect(weight: torch.Tensor) -> tuple[str | None, int]:
    """Why a matrix has no spectrum, if so, and the exponent that brings it near 1.

    Only float64 can leave its own range when squared, so other dtypes keep exponent 0.
    """
    if weight.numel() == 0:
        return "the matrix is empty", 0
    largest = 0.0
    for rows in weight.split(ROW_CHUNK):
        plain = rows.float() if rows.element_size() == 1 else rows  # float8 has no aminmax
        low, high = (float(x) for x in plain.aminmax())
        if math.isnan(low) or math.isnan(high):
            return "the matrix holds NaN", 0
        largest = max(largest, -low, high)
    if math.isinf(largest):
        return "the matrix holds Inf", 0
    if largest == 0:
        return "all weights are zero", 0
    return None, math.frexp(largest)[1] if weight.dtype == torch.float64 else 0


def _scaled(weight: torch.Tensor, exponent: int) -> torch.Tensor:
    """W * 2^-exponent, exactly (in two steps: 2^1074 alone is out of range)."""
    if exponent == 0:
        return weight
    half = exponent // 2
    return weight * math.ldexp(1.0, -half) * math.ldexp(1.0, half - exponent)


def _decompose(tall: torch.Tensor, engine: str, bins: int | None) -> Spectrum:
    """Spectrum of a finite, non-zero (m, n) matrix with m >= n, on the device it is on."""
    values, name = ENGINES[engine](tall, bins)
    m, n = tall.shape
    error = n * EPS * values[-1]
    if values[0] > REACH * error:
        return Spectrum(values, engine=name)
    with ONE_SVD:
        square = _triangle(tall)
        low = smallest(square, values)
        if low is not None:
            singular = np.sort(np.concatenate([low, np.sqrt(values[len(low) :])]))
            name += f", inverse iteration for {len(low)}"
        elif values[0] > error:
            return Spectrum(values, engine=name)
        else:
            singular = torch.linalg.svdvals(square).flip(0).cpu().numpy()
            name = "float64 svdvals"
    kept = singular[singular > m * EPS * singular[-1]]
    return Spectrum(kept**2, n_zero=n - len(kept), engine=name)


def _triangle(tall: torch.Tensor) -> torch.Tensor:
    """R of W = QR in float64, (n, n), from some rows at a time: memory does not grow with m.

    A square W is as small as its R, and stays as it is.
    """
    m, n = tall.shape
    if m == n:
        return tall.double()
    upper = torch.empty(0, n, dtype=torch.float64, device=tall.device)
    for rows in tall.split(max(n // 4, ROW_CHUNK)):
        upper = torch.linalg.qr(torch.cat([upper, rows.double()]), mode="r").R
    return upper


def _windows(weight: torch.Tensor, farms: Farms) -> np.ndarray:
    """FARMS (arXiv 2506.06280): pooled eigenvalues of evenly spaced windows, ascending.

    Each axis has at most ``farms.windows`` starts, floor((size - window) / (windows - 1))
    apart, as the released code (``fixed_number_of_sampling_ops``) has it. A window that is
    larger than the matrix is shrunk to fit, its ratio kept. Zeros are dropped window by window.
    """
    rows = min(farms.rows, weight.shape[0])
    columns = int(rows * farms.ratio)
    if columns > weight.shape[1]:
        columns = weight.shape[1]
        rows = max(1, min(rows, int(columns / farms.ratio)))
    columns = max(1, columns)
    blocks = [
        weight[i : i + rows, j : j + columns].double()
        for i in _starts(weight.shape[0], rows, farms.windows)
        for j in _starts(weight.shape[1], columns, farms.windows)
    ]
    singular = torch.linalg.svdvals(torch.stack(blocks)).cpu().numpy()
    floor = max(rows, columns) * EPS * singular.max(axis=1, keepdims=True)
    return np.sort(singular[singular > floor] ** 2)


def _starts(size: int, window: int, count: int) -> list[int]:
    step = max(1, (size - window) // max(1, count - 1))
    number = min(count, (size - window) // step + 1)
    return [min(i * step, size - window) for i in range(number)]
