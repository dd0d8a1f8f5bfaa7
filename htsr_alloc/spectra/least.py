"""The least eigenvalue of W^T W to nearly float64, from a float32 factorisation of it.

It sets the edges of the histogram's bins, and float32 knows it worst. Inverse iteration on a block
with the float32 Gram matrix, shifted to just below it, gives the eigenvectors at the lower end;
products with W itself in float64 give their Ritz values, and residuals that bound the error.
"""

from __future__ import annotations

import numpy as np
import torch

from htsr_alloc.spectra import ROW_CHUNK, lapack
from htsr_alloc.spectra.rows import buffer_for, upcast

SIZE = 16  # vectors of the block
STEPS = 12  # of inverse iteration in float32
PRODUCTS = 3  # with W in float64, at most
ENOUGH = 1e-6  # relative error that moves no edge by a thousandth of a bin
EPS64 = float(np.finfo(np.float64).eps)


def least(
    library: lapack.Lapack, tall: torch.Tensor, a: np.ndarray, values: np.ndarray, error: np.ndarray
) -> tuple[float, float] | None:
    """The least eigenvalue and a bound of its error; None where float32 cannot factor the matrix.

    tall: W, (m, n); a: its float32 Gram matrix (lower triangle, Fortran), which is lost; values:
    all n eigenvalues, ascending, each within ``error``.
    """
    n = len(values)
    a[np.diag_indices(n)] -= max(0.0, float(values[0] - 4 * error[0]))
    try:
        library.potrf(a)
    except lapack.LapackError:
        return None
    x = np.random.default_rng(0).standard_normal((n, SIZE)).astype(np.float32)
    for _ in range(STEPS):
        x = np.linalg.qr(library.potrs(a, x))[0]
    x = x.astype(np.float64)
    best = float(values[0]), float(error[0])
    for _ in range(PRODUCTS):
        x = np.linalg.qr(x)[0]
        y = product(library, tall, x)
        ritz, turn = np.linalg.eigh(x.T @ y)
        x, y = x @ turn, y @ turn
        residual = y - x * ritz
        bound = _bound(ritz, residual, values - error)
        if bound < best[1]:
            best = float(ritz[0]), bound
        if bound <= ENOUGH * ritz[0]:
            break
        x = x - library.potrs(a, residual.astype(np.float32))
    return best


def product(library: lapack.Lapack, tall: torch.Tensor, x: np.ndarray) -> np.ndarray:
    """W^T W x in float64. tall: (m, n); x: (n, k). -> (n, k)."""
    x = np.asfortranarray(x)
    total = np.zeros_like(x, order="F")
    buffer = buffer_for(tall, torch.float64)
    for at in range(0, len(tall), ROW_CHUNK):
        block = upcast(tall[at : at + ROW_CHUNK], buffer)
        y = np.empty((len(block), x.shape[1]), order="F")
        if block.flags.c_contiguous:
            library.gemm("T", "N", 1.0, block.T, x, 0.0, y)
            library.gemm("N", "N", 1.0, block.T, y, 1.0, total)
        else:
            library.gemm("N", "N", 1.0, block, x, 0.0, y)
            library.gemm("T", "N", 1.0, block, y, 1.0, total)
    return total


def _bound(ritz: np.ndarray, residual: np.ndarray, floor: np.ndarray) -> float:
    """How far the first Ritz value can be from the least eigenvalue; infinite if nothing is known.

    Take the first j Ritz vectors, whose residual has norm e. If their values lie more than e below
    the eigenvalue j + 1, of which ``floor`` is a lower bound, then the rest of the space has no
    eigenvalue below floor[j] - e (Weyl), and the error is at most e^2 over that gap (C.-K. Li and
    R.-C. Li, A note on eigenvalues of perturbed Hermitian matrices, 2005).
    """
    rounding = len(floor) * EPS64 * float(np.abs(floor[-1]))
    norms = np.sqrt(np.cumsum(np.sum(residual**2, axis=0))) + rounding
    found = np.inf
    for j, (value, norm) in enumerate(zip(ritz, norms, strict=True), 1):
        if j < len(floor) and value + norm < floor[j] - norm:
            found = min(found, norm**2 / (floor[j] - norm - ritz[0]))
    return float(found + rounding)
