"""An allocation's experts as an adapter of axolotl (0.21), by the entry point ``axolotl.plugins``.

adapter: lora_moe
lora_moe:
  allocation: model.allocation.json
  system: alphalora           # and any other setting of LoraMoeConfig
lora_r: 8
lora_alpha: 16
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import (  # pyright: ignore[reportMissingImports]
    AdapterCapabilities,
    BasePlugin,
)
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import config_for

NAME = "lora_moe"


class LoraMoeArgs(BaseModel):
    """The key ``lora_moe`` of an axolotl configuration."""

    lora_moe: dict[str, Any] | None = None


class LoraMoePlugin(BasePlugin):
    """Puts an allocation's experts on axolotl's model, or loads what it saved."""

    def get_input_args(self) -> str:
        """Where axolotl finds the keys that this plugin adds."""
        return f"{LoraMoeArgs.__module__}.{LoraMoeArgs.__name__}"

    def get_adapter_capabilities(self) -> list[Any]:
        """One adapter, which is not one of axolotl's own LoRA."""
        return [AdapterCapabilities(name=NAME)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """The adapted model and its configuration; None for another adapter than ours.

        Raises:
            HtsrError: no allocation, or one that does not fit the model.
        """
        if cfg.adapter != NAME:
            return None
        settings = dict(cfg.lora_moe or {})
        if "allocation" not in settings:
            raise HtsrError(
                "The configuration names no allocation.", "Set `allocation` under lora_moe."
            )
        names = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
        given = {ours: cfg[theirs] for ours, theirs in names.items() if cfg[theirs] is not None}
        config = config_for(model, task_type="CAUSAL_LM", **given, **settings)
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            adapted = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=not inference
            )
            return adapted, adapted.peft_config["default"]
        return get_peft_model(model, config), config
