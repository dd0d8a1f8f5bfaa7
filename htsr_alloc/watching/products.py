"""The spectrum of a low-rank product s B A, without ever forming it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from htsr_alloc.spectra.spectrum import EPS, Spectrum

ENGINE = "float64 QR of the factors"


@torch.no_grad()
def product_spectrum(a: Tensor, b: Tensor, scale: float = 1.0) -> Spectrum:
    """Eigenvalues of (s B A)^T (s B A), of which min(m, n, r) can be other than zero.

    With B = Q_B R_B and A^T = Q_A R_A the singular values of B A are those of the small matrix
    R_B R_A^T. The Gram matrices' product (B^T B)(A A^T) has the same eigenvalues and costs as
    much, but squares the condition.

    Args:
        a: (r, n). b: (m, r). Any floating dtype; upcast to float64.
        scale: s, lora_alpha / r.

    Returns:
        At most min(m, n, r) eigenvalues, ascending; ``n_zero`` counts those of the min(m, n, r)
        that are zero. An all-zero or non-finite product is empty, with its reason.
    """
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        return Spectrum(np.empty(0), engine=ENGINE, reason="a factor holds NaN or Inf")
    right = torch.linalg.qr(a.double().T, mode="r").R  # (min(n, r), r)
    left = torch.linalg.qr(b.double(), mode="r").R  # (min(m, r), r)
    values = torch.linalg.svdvals(left @ right.T) * abs(scale)
    singular = values.flip(0).cpu().numpy()
    floor = max(a.shape[1], b.shape[0]) * EPS * singular[-1]
    kept = singular[singular > floor]
    if not len(kept):
        return Spectrum(np.empty(0), engine=ENGINE, reason="the product is zero")
    return Spectrum(kept**2, n_zero=len(singular) - len(kept), engine=ENGINE)
