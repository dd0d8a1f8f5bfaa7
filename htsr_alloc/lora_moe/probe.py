"""A few numbers of each adapted weight, by which a changed base is noticed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.linears import is_plain

COUNT = 4  # evenly spaced elements of a weight


def take(base_layer: nn.Module) -> dict[str, Any] | None:
    """{"shape", "dtype", "values"} of a linear's weight; None where it is not plain floats."""
    weight: Any = getattr(base_layer, "weight", None)
    if not isinstance(weight, Tensor) or not is_plain(weight) or weight.device.type == "meta":
        return None
    step = max(1, weight.numel() // COUNT)
    values = weight.detach().flatten()[step // 2 :: step][:COUNT]
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "values": values.to(torch.float64).tolist(),
    }


def check(probes: dict[str, Any], name: str, base_layer: nn.Module) -> None:
    """Compare a weight with the one that the adapter was made on.

    Values must be equal where the dtype is the same, and equal to rounding where it differs. A
    quantised weight cannot be compared and passes.

    Raises:
        HtsrError: another shape, or other values.
    """
    was, now = probes.get(name), take(base_layer)
    if was is None or now is None:
        return
    hint = "Load it on the model it was trained on, or set check_base=False in its config."
    if was["shape"] != now["shape"]:
        raise HtsrError(
            f"The adapter was made for a {name} of shape {was['shape']}, and this one has "
            f"{now['shape']}.",
            hint,
        )
    coarse = max(torch.finfo(getattr(torch, x["dtype"])).eps for x in (was, now))
    allowed = 0.0 if was["dtype"] == now["dtype"] else coarse
    for before, value in zip(was["values"], now["values"], strict=True):
        if abs(before - value) > allowed * abs(before) + (1e-7 if allowed else 0):
            raise HtsrError(f"The base's {name} is not the one the adapter was made on.", hint)
