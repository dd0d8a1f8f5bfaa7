"""Quantised weights: which stored tensors make one float matrix, and how.

A format is one file and one row of ``FORMATS``. None runs a model's code or unpickles anything, and
each makes one matrix at a time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from htsr_alloc.checkpoints.listing import TensorRef
from htsr_alloc.checkpoints.quantised.base import Format, Parts, Read, no_library
from htsr_alloc.checkpoints.quantised.bnb import BITSANDBYTES
from htsr_alloc.checkpoints.quantised.compressed import COMPRESSED
from htsr_alloc.checkpoints.quantised.fp4 import FP4
from htsr_alloc.checkpoints.quantised.ggml import GGUF
from htsr_alloc.checkpoints.quantised.gptq import AWQ, GPTQ
from htsr_alloc.checkpoints.quantised.scaled import SCALED

if TYPE_CHECKING:
    import torch

# In the order in which they may claim a tensor.
FORMATS: dict[str, Format] = {
    "gguf": GGUF,
    "bitsandbytes": BITSANDBYTES,
    "gptq": GPTQ,
    "awq": AWQ,
    "fp4": FP4,
    "compressed-tensors": COMPRESSED,
    "scaled": SCALED,
}


def fold(
    tensors: Sequence[TensorRef], config: Mapping[str, Any], read: Read
) -> tuple[TensorRef, ...]:
    """The tensors, where those that make one quantised weight have become that weight.

    Args:
        tensors: as the files' headers list them.
        config: the model's configuration.
        read: the bytes of a small tensor; few formats need one here.
    """
    there = {ref.name: ref for ref in tensors}
    place = {ref.name: number for number, ref in enumerate(tensors)}
    found: dict[int, TensorRef] = {}
    for form in FORMATS.values():
        for ref in list(form.find(there, config, read)):
            for part in ref.stored:
                there.pop(part.name, None)
            found[min(place[part.name] for part in ref.stored)] = ref
    found |= {place[name]: ref for name, ref in there.items()}
    return tuple(found[number] for number in sorted(found))


def decode(ref: TensorRef, parts: Parts) -> torch.Tensor:
    """The float32 matrix that a packed tensor, or one slice of it, stands for.

    Args:
        parts: as ``ref.packed`` names them, raw.

    Raises:
        HtsrError: they do not fit each other, or a library is not installed.
    """
    assert ref.packed is not None
    return FORMATS[ref.packed.format].decode(ref, parts)


def check_libraries(refs: Iterable[TensorRef]) -> None:
    """Raise HtsrError where a library that reading the tensors needs is not installed."""
    for form in {ref.packed.format for ref in refs if ref.packed is not None}:
        library = FORMATS[form].library
        if library and importlib.util.find_spec(library.replace("-", "_")) is None:
            raise no_library(library, f"Reading weights in {form} format")


def library_bytes(refs: Iterable[TensorRef]) -> int:
    """The memory that the libraries take which reading the tensors needs."""
    forms = {ref.packed.format for ref in refs if ref.packed is not None}
    return sum(FORMATS[form].library_bytes for form in forms)


def kinds(refs: Iterable[TensorRef]) -> list[tuple[str, str, int]]:
    """(format, dtype, how many) of what is dequantised."""
    found = Counter((ref.packed.format, ref.dtype) for ref in refs if ref.packed is not None)
    return [(*kind, count) for kind, count in sorted(found.items())]


def identity(refs: Iterable[TensorRef]) -> list[str]:
    """All that dequantised matrices depend on besides their bytes: formats, settings, versions."""
    packed = [ref.packed for ref in refs if ref.packed is not None]
    forms = {f"{form} {decoder(form)}".strip() for form in {p.format for p in packed}}
    return sorted(forms | {p.settings for p in packed if p.settings})


def decoder(form: str) -> str:
    """The library, with its version, that decodes a format; "" where it is this one."""
    library = FORMATS[form].library
    return f"{library} {importlib.metadata.version(library)}" if library else ""
