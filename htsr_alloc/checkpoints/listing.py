"""Which files make up a checkpoint and which tensors they hold, from headers and index alone."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr_alloc.checkpoints.header import Header
from htsr_alloc.errors import HtsrError

# Bytes an element takes, and the torch dtype's name, by the code in a safetensors header.
FLOAT_DTYPES = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
}
# The same for what only parts of a quantised weight hold.
PART_DTYPES = {
    **FLOAT_DTYPES,
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "F8_E8M0": (1, "uint8"),
}
# A weight's scale sits beside it under one of these names; the stored values are to be
# multiplied by it. "inv" is DeepSeek's name; it is a plain factor.
SCALE_SUFFIXES = ("_scale_inv", "_scale")
INDEX_NAMES = ("model.safetensors.index.json", "adapter_model.safetensors.index.json")
SINGLE_NAMES = ("model.safetensors", "adapter_model.safetensors")
CONFIG_NAMES = ("config.json", "adapter_config.json")
MAX_JSON = 100_000_000  # bytes of an index or a configuration
PART = re.compile(r"-\d+-of-(\d+)\.safetensors$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_FORMATS = {".h5": "Keras", ".msgpack": "Flax", ".onnx": "ONNX"}


def natural(text: str) -> list[str | tuple[int, str]]:
    """A sort key under which ``layers.10`` follows ``layers.9``."""
    parts = re.split(r"0*([0-9]+)", text)  # words at even places, numbers at odd ones
    return [(len(part), part) if i % 2 else part for i, part in enumerate(parts)]


@dataclass(frozen=True, slots=True)
class Packed:
    """How a quantised weight is stored.

    Attributes:
        format: a key of ``quantised.FORMATS``.
        parts: (role, stored tensor), in the order in which they are read and hashed.
        settings: all else that the float matrix depends on, as text.
    """

    format: str
    parts: tuple[tuple[str, TensorRef], ...]
    settings: str = ""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor as its shard's header describes it; ``dtype`` is the header's code (``BF16``).

    ``begin`` is where its bytes start in the shard. With ``packed`` it is the float tensor that
    several stored ones make: its name and shape are those of the float checkpoint, and ``dtype``
    says what its numbers were rounded to (``F8_E4M3``, ``INT4``, ``Q4_K``).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    begin: int = 0
    packed: Packed | None = None

    @property
    def nbytes(self) -> int:
        """Bytes stored; 0 for a dtype that is not read."""
        if self.packed is not None:
            return sum(part.nbytes for _, part in self.packed.parts)
        return math.prod(self.shape) * PART_DTYPES.get(self.dtype, (0, ""))[0]

    @property
    def is_float(self) -> bool:
        """Whether reading it gives floats: stored as such, or made from its parts."""
        return self.packed is not None or self.dtype in FLOAT_DTYPES

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The tensors of the files that it is read from: its parts, or itself."""
        return (self,) if self.packed is None else tuple(part for _, part in self.packed.parts)


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    ``identity`` changes when the file does: its commit, or its size and time, and its header. A
    local file may be replaced by one of the same size and time; its ``stamp`` (device, inode,
    time of the last change) then differs. It also differs after a copy, which changes nothing.
    """

    name: str
    nbytes: int
    identity: str
    stamp: str = ""

    @property
    def sha256(self) -> str:
        """Of its header, which the identity ends in."""
        return self.identity.rpartition(":")[2]


@dataclass(frozen=True)
class Transfer:
    """Bytes to download, the most bytes of disk that they take at a time, and in which folder."""

    download: int
    disk: int
    folder: Path | None = None


@dataclass(frozen=True)
class Listing:
    """What a checkpoint's files hold. ``unindexed`` tensors are not mentioned by the index."""

    shards: tuple[Shard, ...]
    tensors: tuple[TensorRef, ...]
    unindexed: tuple[str, ...] = ()


