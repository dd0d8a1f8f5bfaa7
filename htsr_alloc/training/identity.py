"""What a model's folder holds, told from its bytes: a changed base is never taken for the old."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from htsr_alloc import files
from htsr_alloc.errors import HtsrError

RUN = "run.json"  # beside a trained adapter: everything that it depends on


def content_of(path: Path) -> str:
    """The sha256 of a file's bytes, read once a process as long as the file does not change.

    Of a folder: over the names and the sha256 of the files in it and in its folders.
    """
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        pairs = [[p.relative_to(path).as_posix(), content_of(p)] for p in inside]
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
    found = path.stat()
    return _content(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@functools.cache
def _content(path: Path, *state: int) -> str:
    return files.sha256(path)


def weights_of(folder: Path) -> str:
    """The sha256 over names and bytes of a folder's safetensors files, as 16 hexadecimal digits.

    Raises:
        HtsrError: there is no such file.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise HtsrError(
            f"{folder} has no weights in safetensors.", "Convert them: nothing is unpickled here."
        )
    pairs = [[path.name, content_of(path)] for path in shards]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def classes_of(folder: Path) -> tuple[str, ...] | None:
    """The classes that ``htsr train`` wrote beside what it trained; None where it wrote none."""
    path = folder / RUN
    if not path.is_file():
        return None
    return tuple(_run(path).get("labels") or ()) or None


def _run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(files.read_bytes(path))
    except (ValueError, RecursionError):
        run = None
    if not isinstance(run, dict):
        raise HtsrError(f"{path} is not a run's file.", "Train again.")
    return run


def check_base(adapter: Path, model: Path) -> None:
    """Refuse an adapter that ``htsr train`` made on other weights than the model's.

    An adapter from elsewhere says nothing of its base, and passes.

    Raises:
        HtsrError: the run's file names other weights.
    """
    path = adapter / RUN
    if not path.is_file():
        return
    was = _run(path).get("weights")
    if was is not None and was != weights_of(model):
        raise HtsrError(
            f"{adapter} was trained on other weights than those in {model}.",
            "Give the model that it was trained on.",
        )
