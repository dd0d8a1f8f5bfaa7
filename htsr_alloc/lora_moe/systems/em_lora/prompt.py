"""EM-LoRA's prompt-aware router: poolers, the rational activation, one decision a prompt."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import gates

POOLERS = ("last", "mean", "max", "attention")
WEIGHTINGS = ("prob", "straight_through")
DEGREES = (6, 5)  # of the numerator and the denominator
FIT_RANGE = 3.0  # the activation starts at GeLU on [-3, 3]


def pool(hidden: Tensor, mask: Tensor, how: str, vector: Tensor | None = None) -> Tensor:
    """One vector of each prompt, from its prompt tokens only.

    Args:
        hidden: (B, S, d), the hidden states before the layer.
        mask: (B, S), true on prompt tokens, at least one a row.
        how: ``last``, ``mean``, ``max`` or ``attention``: a = softmax(H w), h = aᵀH.
        vector: (d,), w of ``attention``.

    Returns:
        (B, d), in float32 or better.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    kept = mask.unsqueeze(-1)  # (B, S, 1)
    if how == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        last = places.masked_fill(~mask, -1).amax(1)  # (B,)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    if how == "mean":
        return (hidden * kept).sum(1) / kept.sum(1)
    if how == "max":
        return hidden.masked_fill(~kept, -math.inf).amax(1)
    assert vector is not None
    scores = (hidden @ vector.to(hidden.dtype)).masked_fill(~mask, -math.inf)  # (B, S)
    return (scores.softmax(-1).unsqueeze(-1) * hidden.masked_fill(~kept, 0)).sum(1)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """g(x) = Σ_{0..6} a_j x^j / (1 + |Σ_{1..5} b_i x^i|), elementwise.

    Args:
        numerator: (7,), a. denominator: (5,), b.
    """
    top = torch.zeros_like(x)
    for a in reversed(numerator.to(x.dtype).unbind()):
        top = top * x + a
    bottom = torch.zeros_like(x)
    for b in reversed(denominator.to(x.dtype).unbind()):
        bottom = (bottom + b) * x
    return top / (1 + bottom.abs())


@functools.cache
def gelu_start() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """a and b of the rational function nearest to GeLU on [-3, 3], by least squares.

    Gauss-Newton with Levenberg's damping in float64, from the polynomial fit (b near 0).
    """
    x = torch.linspace(-FIT_RANGE, FIT_RANGE, 601, dtype=torch.float64)
    want = F.gelu(x)
    powers = torch.stack([x**j for j in range(DEGREES[0] + 1)], 1)  # (601, 7)
    start = torch.linalg.lstsq(powers, want.unsqueeze(1)).solution.squeeze(1)
    split = DEGREES[0] + 1
    # b starts off zero, where |·| has no derivative.
    theta = torch.cat([start, start.new_tensor([0.0, 0.1, 0.0, 0.01, 0.0])])

    def residual(t: Tensor) -> Tensor:
        return rational(x, t[:split], t[split:]) - want

    damping, error = 1e-3, residual(theta).square().sum()
    for _ in range(300):
        inner = powers[:, 1 : DEGREES[1] + 1] @ theta[split:]
        bottom = (1 + inner.abs()).unsqueeze(1)
        by_b = powers[:, 1 : DEGREES[1] + 1] * inner.sign().unsqueeze(1)
        jacobian = torch.cat(
            [powers / bottom, -(powers @ theta[:split]).unsqueeze(1) * by_b / bottom**2], 1
        )
        gram, slope = jacobian.T @ jacobian, jacobian.T @ residual(theta)
        step = torch.linalg.solve(gram + damping * torch.diag(gram.diagonal() + 1e-12), slope)
        trial = residual(theta - step).square().sum()
        if trial < error:
            theta, error, damping = theta - step, trial, damping / 3
        else:
            damping = damping * 4
        if damping > 1e12:
            break
    return tuple(theta[:split].tolist()), tuple(theta[split:].tolist())


def decide(pooled: Tensor, router: Tensor, numerator: Tensor, denominator: Tensor, weighting: str):
    """p = softmax(g(h) W_r) and the top-1 choice of it, one for each prompt.

    Args:
        pooled: (B, d). router: (N, d).
    """
    with torch.autocast(pooled.device.type, enabled=False):
        logits = gates.router_logits(rational(pooled, numerator, denominator), router)
    return gates.top_1(logits, weighting)


def prompt_tokens(mask: Tensor | None, labels: Tensor | None, tokens: Tensor) -> Tensor:
    """(B, S), true on prompt tokens: not padding, and before the first label. tokens: (B, S).

    Raises:
        HtsrError: a row without any.
    """
    prompt = torch.ones_like(tokens, dtype=torch.bool)
    if mask is not None:
        prompt = prompt & mask.bool()
    if labels is not None:
        prompt = prompt & ((labels != -100).cumsum(-1) == 0)
    if not bool(prompt.any(-1).all()):
        raise HtsrError(
            "EM-LoRA routes by the prompt, and a row of this batch has none.",
            "Give the prompt's tokens the label -100 (TRL: completion_only_loss=True).",
        )
    return prompt


def refuse_packing(mask: Tensor | None, given: dict) -> None:
    """Refuse rows of several texts, which have no single prompt.

    Raises:
        HtsrError: the batch says that it is packed.
    """
    positions = given.get("position_ids")
    packed = any(given.get(k) is not None for k in ("cu_seq_lens_q", "seq_idx"))
    if isinstance(positions, Tensor) and positions.dim() == 2 and not packed:
        starts = positions == 0
        if mask is not None and mask.shape == positions.shape:
            starts = starts & mask.bool()
        packed = bool((starts.sum(-1) > 1).any())
    if packed:
        raise HtsrError(
            "EM-LoRA makes one choice a prompt, and this batch packs several texts into a row.",
            "Train without packing.",
        )
