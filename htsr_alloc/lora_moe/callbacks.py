"""What a trainer is handed: the balance loss's value in its logs."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from htsr_alloc.lora_moe.state import state_in


class RouterLossCallback(TrainerCallback):
    """Adds ``router_aux_loss`` to the logs of any transformers Trainer.

    The mean over forward passes since the last log of Σ coefficient · L; the ``loss`` that the
    trainer logs does not contain it and can be compared with that of a run without routers.

    A trainer hands its logs to the reporters (TensorBoard, W&B) before the callbacks it was given;
    ``RouterLossCallback().attach(trainer)`` puts this one before them. Given as
    ``Trainer(callbacks=[...])`` it writes to ``trainer.state.log_history`` and the console alone.
    """

    def attach(self, trainer: Any) -> RouterLossCallback:
        """Put this callback before all others of a trainer."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs: Any) -> None:
        """Read the value off the device and write it into this log."""
        model: Any = kwargs.get("model")
        value = router_aux_loss(model)
        if value is None or logs is None or "loss" not in logs:
            return
        logs["router_aux_loss"] = value
        if state.log_history:
            state.log_history[-1]["router_aux_loss"] = value


def router_aux_loss(model: Any) -> float | None:
    """The mean weighted balance loss since this was last asked, or None if there was none."""
    state = state_in(model)
    return None if state is None else state.pop()
