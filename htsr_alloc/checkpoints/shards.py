"""The bytes of a hub's shards: streamed, in the hub's cache, or on disk only while they are used.

All three check size, and with a whole shard its SHA-256 where the hub gives it.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from htsr_alloc import files
from htsr_alloc.checkpoints.cache import HubCache, download
from htsr_alloc.checkpoints.gguf import read_local
from htsr_alloc.checkpoints.listing import Shard, Transfer
from htsr_alloc.checkpoints.local import LocalFiles, local_header
from htsr_alloc.checkpoints.ranges import Ranges, RemoteFile
from htsr_alloc.errors import HtsrError


class StreamedShards:
    """``stream``: each tensor by a range request of its own; nothing is written."""

    by_shard = False

    def __init__(self, ranges: Ranges, remote: Mapping[str, RemoteFile]) -> None:
        self.ranges, self.remote = ranges, remote

    def read(self, shard: Shard, begin: int, into: memoryview) -> None:
        self.ranges.read(self.remote[shard.name], begin, into)

    def release(self, shard: Shard) -> None:
        pass

    def transfer(self, shards: Sequence[Shard], tensors: int) -> Transfer:
        return Transfer(tensors, 0)


class CachedShards:
    """The default: whole shards in the hub's cache, fetched when first read, one at a time.

    Args:
        cache: where they are.
        fetch: (file's name) -> its path, downloading it when needed.
        cached: the same without a download; None when it is not there.
        remote: what the hub says of each file; empty offline.
    """

    by_shard = True

    def __init__(
        self,
        cache: HubCache,
        fetch: Callable[[str], Path],
        cached: Callable[[str], Path | None],
        remote: Mapping[str, RemoteFile],
    ) -> None:
        self.cache, self.fetch, self.cached, self.remote = cache, fetch, cached, remote
        self._lock = threading.Lock()
        self._local: dict[str, tuple[LocalFiles, Shard]] = {}

    def read(self, shard: Shard, begin: int, into: memoryview) -> None:
        with self._lock:  # for any number of workers
            if shard.name not in self._local:
                path = self.fetch(shard.name)
                local = checked(path, shard, self.remote.get(shard.name), self.cache)
                self._local[shard.name] = LocalFiles(path.parent), local
            folder, local = self._local[shard.name]
        folder.read(local, begin, into)

    def release(self, shard: Shard) -> None:
        pass

    def transfer(self, shards: Sequence[Shard], tensors: int) -> Transfer:
        total = sum(shard.nbytes for shard in shards if self.cached(shard.name) is None)
        return Transfer(total, total, self.cache.root)


class OfflineShards(CachedShards):
    """What the cache holds, and a sentence where it does not."""

    def transfer(self, shards: Sequence[Shard], tensors: int) -> Transfer:
        for shard in shards:
            self.fetch(shard.name)  # raises, before any work, where one is missing
        return Transfer(0, 0)


class DroppedShards(CachedShards):
    """``drop``: each shard in a folder of our own until it is released.

    An interrupted download is resumed. What is in the hub's cache already is read there and
    stays.
    """

    def __init__(
        self,
        cache: HubCache,
        folder: Path,
        ranges: Ranges,
        cached: Callable[[str], Path | None],
        remote: Mapping[str, RemoteFile],
    ) -> None:
        super().__init__(cache, self._fetch, cached, remote)
        self.folder, self.ranges = folder, ranges
        self._held: BinaryIO | None = None

    def release(self, shard: Shard) -> None:
        with self._lock:
            self._local.pop(shard.name, None)
            if self._held is None:
                return
            with suppress(OSError):
                self._path(shard.name).unlink(missing_ok=True)
                if {path.name for path in self.folder.iterdir()} == {"lock"}:
                    (self.folder / "lock").unlink()
                    self.folder.rmdir()
                    self._held.close()
                    self._held = None

    def transfer(self, shards: Sequence[Shard], tensors: int) -> Transfer:
        """Two on disk: the next is begun while the last matrices of one are decomposed."""
        sizes = [shard.nbytes for shard in shards if self.cached(shard.name) is None]
        most = max((sum(sizes[i : i + 2]) for i in range(len(sizes))), default=0)
        return Transfer(sum(sizes), most, self.folder)

    def _fetch(self, name: str) -> Path:
        found = self.cached(name)
        if found is not None:
            return found
        path = self._path(name)
        try:
            self._hold()
            if not path.exists():
                partial = path.with_name(path.name + ".partial")
                download(self.remote[name], self.ranges, partial)
                partial.replace(path)
        except OSError as error:
            raise files.cannot("write", path, error) from error
        return path

    def _path(self, name: str) -> Path:
        return self.folder / quote(name, safe="")  # without a folder inside

    def _hold(self) -> None:
        """The folder for this run alone."""
        if self._held is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        held = open(self.folder / "lock", "ab")  # noqa: SIM115 - held until the end of the run
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise HtsrError(
                f"Another run is fetching the same shards to {self.folder}.",
                "Wait for it, or let both keep their shards.",
            ) from None
        self._held = held


def checked(path: Path, shard: Shard, file: RemoteFile | None, cache: HubCache) -> Shard:
    """The local shard at ``path``, after making sure that it is the one that was listed.

    Raises:
        HtsrError: another size, header or SHA-256; the file is then deleted, unless there is no
            hub (``file`` is None) to get it from again, or it is a link out of the cache.
    """
    why = None
    try:
        local = _local(path)
        if shard.nbytes != local.nbytes or shard.sha256 != local.sha256:
            why = "does not match the size or header listed by the hub"
        elif file is not None and file.sha256 and files.sha256(path) != file.sha256:
            why = "does not match the SHA-256 listed by the hub"
    except HtsrError as error:
        why = f"is damaged ({error.message.rstrip('.')})"
    else:
        if why is None:
            return local
    if file is None:
        raise HtsrError(f"{shard.name} in the local cache {why}.", "Fetch it again, online.")
    done = "it was deleted" if cache.forget(path) else "delete it: it lies outside the cache"
    raise HtsrError(
        f"{shard.name} as downloaded {why}; {done}.",
        "Run the same command again to fetch it again.",
    )


def _local(path: Path) -> Shard:
    """A file on this machine, of either kind."""
    return read_local(path)[1] if path.suffix == ".gguf" else local_header(path)[0]
