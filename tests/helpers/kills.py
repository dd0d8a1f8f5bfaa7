"""SIGKILL at random moments, many of them: commands forked from a process that has torch imported.

    PYTHONPATH=tests python -c 'from helpers.kills import main; main()' CHAIN COUNT FOLDER

A process forked from one with everything imported is at work after some milliseconds, so that kills
fall into the work. Each of ``CHAINS`` runs one command again and again until ``count`` kills have
hit. What was safe before a kill must be there after it, and what the command ends in must be
the undisturbed result. Prints the counts as JSON.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers.bench import MATRICES, Bench, differing
from helpers.commands import environment

LONGEST = 120  # seconds that a command may take to end
FORKING = multiprocessing.get_context("forkserver")
PRELOADED = (
    "torch.distributed",
    "matplotlib.pyplot",
    "yaml",
    "htsr_alloc.cli.main",
    "htsr_alloc.analysis.analyze",
    "htsr_alloc.analysis.refit",
    "htsr_alloc.checkpoints.open",
)
TRAINING = ("transformers.models.llama", "accelerate", "htsr_alloc.training.run")
TRAINING += ("htsr_alloc.training.study.running", "htsr_alloc.training.study.summary")


def command(arguments: Sequence[str], cwd: Path, said: Path, changes: dict[str, str]) -> None:
    """In the child: ``htsr`` with these arguments; its output goes to the file ``said``."""
    os.chdir(cwd)
    kept = environment(**changes)
    os.environ.clear()
    os.environ.update(kept)
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["htsr", *arguments]
    from htsr_alloc.__main__ import main

    main()


@dataclass
class Counts:
    """What happened to one chain. ``ended`` commands came to their end and were compared."""

    killed: int = 0
    ended: int = 0
    lost: int = 0
    wrong: int = 0
    tracebacks: int = 0
    hangs: int = 0
    failed: str = ""

    @property
    def bad(self) -> bool:
        return bool(self.lost or self.wrong or self.tracebacks or self.hangs or self.failed)


class Chain:
    """A command, what of it is safe at a moment, and its undisturbed result in ``whole``."""

    ranks = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out, self.whole = folder / "out", folder / "whole"
        self.whole.mkdir()
        (folder / "bench").mkdir()
        self.prepare()
        self.out.mkdir(exist_ok=True)
        self.end()  # the first one starts the process that the others are forked from
        self.reset()
        start = time.monotonic()
        self.end()
        self.span = time.monotonic() - start
        self.reset(self.whole)

    def prepare(self) -> None:
        """Make what the command reads."""

    def arguments(self) -> list[str]:
        raise NotImplementedError

    def safe(self) -> int:
        """How much has been written that a kill must not take."""
        return 0

    def whole_or_absent(self) -> bool:
        """Whether a result that stands there is the right one, whatever was killed."""
        return True

    def same(self) -> bool:
        raise NotImplementedError

    def reset(self, keep: Path | None = None) -> None:
        """An empty output folder; its files go to ``keep``."""
        import shutil

        if keep is not None:
            shutil.rmtree(keep)
            shutil.copytree(self.out, keep)
        shutil.rmtree(self.out)
        self.out.mkdir()

    def start(self) -> list[Any]:
        place: dict[str, str] = {}
        if self.ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        processes = []
        for rank in range(self.ranks):
            if self.ranks > 1:
                place |= {"RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
            process = FORKING.Process(
                target=command,
                args=(self.arguments(), self.folder, self.said(rank), place | THREADS),
            )
            process.start()
            processes.append(process)
        return processes

    def said(self, rank: int) -> Path:
        return self.folder / f"said{rank}"

    def end(self) -> None:
        """Run the command to its end."""
        processes = self.start()
        for rank, process in enumerate(processes):
            process.join(LONGEST)
            assert process.exitcode == 0, (process.exitcode, self.said(rank).read_text())


THREADS = {"OMP_NUM_THREADS": "1"}


class Analyze(Chain):
    """``htsr analyze`` of two shards of 48 matrices."""

    def prepare(self) -> None:
        bench = Bench(self.folder / "bench")
        bench.model.rename(self.folder / "m")

    def arguments(self) -> list[str]:
        return ["analyze", "m", "-o", "out/m.metrics.json"]

    def safe(self) -> int:
        journals = list(self.out.glob("m.journal*"))
        if not journals:
            return MATRICES if (self.out / "m.metrics.json").exists() else 0
        return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in journals)

    def whole_or_absent(self) -> bool:
        there = (self.out / "m.metrics.json").exists()
        return not there or differing(self.out, self.whole) == 0

    def same(self) -> bool:
        return differing(self.out, self.whole) == 0 and not list(self.out.glob("*.journal*"))


class TwoProcesses(Analyze):
    """The same by two processes, of which one or both are killed."""

    ranks = 2


class Fit(Chain):
    """``htsr fit``: there is no result, or the whole one."""

    def prepare(self) -> None:
        bench = Bench(self.folder / "bench")
        bench.whole.rename(self.out)

    def arguments(self) -> list[str]:
        return ["fit", "out/m.metrics.json", "--estimator", "median", "-o", "out/f.metrics.json"]

    def whole_or_absent(self) -> bool:
        return not (self.out / "f.metrics.json").exists() or self.same()

    def same(self) -> bool:
        here, there = (
            json.loads((folder / "f.metrics.json").read_text()) for folder in (self.out, self.whole)
        )
        return {**here, "tool": None} == {**there, "tool": None}

    def reset(self, keep: Path | None = None) -> None:
        """The new metrics go, and their source stays."""
        path = self.out / "f.metrics.json"
        if keep is not None:
            (keep / path.name).write_bytes(path.read_bytes())
        path.unlink()


class Train(Chain):
    """``htsr train --resume`` with a checkpoint every second step."""

    def prepare(self) -> None:
        from helpers import training_tiny
        from htsr_alloc.allocation import allocate
        from htsr_alloc.records import dumps

        training_tiny.folder(self.folder / "model")
        training_tiny.write(self.folder / "train.jsonl", training_tiny.learnable_rows(64))
        made = allocate(None, strategy="explicit", experts=(3, 2))
        (self.folder / "a.json").write_text(dumps(made))

    def arguments(self) -> list[str]:
        text = "train a.json --model model --data train.jsonl -o out --resume --device cpu "
        text += "--dtype float32 --lora-dropout 0.1 --lora-r 2 --batch-size 4 --save-every 2"
        return [*text.split(), "--steps", "12"]

    def safe(self) -> int:
        """The number of the newest whole checkpoint."""
        from htsr_alloc.training.saves import newest_whole

        if (self.out / "adapter_model.safetensors").exists():
            return 0  # its checkpoints are deleted
        found, _ = newest_whole(self.out / "checkpoints")
        return 0 if found is None else int(found.name[11:])

    def same(self) -> bool:
        name = "adapter_model.safetensors"
        return (self.out / name).read_bytes() == (self.whole / name).read_bytes()


class Study(Train):
    """``htsr study`` of four cells."""

    def prepare(self) -> None:
        import yaml

        super().prepare()
        from htsr_alloc import Settings, analyze, open_checkpoint
        from htsr_alloc.analysis.outputs import RunFiles

        run_files = RunFiles(self.folder / "tiny.metrics.json")
        analyze(open_checkpoint(self.folder / "model"), Settings("official"), run_files)
        rows = [{"name": "uniform", "main": True}, {"name": "LoRA", "main": True, "system": "lora"}]
        study = {
            "model": "model",
            "metrics": "tiny.metrics.json",
            "results": "out/results.jsonl",
            "experts": 6,
            "r": 2,
            "dtype": "float32",
            "seeds": [1, 2],
            "recipe": {"steps": 3, "batch_size": 4, "learning_rate": 0.01},
            "tasks": {"words": {"train": "train.jsonl", "test": "train.jsonl", "test_rows": 8}},
            "rows": rows,
        }
        (self.folder / "study.yaml").write_text(yaml.safe_dump(study))

    def arguments(self) -> list[str]:
        return ["study", "study.yaml", "--device", "cpu"]

    def _cells(self, folder: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
        from htsr_alloc.training.study.store import Store

        return Store(folder / "results.jsonl").read()

    def safe(self) -> int:
        return len(self._cells(self.out))

    def whole_or_absent(self) -> bool:
        there, wanted = self._cells(self.out), self._cells(self.whole)
        return all(facts(cell) == facts(wanted[key]) for key, cell in there.items())

    def same(self) -> bool:
        return self.whole_or_absent() and self.safe() == len(self._cells(self.whole)) == 4


def facts(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell without what a clock says."""
    return {name: value for name, value in cell.items() if not name.endswith("_s")}


