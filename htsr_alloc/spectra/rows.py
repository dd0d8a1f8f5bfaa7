"""A weight matrix, block of rows by block of rows, in a wider format."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from htsr_alloc.spectra import ROW_CHUNK


def blocks(tall: torch.Tensor, dtype: torch.dtype) -> Iterator[np.ndarray]:
    """The rows of W, (m, n), in blocks (k, n) of ``dtype``, in C or Fortran order as W is stored.

    All are views of one buffer, which is made at once: use each before the next.
    """
    m, n = tall.shape
    by_rows = tall.stride(1) == 1
    chunk = min(ROW_CHUNK, m)
    buffer = torch.empty((chunk, n) if by_rows else (n, chunk), dtype=dtype)

    def upcast(rows: torch.Tensor) -> np.ndarray:
        if by_rows:
            return buffer[: len(rows)].copy_(rows).numpy()
        return buffer.view(-1)[: rows.numel()].view(n, -1).copy_(rows.T).numpy().T

    return map(upcast, tall.split(chunk))
