"""Routes to the eigenvalues of W^T W on a GPU, by shape: seconds a matrix, share of gemm, error.

    python benchmarks/gpu.py [--device cuda] [--shapes 4096x4096 11008x4096] [--count 8]

``svdvals`` is torch's own on the same device; ``engine`` what ``--device cuda`` runs, Gram matrix
and eigvalsh in float64; ``threads`` that engine on some threads with a stream each; ``batch``
eigvalsh of a stack of Gram matrices; ``band`` a band by BLAS 3 on the device, whose tridiagonal
part runs on the CPU's cores meanwhile. Each works through ``--count`` matrices that lie on the
device already; a copy from pinned memory is timed on its own. The whole job:

    python benchmarks/synthetic.py --layers 32 --out .cache/checkpoints/llama-2-7b
    time python -m htsr_alloc analyze .cache/checkpoints/llama-2-7b --device cuda
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from synthetic import weight

from htsr_alloc.analysis.schedule import available_cores
from htsr_alloc.spectra import engines, lapack

BAND = 64


def to_band(a: torch.Tensor, width: int = BAND) -> torch.Tensor:
    """Lower band storage (width + 1, n) of a band orthogonally similar to a, which is lost.

    Each block column below the band is Q R; with Q = I - Y T Y^T in compact form the rest becomes
    A - Y Z^T - Z Y^T, Z = X - Y (T^T Y^T X) / 2, X = A Y T: two products of BLAS 3.
    """
    n = a.shape[0]
    for j in range(0, n - width - 1, width):
        at = j + width
        packed, tau = torch.geqrf(a[at:, j:at])
        k = len(tau)
        y = packed[:, :k].tril(-1)
        y.diagonal().fill_(1)
        a[at:, j:at] = packed.triu()
        inverse = (y.T @ y).triu(1)
        # a reflection of tau = 0 is the identity: its column of Y T must vanish
        inverse.diagonal().copy_(torch.where(tau == 0, torch.inf, 1 / tau))
        t = torch.linalg.solve_triangular(inverse, torch.eye(k).to(y), upper=True)
        yt = y @ t
        x = a[at:, at:] @ yt
        z = x - y @ (yt.T @ x) / 2
        a[at:, at:].addmm_(y, z.T, alpha=-1).addmm_(z, y.T, alpha=-1)
    rows = torch.arange(width + 1, device=a.device)[:, None]
    columns = torch.arange(n, device=a.device)
    band = a[(rows + columns).clamp(max=n - 1), columns]
    return band.masked_fill_(rows + columns >= n, 0)


def finish(band: np.ndarray) -> np.ndarray:
    """Eigenvalues of a band in lower storage, on one CPU core."""
    library = lapack.load()
    assert library is not None, "needs scipy-openblas64"
    return library.sterf(*library.sb2st(np.asfortranarray(band)))


def by_threads(matrices, threads: int) -> list[np.ndarray]:
    """The engine on several threads, a stream each."""

    def start() -> None:
        if matrices[0].is_cuda:
            torch.cuda.set_stream(torch.cuda.Stream(matrices[0].device))

    with ThreadPoolExecutor(threads, initializer=start) as pool:
        return list(pool.map(lambda w: engines.portable(w)[0], matrices))


def by_batch(matrices, size: int) -> list[np.ndarray]:
    """eigvalsh of ``size`` Gram matrices at once."""
    found = []
    for i in range(0, len(matrices), size):
        grams = torch.stack([engines.portable_gram(w) for w in matrices[i : i + size]])
        found += list(torch.linalg.eigvalsh(grams).cpu().numpy())
    return found


def by_band(matrices) -> list[np.ndarray]:
    """Bands on the device, in turn; their tridiagonal parts on the CPU at the same time."""
    with ThreadPoolExecutor(available_cores()) as pool:
        jobs = [
            pool.submit(finish, to_band(engines.portable_gram(w)).cpu().numpy()) for w in matrices
        ]
        return [job.result() for job in jobs]


def clock(function) -> tuple[float, object]:
    """Wall seconds of a second run, the first being warm-up; the device's work included."""
    function()
    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - start, result


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="*", default=["512x512", "4096x4096", "11008x4096"])
    parser.add_argument("--count", type=int, default=8, help="matrices of each shape")
    parser.add_argument("--gemm", type=int, default=4096, help="size of the product that is timed")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    a = torch.randn(arguments.gemm, arguments.gemm, dtype=torch.float64, device=device)
    peak = 2 * arguments.gemm**3 / clock(lambda: a @ a)[0]
    print(f"{name}, torch {torch.__version__}: float64 gemm {peak / 1e12:.2f} TFLOP/s")
    for text in arguments.shapes:
        m, n = (int(x) for x in text.split("x"))
        generator = torch.Generator().manual_seed(0)
        host = [weight(m, n, generator) for _ in range(arguments.count)]
        if device.type == "cuda":
            host = [w.pin_memory() for w in host]
        seconds, matrices = clock(lambda h=host: [w.to(device) for w in h])
        print(f"{text}: copy {seconds / len(host) * 1e3:.2f} ms a matrix")
        exact = torch.linalg.svdvals(matrices[0].double()).flip(0).cpu().numpy() ** 2
        routes = {
            "svdvals float32": lambda w=matrices: [torch.linalg.svdvals(x.float()) for x in w],
            "svdvals float64": lambda w=matrices: [torch.linalg.svdvals(x.double()) for x in w],
            "engine": lambda w=matrices: [engines.portable(x)[0] for x in w],
            "threads 2": lambda w=matrices: by_threads(w, 2),
            "threads 4": lambda w=matrices: by_threads(w, 4),
            "batch 4": lambda w=matrices: by_batch(w, 4),
            f"batch {arguments.count}": lambda w=matrices: by_batch(w, len(w)),
            "band": lambda w=matrices: by_band(w),
        }
        flops = m * n * n + 4 / 3 * n**3
        for route, run in routes.items():
            seconds, found = clock(run)
            each = seconds / len(matrices)
            values = np.asarray(found[0])
            if route.startswith("svdvals"):
                values = values[::-1].astype(np.float64) ** 2
            least, largest = abs(values[0] / exact[0] - 1), abs(values[-1] / exact[-1] - 1)
            share = flops / each / peak
            errors = f"{least:.0e} {largest:.0e}"
            print(f"  {route:<16} {each * 1e3:9.1f} ms {share:6.1%} of gemm   {errors}")


if __name__ == "__main__":
    main()
