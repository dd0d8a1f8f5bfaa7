"""How far a fitted alpha can be off: the tail's finite size, and the choice of where it starts.

All on the scale z = ln(alpha - 1), where Hill's standard error is 1 / sqrt(k) whatever alpha is.

The noise model: W is known up to Gaussian noise E of standard deviation s = ``noise`` times the
root mean square of its entries. W's singular vectors are orthonormal, so that to first order its
singular values move by independent u_i^T E v_i ~ N(0, s^2) (the diffusion term of Bru's process,
J. Theor. Probab. 4, 1991; the drift is of order s^2 and left out). So

    l_i' = (sqrt(l_i) + s g_i)^2,    g_i ~ N(0, 1),

sorted and fitted again, start and all, costs a fit and no decomposition. It holds where s is well
below the spacing of the singular values. On real matrices it gives the root mean
square that noise on W itself gives to within a factor of 1.6, and of 2.1 for ``ks``
(docs/ESTIMATORS.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from htsr_alloc.spectra.estimators import BANDWIDTH, fit

NOISE = 0.01  # of the weights' root mean square: between bfloat16's rounding and 4 bits'
DRAWS = 16  # the error of the error is 1 / sqrt(2 draws), 18 %


@dataclass(frozen=True)
class Uncertainty:
    """Standard errors of one fit. Those of alpha are (alpha - 1) times those of z.

    Attributes:
        hill: (alpha - 1) / sqrt(k), the error if the start were given and the eigenvalues above
            it independent draws of a power law.
        start: (alpha - 1) times the root mean square change of z under the noise model.
        se: both together, sqrt(hill^2 + start^2).
        k_low, k_high: the shortest and the longest tail among the draws and the fit itself.
    """

    hill: float
    start: float
    se: float
    k_low: int
    k_high: int

    @property
    def jumps(self) -> bool:
        """Whether the choice of the start adds more to the error than the tail's size does."""
        return self.start > self.hill


def uncertainty(
    eigenvalues: np.ndarray,
    weight_rms: float,
    estimator: str = "official",
    bins: int = 100,
    bandwidth: float = BANDWIDTH,
    *,
    noise: float = NOISE,
    draws: int = DRAWS,
) -> Uncertainty | None:
    """The standard errors of ``fit`` with the same arguments; None where that fit failed.

    The draws are a fixed function of N: the same on every machine and with every numpy, and
    common to all matrices of a size, so that two layers' errors differ by their spectra alone.

    Args:
        eigenvalues: (N,) positive, ascending, float64.
        weight_rms: of W's entries, ||W||_F / sqrt(m n) = sqrt(stable_rank lambda_max / (m n)).
        noise: relative to ``weight_rms``.
        draws: of the spectrum, each fitted again. A draw without a fit is left out.
    """
    values = np.asarray(eigenvalues, dtype=np.float64)
    found = fit(values, estimator, bins, bandwidth)
    if found.alpha is None or found.k is None:
        return None
    # RandomState's stream is frozen (NEP 19), a Generator's may change between versions.
    normal = np.random.RandomState(len(values)).standard_normal((draws, len(values)))
    moved = np.sort((np.sqrt(values) + noise * weight_rms * normal) ** 2, axis=1)
    ks, squares = [found.k], []
    for row in moved:
        again = fit(row, estimator, bins, bandwidth)
        if again.alpha is not None and again.k is not None:
            ks.append(again.k)
            squares.append(math.log((again.alpha - 1) / (found.alpha - 1)) ** 2)
    if not squares:
        return None
    hill = (found.alpha - 1) / math.sqrt(found.k)
    start = (found.alpha - 1) * math.sqrt(math.fsum(squares) / len(squares))
    return Uncertainty(hill, start, math.hypot(hill, start), min(ks), max(ks))