CHAINS: dict[str, tuple[Callable[[Path], Chain], tuple[str, ...]]] = {
    "analyze": (Analyze, PRELOADED),
    "fit": (Fit, PRELOADED),
    "two ranks": (TwoProcesses, PRELOADED),
    "train": (Train, PRELOADED + TRAINING),
    "study": (Study, PRELOADED + TRAINING),
}


def kill(name: str, count: int, folder: Path, seed: int = 0) -> Counts:
    """Kill a chain's command ``count`` times."""
    make, preloaded = CHAINS[name]
    FORKING.set_forkserver_preload([*preloaded, "helpers.kills"])
    counts, draw = Counts(), random.Random(seed)
    try:
        chain = make(folder)
        since = 0
        while counts.killed < count and not counts.bad:
            before, processes = chain.safe(), chain.start()
            # Now and then none: the command comes to its end and is compared.
            wait = draw.uniform(0, chain.span) if since < draw.randint(3, 12) else LONGEST
            _wait(processes, wait, counts)
            hit, since = _strike(chain, processes, draw, counts), since + 1
            counts.killed += hit
            counts.lost += max(0, min(before, chain.safe()) - chain.safe())
            counts.wrong += not chain.whole_or_absent()
            if not hit and not counts.bad:
                counts.ended += 1
                counts.wrong += not chain.same()
                chain.reset()
                since = 0
        if not counts.bad:
            chain.end()
            counts.ended += 1
            counts.wrong += not chain.same()
    except AssertionError as error:
        counts.failed = str(error)[-2000:]
    counts.tracebacks += "Traceback" in counts.failed
    return counts


