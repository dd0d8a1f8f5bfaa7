"""Why a layer has its number: what each matrix adds to the mean, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Matrix, Metrics


@dataclass(frozen=True)
class Part:
    """One matrix of a layer's score. ``share`` of the sum of the layer's alphas;
    ``without`` is the layer's score without it, None where it is the only one."""

    tensor: str
    role: str
    alpha: float
    se: float | None
    k: int | None
    k_low: int | None
    k_high: int | None
    share: float
    without: float | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class LayerParts:
    """A layer: the mean of its alphas with its standard error, and its parts, largest first."""

    layer: int
    prefix: str
    score: float | None
    se: float | None
    parts: tuple[Part, ...]


def explain(metrics: Metrics, layer: int | None = None) -> tuple[LayerParts, ...]:
    """The parts of every layer's PL_Alpha_Hill, or of one layer's.

    Raises:
        HtsrError: there is no such layer.
    """
    if layer is not None and not 0 <= layer < len(metrics.layers):
        raise HtsrError(
            f"There is no layer {layer}.", f"Layers are 0 to {len(metrics.layers) - 1}."
        )
    chosen = metrics.layers if layer is None else metrics.layers[layer : layer + 1]
    return tuple(
        _layer(row.layer, row.prefix, [m for m in metrics.matrices if m.layer == row.layer])
        for row in chosen
    )


def layer_number(metrics: Metrics, text: str) -> int:
    """A layer by its number, or by its name as ``model.layers.10``.

    Raises:
        HtsrError: there is none.
    """
    names = [layer.prefix for layer in metrics.layers]
    if text in names:
        return names.index(text)
    if text.isascii() and text.isdecimal() and int(text) < len(names):
        return int(text)
    raise HtsrError(
        f"There is no layer {text}.",
        f"Layers are 0 to {len(names) - 1}; {names[0]} is a name of the first." if names else None,
    )


def _layer(number: int, prefix: str, matrices: Sequence[Matrix]) -> LayerParts:
    fitted = [(m, m.pl_alpha_hill) for m in matrices if m.pl_alpha_hill is not None]
    if not fitted:
        return LayerParts(number, prefix, None, None, ())
    total, n = math.fsum(alpha for _, alpha in fitted), len(fitted)
    parts = [
        Part(
            m.tensor, m.role, alpha, m.alpha_se, m.k, m.k_low, m.k_high, alpha / total,
            (total - alpha) / (n - 1) if n > 1 else None, _reasons(m),
        )
        for m, alpha in sorted(fitted, key=lambda pair: -pair[1])
    ]  # fmt: skip
    errors = [part.se for part in parts if part.se is not None]
    se = math.hypot(*errors) / n if len(errors) == n else None
    return LayerParts(number, prefix, total / n, se, tuple(parts))


def _reasons(matrix: Matrix) -> tuple[str, ...]:
    """What makes an alpha uncertain: the choice of the tail's start, or a short tail."""
    jumps = "start" if matrix.start_jumps else ""
    short = "short" if matrix.short_tail else ""
    return tuple(said for said in (jumps, short) if said)
