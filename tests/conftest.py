"""Fixtures shared by all tests: tiny checkpoints, the command run for real, reference data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
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


@pytest.fixture
def model(tmp_path) -> Path:
    """A tiny LLaMA in one file, as the folder ``tmp_path / "tiny"``."""
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    return write_shards(tmp_path / "tiny", [llama()], config=config)


@pytest.fixture(scope="session")
def checkpoint() -> Callable[[str], Path]:
    """The folder of a real checkpoint (``python data/checkpoints.py NAME`` fetches it)."""

    def find(name: str) -> Path:
        folder = ROOT / ".cache" / "checkpoints" / name
        if not folder.is_dir():
            pytest.skip(f"no checkpoint {name}: run python data/checkpoints.py {name}")
        return folder

    return find


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of published values, which are read where they lie and never copied."""
    folder = ROOT.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip("no golden values beside the repository")
    return folder
