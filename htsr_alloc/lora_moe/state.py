"""What the layers of one model share: the current pass, its masks, the loss so far."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from htsr_alloc.lora_moe.gates import Routing
from htsr_alloc.lora_moe.tenants import Tenants
from htsr_alloc.lora_moe.tokens import (
    DECODER,
    ENCODER,
    batch_axis,
    mask_name,
    puts_time_first,
    spread,
    without_padding,
)

__all__ = ["DECODER", "ENCODER", "STATE", "Generation", "Pass", "RouterState", "state_in"]

STATE = "lora_moe_state"  # attribute of the adapted model


@dataclass
class Generation:
    """One call of generate.

    Attributes:
        length: of its prompt, padding included; what a first pass has beyond it are candidates.
        decisions: those of its first pass, None before.
    """

    length: int
    decisions: dict[tuple[str, str], Routing] | None = None


class Pass:
    """One forward pass of the model.

    Attributes:
        masks: 2-d token masks by argument name, (B, S); None where the model was given none.
        batch: (B, S) of the tokens given to the model, a decoder's if it has one; None if unknown.
        scale: 0-d float32, the gradient of the model's loss times share; known in backward.
        share: this pass's part in the accumulated batch, 1 where the trainer does not say.
        prompt: (B, S), which tokens are a prompt's, for routers that choose by it; None where
            their choice is made already.
        decisions: the choice (B, N) of routers before a block, by block and adapter.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor | None] | None = None,
        device: Any = None,
        batch: tuple[int, int] | None = None,
    ) -> None:
        self.masks = dict(masks or {})
        self.batch = batch
        self.scale = torch.ones((), device=device)
        self.share: Tensor | float = 1.0
        self.weighed = False  # whether scale is known
        self.prompt: Tensor | None = None
        self.decisions: dict[tuple[str, str], Routing] = {}


class RouterState:
    """What the layers of one model share: the current pass, and the loss since last asked.

    Attributes:
        unmasked: names of linears whose balance loss counted every token, padding too, because
            they see other tokens than the batch's, or in an order that cannot be known.
        tenants: while rows of a batch belong to different adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.current = Pass()
        self.time_first = puts_time_first(model)
        self.without_padding = without_padding(model)
        self.unmasked: set[str] = set()
        self.tenants: Tenants | None = None
        self.total: Tensor | None = None
        self.passes = 0
        self.handles: list[Any] = []  # of what was put on the model, each with remove()
        self.before_pass: list[Callable[[dict[str, Any], Pass, Pass], None]] = []
        self.block_routers: dict[str, Any] = {}  # by block, where one stands before it
        self.generation: Generation | None = None  # while the model's generate runs

    @property
    def by_prompt(self) -> bool:
        """Whether an adapter is active that routes by the prompt."""
        return any(router.active() for router in self.block_routers.values())

    def mask(self, shape: torch.Size, name: str) -> Tensor | None:
        """The padding mask (flat) of tokens shaped ``shape``, which the linear ``name`` sees.

        None: all count. So it is without padding, and, with one warning, for other tokens than
        the batch's (B, S).
        """
        masks = self.current.masks
        found = masks.get(mask_name(name, tuple(masks)))
        if found is None or name.startswith(self.without_padding):
            return None
        axis = batch_axis(shape, (found.shape[0], found.shape[1]), name, self.time_first)
        if axis is not None:
            return spread(found, shape, axis)
        if not self.unmasked:
            warnings.warn(
                f"{name} sees tokens of shape {tuple(shape)}, and the attention mask is of "
                f"{tuple(found.shape)}, so its balance loss counts every token, padding too.",
                stacklevel=2,
            )
        self.unmasked.add(name)
        return None

    def add(self, value: Tensor) -> None:
        """Count one pass's weighted loss; nothing waits for the device."""
        self.total = value if self.total is None else self.total + value
        self.passes += 1

    def pop(self) -> float | None:
        """The mean over passes since the last call, or None if there was none."""
        if self.total is None:
            return None
        mean = float(self.total) / self.passes
        self.total, self.passes = None, 0
        return mean


def state_in(model: nn.Module) -> RouterState | None:
    """The state of the adapted model that this is or holds; None without a LoRA-MoE adapter."""
    found = (module.__dict__.get(STATE) for module in model.modules())
    return next((state for state in found if state is not None), None)
