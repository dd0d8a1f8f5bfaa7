"""The command as a process, and the tiny checkpoints it is given."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "matplotlib", "transformers", "scipy", "numpy", "huggingface_hub", "safetensors"]


class Result(NamedTuple):
    rc: int
    stdout: str
    stderr: str


def environment(**changes: str) -> dict[str, str]:
    """This environment without what would change the command's behaviour, and without a network."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HTSR_", "HUGGING", "COLUMNS", "FORCE_COLOR", "NO_COLOR"))
    }
    return {**kept, "HF_HUB_OFFLINE": "1", **changes}


def apart(what: str, *arguments: object) -> dict[str, Any]:
    """What ``helpers.WHAT.main`` prints as JSON, run in a process of its own."""
    paths = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", f"from helpers.{what} import main; main()", *map(str, arguments)],
        env=environment(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(filter(None, paths))),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    last = (done.stdout.splitlines() or [""])[-1]
    return json.loads(last) if last.startswith("{") else {"failed": done.stderr[-2000:]}


def drop_the_right_to_ignore_permissions() -> None:
    """In a child process of root: file modes apply as to other users (PR_CAPBSET_DROP)."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)


def llama(layers: int = 2, width: int = 64, inner: int = 96, seed: int = 0) -> dict[str, Any]:
    """A tiny LLaMA's tensors, so heavy-tailed that every estimator finds a tail."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> torch.Tensor:
        scale = torch.rand(columns, generator=generator) + 0.2
        return torch.randn(rows, columns, generator=generator) * scale / columns**0.5

    tensors = {"model.embed_tokens.weight": weight(32, width)}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = torch.ones(width)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = weight(width, width)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = weight(inner, width)
        tensors[f"{prefix}.mlp.up_proj.weight"] = weight(inner, width)
        tensors[f"{prefix}.mlp.down_proj.weight"] = weight(width, inner)
    tensors["model.norm.weight"] = torch.ones(width)
    tensors["lm_head.weight"] = weight(32, width)
    return tensors


def write_shards(
    folder: Path,
    parts: Iterable[Mapping[str, Any]],
    *,
    index: bool = True,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A folder of ``model-0000i-of-0000N.safetensors``; one part is ``model.safetensors``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    parts = list(parts)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        name = "model.safetensors" if len(parts) == 1 else name
        save_file(dict(part), folder / name)
        weight_map |= dict.fromkeys(part, name)
    if index and len(parts) > 1:
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
