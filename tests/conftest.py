"""Fixtures shared by all tests: tiny checkpoints, the command run for real, reference data."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers.commands import ROOT, Result, environment, llama, write_shards

# Before numpy is imported: the threads of one decomposition wait for each other, for minutes where
# the machine is busy.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")


@pytest.fixture
def run(tmp_path) -> Callable[..., Result]:
    """Run ``htsr`` as a process of its own in ``tmp_path``."""

    def go(*args: object, env: Mapping[str, str] | None = None, **options: Any) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "htsr_alloc", *map(str, args)],
            **{"cwd": tmp_path, "timeout": 120, "encoding": "utf-8", **options},
            env=environment(**(env or {})),
            capture_output=True,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return go


@pytest.fixture
def invoke(tmp_path, monkeypatch) -> Callable[..., Result]:
    """The same command inside this process, which saves the import of torch."""
    from typer.testing import CliRunner

    from htsr_alloc.cli.main import app

    for name in ("HTSR_DEBUG", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def go(*args: object) -> Result:
        done = CliRunner().invoke(app, [str(arg) for arg in args])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Result(done.exit_code, done.stdout, done.stderr)

    return go


@pytest.fixture(scope="module")
def tiny_hub(tmp_path_factory):
    """A hub of this machine with the repository org/tiny, three shards."""
    from helpers.hubs import model_files, serving

    folder = tmp_path_factory.mktemp("hub")
    model_files(folder / "tiny")
    with serving(folder) as hub:
        yield hub


@pytest.fixture
def model(tmp_path) -> Path:
    """A tiny LLaMA in one file, as the folder ``tmp_path / "tiny"``."""
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    return write_shards(tmp_path / "tiny", [llama()], config=config)


@pytest.fixture(scope="session")
def checkpoint() -> Callable[[str], Path]:
    """The folder of a real checkpoint, fetched by the first test that asks for it.

    Without a network the test is skipped with the reason, on CI it fails. MPNet (405 MB) is not
    fetched: its tests run where ``python data/checkpoints.py mpnet`` has.
    """
    cache = ROOT / ".cache"
    command = [sys.executable, str(ROOT / "data" / "checkpoints.py")]

    @functools.cache
    def fetch(name: str) -> str:
        """Why the checkpoint is not there, or nothing."""
        cache.mkdir(exist_ok=True)
        with FileLock(cache / f"{name}.lock"):  # one of several pytest processes at a time
            if (cache / "checkpoints" / name).is_dir():
                return ""
            if name == "mpnet":
                return "run python data/checkpoints.py mpnet"
            done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return lines[-1] if done.returncode else ""

    def find(name: str) -> Path:
        if reason := fetch(name):
            give_up = pytest.fail if "CI" in os.environ and name != "mpnet" else pytest.skip
            give_up(f"no checkpoint {name}: {reason}")
        return cache / "checkpoints" / name

    return find


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """Published values of a model, from ``tests/fixtures/golden``; each file names its origin."""
    folder = ROOT / "tests" / "fixtures" / "golden"
    return lambda name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
