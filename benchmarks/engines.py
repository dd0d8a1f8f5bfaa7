"""Every engine on one thread, by shape: time, share of the measured gemm peak, error.

    python benchmarks/engines.py [--shapes 512x512 4096x4096 11008x4096] [--repeats 2]

CPU seconds of the thread, minimum of the repeats. The share counts m n^2 + 4/3 n^3 flops (the Gram
matrix by symmetry, the tridiagonalisation) against gemm's rate in the engine's own precision,
measured in the same run. The error is that of the least, the largest and alpha (`official`)
against float64 svdvals, which --no-error leaves out: it takes longest by far.

    python benchmarks/engines.py --parts 512 1024 1536 4096

times the parts of `exact`, and says how near each comes to gemm's peak.

    python benchmarks/engines.py --singular 1024 2048 4096

times what is done with a square matrix whose least eigenvalue a Gram matrix cannot tell from zero.

    python benchmarks/engines.py --guard CHECKPOINT [...]

holds the float32 route's errors on the rectangular matrices of checkpoints, on 60 synthetic ones
and on hard ones (hard.py), to the bound that guards it, and counts what the route does with each.
"""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from hard import hard, hard_entries
from peers import alpha_peak
from synthetic import weight

from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.spectra import certificate, engines, lapack
from htsr_alloc.spectra.band import symmetric_band
from htsr_alloc.spectra.estimators import fit
from htsr_alloc.spectra.smallest import smallest

SHAPES = ["512x512", "1024x1024", "1536x576", "2048x2048", "4096x4096", "11008x4096"]


