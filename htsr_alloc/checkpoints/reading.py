"""One tensor at a time out of a checkpoint, wherever its bytes are, scales applied."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from htsr_alloc.checkpoints.listing import (
    FLOAT_DTYPES,
    SCALE_SUFFIXES,
    Listing,
    Shard,
    TensorRef,
    Transfer,
)
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    import torch


class Store(Protocol):
    """Where the bytes of shards are; used from several threads."""

    @property
    def by_shard(self) -> bool:
        """Whether a shard's tensors should be read together, because it comes as a whole."""
        ...

    def read(self, shard: Shard, begin: int, into: memoryview) -> None:
        """Fill ``into`` with the shard's bytes from ``begin`` on, or raise HtsrError."""
        ...

    def release(self, shard: Shard) -> None:
        """Nothing more will be read of this shard."""
        ...

    def transfer(self, shards: Sequence[Shard], tensors: int) -> Transfer:
        """What reading these shards, in this order, will move; ``tensors`` bytes are wanted."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Tensors in shard order, and how to read them.

    ``store`` holds the bytes. ``revision`` is the hub's commit hash, null for local files;
    ``paths`` are the local files that the checkpoint is read from.
    """

    name: str
    revision: str | None
    config: dict[str, Any]
    listing: Listing
    store: Store
    paths: tuple[Path, ...] = ()

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
        return readable(first) if isinstance(first, str) else None

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

    def read(self, ref: TensorRef, index: int | None = None, digest: Any = None) -> torch.Tensor:
        """One tensor, or slice ``index`` of its first axis, as stored (CPU).

        With a scale the product is returned, in float32. The stored bytes, then those of the
        whole scale and the configured size of its blocks, if any, are fed to ``digest`` (a hashlib
        object): all that the result depends on, read once.

        Raises:
            HtsrError: the file cannot be read or is not what its header said, or the scale's
                shape does not fit.
        """
        raw = self._raw(ref, index, digest)
        scale_ref = self.scale_of(ref)
        if scale_ref is None:
            return raw
        scale = self._raw(scale_ref, None, digest)
        if index is not None and scale_ref.shape[:1] == ref.shape[:1]:  # one scale an expert
            scale = scale[index]
        block = self.weight_block_size
        if digest is not None and block is not None:
            digest.update(f"weight_block_size {block[0]} {block[1]}".encode())
        return _apply_scale(raw, scale, block, ref.name)

    def stamp(self, ref: TensorRef) -> str:
        """What differs when a file that ``ref`` is read from was replaced or written to, even if
        its size and time are the same; "" for the hub, whose commits never change."""
        return " ".join(sorted(shard.stamp for shard in self.shards_of(ref)))

    def shards_of(self, ref: TensorRef) -> set[Shard]:
        """The files that reading ``ref`` needs."""
        parts = (ref, self.scale_of(ref))
        return {self.listing.shards[part.shard] for part in parts if part is not None}

    def _raw(self, ref: TensorRef, index: int | None, digest: Any) -> torch.Tensor:
        import torch

        if ref.dtype not in FLOAT_DTYPES:
            raise HtsrError(f"{ref.name} is of dtype {ref.dtype}, which is not read.")
        size, dtype = FLOAT_DTYPES[ref.dtype]
        shape, begin = ref.shape, ref.begin
        if index is not None:
            shape = shape[1:]
            begin += index * math.prod(shape) * size
        raw = torch.empty(math.prod(shape) * size, dtype=torch.uint8)
        view = raw.numpy().data
        if len(view):
            self.store.read(self.listing.shards[ref.shard], begin, view)
        if digest is not None:
            digest.update(view)
        return raw.view(getattr(torch, dtype)).reshape(shape)

    @property
    def weight_block_size(self) -> tuple[int, int] | None:
        """The configured rows and columns of a block that shares one scale."""
        quantization = self.config.get("quantization_config")
        block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        if isinstance(block, list) and len(block) == 2 and all(type(b) is int for b in block):
            return (block[0], block[1]) if min(block) > 0 else None
        return None


def readable(text: str) -> str:
    """Text that UTF-8 can hold: what it cannot (a lone surrogate) becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


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
