"""One dense kernel for every system: y = W₀x + s B_all · ((A_all x) ⊗ g).

The N experts' A are stacked to one (N r, d_in) matrix and their B to one (d_out, N r), so that a
token's experts cost two matrix products however many there are. An expert whose gate is zero
stays in the graph with a zero gradient, and nothing waits for the device. What is as wide as the
model is written as seldom as possible: the second product is added to the base's output as it is
made, and A and the router give x one gradient together. Computing the chosen experts only, grouped,
is slower below N r of about 256 (docs/PERFORMANCE.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class _Project(torch.autograd.Function):
    """x Aᵀ and x Rᵀ, whose backward is two products instead of four and a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a, router)
        return F.linear(x, a), F.linear(x, router)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, a, router = ctx.saved_tensors
        grad = torch.cat(grads, -1)  # (..., N r + N)
        by_x = grad @ torch.cat([a, router]) if ctx.needs_input_grad[0] else None
        rows = grad.flatten(0, -2).t() @ x.flatten(0, -2)  # (N r + N, d_in)
        by_a, by_router = rows.split([len(a), len(router)])
        return by_x, by_a, by_router


def project(x: Tensor, a: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """A_all x and the router's logits, (..., N r) and (..., N).

    Args:
        x: (..., d_in). a: (N r, d_in). router: (N, d_in). All of one dtype, outside autocast.
    """
    if not torch.is_grad_enabled():
        return F.linear(x, a), F.linear(x, router)
    return _Project.apply(x, a, router)  # type: ignore[return-value]


def dense_experts(
    base: Tensor, hidden: Tensor, b: Tensor, gate: Tensor, scale: float = 1.0
) -> Tensor:
    """The base's output plus the weighted sum of all experts, base + s Σ_j g_j B_j A_j x.

    Args:
        base: (..., d_out), W₀x.
        hidden: (..., N r), A_all x; or (..., r), of one A that all experts share.
        b: (d_out, N r), B_1 ... B_N side by side.
        gate: (..., N), or (..., N, r) where each rank has a weight of its own.
        scale: s.

    Returns:
        (..., d_out).
    """
    weights = gate if gate.dim() > hidden.dim() else gate.unsqueeze(-1)  # (..., N, 1 or r)
    experts = weights.shape[-2]
    hidden = hidden.unflatten(-1, (-1, b.shape[1] // experts))  # (..., N or 1, r)
    hidden = (hidden * weights.to(hidden.dtype)).flatten(-2)  # (..., N r)
    return add_product(base, hidden, b, scale)


def add_product(base: Tensor, hidden: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """base + s B h: one pass where the dtypes agree, else in the wider of them.

    Args:
        base: (..., d_out). hidden: (..., R). b: (d_out, R).
    """
    if base.dtype == hidden.dtype == b.dtype:
        flat = torch.addmm(base.flatten(0, -2), hidden.flatten(0, -2), b.t(), alpha=scale)
        return flat.view_as(base)
    return base + F.linear(hidden * scale, b)


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
