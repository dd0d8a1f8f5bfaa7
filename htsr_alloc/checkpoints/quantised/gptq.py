"""GPTQ and AWQ: unsigned integers packed into words, a scale and a zero point a group of inputs.

The layouts are those of AutoGPTQ and GPTQModel (``qlinear_torch``) and of AutoAWQ (``gemm``); which
of the two a weight has is told from its shapes. AutoRound writes both, and says how it stores zero
points. Both are stored (inputs, outputs) and returned as the float checkpoint has them, (outputs,
inputs).
"""

from __future__ import annotations

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
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    import torch

PARTS = ("qzeros", "scales", "g_idx")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each half byte of a word belongs to
GPTQ_BITS = (2, 3, 4, 8)
# AutoRound's ``packing_format``: zero points less one (v1) or as they are (v2), or AWQ's layout.
AUTO_ROUND = {
    "auto": "v1",
    "auto_round:gptq": "v1",
    "auto_round:auto_gptq": "v1",
    "auto_round": "v2",
    "auto_round:gptqmodel": "v2",
    "auto_round:awq": "awq",
    "auto_round:auto_awq": "awq",
}


def _weights(there: There) -> Iterator[tuple[str, TensorRef, dict[str, TensorRef]]]:
    """(module, qweight, its other parts) of each weight that has them."""
    for ref in there.values():
        module, _, kind = ref.name.rpartition(".")
        if kind == "qweight" and ref.dtype == "I32" and len(ref.shape) == 2:
            parts = {name: there[at] for name in PARTS if (at := f"{module}.{name}") in there}
            if {"qzeros", "scales"} <= set(parts) and len(parts["scales"].shape) == 2:
                yield module, ref, parts


