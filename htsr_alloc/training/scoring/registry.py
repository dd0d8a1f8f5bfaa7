"""The scores by name: a new one is a function and a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from htsr_alloc.training.scoring.activations import explained
from htsr_alloc.training.scoring.gradients import fisher, gain
from htsr_alloc.training.scoring.weights import norm, snr


@dataclass(frozen=True)
class Score:
    """How linears are scored; a higher score is for more experts.

    Attributes:
        compute: gets what ``takes`` names and answers with a score of each linear by its name.
        takes: of ``model`` (folder), ``metrics`` (a file with its spectra) and ``data`` (rows),
            which must be given, and ``r``, ``limit`` and ``batch_size``, which may be.
    """

    title: str
    reference: str
    takes: tuple[str, ...]
    compute: Callable[..., dict[str, float]]


ROWS = ("model", "data", "limit")
SCORES: dict[str, Score] = {
    "snr": Score("Spectrum's SNR", "arXiv 2406.06623 and its released code", ("metrics",), snr),
    "norm": Score("weight norm", "of Frobenius", ("model",), norm),
    "fisher": Score("gradient variance", "the diagonal of the empirical Fisher", ROWS, fisher),
    "eva": Score("explained variance", "arXiv 2410.07170", (*ROWS, "r", "batch_size"), explained),
    "gain": Score("first-order gain", "of a step of rank r", (*ROWS, "r", "batch_size"), gain),
}
