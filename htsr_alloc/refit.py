"""Another estimator on the spectra that an analysis kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from htsr_alloc import files
from htsr_alloc.analysis import FARMS_SUFFIX, RunFiles
from htsr_alloc.errors import HtsrError
from htsr_alloc.estimators import fit
from htsr_alloc.measure import summarise, with_fit
from htsr_alloc.records import Metrics, dumps, loads, this_tool


def refit(path: Path, output: RunFiles, estimator: str, bins: int = 100) -> Metrics:
    """Estimate again from the spectra that ``analyze`` kept, without the checkpoint.

    The new file shares the old one's spectra, so that both must be in one folder.

    Raises:
        HtsrError: the metrics are invalid, their spectra are absent or not the same bytes.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    old = loads(Metrics, files.read_bytes(path), path.name)
    if old.spectra is None:
        raise HtsrError(f"{path.name} was written without spectra.", "Analyze again with -o FILE.")
    if output.metrics.parent.resolve() != path.parent.resolve():
        raise HtsrError(
            f"The new metrics share {old.spectra.file} with {path.name}.",
            f"Write them to the same folder, {path.parent}.",
        )
    spectra_path = path.with_name(old.spectra.file)
    if files.sha256(spectra_path) != old.spectra.sha256:
        raise HtsrError(
            f"{spectra_path.name} is not the file that {path.name} was written with.",
            "Analyze again.",
        )
    try:
        spectra = load_file(spectra_path)
    except SafetensorError as error:
        raise HtsrError(f"{spectra_path} cannot be read: {error}.") from error
    settings = replace(old.settings, estimator=estimator, bins=bins)
    suffix = FARMS_SUFFIX if settings.farms else ""
    matrices = []
    for matrix in old.matrices:
        values = spectra.get(matrix.tensor + suffix)
        if values is None and matrix.lambda_max is not None:
            raise HtsrError(f"{spectra_path.name} lacks the spectrum of {matrix.tensor}.")
        if values is not None:
            fitted = fit(values, estimator, bins)
            matrix = with_fit(matrix, fitted)
        matrices.append(matrix)
    prefixes = [layer.prefix for layer in old.layers]
    metrics = replace(
        old,
        tool=this_tool(),
        settings=settings,
        matrices=tuple(matrices),
        layers=summarise(matrices, prefixes),
    )
    files.write_text(output.metrics, dumps(metrics))
    return metrics
