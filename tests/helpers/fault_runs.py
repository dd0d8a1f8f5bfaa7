"""Faults done to a real analysis in a process of its own, and whether anything was lost.

Each of ``FAULTS`` disturbs an analysis of ``bench.model``, checks how it ends, and lets the same
command finish; ``bench.check`` then compares every byte with the undisturbed result. An
``AssertionError`` is a fault that was not survived.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from helpers.bench import MATRICES, Bench
from helpers.commands import ROOT, drop_the_right_to_ignore_permissions

Fault = Callable[["Bench"], None]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    def add(run: Fault) -> Fault:
        FAULTS[name] = run
        return run

    return add


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
        assert "Traceback" not in text or f"{ROOT / 'htsr_alloc'}{os.sep}" not in text, text
        if "Failed to import the site module" in text:  # Python's own end, before any module
            assert process.returncode == 1, (wait, process.returncode, text)
        else:
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
from htsr_alloc.analysis import analyze as analysis
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
from htsr_alloc.analysis import decompose
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
