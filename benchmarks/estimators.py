"""How far each estimator's z = ln(alpha - 1) moves when the weights move a little.

    python benchmarks/estimators.py --checkpoint .cache/checkpoints/minilm --every 1

Every ``--every``-th layer of a checkpoint. Each weight matrix is perturbed and its spectrum is
computed again: 1 % Gaussian noise (of the matrix's root mean square), 95 % of its rows, bfloat16,
and 4 bits (absolute maximum of 64 weights, round to nearest). Prints a table in Markdown:

* noise, rows, bf16, 4-bit: root mean square change of z over the matrices and draws;
* stated: the same for 1 % noise as ``spectra.uncertainty`` predicts it from the spectrum alone;
* resolution: the same when the histogram has 80 and 125 bins, or the bandwidth is 0.8 and 1.25
  times as wide;
* layers: standard deviation of z between a role's layers; ratio: layers / noise;
* corr, diff: correlation of z with ``official``'s, and mean difference from it.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq

from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.spectra.estimators import BANDWIDTH, ESTIMATORS, fit
from htsr_alloc.spectra.spectrum import spectrum
from htsr_alloc.spectra.uncertainty import uncertainty

Spectra = dict[str, list[np.ndarray]]  # perturbation -> the spectra it gave
BLOCK = 64  # weights that share a scale in 4 bits
SHARE = 0.95  # of the rows


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric integers -7 ... 7 in blocks of 64 with a scale each. (m, n) -> (m, n)"""
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = (blocks.abs().amax(1, keepdim=True) / 7).clamp_min(torch.finfo(weight.dtype).tiny)
    return ((blocks / scale).round() * scale).flatten()[: len(flat)].view_as(weight)


def perturbed(weight: torch.Tensor, draws: int, seed: int) -> Spectra:
    """The spectra of a matrix (m, n) and of what the perturbations make of it."""
    generator = torch.Generator().manual_seed(seed)
    s = 0.01 * weight.double().pow(2).mean().sqrt().float()
    found: dict[str, list[torch.Tensor]] = defaultdict(list)
    found["none"] = [weight]
    for _ in range(draws):
        found["noise"].append(weight + s * torch.randn(weight.shape, generator=generator))
        order = torch.randperm(len(weight), generator=generator)
        found["rows"].append(weight[order[: round(SHARE * len(weight))]])
    found["bf16"] = [weight.bfloat16().float()]
    found["4-bit"] = [four_bits(weight)]
    return {
        name: [spectrum(w, engine="exact").eigenvalues for w in made]
        for name, made in found.items()
    }


def scott(values: np.ndarray) -> float:
    """Scott's rule: sd N^(-1/5) of log10 l, in decades."""
    return float(np.log10(values).std(ddof=1) * len(values) ** -0.2)


def sheather_jones(values: np.ndarray) -> float:
    """Sheather and Jones (1991), solve the equation, as R's ``bw.SJ``, distances in 4000 bins."""
    x = np.log10(values)
    n = len(x)
    distances = np.abs(x[:, None] - x[None, :])[np.triu_indices(n, 1)]
    counts, edges = np.histogram(distances, bins=4000)
    pairs = (edges[:-1] + edges[1:]) / 2
    scale = min(x.std(ddof=1), float(np.subtract(*np.percentile(x, [75, 25]))) / 1.349)

    def phi4(h: float) -> float:
        e = (pairs / h) ** 2
        total = 2 * counts @ (np.exp(-e / 2) * (e * e - 6 * e + 3)) + 3 * n
        return total / (n * (n - 1) * h**5 * np.sqrt(2 * np.pi))

    def phi6(h: float) -> float:
        e = (pairs / h) ** 2
        total = 2 * counts @ (np.exp(-e / 2) * (e**3 - 15 * e * e + 45 * e - 15)) - 15 * n
        return total / (n * (n - 1) * h**7 * np.sqrt(2 * np.pi))

    first = phi4(1.24 * scale * n ** (-1 / 7))
    ratio = 1.357 * (first / -phi6(1.23 * scale * n ** (-1 / 9))) ** (1 / 7)
    constant = 1 / (2 * np.sqrt(np.pi) * n)
    widest = 1.144 * scale * n**-0.2
    return brentq(
        lambda h: (constant / phi4(ratio * h ** (5 / 7))) ** 0.2 - h, 0.05 * widest, 3 * widest
    )


