"""The activations g of EM-LoRA's routers: the learnable rational one, GeLU and ReLU."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

# Nearest to GeLU on [-12, 12], by tests/fixtures/make_activation.py: the error is at most 0.023
# there and 0.008 on [-3, 3].
LIMIT = 12.0
NUMERATOR = (
    -0.006208207452938619,
    0.5392645368657117,
    0.5305512004819593,
    0.1902858547029716,
    0.030841322020686252,
    0.0022806341624484997,
    6.322012607471272e-05,
)
DENOMINATOR = (
    0.2863979068359868,
    0.19006348883537932,
    0.047608559957482824,
    -0.0003706660166802316,
    0.0001788997441042691,
)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, limit: float = LIMIT) -> Tensor:
    """g(x) = Σ_{0..6} a_j x^j / (1 + |Σ_{1..5} b_i x^i|) (eq. 6), elementwise.

    Beyond ±limit g goes on with GeLU's slopes, 1 above and 0 below: at both ends eq. 6 itself tends
    to one and the same c |x|, and its gradient by a_6 grows as |x|.

    Args:
        numerator: (7,), a. denominator: (5,), b.
    """
    inside = x.clamp(-limit, limit)
    top = x.new_zeros(x.shape)
    for a in reversed(numerator.to(x.dtype).unbind()):
        top = top * inside + a
    bottom = x.new_zeros(x.shape)
    for b in reversed(denominator.to(x.dtype).unbind()):
        bottom = (bottom + b) * inside
    return top / (1 + bottom.abs()) + (x - limit).relu()


def unlimited(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Eq. 6 for every x."""
    return rational(x, numerator, denominator, math.inf)


@dataclass(frozen=True)
class Activation:
    """g, called with x and its parameters.

    Attributes:
        start: the parameters that each router has of its own, by name, and their first values.
    """

    apply: Callable[..., Tensor]
    start: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


_START = {"numerator": NUMERATOR, "denominator": DENOMINATOR}
ACTIVATIONS = {
    "rational": Activation(rational, _START),
    "rational_unlimited": Activation(unlimited, _START),
    "gelu": Activation(F.gelu),
    "relu": Activation(F.relu),
}


def names_in(setting: str) -> list[str]:
    """The names in the setting em_activation: one, or several with commas between."""
    return [name.strip() for name in setting.split(",")]


def at_depth(setting: str, layer: int, layers: int) -> Activation:
    """The activation of a layer: the names are for equal parts of the depth, first to last."""
    names = names_in(setting)
    return ACTIVATIONS[names[layer * len(names) // layers]]
