"""How ``htsr analyze`` scales: with workers and processes on one checkpoint, and with n.

    python benchmarks/scaling.py FOLDER [--workers 1 2] [--processes 2] [--sizes 512 1024 2048 4096]

Whole runs in turn, one thread a worker: workers of one process, then torchrun's processes of one
worker each. Efficiency is the first row's wall seconds over this row's, times its workers. How many
cores other work took meanwhile is printed beside it: then only CPU seconds mean much.
"""

import argparse
import sys
import time
from pathlib import Path

from analyze_vs_peers import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--processes", type=int, nargs="*", default=[2])
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    arguments = parser.parse_args()
    run = ["htsr_alloc", "analyze", str(arguments.checkpoint.resolve()), "-q", "--workers"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
    commands = {f"{k} workers": (k, [*run, str(k)]) for k in arguments.workers}
    for k in arguments.processes:
        commands[f"{k} torchrun processes"] = (k, [*torchrun, str(k), "-m", *run, "1"])
    print(f"{arguments.checkpoint.name}: wall s, CPU s, MB of the largest, efficiency, others")
    alone = None
    for name, (threads, command) in commands.items():
        wall, cpu, peak, others = measure([sys.executable, "-m", *command], 1)
        alone = alone or wall * threads
        share = alone / wall / threads
        print(f"{name:22} {wall:8.1f} {cpu:8.1f} {peak:8.0f} {share:8.0%} {others:8.2f}")
    import torch  # not before: a child's peak, as Linux counts it, begins at its parent's

    torch.set_num_threads(1)
    print("square float32 matrix, one thread: n, CPU s, CPU s / n^3 relative to the first")
    first = None
    for n in arguments.sizes:
        weight = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
        best = min(_seconds(weight) for _ in range(2))
        first = first or best / n**3
        print(f"{n:6} {best:8.3f} {best / n**3 / first:8.2f}")


def _seconds(weight) -> float:
    from htsr_alloc.spectra.spectrum import spectrum

    start = time.thread_time()
    spectrum(weight)
    return time.thread_time() - start


if __name__ == "__main__":
    main()
