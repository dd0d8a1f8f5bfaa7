"""GOAT: experts that start at segments of the weight's singular values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import experts
from htsr_alloc.lora_moe.linears import is_plain
from htsr_alloc.lora_moe.systems.base import (
    BALANCE,
    Inputs,
    Product,
    Shape,
    System,
    choose,
    positive,
)

SEGMENTS = ("O", "P", "M", "R")
ZERO = "zero"
SCALES = ("theorem", "alpha")


@dataclass(frozen=True)
class GoatStart:
    """GOAT's start of one linear.

    Attributes:
        a: (E d, d_in). b: (d_out, E d).
        scales: (E,), each expert's s; all equal for GOAT, s_i for GOAT+.
    """

    a: Tensor
    b: Tensor
    scales: Tensor


def goat_scale(d_in: int, rank: int, eta: float = 1.0) -> float:
    """s = √(3 d_in η / d) (arXiv 2502.16894, theorem 3.5).

    The theorem's r is the number of rows of one expert's A, hence d = r / E here.
    """
    return math.sqrt(3 * d_in * eta / rank)


def segment_starts(
    how: str, h: int, experts: int, rank: int, generator: torch.Generator | None = None
) -> list[int]:
    """First singular direction (0-based, largest first) of every expert's segment.

    Args:
        how: O spreads the segments over the spectrum, (j − 1) t with t = h / E; P takes the
            largest, (j − 1) d; M the smallest, h − j d; R random distinct multiples of d.
        h: min(d_in, d_out), the number of singular values.
        experts: E. rank: d.

    Raises:
        HtsrError: E segments of d directions do not fit h, or ``how`` is unknown.
    """
    if experts * rank > h:
        raise HtsrError(
            f"{experts} experts of rank {rank} need {experts * rank} singular directions, and "
            f"this weight has {h}.",
            "Lower r or the number of experts.",
        )
    numbers = range(experts)
    if how == "O":
        return [j * (h // experts) for j in numbers]
    if how == "P":
        return [j * rank for j in numbers]
    if how == "M":
        return [h - (j + 1) * rank for j in numbers]
    if how == "R":
        return (torch.randperm(h // rank, generator=generator)[:experts] * rank).tolist()
    raise HtsrError(f"There is no SVD segment {how!r}.", f"Choose from {', '.join(SEGMENTS)}.")


def goat_start(
    weight: Tensor,
    experts: int,
    rank: int,
    *,
    segment: str = "O",
    scale: float,
    rho: float = 10.0,
    plus: bool = False,
    generator: torch.Generator | None = None,
) -> GoatStart:
    """GOAT's A and B from the weight's own SVD (arXiv 2502.16894, eq. 13, 14 and 19).

    W₀ = UΣVᵀ; with the segment of expert j, B_j = U Σ^½ / √(sρ) and A_j = Σ^½ Vᵀ / √(sρ). The
    residual W_res = (1/E) Σ s_j B_j A_j makes W₀ − W_res plus the experts equal W₀ in expectation
    over routers (theorem 3.4), because the mean gate is 1/E (lemma 3.3).

    The lemma also gives the gate's variance as (E − k) / (k E²). Its proof takes the chosen
    experts' weights as equal, 1/k each; softmax weights differ, and their variance is larger.

    Args:
        weight: (d_out, d_in), floating; decomposed in float32 or better on its own device.
        scale: s, and s_1 of GOAT+.
        plus: GOAT+ (eq. 83): s_i = s_1 √(σ_1 / σ_i), σ_i the sum of segment i's singular values.
            A and B start with the one s = s_1, so that s_i² ‖A_i‖² is the same for every expert.

    Raises:
        HtsrError: the segments do not fit, or the weight holds NaN or infinity.
    """
    d_out, d_in = weight.shape
    starts = segment_starts(segment, min(d_out, d_in), experts, rank, generator)
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(torch.isfinite(work).all()):
        raise HtsrError("A weight holds NaN or infinity and has no SVD.")
    u, sigma, vt = torch.linalg.svd(work, full_matrices=False)
    index = torch.tensor(starts, device=work.device).unsqueeze(1)
    index = index + torch.arange(rank, device=work.device)  # (E, d)
    values = sigma[index]  # (E, d)
    scales = torch.full((experts,), scale, dtype=work.dtype, device=work.device)
    if plus:
        mass = values.sum(1)
        if not bool((mass > 0).all()):
            raise HtsrError("A segment's singular values are all zero; GOAT+ divides by them.")
        scales = scales * (mass[0] / mass).sqrt()
    root = (values / (scale * rho)).sqrt()  # Σ^½ / √(sρ), (E, d)
    return GoatStart(
        a=(root.unsqueeze(-1) * vt[index]).flatten(0, 1),
        b=u[:, index.flatten()] * root.flatten(),
        scales=scales,
    )


class Goat(System):
    """h = (W₀ − W_res) x + s Σ_j g_j B_j A_j x, W_res = res_B res_A.

    W_res is taken off in the forward pass and never from W₀: the base's weight stays exact,
    whatever its dtype.
    """

    name = "goat"
    title = "GOAT"
    reference = "arXiv 2502.16894, eq. 10, 13-15 and 19"
    frozen = ("res_A", "res_B")
    settings = (
        "top_k",
        *BALANCE,
        *("goat_segment", "goat_rho", "goat_eta", "goat_scale", "goat_mixture"),
    )
    budget_knob = "experts"
    defaults: ClassVar = {"learning_rate": 1e-4}  # tables 9 to 11; table 12 has 2e-5 for generation
    plus = False

    def check(self, config: Any) -> None:
        """The settings goat_*."""
        super().check(config)
        choose(config, "goat_segment", (*SEGMENTS, ZERO))
        if self.plus and config.system == self.name and config.goat_segment == ZERO:
            raise HtsrError(
                "GOAT+ takes its scales from the segments' singular values, and "
                "goat_segment='zero' has none.",
                "Use system='goat'.",
            )
        choose(config, "goat_scale", SCALES)
        positive(config, "goat_rho", "goat_eta")

    def shapes(self, config: Any, n: int, d_in: int, d_out: int) -> dict[str, Shape]:
        """Also res_A (N r, d_in) and res_B (d_out, N r), where the start is not zero."""
        found = super().shapes(config, n, d_in, d_out)
        if config.goat_segment == ZERO:
            return found
        return {**found, "res_A": found["A"], "res_B": found["B"]}

    def routes(self, config: Any, n: int) -> bool:
        """Not without goat_mixture: the segments are then one LoRA of rank N r (table 5)."""
        return n > 1 and config.goat_mixture

    def scale(self, config: Any, d_in: int) -> float:
        """√(3 d_in η / r), or lora_alpha / r as the released scripts have it."""
        if config.goat_scale == "theorem":
            return goat_scale(d_in, config.r, config.goat_eta)
        return config.lora_alpha / config.r

    def start(self, own: Mapping[str, Tensor], config: Any, name: str, weight: Tensor) -> None:
        """A and B from the weight's singular vectors; or theorem 3.5's start, B = 0.

        Raises:
            HtsrError: a quantised weight, or segments that do not fit.
        """
        super().start(own, config, name, weight)
        if config.goat_segment == ZERO:
            bound = math.sqrt(6 / weight.shape[1])
            nn.init.uniform_(own["A"], -bound, bound)
            return
        if not is_plain(weight):
            raise HtsrError(
                f"{name} is quantised, and GOAT needs the singular values of its "
                "unquantised weight.",
                "Make and save the adapter on the unquantised model, then load it on the "
                "quantised one; or use system='alphalora'.",
            )
        n = len(own["A"]) // config.r
        try:
            made = goat_start(
                weight,
                n,
                config.r,
                segment=config.goat_segment,
                scale=Goat.scale(self, config, weight.shape[1]),
                rho=config.goat_rho,
                plus=self.plus,
            )
        except HtsrError as error:
            raise HtsrError(f"{name}: {error.message}", error.hint) from None
        for key in ("A", "res_A"):
            own[key].copy_(made.a)
        own["B"].copy_(made.b)
        mean = 1 / n if self.routes(config, n) else self.share(config, n)  # gate at the start
        own["res_B"].copy_(made.b * (made.scales * mean).repeat_interleave(config.r))
        if self.plus:
            own["scale"].copy_(made.scales)

    def delta(self, layer: Any, adapter: str, result: Tensor, given: Inputs) -> Tensor:
        """The residual off, the experts on."""
        if adapter in layer.lora_moe_res_A:
            hidden = F.linear(given.own, layer.lora_moe_res_A[adapter])
            result = experts.add_product(result, hidden, layer.lora_moe_res_B[adapter], -1.0)
        return super().delta(layer, adapter, result, given)

    def products(self, layer: Any, adapter: str) -> Iterator[Product]:
        """As ``base``'s, with the residual's factors."""
        residual = None
        if adapter in layer.lora_moe_res_A:
            residual = layer.lora_moe_res_A[adapter], layer.lora_moe_res_B[adapter]
        for product in super().products(layer, adapter):
            yield replace(product, residual=residual)


SYSTEM = Goat()
