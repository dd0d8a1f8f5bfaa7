"""Scores that something else computed (GuiLoMo, LayerIF, ...), from a CSV or JSON file."""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from htsr_alloc import files
from htsr_alloc.allocation.units import Unit
from htsr_alloc.checkpoints.stacks import stack_of
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import File, Metrics

KEYS = ("module", "layer", "prefix")  # what a row can be about, the finest first


@dataclass(frozen=True)
class Scores:
    """One column of a score file. Higher scores get more experts.

    ``key`` says what ``values`` are by: ``layer`` (its number), ``prefix`` (its block's name) or
    ``module`` (a linear's name). ``named`` are the blocks of numbered layers, where the file has
    them too.
    """

    column: str
    key: str
    values: dict[str, float]
    source: File
    named: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def prefixes(self) -> list[str | None]:
        """The layers that it scores in numeric order, by their blocks' names where it has them.

        Raises:
            HtsrError: a stack of blocks of which one is missing.
        """
        if self.key != "prefix":
            return [self.named.get(str(i)) for i in range(len(self.values))]
        blocks: dict[str, set[str]] = {}
        for name in self.values:
            blocks.setdefault(stack_of(name), set()).add(name)
        found: list[str | None] = []
        for stack, own in blocks.items():
            numbered = [f"{stack}.{i}" for i in range(len(own))]
            missing = next((name for name in numbered if name not in own), None)
            if missing is not None:
                raise HtsrError(f"{self.source.file} has no score of prefix {missing}.")
            found += numbered
        return found

    def of(self, units: Sequence[Unit], metrics: Metrics | None) -> list[float]:
        """The score of each layer or linear.

        Raises:
            HtsrError: the file scores linears and these are layers, or the other way round; one
                is missing, or the file has others; its layer of a number is another block.
        """
        if (self.key == "module") != (units[0].matrix is not None):
            wrong = "by linears" if self.key == "module" else "by layers"
            hint = "Add `per_module`." if self.key == "module" else "Remove `per_module`."
            raise HtsrError(f"{self.source.file} has scores {wrong}.", hint)
        for unit in units if metrics is not None else ():
            named = self.named.get(str(unit.layer), unit.name)
            if not (f".{named}".endswith(f".{unit.name}") or unit.name.endswith(f".{named}")):
                raise HtsrError(
                    f"{self.source.file} calls layer {unit.layer} {named}, and the metrics "
                    f"{unit.name}.",
                    "Leave out its column layer, and write prefixes as the metrics have them.",
                )
        return self.ordered([str(u.layer) if self.key == "layer" else u.name for u in units])

    def record(self, metrics: Metrics | None) -> dict[str, Any]:
        """What the allocation file says of the scores."""
        return {"metric": self.column, "scores": self.source}

    def ordered(self, names: Sequence[str]) -> list[float]:
        """The scores of these layers, blocks or linears, each of which must have one.

        Raises:
            HtsrError: one is missing, or the file has others.
        """
        for name in names:
            if name not in self.values:
                raise HtsrError(f"{self.source.file} has no score of {self.key} {name}.")
        extra = sorted(set(self.values) - set(names))
        if extra:
            raise HtsrError(
                f"{self.source.file} scores {self.key} {extra[0]}, which the model does not have."
            )
        return [self.values[name] for name in names]


def read_scores(path: Path, column: str = "score") -> Scores:
    """Read one score a layer or linear.

    A CSV file has a header. One of its columns is ``module``, ``layer`` or ``prefix`` (the first
    of these that is there counts), ``column`` holds the scores, and others do not matter. A JSON
    file is a list of objects with the same keys, or a plain list of numbers, one a layer in order.

    Args:
        path: ends in ``.csv`` or ``.json``.
        column: which column to take.

    Raises:
        HtsrError: neither format, no such column, a row twice, or a score that is not a
            finite number.
    """
    text = files.read_bytes(path)
    try:
        rows = _rows(path, text.decode("utf-8-sig"), column)
    except (ValueError, csv.Error, RecursionError) as error:
        raise HtsrError(f"{path.name} cannot be read as scores: {error}.") from None
    if not rows:
        raise HtsrError(f"{path.name} holds no scores.")
    key = next((key for key in KEYS if key in rows[0]), None)
    if key is None:
        raise HtsrError(
            f"{path.name} does not say whose scores it holds.",
            f"Give it a column {', '.join(KEYS[:-1])} or {KEYS[-1]}.",
        )
    values: dict[str, float] = {}
    named: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        where = f"{path.name}, row {number}"
        for wanted in (key, column):
            if wanted not in row:
                have = ", ".join(map(str, row))
                raise HtsrError(f"{where} has no {wanted!r}; it has {have}.", "Give `column`.")
        name = str(row[key]).strip()
        if name in values:
            raise HtsrError(f"{where}: duplicate {key} {name}.")
        values[name] = _number(row[column], where)
        if key == "layer" and row.get("prefix"):
            named[name] = str(row["prefix"]).strip()
    return Scores(column, key, values, File(path.name, hashlib.sha256(text).hexdigest()), named)


def _rows(path: Path, text: str, column: str) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = reader.fieldnames or []
        if len(set(header)) != len(header):
            raise ValueError("duplicate column")
        rows = list(reader)
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} does not have {len(header)} columns")
        return rows
    if path.suffix != ".json":
        raise ValueError("it is neither .csv nor .json")
    data: Any = files.parse_json(text)
    if not isinstance(data, list):
        raise ValueError("it is not a list")
    rows = cast(list[Any], data)
    if rows and all(not isinstance(row, dict) for row in rows):
        return [{"layer": i, column: value} for i, value in enumerate(rows)]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("it mixes numbers and objects")
    return rows


def _number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise HtsrError(f"{where}: {value!r} is not a finite number.")
    return number
