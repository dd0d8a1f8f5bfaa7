"""Peak memory of ``htsr analyze`` against the number of matrices, and under --max-memory.

    python benchmarks/memory.py [--size 2048] [--counts 10 100] [--workers 2]

Writes float32 checkpoints of that many size x size matrices, analyses each in a process of its own,
and prints the peak the operating system saw beside the bound that `htsr inspect` foretells.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path

from analyze_vs_peers import measure


def write(folder: Path, count: int, size: int) -> None:
    """``count`` layers of one matrix, ten to a shard."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for first in range(0, count, 10):
        part = {
            f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(
                size, size, generator=generator
            )
            for i in range(first, min(first + 10, count))
        }
        save_file(part, folder / f"part{first}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--counts", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    print("matrices, checkpoint MB, --max-memory MB, estimated MB, measured MB, wall s")
    with tempfile.TemporaryDirectory() as root:
        for count in arguments.counts:
            folder = Path(root) / str(count)
            # In a process of its own: a child's peak, as Linux counts it, begins at its parent's.
            writer = multiprocessing.get_context("spawn").Process(
                target=write, args=(folder, count, arguments.size)
            )
            writer.start()
            writer.join()
            htsr = [sys.executable, "-m", "htsr_alloc"]
            inspected = subprocess.run(
                [*htsr, "inspect", str(folder), "--json"], capture_output=True, check=True
            )
            report = json.loads(inspected.stdout)
            analyze = [*htsr, "analyze", str(folder), "-q", "--workers", str(arguments.workers)]
            for bound in (None, report["least_bytes"]):
                limit = [] if bound is None else ["--max-memory", str(bound)]
                wall, _, peak, _ = measure([*analyze, *limit], None)
                estimated = report["peak_bytes"] if bound is None else bound
                shown = "-" if bound is None else f"{bound / 1e6:.0f}"
                print(
                    f"{count:4} {report['bytes'] / 1e6:8.0f} {shown:>6} {estimated / 1e6:6.0f} "
                    f"{peak * 1.048576:6.0f} {wall:6.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
