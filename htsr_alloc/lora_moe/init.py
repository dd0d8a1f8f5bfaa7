"""How A and the router start: kaiming or gaussian."""

from __future__ import annotations

import math

from torch import Tensor, nn


def init_a(a: Tensor, experts: int, how: bool | str) -> None:
    """Start A_all (N r, d_in) in place, expert by expert.

    kaiming uniform with a = √5 as LoRA's and AlphaLoRA's code has it (``True``), or
    ``"gaussian"``: normal with standard deviation 1 / r, as the AlphaLoRA paper says and as PEFT
    spells it. The fan-in of each A_j is d_in, so stacking changes nothing.
    """
    if how == "gaussian":
        nn.init.normal_(a, std=experts / a.shape[0])
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
