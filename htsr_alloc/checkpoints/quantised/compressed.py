"""Integers of compressed-tensors (vLLM's own format), by that library's functions.

Its fp8 weights are ``scaled`` and its fp4 weights ``fp4``, which need no library. The library would
give the numbers in the dtype of the scales; they are turned to float32 first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from htsr_alloc.checkpoints.listing import Packed, TensorRef
from htsr_alloc.checkpoints.quantised.base import (
    Format,
    Parts,
    Read,
    There,
    by_rows,
    misfit,
    settings_of,
)

if TYPE_CHECKING:
    import torch

PARTS = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")


def _find(there: There, config: Mapping[str, Any], read: Read) -> Iterator[TensorRef]:
    for ref in there.values():
        module, _, kind = ref.name.rpartition(".")
        known = (kind, ref.dtype) in (("weight_packed", "I32"), ("weight", "I8"))
        if not known or f"{module}.weight_scale" not in there or len(ref.shape) not in (2, 3):
            continue
        args = _arguments(module, settings_of(config))
        bits = args.get("num_bits")
        if args.get("type", "int") != "int" or type(bits) is not int or not 1 <= bits <= 8:
            continue
        columns = ref.shape[-1] * 32 // bits if kind == "weight_packed" else ref.shape[-1]
        parts = [(kind, ref)]
        parts += [(name, there[at]) for name in PARTS if (at := f"{module}.{name}") in there]
        packed = Packed("compressed-tensors", tuple(parts), json.dumps(args, sort_keys=True))
        shape = (*ref.shape[:-1], columns)
        yield TensorRef(f"{module}.weight", f"INT{bits}", shape, ref.shard, ref.begin, packed)


def _arguments(module: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says of a module's weights: a group that names it, or a class."""
    groups = config.get("config_groups")
    found: dict[str, Any] = {}
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or not isinstance(targets, list):
            continue
        named = any(_names(target, module) for target in targets if isinstance(target, str))
        if named or not found:
            found = weights
        if named:
            break
    keys = ("num_bits", "type", "strategy", "group_size", "symmetric", "block_structure")
    return {key: found[key] for key in keys if key in found}


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error:
        return False


def _decode(ref: TensorRef, parts: Parts) -> torch.Tensor:
    """weight_packed: (m, n * bits / 32), or weight: (m, n); weight_scale: (m, groups) or less;
    weight_zero_point: as the scale, packed along the rows."""
    import torch
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    assert ref.packed is not None
    kind, stored = next((name, parts[name]) for name, _ in ref.packed.parts)
    if stored.ndim == 3:
        stack = [{k: v[i] for k, v in parts.items()} for i in range(len(stored))]
        return torch.stack([_decode(ref, own) for own in stack])
    settings = json.loads(ref.packed.settings)
    bits, (m, n) = settings["num_bits"], (len(stored), ref.shape[-1])
    shape = parts.get("weight_shape")
    if shape is not None and shape.flatten()[-1] != n:
        raise misfit(ref, f"{n} columns are packed, and its weight_shape is {shape.tolist()}")
    scale, zero = parts["weight_scale"].float(), parts.get("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32 and kind == "weight_packed":
        zero = unpack_from_int32(zero, bits, torch.Size((m, scale.shape[-1])), packed_dim=0)
    order = _order(ref, parts.get("weight_g_idx"))

    def rows(part: slice) -> torch.Tensor:
        values = stored[part]
        if kind == "weight_packed":
            values = unpack_from_int32(values, bits, torch.Size((len(values), n)))
        values = values if order is None else values[:, order]
        own = scale[part] if len(scale) == m else scale
        point = zero[part] if zero is not None and len(zero) == m else zero
        made = dequantize(values, own, point, args)
        if order is None:
            return made
        return torch.empty_like(made).index_copy_(1, order, made)

    args = QuantizationArgs.model_validate(settings)
    if args.strategy == "block":
        return rows(slice(None))
    return by_rows(m, n, rows)


def _order(ref: TensorRef, groups: torch.Tensor | None) -> torch.Tensor | None:
    """The columns sorted by their group, where those were chosen by activations."""
    import torch

    if groups is None or bool((groups < 0).any()):  # -1: not set
        return None
    if groups.shape != ref.shape[-1:]:
        raise misfit(ref, f"its weight_g_idx has the shape {tuple(groups.shape)}")
    return torch.argsort(groups, stable=True)


# Imports transformers.
COMPRESSED = Format(_find, _decode, "compressed-tensors", 176 << 20)
