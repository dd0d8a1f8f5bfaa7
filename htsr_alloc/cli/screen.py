"""Everything the command line prints: results to stdout, the rest to stderr."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import cannot, write_text

if TYPE_CHECKING:  # at run time where something is printed: --help is quicker without
    from rich.console import Console

PIPE_WIDTH = 200  # columns assumed when the output is not a terminal: nothing is cut there
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidi, zero-width), line separators


def open_streams() -> None:
    """Give stdin, stdout and stderr to a process that was started without one of them.

    Else the next file that it opens gets the stream's number. Writing to a closed stdout stays an
    error; what would go to a closed stderr is lost.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)  # the lowest free
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))


def clean(text: object) -> str:
    """Text from a file, without characters that drive the terminal or hide in it."""
    said = str(text)
    if said.isprintable():
        return said
    return "".join("?" if unicodedata.category(c) in HIDDEN else c for c in said)


@dataclass(frozen=True)
class Table:
    """Rows for people; columns are right-aligned but for those named in ``left``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    left: Sequence[str] = ()


@dataclass(frozen=True)
class View:
    """A result: what ``--json`` prints of it, and what people see."""

    data: Any
    tables: Sequence[Table]
    notes: Sequence[str] = ()


@dataclass
class Screen:
    """One run's output. Of torchrun's processes only the first prints notes and progress."""

    as_json: Annotated[bool, "Print the result as JSON."] = False
    quiet: Annotated[bool, "Print no notes and no progress."] = False

    def __post_init__(self) -> None:
        self.quiet = self.quiet or os.environ.get("RANK", "0") != "0"
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a bar in a locale that has none

    @functools.cached_property
    def _err(self) -> Console:
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=True)

    def _say(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self._err.print(Text(clean(text), style=style))

    def show(self, view: View) -> None:
        """A result, as JSON or as tables and notes."""
        if self.as_json:
            self.text(json.dumps(view.data, indent=1, allow_nan=False) + "\n")
            return
        _write("\n".join(map(_rendered, view.tables)))
        for note in view.notes:
            self.note(note)

    def text(self, text: str) -> None:
        """A result that is text already, unchanged unless it could drive a terminal."""
        if sys.stdout.isatty():
            text = "\n".join(clean(line) for line in text.split("\n"))
        _write(text)

    def save(self, text: str, path: Path | None) -> None:
        """A result that is a file's text; it goes to stdout for ``-`` and for None."""
        if path is None or str(path) == "-":
            self.text(text)
        else:
            write_text(path, text)
            self.note(f"wrote {path}")

    def note(self, message: str) -> None:
        """Something to know, on stderr."""
        if not self.quiet:
            self._say(message)

    def warn(self, message: str) -> None:
        """Something to mind, on stderr."""
        self._say(f"warning: {message}", "yellow")

    def error(self, error: HtsrError) -> None:
        """A failure: its sentence, then what to do."""
        self._say(f"error: {error.message}", "red")
        if error.hint:
            self._say(f"hint: {error.hint}")

    @property
    def watched(self) -> bool:
        """Whether progress is shown: stderr is a terminal, and -q was not given."""
        return not self.quiet and self._err.is_terminal

    @contextlib.contextmanager
    def counting(self, total: int) -> Iterator[Callable[[int], None]]:
        """A bar over ``total`` things, moved by telling it how many are done."""
        if not self.watched:
            yield lambda done: None
            return
        from rich import progress as bars

        done_of = bars.TextColumn("{task.completed}/{task.total}")
        columns = (bars.BarColumn(), done_of, bars.TimeRemainingColumn())
        with bars.Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=done)

    def progress(self, stream: Iterable, layer_map: Any) -> Iterator:
        """Pass a stream of (matrix, resumed) on while a bar shows it, on a terminal only.

        The bar moves by cost, not by count: the estimated time holds for matrices of unequal
        size.
        """
        if not self.watched:
            yield from stream
            return
        from rich import progress as bars

        from htsr_alloc.analysis.cost import flops

        total = sum(flops(matrix) for matrix in layer_map.matrices)
        columns = (
            bars.BarColumn(),
            bars.TextColumn("{task.fields[count]}/" + str(len(layer_map.matrices))),
            bars.TimeElapsedColumn(),
            bars.TextColumn("ETA"),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.description}", markup=False),
        )
        with bars.Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task("", total=total, count=0)
            for count, item in enumerate(stream, 1):
                matrix, resumed = item
                said = f"layer {matrix.layer} {clean(matrix.role)}"
                bar.update(
                    task,
                    advance=flops(matrix),
                    count=count,
                    description=said + (" (resumed)" if resumed else ""),
                )
                yield item


def _rendered(table: Table) -> str:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(box=None, pad_edge=False, header_style="bold")
    for name in table.columns:
        where = "left" if name in table.left else "right"
        made.add_column(Text(clean(name)), justify=where, overflow="fold")
    for row in table.rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    rendered, terminal = io.StringIO(), sys.stdout.isatty()
    console = Console(
        file=rendered, force_terminal=terminal or None, width=None if terminal else PIPE_WIDTH
    )
    console.print(made, highlight=False)
    return rendered.getvalue()


def _write(text: str) -> None:
    """To stdout, all of it, or an error: a full disk must not look like success."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is still buffered would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise cannot("write", Path("stdout"), error) from error


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return clean(value)


def bar(value: float, largest: float, width: int) -> str:
    """A bar of at most ``width`` cells."""
    return "█" * max(1, round(value / largest * width)) if value > 0 else ""


def short(prefix: str, most: int = 16) -> str:
    """The end of a prefix, which tells layers apart: ``…ge_model.layers.10``."""
    return prefix if len(prefix) <= most else "…" + prefix[1 - most :]


def spans(numbers: Iterable[int], most: int = 4) -> str:
    """Ascending numbers in few words: ``0, 3-29``; of more than ``most`` runs, the middle is
    left out."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    said = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    if len(said) > most:
        said = [*said[: most - 1], "…", said[-1]]
    return ", ".join(said).replace("…,", "…")


def size(count: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def parse_size(text: str) -> int:
    """``8GB``, ``500 MB``, ``1.5GiB`` or plain bytes.

    Raises:
        HtsrError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise HtsrError(f"{text!r} is not a size such as 8GB or 500MB.")
    power = "kmgt".find(match[2].lower()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
