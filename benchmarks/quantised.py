"""How far alpha, Stable_Rank and the allocation move when a float model is quantised.

    python benchmarks/quantised.py .cache/checkpoints/mpnet [--T 160] [--beta 2.5]

Each version of the model is written as a file of its format and analysed as any other: by the
quantisers of gguf (Q8_0, Q5_0, Q5_1, Q4_0, Q4_1, MXFP4) and of compressed-tensors (INT4 in groups
of 128); Q4_K is packed here, by the least and largest of each 32; 6 and 3 bits are rounded here to
the nearest of 2^b - 1 steps of each 32 (Q8_0's rule with fewer bits) and written as float32.
Prints a Markdown table; needs the extra [quantized].
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from htsr_alloc.allocation import allocate
from htsr_alloc.analysis.analyze import analyze
from htsr_alloc.analysis.outputs import RunFiles
from htsr_alloc.analysis.refit import refit
from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.records import Metrics

SMOOTH = "kde-mean"
Weights = dict[str, torch.Tensor]


def float_weights(source: Path) -> Weights:
    """Every weight matrix of the blocks, by its name."""
    checkpoint = open_checkpoint(source)
    found = map_layers(checkpoint.tensors, num_hidden_layers=checkpoint.num_hidden_layers)
    return {m.name: checkpoint.read(m.ref).float() for m in found.matrices}


def as_gguf(kind: Kind) -> Callable[[Weights, Path], Path]:
    def write(weights: Weights, folder: Path) -> Path:
        writer = gguf.GGUFWriter(folder / "m.gguf", "unknown")  # whose names stay as they are
        for name, weight in weights.items():
            raw = (
                q4_k(weight.numpy())
                if kind == Kind.Q4_K
                else gguf.quants.quantize(weight.numpy(), kind)
            )
            writer.add_tensor(name, raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "m.gguf"

    return write


def q4_k(weight: np.ndarray) -> np.ndarray:
    """(rows, columns) float32 -> blocks of Q4_K: of each 256 two f16, 8 scales and minima of 6 bits
    and 256 numbers of 4 bits."""
    parts = weight.reshape(len(weight), -1, 8, 32)  # (rows, blocks, 8, 32)
    low = np.minimum(parts.min(-1), 0)
    scale, least = (parts.max(-1) - low) / 15, -low
    d = (scale.max(-1) / 63).astype(np.float16)
    dmin = (least.max(-1) / 63).astype(np.float16)
    each, under = (np.where(x > 0, x, 1).astype(np.float32)[..., None] for x in (d, dmin))
    sc, m = (
        np.clip(np.round(a / b), 0, 63).astype(np.uint8) for a, b in ((scale, each), (least, under))
    )
    step, start = (each * sc)[..., None], (under * m)[..., None]
    q = np.clip(np.round((parts + start) / np.where(step > 0, step, 1)), 0, 15).astype(np.uint8)
    scales = np.concatenate(
        [
            sc[..., :4] | (sc[..., 4:] >> 4 << 6),
            m[..., :4] | (m[..., 4:] >> 4 << 6),
            (sc[..., 4:] & 15) | (m[..., 4:] & 15) << 4,
        ],
        -1,
    )
    halves = (q[..., ::2, :] | q[..., 1::2, :] << 4).reshape(*q.shape[:2], 128)
    ends = np.stack([d, dmin], -1).view(np.uint8)
    return np.concatenate([ends, scales, halves], -1).reshape(len(weight), -1)


def rounded(bits: int) -> Callable[[Weights, Path], Path]:
    def write(weights: Weights, folder: Path) -> Path:
        made = {}
        for name, weight in weights.items():
            parts = weight.reshape(-1, 32)
            step = (parts.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
            made[name] = (torch.round(parts / step.clamp_min(1e-12)) * step).reshape(weight.shape)
        save_file(made, folder / "m.safetensors")
        return folder / "m.safetensors"

    return write


def compressed(weights: Weights, folder: Path) -> Path:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    said = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    args = QuantizationArgs.model_validate(said)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors = {}
    for name, weight in weights.items():
        groups = weight.reshape(len(weight), -1, 128)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        packer = BaseCompressor.get_value_from_registry("pack-quantized")
        parts = packer.compress(state, scheme)
        tensors |= {name.removesuffix("weight") + k: v.contiguous() for k, v in parts.items()}
    save_file(tensors, folder / "m.safetensors")
    groups = {"group_0": {"targets": ["Linear"], "weights": said}}
    config = {"quantization_config": {"format": "pack-quantized", "config_groups": groups}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


VERSIONS: dict[str, Callable[[Weights, Path], Path]] = {
    "8 bits, Q8_0": as_gguf(Kind.Q8_0),
    "6 bits, rounded": rounded(6),
    "5 bits, Q5_1": as_gguf(Kind.Q5_1),
    "5 bits, Q5_0": as_gguf(Kind.Q5_0),
    "4 bits, Q4_K": as_gguf(Kind.Q4_K),
    "4 bits, Q4_1": as_gguf(Kind.Q4_1),
    "4 bits, Q4_0": as_gguf(Kind.Q4_0),
    "4 bits, compressed-tensors g128": compressed,
    "4 bits, MXFP4": as_gguf(Kind.MXFP4),
    "3 bits, rounded": rounded(3),
}


def measured(source: Path, folder: Path) -> tuple[Metrics, Metrics]:
    """By the official estimator and by the smooth one."""
    output = RunFiles(folder / "official.metrics.json")
    found = analyze(source, estimator="official", output=output)
    assert found is not None
    return found, refit(output.metrics, RunFiles(folder / "smooth.metrics.json"), SMOOTH)


def moved(a: Metrics, b: Metrics, field: str, relative: bool = False) -> Iterator[float]:
    for x, y in zip(a.matrices, b.matrices, strict=True):
        assert x.tensor == y.tensor
        one, two = getattr(x, field), getattr(y, field)
        yield abs(two - one) / (one if relative else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--T", type=int, default=160)
    parser.add_argument("--beta", type=float, default=2.5)
    asked = parser.parse_args()
    weights = float_weights(asked.checkpoint)
    with tempfile.TemporaryDirectory() as place:
        save_file(weights, Path(place) / "m.safetensors")
        plain = measured(Path(place) / "m.safetensors", Path(place))
        counts = [allocate(m, T=asked.T, beta=asked.beta).experts for m in plain]
        own = [[layer.pl_alpha_hill for layer in m.layers] for m in plain]
        print(f"{asked.checkpoint.name}: {len(weights)} matrices, {len(counts[0])} layers")
        print("spread of the layers' alpha:", *(f"{max(x) - min(x):.3f}" for x in own))
        print("experts:", *counts)
        columns = ["version", "noise", "lambda_min", "official", "max", "smooth", "max"]
        columns += ["Stable_Rank", "max", "moved, official", "smooth"]
        print("|", " | ".join(columns), "|")
        for name, write in VERSIONS.items():
            if "Q4_K" in name and any(weight.shape[1] % 256 for weight in weights.values()):
                print(name, "needs rows of a multiple of 256", file=sys.stderr)
                continue
            with tempfile.TemporaryDirectory() as text:
                folder = Path(text)
                source = write(weights, folder)
                opened = open_checkpoint(source)
                noise = statistics.median(
                    float(
                        (opened.read(r).float() - weights[r.name]).norm() / weights[r.name].norm()
                    )
                    for r in opened.tensors
                )
                found = measured(source, folder)
            cells = [f"{100 * noise:.1f} %"]
            least = statistics.median(
                y.lambda_min / x.lambda_min
                for x, y in zip(plain[0].matrices, found[0].matrices, strict=True)
            )
            cells.append(f"x {least:.1f}")
            for a, b in zip(plain, found, strict=True):
                values = list(moved(a, b, "pl_alpha_hill"))
                cells += [f"{statistics.median(values):.3f}", f"{max(values):.3f}"]
            values = list(moved(plain[0], found[0], "stable_rank", relative=True))
            cells += [f"{100 * x:.2f} %" for x in (statistics.median(values), max(values))]
            for before, metrics in zip(counts, found, strict=True):
                after = allocate(metrics, T=asked.T, beta=asked.beta).experts
                cells.append(str(sum(abs(x - y) for x, y in zip(before, after, strict=True)) // 2))
            print("|", " | ".join([name, *cells]), "|", flush=True)
            print(name, "done", file=sys.stderr)


if __name__ == "__main__":
    main()
