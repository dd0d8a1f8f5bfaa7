"""Scores from what the linears read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from htsr_alloc.errors import HtsrError
from htsr_alloc.training.scoring.base import Opened


def explained(model: Opened, data: Path, limit: int, r: int, batch_size: int) -> dict[str, float]:
    """EVA's explained variance: the share of the inputs' energy in their r leading directions.

    Of one batch's inputs X (tokens, d_in), padding left out, with singular values s it is
    Σ_{i≤r} s_i² / Σ s_i²; the score is the mean over batches. EVA gives the ranks to the linears
    whose leading directions explain most.

    Raises:
        HtsrError: a batch with no more tokens than r.
    """
    sums, count = dict.fromkeys(model.linears, 0.0), 0
    mask = torch.ones(1, 1, dtype=torch.bool)
    last: tuple[Any, float] = (None, 0.0)  # q, k and v read one tensor

    def read(name: str, module: Any, args: tuple[Any, ...]) -> None:
        nonlocal last
        x: torch.Tensor = args[0]
        if last[0] is not x:
            own = x[mask] if x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])
            own = own.to(torch.promote_types(own.dtype, torch.float32))
            energies = torch.linalg.svdvals(own).square()
            last = (x, float(energies[:r].sum() / energies.sum()))
        sums[name] += last[1]

    handles = [
        module.register_forward_pre_hook(partial(read, name))
        for name, module in model.linears.items()
    ]
    try:
        with torch.inference_mode():
            for batch in model.batches(data, limit, batch_size):
                mask = batch["attention_mask"].bool()
                if int(mask.sum()) <= r:
                    raise HtsrError(
                        f"A batch holds {int(mask.sum())} tokens, no more than `r` {r}.",
                        "Raise `batch_size`, or give more rows.",
                    )
                model.model(**batch, use_cache=False)
                last, count = (None, 0.0), count + 1
    finally:
        for handle in handles:
            handle.remove()
    return {name: value / count for name, value in sums.items()}
