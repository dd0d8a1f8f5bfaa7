"""Checkpoints on a model hub, through huggingface_hub: headers first, then what is needed."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

from htsr_alloc.checkpoints.header import Header, read_header
from htsr_alloc.checkpoints.listing import MAX_JSON, Shard, choose_files, list_tensors, parse_config
from htsr_alloc.checkpoints.local import local_header, open_folder, read_small
from htsr_alloc.checkpoints.notes import Notes
from htsr_alloc.checkpoints.ranges import Ranges, RemoteFile, patiently
from htsr_alloc.checkpoints.reading import Checkpoint, Store
from htsr_alloc.checkpoints.sentences import sentences
from htsr_alloc.checkpoints.shards import CachedShards, DroppedShards, OfflineShards, StreamedShards
from htsr_alloc.errors import HtsrError

WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json"]
MODEL = [*WANTED, "*.json", "*.jinja", "merges.txt", "*.model"]  # and the tokenizer
FIRST = 100_000  # bytes of a shard that are asked for first: most headers are shorter


def open_hub(
    repo_id: str,
    *,
    revision: str | None,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    shards: str,
) -> Checkpoint:
    """List a hub repository's tensors; weights move when they are read.

    Tensor headers come by range requests, so that nothing large moves before the plan is
    made. The revision is resolved to a commit once and every later request names that. Offline
    (the argument or HF_HUB_OFFLINE) only the local cache is used.

    Raises:
        HtsrError: no such repository, revision or file, a gated or private repository, no
            network, or not in the cache when offline.
    """
    from huggingface_hub import constants

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    if not (offline or constants.HF_HUB_OFFLINE):
        return _online(repo_id, revision, token, cache, shards)
    if shards != "keep":
        raise HtsrError("--stream and --drop-shards need the hub, which --offline excludes.")
    return _offline(repo_id, revision, cache)


def _online(
    repo_id: str, revision: str | None, token: str | None, cache: Path, shards: str
) -> Checkpoint:
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers

    api = huggingface_hub.HfApi(token=token)
    with sentences(repo_id, revision):
        info = patiently(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
        headers = build_hf_headers(token=token)
    commit = info.sha or ""
    remote = {
        f.rfilename: RemoteFile(
            huggingface_hub.hf_hub_url(repo_id, f.rfilename, revision=commit),
            f.rfilename,
            commit,
            f.size or 0,
            f.lfs.sha256 if f.lfs else None,
        )
        for f in info.siblings or ()
        if "/" not in f.rfilename
    }
    notes, ranges = Notes(cache, repo_id), HubRanges(headers, repo_id, revision)

    def download(name: str, to: Path = cache) -> Path:
        with sentences(repo_id, revision):
            return Path(
                patiently(
                    lambda: huggingface_hub.hf_hub_download(
                        repo_id, name, revision=commit, cache_dir=to, token=token
                    )
                )
            )

    def small(name: str) -> bytes:
        if remote[name].nbytes > MAX_JSON:
            raise HtsrError(f"{name} of {repo_id} has {remote[name].nbytes} bytes, too many.")
        if shards != "stream":
            return read_small(download(name))
        with tempfile.TemporaryDirectory() as folder:  # --stream leaves nothing on the disk
            return read_small(download(name, Path(folder)))

    def header_of(name: str) -> tuple[Shard, Header]:
        data, file = b"", remote[name]

        def read(begin: int, length: int) -> bytes:
            nonlocal data
            if begin + length > len(data):
                wanted = min(max(begin + length, FIRST), file.nbytes)
                buffer = bytearray(wanted - len(data))
                ranges.read(file, len(data), memoryview(buffer))
                data += buffer
            return data[begin : begin + length]

        header = read_header(read, file.nbytes, f"{name} of {repo_id}")
        if shards != "stream":
            notes.write_header(commit, name, data[: 8 + int.from_bytes(data[:8], "little")])
        return _shard(name, file.nbytes, commit, header), header

    def cached(name: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(repo_id, name, cache, commit)
        return Path(found) if isinstance(found, str) else None

    if shards == "stream":
        store: Store = StreamedShards(ranges, remote)
    elif shards == "drop":
        folder = cache / "htsr" / repo_id.replace("/", "--") / commit / "shards"
        store = DroppedShards(folder, ranges, cached, remote)
    else:
        store = CachedShards(cache, download, cached, remote)
    if shards != "stream":
        sizes = {name: file.nbytes for name, file in remote.items()}
        notes.write(revision or "main", commit, sizes)
    return _listed(repo_id, commit, list(remote), small, header_of, store)


def _offline(repo_id: str, revision: str | None, cache: Path) -> Checkpoint:
    """From the cache: what an online run listed, or else whatever folder the cache has."""
    import huggingface_hub

    notes = Notes(cache, repo_id)
    commit = notes.commit(revision or "main")
    sizes = notes.files(commit) if commit else None
    if commit is None or sizes is None:
        with sentences(repo_id, revision):
            folder = Path(
                huggingface_hub.snapshot_download(
                    repo_id,
                    revision=revision,
                    cache_dir=cache,
                    local_files_only=True,
                    allow_patterns=WANTED,
                )
            )
        return dataclasses.replace(open_folder(folder), name=repo_id, revision=folder.name)

    def cached(name: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(repo_id, name, cache, commit)
        return Path(found) if isinstance(found, str) else None

    def there(name: str) -> Path:
        path = cached(name)
        if path is None:
            raise HtsrError(
                f"{name} of {repo_id} is not in the local cache.",
                "Drop --offline and HF_HUB_OFFLINE, or --include only what is there.",
            )
        return path

    def header_of(name: str) -> tuple[Shard, Header]:
        noted = notes.header(commit, name)
        if noted is None:
            local, header = local_header(there(name))
            return _shard(name, local.nbytes, commit, header), header
        size = sizes.get(name, 0)
        header = read_header(lambda begin, length: noted[begin : begin + length], size, name)
        return _shard(name, size, commit, header), header

    def small(name: str) -> bytes:
        return read_small(there(name))

    return _listed(
        repo_id, commit, list(sizes), small, header_of, OfflineShards(cache, there, cached, {})
    )


def _listed(
    repo_id: str,
    commit: str,
    names: list[str],
    small: Callable[[str], bytes],
    header_of: Callable[[str], tuple[Shard, Header]],
    store: Store,
) -> Checkpoint:
    files, index = choose_files(names, small, repo_id)
    config = parse_config(names, small)
    return Checkpoint(repo_id, commit, config, list_tensors(files, index, header_of), store)


def _shard(name: str, nbytes: int, commit: str, header: Header) -> Shard:
    return Shard(name, nbytes, f"{commit}:{header.sha256}")


def snapshot(
    repo_id: str, revision: str | None, token: str | None, cache_dir: Path | None, offline: bool
) -> Path:
    """A model's or an adapter's folder in the cache: safetensors, configuration, tokenizer.

    Raises:
        HtsrError: as ``open_hub``.
    """
    import huggingface_hub

    with sentences(repo_id, revision):
        found = patiently(
            lambda: huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=offline,
                allow_patterns=MODEL,
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    return Path(found)


class HubRanges(Ranges):
    """``Ranges`` whose failures are sentences."""

    def __init__(self, headers: dict[str, str], repo_id: str, revision: str | None) -> None:
        super().__init__(headers)
        self.repo_id, self.revision = repo_id, revision

    def read(self, file: RemoteFile, begin: int, into: memoryview) -> None:
        with sentences(self.repo_id, self.revision):
            super().read(file, begin, into)