RULES: dict[str, Callable[[np.ndarray], float]] = {
    "Scott": scott,
    "Sheather-Jones": sheather_jones,
    "0.10": lambda values: 0.10,
    "0.20": lambda values: 0.20,
    "0.30": lambda values: 0.30,
}


def z(values: np.ndarray, estimator: str, bins: int = 100, bandwidth: float = BANDWIDTH) -> float:
    alpha = fit(values, estimator, bins, bandwidth).alpha
    assert alpha is not None
    return float(np.log(alpha - 1))


def rms(changes: list[float]) -> str:
    return f"{np.sqrt(np.mean(np.square(changes))):.4f}" if changes else "–"


def row(
    label: str,
    estimator: str,
    rule: Callable[[np.ndarray], float],
    spectra: dict[tuple[int, str], Spectra],
    sizes: dict[tuple[int, str], int],
    official: dict[tuple[int, str], float],
) -> str:
    """One estimator's line of the table."""
    base, roles = {}, defaultdict(list)
    changes: dict[str, list[float]] = defaultdict(list)
    for key, own in spectra.items():
        values = own["none"][0]
        width = rule(values)
        base[key] = z(values, estimator, bandwidth=width)
        roles[key[1]].append(base[key])
        for name in ("noise", "rows", "bf16", "4-bit"):
            changes[name] += [z(v, estimator, bandwidth=rule(v)) - base[key] for v in own[name]]
        for bins, factor in ((80, 0.8), (125, 1.25)):
            again = z(values, estimator, bins, width * factor)
            changes["resolution"].append(again - base[key])
        weight_rms = np.sqrt(values.sum() / sizes[key])
        found = uncertainty(values, weight_rms, estimator, bandwidth=width)
        assert found is not None
        changes["stated"].append(found.start / np.exp(base[key]))
    layers = np.sqrt(np.mean([np.var(own, ddof=1) for own in roles.values()]))
    noise = np.sqrt(np.mean(np.square(changes["noise"])))
    mine, theirs = np.array(list(base.values())), np.array([official[key] for key in base])
    columns = ("noise", "stated", "rows", "bf16", "4-bit", "resolution")
    return " | ".join(
        [
            f"| {label}",
            *(rms(changes[name]) for name in columns),
            f"{layers:.3f}",
            f"{layers / noise:.1f}",
            f"{np.corrcoef(mine, theirs)[0, 1]:.2f}",
            f"{(mine - theirs).mean():+.2f} |",
        ]
    )


def main(folder: Path, every: int, draws: int) -> None:
    checkpoint = open_checkpoint(folder)
    chosen = [m for m in map_layers(checkpoint.tensors).matrices if m.layer % every == 0]
    spectra, sizes = {}, {}
    for number, matrix in enumerate(chosen):
        weight = checkpoint.read(matrix.ref, matrix.index).float()
        key = (matrix.layer, matrix.role)
        spectra[key] = perturbed(weight, draws, number)
        sizes[key] = weight.numel()
    official = {key: z(own["none"][0], "official") for key, own in spectra.items()}
    print(f"{folder.name}: {len(chosen)} matrices, {draws} draws\n")
    print("| estimator | noise | stated | rows | bf16 | 4-bit | resolution", end="")
    print(" | layers | ratio | corr | diff |\n|" + "---|" * 11)
    for name in ESTIMATORS:
        print(row(f"`{name}`", name, lambda values: BANDWIDTH, spectra, sizes, official))
    for name, rule in RULES.items():
        print(row(f"`kde-mean`, {name}", "kde-mean", rule, spectra, sizes, official))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--every", type=int, default=3, help="Take every n-th layer.")
    parser.add_argument("--draws", type=int, default=4)
    arguments = parser.parse_args()
    main(arguments.checkpoint, arguments.every, arguments.draws)
