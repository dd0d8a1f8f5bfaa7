"""Checkpoints that are known to be whole: a list of their files with hashes, written last."""

from __future__ import annotations

import json
from pathlib import Path

from htsr_alloc import files
from htsr_alloc.errors import HtsrError

MARK = "whole.json"
CHECKPOINTS = "checkpoints"  # in a run's folder


def mark(folder: Path) -> None:
    """Write the list of what a finished checkpoint holds."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != MARK)
    files.write_text(folder / MARK, json.dumps({n: files.sha256(folder / n) for n in names}) + "\n")


def is_whole(folder: Path) -> bool:
    """Whether every file that the list names is there with its bytes."""
    try:
        listed = json.loads(files.read_bytes(folder / MARK))
        return bool(listed) and all(files.sha256(folder / n) == h for n, h in listed.items())
    except (HtsrError, OSError, ValueError, AttributeError, TypeError):
        return False


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The last whole checkpoint, and those after it that are not."""
    numbered = [(int(p.name[11:]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    broken = []
    for _, path in sorted(numbered, reverse=True):
        if is_whole(path):
            return path, broken
        broken.append(path)
    return None, broken
