"""A saved adapter's linears as GatedLora records, without the model it was trained on."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.config import LoraMoeConfig
from htsr_alloc.lora_moe.gated import GatedLora
from htsr_alloc.lora_moe.layer import LoraMoeLinear, Mixture
from htsr_alloc.lora_moe.register import LORA_MOE, NAME
from htsr_alloc.lora_moe.systems import SYSTEMS

PREFIX = "base_model.model."  # PEFT's, before every name in an adapter's file
CONFIG = "adapter_config.json"
ADAPTER = "saved"
ELSE = "Load it with PEFT."


def is_mixture(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of this package."""
    path = Path(folder) / CONFIG
    return path.is_file() and json.loads(path.read_text("utf-8")).get("peft_type") == LORA_MOE


def read_gated(folder: str | Path) -> dict[str, GatedLora]:
    """Every adapted linear of a saved adapter, by its full name in the model.

    Args:
        folder: with adapter_config.json and the adapter's tensors, on this machine.

    Raises:
        HtsrError: another kind of adapter, one that holds more than experts and routers, tensors
            that do not fit the configuration, or EM-LoRA, which has no gate for each token.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraMoeConfig):
        raise HtsrError(
            f"{folder} is a {config.peft_type} adapter and not a {LORA_MOE} one.",
            "PEFT and the servers take it as it is.",
        )
    for held in (config.modules_to_save, config.trainable_token_indices):
        if held:
            raise HtsrError(
                f"{folder} also holds trained modules or tokens ({', '.join(map(str, held))}), "
                "which are not part of a LoRA.",
                ELSE,
            )
    SYSTEMS[config.system].serves()
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_peft_weights(str(folder), device="cpu").items():
        module, _, name = key.removeprefix(PREFIX).rpartition(f".{NAME}_")
        if not module:
            raise HtsrError(f"{folder} also holds {key}, which is not part of a LoRA.", ELSE)
        found[module][name.removesuffix(".weight")] = tensor
    return {name: _gated(name, own, config) for name, own in found.items()}


def _gated(name: str, own: dict[str, Tensor], config: LoraMoeConfig) -> GatedLora:
    """One linear's tensors, seen as a system sees a layer's."""
    system = SYSTEMS[config.system]
    n = config.experts_of(name)
    if not {"A", "B"} <= own.keys():
        raise HtsrError(f"The adapter's {name} has {', '.join(own)} and not A and B.")
    d_in, d_out = own["A"].shape[1], own["B"].shape[0]
    wanted = system.shapes(config, n, d_in, d_out)
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    if shapes != wanted:
        raise HtsrError(
            f"The adapter's {name} holds {shapes}, and its configuration says {wanted}.",
            "Its two files do not belong together: save it again.",
        )
    how = Mixture(system, config, n, config.top_k_of(name), system.scale(config, d_in))
    kinds = (*LoraMoeLinear.adapter_layer_names, *LoraMoeLinear.frozen_names)
    held = {kind: {} for kind in kinds}
    held.update({f"{NAME}_{key}": {ADAPTER: tensor} for key, tensor in own.items()})
    return system.gated(SimpleNamespace(mixture={ADAPTER: how}, **held), ADAPTER)
