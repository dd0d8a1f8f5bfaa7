"""The modules that are trained and saved whole beside an adapter: a head, a new pooler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft.utils import ModulesToSaveWrapper
from torch import nn


def heads_of(model: nn.Module) -> list[str]:
    """The modules beside the base model: a classifier, a pooler of its own."""
    base = model.base_model_prefix
    return [
        name
        for name, module in model.named_children()
        if name != base and any(True for _ in module.parameters())
    ]


def saved_in(model: nn.Module) -> list[str]:
    """The modules that an adapter holds whole, by their names in the model itself."""
    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    ]


def under(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of these, or inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def outermost(names: Iterable[str]) -> list[str]:
    """The modules that are inside no other of them."""
    kept: list[str] = []
    for name in sorted(names):
        if not under(name, kept):
            kept.append(name)
    return kept
