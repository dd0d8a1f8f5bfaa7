"""Sensitivity: how an allocation changes with estimator, beta and matrices. Needs numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from htsr_alloc.allocation.budget import Stacks
from htsr_alloc.allocation.decide import allocate, scoped
from htsr_alloc.allocation.request import Request
from htsr_alloc.allocation.scores import Metric, parse_metric
from htsr_alloc.allocation.strategies import AlphaLora
from htsr_alloc.analysis.measure import keep_peaks, refitted
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Layer, Matrix, Metrics
from htsr_alloc.records.results import open_spectra
from htsr_alloc.spectra.estimators import AT_PEAKS, ESTIMATORS

BETA_STEPS = (-0.5, 0.5)  # around 2.5: the published 2, 2.5 and 3
NEAR = 1  # experts that a stable count may move by: eq. 7 alone moves it by as many
ENOUGH = 0.9  # of the draws
TAILS = (0.05, 0.95)
STEP = "inverted_cdf"  # a quantile that is one of the draws

# Metric -> the scale on which residuals are drawn, the way back, and the slope of the way back.
# An alpha is above 1, so that its scale is ln(alpha - 1), as in ``shrinkage``.
Scale = tuple[Callable[[np.ndarray], np.ndarray], ...]
IDENTITY: Scale = (lambda x: x, lambda x: x, np.ones_like)
SCALES: dict[str, Scale] = {
    "pl_alpha_hill": (lambda x: np.log(x - 1), lambda z: 1 + np.exp(z), np.exp),
}


@dataclass(frozen=True)
class Range:
    """A layer's counts under one cause of change.

    ``low`` to ``high`` is where the middle 90 % of the draws are, ``same`` the share of draws with
    the allocation's own count, ``near`` that with at most ``NEAR`` more or less.
    """

    low: int
    high: int
    same: float
    near: float


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer. ``stable``: under every cause ``near`` is at least ``ENOUGH``."""

    layer: int
    prefix: str | None
    experts: int
    ranges: dict[str, Range]
    stable: bool


@dataclass(frozen=True)
class Chance:
    """The same counts on layers drawn by chance: the share of layers within ``NEAR`` of their own.

    ``near`` is the mean of the draws; 95 % of them are at most ``high``.
    """

    near: float
    high: float


@dataclass(frozen=True)
class Sensitivity:
    """What was varied (``causes``: name -> the draws' labels, or their number) and each layer.

    ``near``: cause -> the share of the layers' counts within ``NEAR`` of their own, over all draws;
    a cause that is not above ``chance.high`` moves the counts as far as chance would.
    """

    causes: dict[str, Any]
    seed: int
    layers: tuple[LayerSensitivity, ...]
    near: dict[str, float]
    chance: Chance

    @property
    def as_far_as_chance(self) -> tuple[str, ...]:
        """The causes under which the counts lie no nearer to their own than chance puts them.

        None where chance does not move them either.
        """
        if self.chance.high >= 1:
            return ()
        return tuple(cause for cause, near in self.near.items() if near <= self.chance.high)


def sensitivity_of(
    metrics: Metrics, path: Path, request: Request, *, draws: int = 200, seed: int = 0
) -> Sensitivity:
    """Allocate again and again, one thing changed each time.

    * estimator: the other estimators that look for the bulk's peak (``AT_PEAKS``), refitted from
      the spectra beside ``path``; left out for a metric that needs none and for ``median`` and
      ``ks``, which measure other places of the spectrum.
    * beta: half a unit less and more.
    * matrices: ``draws`` bootstrap draws of how far a layer's matrices lie from their roles' means
      over the layers, in standard deviations of the role, with replacement within the layer. A
      role's own level is no noise. Everything that the strategy does is done again.

    The null that each of them is held against has the same counts on layers drawn by chance,
    ``draws`` times.

    Args:
        path: the metrics file.
        request: what ``allocate`` is asked for, by layers and by a metric.
        draws: at least 1.
        seed: of the bootstrap.

    Raises:
        HtsrError: a request that has no scores by layers, or spectra that are not there.
    """
    scores = request.scores
    if not isinstance(scores, Metric):
        raise HtsrError("`sensitivity` is about scores that the metrics hold.")
    if request.pool is not None:
        raise HtsrError(
            "`sensitivity` draws the matrices of a layer, and `per_module` has one each.",
            "Leave one of them out.",
        )
    if draws < 1:
        raise HtsrError(f"`draws` must be at least 1, not {draws}.")
    if isinstance(request.budget, Stacks):
        raise HtsrError("`sensitivity` is about one budget.", "Give `stack` and its own `T`.")
    metrics, request = scoped(metrics, request) or metrics, request.unscoped
    own = allocate(metrics, request)
    causes: dict[str, Any] = {}
    counts: dict[str, list[tuple[int, ...]]] = {}

    def add(cause: str, labels: Any, made: Iterator[Allocation]) -> None:
        causes[cause], counts[cause] = labels, [result.experts for result in made]

    if scores.fitted and metrics.settings.estimator in AT_PEAKS:
        kept = [name for name in AT_PEAKS if keep_peaks(metrics) or ESTIMATORS[name].smooth]
        others = [name for name in kept if name != metrics.settings.estimator]
        with open_spectra(metrics, path) as spectra:
            bins = metrics.settings.bins
            noise = metrics.settings.noise if request.strategy.uses_errors else None
            refits = [refitted(metrics, spectra, name, bins, noise) for name in others]
        add("estimator", others, (allocate(refit, request) for refit in refits))
    beta = own.strategy.beta if own.strategy is not None else None
    if isinstance(request.strategy, AlphaLora) and beta is not None:
        bare = replace(request.strategy, spread=None)
        steps = [replace(bare, beta=beta + step) for step in BETA_STEPS]
        varied = [replace(request, strategy=strategy) for strategy in steps]
        add("beta", [beta + step for step in BETA_STEPS], (allocate(metrics, r) for r in varied))
    generator = np.random.default_rng(seed)
    draw = _bootstrap(metrics, list(parse_metric(scores.text)), generator)
    add("matrices", draws, (allocate(draw(), request) for _ in range(draws)))
    shuffled = [generator.permutation(own.experts) for _ in range(draws)]
    near = {cause: float(_near(own.experts, found).mean()) for cause, found in counts.items()}
    by_chance = _near(own.experts, shuffled).mean(axis=1)  # (draws,)
    chance = Chance(float(by_chance.mean()), float(np.quantile(by_chance, 0.95, method=STEP)))
    ranges = {cause: _ranges(own.experts, found) for cause, found in counts.items()}
    layers: list[LayerSensitivity] = []
    for row in own.evidence:
        by_cause = {cause: found[row.layer] for cause, found in ranges.items()}
        stable = all(found.near >= ENOUGH for found in by_cause.values())
        layers.append(LayerSensitivity(row.layer, row.prefix, row.experts, by_cause, stable))
    return Sensitivity(causes, seed, tuple(layers), near, chance)


