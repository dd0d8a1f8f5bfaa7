"""GOAT+: GOAT with a scale for each expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from htsr_alloc.lora_moe.systems.base import Inputs, Product, Shape
from htsr_alloc.lora_moe.systems.goat import Goat


class GoatPlus(Goat):
    """Expert i has the scale s_i = s_1 √(σ_1 / σ_i), σ_i the sum of its segment's values."""

    name = "goat_plus"
    title = "GOAT+"
    reference = "arXiv 2502.16894, appendix D, eq. 79-83"
    frozen = (*Goat.frozen, "scale")
    plus = True

    def shapes(self, config: Any, n: int, d_in: int, d_out: int) -> dict[str, Shape]:
        """Also scale (N,)."""
        return {**super().shapes(config, n, d_in, d_out), "scale": (n,)}

    def scale(self, config: Any, d_in: int) -> float:
        """1: each expert has its own."""
        return 1.0

    def mix(self, layer: Any, adapter: str, given: Inputs) -> tuple[Tensor, Tensor]:
        """Gate weights times scales."""
        hidden, gate = super().mix(layer, adapter, given)
        return hidden, gate * layer.lora_moe_scale[adapter]

    def products(self, layer: Any, adapter: str) -> Iterator[Product]:
        """As GOAT's, with each expert's scale."""
        scales = layer.lora_moe_scale[adapter].tolist()
        for product, scale in zip(super().products(layer, adapter), scales, strict=True):
            yield replace(product, scale=scale)


SYSTEM = GoatPlus()
