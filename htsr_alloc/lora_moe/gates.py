"""The routers: router logits (tokens, N) to gate weights (tokens, N).

All of it is done in float32 or better, whatever autocast says, and without asking the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Routing(NamedTuple):
    """One router's decision for every token.

    Attributes:
        weights: (..., N), the gate g.
        probs: (..., N), p = softmax of the logits, before any choice.
        chosen: (..., N), 1 where the token uses the expert, else 0; no gradient.
    """

    weights: Tensor
    probs: Tensor
    chosen: Tensor


def router_logits(x: Tensor, router: Tensor, bias: Tensor | None = None) -> Tensor:
    """W_r x in float32 (float64 where both are), outside autocast.

    Args:
        x: (..., d_in), without dropout.
        router: (N, d_in).
    """
    dtype = torch.promote_types(router.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), router.to(dtype), None if bias is None else bias.to(dtype))


def top_k_softmax(logits: Tensor, k: int) -> Routing:
    """The k largest of p, renormalised to sum to 1 (MoLA, arXiv 2402.08562, eq. 3; GOAT eq. 6).

    p_i / Σ_chosen p is the softmax over the chosen logits alone, and is computed so. With k = N
    this is the dense softmax. Ties go to one expert, never to more than k.
    """
    probs = logits.softmax(-1)
    if k >= logits.shape[-1]:
        return Routing(probs, probs, torch.ones_like(probs))
    values, index = logits.topk(k, dim=-1)  # (..., k)
    empty = torch.zeros_like(logits)
    weights = empty.scatter(-1, index, values.softmax(-1))
    return Routing(weights, probs, empty.scatter(-1, index, 1.0))


def dense_softmax(logits: Tensor) -> Routing:
    """g = p: every expert takes part (MoR; HydraLoRA, arXiv 2404.19245, eq. 5)."""
    return top_k_softmax(logits, logits.shape[-1])


def threshold(logits: Tensor, tau_logit: Tensor) -> Routing:
    """AdaMoLE (arXiv 2405.00361, eq. 6-8): relu(p − τ) renormalised, τ = σ(W_τ x + b) / N.

    Where no expert is above the threshold all weights are zero, and the token has no adapter.

    Args:
        logits: (..., N). tau_logit: (..., 1), W_τ x + b.
    """
    probs = logits.softmax(-1)
    above = (probs - tau_logit.sigmoid() / logits.shape[-1]).relu()
    total = above.sum(-1, keepdim=True)
    weights = above / torch.where(total > 0, total, torch.ones_like(total))
    return Routing(weights, probs, (above > 0).to(probs.dtype))


def top_1(logits: Tensor, weighting: str) -> Routing:
    """EM-LoRA's choice of one expert a prompt.

    Args:
        logits: (B, N).
        weighting: "prob" weights the chosen expert by its p_j, since a renormalised top-1 gate
            is the constant 1 and would leave the router without a gradient;
            "straight_through" weights it by 1 and passes p_j's gradient.
    """
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(probs).scatter(-1, probs.argmax(-1, keepdim=True), 1.0)
    weights = probs * chosen
    if weighting == "straight_through":
        weights = chosen + (weights - weights.detach())
    return Routing(weights, probs, chosen)
