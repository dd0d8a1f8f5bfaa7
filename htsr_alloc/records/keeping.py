"""Results of earlier runs are kept, unless the same is written again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from htsr_alloc import files
from htsr_alloc.errors import HtsrError
from htsr_alloc.records.json import Record, loads


def refuse_to_replace(
    path: Path, kind: type[Record], difference: Callable[[Record], str | None]
) -> None:
    """Keep a file that is another result, or none that can be read.

    Args:
        difference: says of the record that is there how it differs, or None where it does not.

    Raises:
        HtsrError: the file is there and differs.
    """
    if not path.is_file():
        return
    try:
        said = difference(loads(kind, files.read_bytes(path), path.name))
    except HtsrError:  # whatever it is, it is not this result
        said = f"is no {kind.FORMAT} file that this version reads"
    if said is not None:
        raise HtsrError(
            f"{path} is there and {said}.", "Give `force` to replace it, or another `output`."
        )
