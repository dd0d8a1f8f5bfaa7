"""One look for all figures: colours that every eye can tell apart, marks that survive a copier.

Figures are matplotlib's object-oriented ones on Agg; pyplot and its global state are never touched,
and a user's matplotlibrc changes nothing.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib.style
from matplotlib.figure import Figure

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import atomic_write
from htsr_alloc.records.text import printable

# Okabe and Ito's palette; grey for its yellow, which is lost on white, black is the mean's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6E6E6E")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES = ("-", "--", "-.", ":")
DPI = 150
COLOUR_MAP = "cividis"  # its lightness grows evenly, so that grey prints keep the order

SUFFIXES = ("png", "svg", "pdf")

_LOOK = {
    "font.family": "DejaVu Sans",  # matplotlib's own
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.6,
    "savefig.dpi": DPI,
    "svg.fonttype": "path",  # looks the same without the font
    "svg.hashsalt": "htsr",  # the same figure has the same bytes
    "pdf.fonttype": 42,
}
_NO_DATES = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@contextmanager
def look() -> Iterator[None]:
    """Our settings and none of the user's, while figures are made or saved."""
    with matplotlib.style.context(["default", _LOOK]):  # pyright: ignore[reportArgumentType]
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, whose parts make room for each other."""
    return Figure(figsize=(width, height), layout="constrained")


def line_styles() -> Iterator[dict[str, Any]]:
    """Endless: neighbours differ in colour and marker, and after a round in dashes."""
    for i in itertools.count():
        yield {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i // len(COLOURS) % len(LINES)],
        }


def plain(text: object, most: int = 60) -> str:
    """A name from a file as a figure may show it.

    No character that drives anything, at most ``most`` of them (the middle is left out), no
    dollar sign that would start a formula, no underscore first, which keeps a name off a legend.
    """
    shown = printable(text)
    if len(shown) > most:
        head = (most - 1) // 2
        shown = f"{shown[:head]}…{shown[len(shown) - (most - 1 - head) :]}"
    return (" " if shown.startswith("_") else "") + shown.replace("$", r"\$")


def format_of(path: Path) -> str:
    """The figure's format, by the file's suffix.

    Raises:
        HtsrError: one that figures are not written in.
    """
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in SUFFIXES:
        hint = f"Name the file .{', .'.join(SUFFIXES[:-1])} or .{SUFFIXES[-1]}"
        hint += "; htsr report writes HTML." if suffix in ("html", "htm") else "."
        raise HtsrError(f"A figure cannot be written as {path.name!r}.", hint)
    return suffix


def write(figure: Figure, file: BinaryIO, kind: str, dpi: float = DPI) -> None:
    """The figure's bytes: the same for the same figure, without dates.

    Raises:
        HtsrError: the figure is too small for its panels.
    """
    with look(), warnings.catch_warnings():
        # A script that DejaVu Sans lacks shows as boxes; nothing the user could do about it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("error", message="constrained_layout not applied")
        try:
            figure.savefig(file, format=kind, metadata=_NO_DATES[kind], dpi=dpi)
        except UserWarning:
            width, height = figure.get_size_inches()
            raise HtsrError(
                f"A figure of {width:g} x {height:g} inches has no room for its panels.",
                "Choose a larger size.",
            ) from None


def save(figure: Figure, path: str | Path, dpi: float = DPI) -> None:
    """Write a figure as png, svg or pdf, by the file's suffix. The same figure gives the same
    bytes.

    Args:
        dpi: dots per inch of a png; the others are drawn in vectors.

    Raises:
        HtsrError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    kind = format_of(path)
    with atomic_write(path) as file:
        write(figure, file, kind, dpi)
