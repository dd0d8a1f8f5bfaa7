"""A small study: its plan, its files, its lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from helpers import training_tiny

ROWS: list[dict[str, Any]] = [
    {"name": "untrained", "system": "none"},
    {"name": "uniform", "main": True},
    {"name": "LoRA", "main": True, "system": "lora"},
    {"name": "MoLA", "strategy": "mola", "groups": "13"},
]
PLAN: dict[str, Any] = {
    "model": "model",
    "metrics": "tiny.metrics.json",
    "results": "results.jsonl",
    "experts": 6,
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "dtype": "float32",
    "seeds": [1, 2],
    "recipe": {"steps": 3, "batch_size": 4, "learning_rate": 0.01},
    "tasks": {
        "words": {"train": "train.jsonl", "test": "test.jsonl", "test_rows": 20},
        "choices": {"train": "choices.jsonl", "test": "choices.jsonl", "test_rows": 20},
    },
    "rows": ROWS,
}


def files(folder: Path, invoke: Any) -> Path:
    """A tiny model, its metrics and two tasks."""
    training_tiny.folder(folder / "model")
    done = invoke("analyze", "model", "-o", "tiny.metrics.json", "-q")
    assert done.rc == 0, done.stderr
    training_tiny.write(folder / "train.jsonl", training_tiny.learnable_rows(40))
    training_tiny.write(folder / "test.jsonl", training_tiny.learnable_rows(30, seed=1))
    training_tiny.write(folder / "choices.jsonl", training_tiny.choice_rows(30))
    return folder


def saved(folder: Path, data: Any) -> Path:
    """study.yaml."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    """A results file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
