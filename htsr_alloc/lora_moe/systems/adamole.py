"""AdaMoLE: experts whose probability is above a learnt threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from htsr_alloc.lora_moe import gates, init
from htsr_alloc.lora_moe.gated import GatedLora
from htsr_alloc.lora_moe.systems.base import BALANCE, Shape, System


class AdaMole(System):
    """g = relu(p − τ) renormalised, τ = σ(W_τ x + b) / N; a token may have no expert at all."""

    name = "adamole"
    title = "AdaMoLE"
    reference = "arXiv 2405.00361, eq. 6-8"
    trained = (*System.trained, "tau", "tau_bias")
    has_top_k = False
    settings = (*BALANCE, "init_lora_weights")
    budget_knob = "experts"

    def shapes(self, config: Any, n: int, d_in: int, d_out: int) -> dict[str, Shape]:
        """Also tau (1, d_in) and tau_bias (1,), where there is a choice."""
        found = super().shapes(config, n, d_in, d_out)
        return {**found, "tau": (1, d_in), "tau_bias": (1,)} if n > 1 else found

    def start(self, own: Mapping[str, Tensor], config: Any, name: str, weight: Tensor) -> None:
        """W_τ starts as the router does, its bias at 0."""
        super().start(own, config, name, weight)
        if "tau" in own:
            init.init_a(own["tau"], 1, True)

    def gate(self, layer: Any, adapter: str, logits: Tensor, x: Tensor) -> gates.Routing:
        """Experts above the threshold."""
        tau, bias = layer.lora_moe_tau[adapter], layer.lora_moe_tau_bias[adapter]
        return gates.threshold(logits, gates.router_logits(x, tau, bias))

    def gated(self, layer: Any, adapter: str) -> GatedLora:
        """With the threshold's tensors, where there is a choice."""
        made = super().gated(layer, adapter)
        if made.router is None:
            return made
        tau, bias = layer.lora_moe_tau[adapter], layer.lora_moe_tau_bias[adapter]
        return replace(made, gate="threshold", threshold=(tau.detach(), bias.detach()))


SYSTEM = AdaMole()
