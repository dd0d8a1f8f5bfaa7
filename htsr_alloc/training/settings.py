"""What a training run is asked for. The command line reads this, so that it loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from htsr_alloc.errors import HtsrError

DTYPES = ("auto", "float32", "bfloat16")
LEARNING_RATE = 3e-4  # the AlphaLoRA paper's


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, whose learning rate decays linearly after a warm-up.

    The texts are the help of ``htsr train``.
    """

    epochs: Annotated[float, "Passes over the rows, if no number of steps is given."] = 1.0
    steps: Annotated[int | None, "Number of optimiser steps; default what the epochs take."] = None
    batch_size: Annotated[int, "Rows of one process's micro-batch."] = 8
    accumulate: Annotated[int, "Micro-batches of one optimiser step."] = 1
    learning_rate: Annotated[
        float | None,
        "Highest learning rate of AdamW, decaying linearly to 0; default the system's, or 3e-4.",
    ] = None
    warmup: Annotated[float, "Share of the steps in which the learning rate rises."] = 0.03
    weight_decay: Annotated[float, "Weight decay of AdamW."] = 0.0
    seed: Annotated[int, "Seed of the experts' start, the dropout and the order of the rows."] = 0
    gradient_checkpointing: Annotated[
        bool, "Recompute activations in the backward pass: less memory, more time."
    ] = False
    log_every: Annotated[int, "Steps between lines of the log; the last step has one too."] = 10
    save_every: Annotated[int, "Steps between checkpoints; 0 saves none."] = 100

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every", "epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise HtsrError(f"{name} must be positive, not {value}.")
        if self.steps is not None and self.steps < 1:
            raise HtsrError(f"steps must be at least 1, not {self.steps}.")
        if not 0 <= self.warmup < 1:
            raise HtsrError(f"warmup must be in [0, 1), not {self.warmup}.")
