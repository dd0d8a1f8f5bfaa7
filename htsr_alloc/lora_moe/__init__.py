"""LoRA-MoE systems as one PEFT tuner (extra ``train``).

Importing this makes PEFT know the adapters: ``PeftModel.from_pretrained`` and the trainers of the
ecosystem then load and save them like any other.
"""

from __future__ import annotations

from htsr_alloc.errors import HtsrError

try:
    import peft  # noqa: F401
except ImportError as error:
    raise HtsrError(
        f"LoRA-MoE needs PEFT, which cannot be imported ({error}).",
        "pip install 'htsr-alloc[train]'",
    ) from None

from htsr_alloc.lora_moe.build import build, config_for
from htsr_alloc.lora_moe.callbacks import RouterLossCallback, router_aux_loss
from htsr_alloc.lora_moe.collapse import Collapsed, collapse
from htsr_alloc.lora_moe.config import LoraMoeConfig
from htsr_alloc.lora_moe.model import LoraMoeModel
from htsr_alloc.lora_moe.resolve import linears_of
from htsr_alloc.lora_moe.routing import RouterReport, plot_routing, routing_report
from htsr_alloc.lora_moe.systems.em_lora.bilevel import BilevelMixin, activation_parameters
from htsr_alloc.lora_moe.systems.em_lora.figure import plot_activations
from htsr_alloc.lora_moe.systems.em_lora.generation import after_prompt

__all__ = [
    "BilevelMixin",
    "Collapsed",
    "LoraMoeConfig",
    "LoraMoeModel",
    "RouterLossCallback",
    "RouterReport",
    "activation_parameters",
    "after_prompt",
    "build",
    "collapse",
    "config_for",
    "linears_of",
    "plot_activations",
    "plot_routing",
    "router_aux_loss",
    "routing_report",
]
