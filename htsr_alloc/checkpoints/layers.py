"""From tensor names to places in the model: (layer, role, expert), or a reason to leave out.

What is known about naming is data (the table below, and those of ``rules``); the rules that use it
are general, so that a model nobody has listed works when its blocks are numbered.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from htsr_alloc.checkpoints.halves import Half, halves_of
from htsr_alloc.checkpoints.listing import TensorRef, natural
from htsr_alloc.checkpoints.roles import roles_of
from htsr_alloc.checkpoints.rules import (
    NUMBER,
    PREDICTION,
    expert_position,
    has_words,
    is_mixture,
    of_experts,
    skip_reason,
)
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    import torch

    from htsr_alloc.checkpoints.reading import Checkpoint

# The word before a block's number, by the families that use it. A number after any other word
# makes a block only when the same weights recur under at least two numbers; and bare weights
# (``mlp.0.weight``, ``mlp.2.weight`` of a projector or head) only when there are no better blocks.
STACK_WORDS = {
    "layers": "LLaMA, Mistral, Qwen, Gemma, Phi, SmolLM, Mixtral, DeepSeek, OPT, GPT-NeoX, Whisper",
    "h": "GPT-2, GPT-J, Falcon, BLOOM, Phi-1",
    "layer": "BERT, RoBERTa, MPNet, ViT, DINOv2",
    "block": "T5",
    "blocks": "timm ViT, MPT, DBRX",
    "resblocks": "OpenCLIP",
    "albert_layer_groups": "ALBERT",
}

# More than any model has; a hostile header could make us list billions.
MAX_BLOCKS = 10_000
MAX_EXPERTS = 100_000  # in a stack
MAX_PARTS = 50  # of a dotted name


@dataclass(frozen=True)
class MatrixRef:
    """A matrix to analyse: a 2-d tensor, or slice ``index`` of a 3-d one.

    ``role`` is the checkpoint's own word (``q_proj``, ``attention.output.dense``): the shortest
    ending that is unambiguous in this checkpoint. ``expert`` is its number inside a mixture, and
    ``half`` what of a slice it is that joins an expert's gate and up.
    """

    ref: TensorRef
    index: int | None
    layer: int
    role: str
    expert: int | None
    half: Half | None = None

    @property
    def name(self) -> str:
        """The tensor's name, with ``[i]`` for a slice and ``[i,gate]`` for a half of one."""
        if self.index is None:
            return self.ref.name
        own = f"{self.index},{self.half.word}" if self.half else str(self.index)
        return f"{self.ref.name}[{own}]"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) as stored; a GPT-2 Conv1D is stored as (d_in, d_out).

        Of a 3-d tensor that is one matrix (XLNet) the columns are heads times their width. A half
        is (d_out, d_in), as it would be apart.
        """
        if self.index is None:
            return self.ref.shape[0], math.prod(self.ref.shape[1:])
        rows, columns = self.ref.shape[-2:]
        if self.half is None:
            return rows, columns
        return (columns // 2, rows) if self.half.inputs_first else (rows // 2, columns)

    @property
    def alone(self) -> bool:
        """Whether it is all that is read for it: a half may be read with the other."""
        return self.half is None or (self.half.together and self.ref.packed is None)

    def read(self, checkpoint: Checkpoint, digest: Any = None) -> torch.Tensor:
        """The matrix (CPU), as ``Checkpoint.read`` reads its tensor or slice."""
        if self.half is None:
            return checkpoint.read(self.ref, self.index, digest).reshape(self.shape)
        if self.alone:
            rows = self.half.rows(self.ref.shape[-2])
            return checkpoint.read(self.ref, self.index, digest, rows)
        return self.half.of(checkpoint.read(self.ref, self.index, digest))

    @property
    def module(self) -> str:
        """The name of the module that owns it."""
        return re.sub(r"[._]?weight$", "", self.ref.name)


@dataclass(frozen=True)
class LayerMap:
    """Every tensor's place.

    Attributes:
        prefixes: the blocks, ``model.layers.0`` first, in numeric order; the stacks of a model
            with several (encoder, decoder) one after the other. The position is the layer. A
            stack of which nothing is selected has none.
        matrices: in layer order, then by name.
        skipped: (name, reason) of every other tensor.
        quantised: names of integer tensors that stand where weights belong.
    """

    prefixes: tuple[str, ...]
    matrices: tuple[MatrixRef, ...]
    skipped: tuple[tuple[str, str], ...]
    quantised: tuple[str, ...]


def map_layers(
    tensors: Sequence[TensorRef],
    *,
    num_hidden_layers: int | None = None,
    architecture: str | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> LayerMap:
    """Place every tensor.

    Args:
        tensors: as the checkpoint lists them.
        num_hidden_layers: the configuration's count; in a model with one stack, blocks from
            this number on are extra (multi-token prediction) and are skipped.
        architecture: the model's, which says how stacks of experts join gate and up.
        include, exclude: shell patterns on tensor names, as ``*self_attn*``. A tensor must
            match some ``include`` (if any) and no ``exclude``.

    Raises:
        HtsrError: more blocks, experts or parts of a name than any model has, or a block's
            number that begins with 0.
    """
    include, exclude = tuple(include), tuple(exclude)
    for ref in tensors:
        if ref.name.count(".") >= MAX_PARTS:
            raise HtsrError(f"{ref.name[:60]}...: no model's tensor has a name of so many parts.")
    blocks = _find_blocks([ref for ref in tensors if not has_words(PREDICTION, ref.name)])
    stacks = {stack for stack, _ in blocks.values()}
    limit = num_hidden_layers if len(stacks) == 1 else None
    mixtures = {
        blocks[ref.name]
        for ref in tensors
        if ref.name in blocks and is_mixture(ref.name, len(ref.shape))
    }
    skipped: dict[str, str] = {}
    kept: list[TensorRef] = []
    quantised: list[str] = []
    found: dict[str, set[int]] = defaultdict(set)  # stack -> its block numbers
    for ref in tensors:
        place = blocks.get(ref.name)
        reason = skip_reason(ref, place, place in mixtures)
        if reason is None and place is not None and limit and place[1] >= limit:
            reason = f"beyond the {limit} layers of the configuration (multi-token prediction)"
        if place is not None and reason is None:
            found[place[0]].add(place[1])
        if reason is None:
            if include and not any(fnmatchcase(ref.name, pattern) for pattern in include):
                reason = "not matched by include"
            elif any(fnmatchcase(ref.name, pattern) for pattern in exclude):
                reason = "matched by exclude"
        if reason is not None:
            skipped[ref.name] = reason
        elif not ref.is_float:
            quantised.append(ref.name)
        else:
            kept.append(ref)
    taken = {blocks[name][0] for name in (*(ref.name for ref in kept), *quantised)}
    prefixes: list[str] = []
    first: dict[str, int] = {}  # stack -> the layer number of its block 0
    for stack in sorted(taken, key=lambda name: ("decoder" in name, natural(name))):
        if max(found[stack]) >= MAX_BLOCKS:
            raise HtsrError(f"{stack}.{max(found[stack])}: no model has that many blocks.")
        first[stack] = len(prefixes)
        prefixes += [f"{stack}.{i}" for i in range(max(found[stack]) + 1)]
    halves = halves_of(tensors, architecture)
    roles = roles_of(kept, blocks, halves)
    matrices = []
    for ref in kept:
        stack, block = blocks[ref.name]
        layer = first[stack] + block
        position = expert_position(ref.name)
        parts = ref.name.split(".")
        experts = len(ref.shape) == 3 and of_experts(ref.name)
        if experts and ref.shape[0] > MAX_EXPERTS:
            raise HtsrError(f"{ref.name}: no model has {ref.shape[0]} experts.")
        if experts:
            own = [(roles[ref.name, half], half) for half in halves.get(ref.name, (None,))]
            matrices += [
                MatrixRef(ref, i, layer, role, i, half)
                for i in range(ref.shape[0])
                for role, half in own
            ]
        else:
            expert = int(parts[position].removeprefix("expert_")) if position else None
            matrices.append(MatrixRef(ref, None, layer, roles[ref.name, None], expert))
    matrices.sort(key=lambda m: (m.layer, natural(m.name)))
    return LayerMap(tuple(prefixes), tuple(matrices), tuple(skipped.items()), tuple(quantised))


def _find_blocks(tensors: Sequence[TensorRef]) -> dict[str, tuple[str, int]]:
    """Tensor name -> (stack's name, block number), for the tensors that are in a block."""
    places: dict[str, tuple[str, int]] = {}
    within: dict[str, int] = {}  # name -> where the number after a known word stands
    unknown: dict[str, list[tuple[str, int]]] = {}
    recurring: dict[tuple[str, str], set[int]] = defaultdict(set)
    for ref in tensors:
        parts = ref.name.split(".")
        numbers = [i for i, part in enumerate(parts) if NUMBER.fullmatch(part) and i > 0]
        known = [i for i in numbers if parts[i - 1] in STACK_WORDS]
        if known:
            within[ref.name] = known[0]
            continue
        unknown[ref.name] = [(".".join(parts[:i]), int(parts[i])) for i in numbers]
        if len(ref.shape) >= 2:
            for i in numbers:
                stack, inner = ".".join(parts[:i]), ".".join(parts[i + 1 :])
                recurring[stack, inner].add(int(parts[i]))
    staged = _staged([ref for ref in tensors if len(ref.shape) == 2], within)
    for name, at in within.items():
        parts = name.split(".")
        place: int | None = at
        if ".".join(parts[:at]) in staged:  # a block of a stage, or what stands beside its blocks
            place = _nested(parts, at)
        if place is not None:
            places[name] = (".".join(parts[:place]), int(parts[place]))
    repeated = {key for key, found in recurring.items() if len(found) > 1}
    if within or any("." in inner for _, inner in repeated):
        repeated = {(stack, inner) for stack, inner in repeated if "." in inner}
    stacks = {stack for stack, _ in repeated}
    for name, candidates in unknown.items():
        found = next((c for c in candidates if c[0] in stacks), None)
        if found is not None:
            places[name] = found
    for name, (stack, number) in places.items():
        if not f"{name}.".startswith(f"{stack}.{number}."):
            raise HtsrError(
                f"{name}: the number of its block begins with 0.",
                "Write the checkpoint with plain numbers (layers.1, not layers.01).",
            )
    return places


def _staged(matrices: Sequence[TensorRef], within: dict[str, int]) -> set[str]:
    """The stacks of stages: the same weights recur in one of them under two numbers of its own.

    Swin: ``layers.0.blocks.1``; SegFormer: ``block.0.1``. T5's ``block.0.layer.1`` is another kind
    of sublayer than ``layer.0``, and ``experts.1`` follows no word of a stack.
    """
    recurring: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for ref in matrices:
        at, parts = within.get(ref.name), ref.name.split(".")
        nested = None if at is None else _nested(parts, at)
        if nested is not None and len(parts) > nested + 2:
            stack, inner = ".".join(parts[:at]), ".".join(parts[nested + 1 :])
            recurring[stack, ".".join(parts[:nested]), inner].add(parts[nested])
    return {key[0] for key, numbers in recurring.items() if len(numbers) > 1}


def _nested(parts: Sequence[str], at: int) -> int | None:
    """Where the number of a block of stage ``parts[at]`` stands, if there is one."""
    for place in (at + 1, at + 2):
        if place < len(parts) and NUMBER.fullmatch(parts[place]):
            return place if place == at + 1 or parts[place - 1] in STACK_WORDS else None
    return None
