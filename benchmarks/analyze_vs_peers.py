"""``htsr analyze`` against its peers on the same checkpoint, whole processes, in turn.

    python benchmarks/analyze_vs_peers.py FOLDER [--rounds 3] [--weightwatcher PYTHON]

Prints wall and CPU seconds and peak memory of each process (the operating system's own account),
the median over the rounds, and the ratio to ours round by round. WeightWatcher wants an
environment of its own (tests/fixtures/make_weightwatcher.py says how); name its python.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def measure(command: list[str]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak MB) of one process."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            runs[name].append(measure(command))
            print(name, *(f"{x:.1f}" for x in runs[name][-1]), file=sys.stderr, flush=True)
    print(
        f"{arguments.checkpoint.name}, {os.cpu_count()} cores, {arguments.rounds} rounds, medians"
    )
    print(
        f"{'':>14} {'wall s':>8} {'CPU s':>8} {'peak MB':>8} {'wall ratio':>11} {'CPU ratio':>10}"
    )
    for name, rows in runs.items():
        wall, cpu, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        pairs = list(zip(rows, runs["htsr"], strict=True))
        ratios = [statistics.median(a[k] / b[k] for a, b in pairs) for k in (0, 1)]
        print(f"{name:>14} {wall:8.1f} {cpu:8.1f} {peak:8.0f} {ratios[0]:11.2f} {ratios[1]:10.2f}")


if __name__ == "__main__":
    main()
