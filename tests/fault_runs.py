"""Faults done to a real analysis in a process of its own, and whether anything was lost.

Each of ``FAULTS`` disturbs an analysis of ``bench.model``, checks how it ends, and lets the same
command finish; ``bench.check`` then compares every byte with the undisturbed result. An
``AssertionError`` is a fault that was not survived.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import drop_the_right_to_ignore_permissions, environment, write_shards

Fault = Callable[["Bench"], None]
FAULTS: dict[str, Fault] = {}
MATRICES = 48


def fault(name: str) -> Callable[[Fault], Fault]:
    def add(run: Fault) -> Fault:
        FAULTS[name] = run
        return run

    return add


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
        self.lost = self.tracebacks = self.killed = 0
        self.finish(self.whole)

    @property
    def journal(self) -> Path:
        return self.out / "m.journal"

    def finished(self) -> int:
        """Matrices that are safe: whole lines of the journal but its first."""
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
        """Until that many matrices are safe, or the process has ended."""
        deadline = time.monotonic() + 120
        while self.finished() < count and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def finish(self, out: Path | None = None) -> None:
        """The same command to its end, in this process, which has torch already."""
        from htsr_alloc import Settings, analyze, open_checkpoint
        from htsr_alloc.analysis import RunFiles

        output = RunFiles((out or self.out) / "m.metrics.json")
        analyze(open_checkpoint(self.model), Settings("official"), output)

    def check(self) -> None:
        """Both files are the undisturbed ones, and nothing lies beside them; then start afresh."""
        wrong = differing(self.out, self.whole)
        self.lost += wrong
        beside = {path.name for path in self.out.iterdir()} - {p.name for p in self.whole.iterdir()}
        for path in self.out.iterdir():
            path.unlink()
        assert not wrong, f"{wrong} matrices lost or changed"
        assert not beside, beside


def differing(one: Path, other: Path) -> int:
    """Matrices whose record differs; all of them where anything else does."""
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


def kill_repeatedly(bench: Bench, kills: int) -> int:
    """SIGKILL at random moments until ``kills`` have hit; how many analyses they went through.

    Every other kill comes right after a matrix was journaled, the rest at any time from the start
    of the process on. What is safe before a kill must be there after it.
    """
    bench.killed = analyses = 0
    while bench.killed < kills:
        process, safe = bench.start(), bench.finished()
        if bench.killed % 2:
            bench.wait_for(safe + bench.random.randint(1, 6), process)
            time.sleep(bench.random.random() * 0.03)
        else:
            time.sleep(bench.random.random() * 3)
        safe = bench.finished()
        process.kill()
        process.communicate()
        bench.killed += process.returncode == -signal.SIGKILL
        if (bench.out / "m.metrics.json").exists() and not bench.journal.exists():
            analyses += 1
            bench.check()
        elif not (bench.out / "m.metrics.json").exists():
            bench.lost += max(0, safe - bench.finished())
    bench.finish()
    for path in bench.out.glob(".*.tmp"):  # what a kill in the last write leaves
        path.unlink()
    bench.check()
    return analyses + 1


def interrupt(bench: Bench, number: signal.Signals, code: int, said: str) -> None:
    process = bench.start()
    bench.wait_for(bench.random.randint(2, 12), process)
    process.send_signal(number)
    bench.end(process, code, said)
    assert bench.finished() >= 2
    bench.finish()
    bench.check()


@fault("Ctrl-C")
def _(bench: Bench) -> None:
    interrupt(bench, signal.SIGINT, 130, "interrupted; the same command goes on")


@fault("SIGTERM")
def _(bench: Bench) -> None:
    interrupt(bench, signal.SIGTERM, 143, "terminated; the same command goes on")


@fault("Ctrl-C while modules are imported")
def _(bench: Bench) -> None:
    for wait in (0.1, 0.3, 0.6, 1.0, 1.4):
        process = bench.start()
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
        bench.tracebacks += "Traceback" in text
        # In the first moments Python itself is starting, and says so in its own way.
        assert "Traceback" not in text or "htsr_alloc" not in text, text
        assert process.returncode in (130, -signal.SIGINT), (wait, process.returncode, text)
    bench.finish()
    bench.check()


@fault("a second run on the same output")
def _(bench: Bench) -> None:
    process = bench.start()
    bench.wait_for(3, process)
    process.send_signal(signal.SIGSTOP)
    bench.end(bench.start(), 1, "Another run is writing")
    process.send_signal(signal.SIGCONT)
    bench.end(process, 0)
    bench.check()


def limited(size: int) -> Callable[[], None]:
    """In the child: no file may grow beyond this."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@fault("no room in the journal")
