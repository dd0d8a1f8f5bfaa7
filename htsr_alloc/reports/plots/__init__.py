"""Figures from records alone: spectra, layers, allocations. matplotlib loads on first use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Metrics

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from htsr_alloc.records.results import Result

VIEWS = ("overview", "layers", "heatmap", "allocation", "esd")


def plot(
    *sources: str | Path | Metrics | Allocation,
    view: str | None = None,
    metric: str = "pl_alpha_hill",
    matrix: Collection[str] = (),
    layer: Collection[int] = (),
    role: Collection[str] = (),
    spectra: Mapping[str, np.ndarray] | None = None,
    output: str | Path | None = None,
) -> Figure:
    """One figure of what the sources say.

    Args:
        sources: metrics and allocations, as files or as records.
        view: ``layers`` (one line a role, the mean in bold), ``heatmap`` (role by layer),
            ``allocation`` (bars against uniform and MoLA), ``esd`` (spectra with their tails), or
            ``overview``, all but the spectra: the default. Several metrics become one line each.
        metric: pl_alpha_hill, alpha_hat or stable_rank.
        matrix, layer, role: which spectra ``esd`` shows; any of them chooses it. ``matrix`` takes
            names of tensors and shell patterns.
        spectra: tensor -> ascending eigenvalues, for a record; a file has them beside it.
        output: a .png, .svg or .pdf file to write as well.

    Returns:
        The figure, matplotlib's own.

    Raises:
        HtsrError: unreadable files, nothing to draw, an unknown view, metric or matrix.
    """
    from htsr_alloc.reports.plots import figures, style

    chosen = view or ("esd" if matrix or layer or role else "overview")
    if chosen not in VIEWS:
        raise HtsrError(f"There is no view {chosen!r}.", f"Choose from {', '.join(VIEWS)}.")
    if chosen != "esd" and (matrix or layer or role):
        raise HtsrError(
            f"The {chosen} view shows all matrices.", "Leave --matrix, --layer, --role out."
        )
    if output is not None:
        style.format_of(Path(output))
    found = [_opened(source) for source in sources]
    metrics = [(label, r, result) for label, r, result in found if isinstance(r, Metrics)]
    allocations = [(label, r) for label, r, _ in found if isinstance(r, Allocation)]
    if chosen == "allocation" and not allocations:
        raise HtsrError("The allocation view needs an allocation file.", "Make one: htsr allocate.")
    if chosen in ("layers", "heatmap", "esd") and not metrics:
        raise HtsrError(f"The {chosen} view needs a metrics file.", "Make one: htsr analyze.")
    if not found:
        raise HtsrError("There is nothing to draw.", "Name a metrics or an allocation file.")
    if len(metrics) > 1 and (
        chosen in ("heatmap", "esd") or (chosen == "overview" and allocations)
    ):
        raise HtsrError("This view takes one metrics file.", "Draw the others by themselves.")
    if chosen == "esd":
        figure = _esd(*metrics[0][1:], spectra, matrix, layer, role)
    elif len(metrics) > 1 and chosen != "allocation":
        figure = figures.models_figure([(label, record) for label, record, _ in metrics], metric)
    else:
        panels = ("layers", "heatmap", "allocation") if chosen == "overview" else (chosen,)
        record = metrics[0][1] if metrics and chosen != "allocation" else None
        figure = figures.model_figure(record, allocations, metric, panels)
    if output is not None:
        style.save(figure, output)
    return figure


def _opened(source) -> tuple[str, Metrics | Allocation, Result | None]:
    """A label, the record, and the file it came from."""
    from htsr_alloc.records.results import read_result

    if isinstance(source, (Metrics, Allocation)):
        return (source.model.name if source.model else "allocation"), source, None
    result = read_result(source)
    return result.stem, result.record, result


def _esd(metrics, result, spectra, matrix, layer, role) -> Figure:
    from htsr_alloc.records.results import open_spectra
    from htsr_alloc.reports.plots import figures
    from htsr_alloc.reports.plots.spectra import choose

    matrices = choose(metrics, matrix, layer, role)
    with ExitStack() as stack:
        if spectra is None:
            if result is None:
                raise HtsrError("A record alone has no spectra.", "Give spectra=, or the file.")
            spectra = stack.enter_context(open_spectra(metrics, result.path))
        return figures.esd_figure(metrics, matrices, spectra)
