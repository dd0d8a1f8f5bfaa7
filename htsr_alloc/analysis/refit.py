"""Another estimator on the spectra that an analysis kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from htsr_alloc import files
from htsr_alloc.analysis.measure import refitted
from htsr_alloc.analysis.outputs import RunFiles
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics, dumps, loads, this_tool
from htsr_alloc.records.keeping import refuse_to_replace
from htsr_alloc.records.results import open_spectra
from htsr_alloc.spectra.uncertainty import NOISE


def refit(
    path: Path, output: RunFiles, estimator: str, bins: int = 100, *, force: bool = False
) -> Metrics:
    """Estimate again from the spectra that ``analyze`` kept, without the checkpoint.

    The new file shares the old one's spectra, so that both must be in one folder.

    Args:
        force: replace a result of other settings or of other spectra.

    Raises:
        HtsrError: the metrics are invalid, their spectra are absent or not the same bytes, or the
            output is one of the two, or is there and another result.
    """
    old = loads(Metrics, files.read_bytes(path), path.name)
    if old.spectra is None:
        raise HtsrError(f"{path.name} was written without spectra.", "Analyze it to a file.")
    if output.metrics.parent.resolve() != path.parent.resolve():
        raise HtsrError(
            f"The new metrics share {old.spectra.file} with {path.name}.",
            f"Write them to the same folder, {path.parent}.",
        )
    files.refuse_overwriting(output.metrics, (path, path.with_name(old.spectra.file)))
    with open_spectra(old, path) as spectra:
        fitted = refitted(old, spectra, estimator, bins, old.settings.noise or NOISE)
    metrics = replace(fitted, tool=this_tool())
    if not force:
        refuse_to_replace(output.metrics, Metrics, lambda there: _difference(there, metrics))
    files.write_text(output.metrics, dumps(metrics))
    return metrics


def _difference(there: Metrics, metrics: Metrics) -> str | None:
    """Versions and digits may differ, and what was asked for may not."""
    if there.spectra is None or there.spectra != metrics.spectra:
        return "holds a result of other spectra"
    return None if there.settings == metrics.settings else "holds a result of other settings"