def _(bench: Bench) -> None:
    bench.end(bench.start(preexec_fn=limited(40_000)), 1, "File too large")
    assert bench.finished() >= 3
    bench.finish()
    bench.check()


@fault("no room for the results")
def _(bench: Bench) -> None:
    patch = """
import resource
from htsr_alloc import analysis
write = analysis._write
def full(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return write(*args)
analysis._write = full"""
    bench.end(bench.start(patch), 1, "File too large")
    assert bench.finished() == MATRICES
    bench.finish()
    bench.check()


@fault("a full disk")
def _(bench: Bench) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(bench.out)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return  # no right to mount: the two limits above stand for it
    try:
        bench.end(bench.start(), 1, "No space left on device")
        assert bench.finished() >= 3
        remount = ["mount", "-o", "remount,size=8m", str(bench.out)]
        subprocess.run(remount, check=True)
        bench.finish()
        bench.check()
    finally:
        subprocess.run(["umount", str(bench.out)], check=True)


@fault("a folder that cannot be written to")
def _(bench: Bench) -> None:
    bench.out.chmod(0o555)
    try:
        process = bench.start(preexec_fn=drop_the_right_to_ignore_permissions)
        bench.end(process, 1, "Permission denied")
    finally:
        bench.out.chmod(0o755)
    bench.finish()
    bench.check()


def changed(bench: Bench, change: Callable[[Path], object]) -> None:
    """The second shard changes while the first is analysed; then it is put back."""
    shard = sorted(bench.model.glob("*.safetensors"))[1]
    data, status = shard.read_bytes(), shard.stat()
    process = bench.start()
    bench.wait_for(2, process)
    process.send_signal(signal.SIGSTOP)
    change(shard)
    process.send_signal(signal.SIGCONT)
    text = bench.end(process, 1)
    assert shard.name in text
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert bench.finished() >= 2
    bench.finish()
    bench.check()


@fault("a shard cut short while it is read")
def _(bench: Bench) -> None:
    changed(bench, lambda shard: os.truncate(shard, shard.stat().st_size // 2))


@fault("a shard written to while it is read")
def _(bench: Bench) -> None:
    changed(bench, lambda shard: shard.write_bytes(shard.read_bytes()[::-1]))


@fault("a shard deleted while it is read")
def _(bench: Bench) -> None:
    changed(bench, Path.unlink)


def at_the_tenth(what: str) -> str:
    return f"""
import itertools, os, signal
from htsr_alloc.running import decompose
real, calls = decompose.spectrum, itertools.count(1)
def broken(*args, **options):
    if next(calls) == 10:
        {what}
    return real(*args, **options)
decompose.spectrum = broken"""


@fault("a worker out of memory")
def _(bench: Bench) -> None:
    bench.end(bench.start(at_the_tenth("raise MemoryError")), 1, "not enough memory for h.")
    assert bench.finished() >= 5
    bench.finish()
    bench.check()


@fault("a worker that crashes")
def _(bench: Bench) -> None:
    crash = "os.kill(os.getpid(), signal.SIGSEGV)"
    bench.end(bench.start(at_the_tenth(crash)), -signal.SIGSEGV)
    assert bench.finished() >= 5
    bench.finish()
    bench.check()


@fault("a clock that jumps")
def _(bench: Bench) -> None:
    patch = """
import random, time
jumps = random.Random(0)
time.time = lambda: jumps.uniform(0, 2**33)
time.time_ns = lambda: int(time.time() * 1e9)"""
    process = bench.start(patch)
    bench.wait_for(4, process)
    process.kill()
    process.communicate()
    if bench.journal.exists():
        os.utime(bench.journal, (2**33, 2**33))
    bench.end(bench.start(patch), 0)
    bench.check()
