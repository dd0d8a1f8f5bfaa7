"""The main job: read each matrix, decompose it, fit its tail, keep the result, free it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from htsr_alloc import files
from htsr_alloc.analysis.cost import flops, transfer
from htsr_alloc.analysis.decompose import Limits, decompose_all, peak_bins
from htsr_alloc.analysis.distributed import Processes
from htsr_alloc.analysis.journal import Entry, Journal, another
from htsr_alloc.analysis.measure import measure, with_noise
from htsr_alloc.analysis.outputs import RunFiles
from htsr_alloc.checkpoints import quantised
from htsr_alloc.checkpoints.layers import LayerMap, MatrixRef, map_layers
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.checkpoints.reading import Checkpoint
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import (
    Dequantised,
    File,
    Metrics,
    Model,
    Settings,
    Skipped,
    dumps,
    this_tool,
)
from htsr_alloc.records.means import summarise
from htsr_alloc.records.results import FARMS_SUFFIX
from htsr_alloc.spectra import lapack
from htsr_alloc.spectra.engines import check_engine
from htsr_alloc.spectra.estimators import fit
from htsr_alloc.spectra.uncertainty import NOISE
from htsr_alloc.version import __version__

Progress = Callable[[Iterable[tuple[MatrixRef, bool]], LayerMap], Iterable]

ADAPTER = re.compile(r"(^|\.)lora_(A|B|moe_)")  # low-rank factors, of PEFT or of a mixture


def plan(checkpoint: Checkpoint, settings: Settings) -> LayerMap:
    """Which matrices are analysed, and why the rest is not.

    Raises:
        HtsrError: weights that are quantised in an unknown format or one whose library is not
            installed, an adapter in place of a model, or no matrix left.
    """
    layer_map = map_layers(
        checkpoint.tensors,
        num_hidden_layers=checkpoint.num_hidden_layers,
        architecture=checkpoint.architecture,
        include=settings.include,
        exclude=settings.exclude,
    )
    if layer_map.quantised:
        first = layer_map.quantised[0]
        dtype = next(ref.dtype for ref in checkpoint.tensors if ref.name == first)
        raise HtsrError(
            f"{first} holds integers ({dtype}): {len(layer_map.quantised)} weights of "
            f"{checkpoint.name} are quantised in a format that is not read.",
            "Analyze the unquantised original, or leave these out with `exclude`.",
        )
    names = [matrix.name for matrix in layer_map.matrices]
    names = names or [ref.name for ref in checkpoint.tensors]
    adapted = next((name for name in names if ADAPTER.search(name)), None)
    if adapted is not None:
        raise HtsrError(
            f"{checkpoint.name} is an adapter, not a model: it holds {adapted}.",
            "Analyze the base model, or the model with the adapter merged into it; of a model that "
            "holds both, `exclude` '*lora_*'.",
        )
    if not layer_map.matrices:
        raise HtsrError(
            f"{checkpoint.name} has no weight matrix in numbered blocks that is selected.",
            "See what it holds with htsr inspect.",
        )
    quantised.check_libraries(matrix.ref for matrix in layer_map.matrices)
    return layer_map


def analyze(
    source: Checkpoint | str | Path,
    settings: Settings | None = None,
    output: RunFiles | str | Path | None = None,
    *,
    limits: Limits | None = None,
    restart: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    **chosen: Any,
) -> Metrics | None:
    """Analyse every linear weight in the blocks of a checkpoint.

    Matrices are decomposed on single-thread workers under a bound on memory, so that it does not
    grow with the model. With ``output`` finished spectra are journaled, a killed run resumes
    where it stopped, and metrics and spectra are written atomically at the end. Under torchrun
    each rank takes a share.

    Args:
        source: a checkpoint, or what ``open_checkpoint`` opens: a file, a folder or a hub id.
        settings: estimator, bins, engine, device, FARMS, selection. The default estimator is
            ``official``, with FARMS ``median``.
        **chosen: single settings, as ``estimator="median"``, over ``settings``.
        output: where to write, as ``x.metrics.json``; None writes nothing.
        limits: workers and memory; default all cores and what they need.
        restart: ignore the journal of an earlier run.
        force: replace a result of other settings or of another model.
        progress: wraps the stream of (matrix, was it resumed), one item a finished matrix.

    Returns:
        The metrics; None on a rank other than the first.

    Raises:
        HtsrError: nothing to analyse, quantised weights, unreadable files, a journal of other
            settings, an ``output`` that is there and is another result, too little memory allowed.
            A matrix without a spectrum is not an error: it
            is recorded with its reason.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if settings is None:
        settings = Settings("median" if chosen.get("farms") else "official")
    settings = replace(settings, **chosen)
    settings = with_noise(settings, settings.noise or NOISE)
    if isinstance(output, (str, Path)):
        output = RunFiles(Path(output))
    layer_map = plan(checkpoint, settings)
    # What cannot run is refused before the journal, which would refuse the right settings later.
    fit(np.ones(0), settings.estimator, settings.bins)
    check_engine(settings.engine, settings.device)
    transfer(checkpoint, layer_map.matrices)  # offline, what the cache lacks is named
    if output is not None:
        output.check(checkpoint.paths)
        if not force:
            output.refuse_to_replace(checkpoint, settings, layer_map)
    identity = _identity(checkpoint, settings)
    with Processes.join() as processes, ExitStack() as stack:
        journal = None
        if output is not None:
            path = processes.own_file(output.journal)
            journal = stack.enter_context(Journal(path, identity, restart))
        known = dict(journal.entries) if journal else {}
        if output is not None and not restart:
            known |= processes.read_journals(output.journal, identity)
        known = processes.share(known)
        entries = {
            matrix.name: known[matrix.name]
            for matrix in layer_map.matrices
            if matrix.name in known and known[matrix.name].fits(matrix.shape)
        }
        if output is not None:
            resumed = processes.take([m for m in layer_map.matrices if m.name in entries], flops)
            _check_content(checkpoint, resumed, entries, output.journal)
        todo = processes.take([m for m in layer_map.matrices if m.name not in entries], flops)

        def stream() -> Iterator[tuple[MatrixRef, bool]]:
            for matrix in layer_map.matrices:
                if matrix.name in entries:
                    yield matrix, True
            for matrix, entry in decompose_all(checkpoint, todo, settings, limits or Limits()):
                if journal is not None:
                    journal.add(matrix.name, entry)
                entries[matrix.name] = entry
                yield matrix, False

        for _ in progress(stream(), layer_map) if progress else stream():
            pass
        entries = processes.share(entries)
        metrics = None
        if processes.first:
            metrics = _assemble(checkpoint, layer_map, settings, entries)
            if output is not None:
                if not force:
                    output.refuse_other_weights(metrics)
                metrics = _write(metrics, entries, output)
        processes.wait()  # until the results are safe, every journal stays
        if journal is not None:
            journal.remove()
        if output is not None and processes.first:
            processes.remove_journals(output.journal)
    return metrics


