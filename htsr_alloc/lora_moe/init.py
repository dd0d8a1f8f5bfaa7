"""How A, B and the router start: kaiming, gaussian, and the SVD segments of GOAT."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from htsr_alloc.errors import HtsrError

SEGMENTS = ("O", "P", "M", "R")
ROUTER_STD = 0.02  # MoR's normal start of the router, and the noise around λ = 1


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
    """GOAT's A and B from the weight's own SVD (arXiv 2502.16894, eq. 9-10 and 19).

    W₀ = UΣVᵀ; with the segment of expert j, B_j = U Σ^½ / √(sρ) and A_j = Σ^½ Vᵀ / √(sρ). The
    residual W_res = (s/E) Σ B_j A_j makes W₀ − W_res plus the experts equal W₀ in expectation
    over routers (theorem 3.4), because the mean gate is 1/E (lemma 3.3).

    The lemma also gives the gate's variance as (E − k) / (k E²). Its proof takes the chosen
    experts' weights as equal, 1/k each; softmax weights differ, and their variance is larger.

    Args:
        weight: (d_out, d_in), floating; decomposed in float32 or better on its own device.
        plus: GOAT+ (appendix D): s_i = s_1 √(σ_1 / σ_i), σ_i the sum of segment i's singular
            values; everything else as above with s_i.

    Raises:
        HtsrError: the segments do not fit, or the weight holds NaN or infinity.
    """
    d_out, d_in = weight.shape
    starts = segment_starts(segment, min(d_out, d_in), experts, rank, generator)
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(torch.isfinite(work).all()):
        raise HtsrError("A weight holds NaN or infinity, so that it has no SVD.")
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
    root = (values / (scales.unsqueeze(1) * rho)).sqrt()  # Σ^½ / √(sρ), (E, d)
    return GoatStart(
        a=(root.unsqueeze(-1) * vt[index]).flatten(0, 1),
        b=u[:, index.flatten()] * root.flatten(),
        scales=scales,
    )
