"""One adapted linear: the frozen base, and every adapter's experts and router on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import balance, gates
from htsr_alloc.lora_moe.config import LoraMoeConfig
from htsr_alloc.lora_moe.gated import GatedLora
from htsr_alloc.lora_moe.linears import adapter_dtype, base_weight, features
from htsr_alloc.lora_moe.state import RouterState
from htsr_alloc.lora_moe.systems import SYSTEMS, Product, System
from htsr_alloc.lora_moe.systems.base import Inputs


def _names(kind: str) -> tuple[str, ...]:
    names = (f"lora_moe_{name}" for s in SYSTEMS.values() for name in getattr(s, kind))
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Mixture:
    """What one adapter does on one linear; where each expert has a scale, ``scale`` is 1."""

    system: System
    config: LoraMoeConfig
    experts: int
    top_k: int
    scale: float


class LoraMoeLinear(nn.Module, BaseTunerLayer):
    """y = W₀x + Δ(x), Δ by the active adapters' systems.

    Each system names its parameters and their shapes; all have A, B and, where N > 1, a router
    (N, d_in). Those that are frozen are saved with the adapter too.
    """

    adapter_layer_names = _names("trained")
    frozen_names = _names("frozen")
    other_param_names = (*frozen_names, "lora_moe_dropout", "mixture", "aux_weight", "place")

    base_layer: nn.Module
    lora_moe_A: nn.ParameterDict
    lora_moe_B: nn.ParameterDict
    lora_moe_router: nn.ParameterDict

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
        # Where a router stands before a whole block: the block, and which of its experts this is.
        self.place: dict[str, tuple[str, int]] = {}
        self.router_aux_loss: Tensor | None = None  # weighted, of the latest training pass
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    def update_layer(self, adapter: str, config: LoraMoeConfig) -> None:
        """Add an adapter: its parameters in float32 (float64 on such a base), started.

        Raises:
            HtsrError: a weight that the system cannot adapt, or start from.
        """
        system, weight = SYSTEMS[config.system], base_weight(self.base_layer)
        system.admit(config, self.name, weight)
        n, dtype, own = config.experts_of(self.name), adapter_dtype(weight), {}
        found = system.shapes(config, n, self.in_features, self.out_features)
        for name, shape in found.items():
            values = torch.zeros(shape, dtype=dtype, device=weight.device)
            own[name] = nn.Parameter(values, requires_grad=name not in system.frozen)
            getattr(self, f"lora_moe_{name}")[adapter] = own[name]
        # With a probe the values come from a file; on the meta device there are none.
        if config.base_probe is None and weight.device.type != "meta":
            with torch.no_grad():
                system.start(own, config, self.name, weight)
        drop = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_moe_dropout[adapter] = drop
        scale = system.scale(config, self.in_features)
        self.mixture[adapter] = Mixture(system, config, n, config.top_k_of(self.name), scale)
        self.aux_weight[adapter] = 0.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base's output plus the active adapters', in the base's dtype. (..., d_out).

        Of a base that returns a tuple (I-BERT's do) the first is its output.
        """
        made = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return made
        if isinstance(made, tuple):
            return self.adapted(x, made[0]), *made[1:]
        return self.adapted(x, made)

    def adapted(self, x: Tensor, base: Tensor) -> Tensor:
        """W₀x, which is ``base``, plus the acting adapters' Δ(x). (..., d_out)."""
        if self.state.tenants is not None:
            return self.mixed(x, base)
        result = base
        for adapter in self.active_adapters:
            if adapter in self.mixture and not self.mixture[adapter].system.idle(self, adapter):
                result = self.adapt(result, x, adapter, base)
        return result.to(base.dtype)

    @property
    def acting(self) -> list[str]:
        """The adapters that answer now: those that a batch's rows name, or else the active ones."""
        tenants = self.state.tenants
        return self.active_adapters if tenants is None else list(dict.fromkeys(tenants.names))

    def mixed(self, x: Tensor, base: Tensor) -> Tensor:
        """W₀x plus, on each row of the batch, Δ(x) of that row's adapter. (..., d_out)."""
        tenants, now = self.state.tenants, self.state.current
        assert tenants is not None
        axis, rows = tenants.rows(x, now.batch, self.name, self.state.time_first)
        result = base
        for adapter, index in rows:
            if adapter in self.mixture:
                own = base.index_select(axis, index)
                made = self.adapt(own, x.index_select(axis, index), adapter, own, index)
                result = result.index_copy(axis, index, made.to(base.dtype))
        return result

    def adapt(
        self, result: Tensor, x: Tensor, adapter: str, base: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """``result`` plus Δ(x) of one adapter; ``base`` is W₀x. (..., d_out).

        Args:
            rows: which rows of the batch these are; None: all.
        """
        own = x
        if not torch.is_autocast_enabled(x.device.type):
            own = x.to(self.lora_moe_A[adapter].dtype)
        dropped = self.lora_moe_dropout[adapter](own) if self.training else own
        system = self.mixture[adapter].system
        return system.delta(self, adapter, result, Inputs(x, own, dropped, base, rows))

    def route(self, x: Tensor, adapter: str) -> gates.Routing:
        """The router's decision on every token of x (..., d_in); needs N > 1."""
        logits = gates.router_logits(x, self.lora_moe_router[adapter])
        return self.mixture[adapter].system.gate(self, adapter, logits, x)

    def balanced(self, routing: gates.Routing, adapter: str, masked: bool = True) -> Tensor:
        """The gate weights, with the balance loss's gradient attached while training.

        Args:
            masked: whether the router's rows are tokens, of which padding is left out.
        """
        weight = self.aux_weight[adapter]
        if not self.training or weight == 0:
            return routing.weights
        how, now = self.mixture[adapter], self.state.current
        loss = weight * balance.load_balance(
            routing.probs.flatten(0, -2),
            how.system.counted(routing).flatten(0, -2),
            self.state.mask(routing.weights.shape[:-1], self.name) if masked else None,
            how.top_k if how.system.has_top_k else 1,
        )
        self.router_aux_loss = loss.detach()
        return balance.inject(routing.weights, loss, now.scale)

    def products(self, adapter: str) -> Iterator[Product]:
        """The low-rank product of each expert of one adapter."""
        return self.mixture[adapter].system.products(self, adapter)

    def gated(self, adapter: str) -> GatedLora:
        """One adapter as one LoRA with gated ranks.

        Raises:
            HtsrError: EM-LoRA.
        """
        return self.mixture[adapter].system.gated(self, adapter)

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
