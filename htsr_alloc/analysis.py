"""The main job: read each matrix, decompose it, fit its tail, keep the result, free it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from htsr_alloc import __version__, files
from htsr_alloc.errors import HtsrError
from htsr_alloc.estimators import fit
from htsr_alloc.layers import LayerMap, MatrixRef, map_layers
from htsr_alloc.measure import measure, summarise, with_fit
from htsr_alloc.reading import Checkpoint
from htsr_alloc.records import (
    File,
    Matrix,
    Metrics,
    Model,
    Settings,
    Skipped,
    dumps,
    loads,
    this_tool,
)

if TYPE_CHECKING:
    import torch

    from htsr_alloc.journal import Journal

FARMS_SUFFIX = "#farms"  # the pooled spectrum of a matrix, beside the whole one


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes: ``<stem>.metrics.json``, its spectra and its journal."""

    metrics: Path

    @property
    def stem(self) -> str:
        return self.metrics.name.removesuffix(".json").removesuffix(".metrics")

    @property
    def spectra(self) -> Path:
        return self.metrics.with_name(f"{self.stem}.spectra.safetensors")

    @property
    def journal(self) -> Path:
        return self.metrics.with_name(f"{self.stem}.journal")


def plan(checkpoint: Checkpoint, settings: Settings) -> LayerMap:
    """Which matrices are analysed, and why the rest is not.

    Raises:
        HtsrError: weights that are quantised to integers, or no matrix left.
    """
    layer_map = map_layers(
        checkpoint.tensors,
        num_hidden_layers=checkpoint.num_hidden_layers,
        include=settings.include,
        exclude=settings.exclude,
    )
    if layer_map.quantised:
        first = layer_map.quantised[0]
        dtype = next(ref.dtype for ref in checkpoint.tensors if ref.name == first)
        raise HtsrError(
            f"{first} holds integers ({dtype}): {len(layer_map.quantised)} weights of "
            f"{checkpoint.name} are quantised (GPTQ, AWQ, bitsandbytes, MXFP4 or the like).",
            "Analyze the unquantised original, or leave these out with --exclude.",
        )
    if not layer_map.matrices:
        raise HtsrError(
            f"{checkpoint.name} has no weight matrix in numbered blocks that is selected.",
            "See what it holds with htsr inspect.",
        )
    return layer_map


def analyze(
    checkpoint: Checkpoint,
    settings: Settings,
    output: RunFiles | None = None,
    *,
    restart: bool = False,
    progress: Callable[[Iterable[tuple[MatrixRef, bool]], LayerMap], Iterable] | None = None,
) -> Metrics:
    """Analyse every linear weight in the blocks of a checkpoint.

    One matrix is decomposed at a time while the next is read, so that memory does not grow
    with the model. With ``output`` finished spectra are journaled, a killed run resumes where
    it stopped, and metrics and spectra are written atomically at the end.

    Args:
        checkpoint: see ``open_checkpoint``.
        settings: estimator, bins, engine, device, FARMS, selection.
        output: where to write; None writes nothing.
        restart: ignore the journal of an earlier run.
        progress: wraps the stream of (matrix, was it resumed), one item a finished matrix.

    Raises:
        HtsrError: nothing to analyse, quantised weights, unreadable files, a journal of other
            settings. A matrix without a spectrum is no error: it is recorded with its reason.
    """
    from htsr_alloc.journal import Journal

    layer_map = plan(checkpoint, settings)
    fit(np.ones(0), settings.estimator, settings.bins)  # refuse a wrong estimator before the work
    journal = None
    if output is not None:
        journal = Journal(output.journal, _identity(checkpoint, settings), restart)
    try:
        finished: dict[str, tuple[Matrix, str]] = {}
        spectra: dict[str, np.ndarray] = {}

        def work() -> Iterator[tuple[MatrixRef, bool]]:
            for matrix, entry, resumed in _spectra(checkpoint, layer_map, settings, journal):
                record = measure(matrix, entry.spectrum, settings)
                finished[matrix.name] = record, entry.sha256
                if entry.spectrum.reason is None:
                    spectra[matrix.name] = entry.spectrum.eigenvalues
                if entry.spectrum.windows is not None:
                    spectra[matrix.name + FARMS_SUFFIX] = entry.spectrum.windows
                yield matrix, resumed

        for _ in progress(work(), layer_map) if progress else work():
            pass
        matrices = [finished[matrix.name][0] for matrix in layer_map.matrices]
        hashes = "".join(finished[matrix.name][1] for matrix in layer_map.matrices)
        metrics = Metrics(
            format=Metrics.FORMAT,
            version=Metrics.VERSION,
            tool=this_tool(),
            model=Model(
                name=checkpoint.name,
                revision=checkpoint.revision,
                weights_sha256=hashlib.sha256(bytes.fromhex(hashes)).hexdigest(),
                architecture=checkpoint.architecture,
                num_layers=len(layer_map.prefixes),
            ),
            settings=settings,
            spectra=None,
            matrices=tuple(matrices),
            layers=summarise(matrices, layer_map.prefixes),
            skipped=tuple(
                Skipped(*item)
                for item in (
                    *layer_map.skipped,
                    *((name, "not in the index") for name in checkpoint.listing.unindexed),
                )
            ),
        )
        if output is not None:
            metrics = _write(metrics, spectra, output)
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    if journal is not None:
        journal.close(remove=True)
    return metrics


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


