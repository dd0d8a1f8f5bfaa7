"""What the hub listed of a repository: its files and their headers, kept beside the hub's cache.

Offline the same tensors are listed from them, whether or not every shard is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from htsr_alloc.checkpoints.header import MAX_HEADER
from htsr_alloc.checkpoints.listing import parse_object
from htsr_alloc.errors import HtsrError
from htsr_alloc.files import atomic_write, read_bytes, write_text

COMMIT = re.compile(r"[0-9a-f]{40}")


class Notes:
    """The notes on one repository: ``refs/<revision>``, ``<commit>/files.json`` and headers."""

    def __init__(self, cache: Path, repo_id: str) -> None:
        self.folder = cache / "htsr" / repo_id.replace("/", "--")

    def commit(self, revision: str) -> str | None:
        """The commit that a branch or tag was at at the last request."""
        if COMMIT.fullmatch(revision):
            return revision
        found = self._read(self._ref(revision), 40)
        text = (found or b"").decode("ascii", "replace")
        return text if COMMIT.fullmatch(text) else None

    def files(self, commit: str) -> dict[str, int] | None:
        """Name -> bytes of every file of the commit; None when they were never listed."""
        text = self._read(self.folder / commit / "files.json", MAX_HEADER)
        if text is None:
            return None
        files = parse_object(text, str(self.folder / commit / "files.json"))
        return {name: size for name, size in files.items() if type(size) is int}

    def header(self, commit: str, file: str) -> bytes | None:
        """The first bytes of a shard, up to the end of its header."""
        return self._read(self._header(commit, file), 8 + MAX_HEADER)

    def write(self, revision: str, commit: str, files: Mapping[str, int]) -> None:
        """Keep the listing; a cache that cannot be written to is not an error."""
        with suppress(HtsrError, OSError):
            for path in (self._ref(revision), self.folder / commit / "files.json"):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / commit / "files.json", json.dumps(files))
            write_text(self._ref(revision), commit)

    def write_header(self, commit: str, file: str, data: bytes) -> None:
        """Keep a shard's header, as ``header`` returns it."""
        path = self._header(commit, file)
        with suppress(HtsrError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as out:
                out.write(data)

    def _ref(self, revision: str) -> Path:
        return self.folder / "refs" / quote(revision, safe="").replace(".", "%2E")

    def _header(self, commit: str, file: str) -> Path:
        return self.folder / commit / f"{quote(file, safe='')}.header"

    @staticmethod
    def _read(path: Path, limit: int) -> bytes | None:
        try:
            return read_bytes(path, limit)
        except HtsrError:
            return None
