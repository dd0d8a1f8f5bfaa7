"""Plain LoRA of PEFT, with the allocation as ranks."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from htsr_alloc.allocation.exports.modules import Modules, check_named, named_layers
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation
from htsr_alloc.records.lora import Lora


def to_peft_rank(allocation: Allocation, lora: Lora, modules: Modules | None = None) -> str:
    r"""Keyword arguments of ``peft.LoraConfig``, as JSON: plain LoRA of equal parameter count.

    A layer with N experts of rank r gets rank N r and alpha N lora_alpha, so that the scale
    alpha / r stays the same; a layer with none is not targeted. Keys are escaped names; PEFT
    anchors them itself, as ``(.*\.)?(key)$``. A ``^`` would keep them from modules that a task
    head's class puts under a prefix (``bert.``), which would silently get the plain ``r``.

    Linears that have counts of their own get ranks of their own, and no other is targeted. Counts
    that are ranks already stay as they are.

    Args:
        modules: with it every module has a pattern of its own, checked to match it and nothing
            else; without it there is one pattern a layer and target. Its ``parameters`` become
            ``target_parameters``; of a tensor of experts each expert gets the rank.

    Raises:
        HtsrError: no layer prefixes in the allocation, nothing to target, a prefix without
            modules, modules of a prefix that is not in the allocation, a pattern that does not
            match exactly one module, or dropout on parameters.
    """
    layers = named_layers(allocation)
    check_named(lora, modules)
    if modules is None and not lora.target_modules and not allocation.modules:
        raise HtsrError(
            "PEFT must be told which modules to adapt.",
            "Give `model`, or their names as `target_modules`: q_proj, v_proj, ...",
        )
    unknown = sorted(set(modules.names if modules else ()) - layers.keys())
    if unknown:
        raise HtsrError(
            f"The model has {unknown[0]}, which is not in the allocation.",
            "Give the model that the allocation was made for.",
        )
    if allocation.modules:
        ranks = _listed_ranks(allocation, lora, modules)
    else:
        ranks = _layer_ranks(layers, lora, modules)
    every = _every(modules) if modules is not None else [m.name for m in allocation.modules]
    for target in lora.target_modules if every else ():
        if not any(name == target or name.endswith("." + target) for name in every):
            raise HtsrError(
                f"No layer has a linear {target}.", "Its names are those that htsr inspect lists."
            )
    if not ranks:
        raise HtsrError("No layer has an expert, so that there is nothing to train.")
    named = modules is not None or bool(allocation.modules)
    if named:
        _check_patterns(ranks, every)
    targets = [_unescaped(key) for key in ranks]
    inside = [name for name in targets if modules and name in modules.parameters]
    if inside and lora.lora_dropout:
        raise HtsrError(
            f"PEFT has no dropout on a parameter, as {inside[0]} is.", "Give `lora_dropout` 0."
        )
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": [n for n in targets if n not in inside] if named else _any_of(ranks),
        "rank_pattern": {key: lora.rank(allocation, n) for key, n in ranks.items()},
        "alpha_pattern": {key: lora.alpha(allocation, n) for key, n in ranks.items()},
    }
    if inside:
        config["target_parameters"] = inside
    return json.dumps(config, indent=1) + "\n"


def _every(modules: Modules) -> list[str]:
    return [name for names in modules.names.values() for name in names]


def _layer_ranks(layers: Mapping[str, int], lora: Lora, modules: Modules | None) -> dict[str, int]:
    """Pattern -> experts, of every layer's linears (or, without their names, its targets)."""
    ranks: dict[str, int] = {}
    for prefix, experts in layers.items():
        if not experts:
            continue
        if modules is None:
            keys = [
                rf"{re.escape(prefix)}\.(.*\.)?{re.escape(target)}"
                for target in lora.target_modules
            ]
        else:
            keys = [re.escape(name) for name in _selected(modules, prefix, lora)]
        ranks |= dict.fromkeys(keys, experts)
    return ranks


def _listed_ranks(allocation: Allocation, lora: Lora, modules: Modules | None) -> dict[str, int]:
    """Pattern -> experts, of the linears that the allocation lists."""
    listed = [module for module in allocation.modules if _targeted(module.name, lora)]
    if not listed:
        raise HtsrError(f"The allocation lists no {' or '.join(lora.target_modules)}.")
    ranks = {module.name: module.experts for module in listed if module.experts}
    if modules is not None:
        known = set(_every(modules))
        for name in ranks:
            if name not in known:
                raise HtsrError(
                    f"The allocation lists {name}, which is not a linear of the model.",
                    "Give the model that the allocation was made for.",
                )
    return {re.escape(name): experts for name, experts in ranks.items()}


def _unescaped(pattern: str) -> str:
    return re.sub(r"\\(.)", r"\1", pattern)


def _any_of(patterns: Mapping[str, int]) -> str:
    return rf"(.*\.)?({'|'.join(patterns)})"


def _selected(modules: Modules, prefix: str, lora: Lora) -> list[str]:
    """The layer's modules whose name is a target or ends in one."""
    names = modules.names.get(prefix)
    if not names:
        raise HtsrError(
            f"The model has no module under {prefix}.",
            "Give the model that the allocation was made for.",
        )
    if not lora.target_modules:
        return list(names)
    chosen = [name for name in names if _targeted(name, lora)]
    if not chosen:
        raise HtsrError(
            f"No module under {prefix} is one of {', '.join(lora.target_modules)}; it has "
            f"{', '.join(n.removeprefix(prefix + '.') for n in names)}."
        )
    return chosen


def _targeted(name: str, lora: Lora) -> bool:
    ends = tuple("." + target for target in lora.target_modules)
    return not ends or name.endswith(ends)


def _check_patterns(patterns: Mapping[str, int], modules: Sequence[str]) -> None:
    r"""Each pattern must match one module by PEFT's own rule, ``(.*\.)?(key)$``.

    An escaped name matches the modules that are it or end in it after a dot.
    """
    endings = Counter(
        name[start:]
        for name in modules
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
    )
    for pattern in patterns:
        if endings[_unescaped(pattern)] != 1:
            raise HtsrError(f"The pattern {pattern} does not match exactly one module.")
