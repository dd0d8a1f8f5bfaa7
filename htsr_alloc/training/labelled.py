"""Rows with a label: texts, pairs of texts, and images. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import read_bytes
from htsr_alloc.training.rows import MOST_NAMED

SHAPES = (
    'A row is {"text", "label"}, {"text", "text_pair", "label"} or {"image", "label"}; images may '
    "also be a folder with one folder for each label."
)
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Labelled:
    """One row: ``text``, with a ``pair`` or without, or ``image``; ``label`` as it was written."""

    line: int
    label: str | int
    text: str | None = None
    pair: str | None = None
    image: Path | None = None


def read_labelled(path: Path) -> list[Labelled]:
    """A JSON lines file, or a folder of images with one folder for each label.

    Paths of images are relative to the file's folder.

    Raises:
        HtsrError: bad rows, with their lines; images among texts; nothing to read.
    """
    if path.is_dir():
        rows = list(_folder(path))
        if not rows:
            raise HtsrError(f"{path} has no folder with an image in it.", SHAPES)
        return rows
    rows, bad = [], []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_parse(json.loads(line.decode("utf-8")), number, path.parent))
        except (ValueError, UnicodeDecodeError) as error:
            what = "is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            bad.append(f"line {number} {what}")
    if bad:
        more = f"; and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        raise HtsrError(f"{path.name}: {'; '.join(bad[:MOST_NAMED])}{more}.", SHAPES)
    if not rows:
        raise HtsrError(f"{path.name} holds no row.")
    for row in rows:
        if (row.image is None) != (rows[0].image is None):
            raise HtsrError(f"{path.name}: line {row.line} mixes images with texts.", SHAPES)
    return rows


def _folder(path: Path):
    number = 0
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        for image in sorted(folder.iterdir()):
            if image.suffix.lower() in IMAGES:
                number += 1
                yield Labelled(number, folder.name, image=image)


def _parse(data: Any, line: int, folder: Path) -> Labelled:
    if not isinstance(data, dict):
        raise ValueError("is not an object")
    label = data.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise ValueError("has no label that is a text or a whole number")
    if "image" in data:
        image = folder / _text(data, "image")
        if not image.is_file():
            raise ValueError(f"names the image {data['image']}, which is not there")
        return Labelled(line, label, image=image)
    pair = _text(data, "text_pair") if data.get("text_pair") is not None else None
    return Labelled(line, label, text=_text(data, "text"), pair=pair)


def _text(data: Mapping[str, Any], name: str) -> str:
    if not isinstance(data.get(name), str):
        raise ValueError(f"has no {name}")
    return data[name]


def labels_of(rows: Sequence[Labelled], head: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the classes, in the order of the head's outputs.

    Args:
        head: the classes that the model's head has already; they stay where they hold every label,
            and whole numbers count them.

    Raises:
        HtsrError: one class, texts among whole numbers, or a negative number.
    """
    found = {row.label for row in rows}
    numbers = [label for label in found if isinstance(label, int)]
    if numbers and len(numbers) < len(found):
        raise HtsrError("Some labels are texts and some are whole numbers.")
    if numbers and min(numbers) < 0:
        raise HtsrError(f"The label {min(numbers)} is negative.", "Labels count from 0.")
    names = [str(i) for i in range(max(numbers) + 1)] if numbers else sorted(map(str, found))
    if head and (len(names) <= len(head) if numbers else set(names) <= set(head)):
        return tuple(head)
    if len(names) < 2:
        raise HtsrError(f"Every row has the label {names[0]}.", "Give rows of two or more classes.")
    return tuple(names)


def class_of(row: Labelled, labels: Sequence[str]) -> int:
    """The number of a row's class.

    Raises:
        HtsrError: a class that the head does not have.
    """
    if isinstance(row.label, int) and 0 <= row.label < len(labels):
        return row.label
    if row.label in labels:
        return labels.index(str(row.label))
    raise HtsrError(
        f"Line {row.line} has the label {row.label}, which is not one of the classes trained on.",
        f"They are {', '.join(labels[:MOST_NAMED])}{', ...' if len(labels) > MOST_NAMED else ''}.",
    )
