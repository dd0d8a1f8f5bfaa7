"""Scores from weights alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from htsr_alloc.allocation.units import module_of, selected
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics
from htsr_alloc.records.results import open_spectra, read_result
from htsr_alloc.training.scoring.base import Opened

IQR = 1.349  # quartiles of a normal distribution lie so many deviations apart


def norm(model: Opened) -> dict[str, float]:
    """‖W‖ of Frobenius."""
    return {
        name: float(module.weight.double().norm())  # type: ignore[operator, union-attr]
        for name, module in model.linears.items()
    }


def snr(metrics: Path) -> dict[str, float]:
    """Spectrum's signal-to-noise ratio, from the spectra beside a metrics file.

    With singular values s: σ = (q75 − q25) / 1.349, what is above σ (1 + √(min(m, n) / max(m, n)))
    is signal, and the score is Σ signal / Σ noise / max s. As the released code has it, the noise
    is 1 where there is none.

    Raises:
        HtsrError: no metrics file, no spectra beside it, or those of FARMS windows.
    """
    found = read_result(metrics).record
    if not isinstance(found, Metrics):
        raise HtsrError(f"{metrics.name} is no metrics file.", "htsr analyze writes one.")
    if found.settings.farms:
        raise HtsrError(
            f"The spectra of {metrics.name} are those of FARMS windows, not of whole matrices.",
            "Analyze without FARMS.",
        )
    scores = {}
    with open_spectra(found, metrics) as spectra:
        for matrix in selected(found, ()):
            singular = np.sqrt(np.maximum(spectra[matrix.tensor], 0))
            scores[module_of(matrix)] = signal_to_noise(singular, matrix.shape)
    return scores


def signal_to_noise(singular: np.ndarray, shape: tuple[int, ...]) -> float:
    """The score of one matrix of this shape."""
    low, high = np.quantile(singular, [0.25, 0.75])
    edge = (high - low) / IQR * (1 + np.sqrt(min(shape) / max(shape)))
    signal = singular > edge
    noise = float(singular[~signal].sum()) if not signal.all() else 1.0
    return float(singular[signal].sum()) / noise / float(singular.max())
