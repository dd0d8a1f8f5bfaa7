"""Checkpoints on a model hub, through huggingface_hub: headers first, then shard by shard."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from htsr_alloc.errors import HtsrError
from htsr_alloc.sources.listing import Shard, choose_files, list_tensors, local_header, parse_object
from htsr_alloc.sources.local import open_folder
from htsr_alloc.sources.reading import Checkpoint

WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json"]


def open_hub(
    repo_id: str,
    *,
    revision: str | None,
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
) -> Checkpoint:
    """List a hub repository's tensors; shards are downloaded when they are read.

    Tensor headers come by range requests, so that nothing large moves before the plan is
    made. The revision is resolved to a commit once and used for every later request. Offline
    (the argument or HF_HUB_OFFLINE) only the local cache is used.

    Raises:
        HtsrError: no such repository, revision or file, a gated or private repository, no
            network, or not in the cache when offline.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if offline or constants.HF_HUB_OFFLINE:
        with _sentences(repo_id, revision):
            folder = huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=True,
                allow_patterns=WANTED,
            )
        local = open_folder(Path(folder))
        return dataclasses.replace(local, name=repo_id, revision=Path(folder).name)

    api = huggingface_hub.HfApi(token=token)
    with _sentences(repo_id, revision):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
    commit, sizes = info.sha, {f.rfilename: f.size for f in info.siblings or ()}
    hashes = {f.rfilename: f.blob_id for f in info.siblings or ()}

    def download(name: str, at: str | None = commit) -> Path:
        with _sentences(repo_id, revision):
            return Path(
                huggingface_hub.hf_hub_download(
                    repo_id, name, revision=at, cache_dir=cache_dir, token=token
                )
            )

    def header_of(file: str) -> tuple[Shard, dict[str, Any]]:
        with _sentences(repo_id, revision):
            metadata = api.parse_safetensors_file_metadata(repo_id, file, revision=commit)
        header = {
            name: {
                "dtype": str(t.dtype),
                "shape": list(t.shape),
                "data_offsets": list(t.data_offsets),
            }
            for name, t in metadata.tensors.items()
        }
        return Shard(file, sizes.get(file) or 0, f"{commit}:{hashes.get(file)}"), header

    names = [name for name in sizes if "/" not in name]
    files, index = choose_files(names, lambda name: download(name).read_bytes(), repo_id)
    config_name = next((n for n in ("config.json", "adapter_config.json") if n in names), None)
    config = parse_object(download(config_name).read_bytes(), config_name) if config_name else {}
    lock = threading.Lock()

    @functools.cache
    def whole(shard: Shard) -> Path:
        path = download(shard.name)
        local_header(path)  # the ranges showed a header that may not fit the file
        return path

    def fetch(shard: Shard) -> Path:
        with lock:  # one at a time, whatever the number of workers
            return whole(shard)

    if config_name:  # by its branch's name too, which the cache then knows offline
        download(config_name, revision)
    return Checkpoint(repo_id, commit, config, list_tensors(files, index, header_of), fetch)


@contextmanager
def _sentences(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's and the network's errors into one sentence each."""
    from huggingface_hub import errors

    # Whatever client the installed version uses (httpx, httpx2): the base of its own errors.
    network = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise HtsrError(
            f"{repo_id} is gated and this account has no access to it.",
            "Ask for access on its page, then run `hf auth login` or pass --token.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HtsrError(
            f"There is no repository {repo_id}, or it is private.",
            "Check the id; for a private one run `hf auth login` or pass --token.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HtsrError(f"{repo_id} has no revision {revision}.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HtsrError(
            f"{repo_id}{at} is not in the local cache and the hub was not reached.",
            "Check the network, or drop --offline and HF_HUB_OFFLINE.",
        ) from error
    except errors.EntryNotFoundError as error:
        raise HtsrError(f"A file of {repo_id}{at} is not there: {_short(error)}.") from error
    except (network, errors.SafetensorsParsingError) as error:
        raise HtsrError(
            f"The hub's answer for {repo_id}{at} cannot be used: {_short(error)}.",
            "Run the same command again: it goes on where it stopped.",
        ) from error
    except errors.HFValidationError as error:
        raise HtsrError(f"{repo_id} is not a valid hub id: {_short(error)}.") from error
    except OSError as error:
        raise HtsrError(f"Downloading {repo_id}{at} failed: {_short(error)}.") from error


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