def _wait(processes: Sequence[Any], seconds: float, counts: Counts) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(p.is_alive() for p in processes):
        time.sleep(0.002)
    counts.hangs += seconds == LONGEST and any(p.is_alive() for p in processes)


def _strike(chain: Chain, processes: Sequence[Any], draw: random.Random, counts: Counts) -> bool:
    """SIGKILL what still runs; of two ranks sometimes one, and SIGTERM then ends the other, as
    torchrun does. What was safe at that moment must be there afterwards.

    Returns:
        Whether a kill hit.
    """
    safe = chain.safe()
    ended = draw.sample(list(processes), draw.randint(1, len(processes)))
    for process in ended:
        process.kill()
    rest = [p for p in processes if p not in ended]
    for process in rest:
        process.join(draw.uniform(0, 0.3))
        process.terminate()
    for process in processes:
        process.join(LONGEST)
        if process.is_alive():
            counts.hangs += 1
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    hit = -signal.SIGKILL in codes
    fine = (0, 1, 143, -signal.SIGTERM, -signal.SIGKILL) if hit else (0,)
    for rank, code in enumerate(codes):
        text = chain.said(rank).read_text(errors="replace") if chain.said(rank).exists() else ""
        if code not in fine or "Traceback" in text:
            counts.failed = f"exit code {code}: {text}"[-2000:]
    counts.lost += max(0, safe - chain.safe()) if hit else 0
    return hit


def main() -> None:
    """Not run as a module of the name, which every child would import again."""
    name, count, folder = sys.argv[1:4]
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    counts = kill(name, int(count), Path(folder), seed)
    print(json.dumps(asdict(counts)))
