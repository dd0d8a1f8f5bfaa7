"""Another estimator on the spectra that an analysis kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from htsr_alloc import files
from htsr_alloc.analysis.measure import refitted
from htsr_alloc.analysis.outputs import RunFiles
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics, dumps, loads, this_tool
from htsr_alloc.records.results import open_spectra
from htsr_alloc.spectra.uncertainty import NOISE


def refit(path: Path, output: RunFiles, estimator: str, bins: int = 100) -> Metrics:
    """Estimate again from the spectra that ``analyze`` kept, without the checkpoint.

    The new file shares the old one's spectra, so that both must be in one folder.

    Raises:
        HtsrError: the metrics are invalid, their spectra are absent or not the same bytes, or the
            output is one of the two.
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
    files.write_text(output.metrics, dumps(metrics))
    return metrics
