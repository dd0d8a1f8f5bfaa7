"""The routers: router logits (tokens, N) to gate weights (tokens, N).

All of it is done in float32 or better, whatever autocast says, and without asking the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Routing(NamedTuple):
    """One router's decision for every token.

    Attributes:
        weights: (..., N), the gate g.
        logits: (..., N), from which it was made.
        kept: (..., N), the same, -inf where the token does not use the expert.
    """

    weights: Tensor
    logits: Tensor
    kept: Tensor

    @property
    def probs(self) -> Tensor:
        """(..., N), p = softmax of the logits, before any choice."""
        return self.logits.softmax(-1)

    @property
    def chosen(self) -> Tensor:
        """(..., N) bool, whether the token uses the expert, though its weight may round to 0."""
        return self.kept > -math.inf


def is_wide(dtype: torch.dtype) -> bool:
    """Whether a router may be computed in it: float32 or float64."""
    return dtype in (torch.float32, torch.float64)


def router_logits(x: Tensor, router: Tensor, bias: Tensor | None = None) -> Tensor:
    """W_r x in float32 (float64 where the router is), outside autocast.

    Args:
        x: (..., d_in), without dropout.
        router: (N, d_in).
    """
    if not is_wide(router.dtype):
        router, bias = router.float(), None if bias is None else bias.float()
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x.to(router.dtype), router, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(router.dtype), router, bias)


def top_k_softmax(logits: Tensor, k: int) -> Routing:
    """The k largest of p, renormalised to sum to 1 (MoLA, arXiv 2402.08562, eq. 3; GOAT eq. 10).

    p_i / Σ_chosen p is the softmax over the chosen logits alone, and is computed so. With k = N
    this is the dense softmax. Ties go to one expert, never to more than k.
    """
    if k >= logits.shape[-1]:
        return dense_softmax(logits)
    values, index = logits.topk(k, dim=-1)  # (..., k)
    kept = torch.full_like(logits, -math.inf).scatter(-1, index, values)
    return Routing(kept.softmax(-1), logits, kept)


def dense_softmax(logits: Tensor) -> Routing:
    """g = p: every expert takes part (MoR; HydraLoRA, arXiv 2404.19245, eq. 5)."""
    return Routing(logits.softmax(-1), logits, logits)


def threshold(logits: Tensor, tau_logit: Tensor) -> Routing:
    """AdaMoLE (arXiv 2405.00361, eq. 6-8): relu(p − τ) renormalised, τ = σ(W_τ x + b) / N.

    Where no expert is above the threshold all weights are zero, and the token has no adapter.

    Args:
        logits: (..., N). tau_logit: (..., 1), W_τ x + b.
    """
    above = (logits.softmax(-1) - tau_logit.sigmoid() / logits.shape[-1]).relu()
    total = above.sum(-1, keepdim=True)
    weights = above / torch.where(total > 0, total, torch.ones_like(total))
    return Routing(weights, logits, logits.masked_fill(above == 0, -math.inf))


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
    return Routing(weights, logits, logits.masked_fill(chosen == 0, -math.inf))
