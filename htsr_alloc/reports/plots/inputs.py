"""What a plot is drawn from. No matplotlib."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Metrics

if TYPE_CHECKING:
    import numpy as np

Size = tuple[float, float]  # inches: width, height


@dataclass(frozen=True)
class Inputs:
    """Records with their labels, and what the user chose.

    Attributes:
        metric: pl_alpha_hill, alpha_hat or stable_rank.
        matrix, layer, role: which spectra; an empty choice allows all.
        spectra: tensor -> ascending eigenvalues; without them, the file beside ``path`` is read.
        path: the first metrics file.
        size: of the whole figure; None leaves it to the plot.
    """

    metrics: tuple[tuple[str, Metrics], ...] = ()
    allocations: tuple[tuple[str, Allocation], ...] = ()
    metric: str = "pl_alpha_hill"
    matrix: Collection[str] = ()
    layer: Collection[int] = ()
    role: Collection[str] = ()
    spectra: Mapping[str, np.ndarray] | None = None
    path: Path | None = None
    size: Size | None = None

    @contextmanager
    def eigenvalues(self) -> Iterator[Mapping[str, np.ndarray]]:
        """The spectra of the first metrics.

        Raises:
            HtsrError: a record without spectra, or a file that is missing or changed.
        """
        from htsr_alloc.records.results import open_spectra

        if self.spectra is not None:
            yield self.spectra
        elif self.path is None:
            raise HtsrError("A record alone has no spectra.", "Give spectra=, or the file.")
        else:
            with open_spectra(self.metrics[0][1], self.path) as spectra:
                yield spectra
