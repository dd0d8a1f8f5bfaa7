"""EM-LoRA's prompt-aware router: poolers, one decision a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import gates

POOLERS = ("last", "mean", "max", "attention")
WEIGHTINGS = ("prob", "straight_through")


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


def decide(
    pooled: Tensor, router: Tensor, activation: Callable[[Tensor], Tensor], weighting: str, k: int
) -> gates.Routing:
    """p = softmax(g(h) W_r) and the choice of its k largest (eq. 3), one for each prompt.

    Args:
        pooled: (B, d). router: (N, d). activation: g.
    """
    with torch.autocast(pooled.device.type, enabled=False):
        logits = gates.router_logits(activation(pooled), router)
    return gates.top_k_unnormalised(logits, weighting, k)


def prompt_tokens(mask: Tensor | None, labels: Tensor | None, tokens: Tensor) -> Tensor:
    """(B, S), true on prompt tokens: not padding, and before the first label. tokens: (B, S).

    Raises:
        HtsrError: a row without any, or labels of some tokens only.
    """
    prompt = torch.ones_like(tokens, dtype=torch.bool)
    if mask is not None:
        prompt = prompt & mask.bool()
    by_token = labels is not None and labels.dim() == 2 and not labels.is_floating_point()
    if labels is not None and by_token:  # else they are a class for each row
        if labels.shape != tokens.shape:
            raise HtsrError(
                f"EM-LoRA tells the prompt by a label for each token, and {tuple(tokens.shape)} "
                f"tokens have {tuple(labels.shape)} labels.",
                "Give whole rows of labels, without `logits_to_keep`.",
            )
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
