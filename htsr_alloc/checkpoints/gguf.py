"""GGUF files (llama.cpp, Ollama): their header, checked before it is believed, and hub names.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. The header is read here
and not by ``gguf.GGUFReader``, which maps the file and believes every count in it; the block types,
the names and the arithmetic are that package's.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr_alloc.checkpoints.listing import Listing, Packed, Shard, TensorRef
from htsr_alloc.checkpoints.local import LocalFiles, parsed, shard_of
from htsr_alloc.checkpoints.quantised.base import no_library
from htsr_alloc.checkpoints.reading import Checkpoint, readable
from htsr_alloc.errors import HtsrError

MAX_HEADER = 1 << 28  # bytes; a vocabulary of 256,000 tokens takes some 10 MB
MAX_TENSORS = 1_000_000
MAX_DIMS = 4
PIECE = 1 << 16
# The kinds of metadata: struct's letter, by the file's number; 8 is text and 9 a list.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
BLOCK = re.compile(r"^blk\.")
PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf")
# What stands before a block's number in the hub's files, by the architecture in a GGUF file, as
# gguf's tensor maps spell it; most have "model.layers".
STACKS = {
    **dict.fromkeys(("bert", "nomic-bert", "jina-bert-v2"), "encoder.layer"),
    **dict.fromkeys(("falcon", "gptj", "starcoder", "codeshell", "refact"), "transformer.h"),
    **dict.fromkeys(("gpt2", "qwen", "jais", "grok"), "transformer.h"),
    "bloom": "h",
    "dbrx": "transformer.blocks",
    "gptneox": "gpt_neox.layers",
    "mpt": "transformer.blocks",
    "mamba": "backbone.layers",
}
DEFAULT_STACK = "model.layers"
# gguf's maps list the spellings of all families together. Within a stack these come first, the
# architecture's own before the usual ones.
USUAL = (
    *("self_attn.qkv_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate"),
    *("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    *("mlp.shared_experts.down_proj", "model.embed_tokens", "model.norm", "lm_head"),
)
BLOOM = ("self_attention.query_key_value", "self_attention.dense")
BLOOM += ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
OWN: dict[str, tuple[str, ...]] = {
    "falcon": BLOOM,
    "phi3": ("mlp.gate_up_proj",),
    "glm4": ("mlp.gate_up_proj",),
    "starcoder2": ("mlp.c_fc", "mlp.c_proj"),
    "gpt-oss": ("mlp.router",),
    "qwen2moe": tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a header: ``kind`` is ggml's number of its type, ``begin`` its first byte."""

    name: str
    kind: int
    shape: tuple[int, ...]
    begin: int


