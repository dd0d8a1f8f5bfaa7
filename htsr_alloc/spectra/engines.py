"""From a tall matrix W to the eigenvalues of W^T W: the engines behind ``spectrum``.

    portable    float64 Gram and torch's eigvalsh; what a GPU runs, and a CPU without LAPACK of ours
    exact       float64 Gram (syrk) and float64 tridiagonal, in one stage or two by size
    fast        nearly square W itself to a band in float32 (see band.py), float64 from there on
    auto        exact; on large rectangular matrices float32, where it can be vouched for, and on
                large square ones where no histogram's peak is looked for
    cuda        portable, on a GPU or not at all

Each runs on the calling thread alone and may be called from several.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from htsr_alloc.errors import HtsrError
from htsr_alloc.records.facts import UNCERTIFIED
from htsr_alloc.spectra import ROW_CHUNK, lapack
from htsr_alloc.spectra.band import FLOOR, IN_RANGE, band, symmetric_band
from htsr_alloc.spectra.certificate import (
    CLEAR,
    LEAST,
    band_error,
    crowded,
    float32_error,
    is_smooth,
    may_be_meaningful,
    peak_is_certain,
    peak_is_clear,
)
from htsr_alloc.spectra.least import least
from htsr_alloc.spectra.rows import buffer_for, upcast

# (m, n) with m >= n, any float dtype; bins of the histogram whose peak must come out right, None
# where no peak will be looked for
# -> n ascending float64 eigenvalues, and what computed them
Engine = Callable[[torch.Tensor, int | None], tuple[np.ndarray, str]]

TWO_STAGE = 1536  # from this n on two stages are faster; below, the matrix stays in the cache
# Of the band between them, by element size: chasing is fast where blocks fit the nearest cache.
WIDTHS = {4: 64, 8: 48}
BAND = 3072  # from this n on a float32 band saves a sixth of the time
TALL = 1.5  # m / n from which lambda_min is large enough for float32 to be worth a try


def portable(tall: torch.Tensor, bins: int | None = 100) -> tuple[np.ndarray, str]:
    """float64 in torch, on the device that the matrix is on."""
    where = "" if tall.device.type == "cpu" else f" on {tall.device}"
    values = torch.linalg.eigvalsh(portable_gram(tall)).cpu().numpy()
    return values, f"float64 Gram, eigvalsh{where}"


def portable_gram(tall: torch.Tensor) -> torch.Tensor:
    """W^T W in float64 on W's device, over blocks of rows. (m, n) -> (n, n)."""
    n = tall.shape[1]
    total = torch.zeros(n, n, dtype=torch.float64, device=tall.device)
    for rows in tall.split(ROW_CHUNK):
        wide = rows.double()
        total.addmm_(wide.T, wide)
    return total


def exact(tall: torch.Tensor, bins: int | None = 100) -> tuple[np.ndarray, str]:
    """float64 all through; an eigenvalue is good to n eps64 lambda_max, absolutely."""
    return symmetric_eigenvalues(gram(tall)), f"float64 Gram, {_stages(tall.shape[1])}"


def fast(tall: torch.Tensor, bins: int | None = 100) -> tuple[np.ndarray, str]:
    """The band route for nearly square matrices, ``auto`` for others, whose Gram matrix is cheaper;
    ``exact`` where float32 has no range or cannot tell small from zero."""
    if tall.shape[0] >= TALL * tall.shape[1]:
        return auto(tall, bins)
    values = banded(tall)
    return exact(tall) if values is None else (values, "float32 band")


def auto(tall: torch.Tensor, bins: int | None = 100) -> tuple[np.ndarray, str]:
    """As accurate as ``exact`` for what is fitted: float32 only where it moves no peak."""
    if tall.device.type != "cpu" or lapack.load() is None:
        return portable(tall)
    m, n = tall.shape
    found, rectangular = None, m >= TALL * n
    if n < (TWO_STAGE if rectangular else BAND) or tall.dtype == torch.float64:
        return exact(tall)
    if rectangular:
        found = guarded(tall, bins)
    elif bins is None:
        found = smooth_band(tall)
    else:
        return exact(tall)
    if found is not None:
        return found
    values, name = exact(tall)
    return values, f"{name} (float32 not certain)"


ENGINES: dict[str, Engine] = {
    "auto": auto,
    "exact": exact,
    "fast": fast,
    "portable": portable,
    "cuda": portable,
}


