"""What one forward pass of the model knows and its layers need: masks, and the loss's weight.

Total = loss + share · Σ coefficient · L, where share is the part that this pass's tokens have in
an accumulated batch. A node at the model's loss is the first that backward reaches; it writes
down the gradient it gets (gradient accumulation, a GradScaler, DDP's factor), which the nodes of
``balance.inject`` then read.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from htsr_alloc.errors import HtsrError

ENCODER, DECODER = "attention_mask", "decoder_attention_mask"
# Keys and values of attention over an encoder's states.
CROSS_ATTENTION = re.compile(
    r"(EncDecAttention|encoder_attn|crossattention)\.(.*\.)?(k|v|k_proj|v_proj|key|value)$"
)


class Pass:
    """One forward pass of the model.

    Attributes:
        masks: 2-d token masks by argument name, (B, S); None where the model was given none.
        scale: 0-d float32, the gradient of the model's loss times share; known in backward.
        share: this pass's part in the accumulated batch, 1 where the trainer does not say.
        prompt: (B, S), EM-LoRA's prompt tokens, or None where no router asks for them.
    """

    def __init__(
        self, masks: Mapping[str, Tensor | None] | None = None, device: Any = None
    ) -> None:
        self.masks = dict(masks or {})
        self.scale = torch.ones((), device=device)
        self.share: Tensor | float = 1.0
        self.prompt: Tensor | None = None

    def mask(self, shape: torch.Size, name: str) -> Tensor | None:
        """The mask (flat) of tokens shaped ``shape``, or None where the model was given none.

        Raises:
            HtsrError: masks were given and none has this shape.
        """
        if not self.masks:
            return None
        decoder = DECODER in self.masks and "decoder" in name.split(".")
        reads_encoder = CROSS_ATTENTION.search(name) is not None
        found = self.masks.get(DECODER if decoder and not reads_encoder else ENCODER)
        if found is None:
            return None
        if found.numel() == shape.numel():
            return found.reshape(-1)
        raise HtsrError(
            f"{name} sees tokens of shape {tuple(shape)}, which no attention mask describes, so "
            "that padding cannot be left out of the balance loss.",
            "Exclude this module, or set router_aux_loss_coef=0.",
        )


class RouterState:
    """What the layers of one model share: the current pass, and the loss since last asked."""

    def __init__(self) -> None:
        self.current = Pass()
        self.total: Tensor | None = None
        self.passes = 0

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


class _Root(torch.autograd.Function):
    """Identity at the model's loss; its backward runs before any layer's."""

    @staticmethod
    def forward(ctx, loss: Tensor, state: RouterState, now: Pass) -> Tensor:
        ctx.state, ctx.now = state, now
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        ctx.state.current = ctx.now  # what a block recomputed by checkpointing shall see
        # .data: the layers have saved this tensor, and it is meant to change under them.
        ctx.now.scale.data.copy_(grads[0].detach() * ctx.now.share)
        return grads[0], None, None


class _LogProbs(torch.autograd.Function):
    """Identity at per-token log-probabilities, from which TRL computes its loss.

    A negative log-likelihood's gradients there are minus each token's weight, so that their
    absolute sum is the loss's weight times share.
    """

    @staticmethod
    def forward(ctx, log_probs: Tensor, state: RouterState, now: Pass) -> Tensor:
        ctx.state, ctx.now = state, now
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        ctx.state.current = ctx.now
        ctx.now.scale.data.copy_(grads[0].detach().abs().sum())
        return grads[0], None, None


class _Outside(torch.autograd.Function):
    """Identity at an output from which a trainer may compute a loss of its own."""

    @staticmethod
    def forward(ctx, output: Tensor, state: RouterState, now: Pass) -> Tensor:
        ctx.state, ctx.now = state, now
        return output.view_as(output)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        ctx.state.current = ctx.now
        if not _Outside.warned:
            _Outside.warned = True
            warnings.warn(
                "The loss was computed outside the model, so the balance loss cannot see its "
                "weight and is added with weight 1; pass labels to the model to have it exact "
                "under gradient accumulation and loss scaling.",
                stacklevel=2,
            )
        return grads[0], None, None

    warned = False


class PassHooks:
    """The two hooks on the adapted model: open a pass before it, mark its outputs after it."""

    def __init__(self, model: nn.Module, state: RouterState) -> None:
        self.state = state
        self.names = list(inspect.signature(model.forward).parameters)

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Open a pass with this call's token masks."""
        given = self.arguments(args, kwargs)
        masks: dict[str, Tensor | None] = {}
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            masks = {ENCODER: None, DECODER: None}
        for name in (ENCODER, DECODER):
            mask = given.get(name)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                masks[name] = mask
        device = next(model.parameters()).device
        self.state.current = now = Pass(masks, device)
        labels, items = given.get("labels"), given.get("num_items_in_batch")
        if isinstance(labels, Tensor) and items is not None:
            # Counted as transformers' Trainer counts its items, so that the shares sum to 1.
            if getattr(model, "loss_type", None) == "ForCausalLM":
                labels = given.get("shift_labels", labels[..., 1:])
            now.share = (labels != -100).sum() / items

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Mark the loss, or else the other outputs; add up the pass's balance loss."""
        if not model.training:
            return output
        values = [m.router_aux_loss for m in routers(model) if m.router_aux_loss is not None]
        if not values:
            return output
        device = values[0].device
        self.state.add(torch.stack([value.to(device) for value in values]).sum())
        if not torch.is_grad_enabled():
            return output
        now, state = self.state.current, self.state
        if isinstance(output, Tensor):
            return _Outside.apply(output, state, now) if output.requires_grad else output
        has_labels = self.arguments(args, kwargs).get("labels") is not None
        pairs = output.items() if isinstance(output, Mapping) else enumerate(output)
        marked = {}
        for key, value in pairs:
            if isinstance(value, Tensor) and value.requires_grad:
                is_loss = key == "loss" or (key == 0 and has_labels and value.dim() == 0)
                node = _Root if is_loss else _LogProbs if key == "log_probs" else _Outside
                marked[key] = node.apply(value, state, now)
        if isinstance(output, Mapping):
            for key, value in marked.items():
                output[key] = value  # type: ignore[index]
            return output
        return tuple(marked.get(i, value) for i, value in enumerate(output))


def routers(model: nn.Module) -> Iterator[Any]:
    """The modules that carry a balance loss."""
    return (m for m in model.modules() if hasattr(m, "router_aux_loss"))
