"""Scores from the gradients of weights on rows of data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from htsr_alloc.training.scoring.base import Opened


def fisher(model: Opened, data: Path, limit: int) -> dict[str, float]:
    """Gradient variance: the mean over a weight's parameters of E[g²].

    g is the gradient of one row's negative log-likelihood (the sum over the answer's tokens), and
    E the mean over rows: the diagonal of the empirical Fisher information.
    """
    sums = dict.fromkeys(model.linears, 0.0)
    count = 0
    for batch in model.batches(data, limit, 1):
        answered = int((batch["labels"][:, 1:] != -100).sum())
        for name, gradient in _gradients(model, [batch], answered):
            sums[name] += float(gradient.square().mean())
        count += 1
    return {name: value / count for name, value in sums.items()}


def gain(model: Opened, data: Path, limit: int, r: int, batch_size: int) -> dict[str, float]:
    """First-order gain: the sum of the r leading singular values of a weight's gradient.

    The gradient is that of the mean loss over batches. A step of rank r and spectral norm 1
    lowers the loss by at most this sum, to first order.
    """
    batches = list(model.batches(data, limit, batch_size))
    return {
        name: float(torch.linalg.svdvals(gradient)[:r].sum())
        for name, gradient in _gradients(model, batches, 1 / len(batches))
    }


def _gradients(
    model: Opened, batches: list[Any], factor: float
) -> Iterator[tuple[str, torch.Tensor]]:
    """The gradients of the batches' summed losses times ``factor``, in float32 or better."""
    weights: dict[str, Any] = {name: module.weight for name, module in model.linears.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        for batch in batches:
            (model.model(**batch, use_cache=False).loss * factor).backward()
        for name, weight in weights.items():
            found = torch.zeros_like(weight) if weight.grad is None else weight.grad
            yield name, found.to(torch.promote_types(found.dtype, torch.float32))
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
