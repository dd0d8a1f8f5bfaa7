"""An allocation's layers and linears, found in a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from htsr_alloc.allocation import allocate
from htsr_alloc.allocation.linears import Linear, Linears
from htsr_alloc.allocation.units import BASE_EXPERTS
from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.fused import own_experts
from htsr_alloc.lora_moe.linears import feed_forward, left_out, widths
from htsr_alloc.lora_moe.names import Names
from htsr_alloc.lora_moe.systems import System
from htsr_alloc.records import Allocation, Evidence, Metrics


def renamed(model: nn.Module, allocation: Allocation, prefixes: Sequence[str]) -> Allocation:
    """The allocation with the model's own names of blocks and linears.

    Args:
        prefixes: each layer's block in the model (``resolve_layers``).

    Raises:
        HtsrError: a listed linear that is not under its layer's block.
    """
    rows = allocation.evidence or tuple(
        Evidence(i, None, None, None, n, "the counts were given")
        for i, n in enumerate(allocation.experts)
    )
    modules, names = [], Names(model)
    for module in allocation.modules:
        block = rows[module.layer].prefix
        if block is None or not module.name.startswith(block + "."):
            place = "which has no block" if block is None else f"whose block is {block}"
            raise HtsrError(f"The allocation lists {module.name} in layer {module.layer}, {place}.")
        inside = prefixes[module.layer] + module.name.removeprefix(block)
        name = inside if inside in names.modules else names.module(module.name) or inside
        modules.append(replace(module, name=name))
    evidence = (replace(row, prefix=name) for row, name in zip(rows, prefixes, strict=True))
    return replace(allocation, evidence=tuple(evidence), modules=tuple(modules))


def resolve_layers(model: nn.Module, allocation: Allocation) -> list[str]:
    """The full name of each allocated layer's block, in the allocation's order.

    The evidence's prefixes are looked for as names in the model, as names in a checkpoint of it,
    and as ends of names. Without them the one stack of blocks with as many layers is taken.

    Raises:
        HtsrError: not exactly one block for a layer, or blocks left over.
    """
    stacks = {
        name: [f"{name}.{i}" for i in range(len(module))]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _is_stack(module)
    }
    wanted = [row.prefix for row in allocation.evidence if row.prefix is not None]
    count = len(allocation.experts)
    sizes = " and ".join(f"{len(blocks)} ({name})" for name, blocks in stacks.items()) or "none"
    mismatch = HtsrError(
        f"The allocation is for {count} layers, and the model's layers are {sizes}.",
        "Give the model that the allocation was made for.",
    )
    if len(wanted) < count:
        fitting = [blocks for blocks in stacks.values() if len(blocks) == count]
        if len(fitting) != 1:
            raise mismatch
        return fitting[0]
    names = Names(model)
    found = []
    for prefix in wanted:
        own = names.module(prefix)
        same = names.ends(prefix) if own is None else [own]
        if len(same) > 1:
            listed = ", ".join(sorted(same))
            raise HtsrError(f"{prefix} is in the model {len(same)} times: {listed}.")
        found += same
    used = {name.rpartition(".")[0] for name in found}
    total = sum(len(list(model.get_submodule(name).children())) for name in used)
    if len(found) == 0:
        raise HtsrError(
            f"The model has no module {wanted[0]}; its layers are {sizes}.", mismatch.hint
        )
    if len(found) < count or total != count:
        raise mismatch
    return found


def checkpoint_blocks(model: nn.Module, folder: Path) -> dict[str, str]:
    """The blocks of a checkpoint in the order of its layers -> the model's own names of them.

    A block that the model does not have, or has several times, is left out.
    """
    checkpoint = open_checkpoint(folder)
    layers = map_layers(
        checkpoint.tensors,
        num_hidden_layers=checkpoint.num_hidden_layers,
        architecture=checkpoint.architecture,
    )
    names, found = Names(model), {}
    for prefix in layers.prefixes:
        own = names.module(prefix)
        blocks = names.ends(prefix) if own is None else [own]
        if len(blocks) == 1:
            found[prefix] = blocks[0]
    return found


def linears_of(model: nn.Module, metrics: Metrics) -> Linears:
    """The linears that ``build`` adapts in each layer of the metrics, for ``allocate``'s budgets.

    They are others than the metrics' matrices where transformers splits or joins these as it loads
    them.

    Args:
        model: as transformers makes it; one without weights will do.

    Raises:
        HtsrError: the model is another than the metrics'.
    """
    each = (1,) * len(metrics.layers)
    blocks = resolve_layers(model, allocate(metrics, strategy="explicit", experts=each))
    avoided = left_out(model)
    sizes = {
        name: found
        for name, module in model.named_modules()
        if name not in avoided and (found := widths(module)) is not None
    }
    rows = [
        tuple(Linear(name, *sizes[name]) for name in sizes if name.startswith(block + "."))
        for block in blocks
    ]
    prefixes = [layer.prefix for layer in metrics.layers]
    return Linears(tuple(zip(prefixes, rows, strict=True)))


def _is_stack(blocks: nn.ModuleList) -> bool:
    """Whether a list of modules is one of transformer layers: blocks that hold linears."""
    if len(blocks) == 0 or len({type(block) for block in blocks}) > 2:
        return False
    return all(any(widths(m) is not None for m in block.modules()) for block in blocks) and not any(
        widths(block) is not None for block in blocks
    )


def resolve_modules(
    model: nn.Module,
    prefixes: Sequence[str],
    allocation: Allocation,
    targets: Sequence[str] | None,
    system: System | None = None,
) -> dict[str, list[str]]:
    """Block -> full names of the linears to adapt; those without experts are skipped.

    Where the allocation lists linears (by the model's own names), no other is adapted.

    Args:
        targets: ends of names; None: all but those that ``linears.left_out`` names, or what the
            system adapts. ``experts`` are the base's own, of which stacks are named as parameters.
        system: None for plain LoRA.

    Raises:
        HtsrError: a target that is nowhere, or twice in one block; a listed linear that the model
            does not have; the base's own experts for a system.
    """
    if isinstance(targets, str):
        raise HtsrError(
            "build takes target_modules as a list of names.", "Or leave it out for every linear."
        )
    linears = [name for name, module in model.named_modules() if widths(module)]
    experts_too = targets is not None and BASE_EXPERTS in targets
    if experts_too and system is not None:
        raise HtsrError(
            f"{system.title} cannot be put inside the base's own experts.",
            "Plain LoRA can: allocate ranks for it, and train with the system lora.",
        )
    own = own_experts(model) if experts_too else []
    listed = {module.name: module.experts for module in allocation.modules}
    for name in listed:
        if name not in linears:
            raise HtsrError(
                f"The allocation lists {name}, which is not a linear of the model.",
                "Give the model that the allocation was made for.",
            )
    avoided = left_out(model) if targets is None else {}
    for name in listed:
        if name in avoided and listed[name]:
            warnings.warn(f"{name} gets no experts: {avoided[name]}.", stacklevel=2)
    by_kind = targets is None and system is not None and system.feed_forward_only
    usual = set(feed_forward(model)) if by_kind else None
    chosen: dict[str, list[str]] = {}
    unused = set(targets or ())
    for prefix, experts in zip(prefixes, allocation.experts, strict=True):
        inside = [n for n in linears if n.startswith(prefix + ".") and n not in avoided]
        if listed:
            inside = [name for name in inside if name in listed]
        elif usual is not None:
            inside = [n for n in inside if n in usual]
        if targets is not None:
            matched = {t: [n for n in inside if n.endswith("." + t)] for t in targets}
            if experts_too:
                matched[BASE_EXPERTS] = [n for n in own if n.startswith(prefix + ".")]
            for target, names in matched.items():
                if len(names) > 1 and target != BASE_EXPERTS:
                    raise HtsrError(
                        f"{target} is in {prefix} {len(names)} times: {', '.join(names)}.",
                        "Give a longer end of the name for each.",
                    )
                unused -= {target} if names else set()
            wanted = {n for names in matched.values() for n in names}
            inside = [n for n in dict.fromkeys((*inside, *own)) if n in wanted]
        if listed:
            inside = [name for name in inside if listed[name]]
        if len(inside) if listed else experts:
            chosen[prefix] = inside
    if unused:
        raise HtsrError(
            f"The model's layers have no linear {sorted(unused)[0]}.",
            f"Its first layer has {', '.join(n for n in linears if n.startswith(prefixes[0]))}.",
        )
    for prefix, names in chosen.items():
        if not names:
            raise HtsrError(f"{prefix} has no linear to adapt.", "Change target_modules.")
    if not chosen:
        raise HtsrError("No layer has an expert: there is nothing to train.")
    return chosen
