"""Data sets of the hub as JSON lines, through the ``datasets`` library if it is installed."""

from __future__ import annotations

import json
from pathlib import Path

from htsr_alloc.checkpoints.sentences import sentences, short
from htsr_alloc.errors import HtsrError
from htsr_alloc.files import atomic_write


def rows_of(
    repo_id: str, split: str, token: str | None, cache_dir: Path | None, offline: bool
) -> Path:
    """One split of a data set, as a JSON lines file in the hub's cache.

    Raises:
        HtsrError: ``datasets`` is not installed; no such data set or split; the hub cannot be
            reached; a column that JSON cannot hold.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]  (not a dependency)
    except ImportError:
        raise HtsrError(
            f"{repo_id} is not a file here, and a data set of the hub needs the datasets library.",
            "pip install datasets, or give a JSON lines file.",
        ) from None
    from huggingface_hub import constants

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    options = datasets.DownloadConfig(local_files_only=offline, token=token)
    datasets.disable_progress_bars()
    try:
        with sentences(repo_id, None):
            found = datasets.load_dataset(repo_id, split=split, download_config=options)
    except ValueError as error:  # an unknown split, or files of several configurations
        raise HtsrError(f"{repo_id} cannot be read: {short(error)}.") from None
    path = cache / "htsr" / "rows" / f"{repo_id.replace('/', '--')}--{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as file:
            for row in found:
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
    except TypeError as error:
        raise HtsrError(f"{repo_id} has a column that is not text or numbers: {error}.") from None
    return path
