"""Where an analysis writes, and what it refuses to write over."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from htsr_alloc import files
from htsr_alloc.analysis.measure import with_noise
from htsr_alloc.checkpoints.header import check_unicode
from htsr_alloc.checkpoints.layers import LayerMap
from htsr_alloc.checkpoints.reading import Checkpoint
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics, Settings
from htsr_alloc.records.facts import check_bare_name
from htsr_alloc.records.keeping import refuse_to_replace
from htsr_alloc.spectra.uncertainty import NOISE


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

    def check(self, inputs: Iterable[Path]) -> None:
        """Refuse names that fail only after the work, or that belong to something else.

        Args:
            inputs: the files that the run reads.

        Raises:
            HtsrError: a name that the metrics cannot hold or the file system does not take, a file
                of ``inputs``, or spectra that a metrics file of a like name was written with.
        """
        inputs = tuple(inputs)
        try:
            check_bare_name(self.spectra.name, "the output's name")
            check_unicode([self.spectra.name])
        except ValueError as error:
            raise HtsrError(f"{error}.", "Choose another `output`.") from None
        for path in (self.metrics, self.spectra, self.journal):
            files.refuse_overwriting(path, inputs)
        for path in (self.metrics, self.spectra):
            files.check_writable(path)
        owned = json.dumps(self.spectra.name).encode()
        for ending in ("", ".json", ".metrics", ".metrics.json"):
            other = self.metrics.with_name(self.stem + ending)
            if other.name == self.metrics.name or not other.is_file():
                continue
            if owned in files.read_bytes(other):
                raise HtsrError(
                    f"{self.spectra.name} belongs to {other.name} and would be overwritten.",
                    f"Write to {other.name}, or choose another `output`.",
                )

    def refuse_to_replace(
        self, checkpoint: Checkpoint, settings: Settings, layer_map: LayerMap
    ) -> None:
        """Keep an earlier result unless it is of this model, its matrices and these settings.

        Raises:
            HtsrError: it is of others, or what is there is no metrics file.
        """
        names = {matrix.name: matrix.shape for matrix in layer_map.matrices}
        now: dict[str, Any] = {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "architecture": checkpoint.architecture,
            **asdict(settings),
        }

        def difference(there: Metrics) -> str | None:
            old, model = there.settings, there.model
            before: dict[str, Any] = {
                "name": model.name,
                "revision": model.revision,
                "architecture": model.architecture,
                # a file of an older version names no noise
                **asdict(with_noise(old, old.noise or settings.noise or NOISE)),
            }
            for key, value in now.items():
                if before[key] != value:
                    what = "model" if key == "name" else key
                    said = f"is of another {what} ({_said(before[key])}; now {_said(value)})"
                    fit = ", which htsr fit computes from its spectra in seconds"
                    return said + fit * (key == "estimator" and settings.farms is None)
            if {matrix.tensor: matrix.shape for matrix in there.matrices} != names:
                return "is of other matrices"
            return None

        refuse_to_replace(self.metrics, Metrics, difference)

    def refuse_other_weights(self, found: Metrics) -> None:
        """Keep an earlier result of other weights under the same names, which only the reading
        shows; the journal keeps what was found.

        Raises:
            HtsrError: there is one.
        """
        refuse_to_replace(
            self.metrics,
            Metrics,
            lambda there: (
                None
                if there.model.weights_sha256 in (None, found.model.weights_sha256)
                else "is of other weights of the same names"
            ),
        )


def _said(value: object) -> str:
    """A setting in few words."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
