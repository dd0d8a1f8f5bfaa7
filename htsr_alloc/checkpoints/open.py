"""``open_checkpoint``: what the user names, as a list of tensors that are read one at a time.

Nothing is ever unpickled, and no code of a model is run.
"""

from __future__ import annotations

import re
from pathlib import Path

from htsr_alloc.checkpoints.gguf import only_model, open_gguf
from htsr_alloc.checkpoints.local import open_file, open_folder
from htsr_alloc.checkpoints.reading import Checkpoint
from htsr_alloc.errors import HtsrError

SHARDS = ("keep", "drop", "stream")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILE = re.compile(rf"({HUB_ID.pattern})/((?:[^/]+/)*[^/]+\.gguf)")


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    shards: str = "keep",
) -> Checkpoint:
    """List a checkpoint's tensors from its headers.

    Args:
        source: a ``.safetensors`` or ``.gguf`` file, a folder, a hub id (``org/name``), or a GGUF
            file of one (``org/name/FILE.gguf``, ``org/name/FOLDER/FILE.gguf``). What exists on
            disk is taken first.
        revision, token, cache_dir, offline: passed to huggingface_hub for a hub id.
        shards: what is done with a hub id's weights. ``keep`` downloads them to the hub's cache,
            ``drop`` keeps each file only until its matrices are done, ``stream`` reads byte
            ranges and writes nothing.

    Raises:
        HtsrError: nothing there, no weights that are read, a broken or incomplete shard or index.
    """
    if shards not in SHARDS:
        raise HtsrError(f"There is no way {shards!r} to treat shards.", f"Choose {SHARDS}.")
    path = Path(source).expanduser()
    if path.exists() and shards != "keep":
        raise HtsrError(
            f"{path} is on this machine: there is nothing to stream or to drop.",
            "Keep its shards, which is the default.",
        )
    if path.is_file():
        return open_gguf(path) if path.suffix == ".gguf" else open_file(path)
    if path.is_dir():
        only = _only_gguf(path)
        return open_folder(path) if only is None else open_gguf(only)
    text, file = str(source), None
    named = HUB_FILE.fullmatch(text)
    if named and named[2]:
        text, file = named[1], named[3]
    if HUB_ID.fullmatch(text) and not text.endswith((".safetensors", ".gguf")):
        from htsr_alloc.checkpoints import hub

        return hub.open_hub(
            text,
            file=file,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            offline=offline,
            shards=shards,
        )
    raise HtsrError(
        f"{text} is neither a file, a folder nor a hub id.",
        "Give a .safetensors or .gguf file, a folder that holds some, or an id such as "
        "meta-llama/Llama-2-7b-hf.",
    )


def _only_gguf(folder: Path) -> Path | None:
    """The one GGUF model of a folder without safetensors, by its first file."""
    try:
        only = only_model(path.name for path in folder.iterdir())
    except OSError:
        return None  # which the listing of the folder says
    return None if only is None else folder / only
