"""What a format of quantised weights is, and what several formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from htsr_alloc.checkpoints.listing import TensorRef
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    import torch

Parts = Mapping[str, "torch.Tensor"]
There = Mapping[str, TensorRef]
Read = Callable[[TensorRef], bytes]  # a small tensor's bytes

CHUNK = 1 << 20  # weights that are decoded at a time


@dataclass(frozen=True)
class Format:
    """One way to store a quantised weight.

    Attributes:
        find: (tensors by name, config, read) -> the float tensors that some of them make.
        decode: (the tensor, its parts) -> (rows, columns) float32.
        library: what ``decode`` imports, if not only numpy and torch.
        library_bytes: the memory that importing it takes.
    """

    find: Callable[[There, Mapping[str, Any], Read], Iterator[TensorRef]]
    decode: Callable[[TensorRef, Parts], torch.Tensor]
    library: str | None = None
    library_bytes: int = 0


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's own words on quantisation; empty where it has none."""
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if isinstance(found, dict):
            return found
    return {}


def by_rows(
    rows: int, columns: int, decode: Callable[[slice], torch.Tensor], multiple: int = 1
) -> torch.Tensor:
    """(rows, columns) float32, made some rows at a time so that little is held on top.

    Args:
        decode: rows -> their float values; called on slices that start at multiples of
            ``multiple``.
    """
    import torch

    out = torch.empty(rows, columns)
    step = max(1, CHUNK // max(1, columns * multiple)) * multiple
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        out[part] = decode(part)
    return out


def misfit(ref: TensorRef, why: str) -> HtsrError:
    """The refusal of a weight whose parts do not fit each other."""
    return HtsrError(f"The parts of {ref.name} do not fit each other: {why}.", "Fetch it again.")


def no_library(name: str, what: str) -> HtsrError:
    """What to say where the library that owns a format is not installed."""
    return HtsrError(
        f"{what} needs the package {name}, which is not installed.",
        "pip install 'htsr-alloc[quantized]'",
    )
