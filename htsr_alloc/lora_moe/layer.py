"""One adapted linear: the frozen base, and every adapter's experts and router on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import balance, experts, gates, init
from htsr_alloc.lora_moe.config import DENSE, GOAT, LoraMoeConfig
from htsr_alloc.lora_moe.linears import base_weight, features
from htsr_alloc.lora_moe.passes import RouterState


@dataclass(frozen=True)
class Mixture:
    """What one adapter does on one linear. ``scale`` is None where each expert has its own."""

    system: str
    experts: int
    top_k: int
    scale: float | None
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
    other_param_names = (
        "lora_moe_res_A",
        "lora_moe_res_B",
        "lora_moe_scale",
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
        for container in (*self.adapter_layer_names, *self.other_param_names[:3]):
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
        """Add an adapter: its parameters in float32 (float64 on such a base), started."""
        n, r = config.experts_of(self.name), config.r
        d_in, d_out = self.in_features, self.out_features
        system = config.system
        weight = base_weight(self.base_layer)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if not weight.is_floating_point():
            dtype = torch.float32

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))

        a_rows = r if system in DENSE else n * r
        self.lora_moe_A[adapter] = parameter(a_rows, d_in)
        self.lora_moe_B[adapter] = parameter(d_out, r if system == "mor" else n * r)
        if n > 1:
            self.lora_moe_router[adapter] = parameter(n, d_in)
        if system == "mor":
            self.lora_moe_lambda_A[adapter] = parameter(n, r)
            self.lora_moe_lambda_B[adapter] = parameter(n, d_out)
        if system == "adamole" and n > 1:
            self.lora_moe_tau[adapter] = parameter(1, d_in)
            self.lora_moe_tau_bias[adapter] = parameter(1)
        if config.em_dora:
            self.lora_moe_magnitude[adapter] = parameter(d_out)
        scale: float | None = config.lora_alpha / r
        if system in GOAT:
            if config.goat_scale == "theorem":
                scale = init.goat_scale(d_in, r, config.goat_eta)
            for container, like in (
                ("lora_moe_res_A", "lora_moe_A"),
                ("lora_moe_res_B", "lora_moe_B"),
            ):
                shape = getattr(self, like)[adapter].shape
                getattr(self, container)[adapter] = parameter(*shape).requires_grad_(False)
        if system == "goat_plus":
            self.lora_moe_scale[adapter] = parameter(n).requires_grad_(False)
        drop = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_moe_dropout[adapter] = drop
        if config.base_probe is None:  # else the weights come from a file
            self._start(adapter, config, weight, scale)
        self.mixture[adapter] = Mixture(
            system=system,
            experts=n,
            top_k=config.top_k_of(self.name),
            scale=None if system == "goat_plus" else scale,
            weighting=config.em_weighting,
            dora=config.em_dora,
        )
        self.aux_weight[adapter] = 0.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _start(
        self, adapter: str, config: LoraMoeConfig, weight: Tensor, scale: float | None
    ) -> None:
        a, system = self.lora_moe_A[adapter], config.system
        if a.device.type == "meta":
            return
        init.init_a(a, a.shape[0] // config.r, config.init_lora_weights)
        if adapter in self.lora_moe_router:
            init.init_a(self.lora_moe_router[adapter], 1, True)
        if adapter in self.lora_moe_tau:
            init.init_a(self.lora_moe_tau[adapter], 1, True)
        if system == "mor":
            nn.init.normal_(a, std=1 / config.r)
            if adapter in self.lora_moe_router:
                nn.init.normal_(self.lora_moe_router[adapter], std=init.ROUTER_STD)
            for ones in (self.lora_moe_lambda_A, self.lora_moe_lambda_B):
                nn.init.normal_(ones[adapter], mean=1.0, std=init.ROUTER_STD)
        if config.em_dora:
            self._refuse_quantised("EM-DoRA needs the norms of its rows")
            self.lora_moe_magnitude[adapter].copy_(weight.to(a.dtype).norm(dim=1))
        if system in GOAT:
            self._refuse_quantised("GOAT needs its singular values")
            n = config.experts_of(self.name)
            assert scale is not None
            try:
                start = init.goat_start(
                    weight,
                    n,
                    config.r,
                    segment=config.goat_segment,
                    scale=scale,
                    rho=config.goat_rho,
                    plus=system == "goat_plus",
                )
            except HtsrError as error:
                raise HtsrError(f"{self.name}: {error.message}", error.hint) from None
            a.copy_(start.a)
            self.lora_moe_B[adapter].copy_(start.b)
            self.lora_moe_res_A[adapter].copy_(start.a)
            self.lora_moe_res_B[adapter].copy_(
                start.b * (start.scales / n).repeat_interleave(config.r)
            )
            if system == "goat_plus":
                self.lora_moe_scale[adapter].copy_(start.scales)

    def _refuse_quantised(self, why: str) -> None:
        weight = base_weight(self.base_layer)
        if not weight.is_floating_point() or weight.shape != (self.out_features, self.in_features):
            raise HtsrError(
                f"{self.name} is quantised, and {why}, which its integers do not show.",
                "Make and save the adapter on the unquantised model, then load it on the "
                "quantised one; or use system='alphalora'.",
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output plus the active adapters', in the base's dtype. (..., d_out)."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.mixture:
                result = result + self.delta(x, adapter, result)
        return result.to(dtype)

    def delta(self, x: Tensor, adapter: str, base: Tensor) -> Tensor:
        """Δ(x) of one adapter. (..., d_out)."""
        how = self.mixture[adapter]
        a, b = self.lora_moe_A[adapter], self.lora_moe_B[adapter]
        x_a = x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)
        dropped = self.lora_moe_dropout[adapter](x_a)
        scale = self.lora_moe_scale[adapter] if how.scale is None else how.scale
        if how.experts == 1 and how.system == "mor":
            gate = scale * self.lora_moe_lambda_A[adapter]  # (1, r), the same for all tokens
            gate = gate.expand(*x.shape[:-1], *gate.shape)
            b = experts.scaled_b(b, self.lora_moe_lambda_B[adapter])
            out = experts.dense_experts(dropped, a, b, gate)
        elif how.experts == 1:
            out = F.linear(F.linear(dropped, a), b) * scale
            if how.system == "em_lora":
                out = self._chosen(out, adapter, base)
        else:
            gate = self._balanced(self.route(x, adapter), adapter, x.shape[:-1]) * scale
            if how.system == "mor":
                gate = gate.unsqueeze(-1) * self.lora_moe_lambda_A[adapter]  # (..., N, r)
                b = experts.scaled_b(b, self.lora_moe_lambda_B[adapter])
            out = experts.dense_experts(dropped, a, b, gate)
        if adapter in self.lora_moe_res_A:
            residual = F.linear(x_a, self.lora_moe_res_A[adapter])
            out = out - F.linear(residual, self.lora_moe_res_B[adapter])
        return out

    def _chosen(self, out: Tensor, adapter: str, base: Tensor) -> Tensor:
        """EM-LoRA: this linear's expert, weighted by its block's router. (B, S, d_out)."""
        key, index = self.em_place[adapter]
        decision = self.state.current.decisions.get((key, adapter))
        if decision is None or out.dim() != 3 or len(out) != len(decision):
            raise HtsrError(
                f"{self.name} was called without its layer's router or its (batch, token) shape.",
                "EM-LoRA needs the whole model.",
            )
        if self.mixture[adapter].dora:
            a, b = self.lora_moe_A[adapter], self.lora_moe_B[adapter]
            how = self.mixture[adapter]
            norm = experts.row_norm(base_weight(self.base_layer), a, b, how.scale or 0.0)
            bias = getattr(self.base_layer, "bias", None)
            clean = base.to(out.dtype) if bias is None else (base - bias).to(out.dtype)
            out = experts.dora_delta(clean, out, self.lora_moe_magnitude[adapter], norm)
        return out * decision[:, index].to(out.dtype).view(-1, 1, 1)

    def route(self, x: Tensor, adapter: str) -> gates.Routing:
        """The router's decision on every token of x (..., d_in); needs N > 1."""
        how = self.mixture[adapter]
        logits = gates.router_logits(x, self.lora_moe_router[adapter])  # (..., N)
        if how.system == "adamole":
            tau = self.lora_moe_tau[adapter]
            return gates.threshold(
                logits, gates.router_logits(x, tau, self.lora_moe_tau_bias[adapter])
            )
        if how.system in DENSE:
            return gates.dense_softmax(logits)
        return gates.top_k_softmax(logits, how.top_k)

    def _balanced(self, routing: gates.Routing, adapter: str, tokens: torch.Size) -> Tensor:
        """The gate weights, with the balance loss's gradient attached while training."""
        weight = self.aux_weight[adapter]
        if not self.training or weight == 0:
            return routing.weights
        how, now = self.mixture[adapter], self.state.current
        loss = weight * balance.load_balance(
            routing.probs.flatten(0, -2),
            routing.chosen.flatten(0, -2),
            now.mask(tokens, self.name),
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
        for container in (*self.adapter_layer_names, *self.other_param_names[:3]):
            parameters = getattr(self, container)
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name].data = parameters[adapter_name].data.to(target)
