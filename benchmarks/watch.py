"""A LoRA product's spectrum by QR of its factors against making it and taking its svdvals.

    python benchmarks/watch.py [--shapes 4096x4096 11008x4096] [--ranks 8 16 64] [--rounds 5]

One thread. ``product_spectrum`` is what ``watch`` and ``WatchCallback`` call for each LoRA module
or expert; ``dense`` forms the float64 m x n matrix and calls svdvals, at most once a shape and
rank. CPU times, medians; the three metrics of both must agree.
"""

import argparse
import statistics
import time

import torch

from htsr_alloc.spectra.estimators import fit, stable_rank
from htsr_alloc.watching import product_spectrum


def timed(function, rounds):
    """The median of ``rounds`` CPU times in ms, and the last result."""
    times, result = [], None
    for _ in range(rounds):
        start = time.process_time()
        result = function()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times), result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "4096x4096", "11008x4096"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-dense", action="store_true", help="only the factors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| shape | r | factors, ms | dense, ms | dense / factors |\n|---|---|---|---|---|")
    for shape in args.shapes:
        m, n = map(int, shape.split("x"))
        for r in args.ranks:
            generator = torch.Generator().manual_seed(r)
            a = torch.randn(r, n, generator=generator)
            b = torch.randn(m, r, generator=generator)
            ours, found = timed(lambda a=a, b=b: product_spectrum(a, b, 2.0), args.rounds)
            if args.no_dense:
                print(f"| {m} x {n} | {r} | {ours:.2f} | | |", flush=True)
                continue
            dense, values = timed(
                lambda a=a, b=b: torch.linalg.svdvals(2 * b.double() @ a.double()), 1
            )
            kept = values[:r].flip(0).numpy() ** 2
            for measure in (stable_rank, lambda x: fit(x, "median").alpha):
                first, second = measure(found.eigenvalues), measure(kept)
                assert abs(first - second) <= 1e-8 * abs(second), (first, second)
            print(
                f"| {m} x {n} | {r} | {ours:.2f} | {dense:.0f} | {dense / ours:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
