"""One adapted linear: the frozen base, and every adapter's experts and router on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import balance, experts, gates, parameters
from htsr_alloc.lora_moe.config import DENSE, GOAT, LoraMoeConfig
from htsr_alloc.lora_moe.linears import base_weight, features, is_plain
from htsr_alloc.lora_moe.state import RouterState


@dataclass(frozen=True)
class Mixture:
    """What one adapter does on one linear; where each expert has a scale, ``scale`` is 1."""

    system: str
    experts: int
    top_k: int
    scale: float
    weighting: str = "prob"
    dora: bool = False


class LoraMoeLinear(nn.Module, BaseTunerLayer):
    """y = W₀x + Δ(x), Δ by the active adapters' systems (METHODS 4).

    Shapes by adapter: A (N r, d_in), or (r, d_in) shared; B (d_out, N r), or (d_out, r) for MoR;
    router (N, d_in), absent where N = 1; lambda_A (N, r); lambda_B (N, d_out). For GOAT the
    frozen res_A (N r, d_in) and res_B (d_out, N r) hold W_res = res_B res_A, which is taken off
    in the forward pass and never from W₀: the base's weight stays exact, whatever its dtype.
    """

    adapter_layer_names = (
        "lora_moe_A",
        "lora_moe_B",
        "lora_moe_router",
        "lora_moe_lambda_A",
        "lora_moe_lambda_B",
        "lora_moe_tau",
        "lora_moe_tau_bias",
        "lora_moe_magnitude",
        "lora_moe_pool",
        "lora_moe_numerator",
        "lora_moe_denominator",
    )
    frozen_names = tuple(f"lora_moe_{name}" for name in parameters.FROZEN)
    other_param_names = (
        *frozen_names,
        "lora_moe_dropout",
        "mixture",
        "aux_weight",
        "em_place",
        "em_pooler",
    )

    base_layer: nn.Module
    lora_moe_A: nn.ParameterDict
    lora_moe_B: nn.ParameterDict
    lora_moe_router: nn.ParameterDict
    lora_moe_lambda_A: nn.ParameterDict
    lora_moe_lambda_B: nn.ParameterDict
    lora_moe_tau: nn.ParameterDict
    lora_moe_tau_bias: nn.ParameterDict
    lora_moe_magnitude: nn.ParameterDict
    lora_moe_pool: nn.ParameterDict
    lora_moe_numerator: nn.ParameterDict
    lora_moe_denominator: nn.ParameterDict
    lora_moe_res_A: nn.ParameterDict
    lora_moe_res_B: nn.ParameterDict
    lora_moe_scale: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, name: str, state: RouterState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.state = state
        self.in_features, self.out_features = features(base_layer, name)
        for container in (*self.adapter_layer_names, *self.frozen_names):
            setattr(self, container, nn.ParameterDict())
        self.lora_moe_dropout = nn.ModuleDict()
        self.mixture: dict[str, Mixture] = {}
        self.aux_weight: dict[str, float] = {}
        self.em_place: dict[str, tuple[str, int]] = {}  # the block, and which expert of it
        self.em_pooler: dict[str, str] = {}  # where this linear holds its block's router
        self.router_aux_loss: Tensor | None = None  # weighted, of the latest training pass
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def update_layer(self, adapter: str, config: LoraMoeConfig) -> None:
        """Add an adapter: its parameters in float32 (float64 on such a base), started.

        Raises:
            HtsrError: EM-DoRA, or the start of GOAT, on a quantised base.
        """
        n, weight = config.experts_of(self.name), base_weight(self.base_layer)
        if config.em_dora and not is_plain(weight):
            raise HtsrError(
                f"{self.name} is quantised, and EM-DoRA needs the norms of its rows in every pass, "
                "which its integers do not show.",
                "Leave em_dora out, or use the unquantised model.",
            )
        dtype, own = parameters.dtype_of(weight), {}
        found = parameters.shapes(config, n, self.in_features, self.out_features)
        for name, shape in found.items():
            values = torch.zeros(shape, dtype=dtype, device=weight.device)
            own[name] = nn.Parameter(values, requires_grad=name not in parameters.FROZEN)
            getattr(self, f"lora_moe_{name}")[adapter] = own[name]
        # With a probe the values come from a file; on the meta device there are none.
        if config.base_probe is None and weight.device.type != "meta":
            parameters.start(own, config, self.name, weight)
        drop = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_moe_dropout[adapter] = drop
        self.mixture[adapter] = Mixture(
            system=config.system,
            experts=n,
            top_k=config.top_k_of(self.name),
            scale=1.0 if "scale" in own else parameters.scale_of(config, self.in_features),
            weighting=config.em_weighting,
            dora=config.em_dora,
        )
        self.aux_weight[adapter] = 0.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus the active adapters', in the base's dtype. (..., d_out)."""
        base = result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return base
        for adapter in self.active_adapters:
            if adapter in self.mixture:
                result = self.adapt(result, x, adapter, base)
        return result.to(base.dtype)

    def adapt(self, result: Tensor, x: Tensor, adapter: str, base: Tensor) -> Tensor:
        """``result`` plus Δ(x) of one adapter; ``base`` is W₀x. (..., d_out)."""
        how = self.mixture[adapter]
        a, b = self.lora_moe_A[adapter], self.lora_moe_B[adapter]
        autocast = torch.is_autocast_enabled(x.device.type)
        x_a = x if autocast else x.to(a.dtype)
        dropped = self.lora_moe_dropout[adapter](x_a) if self.training else x_a
        if how.system in GOAT:
            residual = F.linear(x_a, self.lora_moe_res_A[adapter])
            result = experts.add_product(result, residual, self.lora_moe_res_B[adapter], -1.0)
        if how.system == "em_lora":
            return self._add_chosen(result, F.linear(dropped, a), adapter, base)
        if how.experts == 1:
            hidden = F.linear(dropped, a)
            gate = torch.ones_like(hidden[..., :1])
        else:
            router = self.lora_moe_router[adapter]
            if dropped is x_a and not autocast and gates.is_wide(a.dtype):
                hidden, logits = experts.project(x_a, a, router)
            else:
                hidden, logits = F.linear(dropped, a), gates.router_logits(x, router)
            gate = self._balanced(self._gate(logits, x, adapter), adapter)
        if how.system == "goat_plus":
            gate = gate * self.lora_moe_scale[adapter]
        if how.system == "mor":
            gate = gate.unsqueeze(-1) * self.lora_moe_lambda_A[adapter]  # (..., N, r)
            b = experts.scaled_b(b, self.lora_moe_lambda_B[adapter])
        return experts.dense_experts(result, hidden, b, gate, how.scale)

    def _add_chosen(self, result: Tensor, hidden: Tensor, adapter: str, base: Tensor) -> Tensor:
        """EM-LoRA: this linear's expert, weighted by its block's router. (B, S, d_out)."""
        key, index = self.em_place[adapter]
        decision = self.state.current.decisions.get((key, adapter))
        if decision is None or hidden.dim() != 3 or len(hidden) != len(decision):
            raise HtsrError(
                f"{self.name} was called without its layer's router or its (batch, token) shape.",
                "EM-LoRA needs the whole model.",
            )
        how, gate = self.mixture[adapter], decision[:, index].to(hidden.dtype).view(-1, 1, 1)
        a, b = self.lora_moe_A[adapter], self.lora_moe_B[adapter]
        if not how.dora:
            return experts.add_product(result, hidden * gate, b, how.scale)
        low_rank = F.linear(hidden, b) * how.scale
        bias = getattr(self.base_layer, "bias", None)
        clean = base.to(low_rank.dtype) if bias is None else (base - bias).to(low_rank.dtype)
        norm = experts.row_norm(base_weight(self.base_layer), a, b, how.scale)
        magnitude = self.lora_moe_magnitude[adapter]
        return result + gate * experts.dora_delta(clean, low_rank, magnitude, norm)

    def route(self, x: Tensor, adapter: str) -> gates.Routing:
        """The router's decision on every token of x (..., d_in); needs N > 1."""
        return self._gate(gates.router_logits(x, self.lora_moe_router[adapter]), x, adapter)

    def _gate(self, logits: Tensor, x: Tensor, adapter: str) -> gates.Routing:
        how = self.mixture[adapter]
        if how.system == "adamole":
            tau, bias = self.lora_moe_tau[adapter], self.lora_moe_tau_bias[adapter]
            return gates.threshold(logits, gates.router_logits(x, tau, bias))
        if how.system in DENSE:
            return gates.dense_softmax(logits)
        return gates.top_k_softmax(logits, how.top_k)

    def _balanced(self, routing: gates.Routing, adapter: str) -> Tensor:
        """The gate weights, with the balance loss's gradient attached while training."""
        weight = self.aux_weight[adapter]
        if not self.training or weight == 0:
            return routing.weights
        how, now = self.mixture[adapter], self.state.current
        loss = weight * balance.load_balance(
            routing.probs.flatten(0, -2),
            routing.chosen.flatten(0, -2),
            now.mask(routing.weights.shape[:-1], self.name),
            1 if how.system == "adamole" else how.top_k,
        )
        self.router_aux_loss = loss.detach()
        return balance.inject(routing.weights, loss, now.scale)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always refused."""
        raise HtsrError(
            "Experts chosen token by token cannot be merged into one weight.",
            "collapse(model, batches) makes a plain LoRA of the mean gate, approximately.",
        )

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To the base's device; the dtype stays float32, unlike PEFT's own layers."""
        target = device or base_weight(self.base_layer).device
        for container in (*self.adapter_layer_names, *self.frozen_names):
            own = getattr(self, container)
            if adapter_name in own and own[adapter_name].device.type != "meta":
                own[adapter_name].data = own[adapter_name].data.to(target)
