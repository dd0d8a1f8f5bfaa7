"""From a tall matrix W to the eigenvalues of W^T W: the engines behind ``spectrum``.

    portable    float64 Gram and torch's eigvalsh; what a GPU runs, and a CPU without LAPACK of ours
    exact       float64 Gram (syrk) and float64 tridiagonal, in one stage or two by size
    fast        nearly square W itself to a band in float32 (see band.py), float64 from there on
    auto        exact; on large rectangular matrices float32, where it can be vouched for
    cuda        portable, on a GPU or not at all

Each runs on the calling thread alone and may be called from several.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from htsr_alloc.errors import HtsrError
from htsr_alloc.spectra import ROW_CHUNK, lapack
from htsr_alloc.spectra.band import FLOOR, IN_RANGE, band
from htsr_alloc.spectra.least import least
from htsr_alloc.spectra.rows import buffer_for, upcast

# (m, n) with m >= n, any float dtype; bins of the histogram whose peak must come out right
# -> n ascending float64 eigenvalues, and what computed them
Engine = Callable[[torch.Tensor, int], tuple[np.ndarray, str]]

EPS32 = float(np.finfo(np.float32).eps)
TWO_STAGE = 1536  # from this n on two stages are faster; below, the matrix stays in the cache
WIDTH = 64  # of the band between them: 48 is a little faster on some processors, 96 on others
TALL = 1.5  # m / n from which lambda_min is large enough for float32 to be worth a try

# What the float32 route may do to an eigenvalue l: eps32 (NOISE lambda_max + SELF l). The worst
# of 186 real and 60 synthetic matrices uses 23 % of it (benchmarks/engines.py --guard).
NOISE, SELF = 4.0, 32.0
RATIO = 3e-4  # least lambda / lambda_max, of what is fitted, that float32 may have computed
LEAST = 3e-6  # least lambda_min / lambda_max for float32; below, its small ones mean too little


def portable(tall: torch.Tensor, bins: int = 100) -> tuple[np.ndarray, str]:
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


def exact(tall: torch.Tensor, bins: int = 100) -> tuple[np.ndarray, str]:
    """float64 all through; an eigenvalue is good to n eps64 lambda_max, absolutely."""
    return symmetric_eigenvalues(gram(tall)), f"float64 Gram, {_stages(tall.shape[1])}"


def fast(tall: torch.Tensor, bins: int = 100) -> tuple[np.ndarray, str]:
    """The band route for nearly square matrices, ``auto`` for others, whose Gram matrix is cheaper;
    ``exact`` where float32 has no range or cannot tell small from zero."""
    if tall.shape[0] >= TALL * tall.shape[1]:
        return auto(tall, bins)
    low, high = IN_RANGE
    if low < float(tall.abs().max()) < high:
        library = _library()
        values = library.sterf(*library.sb2st(band(library, tall)))
        if values[0] > FLOOR * values[-1]:
            return values, "float32 band"
    return exact(tall)


def auto(tall: torch.Tensor, bins: int = 100) -> tuple[np.ndarray, str]:
    """As accurate as ``exact`` for what is fitted: float32 only where it moves no peak."""
    if tall.device.type != "cpu" or lapack.load() is None:
        return portable(tall)
    m, n = tall.shape
    if n < TWO_STAGE or m < TALL * n or tall.dtype == torch.float64:
        return exact(tall)
    found = _guarded(tall, bins)
    if found is not None:
        values, how = found
        return values, f"float32 Gram, {_stages(n)}, {how}"
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

    W is upcast block by block into one buffer.
    """
    library = _library()
    m, n = tall.shape
    buffer = buffer_for(tall, torch.float64 if kind is np.float64 else torch.float32)
    total = np.zeros((n, n), kind, order="F")  # the upper half is never read
    for at in range(0, m, ROW_CHUNK):
        block = upcast(tall[at : at + ROW_CHUNK], buffer)
        library.syrk(block, 0.0 if at == 0 else 1.0, total)
    return total


def symmetric_eigenvalues(a: np.ndarray) -> np.ndarray:
    """Eigenvalues, ascending float64, of a symmetric matrix (lower triangle, Fortran; lost)."""
    library = _library()
    kd = bandwidth(a.shape[0])
    d, e = library.sytrd(a) if kd == 0 else library.sb2st(library.sy2sb(a, kd))
    return library.sterf(d, e)


def bandwidth(n: int) -> int:
    """The bandwidth between the two stages; 0: one stage is faster."""
    return WIDTH if n >= TWO_STAGE else 0


def _stages(n: int) -> str:
    return "two stages" if bandwidth(n) else "one stage"


def _guarded(tall: torch.Tensor, bins: int) -> tuple[np.ndarray, str] | None:
    """float32 eigenvalues, if they are sure to give the right histogram peak; else None.

    The least eigenvalue, which sets the bins' edges, is refined where float32's is not enough.
    """
    a = gram(tall, np.float32)
    diagonal = a.diagonal()
    # lambda_min <= the least of the diagonal, lambda_max >= its largest: a hopeless case ends here
    if not (np.isfinite(diagonal).all() and diagonal.min() > LEAST * diagonal.max() > 1e-30):
        return None
    kept = a.copy(order="F")
    values = symmetric_eigenvalues(a)
    del a
    error = float32_error(values)
    if values[0] < LEAST * values[-1]:
        return None
    if values[0] >= RATIO * values[-1] and peak_is_certain(values, error, bins):
        return values, "guarded"
    found = least(_library(), tall, kept, values, error)
    if found is None:
        return None
    values[0], error[0] = found
    values = np.maximum.accumulate(values)  # float32's next ones may lie below it
    certain = peak_is_certain(values, error, bins) and peak(values, bins) >= RATIO * values[-1]
    return (values, "guarded, least one refined") if certain else None


def peak(values: np.ndarray, bins: int) -> float:
    """The lower edge of the first fullest bin of the eigenvalues' logarithms."""
    counts, edges = np.histogram(np.log(values), bins)
    return float(np.exp(edges[counts.argmax()]))


def float32_error(values: np.ndarray) -> np.ndarray:
    """Bound of the float32 route's error, an eigenvalue each."""
    return EPS32 * (NOISE * values[-1] + SELF * np.abs(values))


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
