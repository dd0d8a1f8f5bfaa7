"""Models to train and to evaluate: opened in a dtype, on a device, with a trained adapter."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer

from htsr_alloc import files
from htsr_alloc.errors import HtsrError, check_choice
from htsr_alloc.lora_moe.build import open_config, open_weights, refuse_drawn
from htsr_alloc.lora_moe.state import state_in
from htsr_alloc.records.text import printable
from htsr_alloc.spectra.devices import choose_device
from htsr_alloc.training.bounds import check_patterns
from htsr_alloc.training.causal import refuse_unless_causal
from htsr_alloc.training.settings import DTYPES


def open_causal_lm(folder: Path, dtype: torch.dtype) -> Any:
    """A causal language model with its weights in ``dtype``; of images and text too, for texts.

    Raises:
        HtsrError: no model that transformers can load from safetensors, one with weights left out,
            or one that is not causal.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = type(open_config(folder))
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    kind = next((kind for kind in kinds if config in kind._model_mapping), AutoModelForCausalLM)
    model, drawn = open_weights(kind, folder, dtype=dtype)
    refuse_drawn(drawn, folder)
    refuse_unless_causal(model, str(folder))
    return model


def refuse_unread(model: Any) -> None:
    """Refuse adapters that texts never reach, as those of a vision tower.

    Raises:
        HtsrError: there are some, and what to allocate instead.
    """
    if not hasattr(model.config, "vision_config"):
        return
    adapted: dict[str, Any] = {
        n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }
    seen: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
        for name, module in adapted.items()
    ]
    size = model.config.get_text_config().vocab_size
    ids = torch.tensor([[size // 5, 2 * size // 5]], device=model.device)
    was = model.training
    with torch.inference_mode():
        model.eval()(input_ids=ids)
    model.train(was)
    for handle in handles:
        handle.remove()
    unread = [name for name in adapted if name not in seen]
    if unread:
        raise HtsrError(
            f"{len(unread)} of {len(adapted)} adapted linears read no text; the first is "
            f"{unread[0].removeprefix('base_model.model.')}.",
            "Allocate the language model alone: htsr allocate --stack language_model.",
        )


def head_labels(folder: Path) -> tuple[str, ...]:
    """The classes of the head that a model's folder holds, in its order; none without a head."""
    path = folder / "config.json"
    if not path.is_file():
        raise HtsrError(f"{folder} has no config.json.", "Give a model's folder.")
    try:
        config = json.loads(files.read_bytes(path))
        kinds, names = config.get("architectures") or [], config.get("id2label") or {}
        if not any(str(kind).endswith("Classification") for kind in kinds):
            return ()
        return tuple(str(names[i]) for i in sorted(names, key=int))
    except (ValueError, AttributeError, RecursionError) as error:
        raise HtsrError(f"{path} is not a model's configuration: {error}.") from None


def open_adapter(model: Any, folder: Path) -> PeftModel:
    """A trained adapter on its model, of any PEFT type, LoRA-MoE too.

    Raises:
        HtsrError: no adapter that PEFT can load.
    """
    if not (folder / "adapter_config.json").is_file():
        raise HtsrError(f"{folder} has no adapter_config.json.", "Give the folder htsr train made.")
    try:
        config = files.parse_json(files.read_bytes(folder / "adapter_config.json").decode("utf-8"))
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise HtsrError(f"adapter_config.json of {folder} is not JSON: {why}.") from None
    if not isinstance(config, dict):
        raise HtsrError(f"adapter_config.json of {folder} is not an object.")
    check_patterns(config, [name for name, _ in model.named_modules()])
    if (kind := config.get("peft_type")) not in [str(own.value) for own in PeftType]:
        raise HtsrError(
            f"{folder} is of a type that this PEFT does not have: {printable(str(kind))}.",
            "Adapters that a fork of PEFT has saved are not read: train them again.",
        )
    try:
        return PeftModel.from_pretrained(model, folder)
    except (HtsrError, MemoryError):
        raise
    except Exception as error:  # PEFT checks no types: a wrong one can raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HtsrError(f"PEFT cannot load {folder} on this model: {reason}") from None


def device_of(asked: str) -> torch.device:
    """``auto`` is CUDA where there is one, then MPS, then the CPU.

    Raises:
        HtsrError: a device that is not there.
    """
    return torch.device(choose_device(asked, float64=False))


def refuse_data_parallel(device: torch.device, processes: int) -> None:
    """The Trainer would copy the model to every visible GPU, which loses the routers' state.

    Raises:
        HtsrError: one process, and several GPUs.
    """
    count = torch.cuda.device_count()
    if device.type == "cuda" and processes == 1 and count > 1:
        raise HtsrError(
            f"One process trains on one GPU, and {count} are visible.",
            f"Use torchrun --nproc-per-node {count} -m htsr_alloc ..., or CUDA_VISIBLE_DEVICES=0.",
        )


def dtype_of(asked: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device computes in it, else float32.

    Raises:
        HtsrError: another name.
    """
    check_choice("dtype", asked, DTYPES)
    if asked == "auto":
        asked = "bfloat16" if _has_bfloat16(device) else "float32"
    return getattr(torch, asked)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in probes)
    return False


def trainable(model: Any) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def cache_name(model: Any) -> str:
    """What a model calls its keys and values, as an argument and in its output.

    transformers calls them ``cache`` from 5.24 on, and warns of the name of before.
    """
    return "cache" if "cache" in _arguments(model) else "past_key_values"


def takes_kept_logits(model: Any) -> bool:
    """Whether the model makes logits of those tokens alone that ``logits_to_keep`` names.

    EM-LoRA does not: its routers read the prompt, which whole rows of labels tell.
    """
    state = state_in(model)
    by_prompts = state is not None and bool(state.block_routers)
    return "logits_to_keep" in _arguments(model) and not by_prompts


def _arguments(model: Any) -> Mapping[str, inspect.Parameter]:
    own = model.get_base_model() if isinstance(model, PeftModel) else model
    return inspect.signature(own.forward).parameters


def silence() -> None:
    """No progress bars and no advice from transformers: what is said is said by the command."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
