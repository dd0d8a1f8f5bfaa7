"""Checkpoints on a model hub, through huggingface_hub: headers first, then what is needed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

from htsr_alloc.checkpoints import gguf
from htsr_alloc.checkpoints.cache import HubCache
from htsr_alloc.checkpoints.gguf_header import read_header as gguf_header
from htsr_alloc.checkpoints.header import Header, read_header
from htsr_alloc.checkpoints.listing import (
    MAX_JSON,
    Shard,
    choose_files,
    list_tensors,
    parse_config,
    parse_object,
)
from htsr_alloc.checkpoints.local import local_header, open_folder, read_small
from htsr_alloc.checkpoints.notes import COMMIT, Notes
from htsr_alloc.checkpoints.ranges import Ranges, RemoteFile, Start
from htsr_alloc.checkpoints.reading import Checkpoint, Store
from htsr_alloc.checkpoints.sentences import sentences
from htsr_alloc.checkpoints.shards import CachedShards, DroppedShards, OfflineShards, StreamedShards
from htsr_alloc.errors import HtsrError

WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json"]
READ = [*WANTED, "*.gguf"]
MODEL = [*WANTED, "*.json", "*.jinja", "merges.txt", "*.model"]  # and the tokenizer
NAME = re.compile(r"[^/\\:\0\ud800-\udfff]{1,200}")
SUB_FOLDERS = re.compile(rf"({NAME.pattern}/)+{NAME.pattern}\.gguf")  # of which only GGUF is read
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def open_hub(
    repo_id: str,
    *,
    file: str | None = None,
    revision: str | None,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    shards: str,
) -> Checkpoint:
    """List a hub repository's tensors; weights are downloaded when they are read.

    Tensor headers are read by range requests, so that nothing large is downloaded before the plan
    is made. The revision is resolved to a commit once, and every later request names that commit.
    Offline (the argument or HF_HUB_OFFLINE) only the local cache is used.

    Args:
        file: of a repository of GGUF files, the one to read; None where there is only one.

    Raises:
        HtsrError: no such repository, revision or file, a gated or private repository, no
            network, or not in the cache when offline.
    """
    from huggingface_hub import constants

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    if not (offline or constants.HF_HUB_OFFLINE):
        return _online(repo_id, file, revision, token, cache, shards)
    if shards != "keep":
        raise HtsrError("Streaming or dropping shards needs the hub, which `offline` excludes.")
    return _offline(repo_id, file, revision, cache)


def _online(
    repo_id: str,
    file: str | None,
    revision: str | None,
    token: str | None,
    root: Path,
    shards: str,
) -> Checkpoint:
    from huggingface_hub.utils import build_hf_headers, validate_repo_id

    with sentences(repo_id, revision):
        validate_repo_id(repo_id)
        headers = build_hf_headers(token=token)
    notes, ranges = Notes(root, repo_id), HubRanges(headers, repo_id, revision)
    cache = HubCache(root, repo_id)
    commit, names, remote = _list_files(ranges, repo_id, revision)

    def small(name: str) -> bytes:
        file = remote[name]
        if file.nbytes > MAX_JSON:
            raise HtsrError(f"{name} of {repo_id} has {file.nbytes} bytes, too many.")
        if shards != "stream":
            return read_small(cached(name) or cache.fetch(file, ranges))
        content = bytearray(file.nbytes)  # streaming writes nothing to disk
        ranges.read(file, 0, memoryview(content), whole=True)
        return bytes(content)

    def header_of(name: str) -> tuple[Shard, Header]:
        start = Start(ranges, remote[name])
        header = read_header(start.read, start.file.nbytes, f"{name} of {repo_id}")
        if shards != "stream":
            data = start.data
            notes.write_header(commit, name, data[: 8 + int.from_bytes(data[:8], "little")])
        return _shard(name, start.file.nbytes, commit, header.sha256), header

    def gguf_of(name: str) -> gguf.Part:
        start = Start(ranges, remote[name])
        try:
            metadata, tensors, sha256 = gguf_header(start.read, start.file.nbytes)
        except ValueError as error:
            raise gguf.damaged(f"{name} of {repo_id}", error) from None
        return metadata, _shard(name, start.file.nbytes, commit, sha256), tensors

    def cached(name: str) -> Path | None:
        return cache.find(commit, name)

    if shards == "stream":
        store: Store = StreamedShards(ranges, remote)
    elif shards == "drop":
        folder = root / "htsr" / repo_id.replace("/", "--") / commit / "shards"
        store = DroppedShards(cache, folder, ranges, cached, remote)
    else:
        store = CachedShards(
            cache,
            lambda name: cached(name) or cache.fetch(remote[name], ranges),
            cached,
            remote,
        )
    if shards != "stream":
        sizes = {name: remote[name].nbytes if name in remote else 0 for name in names}
        notes.write(revision or "main", commit, sizes)
    return _listed(repo_id, file, commit, names, small, header_of, gguf_of, store)


def _list_files(
    ranges: Ranges, repo_id: str, revision: str | None
) -> tuple[str, list[str], dict[str, RemoteFile]]:
    """A revision's commit, the names of its files outside sub-folders and of its GGUF files, and
    the files to read.

    Raises:
        HtsrError: as ``open_hub``, or an invalid listing.
    """
    import huggingface_hub
    from huggingface_hub import constants

    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    what = f"The hub's listing of {repo_id}"
    with sentences(repo_id, revision):
        url = f"{constants.ENDPOINT}/api/models/{repo_id}{at}?blobs=true"
        found = parse_object(ranges.whole(url, MAX_JSON, what), what)
    commit, files = found.get("sha"), found.get("siblings")
    if not (isinstance(commit, str) and COMMIT.fullmatch(commit) and isinstance(files, list)):
        raise HtsrError(f"{what} does not name a commit and its files.")
    names, remote = [], {}
    for file in files:
        name = file.get("rfilename") if isinstance(file, dict) else None
        if not isinstance(name, str) or not _is_read(name):
            continue  # in a sub-folder, or nothing that a checkpoint has
        names.append(name)
        if any(fnmatchcase(name, pattern) for pattern in READ):
            size, blob, large = file.get("size"), file.get("blobId"), file.get("lfs")
            sha256 = large.get("sha256") if isinstance(large, dict) else None
            known = sha256 if large else blob
            if type(size) is not int or size < 0 or not HASH.fullmatch(str(known)):
                raise HtsrError(f"{what} gives no size or no hash of {name}.")
            place = huggingface_hub.hf_hub_url(repo_id, name, revision=commit)
            remote[name] = RemoteFile(place, name, commit, size, sha256, blob)
    return commit, names, remote


def _is_read(name: str) -> bool:
    """Whether a listed name is one that a checkpoint's file may have."""
    inside = SUB_FOLDERS.fullmatch(name) is not None and not {".", ".."} & set(name.split("/"))
    return inside or NAME.fullmatch(name) is not None


