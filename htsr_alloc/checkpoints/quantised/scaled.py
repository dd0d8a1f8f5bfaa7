"""Floats (mostly fp8) beside a scale: one number, one a row or a column, or one a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from htsr_alloc.checkpoints.listing import FLOAT_DTYPES, SCALE_SUFFIXES, Packed, TensorRef
from htsr_alloc.checkpoints.quantised.base import Format, Parts, Read, There, by_rows, settings_of
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    import torch


def _find(there: There, config: Mapping[str, Any], read: Read) -> Iterator[TensorRef]:
    block = block_size(config)
    settings = f"weight_block_size {block[0]} {block[1]}" if block else ""
    for ref in there.values():
        scale = scale_of(ref, there) if ref.dtype in FLOAT_DTYPES else None
        if scale is not None:
            parts = (("weight", ref), ("scale", scale))
            yield replace(ref, packed=Packed("scaled", parts, settings))


def scale_of(ref: TensorRef, there: There) -> TensorRef | None:
    """The tensor that holds ``ref``'s scale, if there is one.

    ``x.weight_scale_inv`` or ``x.weight_scale``; of fused experts ``x_scale_inv`` or ``x_scale``;
    in DeepSeek's own files ``x.scale`` beside an fp8 ``x.weight``.
    """
    names = [ref.name + suffix for suffix in SCALE_SUFFIXES]
    if ref.name.endswith(".weight") and ref.dtype.startswith("F8"):
        names.append(ref.name.removesuffix("weight") + "scale")
    return next((there[name] for name in names if name in there), None)


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The configured rows and columns of a block that shares one scale."""
    block = settings_of(config).get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(type(b) is int for b in block):
        return (block[0], block[1]) if min(block) > 0 else None
    return None


def _decode(ref: TensorRef, parts: Parts) -> torch.Tensor:
    """The stored values times their scale.

    weight: (m, n), or of each expert; scale: (), (1,), (m,), (m, 1), (1, n) or
    (ceil(m / b0), ceil(n / b1)).
    """
    import torch

    weight, scale = parts["weight"], _scale(ref, parts["scale"])
    if weight.ndim == 3:  # all experts at once
        own = scale.shape[:1] == weight.shape[:1]
        return torch.stack(
            [_scaled(ref, w, scale[i] if own else scale) for i, w in enumerate(weight)]
        )
    return _scaled(ref, weight, scale)


def _scaled(ref: TensorRef, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    m, n = weight.shape if weight.ndim == 2 else (1, weight.numel())
    weight = weight.reshape(m, n)
    grid = (1, 1) if scale.numel() == 1 else (m, 1) if scale.shape == (m,) else scale.shape
    known = {(1, 1): (m, n), (m, 1): (1, n), (1, n): (m, 1)}
    rows, columns = grid if len(grid) == 2 else (0, 0)
    configured = [int(b) for b in ref.packed.settings.split()[1:]] if ref.packed else []
    b0, b1 = known.get((rows, columns), configured or (_length(m, rows), _length(n, columns)))
    if not b0 or not b1 or (-(-m // b0), -(-n // b1)) != (rows, columns):
        raise HtsrError(
            f"The scale of {ref.name} has shape {tuple(scale.shape)}, which fits neither "
            f"its rows nor blocks of its {m} x {n} weight."
        )
    scale = scale.reshape(rows, columns)

    def scaled(part: slice) -> torch.Tensor:
        own = scale[part.start // b0 : -(-part.stop // b0)].repeat_interleave(b1, 1)[:, :n]
        every = own.repeat_interleave(b0, 0)[part.start % b0 :][: part.stop - part.start]
        return weight[part].float().mul_(every)

    return by_rows(m, n, scaled).reshape(ref.shape[-1:] if len(ref.shape) == 1 else (m, n))


def _scale(ref: TensorRef, raw: torch.Tensor) -> torch.Tensor:
    """The scale as float32; of E8M0 it is a power of two."""
    import torch

    stored = dict(ref.packed.parts)["scale"] if ref.packed else ref
    if stored.dtype == "F8_E8M0":
        return powers_of_two(raw)
    if stored.dtype not in FLOAT_DTYPES:
        raise HtsrError(f"{stored.name} is of dtype {stored.dtype}, which is not read.")
    return raw.to(torch.float32)


def powers_of_two(raw: torch.Tensor) -> torch.Tensor:
    """E8M0, the scale of the OCP's MX formats: 2^(x - 127), and NaN for 255."""
    import torch

    exact = torch.ldexp(torch.ones(raw.shape), raw.to(torch.int32) - 127)
    return exact.masked_fill(raw == 255, float("nan"))


def _length(length: int, blocks: int) -> int:
    """Without a configuration: 128, as everybody has it, or an even share; 0 if neither fits."""
    if -(-length // 128) == blocks:
        return 128
    return length // blocks if blocks and length % blocks == 0 else 0


SCALED = Format(_find, _decode)
