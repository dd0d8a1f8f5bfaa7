"""A configuration of axolotl."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from htsr_alloc.allocation.exports.modules import Modules, check_named, named_layers
from htsr_alloc.allocation.exports.peft_rank import to_peft_rank
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation
from htsr_alloc.records.lora import Lora


def to_axolotl(allocation: Allocation, lora: Lora, modules: Modules | None = None) -> str:
    """The LoRA part of an axolotl configuration (YAML).

    Several ranks are ``lora_rank_pattern`` and ``lora_alpha_pattern``, which axolotl (0.19) hands
    to PEFT. Without names of linears every linear of a layer gets the layer's rank.

    Raises:
        HtsrError: nothing to train; layers whose modules are not known; an alpha that is not whole,
            which axolotl refuses; what ``to_peft_rank`` refuses.
    """
    check_named(lora, modules)
    counts = [row.experts for row in allocation.modules] or allocation.experts
    present = sorted(set(counts) - {0})
    if not present:
        raise HtsrError("No layer has an expert, so that there is nothing to train.")
    config: dict[str, Any] = {"adapter": "lora", "lora_dropout": lora.lora_dropout}
    if modules is not None or allocation.modules or (lora.target_modules and len(present) > 1):
        made = json.loads(to_peft_rank(allocation, lora, modules))
        config |= {"lora_r": made["r"], "lora_alpha": made["lora_alpha"]}
        config["lora_target_modules"] = made["target_modules"]
        config["lora_rank_pattern"] = made["rank_pattern"]
        config["lora_alpha_pattern"] = made["alpha_pattern"]
        if "target_parameters" in made:
            config["lora_target_parameters"] = made["target_parameters"]
    else:
        config |= _by_layers(allocation, lora, present)
    alphas = [config["lora_alpha"], *config.get("lora_alpha_pattern", {}).values()]
    if any(alpha != int(alpha) for alpha in alphas):
        raise HtsrError(
            "axolotl takes whole numbers as alpha, and this `lora_alpha` gives others.",
            f"Give a multiple of {lora.r}.",
        )
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())


def _check_numbers(prefixes: Sequence[str | None]) -> None:
    """Raise HtsrError unless a layer's number is the only one in its block's name.

    PEFT takes ``layers_to_transform`` for numbers in names, and a second stack has them as well.
    """
    for number, prefix in enumerate(prefixes):
        if prefix is not None and re.findall(r"(?<=\.)\d+(?=\.|$)", prefix) != [str(number)]:
            raise HtsrError(
                f"Layer {number} is {prefix}, so that its number does not name it alone.",
                "Give `model`, by which each linear is named.",
            )


def _by_layers(allocation: Allocation, lora: Lora, present: list[int]) -> dict[str, Any]:
    """One pattern a layer at most; which linears it has is for axolotl to find."""
    config: dict[str, Any] = {"lora_target_linear": True}
    if lora.target_modules:
        config = {"lora_target_modules": list(lora.target_modules)}
    if 0 in allocation.experts:
        _check_numbers([row.prefix for row in allocation.evidence])
        chosen = [i for i, n in enumerate(allocation.experts) if n]
        config["peft_layers_to_transform"] = chosen
    if len(present) == 1:
        config["lora_r"] = lora.rank(allocation, present[0])
        config["lora_alpha"] = lora.alpha(allocation, present[0])
        return config
    layers = named_layers(allocation)
    keys = {rf"{re.escape(prefix)}\..*": n for prefix, n in layers.items() if n}
    config |= {"lora_r": lora.r, "lora_alpha": lora.lora_alpha}
    config["lora_rank_pattern"] = {key: lora.rank(allocation, n) for key, n in keys.items()}
    config["lora_alpha_pattern"] = {key: lora.alpha(allocation, n) for key, n in keys.items()}
    return config
