"""What a reader of the numbers should know before believing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.allocation.findings import known
from htsr_alloc.records import FAILED, MARKED, Allocation, Metrics
from htsr_alloc.records.facts import FOR_DECISIONS, NOISY, SHORT, UNCERTIFIED
from htsr_alloc.records.results import Result


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
        found.append(Caution(f"Matrices without a fit: {len(failed)} of {total}.", items))
    marked = [m for m in metrics.matrices if m.status == MARKED]
    if marked:
        items = tuple(f"{m.tensor}: {m.reason}" for m in marked)
        found.append(Caution(f"Fits to be read with care: {len(marked)} of {total}.", items))
    partial = [x for x in metrics.layers if x.unfitted and x.pl_alpha_hill is not None]
    if partial:
        items = tuple(f"{x.prefix}: {x.reason}" for x in partial)
        text = f"Layers whose value is the mean of a part of their matrices: {len(partial)}."
        found.append(Caution(text, items))
    empty = [x for x in metrics.layers if x.pl_alpha_hill is None]
    if empty:
        items = tuple(f"{x.prefix}: {x.reason}" for x in empty)
        found.append(Caution(f"Layers without PL_Alpha_Hill: {len(empty)}.", items))
    return found


def _numbers(metrics: Metrics) -> list[Caution]:
    total, settings = len(metrics.matrices), metrics.settings
    found = []
    ties = [m for m in metrics.matrices if m.peak_gap == 0]
    if ties and settings.estimator in NOISY:
        text = (
            f"Matrices with two fullest bins in the histogram: {len(ties)} of {total}. The first "
            f"is taken as the peak, from which the estimator {settings.estimator} starts."
        )
        found.append(Caution(text, tuple(m.tensor for m in ties)))
    jumps = [m for m in metrics.matrices if m.start_jumps]
    if jumps:
        text = (
            f"Matrices whose PL_Alpha_Hill depends on where the tail starts more than on its "
            f"eigenvalues: {len(jumps)} of {total}."
        )
        items = tuple(
            f"{m.tensor}: {m.pl_alpha_hill:.2f} ± {m.alpha_se:.2f}, k from {m.k_low} to {m.k_high}"
            for m in jumps
        )
        found.append(Caution(text, items))
    short = [m for m in metrics.matrices if m.short_tail]
    if short:
        items = tuple(f"{m.tensor}: k = {m.k}" for m in short)
        found.append(
            Caution(f"Tails of fewer than {SHORT} eigenvalues: {len(short)} of {total}.", items)
        )
    if settings.estimator in NOISY:
        text = (
            f"The estimator {settings.estimator} reproduces a paper. For a decision use "
            f"{FOR_DECISIONS}, which noise on the weights moves far less."
        )
        found.append(Caution(text))
    uncertain = [m for m in metrics.matrices if "float32 not certain" in m.engine]
    if uncertain:
        text = (
            f"Matrices on which float32 was not certain to keep the histogram's peak: "
            f"{len(uncertain)} of {total}. float64 was used; their peaks are fragile."
        )
        found.append(Caution(text, tuple(m.tensor for m in uncertain)))
    smooth = [m for m in metrics.matrices if m.engine.endswith(UNCERTIFIED)]
    if smooth:
        text = (
            f"Spectra of float32 accuracy, for estimators that look for no histogram's peak: "
            f"{len(smooth)} of {total}."
        )
        found.append(Caution(text, tuple(m.tensor for m in smooth)))
    rough = [m for m in metrics.matrices if m.engine == "float32 band"]
    if rough:
        text = f"Spectra of float32 accuracy (engine fast), unguarded: {len(rough)} of {total}."
        found.append(Caution(text, tuple(m.tensor for m in rough)))
    quantised = {m.dtype for m in metrics.matrices if m.dtype.startswith(("F8", "F4"))}
    quantised |= {kind.dtype for kind in metrics.model.dequantised}
    if quantised:
        text = (
            f"The source is quantised ({', '.join(sorted(quantised))}): the smallest singular "
            "values are rounding noise."
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
        said = known(result.record) if isinstance(result.record, Allocation) else []
        found += [Caution(f"{result.file.file}, {sentence}.") for sentence in said]
    return found