def _near(experts: Sequence[int], counts: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Whether a count is within ``NEAR`` of its own, (draws, layers)."""
    return abs(np.array(counts) - np.array(experts)) <= NEAR


def _ranges(experts: Sequence[int], counts: Sequence[Sequence[int]]) -> list[Range]:
    same = (np.array(counts) == np.array(experts)).mean(axis=0)
    near = _near(experts, counts).mean(axis=0)
    lows, highs = np.quantile(counts, TAILS, axis=0, method=STEP)
    return [
        Range(int(low), int(high), float(s), float(n))
        for low, high, s, n in zip(lows, highs, same, near, strict=True)
    ]


def _bootstrap(
    metrics: Metrics, names: Sequence[str], generator: np.random.Generator
) -> Callable[[], Metrics]:
    """Draws of the metrics whose layers have other residuals.

    A matrix's value is x = f(mean + sd e) with the mean and the standard deviation of its role over
    the layers and ``SCALES``' f. A draw gives each matrix the e of one of its layer's, and the
    standard error that comes with it, in the same unit.
    """
    places = {
        name: [i for i, m in enumerate(metrics.matrices) if getattr(m, name) is not None]
        for name in names
    }
    drawn = [(name, own, *_standardised(metrics, name, own)) for name, own in places.items() if own]

    def draw() -> Metrics:
        matrices = list(metrics.matrices)
        for name, own, layers, mean, sd, e, error in drawn:
            _, to_metric, slope = SCALES.get(name, IDENTITY)
            chosen = np.empty(len(own), dtype=int)
            for layer in np.unique(layers):
                there = np.flatnonzero(layers == layer)
                chosen[there] = there[generator.integers(len(there), size=len(there))]
            scaled = mean + sd * e[chosen]
            values = to_metric(scaled)
            errors = sd * error[chosen] * slope(scaled)
            for i, value, se in zip(own, values, errors, strict=True):
                changes: dict[str, Any] = {name: float(value)}
                if name == "pl_alpha_hill" and np.isfinite(se):
                    changes["alpha_se"] = float(se)
                matrices[i] = replace(matrices[i], **changes)
        return replace(metrics, matrices=tuple(matrices), layers=_means(metrics, matrices, names))

    return draw


def _standardised(metrics: Metrics, name: str, own: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Layers, and roles' means and standard deviations, residuals and errors of the matrices."""
    matrices = [metrics.matrices[i] for i in own]
    to_scale, _, slope = SCALES.get(name, IDENTITY)
    x = to_scale(np.array([getattr(m, name) for m in matrices], dtype=float))
    roles = np.array([m.role for m in matrices])
    mean, sd = np.empty(len(x)), np.ones(len(x))
    for role in np.unique(roles):
        there = roles == role
        mean[there], spread = x[there].mean(), x[there].std()
        sd[there] = spread if spread > 0 else 1.0
    errors = np.array([m.alpha_se if m.alpha_se else np.nan for m in matrices], dtype=float)
    layers = np.array([m.layer for m in matrices])
    return layers, mean, sd, (x - mean) / sd, errors / slope(x) / sd


def _means(metrics: Metrics, matrices: Sequence[Matrix], names: Sequence[str]) -> tuple[Layer, ...]:
    """The layers with the means of their changed matrices."""
    found: list[Layer] = []
    for layer in metrics.layers:
        own = [m for m in matrices if m.layer == layer.layer]
        means: dict[str, Any] = {}
        for name in names:
            values = [v for m in own if (v := getattr(m, name)) is not None]
            means[name] = float(np.mean(values)) if values else None
        found.append(replace(layer, **means))
    return tuple(found)
