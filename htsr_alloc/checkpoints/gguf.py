"""GGUF files (llama.cpp, Ollama) as checkpoints, under the names that the hub's files have.

The block types, the names and the arithmetic are the package gguf's; the header is read here
(``gguf_header``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr_alloc.checkpoints.gguf_header import (
    GgufTensor,
    alignment_of,
    check_places,
    read_header,
)
from htsr_alloc.checkpoints.listing import Listing, Packed, Shard, TensorRef
from htsr_alloc.checkpoints.local import LocalFiles, parsed, shard_of
from htsr_alloc.checkpoints.quantised.base import no_library
from htsr_alloc.checkpoints.reading import Checkpoint, Store, readable
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

BLOCK = re.compile(r"^blk\.")
PREDICTING = re.compile(r"blk\.([0-9]{1,9})\.nextn\.")  # a block of multi-token prediction
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


# One file's metadata, the file, and its tensors.
Part = tuple[dict[str, Any], Shard, list[GgufTensor]]


def open_gguf(path: Path) -> Checkpoint:
    """A GGUF file, or the first of a model that was split into several.

    Raises:
        HtsrError: the package gguf is not installed, a part is missing, or a header does not
            describe its file.
    """
    names = parts_of(path.name, lambda name: path.with_name(name).is_file(), path.parent)
    parts = [read_local(path.with_name(name)) for name in names]
    paths = tuple(path.with_name(name) for name in names)
    return assembled(title_of(path.name), None, parts, LocalFiles(path.parent), paths)


def parts_of(name: str, there: Callable[[str], bool], where: Path | str) -> list[str]:
    """All files of a model, of which ``name`` is one, by the names that llama.cpp gives them.

    Raises:
        HtsrError: one is not ``there``.
    """
    found, names = PART.fullmatch(name), [name]
    if found is not None:
        total = int(found["total"])
        names = [f"{found['stem']}-{i + 1:05}-of-{total:05}.gguf" for i in range(total)]
    missing = [part for part in names if not there(part)]
    if missing or not names:
        raise HtsrError(
            f"{missing[0] if missing else name} is not in {where} "
            f"({len(missing)} of {len(names)} parts missing).",
            "Fetch it, or name another.",
        )
    return names


def only_model(names: Iterable[str]) -> str | None:
    """The first file of the one GGUF model among these files, if there is one and nothing else."""
    names = list(names)
    found = sorted(name for name in names if name.endswith(".gguf"))
    first = [name for name in found if not PART.fullmatch(name) or "-00001-of-" in name]
    if len(first) != 1 or any(name.endswith(".safetensors") for name in names):
        return None
    return first[0]


def title_of(name: str) -> str:
    """A file's name without what says that it is a GGUF file, or a part of a model."""
    return PART.sub(r"\g<stem>", name).removesuffix(".gguf")


def read_local(path: Path) -> Part:
    """One file on this machine."""
    try:
        (metadata, tensors, sha256), status = parsed(path, read_header)
    except ValueError as error:
        raise damaged(path, error) from None
    return metadata, shard_of(path, status, sha256), tensors


def damaged(name: Path | str, error: ValueError) -> HtsrError:
    """The refusal of a file whose header is none."""
    return HtsrError(f"{name} is not a whole GGUF file: {error}.", "Fetch it again.")


def assembled(
    name: str,
    revision: str | None,
    parts: Sequence[Part],
    store: Store,
    paths: tuple[Path, ...] = (),
) -> Checkpoint:
    """The checkpoint that these files make.

    Raises:
        HtsrError: the package gguf is not installed, or the files do not fit each other.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise no_library("gguf", "Reading a GGUF file") from None
    metadata = next((found for found, _, _ in parts if found), {})
    architecture = metadata.get("general.architecture")
    architecture = architecture if isinstance(architecture, str) else ""
    blocks = metadata.get(f"{architecture}.block_count")
    blocks = blocks if type(blocks) is int and 0 < blocks <= 10_000 else 0
    names = hub_names(architecture, blocks)
    stack = STACKS.get(architecture, DEFAULT_STACK)
    refs: dict[str, TensorRef] = {}
    for number, (said, shard, tensors) in enumerate(parts):
        extents: list[tuple[int, int, str]] = []
        for tensor in tensors:
            kind, end = _sized(tensor, shard)
            ref = _ref(tensor, kind, number, names, stack)
            if ref.name in refs:
                raise HtsrError(f"Two tensors of {name} have the name {ref.name}.")
            refs[ref.name] = ref
            extents.append((tensor.begin, end, tensor.name))
        try:
            check_places(extents, shard.nbytes, alignment_of(said))
        except ValueError as error:
            raise damaged(shard.name, error) from None
    config: dict[str, Any] = {"architectures": [architecture]} if architecture else {}
    layers = _layers(metadata, architecture, blocks, parts)
    if layers:
        config["num_hidden_layers"] = layers
    listing = Listing(tuple(shard for _, shard, _ in parts), tuple(refs.values()))
    return Checkpoint(readable(name), revision, config, listing, store, paths)


def _layers(
    metadata: Mapping[str, Any], architecture: str, blocks: int, parts: Sequence[Part]
) -> int:
    """How many of the blocks are layers; 0 where it is not said.

    The last ones predict further tokens: as many as the file says, and those with such a tensor.
    """
    predicting = metadata.get(f"{architecture}.nextn_predict_layers", 0)
    layers = blocks - predicting if type(predicting) is int and 0 <= predicting < blocks else blocks
    found = (PREDICTING.match(tensor.name) for _, _, tensors in parts for tensor in tensors)
    ends = [int(block[1]) for block in found if block]
    return min([layers, *ends] if layers else ends, default=0)


def _ref(
    tensor: GgufTensor,
    kind: GGMLQuantizationType,
    number: int,
    names: Mapping[str, str],
    stack: str,
) -> TensorRef:
    """A tensor under its hub name: floats as they are, blocks packed."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import _type_traits

    stem, dot, suffix = tensor.name.rpartition(".")
    known = names.get(stem)
    name = f"{known}.{suffix}" if known and dot else BLOCK.sub(f"{stack}.", tensor.name)
    if kind.name in ("F64", "F32", "F16", "BF16") or kind not in _type_traits:
        return TensorRef(name, kind.name, tensor.shape, number, tensor.begin)
    block, size = GGML_QUANT_SIZES[kind]
    stored = (*tensor.shape[:-1], (tensor.shape[-1] if tensor.shape else 1) // block * size)
    part = TensorRef(tensor.name, "U8", stored, number, tensor.begin)
    packed = Packed("gguf", (("blocks", part),), kind.name)
    return TensorRef(name, kind.name, tensor.shape, number, tensor.begin, packed)


def _sized(tensor: GgufTensor, shard: Shard) -> tuple[GGMLQuantizationType, int]:
    """A tensor's type, and where its bytes end.

    Raises:
        HtsrError: its type is unknown, or its bytes do not lie within the file.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

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
    end = tensor.begin + math.prod(tensor.shape) // block * size
    if columns % block or end > shard.nbytes:
        raise HtsrError(
            f"{shard.name} is not a whole GGUF file: the shape {list(tensor.shape)} of "
            f"{tensor.name} does not fit its type {kind.name} or leaves the file.",
            "Fetch it again.",
        )
    return kind, end


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
