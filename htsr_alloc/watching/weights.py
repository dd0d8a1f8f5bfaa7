"""``watch``: PL_Alpha_Hill, Alpha_Hat and Stable_Rank of a model's linears, as they are now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from htsr_alloc.analysis.measure import CODES, is_flat
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import FAILED, MARKED
from htsr_alloc.spectra.estimators import Fit, alpha_hat, fit, stable_rank
from htsr_alloc.spectra.spectrum import Spectrum, spectrum
from htsr_alloc.watching.adapters import Linear, Product, linears
from htsr_alloc.watching.products import product_spectrum

KINDS = ("base", "merged", "ba")

Measure = Callable[[torch.Tensor], Spectrum]


@dataclass(frozen=True)
class Watched:
    """One spectrum. Numbers are None only where ``reason`` says why.

    ``kind`` is ``base`` (W), ``ba`` (s B A) or ``merged`` (W + s B A); the last two are of one
    adapter and, in a mixture, of one expert. ``n_eigs`` eigenvalues are not zero.
    """

    module: str
    kind: str
    adapter: str | None
    expert: int | None
    shape: tuple[int, int]
    n_eigs: int
    lambda_max: float | None
    pl_alpha_hill: float | None
    alpha_hat: float | None
    stable_rank: float | None
    status: str
    reason: str | None


def watch(
    model: nn.Module,
    modules: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    *,
    estimator: str = "official",
    bins: int = 100,
    engine: str = "auto",
) -> list[Watched]:
    """Measure chosen linears of a model, whose weights stay as they are.

    A product's spectrum takes two thin QR decompositions and never an m x n matrix, ``base`` and
    ``merged`` a whole decomposition, as ``analyze`` does it.

    Args:
        model: any torch model; PEFT's LoRA and LoRA-MoE adapters are recognised. Active adapters
            are measured.
        modules: shell patterns on the linears' names as in the checkpoint, ``*.q_proj`` or
            ``model.layers.0.*``. Default: all adapted linears, or without adapters all linears
            that have a number in their name.
        kinds: of ``base``, ``merged`` and ``ba``. Default: ``ba`` with adapters, else ``base``.
        estimator, bins: of PL_Alpha_Hill. A product has r eigenvalues, and a fit to fewer than
            50 is marked.
        engine: of whole decompositions.

    Returns:
        Linears in the model's order; of each the kinds in the order of ``KINDS``.

    Raises:
        HtsrError: a pattern or kind that matches nothing; a weight that is quantised, sharded or
            merged, where it is needed; ``merged`` of DoRA, which is not a sum.
    """
    chosen = select(model, modules)
    kinds = check_kinds(kinds, chosen)

    def whole(weight: torch.Tensor) -> Spectrum:
        return spectrum(weight, engine=engine, device=weight.device, bins=bins)

    return [
        _measured(linear, kind, product, found, estimator, bins)
        for linear in chosen
        for kind, product, found in spectra(linear, kinds, whole)
    ]


def select(model: nn.Module, modules: Sequence[str] | None) -> list[Linear]:
    """The linears that the patterns name.

    Raises:
        HtsrError: a pattern that matches none.
    """
    if isinstance(modules, str):
        raise HtsrError("modules is a list of patterns.", f"Write [{modules!r}].")
    every = list(linears(model))
    if modules is None:
        adapted = [linear for linear in every if linear.base is not linear.module]
        numbered = [x for x in every if any(part.isdecimal() for part in x.name.split("."))]
        if not (adapted or numbered):
            raise HtsrError("The model has no linear in numbered blocks.", "Name some in modules.")
        return adapted or numbered
    for pattern in modules:
        if not any(fnmatchcase(linear.name, pattern) for linear in every):
            raise HtsrError(
                f"No linear of the model is like {pattern!r}.",
                f"There are {', '.join(x.name for x in every[:3])}, ...",
            )
    return [x for x in every if any(fnmatchcase(x.name, pattern) for pattern in modules)]


def check_kinds(kinds: Sequence[str] | None, chosen: Sequence[Linear]) -> tuple[str, ...]:
    """The kinds in their order, or the default for these linears.

    Raises:
        HtsrError: an unknown one, or one that needs an adapter where there is none.
    """
    adapted = any(linear.products() for linear in chosen)
    if kinds is None:
        return ("ba",) if adapted else ("base",)
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise HtsrError(f"kinds cannot be {list(kinds)!r}.", f"Choose from {', '.join(KINDS)}.")
    if not adapted and set(kinds) != {"base"}:
        raise HtsrError("None of the watched linears has an active adapter.", "Use kinds=['base'].")
    return tuple(kind for kind in KINDS if kind in kinds)


def spectra(
    linear: Linear, kinds: Sequence[str], whole: Measure
) -> Iterator[tuple[str, Product | None, Spectrum]]:
    """(kind, product, spectrum) of one linear; ``whole`` decomposes an m x n matrix."""
    if "base" in kinds:
        yield "base", None, whole(linear.weight)
    if "merged" in kinds:
        for product in linear.products():
            yield "merged", product, whole(merged(linear, product))
    if "ba" in kinds:
        for product in linear.products():
            yield "ba", product, product_spectrum(product.a, product.b, product.scale)


@torch.no_grad()
def merged(linear: Linear, product: Product) -> torch.Tensor:
    """W + s B A in float64, (d_out, d_in); less the residual.

    Raises:
        HtsrError: DoRA, which scales the rows of the sum.
    """
    if not product.sums:
        raise HtsrError(
            f"{linear.name} is adapted by DoRA, whose weight is not a sum W + BA.",
            "Watch kinds=['base', 'ba'].",
        )
    total = linear.weight.double() + product.scale * (product.b.double() @ product.a.double())
    if product.residual is None:
        return total
    a, b = product.residual
    return total - b.double() @ a.double()


def _measured(
    linear: Linear, kind: str, product: Product | None, found: Spectrum, estimator: str, bins: int
) -> Watched:
    values = found.eigenvalues
    d_out = product.b.shape[0] if product else linear.weight.shape[0]
    d_in = product.a.shape[1] if product else linear.weight.shape[1]
    place = (
        linear.name,
        kind,
        product.adapter if product else None,
        product.expert if product else None,
        (int(d_out), int(d_in)),
        len(values),
    )
    if found.reason is not None:
        return Watched(*place, None, None, None, None, FAILED, found.reason)
    fitted = fit(values, estimator, bins)
    stored = str((product.a if product else linear.weight).dtype).removeprefix("torch.")
    if is_flat(values, (max(d_out, d_in), found.n_zero + len(values)), CODES[stored]):
        reason = f"all eigenvalues are equal within the rounding of {stored}"
        fitted = Fit(None, None, None, None, None, FAILED, reason)
    largest, alpha = float(values[-1]), fitted.alpha
    reasons = [fitted.reason] if fitted.reason else []
    if found.n_zero:
        reasons.append(f"{found.n_zero} of {found.n_zero + len(values)} eigenvalues are zero")
    return Watched(
        *place,
        largest,
        alpha,
        None if alpha is None else alpha_hat(alpha, largest),
        stable_rank(values),
        FAILED if alpha is None else MARKED if reasons else fitted.status,
        "; ".join(reasons) or None,
    )
