"""What counts as a linear, and its weight and widths."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from htsr_alloc.errors import HtsrError


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


def features(base_layer: nn.Module, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a linear.

    Raises:
        HtsrError: another kind of module.
    """
    if type(base_layer).__name__ == "Conv1D":
        d_in, d_out = base_layer.weight.shape  # type: ignore[union-attr, misc]
        return int(d_in), int(d_out)
    if isinstance(base_layer, nn.Linear) or "Linear" in type(base_layer).__name__:
        d_in = getattr(base_layer, "in_features", getattr(base_layer, "infeatures", None))
        d_out = getattr(base_layer, "out_features", getattr(base_layer, "outfeatures", None))
        if isinstance(d_in, int) and isinstance(d_out, int):
            return d_in, d_out
    raise HtsrError(
        f"{name} is a {type(base_layer).__name__}, and only linear modules can have experts.",
        "Change target_modules.",
    )