def _spectra(
    checkpoint: Checkpoint, layer_map: LayerMap, settings: Settings, journal: Journal | None
) -> Iterator[tuple[MatrixRef, Any, bool]]:
    """(matrix, journal entry, resumed) in shard order; the next matrix is read meanwhile."""
    from htsr_alloc.journal import Entry
    from htsr_alloc.spectrum import spectrum

    done = journal.entries if journal else {}
    order = {ref.name: position for position, ref in enumerate(checkpoint.tensors)}
    by_position = sorted(layer_map.matrices, key=lambda m: (order[m.ref.name], m.index or 0))
    todo = []
    for matrix in by_position:
        if matrix.name in done:
            yield matrix, done[matrix.name], True
        else:
            todo.append(matrix)

    def read(matrix: MatrixRef) -> tuple[torch.Tensor, str]:
        weight = checkpoint.read(matrix.ref, matrix.index)
        return weight, checkpoint.digest(matrix.ref, matrix.index)  # hashing pages the file in

    with ThreadPoolExecutor(1, "htsr-read") as reader:
        ahead = reader.submit(read, todo[0]) if todo else None
        for position, matrix in enumerate(todo):
            assert ahead is not None
            weight, digest = ahead.result()
            following = todo[position + 1 : position + 2]
            ahead = reader.submit(read, following[0]) if following else None
            found = spectrum(
                weight, engine=settings.engine, device=settings.device, farms=settings.farms
            )
            del weight
            entry = Entry(found, digest)
            if journal is not None:
                journal.add(matrix.name, entry)
            yield matrix, entry, False


def _write(metrics: Metrics, spectra: dict[str, np.ndarray], output: RunFiles) -> Metrics:
    """Spectra first, then the metrics that name them by hash."""
    from safetensors.numpy import save

    data = save({name: spectra[name] for name in sorted(spectra)})
    with files.atomic_write(output.spectra) as file:
        file.write(data)
    kept = File(output.spectra.name, hashlib.sha256(data).hexdigest())
    metrics = replace(metrics, spectra=kept)
    files.write_text(output.metrics, dumps(metrics))
    return metrics


def _identity(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """All that a spectrum depends on, as JSON."""
    farms = settings.farms
    return {
        "htsr version": __version__,
        "checkpoint": checkpoint.revision
        or [[s.name, s.identity] for s in checkpoint.listing.shards],
        "engine": settings.engine,
        "device": settings.device.partition(":")[0],
        "farms": [farms.rows, farms.ratio, farms.windows] if farms else None,
    }
