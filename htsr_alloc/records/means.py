"""A layer's values: the means over its matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from htsr_alloc.records.facts import FAILED, METRICS, Layer, Matrix


def summarise(matrices: Sequence[Matrix], prefixes: Sequence[str]) -> tuple[Layer, ...]:
    """A layer's value: the plain mean over its linear weights that have one (METHODS 2)."""
    layers: list[Layer] = []
    for number, prefix in enumerate(prefixes):
        own = [matrix for matrix in matrices if matrix.layer == number]
        means: dict[str, float | None] = {}
        for metric in METRICS:
            values = [v for m in own if (v := getattr(m, metric)) is not None]
            means[metric] = math.fsum(values) / len(values) if values else None
        unfitted = sum(matrix.status == FAILED for matrix in own)
        reason = None
        if not own:
            reason = "no matrix of this layer was analysed"
        elif unfitted:
            first = next(matrix for matrix in own if matrix.status == FAILED)
            reason = f"{unfitted} of {len(own)} matrices have no fit: {first.role}, {first.reason}"
        layers.append(Layer(number, prefix, len(own), unfitted, reason=reason, **means))
    return tuple(layers)
