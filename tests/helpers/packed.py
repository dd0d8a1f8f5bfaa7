"""Quantised weights as their own tools store them, each restated number by number."""

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
    groups = inputs // group
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
