"""EM-LoRA: one choice a prompt among the linears of a layer, each of which is one expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import experts
from htsr_alloc.lora_moe.linears import base_weight, is_plain
from htsr_alloc.lora_moe.systems.base import (
    BALANCE,
    Inputs,
    Product,
    Shape,
    System,
    choose,
)
from htsr_alloc.lora_moe.systems.em_lora import prompt, routers


class EmLora(System):
    """Δ(x) = g s B A x of a linear's one expert; g, of the prompt, by its layer's router."""

    name = "em_lora"
    title = "EM-LoRA"
    reference = "Efficient Mixture of Low-Rank Adaptation"
    trained = (*System.trained, "magnitude", "pool", "numerator", "denominator")
    has_top_k = False
    settings = (*BALANCE, "init_lora_weights", "em_pooler", "em_weighting", "em_dora")
    defaults: ClassVar = {"r": 32, "learning_rate": 1e-4}  # section 4.3 and the appendix
    balance_coef = 1e-2
    takes_allocation = False
    budget_knob = "rank"
    bilevel = True

    def check(self, config: Any) -> None:
        """The settings em_*."""
        super().check(config)
        choose(config, "em_pooler", prompt.POOLERS)
        choose(config, "em_weighting", prompt.WEIGHTINGS)
        if config.em_dora and config.system != self.name:
            raise HtsrError("em_dora is EM-LoRA's variant.", "Set system='em_lora'.")

    def admit(self, config: Any, name: str, weight: Tensor) -> None:
        """DoRA needs the values of the weight."""
        if config.em_dora and not is_plain(weight):
            raise HtsrError(
                f"{name} is quantised, and EM-DoRA needs the norms of its rows in every pass, "
                "which the quantised weight does not give.",
                "Remove em_dora, or use the unquantised model.",
            )

    def count(self, config: Any, listed: int | None) -> int:
        """1, or 0 where expert_pattern says so."""
        return 1 if listed is None else min(listed, 1)

    def shapes(self, config: Any, n: int, d_in: int, d_out: int) -> dict[str, Shape]:
        """Also magnitude (d_out,) for EM-DoRA; a layer's router is made by ``attach``."""
        found = super().shapes(config, n, d_in, d_out)
        return {**found, "magnitude": (d_out,)} if config.em_dora else found

    def start(self, own: Mapping[str, Tensor], config: Any, name: str, weight: Tensor) -> None:
        """The magnitude starts as the weight's row norms."""
        super().start(own, config, name, weight)
        if config.em_dora:
            own["magnitude"].copy_(weight.to(own["A"].dtype).norm(dim=1))

    def attach(
        self, model: nn.Module, layers: Mapping[str, Any], adapter: str, config: Any, state: Any
    ) -> None:
        """A router before each transformer layer."""
        routers.attach(model, layers, adapter, config, state)

    def delta(self, layer: Any, adapter: str, result: Tensor, given: Inputs) -> Tensor:
        """This linear's expert, weighted by its layer's router. (B, S, d_out)."""
        how, a, b = layer.mixture[adapter], layer.lora_moe_A[adapter], layer.lora_moe_B[adapter]
        hidden = F.linear(given.dropped, a)
        block, index = layer.place[adapter]
        routing = layer.state.current.decisions.get((block, adapter))
        weights = None if routing is None else routing.weights  # (B, N)
        if weights is not None and given.rows is not None:
            weights = weights[given.rows]
        if weights is None or hidden.dim() != 3 or len(hidden) != len(weights):
            raise HtsrError(
                f"{layer.name} was called without its layer's router or its (batch, token) shape.",
                "EM-LoRA needs the whole model.",
            )
        gate = weights[:, index].to(hidden.dtype).view(-1, 1, 1)
        if not how.config.em_dora:
            return experts.add_product(result, hidden * gate, b, how.scale)
        low_rank = F.linear(hidden, b) * how.scale
        bias = getattr(layer.base_layer, "bias", None)
        clean = (given.base if bias is None else given.base - bias).to(low_rank.dtype)
        norm = experts.row_norm(base_weight(layer.base_layer), a, b, how.scale)
        magnitude = layer.lora_moe_magnitude[adapter]
        return result + gate * experts.dora_delta(clean, low_rank, magnitude, norm)

    def products(self, layer: Any, adapter: str) -> Iterator[Product]:
        """As ``base``'s; DoRA's weight is not a sum."""
        for product in super().products(layer, adapter):
            yield replace(product, sums=not layer.mixture[adapter].config.em_dora)


SYSTEM = EmLora()
