"""``htsr analyze`` against its peers on the same checkpoint, whole processes, in turn.

    python benchmarks/analyze_vs_peers.py FOLDER [--rounds 3] [--weightwatcher PYTHON]

Prints wall and CPU seconds and peak memory of each process (the operating system's own account),
the median over the rounds, and the ratio to ours round by round: once with all cores, once with
one thread each. No process spins at a barrier (OMP_WAIT_POLICY=passive). A round in which other
work took more than a tenth of a core gives no ratio (Linux; elsewhere the load is not known, and
the table says so). WeightWatcher wants an environment of its own
(tests/fixtures/make_weightwatcher.py says how); name its python.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
BUSY = 0.1  # cores that other work may take


class Run(NamedTuple):
    """One process: seconds, MB, and how many cores others took meanwhile (NaN: not known)."""

    wall: float
    cpu: float
    peak: float
    others: float


def used() -> float:
    """Seconds that all cores have worked, or were taken by the host (Linux; else NaN)."""
    try:
        text = Path("/proc/stat").read_text()
    except OSError:
        return float("nan")
    user, nice, system, _, _, irq, softirq, steal = map(int, text.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(command: list[str], threads: int | None) -> Run:
    """One process, with as many threads as there are cores, or as many as are given."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    if threads:
        environment |= dict.fromkeys(THREADS, str(threads))
    with tempfile.TemporaryDirectory() as folder:
        before, start = used(), time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall, worked = time.perf_counter() - start, used() - before
    if status:
        sys.exit(f"{' '.join(command)} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return Run(wall, cpu, usage.ru_maxrss / 1024, (worked - cpu) / wall)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(title: str, runs: dict[str, list[Run]]) -> None:
    """Medians, and ratios to ours of the rounds that nothing else disturbed."""
    print(f"\n{title}\n")
    print("| process | wall s | CPU s | peak MB | wall, × ours | CPU, × ours | others, cores |")
    print("|---|---|---|---|---|---|---|")
    for name, rows in runs.items():
        wall, cpu, peak, _ = (statistics.median(column) for column in zip(*rows, strict=True))
        pairs = zip(rows, runs["htsr"], strict=True)
        quiet = [(a, b) for a, b in pairs if not max(a.others, b.others) > BUSY]
        ratios = ["busy", "busy"]
        if quiet:
            ratios = [f"{statistics.median(a[k] / b[k] for a, b in quiet):.2f}" for k in (0, 1)]
        others = f"{max(row.others for row in rows):.2f}"
        print(
            "|",
            " | ".join([name, f"{wall:.1f}", f"{cpu:.1f}", f"{peak:.0f}", *ratios, others]),
            "|",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weightwatcher", metavar="PYTHON", help="a python that has it")
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()
    folder = str(arguments.checkpoint.resolve())
    peers = str((HERE / "peers.py").resolve())
    ours = [sys.executable, "-m", "htsr_alloc", "analyze", folder, "-q"]
    commands = {
        "htsr": [*ours, "--engine", arguments.engine],
        "recipe": [sys.executable, peers, "recipe", folder],
    }
    if arguments.weightwatcher:
        commands["weightwatcher"] = [arguments.weightwatcher, peers, "weightwatcher", folder]
    import torch

    blas = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    print(f"{arguments.checkpoint.name}; {processor()}, {os.cpu_count()} cores; torch ", end="")
    print(f"{torch.__version__} ({blas}); {arguments.rounds} rounds, medians")
    for title, threads in (("All cores", None), ("One thread each", 1)):
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                one = ["--workers", "1"] if threads and name == "htsr" else []
                runs[name].append(measure([*command, *one], threads))
                print(name, *(f"{x:.2f}" for x in runs[name][-1]), file=sys.stderr, flush=True)
        show(title, runs)


if __name__ == "__main__":
    main()
