"""One tensor at a time out of a checkpoint, wherever its bytes are, dequantised if need be."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from htsr_alloc.checkpoints import quantised
from htsr_alloc.checkpoints.listing import (
    PART_DTYPES,
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

    @functools.cached_property
    def tensors(self) -> tuple[TensorRef, ...]:
        """Every tensor, in shard order; the parts of a quantised weight as the one they make."""
        return quantised.fold(self.listing.tensors, self.config, self._bytes)

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

    def read(
        self,
        ref: TensorRef,
        index: int | None = None,
        digest: Any = None,
        rows: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """One tensor, or slice ``index`` of its first axis (CPU): as stored, or dequantised.

        Of a tensor that is not quantised ``rows`` may be the first of those wanted and the one
        after the last.

        What was quantised is returned in float32. All that the result depends on, the stored
        bytes and then the settings of the format, is fed to ``digest`` (a hashlib object).

        Raises:
            HtsrError: the file cannot be read or is not what its header said, or the parts of a
                quantised weight do not fit each other.
        """
        if ref.packed is None:
            if not ref.is_float:
                raise HtsrError(f"{ref.name} is of dtype {ref.dtype}, which is not read.")
            return self._raw(ref, index, digest, rows)
        assert rows is None
        parts = {}
        for role, part in ref.packed.parts:
            own = index is not None and part.shape[:1] == ref.shape[:1]  # each expert its own
            parts[role] = self._raw(part, index if own else None, digest)
        if digest is not None:
            digest.update(ref.packed.settings.encode())
        return quantised.decode(ref, parts)

    def stamp(self, ref: TensorRef) -> str:
        """What differs when a file that ``ref`` is read from was replaced or written to, even if
        its size and time are the same; "" for the hub, whose commits never change."""
        return " ".join(sorted(shard.stamp for shard in self.shards_of(ref)))

    def shards_of(self, ref: TensorRef) -> set[Shard]:
        """The files that reading ``ref`` needs."""
        return {self.listing.shards[part.shard] for part in ref.stored}

    def _raw(
        self,
        ref: TensorRef,
        index: int | None,
        digest: Any,
        rows: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        import torch

        if ref.dtype not in PART_DTYPES:
            raise HtsrError(f"{ref.name} is of dtype {ref.dtype}, which is not read.")
        size, dtype = PART_DTYPES[ref.dtype]
        shape, begin = ref.shape, ref.begin
        if index is not None:
            shape = shape[1:]
            begin += index * math.prod(shape) * size
        if rows is not None:
            shape = (rows[1] - rows[0], *shape[1:])
            begin += rows[0] * math.prod(shape[1:]) * size
        raw = torch.empty(math.prod(shape) * size, dtype=torch.uint8)
        view = raw.numpy().data
        if len(view):
            self.store.read(self.listing.shards[ref.shard], begin, view)
        if digest is not None:
            digest.update(view)
        return raw.view(getattr(torch, dtype)).reshape(shape)

    def _bytes(self, ref: TensorRef) -> bytes:
        """A small tensor that says how another is stored.

        Raises:
            HtsrError: it is in a file that would have to be downloaded as a whole.
        """
        if self.store.by_shard:
            raise HtsrError(
                f"The shapes of {self.name}'s weights are inside its files, which are not here.",
                "Fetch it with `hf download` and give the folder, or use `stream`.",
            )
        return self._raw(ref, None, None).numpy().tobytes()


def readable(text: str) -> str:
    """Text that UTF-8 can hold: what it cannot (a lone surrogate) becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
