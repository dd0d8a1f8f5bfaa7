"""What counts as a linear, which are left out, and a linear's weight, widths and block."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from htsr_alloc.checkpoints.rules import (
    EXPERT,
    is_mixture,
    is_router,
    left_alone,
    skipped_by_name,
)
from htsr_alloc.errors import HtsrError

# Modules that mix the tokens of a sequence; a name such as "mixer" may hold a feed-forward part.
MIXES_BY_NAME = re.compile(r"att(n|ention)|mamba|ssm|rnn|lstm|conv|temporal", re.IGNORECASE)
MIXES_BY_CLASS = re.compile(r"Att(n|ention)|Mamba|Mixer|SSM|RNN|LSTM|Conv")


def base_weight(base_layer: nn.Module) -> Tensor:
    """The frozen weight (d_out, d_in); a GPT-2 Conv1D's is transposed, without a copy."""
    weight = getattr(base_layer, "qweight", None)
    weight = base_layer.weight if weight is None else weight
    assert isinstance(weight, Tensor)
    return weight.t() if type(base_layer).__name__ == "Conv1D" else weight


def is_plain(weight: Tensor) -> bool:
    """Whether its elements are the weight's values: no integers, fp8, or a quantiser's own class.

    Such a class is one of a package beside torch (torchao, quanto); bitsandbytes' weights are
    integers.
    """
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return weight.dtype in floats and type(weight.data).__module__.partition(".")[0] == "torch"


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """An adapter's dtype on a weight: float32, or float64 on such a base."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def widths(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear, quantised ones too; None of any other module.

    A grouped linear is none: each group of its inputs meets its own rows of the weight.
    """
    if type(module).__name__ == "Conv1D":
        d_in, d_out = module.weight.shape  # type: ignore[union-attr, misc]
        return int(d_in), int(d_out)
    kind = type(module).__name__
    named = (isinstance(module, nn.Linear) or "Linear" in kind) and "Grouped" not in kind
    if named and not isinstance(module, BaseTunerLayer):
        d_in = getattr(module, "in_features", getattr(module, "infeatures", None))
        d_out = getattr(module, "out_features", getattr(module, "outfeatures", None))
        if isinstance(d_in, int) and isinstance(d_out, int):
            return d_in, d_out
    return None


def left_out(model: nn.Module) -> dict[str, str]:
    """The linears that are adapted only where they are named, and why, by full name.

    The model's own routers and gates and whatever else an analysis leaves out by its name; its
    own experts; and linears on which an adapter would never act.
    """
    weights = ((name, p.dim()) for name, p in model.named_parameters())
    mixtures = {block_of(name) for name, dims in weights if is_mixture(name, dims)}
    found = {}
    for name, _ in model.named_modules():
        reason = skipped_by_name(name) or left_alone(name)
        if reason is None and block_of(name) in mixtures and is_router(name):
            reason = "router"
        if reason is not None:
            found[name] = reason
    return found


def feed_forward(model: nn.Module) -> list[str]:
    """The linears of a model's blocks that are outside attention, or what stands in its place.

    A module is attention, a state space or a convolution by its name or its class's; what it holds
    is no feed-forward linear. Neither is what ``left_out`` names.
    """
    modules, avoided = dict(model.named_modules()), left_out(model)

    def mixes(name: str) -> bool:
        block, parts = block_of(name), name.split(".")
        inside = [".".join(parts[:i]) for i in range(1, len(parts))]
        kinds = [type(modules[n]).__name__ for n in inside if n.startswith(block + ".")]
        return any(map(MIXES_BY_NAME.search, parts)) or any(map(MIXES_BY_CLASS.search, kinds))

    linears = [name for name, module in modules.items() if widths(module) and name not in avoided]
    names = dict.fromkeys(n.removesuffix(".base_layer") for n in linears)  # adapted before
    return [n for n in names if re.search(r"\.\d+\.", n) and not mixes(n)]


@dataclass(frozen=True)
class LeftAlone:
    """Linears or tensors of experts that get no adapter; * stands for the numbers in ``name``."""

    name: str
    count: int
    reason: str


def left_alone_in(model: nn.Module, prefixes: Sequence[str]) -> list[LeftAlone]:
    """What ``left_out`` names in these blocks, and the experts that are no linears."""
    modules = dict(model.named_modules())
    linear = {n for n, m in modules.items() if widths(m) or isinstance(m, nn.Linear)}
    found = {name: why for name, why in left_out(model).items() if name in linear}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and is_mixture(name, 3) and "lora_moe_" not in name:
            found[name] = f"{EXPERT}, {len(parameter)} in one tensor"
    blocks = tuple(prefix + "." for prefix in prefixes)
    kinds = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), reason)
        for name, reason in found.items()
        if name.startswith(blocks)
    )
    return [LeftAlone(name, count, reason) for (name, reason), count in kinds.items()]


def features(base_layer: nn.Module, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a linear.

    Raises:
        HtsrError: another kind of module.
    """
    found = widths(base_layer)
    if found is None:
        raise HtsrError(
            f"{name} is a {type(base_layer).__name__}, and only linear modules can have experts.",
            "Change target_modules.",
        )
    return found


def block_of(name: str) -> str:
    """The transformer layer that a module is in: its name up to the first number."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return match[0] if match else name.rpartition(".")[0]
