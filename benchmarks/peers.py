"""How others do it, as processes of their own, for ``analyze_vs_peers.py``.

python benchmarks/peers.py recipe FOLDER          AlphaLoRA's script, restated naively
python benchmarks/peers.py weightwatcher FOLDER   WeightWatcher's own analyze()
"""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors import safe_open


def block_weights(folder: Path):
    """(name, weight) of the linears in numbered blocks, one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                numbered = any(part.isdecimal() for part in name.split("."))
                if (
                    numbered
                    and name.endswith("weight")
                    and len(file.get_slice(name).get_shape()) == 2
                ):
                    yield name, file.get_tensor(name)


def alpha_peak(weight: torch.Tensor, bins: int = 100) -> float:
    """float32 svdvals as the matrix is stored, then one candidate after the other."""
    eigs = torch.square(torch.linalg.svdvals(weight.float())).sort().values
    logs, log10 = torch.log(eigs), torch.log10(eigs)
    low, high = float(log10.min()), float(log10.max())
    counts = torch.histc(log10, bins, min=low, max=high)
    peak = 10 ** torch.linspace(low, high, bins + 1)[counts.argmax()]
    lowest, highest = torch.log10(0.95 * peak), 1.5 * peak
    n_all = len(eigs)
    alphas, distances = torch.zeros(n_all - 1), torch.ones(n_all - 1)
    for i, xmin in enumerate(eigs[:-1]):
        if xmin < lowest:
            continue
        if xmin > highest:
            break
        n = float(n_all - i)
        alpha = 1 + n / (logs[i:].sum() - n * logs[i])
        alphas[i] = alpha
        if alpha > 1:
            model = 1 - (eigs[i:] / xmin) ** (1 - alpha)
            distances[i] = (model - torch.arange(n) / n).abs().max()
    return float(alphas[distances.argmin()])


def recipe(folder: Path) -> None:
    for name, weight in block_weights(folder):
        print(name, alpha_peak(weight))


def weightwatcher(folder: Path) -> None:
    import weightwatcher as ww

    fixtures = Path(__file__).parents[1] / "tests" / "fixtures" / "make_weightwatcher.py"
    spec = importlib.util.spec_from_file_location("make_weightwatcher", fixtures)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    details = ww.WeightWatcher(model=module.as_module(dict(block_weights(folder)))).analyze()
    print(details[["longname", "alpha"]].to_string())


if __name__ == "__main__":
    {"recipe": recipe, "weightwatcher": weightwatcher}[sys.argv[1]](Path(sys.argv[2]))
