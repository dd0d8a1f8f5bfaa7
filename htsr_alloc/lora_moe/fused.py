"""The base's own experts as transformers has them: which there are, and how their tensors lie."""

from __future__ import annotations

from torch import nn

from htsr_alloc.checkpoints.rules import STACKS, inputs_first, is_mixture, is_numbered_expert
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.linears import is_plain, widths


def own_experts(model: nn.Module) -> list[str]:
    """The names of a model's own experts: parameters that stack them, and numbered linears.

    Raises:
        HtsrError: a stack that PEFT takes for another layout than it has, or whose layout is not
            known, or a quantised one.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if widths(module) is not None and is_numbered_expert(name):
            found.append(name)
        for last, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{last}"
            if is_mixture(full, parameter.dim()) and parameter.dim() == 3:
                _check_layout(model, full, module)
                if not is_plain(parameter):
                    raise HtsrError(f"{full} is quantised, and its experts cannot have adapters.")
                found.append(full)
    return found


def _check_layout(model: nn.Module, name: str, owner: nn.Module) -> None:
    """Raise HtsrError unless PEFT reads the stack as it lies.

    PEFT goes by ``is_transposed`` of the module, and takes (experts, d_out, d_in) without it.
    """
    said = getattr(owner, "is_transposed", None)
    lies = _inputs_first(model, name)
    lies = said if lies is None else lies
    kind = type(owner).__name__
    if lies is None:
        raise HtsrError(f"How the experts of {name} lie is not known ({kind}).")
    if lies != bool(said):
        raise HtsrError(
            f"PEFT takes the inputs of {name} for its outputs ({kind} is stored as experts, d_in, "
            "d_out, and does not say so).",
            "Adapt other linears.",
        )


def _inputs_first(model: nn.Module, name: str) -> bool | None:
    """Whether a stack is (experts, d_in, d_out), by its sizes and its partner's; None: unknown."""
    for first, second in STACKS:
        for own in (first, second):
            if name.endswith("." + own):
                start = name.removesuffix(own)
                shapes = [_shape(model, start + each) for each in (first, second)]
                return None if None in shapes else inputs_first(*shapes)  # type: ignore[arg-type]
    return None


def _shape(model: nn.Module, name: str) -> tuple[int, ...] | None:
    try:
        return tuple(model.get_parameter(name).shape)
    except AttributeError:
        return None
