"""Quantised weights as their own tools store them, each restated number by number."""

import pytest
import torch

MODULE = "model.layers.{}.self_attn.q_proj"
NAME = MODULE + ".weight"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_of(values, bits, axis):
    """AutoGPTQ's packing: numbers side by side, least bit first, in 32-bit words along ``axis``."""
    values = values.movedim(axis, 0).tolist()
    columns = []
    for column in zip(*values, strict=True):
        stream = sum(number << (bits * i) for i, number in enumerate(column))
        words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(column) * bits // 32)]
        columns.append([w - 2**32 if w >= 2**31 else w for w in words])
    return torch.tensor(columns, dtype=torch.int32).T.movedim(0, axis).contiguous()


def gptq(inputs, outputs, group, bits, *, version=1, order=False, seed=0):
    """A layer by AutoGPTQ's rule, and the (outputs, inputs) matrix that it stands for."""
    made = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    q = torch.randint(0, 2**bits, (inputs, outputs), generator=made)
    zeros = torch.randint(0, 2**bits, (groups, outputs), generator=made)
    scales = (torch.rand(groups, outputs, generator=made) + 0.5).half()
    g_idx = torch.arange(inputs) // group
    if order:
        g_idx = g_idx[torch.randperm(inputs, generator=made)]
    weight = scales.double()[g_idx] * (q - zeros[g_idx]).double()
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    return {
        "qweight": bits_of(q, bits, 0),
        "qzeros": bits_of(stored, bits, 1),
        "scales": scales,
        "g_idx": g_idx.int(),
    }, weight.T.float()


def awq(inputs, outputs, group, seed=0):
    """A layer by AutoAWQ's rule: output 8 i + ORDER[k] is half byte k of word i."""
    made = torch.Generator().manual_seed(seed)
    groups = inputs // group
    q = torch.randint(0, 16, (inputs, outputs), generator=made)
    zeros = torch.randint(0, 16, (groups, outputs), generator=made)
    scales = (torch.rand(groups, outputs, generator=made) + 0.5).half()
    g = torch.arange(inputs) // group
    weight = scales.double()[g] * (q - zeros[g]).double()

    def pack(values):
        words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
        for column in range(words.shape[1]):
            for k, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, column] |= values[:, 8 * column + output] << (4 * k)
        return words.to(torch.int32)

    return {"qweight": pack(q), "qzeros": pack(zeros), "scales": scales}, weight.T.float()


def under(module, parts):
    return {f"{module}.{name}": value.contiguous() for name, value in parts.items()}


INT = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}
COMPRESSED = {
    "int4": ("pack-quantized", INT),
    "int4 asymmetric": ("pack-quantized", INT | {"symmetric": False}),
    "int4 channel": ("pack-quantized", INT | {"strategy": "channel", "group_size": None}),
    "int8": ("pack-quantized", INT | {"num_bits": 8}),
    "int3": ("pack-quantized", INT | {"num_bits": 3}),
    "int8 naive": (
        "int-quantized",
        INT | {"num_bits": 8, "strategy": "channel", "group_size": None},
    ),
    "fp8": (
        "float-quantized",
        {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "channel"},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "type": "float",
            "num_bits": 4,
            "strategy": "tensor_group",
            "group_size": 16,
            "symmetric": True,
            "scale_dtype": "torch.float8_e4m3fn",
        },
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {
            "type": "float",
            "num_bits": 4,
            "strategy": "group",
            "group_size": 32,
            "symmetric": True,
            "scale_dtype": "torch.uint8",
        },
    ),
}


def compressed(weight, form, args):
    """The library's own parts of a weight, and what it makes of them in the scales' dtype."""
    pytest.importorskip("compressed_tensors", reason="needs the extra [quantized]")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    settings = QuantizationArgs.model_validate(args)
    m, n = weight.shape
    grouped = weight.reshape(m, -1, args.get("group_size") or n)
    low, high = grouped.amin(-1), grouped.amax(-1)
    whole = {}
    if form.startswith("nvfp4"):
        whole = {"weight_global_scale": (448 * 6 / weight.abs().max()).float().reshape(1)}
        scale = (grouped.abs().amax(-1) / 6 * whole["weight_global_scale"]).to(torch.float8_e4m3fn)
        scale, zero = scale.float(), torch.zeros(m, scale.shape[1])
    elif form.startswith("mxfp4"):
        scale, zero = 2.0 ** torch.floor(torch.log2(grouped.abs().amax(-1)) - 2), None
    else:
        scale, zero = calculate_qparams(low, high, settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=settings, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight, "weight_scale": scale, **whole}
    if zero is not None:
        state["weight_zero_point"] = zero.to(torch.int8) if args["type"] == "int" else zero
    parts = compressor.compress(state, scheme)
    return parts, compressor.decompress(dict(parts), scheme)["weight"]


def compressed_config(kind):
    """What config.json says of a checkpoint of this kind."""
    form, args = COMPRESSED[kind]
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
    }
