"""A router before each transformer layer, whose choice holds for a whole generation."""

from __future__ import annotations

import functools
import re
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
from htsr_alloc.lora_moe.systems.em_lora.activation import Activation, at_depth
from htsr_alloc.lora_moe.systems.em_lora.generation import prompt_length, read_prompt


def attach(
    model: nn.Module, layers: Mapping[str, Any], adapter: str, config: Any, state: RouterState
) -> None:
    """Give every block a router over its adapted linears, held by the first of them.

    Parameters: router (N, d), pool (d,) for attention pooling, and the activation's.

    Raises:
        HtsrError: an encoder-decoder model, which has no single prompt; a linear that is in no
            layer, or does not see all tokens.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise HtsrError("EM-LoRA routes by the prompt of a decoder-only model.")
    if not state.block_routers:
        state.before_pass.append(functools.partial(_open_pass, state))
        state.handles.append(_Generators(model))
    blocks: dict[str, list[Any]] = {}
    for name, layer in layers.items():
        _refuse(name, block_of(name))
        blocks.setdefault(block_of(name), []).append(layer)
    for key, inside in blocks.items():
        for index, layer in enumerate(inside):
            layer.place[adapter] = (key, index)
        stack, _, number = key.rpartition(".")
        depth = int(number), len(model.get_submodule(stack))  # type: ignore[arg-type]
        activation = at_depth(config.em_activation, *depth)
        _add_router(model, inside[0], len(inside), adapter, activation)
        if key not in state.block_routers:
            block = model.get_submodule(key)
            state.block_routers[key] = router = BlockRouter(key, state)
            state.handles.append(block.register_forward_pre_hook(router.open, with_kwargs=True))
            for child in block.children():
                state.handles.append(child.register_forward_pre_hook(router, with_kwargs=True))
        state.block_routers[key].hosts[adapter] = (inside[0], activation)


def _refuse(name: str, block: str) -> None:
    hint = f"Exclude it: exclude_modules=[{name!r}]."
    if not block.rpartition(".")[2].isdigit():
        raise HtsrError(
            f"EM-LoRA's experts are the linears of a transformer layer, and {name} is in none.",
            hint,
        )
    if re.search(r"(^|\.)experts\.\d+\.", name.removeprefix(block)):
        raise HtsrError(
            f"EM-LoRA chooses for a whole prompt, and {name} sees only the tokens that the model's "
            "own router gives it.",
            hint,
        )


def _add_router(model: nn.Module, host: Any, n: int, adapter: str, activation: Activation) -> None:
    like, config = host.lora_moe_A[adapter], host.mixture[adapter].config
    width = _width(model, host)
    weights = torch.zeros(n, width)
    if config.base_probe is None:
        init.init_a(weights, 1, True)
    own: dict[str, Any] = {"router": weights, **activation.start}
    if config.em_pooler == "attention":
        own["pool"] = torch.zeros(width)
    for name, values in own.items():
        made = torch.as_tensor(values, dtype=like.dtype, device=like.device)
        getattr(host, f"lora_moe_{name}")[adapter] = nn.Parameter(made)
    host.set_adapter(host.active_adapters, inference_mode=config.inference_mode)


def _open_pass(state: RouterState, given: dict[str, Any], now: Pass, before: Pass) -> None:
    if state.by_prompt:
        read_prompt(given, given.get(ENCODER), now, before, state.generation)


def _width(model: nn.Module, host: Any) -> int:
    """d of the hidden states before a block: the configuration's, or that of its first linear."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None) or host.in_features


class BlockRouter:
    """The hooks of a block: choose from its input at prefill, keep the choice afterwards.

    Gradient checkpointing may recompute a block without its own hooks, so the decision is made
    before the block's first module instead, which sees the block's input and lies inside.
    """

    def __init__(self, key: str, state: RouterState) -> None:
        self.key, self.state = key, state
        # By adapter, the linear that holds its router, and its activation.
        self.hosts: dict[str, tuple[Any, Activation]] = {}
        self.shape: tuple[int, int] = (0, 0)  # (B, S) of the latest pass
        self.first: nn.Module | None = None
        self.pointer: int | None = None

    def active(self) -> list[str]:
        """The adapters that route here now."""
        return [
            adapter
            for adapter, (host, _) in self.hosts.items()
            if adapter in host.mixture and adapter in host.acting and not host.disable_adapters
        ]

    def open(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the block's input, by which its first module is known."""
        if self.first is None:
            self.pointer = _hidden(args, kwargs, self.key).data_ptr()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before each module of the block; only the first one counts."""
        now = self.state.current
        if self.first is None:
            if _hidden(args, kwargs, self.key).data_ptr() != self.pointer:
                raise HtsrError(
                    f"{self.key} changes its input before its first module, where EM-LoRA's router "
                    "would read it.",
                    "This architecture is not supported.",
                )
            self.first = module
        if module is not self.first:
            return
        hidden = _hidden(args, kwargs, self.key)  # (B, S, d)
        self.shape = (hidden.shape[0], hidden.shape[1])
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
        host, activation = self.hosts[adapter]
        config, router = host.mixture[adapter].config, host.lora_moe_router[adapter]
        if hidden.shape[:2] != mask.shape or hidden.shape[-1] != router.shape[1]:
            raise HtsrError(
                f"{self.key} reads {tuple(hidden.shape)}, and EM-LoRA's router needs the prompt's "
                f"hidden states {(*mask.shape, router.shape[1])}.",
                "Adapt the language model's layers only (target_modules).",
            )
        vector = host.lora_moe_pool[adapter] if config.em_pooler == "attention" else None
        own = {name: getattr(host, f"lora_moe_{name}")[adapter] for name in activation.start}
        routing = prompt.decide(
            prompt.pool(hidden, mask, config.em_pooler, vector),
            router,
            functools.partial(activation.apply, **own),
            config.em_weighting,
            config.top_k,
        )
        return routing._replace(weights=host.balanced(routing, adapter, masked=False))


def _hidden(args: tuple, kwargs: dict[str, Any], block: str) -> Tensor:
    """The first tensor that a module is called with, (B, S, d)."""
    given = (*args, kwargs.get("hidden_states"), *kwargs.values())
    found = next((value for value in given if isinstance(value, Tensor)), None)
    if found is None or found.dim() != 3:
        raise HtsrError(
            f"{block} is not called with hidden states (batch, token, width).",
            "This architecture is not supported by EM-LoRA.",
        )
    return found


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