def _layouts(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of "v1", "v2" (GPTQ's zero points less one, or as they are) and "awq" there may be.

    Raises:
        HtsrError: the configuration names another way to pack.
    """
    method = settings.get("quant_method")
    if method in (None, "gptq", "awq"):
        version_2 = "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format"))
        return ("v2" if version_2 else "v1", "awq")
    what, said = "quant_method", method
    if method in ("auto-round", "intel/auto-round"):
        what = "packing_format" if "packing_format" in settings else "backend"
        said = settings.get(what, "auto")
        if isinstance(said, str) and said in AUTO_ROUND:
            return (AUTO_ROUND[said],)
    raise HtsrError(
        f"How the weights are packed is not known: the configuration's {what} is "
        f"{str(said)[:60]!r}."
    )


def _settings_of(module: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a module, of which AutoRound may have some of its own."""
    extra = settings.get("extra_config")
    own = extra.get(module) if isinstance(extra, dict) else None
    return {**settings, **own} if isinstance(own, dict) else settings


def _find_gptq(there: There, config: Mapping[str, Any], read: Read) -> Iterator[TensorRef]:
    whole = settings_of(config)
    for module, ref, parts in _weights(there):
        version, settings = _layouts(whole)[0], _settings_of(module, whole)
        outputs, bits = ref.shape[1], settings.get("bits", 4)
        inputs = ref.shape[0] * 32 // bits if type(bits) is int and bits in GPTQ_BITS else 0
        if (
            "g_idx" in parts and len(parts["g_idx"].shape) == 1
        ):  # tells them, whatever the configuration says of this module
            inputs = parts["g_idx"].shape[0]
            bits = 32 * ref.shape[0] // max(1, inputs)
        if not inputs or bits not in GPTQ_BITS or 32 * ref.shape[0] != bits * inputs:
            continue
        if parts["scales"].shape[1] != outputs or version == "awq":
            continue
        how, size = f"{bits} bits, {version}", settings.get("group_size")
        if "g_idx" not in parts and type(size) is int and size:
            how = f"{how}, groups of {inputs if size < 0 else size}"
        packed = Packed("gptq", (("qweight", ref), *parts.items()), how)
        shape = (outputs, inputs)
        yield TensorRef(f"{module}.weight", f"INT{bits}", shape, ref.shard, ref.begin, packed)


def _find_awq(there: There, config: Mapping[str, Any], read: Read) -> Iterator[TensorRef]:
    settings = settings_of(config)
    for module, ref, parts in _weights(there):
        inputs, outputs = ref.shape[0], 8 * ref.shape[1]
        fits = parts["scales"].shape[1] == outputs and "g_idx" not in parts
        if fits and "awq" in _layouts(settings):
            packed = Packed("awq", (("qweight", ref), *parts.items()))
            shape = (outputs, inputs)
            yield TensorRef(f"{module}.weight", "INT4", shape, ref.shard, ref.begin, packed)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(n * bits / 32, columns) int32 -> (n, columns) uint8: little-endian, without gaps."""
    import torch

    period = 3 if bits == 3 else 1  # words after which numbers begin with a word again
    groups = words.reshape(-1, period, words.shape[1]).long() & 0xFFFFFFFF
    found = []
    for start in range(0, 32 * period, bits):
        word, shift = divmod(start, 32)
        value = groups[:, word] >> shift
        if shift + bits > 32:
            value = value | (groups[:, word + 1] << (32 - shift))
        found.append((value & ((1 << bits) - 1)).to(torch.uint8))
    return torch.stack(found, 1).reshape(-1, words.shape[1])


def _decode_gptq(ref: TensorRef, parts: Parts) -> torch.Tensor:
    """qweight: (in * bits / 32, out); qzeros: (groups, out * bits / 32); scales: (groups, out);
    g_idx: (in,), the group of each input. Version 1 stores the zero points less one."""
    assert ref.packed is not None
    bits, outputs = int(ref.dtype.removeprefix("INT")), ref.shape[0]
    scales = parts["scales"].float()
    zeros = parts["qzeros"]
    if zeros.shape != (len(scales), outputs * bits // 32) or not len(scales):
        raise misfit(ref, f"qzeros {tuple(zeros.shape)}, scales {tuple(scales.shape)}")
    zeros = unpack(zeros.T, bits).T.float()
    if "v1" in ref.packed.settings:
        zeros = (zeros + 1) % 2**bits
    size = re.search(r"groups of (\d+)", ref.packed.settings)
    group = (
        parts["g_idx"] if "g_idx" in parts else _in_turn(ref, len(scales), size and int(size[1]))
    )
    return _dequantise(ref, group, scales, zeros, lambda part: _words(parts["qweight"], part, bits))


def _in_turn(ref: TensorRef, groups: int, size: int | None) -> torch.Tensor:
    """(in,), the group of each input: ``size`` after ``size``, or as many in each group."""
    import torch

    inputs = ref.shape[1]
    if -(-inputs // size) != groups if size else inputs % groups:
        said = f" of {size}" if size else ""
        raise misfit(ref, f"{inputs} inputs, {groups} groups{said}")
    return torch.arange(inputs) // (size or max(1, inputs // groups))


def _words(words: torch.Tensor, part: slice, bits: int) -> torch.Tensor:
    return unpack(words[part.start * bits // 32 : part.stop * bits // 32], bits)


def _decode_awq(ref: TensorRef, parts: Parts) -> torch.Tensor:
    """qweight: (in, out / 8); qzeros: (groups, out / 8); scales: (groups, out)."""
    scales, zeros = parts["scales"].float(), parts["qzeros"]
    if zeros.shape != (len(scales), ref.shape[0] // 8) or not len(scales):
        raise misfit(ref, f"qzeros {tuple(zeros.shape)}, scales {tuple(scales.shape)}")
    zeros = _interleaved(zeros).float()
    group = _in_turn(ref, len(scales), None)
    return _dequantise(ref, group, scales, zeros, lambda part: _interleaved(parts["qweight"][part]))


def _interleaved(words: torch.Tensor) -> torch.Tensor:
    """(rows, n / 8) int32 -> (rows, n) uint8 in AWQ's order."""
    import torch

    values = unpack(words.reshape(1, -1), 4).reshape(8, *words.shape)  # the half bytes of a word
    out = torch.empty(*words.shape, 8, dtype=torch.uint8)
    out[..., list(AWQ_ORDER)] = values.permute(1, 2, 0)
    return out.flatten(1)


def _dequantise(
    ref: TensorRef, group: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, codes
) -> torch.Tensor:
    """(out, in): scales[g] (q - zeros[g]), g the group of an input."""
    outputs, inputs = ref.shape
    if bool((group < 0).any()) or bool((group >= len(scales)).any()):
        raise misfit(ref, f"g_idx names a group that is not among its {len(scales)}")
    group = group.long()

    def rows(part: slice) -> torch.Tensor:
        own = group[part]
        return codes(part).float().sub_(zeros[own]).mul_(scales[own])

    return by_rows(inputs, outputs, rows, multiple=32).T


GPTQ = Format(_find_gptq, _decode_gptq)
AWQ = Format(_find_awq, _decode_awq)
