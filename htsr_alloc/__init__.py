"""Decide, from a model's weights alone, how much capacity each layer of a LoRA-MoE gets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from htsr_alloc.version import __version__

if TYPE_CHECKING:
    from htsr_alloc.allocation import Bounds, allocate, read_scores
    from htsr_alloc.analysis.analyze import analyze
    from htsr_alloc.checkpoints.open import open_checkpoint
    from htsr_alloc.errors import HtsrError
    from htsr_alloc.records import Allocation, Farms, Metrics, Settings, dumps, loads
    from htsr_alloc.reports.plots import plot
    from htsr_alloc.spectra.estimators import fit
    from htsr_alloc.watching import Watched, watch

# Public name -> module. Imported on first use, so that `import htsr_alloc` loads no torch.
_PUBLIC = {
    "HtsrError": "errors",
    "Metrics": "records",
    "Allocation": "records",
    "Settings": "records",
    "Farms": "records",
    "loads": "records",
    "dumps": "records",
    "open_checkpoint": "checkpoints.open",
    "fit": "spectra.estimators",
    "analyze": "analysis.analyze",
    "allocate": "allocation",
    "Bounds": "allocation",
    "read_scores": "allocation",
    "plot": "reports.plots",
    "watch": "watching",
    "Watched": "watching",
}
__all__ = [
    "Allocation",
    "Bounds",
    "Farms",
    "HtsrError",
    "Metrics",
    "Settings",
    "Watched",
    "__version__",
    "allocate",
    "analyze",
    "dumps",
    "fit",
    "loads",
    "open_checkpoint",
    "plot",
    "read_scores",
    "watch",
]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *_PUBLIC])
