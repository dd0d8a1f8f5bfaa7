"""allocation.json + model -> PeftModel, and a report on each layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from htsr_alloc.allocation import exports as export
from htsr_alloc.checkpoints.layers import MAX_BLOCKS
from htsr_alloc.errors import HtsrError
from htsr_alloc.files import read_bytes
from htsr_alloc.lora_moe.config import LoraMoeConfig
from htsr_alloc.lora_moe.model import layers_of
from htsr_alloc.lora_moe.resolve import renamed, resolve_layers, resolve_modules
from htsr_alloc.lora_moe.systems import DEFAULT, system_of
from htsr_alloc.records import Allocation, loads

LAYERS = re.compile(r"(layers?|blocks|depth)$")  # a configuration's keys for their number


@dataclass(frozen=True)
class LayerReport:
    """One transformer layer of a built model.

    ``experts`` and ``top_k`` are the most that one of its linears has, ``fewest`` the least
    experts; ``top_k`` is None where the system has none. ``share`` is trainable parameters over
    the base's parameters in this layer.
    """

    layer: int
    prefix: str
    experts: int
    top_k: int | None
    modules: int
    trainable: int
    share: float
    fewest: int


def build(model: nn.Module, allocation: Allocation | str | Path, **config: Any) -> PeftModel:
    """Put the allocated experts on a model, in place, as ``get_peft_model`` does.

    The arguments are those of ``config_for``.
    """
    peft_model = get_peft_model(model, config_for(model, allocation, **config))  # type: ignore[arg-type]
    assert isinstance(peft_model, PeftModel)
    return peft_model


def config_for(
    model: nn.Module, allocation: Allocation | str | Path, **config: Any
) -> LoraMoeConfig:
    """The configuration of an allocation's experts on a model, for trainers that take one.

    Args:
        model: a transformers model; one without weights will do.
        allocation: an Allocation, or the path of its file.
        **config: of LoraMoeConfig, but ``num_experts`` and ``expert_pattern``, which the
            allocation is. ``target_modules`` are ends of names and default to every linear of a
            layer, or of a system such as MoR to every feed-forward one; ``top_k`` overrides the
            allocation's.

    Raises:
        HtsrError: the allocation is for another number of layers; a layer or a target is not in
            the model, or there is more than one of it; a system that takes no allocation.
    """
    allocation = load(allocation)
    export.refuse_ranks("A mixture", allocation)
    for name in ("num_experts", "expert_pattern"):
        if name in config:
            raise HtsrError(f"build takes {name} from the allocation.", "Remove it.")
    system = system_of(config.get("system", DEFAULT))
    if not system.takes_allocation:
        raise HtsrError(
            f"{system.title} takes no allocation of experts.",
            f"Use get_peft_model(model, LoraMoeConfig(system={system.name!r})).",
        )
    prefixes = resolve_layers(model, allocation)
    allocation = renamed(model, allocation, prefixes)
    modules = resolve_modules(
        model, prefixes, allocation, config.pop("target_modules", None), system
    )
    targets = [name for names in modules.values() for name in names]
    if allocation.modules:
        listed = {module.name: (module.experts, module.top_k) for module in allocation.modules}
        counts = {name: listed[name] for name in targets}
    else:
        pairs = zip(allocation.experts, allocation.top_k, strict=True)
        counts = dict(zip(prefixes, pairs, strict=True))
    if system.has_top_k and "top_k" not in config:
        config["top_k"] = max(k for _, k in counts.values())
        config.setdefault("top_k_pattern", {})
        for name, (n, k) in counts.items():
            if n and k != min(config["top_k"], n):
                config["top_k_pattern"].setdefault(name, k)
    return LoraMoeConfig(
        target_modules=targets,
        expert_pattern={name: n for name, (n, _) in counts.items() if n},
        **config,
    )


def load(allocation: Allocation | str | Path) -> Allocation:
    """The allocation itself, or read from its file."""
    if isinstance(allocation, Allocation):
        return allocation
    path = Path(allocation)
    return loads(Allocation, read_bytes(path), path.name)


def describe(
    model: nn.Module, prefixes: Sequence[str], adapter: str = "default"
) -> list[LayerReport]:
    """What each layer of a built model got."""
    rows = []
    adapted = [layer for layer in layers_of(model) if adapter in layer.mixture]
    base = getattr(model, "get_base_model", lambda: model)()
    for number, prefix in enumerate(prefixes):
        own = [layer for layer in adapted if layer.name.startswith(prefix + ".")]
        trainable = sum(p.numel() for m in own for p in m.parameters() if p.requires_grad)
        frozen = sum(
            p.numel()
            for n, p in base.get_submodule(prefix).named_parameters()
            if "lora_moe_" not in n
        )
        made = [layer.mixture[adapter] for layer in own]
        counts = [how.experts for how in made] or [0]
        has_k = made and made[0].system.has_top_k
        rows.append(
            LayerReport(
                number,
                prefix,
                experts=max(counts),
                top_k=max(how.top_k for how in made) if has_k else None,
                modules=len(own),
                trainable=trainable,
                share=trainable / frozen,
                fewest=min(counts),
            )
        )
    return rows


def empty_model(folder: Path) -> nn.Module:
    """A model from its config.json alone, on the meta device: shapes without weights.

    Raises:
        HtsrError: no config.json, or one that transformers does not know.
    """
    import torch

    kind, config = _model_class(folder)
    with transformers_errors(f"make a model of {folder}"), torch.device("meta"):
        return kind(config) if "from_config" not in dir(kind) else kind.from_config(config)


def open_model(folder: Path) -> nn.Module:
    """The model itself, in its stored dtype.

    Raises:
        HtsrError: no model that transformers can load, or one with weights left out.
    """
    kind, _ = _model_class(folder)
    model, drawn = open_weights(kind, folder, dtype="auto")
    refuse_drawn(drawn, folder)
    return model


def open_weights(kind: Any, folder: Path, **options: Any) -> tuple[Any, list[str]]:
    """A model by one of transformers' classes, and its parameters that the checkpoint has not.

    transformers has drawn those at random, and says so in a warning alone.

    Raises:
        HtsrError: no model of this kind that transformers can load from safetensors.
    """
    open_config(folder)
    with transformers_errors(f"load {folder}"):
        model, found = kind.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    drawn = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return model, [name for name in names if name in drawn]


def refuse_drawn(drawn: Sequence[str], folder: Path) -> None:
    """Refuse a model with parameters drawn at random.

    Raises:
        HtsrError: there are some; the first is named.
    """
    if drawn:
        raise HtsrError(
            f"{folder} does not hold {drawn[0]}, which would be drawn at random.",
            "Give a checkpoint of the whole model, its head too.",
        )


def open_config(folder: Path) -> Any:
    """A model's configuration.

    Raises:
        HtsrError: no config.json, one that transformers does not know, or too many layers.
    """
    import transformers

    if not (folder / "config.json").is_file():
        raise HtsrError(f"{folder} has no config.json.", "Give a model's folder.")
    with transformers_errors(f"make a model of {folder}"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    _refuse_huge(config.to_dict(), folder)
    return config


def _model_class(folder: Path) -> tuple[Any, Any]:
    import transformers

    config = open_config(folder)
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], transformers.AutoModelForCausalLM), config


def _refuse_huge(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse more layers than any model has, before transformers makes a module of each.

    Raises:
        HtsrError: a number of layers or blocks in the configuration, or in one inside it.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            _refuse_huge(value, folder)
        elif isinstance(value, int) and value > MAX_BLOCKS and LAYERS.search(key):
            raise HtsrError(f"{folder} has {key} {value}: at most {MAX_BLOCKS} are accepted.")


@contextmanager
def transformers_errors(doing: str) -> Iterator[None]:
    """Whatever transformers raises, which checks few types, as one sentence.

    Raises:
        HtsrError: that transformers cannot do it, and its own first line.
    """
    try:
        yield
    except (HtsrError, MemoryError):
        raise
    except Exception as error:
        kind = type(error).__name__
        reason = (str(error).strip().splitlines() or [""])[0] or kind
        own = isinstance(error, ValueError | OSError)  # sentences; others need their kind
        said = reason if own or reason == kind else f"{reason} ({kind})"
        raise HtsrError(f"transformers cannot {doing}: {said}") from error
