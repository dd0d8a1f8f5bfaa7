"""The block types of ggml, by the functions of the package gguf."""

from __future__ import annotations

from typing import TYPE_CHECKING

from htsr_alloc.checkpoints.listing import TensorRef
from htsr_alloc.checkpoints.quantised.base import Format, Parts, by_rows

if TYPE_CHECKING:
    import torch


def _decode(ref: TensorRef, parts: Parts) -> torch.Tensor:
    """blocks: (rows, bytes of a row), of one expert or of all -> (rows, columns)."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks, kind = parts["blocks"], GGMLQuantizationType[ref.dtype]
    flat = blocks.reshape(-1, blocks.shape[-1]).numpy()
    with np.errstate(all="ignore"):  # a scale may be Inf or NaN, of which the spectrum tells
        made = by_rows(
            len(flat), ref.shape[-1], lambda part: torch.from_numpy(dequantize(flat[part], kind))
        )
    return made.reshape(*blocks.shape[:-1], ref.shape[-1])


# A GGUF file's own listing (checkpoints/gguf.py) says what is packed: there is nothing to find.
GGUF = Format(lambda there, config, read: iter(()), _decode, "gguf", 8 << 20)
