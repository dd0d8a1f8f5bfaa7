"""One HTML page of a metrics file and its allocations, which opens offline."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import METRICS, Allocation, Metrics
from htsr_alloc.records.results import Result, open_spectra, read_result
from htsr_alloc.records.text import printable
from htsr_alloc.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report(*paths: str | Path, notes: Sequence[str] = ()) -> str:
    """The page: tables, figures, provenance, cautions and what to cite.

    It loads nothing: a content security policy allows only its own style and its own script, by
    their hashes. The script sorts and filters the tables. Every name is escaped, and the same files
    give the same page.

    Args:
        paths: one metrics file and any number of allocations. Spectra that lie beside the metrics
            are shown for the matrices that stand out.
        notes: sentences to stand among the cautions, such as what is known of the source.

    Raises:
        HtsrError: not one metrics file, or a file that is invalid.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from htsr_alloc.reports.cautions import cautions
    from htsr_alloc.reports.citing import references
    from htsr_alloc.reports.tables import allocation_facts, facts, role_rows, skipped_groups

    results = [read_result(path) for path in paths]
    sources = [result for result in results if isinstance(result.record, Metrics)]
    if len(sources) != 1:
        raise HtsrError(
            f"A report is about one metrics file, not {len(sources)}.",
            "Name one, and any allocations; htsr compare sets several side by side.",
        )
    source, metrics = sources[0], sources[0].record
    assert isinstance(metrics, Metrics)
    results = [result for result in results if result is not source]
    allocations = [r.record for r in results if isinstance(r.record, Allocation)]

    def harmless(value: object) -> object:
        return value if isinstance(value, Markup) else printable(value)

    folder = resources.files("htsr_alloc.reports")
    style = folder.joinpath("page.css").read_text("utf-8")
    script = folder.joinpath("page.js").read_text("utf-8")
    pages = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["number"] = lambda value: "–" if value is None else f"{value:.3f}"
    pages.filters["general"] = lambda value: "–" if value is None else f"{value:.4g}"
    page = pages.from_string(folder.joinpath("page.html").read_text("utf-8"))
    return page.render(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "img-src data:; "
        "base-uri 'none'; form-action 'none'",
        version=__version__,
        metrics=metrics,
        facts=facts(source, metrics),
        allocations=[(r.file.file, r.record, allocation_facts(r)) for r in results],
        cautions=cautions(source, metrics, results),
        notes=notes,
        figures=_figures(source, metrics, results),
        has_spectra=_spectra_path(source, metrics) is not None,
        metric_names=METRICS,
        roles=role_rows(metrics),
        skipped=skipped_groups(metrics),
        references=references(metrics.settings, allocations),
    )


def _figures(source: Result, metrics: Metrics, results: Sequence[Result]) -> list[tuple[str, str]]:
    """(caption, data URI) of each."""
    from htsr_alloc.reports.plots import draw
    from htsr_alloc.reports.plots.esd import esd_figure
    from htsr_alloc.reports.plots.inputs import Inputs
    from htsr_alloc.reports.tables import outstanding

    found = []
    if any(layer.pl_alpha_hill is not None for layer in metrics.layers):
        inputs = Inputs(metrics=((source.stem, metrics),))
        errors = any(matrix.alpha_se is not None for matrix in metrics.matrices)
        for view, caption in (
            ("layers", "PL_Alpha_Hill by layer: one line per role, the mean in bold."),
            ("heatmap", "PL_Alpha_Hill by role and layer."),
            ("errors", "PL_Alpha_Hill with its standard error, and its tails, by role and layer.")
            if errors
            else ("tails", "Eigenvalues in each tail."),
        ):
            found.append((caption, _embedded(draw(view, inputs))))
    for result in results:
        if isinstance(result.record, Allocation):
            inputs = Inputs(allocations=((result.file.file, result.record),))
            what = result.record.counted.capitalize()
            caption = f"{what} of each layer in {result.file.file}, against baselines of equal "
            caption += "budget."
            found.append((caption, _embedded(draw("allocation", inputs))))
    chosen = outstanding(metrics)
    if chosen and _spectra_path(source, metrics):
        with open_spectra(metrics, source.path) as spectra:
            figure = esd_figure(metrics, chosen, spectra)
        caption = (
            "Spectra that stand out: the smallest and the largest PL_Alpha_Hill, and the largest "
            "KS distance. Bars are the density of the eigenvalues, the triangle is the peak, the "
            "dashed line xmin and the solid line the fitted tail."
        )
        found.append((caption, _embedded(figure)))
    return found


def _hash(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _spectra_path(source: Result, metrics: Metrics) -> Path | None:
    """The spectra, if they lie beside the metrics."""
    path = source.path.with_name(metrics.spectra.file) if metrics.spectra else None
    return path if path is not None and path.exists() else None


def _embedded(figure: Figure) -> str:
    """The figure as a data URI. An image, unlike SVG inside the page, cannot run or load anything,
    whatever its text."""
    from htsr_alloc.style import write

    file = io.BytesIO()
    write(figure, file, "svg")
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
