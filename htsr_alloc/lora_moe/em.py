"""EM-LoRA on a model: a router before each transformer layer, its choice kept for generation."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import balance, init, prompt
from htsr_alloc.lora_moe.config import LoraMoeConfig
from htsr_alloc.lora_moe.generation import prompt_length
from htsr_alloc.lora_moe.layer import LoraMoeLinear
from htsr_alloc.lora_moe.state import STATE, Generation, RouterState


def attach(
    model: nn.Module,
    blocks: dict[str, list[LoraMoeLinear]],
    adapter: str,
    config: LoraMoeConfig,
    state: RouterState,
) -> None:
    """Give every block a router over its adapted linears, held by the first of them.

    Parameters: router (N, d), pool (d,) for attention pooling, numerator (7,), denominator (5,).

    Raises:
        HtsrError: an encoder-decoder model, which has no one prompt.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise HtsrError("EM-LoRA routes by the prompt of a decoder-only model.")
    for key, layers in blocks.items():
        block, host = model.get_submodule(key), layers[0]
        for index, layer in enumerate(layers):
            layer.em_place[adapter] = (key, index)
        like = host.lora_moe_A[adapter]
        width = _width(block, host)
        numerator, denominator = prompt.gelu_start()

        def parameter(values: Any, like: Tensor = like) -> nn.Parameter:
            return nn.Parameter(torch.as_tensor(values, dtype=like.dtype, device=like.device))

        weights = torch.zeros(len(layers), width)
        if config.base_probe is None:
            init.init_a(weights, 1, True)
        host.lora_moe_router[adapter] = parameter(weights)
        if config.em_pooler == "attention":
            host.lora_moe_pool[adapter] = parameter(torch.zeros(width))
        host.lora_moe_numerator[adapter] = parameter(numerator)
        host.lora_moe_denominator[adapter] = parameter(denominator)
        host.em_pooler[adapter] = config.em_pooler
        if key not in state.routed:
            state.routed[key] = router = BlockRouter(key, state)
            state.handles.append(block.register_forward_pre_hook(router.open, with_kwargs=True))
            for child in block.children():
                state.handles.append(child.register_forward_pre_hook(router, with_kwargs=True))
        state.routed[key].hosts[adapter] = host
    for name, method in GENERATORS.items():
        if hasattr(model, name) and name not in model.__dict__:
            setattr(model, name, types.MethodType(method, model))


def _width(block: nn.Module, host: LoraMoeLinear) -> int:
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
    """The hooks of a block: decide at prefill on its input, keep to it afterwards.

    Gradient checkpointing may recompute a block without its own hooks, so the decision is made
    before the block's first module instead, which sees the block's input and lies inside.
    """

    def __init__(self, key: str, state: RouterState) -> None:
        self.key, self.state = key, state
        self.hosts: dict[str, LoraMoeLinear] = {}  # by adapter, the linear that holds its router
        self.first: nn.Module | None = None
        self.pointer: int | None = None

    def active(self) -> list[str]:
        """The adapters that route here now."""
        return [
            adapter
            for adapter, host in self.hosts.items()
            if adapter in host.em_pooler
            and adapter in host.active_adapters
            and not host.disable_adapters
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
            elif place not in now.decisions or len(now.decisions[place]) != len(hidden):
                raise HtsrError(
                    "EM-LoRA keeps the choice made at prefill, and none was made for this batch.",
                    "Run the prompt first, with the same rows, or use generate.",
                )

    def decide(self, hidden: Tensor, mask: Tensor, adapter: str) -> Tensor:
        """Gate weights (B, N), with the balance loss over prompts attached while training."""
        host = self.hosts[adapter]
        how = host.em_pooler[adapter]
        vector = host.lora_moe_pool[adapter] if how == "attention" else None
        pooled = prompt.pool(hidden, mask, how, vector)
        routing = prompt.decide(
            pooled,
            host.lora_moe_router[adapter],
            host.lora_moe_numerator[adapter],
            host.lora_moe_denominator[adapter],
            host.mixture[adapter].weighting,
        )
        self.state.current.probs[(self.key, adapter)] = routing.probs.detach()
        weight = host.aux_weight[adapter]
        if not host.training or weight == 0:
            return routing.weights
        loss = weight * balance.load_balance(routing.probs, routing.chosen, None, 1)
        host.router_aux_loss = loss.detach()
        return balance.inject(routing.weights, loss, self.state.current.scale)


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
