"""allocation.json + model -> PeftModel, and what became of each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from htsr_alloc import export
from htsr_alloc.errors import HtsrError
from htsr_alloc.files import read_bytes
from htsr_alloc.lora_moe.config import DENSE, LoraMoeConfig
from htsr_alloc.lora_moe.tuner import FEED_FORWARD, layers_of
from htsr_alloc.records import Allocation, Evidence, loads


@dataclass(frozen=True)
class LayerReport:
    """One transformer layer of a built model.

    ``top_k`` is None where the system has none; ``share`` is trainable parameters over the
    base's parameters in this layer.
    """

    layer: int
    prefix: str
    experts: int
    top_k: int | None
    modules: int
    trainable: int
    share: float


def build(model: nn.Module, allocation: Allocation | str | Path, **config: Any) -> PeftModel:
    """Put the allocated experts on a model, as ``get_peft_model`` does.

    Args:
        model: a transformers model, adapted in place.
        allocation: an Allocation, or the path of its file.
        **config: of LoraMoeConfig, but ``num_experts`` and ``expert_pattern``, which the
            allocation is. ``target_modules`` are ends of names and default to every linear of a
            layer (for MoR its feed-forward linears); ``top_k`` overrides the allocation's.

    Raises:
        HtsrError: the allocation is for another number of layers; a layer or a target is not in
            the model, or there is more than one of it; a system that takes no allocation.
    """
    allocation = load(allocation)
    for name in ("num_experts", "expert_pattern"):
        if name in config:
            raise HtsrError(f"build takes {name} from the allocation.", "Leave it out.")
    system = config.get("system", "alphalora")
    if system == "em_lora":
        raise HtsrError(
            "EM-LoRA's experts are a layer's linears, so that no allocation of experts applies.",
            "Use get_peft_model(model, LoraMoeConfig(system='em_lora')).",
        )
    prefixes = resolve_layers(model, allocation)
    modules = resolve_modules(
        model, prefixes, allocation, config.pop("target_modules", None), system
    )
    counts = dict(zip(prefixes, allocation.experts, strict=True))
    if system not in DENSE and system != "adamole" and "top_k" not in config:
        config["top_k"] = max(allocation.top_k)
        config.setdefault("top_k_pattern", {})
        for prefix, n, k in zip(prefixes, allocation.experts, allocation.top_k, strict=True):
            if n and k != min(config["top_k"], n):
                config["top_k_pattern"].setdefault(prefix, k)
    made = LoraMoeConfig(
        target_modules=[name for names in modules.values() for name in names],
        expert_pattern={prefix: n for prefix, n in counts.items() if n},
        **config,
    )
    peft_model = get_peft_model(model, made)  # type: ignore[arg-type]
    assert isinstance(peft_model, PeftModel)
    return peft_model


def load(allocation: Allocation | str | Path) -> Allocation:
    """The allocation itself, or read from its file."""
    if isinstance(allocation, Allocation):
        return allocation
    path = Path(allocation)
    return loads(Allocation, read_bytes(path), path.name)


def resolve_layers(model: nn.Module, allocation: Allocation) -> list[str]:
    """The full name of each allocated layer's block, in the allocation's order.

    The evidence's prefixes are looked for as names or ends of names. Without them the one stack
    of blocks with as many layers is taken.

    Raises:
        HtsrError: not exactly one block for a layer, or blocks left over.
    """
    stacks = {
        name: [f"{name}.{i}" for i in range(len(module))]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and _is_stack(module)
    }
    wanted = [row.prefix for row in allocation.evidence if row.prefix is not None]
    count = len(allocation.experts)
    sizes = " and ".join(f"{len(blocks)} ({name})" for name, blocks in stacks.items()) or "none"
    mismatch = HtsrError(
        f"The allocation is for {count} layers, and the model's layers are {sizes}.",
        "Give the model that the allocation was made for.",
    )
    if len(wanted) < count:
        fitting = [blocks for blocks in stacks.values() if len(blocks) == count]
        if len(fitting) != 1:
            raise mismatch
        return fitting[0]
    names = [name for name, _ in model.named_modules()]
    found = []
    for prefix in wanted:
        same = [name for name in names if name == prefix or name.endswith("." + prefix)]
        if len(same) > 1:
            raise HtsrError(f"{prefix} is in the model {len(same)} times: {', '.join(same)}.")
        found += same
    used = {name.rpartition(".")[0] for name in found}
    total = sum(len(blocks) for name, blocks in stacks.items() if name in used)
    if len(found) == 0:
        raise HtsrError(
            f"The model has no module {wanted[0]}; its layers are {sizes}.", mismatch.hint
        )
    if len(found) < count or total != count:
        raise mismatch
    return found


def _is_stack(blocks: nn.ModuleList) -> bool:
    """Whether a list of modules is one of transformer layers: blocks that hold linears."""
    if len(blocks) == 0 or len({type(block) for block in blocks}) > 2:
        return False
    return all(any(_is_linear(m) for m in block.modules()) for block in blocks) and not any(
        _is_linear(block) for block in blocks
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def resolve_modules(
    model: nn.Module,
    prefixes: Sequence[str],
    allocation: Allocation,
    targets: Sequence[str] | None,
    system: str = "alphalora",
) -> dict[str, list[str]]:
    """Block -> full names of the linears to adapt; blocks without experts are left out.

    Raises:
        HtsrError: a target that is nowhere, or twice in one block.
    """
    if isinstance(targets, str):
        raise HtsrError(
            "build takes target_modules as a list of names.", "Or leave it out for every linear."
        )
    linears = [name for name, module in model.named_modules() if _is_linear(module)]
    chosen: dict[str, list[str]] = {}
    unused = set(targets or ())
    for prefix, experts in zip(prefixes, allocation.experts, strict=True):
        inside = [name for name in linears if name.startswith(prefix + ".")]
        if targets is None and system == "mor":
            inside = [n for n in inside if n.rpartition(".")[2] in FEED_FORWARD]
        if targets is not None:
            matched = {t: [n for n in inside if n.endswith("." + t)] for t in targets}
            for target, names in matched.items():
                if len(names) > 1:
                    raise HtsrError(
                        f"{target} is in {prefix} {len(names)} times: {', '.join(names)}.",
                        "Give a longer end of the name for each.",
                    )
                unused -= {target} if names else set()
            inside = [n for n in inside if any(n in names for names in matched.values())]
        if experts:
            chosen[prefix] = inside
    if unused:
        raise HtsrError(
            f"The model's layers have no linear {sorted(unused)[0]}.",
            f"Its first layer has {', '.join(n for n in linears if n.startswith(prefixes[0]))}.",
        )
    for prefix, names in chosen.items():
        if not names:
            raise HtsrError(f"{prefix} has no linear to adapt.", "Change target_modules.")
    if not chosen:
        raise HtsrError("No layer has an expert, so that there is nothing to train.")
    return chosen


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
        how = own[0].mixture[adapter] if own else None
        has_k = how is not None and how.system not in (*DENSE, "adamole")
        rows.append(
            LayerReport(
                number,
                prefix,
                experts=how.experts if how else 0,
                top_k=how.top_k if how and has_k else None,
                modules=len(own),
                trainable=trainable,
                share=trainable / frozen,
            )
        )
    return rows


def control(
    model: nn.Module,
    allocation: Allocation | str | Path,
    *,
    r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    target_modules: Sequence[str] | None = None,
) -> str:
    """The control without routers: arguments of ``peft.LoraConfig``, as JSON.

    Plain LoRA of rank N r on the same modules, by ``rank_pattern`` (``htsr export --to
    peft-rank``); it has the experts' parameters, and none of the routers'.
    """
    allocation = load(allocation)
    prefixes = resolve_layers(model, allocation)
    modules: Mapping[str, list[str]] = resolve_modules(model, prefixes, allocation, target_modules)
    rows = allocation.evidence or [
        Evidence(i, None, None, None, n) for i, n in enumerate(allocation.experts)
    ]
    named = tuple(
        dataclasses.replace(row, prefix=prefix) for row, prefix in zip(rows, prefixes, strict=True)
    )
    lora = export.Lora(r, lora_alpha, lora_dropout)
    everywhere = {prefix: modules.get(prefix, [prefix]) for prefix in prefixes}
    return export.to_peft_rank(dataclasses.replace(allocation, evidence=named), lora, everywhere)


def empty_model(folder: Path) -> nn.Module:
    """A model from its config.json alone, on the meta device: shapes without weights.

    Raises:
        HtsrError: no config.json, or one that transformers does not know.
    """
    import torch

    kind, config = _model_class(folder)
    with torch.device("meta"):
        return kind(config) if "from_config" not in dir(kind) else kind.from_config(config)


def open_model(folder: Path) -> nn.Module:
    """The model itself, in its stored dtype.

    Raises:
        HtsrError: no model that transformers can load.
    """
    kind, _ = _model_class(folder)
    try:
        return kind.from_pretrained(folder, dtype="auto")
    except (ValueError, OSError) as error:
        raise _cannot(folder, error) from None


def _model_class(folder: Path) -> tuple[Any, Any]:
    import transformers

    if not (folder / "config.json").is_file():
        raise HtsrError(f"{folder} has no config.json.", "Give a model's folder.")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise _cannot(folder, error) from None
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], transformers.AutoModelForCausalLM), config


def _cannot(folder: Path, error: Exception) -> HtsrError:
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return HtsrError(f"transformers cannot make a model of {folder}: {reason}")
