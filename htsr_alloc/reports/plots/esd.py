"""Empirical spectral densities (ESD) with their fitted tails."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Matrix, Metrics
from htsr_alloc.reports.plots.inputs import Inputs, Size
from htsr_alloc.reports.plots.panels import metrics_title
from htsr_alloc.style import COLOURS, look, new_figure, plain

MOST_PANELS = 120
MOST_BINS = 10_000
PANEL_COLUMNS = 8


def figure(inputs: Inputs) -> Figure:
    """The chosen spectra of one model."""
    metrics = inputs.metrics[0][1]
    matrices = choose(metrics, inputs.matrix, inputs.layer, inputs.role)
    with inputs.eigenvalues() as spectra:
        return esd_figure(metrics, matrices, spectra, inputs.size)


def esd_figure(
    metrics: Metrics,
    matrices: Sequence[Matrix],
    spectra: Mapping[str, np.ndarray],
    size: Size | None = None,
) -> Figure:
    """One ESD in full, or a grid of small ones.

    Raises:
        HtsrError: too many for one picture, or a spectrum is absent.
    """
    if len(matrices) > MOST_PANELS:
        raise HtsrError(
            f"{len(matrices)} spectra do not fit one picture (at most {MOST_PANELS}).",
            "Choose fewer with `matrix`, `layer` or `role`.",
        )
    values, bins = spectra_of(matrices, spectra), metrics.settings.bins
    if not 1 <= bins <= MOST_BINS:
        raise HtsrError(f"A histogram of {bins} bins cannot be drawn (1 to {MOST_BINS}).")
    with look():
        if len(matrices) == 1:
            if values[0] is None:
                reason = matrices[0].reason
                raise HtsrError(f"{matrices[0].tensor} has no spectrum: {reason}.")
            figure = new_figure(*(size or (6.4, 4.6)))
            draw_esd(figure.subplots(), matrices[0], values[0], bins)
            shape = " x ".join(str(n) for n in matrices[0].shape)
            figure.suptitle(f"{metrics_title(metrics)}, {shape}", fontsize=9)
            return figure
        columns = min(PANEL_COLUMNS, max(3, round(len(matrices) ** 0.5)), len(matrices))
        rows = -(-len(matrices) // columns)
        figure = new_figure(*(size or (max(6.0, 1.7 * columns + 0.4), 1.55 * rows + 1.0)))
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, matrix, own in zip(grid, matrices, values, strict=False):
            if own is None:
                no_spectrum(axes, matrix)
            else:
                draw_esd(axes, matrix, own, bins, small=True)
        for axes in grid[len(matrices) :]:
            axes.set_axis_off()
        figure.supxlabel("eigenvalue λ of WᵀW", fontsize=9)
        figure.supylabel("density", fontsize=9)
        figure.suptitle(f"{metrics_title(metrics)}: peak (▽), xmin (dashed), fitted tail")
    return figure


def choose(
    metrics: Metrics,
    names: Collection[str] = (),
    layers: Collection[int] = (),
    roles: Collection[str] = (),
) -> list[Matrix]:
    """The matrices that have one of the names (or match it as a shell pattern), one of the layers
    and one of the roles; an empty choice allows all.

    Raises:
        HtsrError: none is left, with the nearest name.
    """
    known = [matrix.tensor for matrix in metrics.matrices]
    for name in names:
        if name not in known and not any(fnmatchcase(tensor, name) for tensor in known):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
            hint = f"Did you mean {near[0]}?" if near else None
            raise HtsrError(f"The metrics hold no matrix {name!r}.", hint)
    for layer in layers:
        if not 0 <= layer < len(metrics.layers):
            raise HtsrError(f"There is no layer {layer} among the {len(metrics.layers)} layers.")
    found_roles = dict.fromkeys(matrix.role for matrix in metrics.matrices)
    for role in roles:
        if role not in found_roles:
            raise HtsrError(
                f"The metrics hold no role {role!r}.", f"Choose from {', '.join(found_roles)}."
            )
    chosen = [
        matrix
        for matrix in metrics.matrices
        if (not names or matrix.tensor in names or _matches(matrix.tensor, names))
        and (not layers or matrix.layer in layers)
        and (not roles or matrix.role in roles)
    ]
    if not chosen:
        raise HtsrError("No matrix has that name, layer and role together.")
    return chosen


def _matches(tensor: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(tensor, pattern) for pattern in patterns)


def draw_esd(
    axes: Axes, matrix: Matrix, values: np.ndarray, bins: int, small: bool = False
) -> None:
    """One spectrum, log-log: the density of its eigenvalues and the fitted tail.

    The bins are equal in log10 λ. The peak is the left edge of the fullest bin. It need not be the
    highest bar: a bar is a density, and bins are wider at larger λ. The tail is
    p(λ) = (k/N) (α - 1)/xmin (λ/xmin)^(-α) from xmin on: a straight line of slope -α, scaled to
    the share k/N of the eigenvalues that it was fitted to.

    Args:
        values: (N,) eigenvalues; those that are not positive have no logarithm and are left out.
        bins: as in the metrics' settings.
        small: a panel of many: a short title and no legend.
    """
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        no_spectrum(axes, matrix)
        return
    low, high = np.log10(values[[0, -1]])
    pad = 0.5 if low == high else 0.0
    counts, edges = np.histogram(np.log10(values), bins=bins, range=(low - pad, high + pad))
    edges = 10.0**edges
    density = counts / (len(values) * np.diff(edges))
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="clip")
    floor = density[density > 0].min() / 3
    axes.stairs(
        density, edges, fill=True, baseline=floor, color="0.78", label=f"{len(values)} eigenvalues"
    )
    top = int(counts.argmax())  # the first of several, as the estimators take it
    axes.scatter(
        edges[top],
        density[top],
        16 if small else 36,
        marker="v",
        facecolor="white",
        edgecolor="black",
        linewidth=0.8,
        zorder=4,
        label=f"peak, λ = {edges[top]:.3g}",
    )
    alpha, xmin, k = matrix.pl_alpha_hill, matrix.xmin, matrix.k
    if alpha is not None and xmin is not None and k is not None:
        x = np.array([xmin, max(values[-1], xmin)])
        height = k / len(values) * (alpha - 1) / xmin
        axes.plot(
            x,
            height * (x / xmin) ** -alpha,
            color=COLOURS[1],
            linewidth=2,
            label=f"tail, slope −{alpha:.2f}",
        )
        axes.axvline(
            xmin,
            color=COLOURS[0],
            linestyle="--",
            linewidth=1.2,
            label=f"xmin = {xmin:.3g}, k = {k}",
        )
    axes.set_ylim(bottom=floor)
    axes.set_title(esd_title(matrix, small), fontsize=7 if small else 10)
    if values[-1] < 30 * values[0]:  # less than two decades: no room for two powers of ten
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if small:
        axes.tick_params(labelsize=6)
        axes.minorticks_off()
        return
    axes.set_xlabel("eigenvalue λ of WᵀW")
    axes.set_ylabel("density")
    axes.legend(loc="upper right", frameon=True, framealpha=1, edgecolor="none")


def esd_title(matrix: Matrix, small: bool) -> str:
    """The matrix, its α and its KS distance D, or why it has none."""
    if small:
        which = f"layer {matrix.layer}, {plain(matrix.role, 20)}"
        which += "" if matrix.expert is None else f" {matrix.expert}"
    else:
        which = plain(matrix.tensor)
    if matrix.pl_alpha_hill is None:
        return f"{which}\nno fit" if small else f"{which}\nno fit: {plain(matrix.reason)}"
    distance = "" if matrix.ks_distance is None else f"   D = {matrix.ks_distance:.3f}"
    return f"{which}\nα = {matrix.pl_alpha_hill:.2f}{distance}"


def no_spectrum(axes: Axes, matrix: Matrix) -> None:
    """An empty panel that says why."""
    axes.set_axis_off()
    text = f"{plain(matrix.role, 20)}\n{plain(matrix.reason or 'no spectrum kept', 40)}"
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=7, transform=axes.transAxes)


def spectra_of(
    matrices: Sequence[Matrix], spectra: Mapping[str, np.ndarray]
) -> list[np.ndarray | None]:
    """Each matrix's eigenvalues; None where it has none, for the reason that it states.

    Raises:
        HtsrError: a matrix was measured, but its spectrum is absent.
    """
    found = []
    for matrix in matrices:
        values = spectra.get(matrix.tensor)
        if values is None and matrix.lambda_max is not None:
            raise HtsrError(f"The spectra lack that of {matrix.tensor}.", "Analyze again.")
        found.append(values)
    return found