class Cursor:
    """Reads a header from its start; ValueError where it does not end in time.

    ``digest`` is over the header and what is read with its last piece.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self.read, self.limit = read, min(size, MAX_HEADER)
        self.data, self.begin, self.place = b"", 0, 0  # what was read, from where; where we are
        self.digest = hashlib.sha256()

    def take(self, count: int) -> bytes:
        if count > self.limit - self.place:
            raise ValueError("its header does not end within the file")
        start = self.place - self.begin
        if start + count > len(self.data):
            end = self.begin + len(self.data)
            more = min(max(start + count - len(self.data), PIECE), self.limit - end)
            new = self.read(end, more)
            self.digest.update(new)
            self.data, self.begin, start = self.data[start:] + new, self.place, 0
        self.place += count
        return self.data[start : start + count]

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")


def read_header(read: Callable[[int, int], bytes], size: int) -> tuple[dict, list[GgufTensor], str]:
    """The metadata (lists left out), the tensors and the header's SHA-256.

    Args:
        read: (begin, length) -> exactly that many bytes.
        size: of the whole file, in bytes.

    Raises:
        ValueError: no header of GGUF, or one that does not describe a file of this size.
    """
    at = Cursor(read, size)
    if size < 24 or at.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = at.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, not 2 or 3 in little-endian order")
    tensors, keys = at.number("Q"), at.number("Q")
    if tensors > MAX_TENSORS or keys > MAX_TENSORS:
        raise ValueError(f"it would hold {tensors} tensors and {keys} keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = at.text()
        if key in metadata:
            raise ValueError(f"duplicate key {key!r}")
        metadata[key] = _value(at, at.number("I"))
    infos = [_info(at) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-at.place // alignment) * alignment
    placed = [GgufTensor(*info[:3], begin=start + info[3]) for info in infos]
    if len({tensor.name for tensor in placed}) != len(placed):
        raise ValueError("a tensor's name stands in it twice")
    return metadata, placed, at.digest.hexdigest()


def _value(at: Cursor, kind: int) -> Any:
    """A value of the metadata; of a list only that it was one."""
    if kind == TEXT:
        return at.text()
    if kind in SCALARS:
        return at.number(SCALARS[kind])
    if kind != LIST:
        raise ValueError(f"its metadata holds a value of the unknown kind {kind}")
    kind, count = at.number("I"), at.number("Q")
    if kind in SCALARS:
        at.take(count * struct.calcsize(f"<{SCALARS[kind]}"))
    elif kind == TEXT:
        for _ in range(count):
            at.take(at.number("Q"))
    else:
        raise ValueError("its metadata holds a list of lists")
    return None


def _info(at: Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, dims = at.text(), at.number("I")
    if dims > MAX_DIMS:
        raise ValueError(f"{name[:60]!r} would have {dims} dimensions")
    shape = tuple(at.number("Q") for _ in range(dims))[::-1]
    return name, at.number("I"), shape, at.number("Q")


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file, or the first of a model that was split into several.

    Raises:
        HtsrError: the package gguf is not installed, a part is missing, or a header does not
            describe its file.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise no_library("gguf", "Reading a GGUF file") from None
    paths, shards, listed = _parts(path), [], []
    metadata: dict[str, Any] = {}
    for number, part in enumerate(paths):
        found, shard, tensors = _read(part)
        metadata = metadata or found
        shards.append(shard)
        listed += [(number, tensor) for tensor in tensors]
    architecture = metadata.get("general.architecture")
    architecture = architecture if isinstance(architecture, str) else ""
    blocks = metadata.get(f"{architecture}.block_count")
    blocks = blocks if type(blocks) is int and 0 < blocks <= 10_000 else 0
    names = hub_names(architecture, blocks)
    stack = STACKS.get(architecture, DEFAULT_STACK)
    refs: dict[str, TensorRef] = {}
    for number, tensor in listed:
        ref = _ref(tensor, number, shards[number], names, stack)
        if ref.name in refs:
            raise HtsrError(f"Two tensors of {path} have the name {ref.name}.")
        refs[ref.name] = ref
    config = {"architectures": [architecture]} if architecture else {}
    if blocks:
        config["num_hidden_layers"] = blocks  # pyright: ignore[reportArgumentType]
    listing = Listing(tuple(shards), tuple(refs.values()))
    name = PART.sub(r"\g<stem>", path.name).removesuffix(".gguf")
    return Checkpoint(readable(name), None, config, listing, LocalFiles(path.parent), tuple(paths))


def _parts(path: Path) -> list[Path]:
    """All files of a split model, by the names that llama.cpp gives them."""
    found = PART.fullmatch(path.name)
    if found is None:
        return [path]
    total = int(found["total"])
    paths = [path.with_name(f"{found['stem']}-{i + 1:05}-of-{total:05}.gguf") for i in range(total)]
    missing = [part for part in paths if not part.is_file()]
    if missing or not total:
        raise HtsrError(
            f"{missing[0].name if missing else path.name} is not beside {path.name} "
            f"({len(missing)} of {total} parts missing).",
            "Fetch the missing parts.",
        )
    return paths


def _read(path: Path) -> tuple[dict[str, Any], Shard, list[GgufTensor]]:
    try:
        (metadata, tensors, sha256), status = parsed(path, read_header)
    except ValueError as error:
        raise HtsrError(f"{path} is not a whole GGUF file: {error}.", "Fetch it again.") from None
    return metadata, shard_of(path, status, sha256), tensors


def _ref(
    tensor: GgufTensor, number: int, shard: Shard, names: Mapping[str, str], stack: str
) -> TensorRef:
    """A tensor under its hub name: floats as they are, blocks packed.

    Raises:
        HtsrError: its type is unknown, or its bytes do not lie within the file.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import _type_traits

    stem, dot, suffix = tensor.name.rpartition(".")
    known = names.get(stem)
    name = f"{known}.{suffix}" if known and dot else BLOCK.sub(f"{stack}.", tensor.name)
    try:
        kind = GGMLQuantizationType(tensor.kind)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise HtsrError(
            f"{tensor.name} in {shard.name} is of ggml's type {tensor.kind}, which the installed "
            "gguf does not know.",
            "pip install -U gguf",
        ) from None
    columns = tensor.shape[-1] if tensor.shape else 1
    nbytes = math.prod(tensor.shape) // block * size
    if columns % block or tensor.begin + nbytes > shard.nbytes:
        raise HtsrError(
            f"{shard.name} is not a whole GGUF file: the shape {list(tensor.shape)} of "
            f"{tensor.name} does not fit its type {kind.name} or leaves the file.",
            "Fetch it again.",
        )
    if kind.name in ("F64", "F32", "F16", "BF16") or kind not in _type_traits:
        return TensorRef(name, kind.name, tensor.shape, number, tensor.begin)
    stored = (*tensor.shape[:-1], columns // block * size)
    part = TensorRef(tensor.name, "U8", stored, number, tensor.begin)
    packed = Packed("gguf", (("blocks", part),), kind.name)
    return TensorRef(name, kind.name, tensor.shape, number, tensor.begin, packed)


def hub_names(architecture: str, blocks: int) -> dict[str, str]:
    """GGUF's name of a module -> its name in the hub's files, by gguf's own tensor maps.

    A map has the spellings of all families: that of the architecture's stack is taken, ``OWN`` and
    ``USUAL`` first. Empty for an architecture that gguf does not know.
    """
    import gguf

    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return {}
    start = STACKS.get(architecture, DEFAULT_STACK) + "."
    first = (*OWN.get(architecture, ()), *USUAL)
    found: dict[str, list[str]] = {}
    for hub, (_, own) in gguf.get_tensor_name_map(known[architecture], blocks).mapping.items():
        if hub != own and (hub.startswith(start) or not own.startswith("blk.")):
            found.setdefault(own, []).append(hub)
    return {own: min(hubs, key=lambda hub: _rank(hub, start, first)) for own, hubs in found.items()}


def _rank(hub: str, start: str, first: tuple[str, ...]) -> int:
    inner = hub.removeprefix(start).partition(".")[2] if hub.startswith(start) else hub
    return first.index(inner) if inner in first else len(first)
