"""An analysis in a process of its own, to be disturbed, and its undisturbed result."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from helpers.commands import environment, write_shards

MATRICES = 48


class Bench:
    """A checkpoint of two shards, its undisturbed result, and a folder to write to.

    Args:
        folder: empty; everything goes there.
        seed: of the random moments.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        parts: list[dict[str, Any]] = [{}, {}]
        for i in range(MATRICES):
            weight = torch.randn(448, 384, generator=generator).bfloat16()
            parts[i * 2 // MATRICES][f"h.{i}.mlp.w.weight"] = weight
        self.model = write_shards(folder / "m", parts)
        self.random = random.Random(seed)
        self.out, self.whole = folder / "out", folder / "whole"
        self.out.mkdir()
        self.whole.mkdir()
        self.lost = self.tracebacks = 0
        self.finish(self.whole)

    @property
    def journal(self) -> Path:
        return self.out / "m.journal"

    def finished(self) -> int:
        """Matrices that are saved: whole lines of the journal after the first."""
        if not self.journal.exists():
            return 0
        return max(0, self.journal.read_bytes().count(b"\n") - 1)

    def start(self, patch: str = "", **options: Any) -> subprocess.Popen[str]:
        """The command in a process of its own, after some lines of Python that break something."""
        script = f"{patch}\nfrom htsr_alloc.__main__ import main\nmain()"
        arguments = ["analyze", str(self.model), "-o", str(self.out / "m.metrics.json")]
        return subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=environment(OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            **options,
        )

    def end(self, process: subprocess.Popen[str], code: int, said: str = "") -> str:
        """Wait for the process: its exit code, one sentence, no traceback."""
        _, text = process.communicate(timeout=120)
        self.tracebacks += "Traceback" in text
        assert "Traceback" not in text, text
        assert process.returncode == code, (process.returncode, text)
        assert said in text, text
        return text

    def wait_for(self, count: int, process: subprocess.Popen[str]) -> None:
        """Wait until so many matrices are saved, or the process has ended."""
        deadline = time.monotonic() + 120
        while self.finished() < count and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def finish(self, out: Path | None = None) -> None:
        """The same command to its end, in this process, which has torch already."""
        from htsr_alloc import Settings, analyze, open_checkpoint
        from htsr_alloc.analysis.outputs import RunFiles

        output = RunFiles((out or self.out) / "m.metrics.json")
        analyze(open_checkpoint(self.model), Settings("official"), output)

    def check(self) -> None:
        """Both files equal the undisturbed ones and no other file is left; then delete them."""
        wrong = differing(self.out, self.whole)
        self.lost += wrong
        beside = {path.name for path in self.out.iterdir()} - {p.name for p in self.whole.iterdir()}
        for path in self.out.iterdir():
            path.unlink()
        assert not wrong, f"{wrong} matrices lost or changed"
        assert not beside, beside


def differing(one: Path, other: Path) -> int:
    """Matrices with another record; all of them if anything else differs."""
    here, there = ((folder / "m.metrics.json") for folder in (one, other))
    if not here.exists():
        return MATRICES
    data, wanted = json.loads(here.read_text()), json.loads(there.read_text())
    data["tool"]["created"] = wanted["tool"]["created"]
    spectra = "m.spectra.safetensors"
    if (one / spectra).read_bytes() != (other / spectra).read_bytes():
        return MATRICES
    known = {m["tensor"]: m for m in data.pop("matrices")}
    wrong = sum(known.get(m["tensor"]) != m for m in wanted.pop("matrices"))
    return MATRICES if data != wanted else wrong
