"""One adapter's parameters on one linear: their shapes by system, and how they start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import init
from htsr_alloc.lora_moe.config import DENSE, GOAT, LoraMoeConfig
from htsr_alloc.lora_moe.linears import is_plain

FROZEN = ("res_A", "res_B", "scale")


def shapes(config: LoraMoeConfig, n: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of n experts, by name; those in FROZEN are not trained.

    EM-LoRA's routers belong to a layer's linears together, and are ``em.attach``'s.
    """
    system, r = config.system, config.r
    found: dict[str, tuple[int, ...]] = {
        "A": (r if system in DENSE else n * r, d_in),
        "B": (d_out, r if system == "mor" else n * r),
    }
    if n > 1:
        found["router"] = (n, d_in)
    if system == "mor":
        found |= {"lambda_A": (n, r), "lambda_B": (n, d_out)}
    if system == "adamole" and n > 1:
        found |= {"tau": (1, d_in), "tau_bias": (1,)}
    if system in GOAT:
        found |= {"res_A": found["A"], "res_B": found["B"]}
    if system == "goat_plus":
        found["scale"] = (n,)
    if config.em_dora:
        found["magnitude"] = (d_out,)
    return found


def scale_of(config: LoraMoeConfig, d_in: int) -> float:
    """s: lora_alpha / r, or GOAT's."""
    if config.system in GOAT and config.goat_scale == "theorem":
        return init.goat_scale(d_in, config.r, config.goat_eta)
    return config.lora_alpha / config.r


def dtype_of(weight: Tensor) -> torch.dtype:
    """The adapter's: float32, or float64 on such a base."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@torch.no_grad()
def start(own: dict[str, Tensor], config: LoraMoeConfig, name: str, weight: Tensor) -> None:
    """Fill the parameters, which are zeros, in place (METHODS 4's column "init").

    Args:
        own: of ``shapes``, by name.
        name: the linear's, for errors. weight: (d_out, d_in), its own.

    Raises:
        HtsrError: GOAT on a quantised weight, or its segments do not fit.
    """
    a, system = own["A"], config.system
    init.init_a(a, len(a) // config.r, config.init_lora_weights)
    for rows in ("router", "tau"):
        if rows in own:
            init.init_a(own[rows], 1, True)
    if system == "mor":
        nn.init.normal_(a, std=1 / config.r)
        if "router" in own:
            nn.init.normal_(own["router"], std=init.ROUTER_STD)
        for ones in ("lambda_A", "lambda_B"):
            nn.init.normal_(own[ones], mean=1.0, std=init.ROUTER_STD)
    if config.em_dora:
        own["magnitude"].copy_(weight.to(a.dtype).norm(dim=1))
    if system in GOAT:
        if not is_plain(weight):
            raise HtsrError(
                f"{name} is quantised, and GOAT needs its singular values, which its integers do "
                "not show.",
                "Make and save the adapter on the unquantised model, then load it on the "
                "quantised one; or use system='alphalora'.",
            )
        _start_goat(own, config, name, weight)


def _start_goat(own: dict[str, Tensor], config: LoraMoeConfig, name: str, weight: Tensor) -> None:
    n = len(own["A"]) // config.r
    plus = config.system == "goat_plus"
    try:
        made = init.goat_start(
            weight,
            n,
            config.r,
            segment=config.goat_segment,
            scale=scale_of(config, weight.shape[1]),
            rho=config.goat_rho,
            plus=plus,
        )
    except HtsrError as error:
        raise HtsrError(f"{name}: {error.message}", error.hint) from None
    for key in ("A", "res_A"):
        own[key].copy_(made.a)
    own["B"].copy_(made.b)
    own["res_B"].copy_(made.b * (made.scales / n).repeat_interleave(config.r))
    if plus:
        own["scale"].copy_(made.scales)
