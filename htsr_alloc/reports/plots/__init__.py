"""Figures from records alone: spectra, layers, allocations. matplotlib loads on first use.

Each plot is a module of this folder with ``figure(inputs) -> Figure``, and a row of ``PLOTS``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Metrics
from htsr_alloc.reports.plots.inputs import Inputs, Size

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plot:
    """What a plot shows and needs.

    Attributes:
        shows: in a few words.
        metrics: how many metrics files, at least and at most (None: any number).
        allocations: how many allocation files at least.
        chooses: whether it takes a choice of matrices, layers and roles.
    """

    shows: str
    metrics: tuple[int, int | None] = (0, None)
    allocations: int = 0
    chooses: bool = False

    def check(self, name: str, inputs: Inputs) -> None:
        """Raises:
        HtsrError: too few or too many files, or a choice that the plot does not take.
        """
        least, most = self.metrics
        count = len(inputs.metrics)
        if not self.chooses and (inputs.matrix or inputs.layer or inputs.role):
            raise HtsrError(
                f"The {name} view shows all matrices.", "Remove `matrix`, `layer` and `role`."
            )
        if len(inputs.allocations) < self.allocations:
            raise HtsrError(
                f"The {name} view needs an allocation file.", "Make one: htsr allocate."
            )
        if count < least:
            files = "a metrics file" if least == 1 else f"{least} metrics files"
            raise HtsrError(f"The {name} view needs {files}.", "Make one: htsr analyze.")
        if most is not None and count > most:
            files = "one metrics file" if most == 1 else f"{most} metrics files"
            raise HtsrError(f"The {name} view takes {files}.", "Draw the others separately.")


PLOTS = {
    "overview": Plot("layers, tails, heatmap and allocation, as far as the files have them"),
    "layers": Plot("the metric by layer: a line per role, or per model", metrics=(1, None)),
    "tails": Plot("eigenvalues in each tail by layer: a line per role", metrics=(1, 1)),
    "errors": Plot("each role's α with its standard error, and its tails", metrics=(1, 1)),
    "heatmap": Plot("role by layer", metrics=(1, 1)),
    "allocation": Plot("experts or ranks against uniform and MoLA", allocations=1),
    "difference": Plot("what fine-tuning changed; the base is the first file", metrics=(2, 2)),
    "esd": Plot("spectra with their peaks and tails", metrics=(1, 1), chooses=True),
}


def plot(
    *sources: str | Path | Metrics | Allocation,
    view: str | None = None,
    metric: str = "pl_alpha_hill",
    matrix: Collection[str] = (),
    layer: Collection[int] = (),
    role: Collection[str] = (),
    spectra: Mapping[str, np.ndarray] | None = None,
    output: str | Path | None = None,
    size: Size | None = None,
    dpi: float | None = None,
) -> Figure:
    """One figure of the sources.

    Args:
        sources: metrics and allocations, as files or as records.
        view: a name in ``PLOTS``. The default is ``esd`` where matrix, layer or role is given,
            else ``overview``.
        metric: pl_alpha_hill, alpha_hat or stable_rank.
        matrix, layer, role: which spectra ``esd`` shows. ``matrix`` takes names of tensors and
            shell patterns.
        spectra: tensor -> ascending eigenvalues, for a record; a file has them beside it.
        output: a .png, .svg or .pdf file to write as well.
        size: width and height in inches, 1 to 100; the default depends on the plot.
        dpi: dots per inch of a png, 10 to 1200; default 150.

    Returns:
        matplotlib's figure.

    Raises:
        HtsrError: unreadable files, nothing to draw, an unknown view, metric or matrix, a size
            that cannot be drawn.
    """
    from htsr_alloc import style

    chosen = view or ("esd" if matrix or layer or role else "overview")
    if chosen not in PLOTS:
        raise HtsrError(f"There is no view {chosen!r}.", f"Choose from {', '.join(PLOTS)}.")
    if size is not None and not all(1 <= side <= 100 for side in size):
        raise HtsrError(f"A figure cannot be {size[0]:g} x {size[1]:g} inches (1 to 100 each).")
    if dpi is not None and not 10 <= dpi <= 1200:
        raise HtsrError(f"A figure cannot have {dpi:g} dots per inch (10 to 1200).")
    if output is not None:
        kind = style.format_of(Path(output))
        if dpi is not None and kind != "png":
            raise HtsrError(f"A {kind} has no dots per inch.", "Remove `dpi`, or write a .png.")
    found = [_opened(source) for source in sources]
    if not found:
        raise HtsrError("There is nothing to draw.", "Name a metrics or an allocation file.")
    metrics = [(label, r, path) for label, r, path in found if isinstance(r, Metrics)]
    inputs = Inputs(
        metrics=tuple((label, record) for label, record, _ in metrics),
        allocations=tuple((label, r) for label, r, _ in found if isinstance(r, Allocation)),
        metric=metric,
        matrix=matrix,
        layer=layer,
        role=role,
        spectra=spectra,
        path=metrics[0][2] if metrics else None,
        size=size,
    )
    figure = draw(chosen, inputs)
    if output is not None:
        style.save(figure, output, dpi or style.DPI)
    return figure


def draw(view: str, inputs: Inputs) -> Figure:
    """The plot of that name.

    Raises:
        HtsrError: the inputs are not what it needs.
    """
    PLOTS[view].check(view, inputs)
    return import_module(f"{__name__}.{view}").figure(inputs)


def _opened(
    source: str | Path | Metrics | Allocation,
) -> tuple[str, Metrics | Allocation, Path | None]:
    """A label, the record, and the file it came from."""
    from htsr_alloc.records.results import read_result

    if isinstance(source, (Metrics, Allocation)):
        return (source.model.name if source.model else "allocation"), source, None
    result = read_result(source)
    return result.stem, result.record, result.path