def choose_files(
    names: Sequence[str], read: Callable[[str], bytes], where: Path | str
) -> tuple[list[str], dict[str, str] | None]:
    """Which of a folder's files make up the model, and the index (tensor -> file) if any.

    An index decides; else ``model.safetensors`` alone; else every safetensors file.
    """
    there = set(names)
    for name in INDEX_NAMES:
        if name in there:
            index = parse_index(read(name), name)
            files = sorted(set(index.values()), key=natural)
            missing = [file for file in files if file not in there]
            if missing:
                raise HtsrError(
                    f"{name} names {missing[0]}, which is not in {where} "
                    f"({len(missing)} of {len(files)} shards missing).",
                    "Fetch the missing shards, or remove a stale index.",
                )
            return files, index
    for name in SINGLE_NAMES:
        if name in there:
            return [name], None
    files = sorted((name for name in names if name.endswith(".safetensors")), key=natural)
    if not files:
        refuse_format(names, where)
    parts = {name: part[1] for name in files if (part := PART.search(name))}
    counts = Counter(parts.values())
    for name, total in parts.items():
        if not total.isascii() or len(total) > 9 or counts[total] != int(total):
            raise HtsrError(
                f"{where} does not hold all the shards that the name {name} announces.",
                "Fetch the missing shards.",
            )
    return files, None


HeaderOf = Callable[[str], tuple[Shard, Header]]


def list_tensors(
    files: Sequence[str], index: dict[str, str] | None, header_of: HeaderOf
) -> Listing:
    """Every tensor of the files, in file order, with headers and index checked against each other.

    Raises:
        HtsrError: a tensor in two files, in another file than the index says, or in none.
    """
    shards: list[Shard] = []
    refs: dict[str, TensorRef] = {}
    unindexed: list[str] = []
    for number, file in enumerate(files):
        shard, header = header_of(file)
        shards.append(shard)
        for tensor, entry in header.entries.items():
            if index is not None and index.get(tensor) != file:
                if tensor in index:
                    raise HtsrError(
                        f"The index puts {tensor} into {index[tensor]}, but it is in {file}."
                    )
                unindexed.append(tensor)
            elif tensor in refs:
                other = shards[refs[tensor].shard].name
                raise HtsrError(f"{tensor} is both in {other} and in {file}.")
            else:
                refs[tensor] = TensorRef(tensor, entry.dtype, entry.shape, number, entry.begin)
    missing = [tensor for tensor in index or () if tensor not in refs]
    if missing:
        raise HtsrError(
            f"The index lists {missing[0]}, but {(index or {})[missing[0]]} does not hold it "
            f"({len(missing)} tensors missing)."
        )
    return Listing(tuple(shards), tuple(refs.values()), tuple(unindexed))


def parse_config(names: Iterable[str], read: Callable[[str], bytes]) -> dict[str, Any]:
    """``config.json`` (``adapter_config.json``) beside the weights; empty if there is none."""
    name = next((name for name in CONFIG_NAMES if name in names), None)
    return parse_object(read(name), name) if name else {}


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """A JSON object; HtsrError if it is something else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise HtsrError(f"{name} is not JSON: {why}.") from None
    if not isinstance(data, dict):
        raise HtsrError(f"{name} does not hold a JSON object.")
    return data


def parse_index(text: bytes, name: str) -> dict[str, str]:
    weight_map = parse_object(text, name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HtsrError(f'{name} has no "weight_map".')
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise HtsrError(f"{name} puts {tensor} into {file!r}, which is not a safetensors file.")
        if Path(file).name != file or "\\" in file or ":" in file or "\0" in file:
            raise HtsrError(f"{name} puts {tensor} into {file!r}, which is outside its own folder.")
    return weight_map


def refuse_format(names: Sequence[str], where: Path | str) -> None:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise HtsrError(
            f"{where} holds pickled weights ({pickles[0]}) and no safetensors; pickles can run "
            "code, so they are never opened.",
            "Convert them once, where you trust them: "
            "AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True).",
        )
    if any(name.endswith(".gguf") for name in names):
        raise HtsrError(
            f"{where} holds GGUF files and no safetensors.",
            f"Name one of them, as {where}/{next(n for n in names if n.endswith('.gguf'))}.",
        )
    if any(name.endswith(".distcp") for name in names):
        raise HtsrError(
            f"{where} holds a distributed checkpoint (DCP, FSDP), which is not read.",
            "Convert it: `accelerate merge-weights FOLDER OUTPUT` writes safetensors.",
        )
    for suffix, label in OTHER_FORMATS.items():
        if any(name.endswith(suffix) for name in names):
            raise HtsrError(
                f"{where} holds {label} weights and no safetensors.",
                "Convert them to safetensors first.",
            )
    raise HtsrError(
        f"{where} holds no safetensors file.",
        "Give a folder that holds some, or one .gguf file; sub-folders are not searched.",
    )
