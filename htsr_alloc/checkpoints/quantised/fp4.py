"""4-bit floats (E2M1) under the scale of a block: MXFP4 and NVFP4, in several spellings.

E2M1 and the block scales E8M0 are those of the OCP Microscaling Formats specification 1.0; NVFP4
has fp8 scales of 16 numbers and one scale of the whole matrix. Of a byte the low half comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from htsr_alloc.checkpoints.listing import Packed, TensorRef
from htsr_alloc.checkpoints.quantised.base import Format, Parts, Read, There, by_rows, misfit
from htsr_alloc.checkpoints.quantised.scaled import powers_of_two

if TYPE_CHECKING:
    import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# What the scale of the whole matrix does, by its name (compressed-tensors, NVIDIA's modelopt).
GLOBAL = {"weight_global_scale": "divide", "weight_scale_2": "multiply"}


def _find(there: There, config: Mapping[str, Any], read: Read) -> Iterator[TensorRef]:
    for ref in there.values():
        stem, _, kind = ref.name.rpartition("_")
        if kind == "blocks" and ref.dtype == "U8":  # gpt-oss: (E, out, in / 32, 16)
            scale = there.get(f"{stem}_scales")
            if scale is not None and ref.shape == (*scale.shape, 16) and len(ref.shape) == 4:
                experts, rows, blocks, _ = ref.shape
                parts = (("codes", ref), ("scale", scale))
                packed = Packed("fp4", parts, "transposed")
                shape = (experts, 32 * blocks, rows)  # as the float checkpoint has it
                yield TensorRef(stem, "MXFP4", shape, ref.shard, ref.begin, packed)
            continue
        module, _, kind = ref.name.rpartition(".")
        if kind not in ("weight_packed", "weight") or ref.dtype not in ("U8", "I8"):
            continue
        names = (f"{module}.weight_scale", f"{module}.scale")
        scale = next((there[name] for name in names if name in there), None)
        if scale is None or len(ref.shape) < 2 or scale.shape[:-1] != ref.shape[:-1]:
            continue
        if ref.dtype == "I8" and scale.dtype != "F8_E8M0":
            continue  # 8-bit integers
        parts, settings = [("codes", ref), ("scale", scale)], ""
        for name, action in GLOBAL.items():
            if f"{module}.{name}" in there:
                parts.append(("global", there[f"{module}.{name}"]))
                settings = action
        shape = (*ref.shape[:-1], 2 * ref.shape[-1])
        if shape[-1] in (16 * scale.shape[-1], 32 * scale.shape[-1]):
            dtype = "NVFP4" if shape[-1] == 16 * scale.shape[-1] else "MXFP4"
            packed = Packed("fp4", tuple(parts), settings)
            yield TensorRef(f"{module}.weight", dtype, shape, ref.shard, ref.begin, packed)


def _decode(ref: TensorRef, parts: Parts) -> torch.Tensor:
    """codes: (m, n / 2) or (m, blocks, 16); scale: (m, blocks); global: one number."""
    import torch

    assert ref.packed is not None
    codes, scale = parts["codes"].view(torch.uint8), parts["scale"]
    if scale.ndim == 3:  # all experts at once
        own = [role for role, part in parts.items() if part.shape[:1] == codes.shape[:1]]
        stack = [{**parts} | {role: parts[role][i] for role in own} for i in range(len(codes))]
        return torch.stack([_decode(ref, one) for one in stack])
    if not scale.is_floating_point() and scale.dtype != torch.uint8:
        raise misfit(ref, f"its scales are {scale.dtype}")
    codes, blocks = codes.flatten(1), scale.shape[1]
    halves = torch.tensor([*E2M1, *(-value for value in E2M1)])
    pairs = torch.stack([halves.repeat(16), halves.repeat_interleave(16)], 1)  # (256, 2)
    whole = parts.get("global", torch.ones(1)).float()
    if whole.numel() != 1:
        raise misfit(ref, f"its scale of the whole has the shape {tuple(whole.shape)}")
    whole = 1 / whole.reshape(()) if ref.packed.settings == "divide" else whole.reshape(())

    def rows(part: slice) -> torch.Tensor:
        own = scale[part]
        own = powers_of_two(own) if own.dtype == torch.uint8 else own.float()
        made = pairs[codes[part].long()].reshape(len(own), blocks, -1)
        return made.mul_((own * whole)[:, :, None]).flatten(1)

    made = by_rows(len(codes), 2 * codes.shape[1], rows)
    return made.T if ref.packed.settings == "transposed" else made


FP4 = Format(_find, _decode)
