"""One dense kernel for every system: y = B_all · ((A_all x) ⊗ g).

The N experts' A are stacked to one (N r, d_in) matrix and their B to one (d_out, N r), so that a
token's experts cost two matrix products however many there are. An expert whose gate is zero
stays in the graph with a zero gradient, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def dense_experts(x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """The weighted sum of all experts, s Σ_j g_j B_j A_j x.

    Args:
        x: (..., d_in), the experts' input (after dropout).
        a: (N r, d_in), A_1 ... A_N stacked; or (r, d_in), one A that all experts share.
        b: (d_out, N r), B_1 ... B_N side by side.
        gate: (..., N), or (..., N, r) where each rank has a weight of its own; a scale is part
            of it.

    Returns:
        (..., d_out).
    """
    weights = gate if gate.dim() > x.dim() else gate.unsqueeze(-1)  # (..., N, 1 or r)
    experts = weights.shape[-2]
    hidden = F.linear(x, a)  # (..., N r), or (..., r) when shared
    hidden = hidden.unflatten(-1, (-1, b.shape[1] // experts))  # (..., N or 1, r)
    hidden = (hidden * weights.to(hidden.dtype)).flatten(-2)  # (..., N r)
    return F.linear(hidden, b)


def scaled_b(b: Tensor, lambda_b: Tensor) -> Tensor:
    """MoR's B_all: λ_Bi ⊙ B for every i, side by side.

    Args:
        b: (d_out, r), shared.
        lambda_b: (N, d_out).

    Returns:
        (d_out, N r).
    """
    return (lambda_b.t().unsqueeze(-1) * b.unsqueeze(1)).flatten(1)


def dora_delta(base: Tensor, low_rank: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """What DoRA (arXiv 2402.09353, eq. 5) adds to the frozen output, before any gate.

    W' = m (W₀ + sBA) / ‖W₀ + sBA‖, row by row, so W'x − W₀x = (m/‖·‖ − 1) W₀x + (m/‖·‖) sBAx.

    Args:
        base: (..., d_out), W₀x without its bias.
        low_rank: (..., d_out), sBAx.
        magnitude: (d_out,), m.
        norm: (d_out,), the row norms of W₀ + sBA, detached as the paper's section 4.3 has it.
    """
    ratio = magnitude / norm
    return (ratio - 1) * base + ratio * low_rank


def row_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Row norms of W₀ + sBA, (d_out,), without a gradient.

    Args:
        weight: (d_out, d_in), any floating dtype.
        a: (r, d_in). b: (d_out, r).
    """
    with torch.no_grad():
        return torch.linalg.vector_norm(weight.to(a.dtype) + scale * (b @ a), dim=1)