def clock(function, repeats: int) -> tuple[float, object]:
    """(least CPU seconds of this thread, result)."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.thread_time()
        result = function()
        best = min(best, time.thread_time() - start)
    return best, result


def gemm_peak(dtype: torch.dtype, n: int = 2048) -> float:
    """flop/s of one n x n x n product on one thread, by the faster of torch and OpenBLAS."""
    a = torch.randn(n, n, dtype=dtype)
    seconds = [clock(lambda: a @ a, 3)[0]]
    library = lapack.load()
    if library is not None:
        x, out = a.numpy().T, torch.empty_like(a).numpy().T
        seconds.append(clock(lambda: library.gemm("N", "N", 1.0, x, x, 0.0, out), 3)[0])
    return 2 * n**3 / min(seconds)


def parts(n: int, peak: float) -> None:
    """CPU seconds of each part of ``exact`` on an n x n matrix, and its share of gemm's peak.

    Beside them, the products that the first stage is made of, at full size: n x n by its width.
    """
    library, kd = lapack.load(), engines.bandwidth(n)
    matrix = weight(n, n, torch.Generator().manual_seed(0))
    gram, a = clock(lambda: engines.gram(matrix), 3)
    rows = [("Gram matrix, syrk", gram, n**3)]
    if kd:
        x, total = np.ones((n, kd), order="F"), a.copy(order="F")
        by, _ = clock(lambda: library.symm(a, x, np.empty_like(x)), 3)
        to, _ = clock(lambda: library.syr2k(x, x, total), 3)
        seconds, band = clock(lambda: symmetric_band(library, a.copy(order="F"), kd), 2)
        rows += [(f"to a band of {kd}, symmetric_band", seconds, 4 / 3 * n**3)]
        rows += [(f"  of it, symm by {kd} columns", by, 2 * n * n * kd)]
        rows += [(f"  of it, syr2k of {kd} columns", to, 2 * n * n * kd)]
        seconds, (d, e) = clock(lambda: library.sb2st(band.copy(order="F")), 2)
        rows += [("chasing its bulges, sytrd_sb2st", seconds, 6 * n * n * kd)]
    else:
        seconds, (d, e) = clock(lambda: library.sytrd(a.copy(order="F")), 3)
        rows += [("to a tridiagonal, sytrd", seconds, 4 / 3 * n**3)]
    rows += [("its eigenvalues, sterf", clock(lambda: library.sterf(d, e), 3)[0], 0)]
    for name, seconds, flops in rows:
        share = f"{flops / seconds / peak:8.0%}" if flops else ""
        print(f"{n:6} {name:33} {seconds:8.4f} {share}", flush=True)


def singular(n: int) -> None:
    """CPU seconds of ``exact``, inverse iteration and an SVD, on two columns that nearly agree."""
    matrix = weight(n, n, torch.Generator().manual_seed(0), 0.3).float()
    matrix[:, 5] = matrix[:, 6] * (1 + 1e-7)
    first, (values, _) = clock(lambda: engines.exact(matrix), 2)
    second, low = clock(lambda: smallest(matrix.double(), values), 2)
    last, every = clock(lambda: torch.linalg.svdvals(matrix.double()).flip(0).numpy(), 2)
    error = "none" if low is None else f"{abs(low - every[: len(low)]).max() / every[-1]:.0e}"
    print(f"{n}x{n}: exact {first:.2f}, inverse iteration {second:.2f}, SVD {last:.2f}; {error}")


def guard(sources: list[str]) -> None:
    """The worst error of the float32 route, as a share of ``float32_error``, and what it does.

    Errors are of spectra that the route does not give up for other reasons.
    """
    worst: defaultdict[str, float] = defaultdict(float)
    done: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for source, tall in rectangular(sources):
        found = engines.guarded(tall, 100)
        done[source][found[1] if found else "not certain"] += 1
        exact = engines.exact(tall)[0]
        gram = engines.gram(tall, np.float32)
        two = engines.symmetric_eigenvalues(gram.copy(order="F"), engines.WIDTHS[4])
        for values in (two, engines.symmetric_eigenvalues(gram)):
            error = certificate.float32_error(values)
            if values[0] >= certificate.LEAST * error[0] and not certificate.crowded(values, error):
                share = float((abs(values - exact) / error).max())
                worst[source] = max(worst[source], share)
    for source, counts in done.items():
        print(f"{source}: {dict(counts)}, worst error {worst[source]:.0%} of the bound")


def rectangular(sources: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(where from, W) with W (m, n), m >= 1.5 n."""
    for source in sources:
        checkpoint = open_checkpoint(source)
        found = map_layers(checkpoint.tensors, num_hidden_layers=checkpoint.num_hidden_layers)
        for matrix in found.matrices:
            weight_ = checkpoint.read(matrix.ref, matrix.index)
            tall = weight_ if weight_.shape[0] >= weight_.shape[1] else weight_.T
            if tall.shape[0] >= engines.TALL * tall.shape[1]:
                yield source, tall
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        n = 64 << seed % 5
        m = int(n * (1.5, 2.7, 4.0)[seed % 3])
        yield "synthetic", weight(m, n, generator)
    for _, tall in hard((48, 144, 384, 1024), 2):
        yield "hard", tall
    for _, tall in hard_entries((1536, 2048, 4096)):
        yield "hard, large", tall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-error", action="store_true")
    parser.add_argument("--parts", type=int, nargs="+", metavar="N", help="only time exact's parts")
    parser.add_argument("--singular", type=int, nargs="+", metavar="N", help="only near-singular")
    parser.add_argument("--guard", nargs="+", metavar="CHECKPOINT", help="only check that bound")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.guard:
        return guard(arguments.guard)
    if arguments.singular:
        for n in arguments.singular:
            singular(n)
        return None
    peak = {"float64": gemm_peak(torch.float64), "float32": gemm_peak(torch.float32)}
    print("gemm peak of one core, GFLOP/s:", {k: round(v / 1e9) for k, v in peak.items()})
    if arguments.parts:
        for n in arguments.parts:
            parts(n, peak["float64"])
        return None
    print(
        f"{'shape':>11} {'engine':>13} {'CPU s':>8} {'of peak':>8}   errors: least, largest, alpha"
    )
    for text in arguments.shapes:
        m, n = (int(x) for x in text.split("x"))
        matrix = weight(m, n, torch.Generator().manual_seed(0))
        flops = min(m, n) ** 2 * max(m, n) + 4 / 3 * min(m, n) ** 3
        tall = matrix if m >= n else matrix.T
        exact = None
        if not arguments.no_error:
            exact = torch.linalg.svdvals(tall.double()).flip(0).numpy() ** 2
        seconds, _ = clock(lambda w=matrix: torch.linalg.svdvals(w.float()), 1)
        print(f"{text:>11} {'svdvals f32':>13} {seconds:8.3f}", flush=True)
        for name, engine in engines.ENGINES.items():
            if name == "cuda":
                continue
            seconds, (values, how) = clock(lambda e=engine, w=tall: e(w, 100), arguments.repeats)
            share = flops / seconds / peak[how.split()[0]]
            errors = ""
            if exact is not None:
                alphas = fit(values).alpha / fit(exact).alpha
                errors = (
                    f"{abs(values[0] / exact[0] - 1):.0e} {abs(values[-1] / exact[-1] - 1):.0e}"
                )
                errors += f" {abs(alphas - 1):.0e}"
            print(
                f"{text:>11} {name:>13} {seconds:8.3f} {share:8.0%}   {errors}  {how}", flush=True
            )
    start = time.thread_time()
    alpha_peak(matrix)
    print(f"the released recipe on the last shape: {time.thread_time() - start:.1f} CPU s")


if __name__ == "__main__":
    main()
