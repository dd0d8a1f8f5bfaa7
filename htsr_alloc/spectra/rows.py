"""A weight matrix, block of rows by block of rows, in a wider format."""

from __future__ import annotations

import numpy as np
import torch

from htsr_alloc.spectra import ROW_CHUNK


def buffer_for(tall: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for a block of W's rows, (m, n), in the order that W is stored in."""
    m, n = tall.shape
    chunk = min(ROW_CHUNK, m)
    return torch.empty((chunk, n) if tall.stride(1) == 1 else (n, chunk), dtype=dtype)


def upcast(rows: torch.Tensor, buffer: torch.Tensor) -> np.ndarray:
    """Some of W's rows, (k, n), in the buffer's dtype, in C or Fortran order; a view of it."""
    if rows.stride(1) == 1:
        return buffer[: len(rows)].copy_(rows).numpy()
    n = rows.shape[1]
    return buffer.view(-1)[: rows.numel()].view(n, -1).copy_(rows.T).numpy().T
