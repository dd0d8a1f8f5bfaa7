"""A checkpoint's names of modules -> the model's own, by transformers' conversion map.

transformers 5 renames modules when it loads a checkpoint, and back when it saves one, so that the
names in a checkpoint, which an analysis has, may be in no model.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import Any

from torch import nn

END = ".weight"


class Names:
    """The names of one model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {name for name, _ in model.named_modules()}

    def module(self, name: str) -> str | None:
        """The model's module that is ``name`` in the checkpoint, or in the model; None if none is.

        Args:
            name: a module's, or a block's of them.
        """
        if name in self.modules:
            return name
        renamed = self._forward(name)
        if renamed in self.modules:
            return renamed
        return self._backward.get(name)

    def ends(self, name: str) -> list[str]:
        """The modules whose names end in ``name``."""
        return [module for module in self.modules if module.endswith("." + name)]

    def _transforms(self, old: bool) -> list[Any]:
        """Transformers' renamings of this model; those of ``old`` names, never saved, too."""
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping

        if not isinstance(self.model, PreTrainedModel):
            return []
        return get_model_conversion_mapping(self.model, add_legacy=old)

    @cached_property
    def _loading(self) -> list[Any]:
        return self._transforms(old=True)

    @cached_property
    def _state(self) -> dict[str, Any]:
        return self.model.state_dict()

    def _forward(self, name: str) -> str:
        """As transformers renames a tensor of this module when it loads it."""
        if not self._loading:
            return name
        prefix = getattr(self.model, "base_model_prefix", None)
        renamed = _rename(name + END, self._loading, prefix, self._state).removesuffix(END)
        for found in (renamed, f"{prefix}.{renamed}", renamed.removeprefix(f"{prefix}.")):
            if found in self.modules:
                return found
        return renamed

    @cached_property
    def _backward(self) -> dict[str, str]:
        """Block of a checkpoint -> block of the model, as transformers renames when it saves.

        It changes the beginning of all names only if it did so when it loaded, so that both are
        tried. A numbered part of a name holds the same tensors on both sides; where it does not,
        or several blocks become one, the name is left out.
        """
        from transformers.core_model_loading import PrefixChange

        found: dict[str, set[str]] = defaultdict(set)
        saving = self._transforms(old=False)
        kept = [each for each in saving if not isinstance(each, PrefixChange)]
        for transforms in (saving, kept):
            reverse = [transform.reverse_transform() for transform in transforms[::-1]]
            for name in self._state if reverse else ():
                theirs = _blocks(_rename(name, reverse, reverse=True))
                ours = _blocks(name)
                if len(theirs) == len(ours):
                    for one, other in zip(theirs, ours, strict=True):
                        found[one].add(other)
        return {name: next(iter(ours)) for name, ours in found.items() if len(ours) == 1}


def _rename(
    key: str,
    transforms: list[Any],
    prefix: str | None = None,
    state: dict[str, Any] | None = None,
    reverse: bool = False,
) -> str:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    more = {"reverse": True} if reverse else {}
    return rename_source_key(key, renamings, converters, prefix, state, **more)[0]


def _blocks(name: str) -> list[str]:
    """Every beginning of a name that ends in a number."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal()]
