"""What is adapted in a model, and by which products: PEFT's LoRA, and the LoRA-MoE tuner's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from htsr_alloc.errors import HtsrError

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Product:
    """s B A of one adapter, or of one expert of it.

    Attributes:
        a: (r, d_in). b: (d_out, r). scale: s.
        residual: (R, d_in) and (d_out, R), whose product is taken off the weight; or None.
        sums: whether the adapted weight is W + s B A (not so for DoRA).
    """

    adapter: str
    expert: int | None
    a: Tensor
    b: Tensor
    scale: float
    residual: tuple[Tensor, Tensor] | None = None
    sums: bool = True


@dataclass(frozen=True)
class Linear:
    """A linear of the model: its name without PEFT's prefix, its module, its frozen base."""

    name: str
    module: Any
    base: nn.Module

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in).

        Raises:
            HtsrError: it is quantised, sharded over processes, or merged with an adapter.
        """
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        if getattr(self.module, "merged", False):
            raise HtsrError(f"{self.name} has an adapter merged into it.", "Unmerge it first.")
        if hasattr(weight, "full_tensor") or weight.dim() != 2:
            raise _sharded(f"The weight of {self.name}")
        if not weight.is_floating_point():
            raise HtsrError(f"{self.name} is quantised.", "Watch its products only: kinds=['ba'].")
        return weight.detach().t() if type(self.base).__name__ == "Conv1D" else weight.detach()

    def products(self) -> list[Product]:
        """Of the active adapters, expert by expert.

        Raises:
            HtsrError: factors that are sharded over processes.
        """
        found = list(self._products())
        for product in found:
            if any(hasattr(x, "full_tensor") or x.dim() != 2 for x in (product.a, product.b)):
                raise _sharded(f"The adapter of {self.name}")
        return found

    def _products(self) -> list[Product]:
        if hasattr(self.module, "lora_moe_A"):
            return [
                Product(name, **vars(found))
                for name in self.module.active_adapters
                if name in self.module.mixture
                for found in self.module.products(name)
            ]
        if not hasattr(self.module, "lora_A"):
            return []
        dora = getattr(self.module, "use_dora", {})
        return [
            Product(
                name,
                None,
                self.module.lora_A[name].weight.detach(),
                self.module.lora_B[name].weight.detach(),
                float(self.module.scaling[name]),
                sums=not dora.get(name, False),
            )
            for name in self.module.active_adapters
            if name in self.module.lora_A
        ]


def linears(model: nn.Module) -> Iterator[Linear]:
    """Every linear of a model, an adapted one as one."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        plain = name.removeprefix(PEFT_PREFIX)
        if hasattr(module, "lora_A") or hasattr(module, "lora_moe_A"):
            inside = (*inside, name + ".")
            base = getattr(module, "base_layer", None)
            if base is not None and _is_linear(base):
                yield Linear(plain, module, base)
        elif _is_linear(module):
            yield Linear(plain, module, module)


def _sharded(what: str) -> HtsrError:
    return HtsrError(
        f"{what} is not whole on this process.",
        "Watch without FSDP and ZeRO-3, or analyze a saved checkpoint.",
    )


def _is_linear(module: nn.Module) -> bool:
    kind = type(module).__name__
    return isinstance(module, nn.Linear) or kind == "Conv1D" or "Linear" in kind
