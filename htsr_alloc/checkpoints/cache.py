"""The hub's cache on this machine, in huggingface_hub's layout: blobs, and snapshots of links.

The files are fetched by ``Ranges``, not by huggingface_hub: there a server's ETag chooses the path
that is written to, and the server how many bytes. Here a blob is named by its hash in the listing,
which is checked, and no more bytes than listed are written.
"""

from __future__ import annotations

import fcntl
import hashlib
from contextlib import suppress
from pathlib import Path

from htsr_alloc import files
from htsr_alloc.checkpoints.ranges import Ranges, RemoteFile
from htsr_alloc.errors import HtsrError

PIECE = 32 << 20  # bytes of a file that are fetched and written at a time


class HubCache:
    """One repository's part of the cache that lies at ``root``."""

    def __init__(self, root: Path, repo_id: str) -> None:
        self.root, self.repo_id = root, repo_id
        self.folder = root / f"models--{repo_id.replace('/', '--')}"

    def find(self, commit: str, name: str) -> Path | None:
        """The path of a file that is there; None where it is not."""
        import huggingface_hub

        found = huggingface_hub.try_to_load_from_cache(self.repo_id, name, self.root, commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, file: RemoteFile, ranges: Ranges) -> Path:
        """The path of a file, downloaded where it is not there yet.

        An interrupted download is resumed; for another process's download it waits.

        Raises:
            HtsrError: it cannot be written, or a small file does not have the hash that was listed.
        """
        path = self.folder / "snapshots" / file.commit / file.name
        blob = self.folder / "blobs" / str(file.sha256 or file.blob)
        try:
            for folder in (path.parent, blob.parent):
                folder.mkdir(parents=True, exist_ok=True)
            partial = blob.with_name(f"{blob.name}.htsr-partial")
            with open(partial, "ab") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                if not blob.exists():
                    download(file, ranges, partial)
                    if file.sha256 is None:
                        _check_blob(file, partial)
                    partial.replace(blob)
                else:
                    partial.unlink(missing_ok=True)
            if not path.exists():
                path.unlink(missing_ok=True)  # a link to a blob that was deleted
                with suppress(FileExistsError):
                    up = [".."] * (2 + file.name.count("/"))
                    path.symlink_to(Path(*up, "blobs", blob.name))
        except OSError as error:
            raise files.cannot("write", path, error) from error
        return path

    def forget(self, path: Path) -> bool:
        """Delete a file and what it links to; False, and nothing is deleted, where that lies
        outside the cache."""
        target = path.resolve()
        if not target.is_relative_to(self.root.resolve()):
            return False
        with suppress(OSError):
            target.unlink()
            path.unlink(missing_ok=True)
        return True


def download(file: RemoteFile, ranges: Ranges, partial: Path) -> None:
    """Append the rest of the file to ``partial``."""
    with open(partial, "ab") as out:
        place = out.tell()
        if place > file.nbytes:
            out.truncate(0)
            place = 0
        buffer = memoryview(bytearray(min(PIECE, file.nbytes)))
        while place < file.nbytes:
            piece = buffer[: file.nbytes - place]
            ranges.read(file, place, piece, whole=len(piece) == file.nbytes)
            out.write(piece)
            place += len(piece)


def _check_blob(file: RemoteFile, path: Path) -> None:
    """Compare a small file with its hash in git."""
    content = path.read_bytes()
    if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != file.blob:
        path.unlink()
        raise HtsrError(
            f"{file.name} as downloaded does not match the hash listed by the hub.",
            "Run the same command again to fetch it again.",
        )