def _offline(repo_id: str, file: str | None, revision: str | None, root: Path) -> Checkpoint:
    """From the cache: what an online run listed, or else the snapshot in the cache."""
    import huggingface_hub

    notes, cache = Notes(root, repo_id), HubCache(root, repo_id)
    commit = notes.commit(revision or "main")
    sizes = notes.files(commit) if commit else None
    if commit is None or sizes is None:
        with sentences(repo_id, revision):
            folder = Path(
                huggingface_hub.snapshot_download(
                    repo_id,
                    revision=revision,
                    cache_dir=root,
                    local_files_only=True,
                    allow_patterns=READ,
                )
            )
        there_are = [path.name for path in folder.iterdir()]
        there_are += [str(path.relative_to(folder)) for path in folder.glob("*/**/*.gguf")]
        chosen = file or gguf.only_model(there_are)
        if chosen is None:
            return dataclasses.replace(open_folder(folder), name=repo_id, revision=folder.name)
        name = f"{repo_id}/{gguf.title_of(chosen)}"
        return dataclasses.replace(gguf.open_gguf(folder / chosen), name=name, revision=folder.name)

    def cached(name: str) -> Path | None:
        return cache.find(commit, name)

    def there(name: str) -> Path:
        path = cached(name)
        if path is None:
            raise HtsrError(
                f"{name} of {repo_id} is not in the local cache.",
                "Remove `offline` and HF_HUB_OFFLINE, or `include` only what is there.",
            )
        return path

    def header_of(name: str) -> tuple[Shard, Header]:
        noted = notes.header(commit, name)
        if noted is None:
            local, header = local_header(there(name))
            return _shard(name, local.nbytes, commit, header.sha256), header
        size = sizes.get(name, 0)
        header = read_header(lambda begin, length: noted[begin : begin + length], size, name)
        return _shard(name, size, commit, header.sha256), header

    def gguf_of(name: str) -> gguf.Part:
        metadata, local, tensors = gguf.read_local(there(name))
        return metadata, _shard(name, local.nbytes, commit, local.sha256), tensors

    def small(name: str) -> bytes:
        return read_small(there(name))

    store = OfflineShards(cache, there, cached, {})
    return _listed(repo_id, file, commit, list(sizes), small, header_of, gguf_of, store)


def _listed(
    repo_id: str,
    file: str | None,
    commit: str,
    names: list[str],
    small: Callable[[str], bytes],
    header_of: Callable[[str], tuple[Shard, Header]],
    gguf_of: Callable[[str], gguf.Part],
    store: Store,
) -> Checkpoint:
    chosen = file or gguf.only_model(names)
    if chosen is not None:
        parts = [gguf_of(name) for name in gguf.parts_of(chosen, set(names).__contains__, repo_id)]
        return gguf.assembled(f"{repo_id}/{gguf.title_of(chosen)}", commit, parts, store)
    files, index = choose_files(names, small, repo_id)
    config = parse_config(names, small)
    return Checkpoint(repo_id, commit, config, list_tensors(files, index, header_of), store)


def _shard(name: str, nbytes: int, commit: str, sha256: str) -> Shard:
    return Shard(name, nbytes, f"{commit}:{sha256}")


def snapshot(
    repo_id: str,
    revision: str | None,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
    weights: bool = True,
) -> Path:
    """A model's or an adapter's folder in the cache: configuration, tokenizer, and safetensors
    unless ``weights`` is False.

    Raises:
        HtsrError: as ``open_hub``.
    """
    import huggingface_hub

    with sentences(repo_id, revision):
        found = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=offline,
            allow_patterns=MODEL,
            ignore_patterns=["*/*", "consolidated*", *([] if weights else ["*.safetensors"])],
        )
    return Path(found)


class HubRanges(Ranges):
    """``Ranges`` whose failures are sentences."""

    def __init__(self, headers: dict[str, str], repo_id: str, revision: str | None) -> None:
        super().__init__(headers)
        self.repo_id, self.revision = repo_id, revision

    def read(self, file: RemoteFile, begin: int, into: memoryview, whole: bool = False) -> None:
        with sentences(self.repo_id, self.revision):
            super().read(file, begin, into, whole)
