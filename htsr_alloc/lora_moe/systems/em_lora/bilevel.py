"""EM-LoRA's bi-level optimiser: weights on training batches, activations on validation batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from htsr_alloc.errors import HtsrError

STATE_FILE = "activation_optimizer.pt"


def activation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Θ: the coefficients a and b of every router's rational activation that is trained."""
    return [
        p
        for n, p in model.named_parameters()
        if p.requires_grad and ("lora_moe_numerator" in n or "lora_moe_denominator" in n)
    ]


class BilevelMixin:
    """Alternates Ω steps (Trainer's own) with Θ steps. Put it before a Trainer:

        class BilevelTrainer(BilevelMixin, Trainer): ...

    After every optimiser step on training batches, Θ takes one Adam step on a batch of
    ``activation_dataset``, at its own learning rate. The Trainer's optimiser never sees Θ. Under
    DDP the gradient of Θ is averaged over the processes. Checkpoints hold Θ's optimiser too.

    Args (beside Trainer's):
        activation_dataset: the validation rows that Θ learns from.
        activation_lr: 1e-6 in the paper.

    Raises:
        HtsrError: the model has no such parameters, or no activation_dataset was given.
    """

    def __init__(
        self, *args: Any, activation_dataset: Any = None, activation_lr: float = 1e-6, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if activation_dataset is None:
            raise HtsrError("The bi-level optimiser needs activation_dataset, validation rows.")
        self.theta = activation_parameters(trainer.model)
        if not self.theta:
            raise HtsrError(
                "The model has no activation to learn.",
                "Use it with LoraMoeConfig(system='em_lora').",
            )
        self.activation_dataset = activation_dataset
        self.activation_optimizer = torch.optim.Adam(self.theta, lr=activation_lr)
        self.activation_steps = 0
        self._batches: Iterator[Any] | None = None
        trainer.add_callback(_ThetaStep(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, without Θ."""
        for parameter in self.theta:
            parameter.requires_grad_(False)
        try:
            return super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        finally:
            for parameter in self.theta:
                parameter.requires_grad_(True)

    def activation_step(self) -> None:
        """One step of Θ on the next validation batch."""
        trainer: Any = self
        if self._batches is None:
            self._batches = self._forever()
        # What the training batches left: Θ's is not used, Ω's must be there for the Trainer.
        kept = [p.grad for p in trainer.model.parameters()]
        model = trainer.model
        model.train()
        inputs = trainer._prepare_inputs(next(self._batches))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        gradients = torch.autograd.grad(loss, self.theta)
        for parameter, gradient in zip(self.theta, gradients, strict=True):
            parameter.grad = _mean_over_processes(gradient)
        self.activation_optimizer.step()
        self.activation_steps += 1
        for parameter, gradient in zip(trainer.model.parameters(), kept, strict=True):
            parameter.grad = gradient
        for parameter in self.theta:
            parameter.grad = None

    def _forever(self) -> Iterator[Any]:
        trainer: Any = self
        while True:
            yield from trainer.get_eval_dataloader(self.activation_dataset)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        trainer: Any = self
        if trainer.args.should_save:
            kept = {
                "optimizer": self.activation_optimizer.state_dict(),
                "steps": self.activation_steps,
            }
            torch.save(kept, Path(output_dir) / STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if not path.is_file():
            raise HtsrError(f"{checkpoint} was not written by a bi-level trainer.")
        kept = torch.load(path, weights_only=True)
        self.activation_optimizer.load_state_dict(kept["optimizer"])
        self.activation_steps = kept["steps"]
        self._batches = self._forever()
        for _ in range(self.activation_steps):
            next(self._batches)


class _ThetaStep(TrainerCallback):
    """Steps Θ after each of the Trainer's optimiser steps."""

    def __init__(self, trainer: BilevelMixin) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self.trainer.activation_step()


def _mean_over_processes(gradient: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradient)
        gradient = gradient / torch.distributed.get_world_size()
    return gradient
