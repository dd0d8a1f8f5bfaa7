"""How ``htsr analyze`` scales: with workers on one checkpoint, and with n on square matrices.

python benchmarks/scaling.py FOLDER [--workers 1 2 4] [--sizes 512 1024 2048 4096]
"""

import argparse
import sys
import time
from pathlib import Path

from analyze_vs_peers import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    arguments = parser.parse_args()
    folder = str(arguments.checkpoint.resolve())
    print(f"{arguments.checkpoint.name}: workers, wall s, CPU s, peak MB")
    for workers in arguments.workers:
        command = [sys.executable, "-m", "htsr_alloc", "analyze", folder, "-q"]
        wall, cpu, peak = measure([*command, "--workers", str(workers)])
        print(f"{workers:6} {wall:8.1f} {cpu:8.1f} {peak:8.0f}")
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
