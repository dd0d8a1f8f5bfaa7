"""The linears that are scored, and rows as batches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.linears import is_plain, left_out, widths
from htsr_alloc.training import models, tokens
from htsr_alloc.training.positions import positions_of
from htsr_alloc.training.rows import read_rows, share_of


@dataclass(frozen=True)
class Opened:
    """A model in evaluation, and the linears of its blocks that experts would be put on."""

    model: Any
    linears: dict[str, nn.Module]
    folder: Path

    def batches(self, data: Path, limit: int, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """The first ``limit`` rows of a file, ``size`` at a time, on the model's device.

        Raises:
            HtsrError: bad rows, or none.
        """
        tokenizer = tokens.open_tokenizer(self.folder)
        rows = share_of(read_rows(data), limit)
        most = min(MAX_LENGTH, positions_of(self.model) or MAX_LENGTH)
        examples = [tokens.encode(row, tokenizer, most) for row in rows]
        collate = tokens.Collator(tokens.pad_id(tokenizer))
        device = next(self.model.parameters()).device
        for start in range(0, len(examples), size):
            batch = collate(examples[start : start + size])
            yield {name: value.to(device) for name, value in batch.items()}


MAX_LENGTH = 512  # tokens of a row; longer ones are cut


def opened(folder: Path, device: torch.device, dtype: torch.dtype) -> Opened:
    """A model whose parameters are frozen.

    Raises:
        HtsrError: it cannot be opened, has no linears in blocks, or its weights are quantised.
    """
    model = models.open_causal_lm(folder, dtype).to(device).eval().requires_grad_(False)
    avoided = left_out(model)
    linears = {
        name: module
        for name, module in model.named_modules()
        if widths(module) and name not in avoided and re.search(r"\.\d+\.", name)
    }
    if not linears:
        raise HtsrError(f"{folder} has no linears in layers.")
    for name, module in linears.items():
        if not is_plain(module.weight):  # type: ignore[arg-type]
            raise HtsrError(
                f"{name} is quantised, and a score needs its weight's values.",
                "Give the unquantised model.",
            )
    return Opened(model, linears, folder)
