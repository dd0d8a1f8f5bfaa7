"""Batches whose rows belong to different adapters: PEFT's ``adapter_names``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from htsr_alloc.checkpoints.rules import is_numbered_expert
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.tokens import batch_axis

BASE = "__base__"  # PEFT's word for a row without an adapter


class Tenants:
    """The adapter of every row of a batch.

    Args:
        names: one for each row that the model was given; ``generate`` repeats the rows (beams,
            several answers), and the names with them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.checked = False
        self._rows: dict[Any, list[tuple[str, Tensor]]] = {}

    def check(self, rows: int) -> None:
        """Compare the names with the rows that the model was given, the first time only.

        Raises:
            HtsrError: another number of names than rows.
        """
        if not self.checked and rows != len(self.names):
            raise HtsrError(f"adapter_names has {len(self.names)} names for {rows} rows.")
        self.checked = True

    def repeated(self, rows: int) -> list[str]:
        """The names of ``rows`` rows, a whole multiple of those given."""
        return [name for name in self.names for _ in range(rows // len(self.names))]

    def rows(
        self, x: Tensor, batch: tuple[int, int] | None, name: str, time: bool
    ) -> tuple[int, list[tuple[str, Tensor]]]:
        """The axis of x (..., d_in) that the rows are on, and each adapter's indices on it.

        Args:
            batch: (B, S), the tokens that the model was given; None where it is not known.
            name: of the linear. time: whether its model may put time first.

        Raises:
            HtsrError: x is not made of the batch's rows, as far as its shape shows.
        """
        shape = x.shape[:-1]
        axis = None if batch is None else batch_axis(shape, batch, name, time)
        # An encoder's rows, whose number of tokens is another one; or one vector a row.
        whole = not time and not is_numbered_expert(name)
        if axis is None and whole and len(x) in {len(self.names), batch[0] if batch else -1}:
            axis = 0
        if axis is None or shape[axis] % len(self.names):
            raise HtsrError(
                f"{name} sees tokens of shape {tuple(shape)}, in which the {len(self.names)} rows "
                "of adapter_names cannot be told apart.",
                "Run each adapter's rows by themselves.",
            )
        key = (shape[axis], x.device)
        if key not in self._rows:
            names = self.repeated(shape[axis])
            self._rows[key] = [
                (own, torch.tensor([i for i, n in enumerate(names) if n == own], device=x.device))
                for own in dict.fromkeys(names)
                if own != BASE
            ]
        return axis, self._rows[key]