def _check_content(
    checkpoint: Checkpoint,
    matrices: Iterable[MatrixRef],
    entries: Mapping[str, Entry],
    journal: Path,
) -> None:
    """Read again the finished matrices whose files were replaced or written to meanwhile, be it
    with the same size and time, and compare their hashes.

    Raises:
        HtsrError: one holds other weights than those that were analysed.
    """
    for matrix in matrices:
        entry = entries[matrix.name]
        if entry.stamp != checkpoint.stamp(matrix.ref):
            digest = hashlib.sha256()
            matrix.read(checkpoint, digest)
            if digest.hexdigest() != entry.sha256:
                raise another(journal, "checkpoint", f"other weights in {matrix.name}")


def _assemble(
    checkpoint: Checkpoint, layer_map: LayerMap, settings: Settings, entries: dict[str, Entry]
) -> Metrics:
    """The record of a finished analysis, spectra not yet written."""
    ordered = [(matrix, entries[matrix.name]) for matrix in layer_map.matrices]
    matrices = [measure(matrix, entry.spectrum, settings) for matrix, entry in ordered]
    hashes = bytes.fromhex("".join(entry.sha256 for _, entry in ordered))
    unindexed = ((name, "not in the index") for name in checkpoint.listing.unindexed)
    return Metrics(
        format=Metrics.FORMAT,
        version=Metrics.VERSION,
        tool=this_tool(),
        model=Model(
            name=checkpoint.name,
            revision=checkpoint.revision,
            weights_sha256=hashlib.sha256(hashes).hexdigest(),
            architecture=checkpoint.architecture,
            num_layers=len(layer_map.prefixes),
            parameters=sum(math.prod(ref.shape) for ref in checkpoint.tensors if ref.is_float),
            dequantised=tuple(
                Dequantised(form, dtype, count, quantised.decoder(form) or None)
                for form, dtype, count in quantised.kinds(m.ref for m in layer_map.matrices)
            ),
        ),
        settings=settings,
        spectra=None,
        matrices=tuple(matrices),
        layers=summarise(matrices, layer_map.prefixes),
        skipped=tuple(Skipped(*item) for item in (*layer_map.skipped, *unindexed)),
    )


def _write(metrics: Metrics, entries: dict[str, Entry], output: RunFiles) -> Metrics:
    """Spectra first, then the metrics that name them by hash."""
    from safetensors.numpy import save

    spectra: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        if entry.spectrum.reason is None:
            spectra[name] = entry.spectrum.eigenvalues
        if entry.spectrum.windows is not None:
            spectra[name + FARMS_SUFFIX] = entry.spectrum.windows
    data = save({name: spectra[name] for name in sorted(spectra)})
    with files.atomic_write(output.spectra) as file:
        file.write(data)
    kept = File(output.spectra.name, hashlib.sha256(data).hexdigest())
    metrics = replace(metrics, spectra=kept)
    files.write_text(output.metrics, dumps(metrics))
    return metrics


def _identity(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """All that a spectrum depends on, as JSON."""
    farms, library = settings.farms, lapack.load()
    return {
        "htsr version": __version__,
        "checkpoint": checkpoint.revision
        or [[s.name, s.identity] for s in checkpoint.listing.shards],
        "dequantised": quantised.identity(checkpoint.tensors),
        "engine": settings.engine,
        "linear algebra": library.name if library else "torch",
        "bins": peak_bins(settings),
        "device": settings.device.partition(":")[0],
        "farms": [farms.rows, farms.ratio, farms.windows] if farms else None,
    }
