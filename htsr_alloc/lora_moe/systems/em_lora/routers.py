"""A router before each transformer layer, whose choice holds for a whole generation."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import init
from htsr_alloc.lora_moe.gates import Routing
from htsr_alloc.lora_moe.linears import block_of
from htsr_alloc.lora_moe.state import ENCODER, STATE, Generation, Pass, RouterState
from htsr_alloc.lora_moe.systems.em_lora import prompt
from htsr_alloc.lora_moe.systems.em_lora.generation import prompt_length, read_prompt


def attach(
    model: nn.Module, layers: Mapping[str, Any], adapter: str, config: Any, state: RouterState
) -> None:
    """Give every block a router over its adapted linears, held by the first of them.

    Parameters: router (N, d), pool (d,) for attention pooling, numerator (7,), denominator (5,).

    Raises:
        HtsrError: an encoder-decoder model, which has no single prompt.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise HtsrError("EM-LoRA routes by the prompt of a decoder-only model.")
    if not state.block_routers:
        state.before_pass.append(functools.partial(_open_pass, state))
        state.handles.append(_Generators(model))
    blocks: dict[str, list[Any]] = {}
    for name, layer in layers.items():
        blocks.setdefault(block_of(name), []).append(layer)
    for key, inside in blocks.items():
        for index, layer in enumerate(inside):
            layer.place[adapter] = (key, index)
        _add_router(model.get_submodule(key), inside[0], len(inside), adapter, config)
        if key not in state.block_routers:
            block = model.get_submodule(key)
            state.block_routers[key] = router = BlockRouter(key, state)
            state.handles.append(block.register_forward_pre_hook(router.open, with_kwargs=True))
            for child in block.children():
                state.handles.append(child.register_forward_pre_hook(router, with_kwargs=True))
        state.block_routers[key].hosts[adapter] = inside[0]


def _add_router(block: nn.Module, host: Any, n: int, adapter: str, config: Any) -> None:
    like, width = host.lora_moe_A[adapter], _width(block, host)
    weights = torch.zeros(n, width)
    if config.base_probe is None:
        init.init_a(weights, 1, True)
    numerator, denominator = prompt.gelu_start()
    own: dict[str, Any] = {"router": weights}
    if config.em_pooler == "attention":
        own["pool"] = torch.zeros(width)
    for name, values in {**own, "numerator": numerator, "denominator": denominator}.items():
        made = torch.as_tensor(values, dtype=like.dtype, device=like.device)
        getattr(host, f"lora_moe_{name}")[adapter] = nn.Parameter(made)
    host.set_adapter(host.active_adapters, inference_mode=config.inference_mode)


def _open_pass(state: RouterState, given: dict[str, Any], now: Pass, before: Pass) -> None:
    if state.by_prompt:
        read_prompt(given, given.get(ENCODER), now, before, state.generation)


def _width(block: nn.Module, host: Any) -> int:
    """d of the hidden states before a block: that of its first norm, or of its first linear."""
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if (
            isinstance(weight, Tensor)
            and weight.dim() == 1
            and "norm" in type(module).__name__.lower()
        ):
            return weight.shape[0]
    return host.in_features


class BlockRouter:
    """The hooks of a block: choose from its input at prefill, keep the choice afterwards.

    Gradient checkpointing may recompute a block without its own hooks, so the decision is made
    before the block's first module instead, which sees the block's input and lies inside.
    """

    def __init__(self, key: str, state: RouterState) -> None:
        self.key, self.state = key, state
        self.hosts: dict[str, Any] = {}  # by adapter, the linear that holds its router
        self.first: nn.Module | None = None
        self.pointer: int | None = None

    def active(self) -> list[str]:
        """The adapters that route here now."""
        return [
            adapter
            for adapter, host in self.hosts.items()
            if adapter in host.mixture and adapter in host.acting and not host.disable_adapters
        ]

    def open(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the block's input, by which its first module is known."""
        if self.first is None:
            self.pointer = _hidden(args, kwargs).data_ptr()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before each module of the block; only the first one counts."""
        now = self.state.current
        if self.first is None:
            if _hidden(args, kwargs).data_ptr() != self.pointer:
                raise HtsrError(
                    f"{self.key} changes its input before its first module, where EM-LoRA's router "
                    "would read it.",
                    "This architecture is not supported.",
                )
            self.first = module
        if module is not self.first:
            return
        hidden = _hidden(args, kwargs)  # (B, S, d)
        for adapter in self.active():
            place = (self.key, adapter)
            if now.prompt is not None:
                now.decisions[place] = self.decide(hidden, now.prompt, adapter)
            elif place not in now.decisions or len(now.decisions[place].weights) != len(hidden):
                raise HtsrError(
                    "EM-LoRA keeps the choice made at prefill, and none was made for this batch.",
                    "Run the prompt first, with the same rows, or use generate.",
                )

    def decide(self, hidden: Tensor, mask: Tensor, adapter: str) -> Routing:
        """Gate weights (B, N), with the balance loss over prompts attached while training."""
        host = self.hosts[adapter]
        config = host.mixture[adapter].config
        vector = host.lora_moe_pool[adapter] if config.em_pooler == "attention" else None
        routing = prompt.decide(
            prompt.pool(hidden, mask, config.em_pooler, vector),
            host.lora_moe_router[adapter],
            host.lora_moe_numerator[adapter],
            host.lora_moe_denominator[adapter],
            config.em_weighting,
        )
        return routing._replace(weights=host.balanced(routing, adapter, masked=False))


def _hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own generate, during which the choice on its prompt holds."""
    state: RouterState = getattr(self, STATE)
    outer, state.generation = state.generation, Generation(prompt_length(args, kwargs))
    try:
        return type(self).generate(self, *args, **kwargs)
    finally:
        state.generation = outer


def _init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own, which packs the texts of many requests into a row."""
    if getattr(self, STATE).by_prompt:
        raise HtsrError(
            "EM-LoRA makes one choice a prompt, and continuous batching packs several into a row.",
            "Use generate, without cache_implementation='paged'.",
        )
    return type(self).init_continuous_batching(self, *args, **kwargs)


GENERATORS = {"generate": _generate, "init_continuous_batching": _init_continuous_batching}


class _Generators:
    """The methods above on a model; ``remove`` gives it its own again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        for name, method in GENERATORS.items():
            if hasattr(model, name) and name not in model.__dict__:
                setattr(model, name, types.MethodType(method, model))

    def remove(self) -> None:
        """The model's methods are its class's again."""
        for name in GENERATORS:
            self.model.__dict__.pop(name, None)
