"""bitsandbytes: NF4 and FP4 by a table of 16 numbers, int8 by a scale a row.

The layout is that of ``bitsandbytes.functional.QuantState.as_dict(packed=True)`` and of
``Linear8bitLt``. Of a byte the high half comes first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from htsr_alloc.checkpoints.listing import Packed, TensorRef
from htsr_alloc.checkpoints.quantised.base import CHUNK, Format, Parts, Read, There, misfit
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    import torch

TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
MAX_STATE = 10_000  # bytes of the JSON beside a weight


def _find(there: There, config: Mapping[str, Any], read: Read) -> Iterator[TensorRef]:
    for ref in there.values():
        if ref.dtype == "I8" and ref.name.endswith(".weight") and len(ref.shape) == 2:
            scale = there.get(ref.name.removesuffix("weight") + "SCB")
            if scale is not None:
                form = there.get(f"{ref.name}_format")
                parts = [("weight", ref), ("SCB", scale)]
                parts += [("format", form)] if form is not None else []
                packed = Packed("bitsandbytes", tuple(parts), "int8")
                yield TensorRef(ref.name, "INT8", ref.shape, ref.shard, ref.begin, packed)
        for kind in ("nf4", "fp4"):
            state = there.get(f"{ref.name}.quant_state.bitsandbytes__{kind}")
            if state is not None and ref.dtype == "U8":
                yield _four_bits(ref, kind, state, there, read)


def _four_bits(ref: TensorRef, kind: str, state: TensorRef, there: There, read: Read) -> TensorRef:
    """The weight whose shape is written in the JSON beside it."""
    wrong = HtsrError(f"{state.name} does not say how {ref.name} is stored.", "Fetch it again.")
    if state.nbytes > MAX_STATE:
        raise wrong
    try:
        found = json.loads(read(state))
        shape, block = tuple(found["shape"]), found["blocksize"]
        nested, offset = found.get("nested_blocksize", 0), float(found.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise wrong from None
    counts = (*shape, block, nested)
    if not all(type(n) is int and 0 <= n < 2**40 for n in counts) or not block or len(shape) > 3:
        raise wrong
    if (math.prod(shape) + 1) // 2 != math.prod(ref.shape):
        raise misfit(ref, f"{math.prod(ref.shape)} bytes do not hold the shape {list(shape)}")
    parts = [("weight", ref)]
    parts += [(name, there[at]) for name in TABLES if (at := f"{ref.name}.{name}") in there]
    settings = json.dumps({"block": block, "nested": nested, "offset": offset})
    packed = Packed("bitsandbytes", (*parts, ("state", state)), settings)
    return TensorRef(ref.name, kind.upper(), shape, ref.shard, ref.begin, packed)


def _decode(ref: TensorRef, parts: Parts) -> torch.Tensor:
    assert ref.packed is not None
    return (_int8 if ref.packed.settings == "int8" else _table)(ref, parts)


def _int8(ref: TensorRef, parts: Parts) -> torch.Tensor:
    """weight: (m, n) int8; SCB: (m,), the largest of a row, which 127 stands for."""
    if "format" in parts and int(parts["format"].flatten()[0]) != 0:
        raise misfit(ref, "it is stored in a layout of the GPU")
    if parts["SCB"].shape != ref.shape[:1]:
        raise misfit(ref, f"SCB has the shape {tuple(parts['SCB'].shape)}")
    return parts["weight"].float().mul_(parts["SCB"].float()[:, None] / 127)


def _table(ref: TensorRef, parts: Parts) -> torch.Tensor:
    """weight: (n / 2, 1) bytes; absmax: (n / block,), which may be quantised itself."""
    import torch

    assert ref.packed is not None
    if not {"absmax", "quant_map"} <= set(parts):
        raise misfit(ref, "absmax or quant_map is missing")
    settings, table = json.loads(ref.packed.settings), parts["quant_map"].float()
    absmax, block, nested = parts["absmax"], settings["block"], settings["nested"]
    if absmax.dtype == torch.uint8:
        codes, scales = parts.get("nested_quant_map"), parts.get("nested_absmax")
        if codes is None or scales is None or not nested or len(codes) != 256:
            raise misfit(ref, "its absmax is quantised and lacks the tables")
        if len(scales) * nested < len(absmax):
            raise misfit(ref, f"nested_absmax {tuple(scales.shape)}, absmax {tuple(absmax.shape)}")
        codes, scales = codes.float(), scales.float()
        every = scales.repeat_interleave(nested)[: len(absmax)]
        absmax = codes[absmax.long()] * every + settings["offset"]
    count, packed = math.prod(ref.shape), parts["weight"].flatten()
    if len(table) != 16 or len(absmax) * block < count or absmax.ndim != 1:
        raise misfit(ref, f"absmax {tuple(absmax.shape)}, quant_map {tuple(table.shape)}")
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # (256, 2)
    out = torch.empty(count)
    step = math.lcm(block, 2) * max(1, CHUNK // math.lcm(block, 2))
    for start in range(0, count, step):
        made = pairs[packed[start // 2 : (start + step + 1) // 2].long()].flatten()
        made = made[: count - start]
        own = absmax.float()[start // block : -(-(start + step) // block)]
        out[start : start + step] = made * own.repeat_interleave(block)[: len(made)]
    return out.reshape(ref.shape)


BITSANDBYTES = Format(_find, _decode)
