"""One tensor at a time out of a checkpoint, mapped from its file, scales applied."""

from __future__ import annotations

import functools
import hashlib
import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr_alloc.errors import HtsrError
from htsr_alloc.sources.listing import (
    FLOAT_DTYPES,
    SCALE_SUFFIXES,
    Listing,
    Shard,
    TensorRef,
    read_header,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """Tensors in shard order, and how to get at them.

    ``fetch`` turns a shard into a local path, downloading it when needed. ``revision`` is the
    hub's commit hash, null for local files.
    """

    name: str
    revision: str | None
    config: dict[str, Any]
    listing: Listing
    fetch: Callable[[Shard], Path]

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """Every tensor, in shard order."""
        return self.listing.tensors

    @functools.cached_property
    def _by_name(self) -> dict[str, TensorRef]:
        return {ref.name: ref for ref in self.tensors}

    @property
    def architecture(self) -> str | None:
        """``architectures[0]`` of the configuration, or its ``model_type``."""
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else self.config.get("model_type")
        return first if isinstance(first, str) else None

    @property
    def num_hidden_layers(self) -> int | None:
        """The configuration's number of blocks, where it states one."""
        text = self.config.get("text_config")
        for part in (self.config, text if isinstance(text, dict) else {}):
            value = part.get("num_hidden_layers", part.get("n_layer"))
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    def scale_of(self, ref: TensorRef) -> TensorRef | None:
        """The tensor that holds ``ref``'s scale, if the checkpoint has one."""
        scales = (self._by_name.get(ref.name + suffix) for suffix in SCALE_SUFFIXES)
        return next((scale for scale in scales if scale is not None), None)

    def read(self, ref: TensorRef, index: int | None = None) -> torch.Tensor:
        """One tensor, or slice ``index`` of its first axis, as stored (CPU).

        Float tensors without a scale are views of the mapped file: nothing is copied, and the
        map goes when the tensor does. With a scale the product is returned, in float32.

        Raises:
            HtsrError: the file cannot be read or is not what its header said, or the scale's
                shape does not fit.
        """
        raw = self._map(ref, index)
        scale_ref = self.scale_of(ref)
        if scale_ref is None:
            return raw
        sliced = scale_ref.shape[:1] == ref.shape[:1]  # one scale an expert
        scale = self._map(scale_ref, index if sliced else None)
        return _apply_scale(raw, scale, self._block_size(), ref.name)

    def digest(self, ref: TensorRef, index: int | None = None) -> str:
        """SHA-256 of the tensor's stored bytes (of its slice ``index``), and of its scale's."""
        import torch

        digest, scale = hashlib.sha256(), self.scale_of(ref)
        for raw in [self._map(ref, index)] + ([self._map(scale, None)] if scale else []):
            digest.update(raw.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _map(self, ref: TensorRef, index: int | None) -> torch.Tensor:
        import torch

        if ref.dtype not in FLOAT_DTYPES:
            raise HtsrError(f"{ref.name} is of dtype {ref.dtype}, which is not read.")
        size, dtype = FLOAT_DTYPES[ref.dtype]
        path = self.fetch(self.listing.shards[ref.shard])
        data_start, header = read_header(path, path.stat().st_mtime_ns)
        entry = header.get(ref.name)
        if entry is None or (entry["dtype"], tuple(entry["shape"])) != (ref.dtype, ref.shape):
            raise HtsrError(f"{path.name} changed while it was read: {ref.name} differs.")
        begin, end = (data_start + offset for offset in entry["data_offsets"])
        shape = ref.shape
        if index is not None:
            shape = shape[1:]
            begin += index * math.prod(shape) * size
            end = begin + math.prod(shape) * size
        if begin == end:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        try:
            with open(path, "rb") as file:
                # ACCESS_COPY: torch warns about read-only buffers; no page is ever written.
                view = mmap.mmap(file.fileno(), end - page, access=mmap.ACCESS_COPY, offset=page)
        except (OSError, ValueError) as error:
            raise HtsrError(f"Cannot map {ref.name} from {path}: {error}.") from error
        raw = torch.frombuffer(view, dtype=torch.uint8, offset=begin - page)
        if (begin - page) % size:  # an odd file's offsets need not suit the dtype
            raw = raw.clone()
        return raw.view(getattr(torch, dtype)).reshape(shape)

    def _block_size(self) -> tuple[int, int] | None:
        quantization = self.config.get("quantization_config")
        block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        if isinstance(block, list) and len(block) == 2 and all(type(b) is int for b in block):
            return (block[0], block[1]) if min(block) > 0 else None
        return None


def _apply_scale(
    raw: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, name: str
) -> torch.Tensor:
    """``raw`` times its scale, in float32: one number, one a row, or one a block.

    raw: (..., m, n); scale: (), (1,), (m,), (m, 1) or (ceil(m / b0), ceil(n / b1)).
    """
    weight, factor = raw.float(), scale.float()
    if factor.numel() == 1:
        return weight * factor.reshape(())
    m, n = weight.shape[-2:]
    if factor.shape == (m,) or factor.shape[-2:] == (m, 1):
        return (
            weight * factor.reshape(*factor.shape[:1], 1) if factor.ndim == 1 else weight * factor
        )
    rows, columns = factor.shape[-2:] if factor.ndim in (2, weight.ndim) else (0, 0)
    b0, b1 = block or (_block_length(m, rows), _block_length(n, columns))
    if not b0 or not b1 or (-(-m // b0), -(-n // b1)) != (rows, columns):
        raise HtsrError(
            f"The scale of {name} has shape {tuple(scale.shape)}, which fits neither its rows "
            f"nor blocks of its {m} x {n} weight."
        )
    spread = factor.repeat_interleave(b0, -2)[..., :m, :].repeat_interleave(b1, -1)[..., :n]
    return weight * spread


def _block_length(length: int, blocks: int) -> int:
    """Without a configuration: 128, as everybody has it, or an even share; 0 if neither fits."""
    if -(-length // 128) == blocks:
        return 128
    return length // blocks if blocks and length % blocks == 0 else 0
