"""Plain LoRA of an allocation: the control without routers, and ranks inside a base's experts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig
from torch import nn

from htsr_alloc.allocation import exports as export
from htsr_alloc.allocation.units import BASE_EXPERTS
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.build import load
from htsr_alloc.lora_moe.linears import base_weight, is_plain, widths
from htsr_alloc.lora_moe.resolve import renamed, resolve_layers, resolve_modules
from htsr_alloc.records import Allocation


def control(
    model: nn.Module,
    allocation: Allocation | str | Path,
    *,
    r: int = export.Lora.r,
    lora_alpha: float = export.Lora.lora_alpha,
    lora_dropout: float = export.Lora.lora_dropout,
    target_modules: Sequence[str] | None = None,
) -> str:
    """The control without routers: arguments of ``peft.LoraConfig``, as JSON.

    Plain LoRA of rank N r on the same modules, by ``rank_pattern`` (``htsr export --to
    peft-rank``); it has the experts' parameters, and none of the routers'.
    """
    named, modules = plain_modules(model, allocation, target_modules)
    return export.to_peft_rank(named, export.Lora(r, lora_alpha, lora_dropout), modules)


def plain_modules(
    model: nn.Module, allocation: Allocation | str | Path, targets: Sequence[str] | None = None
) -> tuple[Allocation, export.Modules]:
    """The allocation in the model's own names, and what of the model plain LoRA adapts.

    Args:
        targets: ends of linears' names, or ``experts``; None: those that ranks were counted for,
            or every linear that ``build`` adapts.

    Raises:
        HtsrError: an allocation or targets that do not fit the model; experts that PEFT cannot
            adapt.
    """
    allocation = load(allocation)
    prefixes = resolve_layers(model, allocation)
    named = renamed(model, allocation, prefixes)
    chosen = _chosen(model, named, prefixes, targets)
    modules = dict(model.named_modules())
    every = [name for names in chosen.values() for name in names]
    stacks = {name for name in every if name not in modules}
    weights = {
        name: f"{name}.weight"
        for name in _taken_for_experts(model, [n for n in every if n not in stacks])
    }
    for name in weights:
        if not is_plain(base_weight(modules[name])):
            raise HtsrError(
                f"PEFT takes {name} for a part of the experts, and it is quantised.",
                "Name other linears as `target_modules`.",
            )
    names = {  # a prefix without experts is not asked for its linears
        prefix: [weights.get(name, name) for name in chosen.get(prefix, [prefix])]
        for prefix in prefixes
    }
    listed = tuple(replace(m, name=weights.get(m.name, m.name)) for m in named.modules)
    parameters = frozenset(stacks) | frozenset(weights.values())
    return replace(named, modules=listed), export.Modules(names, parameters)


def _chosen(
    model: nn.Module,
    allocation: Allocation,
    prefixes: Sequence[str],
    targets: Sequence[str] | None,
) -> Mapping[str, Sequence[str]]:
    """Block -> names of what is adapted; with a warning where ranks cost another number of
    parameters than the allocation counted.

    The roles that ranks were counted for are words of the checkpoint, which transformers may not
    use. If all that ``build`` adapts costs what was counted, they are all of it.
    """
    known = allocation.strategy.targets if allocation.strategy is not None else None
    counted = allocation.parameters
    if not allocation.holds_ranks or counted is None or set(targets or ()) != set(known or ()):
        return resolve_modules(model, prefixes, allocation, targets)
    if BASE_EXPERTS not in (known or ()):
        every = resolve_modules(model, prefixes, allocation, None)
        if _cost(model, allocation, every) == counted.spent:
            return every
    chosen = resolve_modules(model, prefixes, allocation, targets)
    cost = _cost(model, allocation, chosen)
    if cost != counted.spent:
        warnings.warn(
            f"The allocation counted {counted.spent:,} trainable parameters, and these are "
            f"{cost:,}: transformers splits or joins matrices of this checkpoint.",
            stacklevel=3,
        )
    return chosen


def _cost(model: nn.Module, allocation: Allocation, chosen: Mapping[str, Sequence[str]]) -> int:
    """The parameters of an allocation's ranks on these linears and stacks."""
    by_layer = {row.prefix: row.experts for row in allocation.evidence}
    ranks = {name: by_layer[prefix] for prefix, names in chosen.items() for name in names}
    ranks |= {m.name: m.experts for m in allocation.modules if m.name in ranks}
    return sum(rank * _width(model, name) for name, rank in ranks.items())


def _width(model: nn.Module, name: str) -> int:
    """The parameters of one rank on a linear, or on each expert of a stack."""
    owner, _, last = name.rpartition(".")
    stack = dict(model.get_submodule(owner).named_parameters(recurse=False)).get(last)
    if stack is not None:
        return stack.shape[0] * sum(stack.shape[1:])
    return sum(widths(model.get_submodule(name)) or ())


def _taken_for_experts(model: nn.Module, names: Sequence[str]) -> set[str]:
    """The linears whose names PEFT would change into those of the experts' tensors.

    It does so for adapters that were made with transformers 4, by the last word of a name, also
    where that is a shared expert's linear or one of a layer without experts (DeepSeek-V3).
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def taken(last: str) -> bool:
        config = LoraConfig(target_modules=[last])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of several that are joined
            return True
        return bool(config.target_parameters)

    found = {last: taken(last) for last in {name.rpartition(".")[2] for name in names}}
    return {name for name in names if found[name.rpartition(".")[2]]}
