"""The few singular values of a matrix that its float64 Gram matrix cannot tell from zero.

Inverse iteration on a block, with an LU factorisation of W, in place of an SVD of all of it. It
gives orthonormal X and Y, turned so that Y^T W X = S is diagonal. In bases that begin with them W
is

    [ S  F ]        ||F|| = ||W^T Y - X S||, ||G|| = ||W X - Y S||
    [ G  B ]

Without F and G, of which e is the larger norm, the singular values would be S's and B's. So each
moves by at most e (Weyl), and one of S by at most e^2 over its distance to B's (C.-K. Li and
R.-C. Li, A note on eigenvalues of perturbed Hermitian matrices, 2005, of [0 W; W^T 0]).
"""

from __future__ import annotations

import numpy as np
import torch

REACH = 100  # times the Gram matrix's error: eigenvalues up to there are computed again
MOST = 32  # of them; more are left to an SVD
SPARE = 8  # vectors more than wanted, for speed
STEPS = 8
EPS = float(np.finfo(np.float64).eps)


def smallest(square: torch.Tensor, values: np.ndarray) -> np.ndarray | None:
    """The k least singular values, to eps s_max as an SVD has them; None where that is not shown.

    Args:
        square: W or its R, (n, n) float64, on any device.
        values: (n,) eigenvalues of W^T W, ascending, each to n eps of the largest. Those up to
            REACH times that are the k.

    Returns:
        (k,) ascending; None also for more than MOST.
    """
    n = len(values)
    error = n * EPS * float(values[-1])
    k = int((values <= REACH * error).sum())
    if k > MOST or k == n:
        return None
    factors, pivots, _ = torch.linalg.lu_factor_ex(square)
    diagonal = factors.diagonal()
    least = EPS * diagonal.abs().max()
    diagonal[diagonal.abs() < least] = least  # of a singular matrix
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, min(n, k + SPARE), generator=generator, dtype=torch.float64)
    x = x.to(square.device)
    floor = np.sqrt(values[k:] - error)  # of the singular values k + 1, ...
    for _ in range(STEPS):
        y = _solved(factors, pivots, x, transposed=True)
        x = _solved(factors, pivots, y, transposed=False)
        if not (x.isfinite().all() and y.isfinite().all()):
            return None
        # Turned to single vectors, so that a value near zero does not drown the others' next step.
        u, s, vt = torch.linalg.svd(y.T @ square @ x)
        x, y, s = x @ vt.T.flip(1), y @ u.flip(1), s.flip(0)
        off = ((square.T @ y - x * s).norm(dim=0), (square @ x - y * s).norm(dim=0))
        low = s.cpu().numpy()
        bound = _bound(low, [r.cpu().numpy() for r in off], floor, k)
        if bound <= EPS * np.sqrt(values[-1]):
            return low[:k]
    return None


def _solved(
    factors: torch.Tensor, pivots: torch.Tensor, x: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """An orthonormal basis of W^-1 x, or of W^-T x. (n, p) -> (n, p)"""
    return torch.linalg.qr(torch.linalg.lu_solve(factors, pivots, x, adjoint=transposed)).Q


def _bound(low: np.ndarray, off: list[np.ndarray], floor: np.ndarray, k: int) -> float:
    """How far the first k of ``low`` can be off; infinite if a smaller one may be missing.

    Take the first j >= k. If they lie more than e below the singular value j + 1, of which
    ``floor`` is a lower bound, B has none below floor - e.

    Args:
        low: (p,) ascending.
        off: norms of the vectors' residuals, (p,) on the right and (p,) on the left.
        floor: bounds from the singular value k + 1 on.
    """
    rounding = (k + len(floor)) * EPS * floor[-1]
    norms = np.sqrt(np.max([np.cumsum(r**2) for r in off], axis=0)) + rounding
    found = np.inf
    for j in range(k, min(len(low), k + len(floor) - 1) + 1):
        rest = floor[j - k] - norms[j - 1]
        if low[j - 1] + norms[j - 1] < rest:
            found = min(found, norms[j - 1] ** 2 / (rest - low[k - 1]))
    return float(found)
