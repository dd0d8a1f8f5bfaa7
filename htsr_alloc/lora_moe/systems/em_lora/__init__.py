"""EM-LoRA: one choice a prompt among the linears of a layer, each of which is one expert."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
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
from htsr_alloc.lora_moe.systems.em_lora.activation import ACTIVATIONS, names_in


class EmLora(System):
    """Δ(x) = g s B A x of a linear's one expert; g, of the prompt, by its layer's router."""

    name = "em_lora"
    title = "EM-LoRA"
    reference = "Efficient Mixture of Low-Rank Adaptation"
    trained = (*System.trained, "magnitude", "pool", "numerator", "denominator")
    top_k = 1
    format_version = 2
    before = MappingProxyType({"top_k": 1, "em_activation": "rational_unlimited"})
    settings = (
        "top_k",
        *BALANCE,
        "init_lora_weights",
        "em_pooler",
        "em_weighting",
        "em_activation",
        "em_dora",
    )
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
        for name in names_in(config.em_activation):
            if name not in ACTIVATIONS:
                raise HtsrError(
                    f"em_activation cannot be {name!r}.",
                    f"Choose from {', '.join(ACTIVATIONS)}; several with commas between are for "
                    "equal parts of the depth.",
                )
        if config.system == self.name and config.top_k_pattern:
            raise HtsrError(
                "EM-LoRA's top_k counts linears of a layer, and top_k_pattern experts of a linear.",
                "Remove top_k_pattern.",
            )
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

    def idle(self, layer: Any, adapter: str) -> bool:
        """Whether no row of the batch chose this linear, as far as is known without waiting."""
        block, index = layer.place[adapter]
        used = layer.state.current.decisions.used.get((block, adapter))
        return used is not None and not used[index] and not torch.compiler.is_compiling()

    def delta(self, layer: Any, adapter: str, result: Tensor, given: Inputs) -> Tensor:
        """This linear's expert, weighted by its layer's router. (B, ..., d_out) or (B S, d_out)."""
        how, a, b = layer.mixture[adapter], layer.lora_moe_A[adapter], layer.lora_moe_B[adapter]
        hidden = F.linear(given.dropped, a)
        block, index = layer.place[adapter]
        routing = layer.state.current.decisions.get((block, adapter))
        gate = None if routing is None else routing.weights[:, index].to(hidden.dtype)  # (B,)
        if gate is not None and hidden.dim() == 2:  # OPT's feed-forward: all rows' tokens in a line
            gate = gate.repeat_interleave(layer.state.block_routers[block].shape[1])
        if gate is not None and given.rows is not None:
            gate = gate[given.rows]
        if gate is None or len(gate) != len(hidden):
            raise HtsrError(
                f"{layer.name} was called without its layer's router or its (batch, token) shape.",
                "EM-LoRA needs the whole model, and linears that see all tokens.",
            )
        gate = gate.view(-1, *[1] * (hidden.dim() - 1))
        if not how.config.em_dora:
            return experts.add_product(result, hidden * gate, b, how.scale)
        low_rank = F.linear(hidden, b) * how.scale
        bias = getattr(layer.base_layer, "bias", None)
        clean = (given.base if bias is None else given.base - bias).to(low_rank.dtype)
        magnitude = layer.lora_moe_magnitude[adapter]
        return result + gate * experts.dora_delta(
            clean, low_rank, magnitude, self._norm(layer, adapter)
        )

    def _norm(self, layer: Any, adapter: str) -> Tensor:
        """DoRA's row norms, (d_out,); computed once for the passes after a prompt's."""
        kept = layer.state.current.decisions.kept
        if (layer.name, adapter) in kept:
            return kept[layer.name, adapter]
        a, b = layer.lora_moe_A[adapter], layer.lora_moe_B[adapter]
        norm = experts.row_norm(base_weight(layer.base_layer), a, b, layer.mixture[adapter].scale)
        if layer.state.current.prompt is None and not torch.compiler.is_compiling():
            kept[layer.name, adapter] = norm
        return norm

    def products(self, layer: Any, adapter: str) -> Iterator[Product]:
        """As ``base``'s; DoRA's weight is not a sum."""
        for product in super().products(layer, adapter):
            yield replace(product, sums=not layer.mixture[adapter].config.em_dora)

    def serves(self) -> None:
        """Its gate is one choice a prompt, which no single token shows."""
        raise HtsrError(
            "EM-LoRA chooses by the whole prompt, and a server's layers see parts of prompts "
            "without their owners.",
            "Answer its prompts with htsr generate, or serve what htsr collapse makes of it.",
        )


SYSTEM = EmLora()
