"""Every ``python`` and ``bash`` block of the documentation runs.

A page's blocks run in order, in one folder that has MiniLM's checkpoint, metrics and spectra.
``<!-- skip: next -->`` before a block leaves it out; blocks of another language are not run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT, environment

pytest.importorskip("sybil", reason="needs the dependency group test")

from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINS = {"build.md", "lora.md", "watch.md"}  # need the extra [train]


def run_bash(example) -> None:
    """The block as a script that stops at the first failure."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example.parsed],
        env=environment(PATH=f"{Path.cwd() / 'bin'}{os.pathsep}{os.environ['PATH']}"),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, f"{example.parsed}\n{done.stdout}\n{done.stderr}"


def examples(page: Path):
    parsers = (PythonCodeBlockParser(), CodeBlockParser("bash", run_bash), SkipParser())
    return list(Document.parse(str(page), *parsers).examples())


@pytest.fixture
def folder(tmp_path, monkeypatch, checkpoint) -> Path:
    """A folder with the files and commands that the pages use."""
    for name in ("minilm.metrics.json", "minilm.spectra.safetensors"):
        shutil.copy(ROOT / "data" / name, tmp_path)
    shutil.copy(
        ROOT / "data" / "smollm2.allocation.json", tmp_path / "Llama-2-7b-hf.allocation.json"
    )
    (tmp_path / "minilm").symlink_to(checkpoint("minilm"))
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "checkpoints").symlink_to(ROOT / ".cache" / "checkpoints")
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(checkpoint("minilm"))
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "htsr"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m htsr_alloc "$@"\n')
    command.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.checkpoints
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, folder):
    if page.name in TRAINS:
        pytest.importorskip("peft", reason="needs the extra [train]")
        pytest.importorskip("transformers", reason="needs the extra [train]")
    for example in examples(page):
        example.evaluate()


def test_blocks_are_found():
    found = {page.name: len(examples(page)) for page in PAGES}
    assert found["ALLOCATION.md"] >= 9
    assert all(found[name] for name in ("README.md", "analyze.md", "allocate.md", *TRAINS))


def test_a_block_that_fails_is_a_failure(folder):
    """The runner itself: a wrong command and a wrong statement do not pass."""
    for text in ("```bash\nhtsr allocate nothing.json --T 3\n```\n", "```python\n1 / 0\n```\n"):
        (folder / "wrong.md").write_text(text)
        (example,) = examples(folder / "wrong.md")
        with pytest.raises((AssertionError, ZeroDivisionError)):
            example.evaluate()
