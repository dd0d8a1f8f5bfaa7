"""Scores to shares of a budget (AlphaLoRA eq. 6): q_i = v_i^beta / sum(v^beta) * T."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from htsr_alloc.errors import HtsrError


def quotas(scores: Sequence[float], budget: int, beta: float) -> list[float]:
    """Eq. 6: q_i = v_i^beta / sum(v^beta) * T.

    Args:
        scores: v > 0, one a layer.
        budget: T, the experts of all layers together.
        beta: any finite exponent; 0 is uniform, a negative one inverts the order.

    In double precision a larger score has a larger quota, or the same one where the two differ by
    rounding errors alone (by about 1e-15, relatively). Equal quotas are a tie, and the roundings
    then go by the order of the layers.

    Raises:
        HtsrError: a score that is not positive and finite, or a beta that is not finite.
    """
    return split(weights_of(scores, beta), budget)


def split(weights: Sequence[float], budget: int) -> list[float]:
    """``budget`` in proportion to ``weights``, which are not all zero."""
    total = math.fsum(weights)
    return [weight / total * budget for weight in weights]


def weights_of(
    scores: Sequence[float], beta: float, names: Sequence[str] | None = None
) -> list[float]:
    """v^beta relative to the largest: 1 at most. ``names`` are for the error's sentence."""
    if not math.isfinite(beta):
        raise HtsrError(f"`beta` must be a finite number, not {beta}.")
    for i, score in enumerate(scores):
        if not (math.isfinite(score) and score > 0):
            raise HtsrError(
                f"{names[i] if names else f'Layer {i}'} scores {score:.6g}, and eq. 6 needs scores "
                "above zero.",
                "Use another `metric`; pl_alpha_hill and stable_rank are always positive.",
            )
    # Logs relative to the largest weight: v^beta alone overflows at large beta.
    logs = [beta * math.log(score) for score in scores]
    largest = max(logs)
    return [math.exp(value - largest) for value in logs]


def beta_of_spread(groups: Iterable[Sequence[float]], spread: float) -> float:
    """The beta at which the largest quota is ``spread`` times the smallest.

    q_i / q_j = (v_i / v_j)^beta, so beta = ln(spread) / ln(max v / min v).

    Args:
        groups: scores > 0 that share a budget; of several groups the widest has the spread, and
            the others less.
        spread: max q / min q, at least 1 (which is uniform).

    Raises:
        HtsrError: a spread below 1, or scores that are all equal.
    """
    if not (math.isfinite(spread) and spread >= 1):
        raise HtsrError(f"`spread` is largest over smallest quota, at least 1, not {spread:g}.")
    widest = 0.0
    for scores in groups:
        weights_of(scores, 1.0)
        widest = max(widest, math.log(max(scores) / min(scores)))
    if spread == 1:
        return 0.0
    if widest == 0:
        raise HtsrError(
            f"All scores are equal, so that no beta spreads the quotas by {spread:g}.",
            "Give `beta`, or another `metric`.",
        )
    return math.log(spread) / widest
