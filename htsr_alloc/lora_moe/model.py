"""The PEFT tuner: puts the layers in, and what they share around them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import probe
from htsr_alloc.lora_moe.config import LoraMoeConfig, matches
from htsr_alloc.lora_moe.layer import LoraMoeLinear
from htsr_alloc.lora_moe.linears import base_weight, block_of, feed_forward, left_out
from htsr_alloc.lora_moe.passes import PassHooks
from htsr_alloc.lora_moe.register import NAME, register
from htsr_alloc.lora_moe.state import STATE, RouterState
from htsr_alloc.lora_moe.systems import SYSTEMS
from htsr_alloc.lora_moe.tenants import BASE, Tenants


class LoraMoeModel(BaseTuner):
    """Adapts a model's linears; made by ``get_peft_model`` and ``PeftModel.from_pretrained``."""

    prefix = NAME + "_"
    tuner_layer_cls = LoraMoeLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call, with its hooks, which peft 0.20 would leave out."""
        return self.model(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's door for ``adapter_names``, in forward and in generate.

        Raises:
            HtsrError: an adapter that the model does not have, another number of names than rows,
                or a model in training.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        state, wrappers = state_of(self.model), []
        state.tenants = tenants = self._tenants(names, [*args, *kwargs.values()])

        def name_rows(module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
            return given, {**named, "adapter_names": tenants.repeated(len(given[0]))}

        for module in self.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                wrappers.append(module.register_forward_pre_hook(name_rows, with_kwargs=True))
        try:
            yield
        finally:
            state.tenants = None
            for handle in wrappers:
                handle.remove()

    def _tenants(self, names: Any, given: list[Any]) -> Tenants:
        if self.training:
            raise HtsrError("adapter_names cannot be used in training.", "Call model.eval().")
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise HtsrError(f"adapter_names must be a list of names, not {names!r}.")
        known = sorted({name for layer in layers_of(self.model) for name in layer.mixture})
        for name in names:
            if name != BASE and name not in known:
                raise HtsrError(
                    f"adapter_names has {name!r}, and the model has no such adapter.",
                    f"Choose from {', '.join([*known, BASE])}.",
                )
        tenants = Tenants(names)
        for x in given:  # of generate, before it repeats the rows; forward may hide its own
            if isinstance(x, Tensor) and x.dim() > 1:
                tenants.check(len(x))
        return tenants

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> PeftConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = ALL_LINEAR
            system = SYSTEMS[peft_config.system]
            if system.feed_forward_only:
                peft_config.target_modules = set(feed_forward(self.model))
                if not peft_config.target_modules:
                    raise HtsrError(
                        f"{system.title} adapts feed-forward linears, and the model has none.",
                        "Name some in target_modules.",
                    )
        if str(peft_config.target_modules).lower() == ALL_LINEAR:
            _maybe_include_all_linear_layers(peft_config, self.model)
            peft_config.target_modules -= left_out(self.model).keys()
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool | re.Match[str] | None:
        found = check_target_module_exists(peft_config, key)
        if found and peft_config.experts_of(key) == 0:
            return False
        return found

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.base_layer if isinstance(target, LoraMoeLinear) else target
        if peft_config.base_probe is not None and peft_config.check_base:
            probe.check(peft_config.base_probe, current_key, base)
        if isinstance(target, LoraMoeLinear):
            target.update_layer(adapter_name, peft_config)
            return
        layer = LoraMoeLinear(base, current_key, state_of(self.model))  # type: ignore[arg-type]
        layer._active_adapter = self.active_adapter
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)  # parameters were made on the right device
        if not isinstance(new_module, LoraMoeLinear):  # unloading
            new_module.requires_grad_(False)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any):
        """As PEFT's, then: patterns that matched nothing are refused, losses weighted."""
        # A copy: the probe in it is of this model's base, and one config may be for several models.
        config: Any = copy.copy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = {m.name: m for m in layers_of(model) if adapter_name in m.mixture}
        for kind in ("expert_pattern", "top_k_pattern"):
            for pattern, value in getattr(config, kind).items():
                zero = kind == "expert_pattern" and value == 0
                names = [n for n, _ in model.named_modules()] if zero else layers
                if not any(matches(pattern, name) for name in names):
                    raise HtsrError(
                        f"{kind}: {pattern!r} matches no adapted module.",
                        f"The first adapted module is {next(iter(layers))}.",
                    )
        SYSTEMS[config.system].attach(model, layers, adapter_name, config, state_of(model))
        _weigh_losses(layers, adapter_name, config)
        config._probe = config.base_probe or {
            name: probe.take(layer.base_layer) for name, layer in layers.items()
        }

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are float32 already; ``autocast_adapter_dtype=False`` takes the base's dtype."""
        if autocast_adapter_dtype:
            return
        for layer in layers_of(self.model):
            dtype = base_weight(layer.base_layer).dtype
            if dtype.is_floating_point:
                for name in (*layer.adapter_layer_names, *layer.frozen_names):
                    parameters = getattr(layer, name)
                    if adapter_name in parameters:
                        parameters[adapter_name].data = parameters[adapter_name].data.to(dtype)

    def unload(self) -> torch.nn.Module:
        """The base model as it was: no adapter, no hook."""
        model = super().unload()
        state: RouterState | None = model.__dict__.pop(STATE, None)
        for handle in state.handles if state is not None else ():
            handle.remove()
        return model

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always refused: routers cannot be added up."""
        raise HtsrError(
            "Adapters with routers cannot be combined into one.",
            "base_model.set_adapter([...]) adds up the outputs of several.",
        )

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """Always refused."""
        next(layers_of(self.model)).merge()
        raise AssertionError


def layers_of(model: nn.Module):
    """The adapted linears of a model."""
    return (m for m in model.modules() if isinstance(m, LoraMoeLinear))


def state_of(model: nn.Module) -> RouterState:
    """The state that the model's layers share; on first use its hooks are put on the model."""
    state = getattr(model, STATE, None)
    if state is None:
        state = RouterState(model)
        hooks = PassHooks(model, state)
        eager: Any = torch.compiler.disable  # the hooks keep counts that a graph cannot
        setattr(model, STATE, state)
        state.handles = [
            model.register_forward_pre_hook(eager(hooks.before), with_kwargs=True),
            model.register_forward_hook(eager(hooks.after), with_kwargs=True),
        ]
    return state


def _weigh_losses(layers: dict[str, LoraMoeLinear], adapter: str, config: LoraMoeConfig) -> None:
    """Each router's weight in the sum, by router_aux_loss_reduction."""
    routed = {n: m for n, m in layers.items() if adapter in m.lora_moe_router}
    for name, layer in routed.items():
        same = [n for n in routed if block_of(n) == block_of(name)]
        parts = {"sum": 1, "mean": len(routed), "layers": len(same)}
        layer.aux_weight[adapter] = config.aux_coef / parts[config.router_aux_loss_reduction]


register(LoraMoeConfig, LoraMoeModel)
