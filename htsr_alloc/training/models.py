"""Models to train and to evaluate: opened in a dtype, adapted by a system and an allocation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from htsr_alloc import files
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.build import build, control, open_config
from htsr_alloc.lora_moe.config import LoraMoeConfig
from htsr_alloc.lora_moe.systems import DEFAULT, SYSTEMS
from htsr_alloc.records import Allocation
from htsr_alloc.records.lora import Lora
from htsr_alloc.spectra.devices import choose_device
from htsr_alloc.training.bounds import check_patterns
from htsr_alloc.training.causal import refuse_unless_causal
from htsr_alloc.training.settings import DTYPES

LORA = "lora"  # plain LoRA of the allocation's ranks, without routers


@dataclass(frozen=True)
class Adapter:
    """What is put on a model; the defaults are the AlphaLoRA paper's.

    Plain LoRA gets rank N r, rounded, on a layer of N experts; r may then be a fraction.
    """

    system: str = DEFAULT
    r: float = Lora.r
    lora_alpha: float = Lora.lora_alpha
    lora_dropout: float = Lora.lora_dropout
    target: tuple[str, ...] = ()  # empty: every linear of a layer

    def put_on(self, model: Any, allocation: Allocation | Path | None) -> PeftModel:
        """The adapted model.

        Raises:
            HtsrError: an unknown system; an allocation where the system takes none, or none where
                it takes one; an allocation that does not fit the model.
        """
        system = SYSTEMS.get(self.system)
        if system is None and self.system != LORA:
            raise HtsrError(
                f"There is no system {self.system!r}.",
                f"Choose from {', '.join((*SYSTEMS, LORA))}.",
            )
        if system is not None and not system.takes_allocation:
            if allocation is not None:
                raise HtsrError(
                    f"{system.title} takes no allocation of experts.", "Remove the allocation."
                )
        elif allocation is None:
            raise HtsrError(f"{self.system} needs an allocation file.", "htsr allocate writes one.")
        targets: Sequence[str] | None = list(self.target) or None
        shared: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": targets,
        }
        if allocation is None:
            config = LoraMoeConfig(system=self.system, task_type="CAUSAL_LM", **shared)
            return get_peft_model(model, config)  # type: ignore[return-value]
        if self.system == LORA:
            plain = json.loads(control(model, allocation, **shared))
            plain["r"] = max(1, round(self.r))
            plain["rank_pattern"] = whole_ranks(plain["rank_pattern"])
            config = LoraConfig(task_type="CAUSAL_LM", **plain)
            return get_peft_model(model, config)  # type: ignore[return-value]
        return build(model, allocation, system=self.system, task_type="CAUSAL_LM", **shared)


def whole_ranks(ranks: Mapping[str, float]) -> dict[str, int]:
    """Each module's rank as a whole number; what rounding takes, the next modules get."""
    made, carry = {}, 0.0
    for name, rank in ranks.items():
        made[name] = max(1, round(rank + carry))
        carry += rank - made[name]
    return made


def open_causal_lm(folder: Path, dtype: torch.dtype) -> Any:
    """A causal language model with its weights in ``dtype``.

    Raises:
        HtsrError: no model that transformers can load from safetensors, or one that is not causal.
    """
    from transformers import AutoModelForCausalLM

    open_config(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except (ValueError, OSError, KeyError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise HtsrError(f"transformers cannot load {folder}: {reason}") from None
    refuse_unless_causal(model, str(folder))
    return model


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
    if asked not in DTYPES:
        raise HtsrError(f"There is no dtype {asked!r}.", f"Choose from {', '.join(DTYPES)}.")
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


def silence() -> None:
    """No progress bars and no advice from transformers: what is said is said by the command."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