def check_engine(name: str, device: torch.device | str) -> None:
    """Raise HtsrError for an engine that is unknown, or cannot run here."""
    if name not in ENGINES:
        raise HtsrError(f"There is no engine {name!r}.", f"Choose from {', '.join(ENGINES)}.")
    if name == "cuda" and torch.device(device).type != "cuda":
        raise HtsrError("The engine cuda needs a CUDA device.", "Add `device` cuda.")
    if name in ("exact", "fast"):
        if torch.device(device).type != "cpu":
            raise HtsrError(f"The engine {name} runs on the CPU only.", "Use `engine` auto.")
        _library()


def _library() -> lapack.Lapack:
    library = lapack.load()
    if library is None:
        raise HtsrError(
            "The engines exact and fast need the package scipy-openblas64, which is not here.",
            "Install it, or use `engine` portable.",
        )
    return library


def gram(tall: torch.Tensor, kind: type = np.float64) -> np.ndarray:
    """W^T W, lower triangle, accumulated over blocks of rows. (m, n) -> (n, n), Fortran.

    W is upcast block by block into one buffer. A float32 diagonal is summed in float64: where
    weights take few values, rounding moves all of its sums the same way, and with them every
    eigenvalue.
    """
    library = _library()
    m, n = tall.shape
    buffer = buffer_for(tall, torch.float64 if kind is np.float64 else torch.float32)
    total = np.zeros((n, n), kind, order="F")  # the upper half is never read
    diagonal = np.zeros(n)
    for at in range(0, m, ROW_CHUNK):
        block = upcast(tall[at : at + ROW_CHUNK], buffer)
        library.syrk(block, 0.0 if at == 0 else 1.0, total)
        if kind is np.float32:
            diagonal += np.einsum("ij,ij->j", block, block, dtype=np.float64)
    if kind is np.float32:
        with np.errstate(over="ignore"):
            total[np.diag_indices(n)] = diagonal
    return total


def symmetric_eigenvalues(a: np.ndarray, width: int | None = None) -> np.ndarray:
    """Eigenvalues, ascending float64, of a symmetric matrix (lower triangle, Fortran; lost).

    ``width`` is that of the band between two stages, 0 for one stage; default ``bandwidth``.
    """
    library = _library()
    kd = bandwidth(len(a), a.itemsize) if width is None else width
    d, e = library.sb2st(symmetric_band(library, a, kd)) if kd else library.sytrd(a)
    return library.sterf(d, e)


def bandwidth(n: int, itemsize: int = 8) -> int:
    """The bandwidth between the two stages; 0: one stage is faster."""
    return WIDTHS[itemsize] if n >= TWO_STAGE else 0


def _stages(n: int) -> str:
    return "two stages" if bandwidth(n) else "one stage"


def guarded(tall: torch.Tensor, bins: int | None) -> tuple[np.ndarray, str] | None:
    """float32 eigenvalues, if they are sure to give the right histogram peak; else None.

    The least eigenvalue, which sets the bins' edges, is refined where float32's is not enough.
    Without a histogram the median must be far above its error.
    """
    a = gram(tall, np.float32)
    if not may_be_meaningful(a.diagonal()):
        return None
    kept = a.copy(order="F")
    values = symmetric_eigenvalues(a)
    del a
    name = f"float32 Gram, {_stages(len(values))}"
    error = float32_error(values)
    if values[0] < LEAST * error[0] or crowded(values, error):
        return None
    if bins is None:
        return (values, f"{name}, {UNCERTIFIED}") if is_smooth(values, error) else None
    if values[0] >= CLEAR * error[0] and peak_is_certain(values, error, bins):
        return values, f"{name}, guarded"
    found = least(_library(), tall, kept, values, error)
    if found is None:
        return None
    values[0], error[0] = found
    values = np.maximum.accumulate(values)  # float32's next ones may lie below it
    certain = peak_is_certain(values, error, bins) and peak_is_clear(values, error, bins)
    return (values, f"{name}, guarded, least one refined") if certain else None


def banded(tall: torch.Tensor) -> np.ndarray | None:
    """Eigenvalues by a float32 band; None where float32 has no range, or no small values."""
    low, high = IN_RANGE
    if not low < float(tall.abs().max()) < high:
        return None
    library = _library()
    values = library.sterf(*library.sb2st(band(library, tall)))
    return values if values[0] > FLOOR * values[-1] else None


def smooth_band(tall: torch.Tensor) -> tuple[np.ndarray, str] | None:
    """``banded`` for estimators that look for no peak, where the median is far above its error."""
    values = banded(tall)
    if values is None or not is_smooth(values, band_error(values)):
        return None
    return values, f"float32 band, {UNCERTIFIED}"
