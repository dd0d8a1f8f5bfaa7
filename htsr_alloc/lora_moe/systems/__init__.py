"""The LoRA-MoE systems, one file each: a module of this folder holds ``SYSTEM`` and gives its name.

A new system is a new file here; ``base.System`` says what it may do otherwise than the others.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.systems.base import Product, System

NAMES = sorted(module.name for module in iter_modules(__path__) if module.name != "base")
SYSTEMS: dict[str, System] = {name: import_module(f"{__name__}.{name}").SYSTEM for name in NAMES}
DEFAULT = "alphalora"

__all__ = ["DEFAULT", "SYSTEMS", "Product", "System", "system_of"]


def system_of(name: str) -> System:
    """The system of this name.

    Raises:
        HtsrError: there is none.
    """
    if name not in SYSTEMS:
        raise HtsrError(f"system cannot be {name!r}.", f"Choose from {', '.join(SYSTEMS)}.")
    return SYSTEMS[name]
