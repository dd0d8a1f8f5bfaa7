"""What one forward pass of the model knows and its layers need: masks, and the loss's weight.

Total = loss + share · Σ coefficient · L, where share is the part that this pass's tokens have in
an accumulated batch. A hook on the model's loss is the first that backward reaches; it writes
down the gradient it sees (gradient accumulation, a GradScaler, DDP's factor), which the nodes of
``balance.inject`` then read.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from htsr_alloc.lora_moe.state import DECODER, ENCODER, Pass, RouterState


class _Mark:
    """A hook on the gradient of one of the model's outputs; backward runs it before any layer.

    It names the pass whose blocks are about to be recomputed, and writes down the loss's weight.
    The loss itself tells it best; then TRL's per-token log-probabilities, where a negative
    log-likelihood's gradients are minus each token's weight, so that their absolute sum is the
    loss's weight times share. Other outputs cannot tell: 1 is taken, and said.
    """

    warned = False

    def __init__(self, kind: str, state: RouterState, now: Pass, labelled: Any) -> None:
        self.kind, self.state, self.now, self.labelled = kind, state, now, labelled

    def __call__(self, grad: Tensor) -> None:
        self.state.current = now = self.now
        if now.weighed:  # by the loss, from which this output's gradient comes
            return
        # .data: the layers have saved this tensor, and it is meant to change under them.
        if self.kind == "loss":
            now.weighed = True
            now.scale.data.copy_(grad.detach() * now.share)
        elif self.kind == "log_probs":
            now.weighed = True
            weights = grad.detach().abs()
            if self.labelled is not None:  # the others are zeros that the loss adds up too
                weights = weights * self.labelled
            now.scale.data.copy_(weights.sum())
        elif not _Mark.warned:
            _Mark.warned = True
            warnings.warn(
                "The loss was computed outside the model, so the balance loss cannot see its "
                "weight and is added with weight 1; pass labels to the model to have it exact "
                "under gradient accumulation and loss scaling.",
                stacklevel=2,
            )


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
        before = self.state.current
        names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
        tokens = next((given[name] for name in names if given.get(name) is not None), None)
        batch = None if tokens is None or tokens.dim() < 2 else (tokens.shape[0], tokens.shape[1])
        if self.state.tenants is not None and batch is not None:
            self.state.tenants.check(batch[0])
        self.state.current = now = Pass(masks, device, batch)
        for hook in self.state.before_pass:
            hook(given, now, before)
        labels, items = given.get("labels"), given.get("num_items_in_batch")
        if isinstance(labels, Tensor) and items is not None:
            # Counted as transformers' Trainer counts its items, so that the shares sum to 1.
            if getattr(model, "loss_type", None) == "ForCausalLM":
                labels = given.get("shift_labels", labels[..., 1:])
            now.share = (labels != -100).sum() / items

    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Mark the outputs; add up the pass's balance loss."""
        if not model.training:
            return
        values = [m.router_aux_loss for m in routers(model) if m.router_aux_loss is not None]
        if not values:
            return
        device = values[0].device
        self.state.add(torch.stack([value.to(device) for value in values]).sum())
        if not torch.is_grad_enabled():
            return
        now, state = self.state.current, self.state
        if isinstance(output, Mapping):
            outputs: dict[Any, Any] = dict(output)
        else:
            outputs = dict(enumerate(output if isinstance(output, (tuple, list)) else [output]))
        has_labels = self.arguments(args, kwargs).get("labels") is not None
        for key, value in outputs.items():
            if isinstance(value, Tensor) and value.requires_grad:
                first = key == 0 and has_labels and value.dim() == 0
                kind = "loss" if first else str(key)
                value.register_hook(_Mark(kind, state, now, outputs.get("label_mask")))


def routers(model: nn.Module) -> Iterator[Any]:
    """The modules that carry a balance loss."""
    return (m for m in model.modules() if hasattr(m, "router_aux_loss"))
