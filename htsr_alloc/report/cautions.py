"""What a reader of the numbers should know before believing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.records import FAILED, MARKED, Metrics
from htsr_alloc.results import Result

AT_THE_PEAK = ("official", "paper", "band")  # estimators that start from the histogram's peak


@dataclass(frozen=True)
class Caution:
    """One sentence, and what it is about."""

    text: str
    items: tuple[str, ...] = ()


def cautions(
    source: Result, metrics: Metrics, allocations: Sequence[Result]
) -> tuple[Caution, ...]:
    """Every caution that applies to the metrics and to the allocations made from them."""
    return (*_fits(metrics), *_numbers(metrics), *_allocations(source, metrics, allocations))


def _fits(metrics: Metrics) -> list[Caution]:
    total = len(metrics.matrices)
    found = []
    failed = [m for m in metrics.matrices if m.status == FAILED]
    if failed:
        items = tuple(f"{m.tensor}: {m.reason}" for m in failed)
        found.append(Caution(f"{len(failed)} of {total} matrices have no fit.", items))
    marked = [m for m in metrics.matrices if m.status == MARKED]
    if marked:
        items = tuple(f"{m.tensor}: {m.reason}" for m in marked)
        found.append(Caution(f"{len(marked)} of {total} fits are to be read with care.", items))
    partial = [x for x in metrics.layers if x.unfitted and x.pl_alpha_hill is not None]
    if partial:
        items = tuple(f"{x.prefix}: {x.reason}" for x in partial)
        text = f"{len(partial)} layers' values are means over the matrices that could be fitted."
        found.append(Caution(text, items))
    empty = [x for x in metrics.layers if x.pl_alpha_hill is None]
    if empty:
        items = tuple(f"{x.prefix}: {x.reason}" for x in empty)
        found.append(Caution(f"{len(empty)} layers have no PL_Alpha_Hill.", items))
    return found


def _numbers(metrics: Metrics) -> list[Caution]:
    total, settings = len(metrics.matrices), metrics.settings
    found = []
    ties = [m for m in metrics.matrices if m.peak_gap == 0]
    if ties and settings.estimator in AT_THE_PEAK:
        text = (
            f"On {len(ties)} of {total} matrices two bins of the histogram are equally full; the "
            f"first is taken as the peak, from which the estimator {settings.estimator} starts."
        )
        found.append(Caution(text, tuple(m.tensor for m in ties)))
    uncertain = [m for m in metrics.matrices if "float32 not certain" in m.engine]
    if uncertain:
        text = (
            f"On {len(uncertain)} of {total} matrices float32 could not be certain to keep the "
            "histogram's peak, and float64 was used: their peaks are narrow."
        )
        found.append(Caution(text, tuple(m.tensor for m in uncertain)))
    rough = [m for m in metrics.matrices if m.engine.startswith("float32 band")]
    if rough:
        text = f"{len(rough)} of {total} spectra are of float32 accuracy (engine fast), unguarded."
        found.append(Caution(text, tuple(m.tensor for m in rough)))
    quantised = sorted({m.dtype for m in metrics.matrices if m.dtype.startswith(("F8", "F4"))})
    if quantised:
        text = (
            f"The source is quantised ({', '.join(quantised)}): the smallest singular values are "
            "rounding noise."
        )
        found.append(Caution(text))
    if settings.include or settings.exclude:
        items = tuple(f"only {x}" for x in settings.include)
        items += tuple(f"without {x}" for x in settings.exclude)
        found.append(Caution("A part of the checkpoint was analysed.", items))
    return found


def _allocations(source: Result, metrics: Metrics, allocations: Sequence[Result]) -> list[Caution]:
    found = []
    for result in allocations:
        made_from = getattr(result.record, "metrics", None)
        if made_from is not None and made_from.sha256 != source.file.sha256:
            text = (
                f"{result.file.file} was made from another metrics file than {source.file.file}: "
                f"{made_from.file}, SHA-256 {made_from.sha256}."
            )
            found.append(Caution(text))
        layers = len(getattr(result.record, "experts", ()))
        if layers != len(metrics.layers):
            text = f"{result.file.file} has {layers} layers, the metrics {len(metrics.layers)}."
            found.append(Caution(text))
    return found
