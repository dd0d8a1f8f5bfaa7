"""The names of the LoRA-MoE systems, without importing torch."""

from __future__ import annotations

from pathlib import Path
from pkgutil import iter_modules

import htsr_alloc


def system_names() -> list[str]:
    """The keys of ``lora_moe.systems.SYSTEMS``: each system is a module of that folder."""
    folder = Path(htsr_alloc.__file__).parent / "lora_moe" / "systems"
    return [module.name for module in iter_modules([str(folder)]) if module.name != "base"]
