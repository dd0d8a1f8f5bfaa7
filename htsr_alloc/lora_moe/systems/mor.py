"""MoR, Mixture of Ranks: one A and one B, scaled by vectors of each expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import experts, gates
from htsr_alloc.lora_moe.systems.base import BALANCE, Inputs, Shape, System, choose

ROUTERS = ("learnt", "mean")
STD = 0.02  # of the router's start, and of the noise around λ = 1


class Mor(System):
    """Δ(x) = s Σ_i g_i λ_Bi ⊙ B(λ_Ai ⊙ A x), g the softmax over all experts."""

    name = "mor"
    title = "MoR"
    reference = "Tang et al., MoR: Mixture of Ranks for Low-Rank Adaptation Tuning"
    trained = (*System.trained, "lambda_A", "lambda_B")
    has_top_k = False
    settings = (*BALANCE, "mor_router")
    defaults: ClassVar = {"lora_alpha": 32, "learning_rate": 2e-4}  # section 4.1
    balance_coef = 0.0
    feed_forward_only = True
    budget_knob = "rank"
    budget_experts = 8

    def check(self, config: Any) -> None:
        """The settings mor_*."""
        super().check(config)
        choose(config, "mor_router", ROUTERS)
        if config.system == self.name and config.mor_router == "mean" and config.aux_coef:
            raise HtsrError(
                "mor_router='mean' has no router to balance.", "Remove router_aux_loss_coef."
            )

    def routes(self, config: Any, n: int) -> bool:
        """Not with the Mean-Pooling router of table 4."""
        return n > 1 and config.mor_router == "learnt"

    def share(self, config: Any, n: int) -> float:
        """1 / N: Mean Pooling averages the experts."""
        return 1 / n

    def counted(self, routing: gates.Routing) -> Tensor:
        """The likeliest expert of each token, as in Switch's loss (table 4, Balanced Router)."""
        return F.one_hot(routing.logits.argmax(-1), routing.logits.shape[-1]).bool()

    def shapes(self, config: Any, n: int, d_in: int, d_out: int) -> dict[str, Shape]:
        """A (r, d_in), B (d_out, r), lambda_A (N, r), lambda_B (N, d_out)."""
        r, found = config.r, super().shapes(config, n, d_in, d_out)
        own = {"A": (r, d_in), "B": (d_out, r), "lambda_A": (n, r), "lambda_B": (n, d_out)}
        return {**found, **own}

    def start(self, own: Mapping[str, Tensor], config: Any, name: str, weight: Tensor) -> None:
        """A and the router normal, λ = 1 with a little noise."""
        super().start(own, config, name, weight)
        nn.init.normal_(own["A"], std=1 / config.r)
        if "router" in own:
            nn.init.normal_(own["router"], std=STD)
        for ones in ("lambda_A", "lambda_B"):
            nn.init.normal_(own[ones], mean=1.0, std=STD)

    def delta(self, layer: Any, adapter: str, result: Tensor, given: Inputs) -> Tensor:
        """Each rank of A x has the weight g_i λ_Ai, each row of B the factor λ_Bi."""
        hidden, gate = self.mix(layer, adapter, given)
        weights = gate.unsqueeze(-1) * layer.lora_moe_lambda_A[adapter]  # (..., N, r)
        b = experts.scaled_b(layer.lora_moe_B[adapter], layer.lora_moe_lambda_B[adapter])
        return experts.dense_experts(result, hidden, b, weights, layer.mixture[adapter].scale)

    def factors(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """The one A, and λ_Bi ⊙ B ⊙ λ_Ai side by side."""
        a, b = super().factors(layer, adapter)
        b = experts.scaled_b(b, layer.lora_moe_lambda_B[adapter].detach())  # (d_out, N r)
        return a, b * layer.lora_moe_lambda_A[adapter].detach().flatten()


SYSTEM = Mor()
