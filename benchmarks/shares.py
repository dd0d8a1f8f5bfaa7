"""Where the CPU time of ``htsr analyze`` goes: one worker, whole run, share of each part.

    python benchmarks/shares.py FOLDER
    HF_ENDPOINT=URL python benchmarks/shares.py ORG/NAME --stream     byte ranges of a hub

Reading goes on beside the linear algebra, so that what it takes is not what it adds.
"""

import argparse
import functools
import importlib
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
PARTS = {  # part -> functions, each named where it is looked up
    "read, with its hash": ["checkpoints.open:Checkpoint.read"],
    "look for NaN and Inf": ["spectra.spectrum:_inspect"],
    "Gram matrix, with upcast": ["spectra.engines:gram"],
    "eigenvalues of it": ["spectra.engines:symmetric_eigenvalues"],
    "least eigenvalues": ["spectra.engines:least", "spectra.spectrum:smallest"],
    "R of float64 W": ["spectra.spectrum:_triangle"],
    "fit and errors": ["analysis.analyze:_assemble"],
    "write": ["analysis.analyze:_write", "analysis.journal:Journal.add"],
}


def timed(part, function, spent):
    @functools.wraps(function)
    def run(*args, **kwargs):
        start = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.thread_time() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="a folder, or with --stream a hub id")
    parser.add_argument("--stream", action="store_true")
    arguments = parser.parse_args()
    start, spent = os.times(), defaultdict(float)
    for part, names in PARTS.items():
        for name in names:
            module, _, path = name.partition(":")
            owner = importlib.import_module(f"htsr_alloc.{module}")
            *classes, last = path.split(".")
            for own in classes:
                owner = getattr(owner, own)
            setattr(owner, last, timed(part, getattr(owner, last), spent))
    from htsr_alloc.analysis.analyze import analyze
    from htsr_alloc.analysis.decompose import Limits
    from htsr_alloc.checkpoints.open import open_checkpoint

    imported = os.times()
    spent["imports"] = imported.user + imported.system - start.user - start.system
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "x.metrics.json")
        shards = "stream" if arguments.stream else "keep"
        began = time.monotonic()
        checkpoint = open_checkpoint(arguments.checkpoint, shards=shards)
        analyze(checkpoint, output=output, limits=Limits(workers=1))
        wall = time.monotonic() - began
    now = os.times()
    total = now.user + now.system - start.user - start.system
    spent["the rest"] = total - sum(spent.values())
    name = Path(arguments.checkpoint).name
    print(f"{name}: {total:.1f} CPU seconds, {wall:.1f} of wall after imports, one worker\n")
    for part, seconds in sorted(spent.items(), key=lambda x: -x[1]):
        print(f"| {part} | {seconds:.2f} | {seconds / total:.1%} |")


if __name__ == "__main__":
    main()
