"""A matrix to a band by Householder reflections, nearly all of it BLAS 3.

``symmetric_band`` takes a Gram matrix to a band of the same eigenvalues. ``band`` takes W itself to
one of the same singular values, in float32: that does not square the condition, so that it keeps
small singular values to eps32 s_max: as accurate as float32 svdvals, at a quarter of its time.
"""

from __future__ import annotations

import numpy as np
import torch

from htsr_alloc.spectra.lapack import Lapack

WIDTH = 64
EPS32 = float(np.finfo(np.float32).eps)
FLOOR = (32 * EPS32) ** 2  # lambda / lambda_max at or below which the band tells nothing
IN_RANGE = (1e-15, 1e15)  # largest weights whose products stay inside float32


def band(library: Lapack, tall: torch.Tensor, width: int = WIDTH) -> np.ndarray:
    """The Gram matrix, in float64, of an upper band matrix with W's singular values.

    For each block column: QR of it, applied from the left; LQ of the block row that makes,
    applied from the right; both updates of the rest are one product, A -= [V X] [Y U]^T.

    Returns:
        (width + 1, n) Fortran, lower band storage of B^T B.
    """
    kind = np.float32
    m, n = tall.shape
    a = np.empty((m, n), kind, order="F")
    torch.from_numpy(a.T).copy_(tall.T)  # upcast and reordered in one pass
    symmetric = np.zeros((width + 1, n), order="F")
    left = np.empty(2 * m * width, kind)  # [V X] and [Y U], reused at every step
    right = np.empty(2 * n * width, kind)
    for j in range(0, n, width):
        b = min(width, n - j)
        rest = n - j - b
        below = m - j - b
        v = a[j:, j : j + b]
        corner, t = library.reflectors(v)
        corner = corner.astype(np.float64)
        _add(symmetric, corner.T @ corner, j, j)
        if rest == 0:
            break
        rhs = right[: rest * 2 * b].reshape((rest, 2 * b), order="F")
        y, u = rhs[:, :b], rhs[:, b:]
        # Y = A^T V T
        library.gemm("T", "N", 1.0, a[j:, j + b :], v, 0.0, y)
        library.trmm("R", "U", "N", 1.0, t, y)
        # the block row, transposed: (A_top - V_top Y^T)^T = A_top^T - Y V_top^T
        u[:] = a[j : j + b, j + b :].T
        library.gemm("N", "T", -1.0, y, np.asfortranarray(v[:b]), 1.0, u)
        c = min(b, rest)
        side, s = library.reflectors(u)
        side = side.astype(np.float64).T  # (b, c) lower triangle or trapezoid
        _add(symmetric, side.T @ side, j + b, j + b)
        _add(symmetric, side.T @ corner, j + b, j)
        u = u[:, :c]
        lhs = left[: below * (b + c)].reshape((below, b + c), order="F")
        rhs = right[: rest * (b + c)].reshape((rest, b + c), order="F")
        lhs[:, :b] = v[b:]
        x = lhs[:, b:]
        inner = a[j + b :, j + b :]
        # X = (A - V Y^T) U S
        product = np.empty((b, c), kind, order="F")
        library.gemm("T", "N", 1.0, y, u, 0.0, product)
        library.gemm("N", "N", 1.0, inner, u, 0.0, x)
        library.gemm("N", "N", -1.0, lhs[:, :b], product, 1.0, x)
        library.trmm("R", "U", "N", 1.0, s, x)
        library.gemm("N", "T", -1.0, lhs, rhs, 1.0, inner)
    return symmetric


def symmetric_band(library: Lapack, a: np.ndarray, width: int) -> np.ndarray:
    """A band, in lower storage, orthogonally similar to a symmetric matrix.

    For each block column: QR of it below the band, applied from both sides as one update of rank
    2 k, A -= V X^T + X V^T. LAPACK's ``sytrd_sy2sb`` does the same with a slower product A V.

    Args:
        a: (n, n) Fortran, float32 or float64; its lower triangle is read, and lost.

    Returns:
        (width + 1, n) Fortran, of a's dtype.
    """
    n, kind = len(a), a.dtype
    found = np.zeros((width + 1, n), kind, order="F")
    space = np.empty(2 * n * width, kind)
    for j in range(0, n, width):
        end = min(j + width, n)
        _add(found, a[j:end, j:end], j, j)
        if end == n:
            break
        panel, rest = a[end:, j:end], a[end:, end:]
        r, t = library.reflectors(panel)
        _add(found, r, end, j)
        m, k = len(rest), len(r)
        v, both = panel[:, :k], space[: 2 * m * k].reshape((m, 2 * k), order="F")
        # X = A U - V (U^T A U) / 2 with U = V T
        u, x = both[:, :k], both[:, k:]
        u[:] = v
        library.trmm("R", "U", "N", 1.0, t, u)
        library.symm(rest, u, x)
        product = np.empty((k, k), kind, order="F")
        library.gemm("T", "N", 1.0, u, x, 0.0, product)
        library.gemm("N", "N", -0.5, v, product, 1.0, x)
        library.syr2k(v, x, rest)
    return found


def _add(symmetric: np.ndarray, block: np.ndarray, row: int, column: int) -> None:
    """Add a dense block at (row, column) to lower band storage, its part below the diagonal."""
    r, c = block.shape
    width = symmetric.shape[0] - 1
    for k in range(c):  # column k of the block: rows row..row+r-1
        first = max(0, column + k - row)
        offset = row + first - column - k
        last = min(r, column + k + width + 1 - row)
        if last > first:
            symmetric[offset : offset + last - first, column + k] += block[first:last, k]
