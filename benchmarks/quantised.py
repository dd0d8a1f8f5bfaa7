"""How far alpha, Stable_Rank and the allocation move when a float model is quantised.

    python benchmarks/quantised.py .cache/checkpoints/mpnet [--only WORD] [--T 160] [--beta 2.5]

Each version of the model is written as a file of its format and analysed as any other: by the
quantisers of gguf (Q8_0, Q5_0, Q5_1, Q4_0, Q4_1, MXFP4) and of compressed-tensors (INT4 in groups
of 128, MXFP4). k-quants are by ggml's own code, which the wheel of pywhispercpp has in it
(`pip install --no-deps pywhispercpp`); Q4_K_M mixes them as llama.cpp does. 6 and 3 bits are
rounded here to the nearest of 2^b - 1 steps of each 32 (Q8_0's rule with fewer bits) and written as
float32. Prints a Markdown table; needs the extra [quantized].
"""

import argparse
import ctypes
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

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
# v, and the down of the feed-forward part, which is BERT's output.dense outside its attention.
MORE = re.compile(r"\.(v|value|v_proj|down_proj)\.weight$|\.\d+\.output\.dense\.weight$")
Weights = dict[str, torch.Tensor]


def float_weights(source: Path) -> Weights:
    """Every weight matrix of the blocks, by its name."""
    checkpoint = open_checkpoint(source)
    found = map_layers(checkpoint.tensors, num_hidden_layers=checkpoint.num_hidden_layers)
    return {m.name: checkpoint.read(m.ref).float() for m in found.matrices}


def as_gguf(kind: Kind | Callable[[Weights], dict[str, Kind]]) -> Callable[[Weights, Path], Path]:
    """A GGUF file whose matrices are all of one kind, or each of its own."""

    def write(weights: Weights, folder: Path) -> Path:
        kinds = dict.fromkeys(weights, kind) if isinstance(kind, Kind) else kind(weights)
        writer = gguf.GGUFWriter(folder / "m.gguf", "unknown")  # whose names stay as they are
        for name, weight in weights.items():
            own = kinds[name]
            k_quant = own.name.endswith("_K")
            raw = (by_ggml if k_quant else gguf.quants.quantize)(weight.numpy(), own)
            writer.add_tensor(name, raw, raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "m.gguf"

    return write


def by_ggml(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """(rows, columns) float32 -> the blocks that llama.cpp's library makes of them."""
    rows, columns = weight.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    weight, made = np.ascontiguousarray(weight), np.empty((rows, columns // block * size), np.uint8)
    quantize = ctypes.CDLL(str(ggml())).ggml_quantize_chunk
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    quantize.restype = ctypes.c_size_t
    done = quantize(kind.value, weight.ctypes.data, made.ctypes.data, 0, rows, columns, None)
    assert done == made.nbytes
    return made


def ggml() -> Path | None:
    """Where pywhispercpp keeps ggml's library, if it is installed."""
    with suppress(PackageNotFoundError):
        for file in files("pywhispercpp") or ():
            if file.name == "libggml-base.so":
                return Path(str(file.locate()))
    return None


def q4_k_m(weights: Weights) -> dict[str, Kind]:
    """llama.cpp's mix: v and down are Q6_K in the first and the last eighth of the layers and in
    every third between, all else is Q4_K."""
    numbers = {name: int(re.findall(r"\.(\d+)\.", name)[0]) for name in weights}
    n = max(numbers.values()) + 1
    more = {i for i in range(n) if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2}
    return {
        name: Kind.Q6_K if MORE.search(name) and numbers[name] in more else Kind.Q4_K
        for name in weights
    }


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


def compressed(form: str, **said: Any) -> Callable[[Weights, Path], Path]:
    """A folder by the library's own compressor; ``said`` are its arguments."""

    def write(weights: Weights, folder: Path) -> Path:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        args = QuantizationArgs.model_validate({"num_bits": 4, "strategy": "group", **said})
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        packer = BaseCompressor.get_value_from_registry(form)
        tensors = {}
        for name, weight in weights.items():
            groups = weight.reshape(len(weight), -1, said["group_size"])
            state = {"weight": weight}
            if said["type"] == "float":
                most = groups.abs().amax(-1)
                state["weight_scale"] = 2.0 ** torch.floor(
                    torch.log2(most) - 2
                )  # the MX specification
            else:
                scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
                state |= {"weight_scale": scale, "weight_zero_point": zero}
            parts = packer.compress(state, scheme)
            tensors |= {name.removesuffix("weight") + k: v.contiguous() for k, v in parts.items()}
        save_file(tensors, folder / "m.safetensors")
        weights_said = json.loads(args.model_dump_json())
        group = {"group_0": {"targets": ["Linear"], "weights": weights_said}}
        config = {"quantization_config": {"format": form, "config_groups": group}}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


INT4 = compressed("pack-quantized", type="int", group_size=128, symmetric=True)
FP4 = compressed(
    "mxfp4-pack-quantized", type="float", group_size=32, symmetric=True, scale_dtype="torch.uint8"
)
VERSIONS: dict[str, Callable[[Weights, Path], Path]] = {
    "8 bits, Q8_0": as_gguf(Kind.Q8_0),
    "6 bits, rounded": rounded(6),
    "5 bits, Q5_1": as_gguf(Kind.Q5_1),
    "5 bits, Q5_0": as_gguf(Kind.Q5_0),
    "6 bits, Q6_K": as_gguf(Kind.Q6_K),
    "4 and 6 bits, Q4_K_M": as_gguf(q4_k_m),
    "4 bits, Q4_K": as_gguf(Kind.Q4_K),
    "4 bits, Q4_1": as_gguf(Kind.Q4_1),
    "4 bits, Q4_0": as_gguf(Kind.Q4_0),
    "4 bits, compressed-tensors g128": INT4,
    "4 bits, compressed-tensors MXFP4": FP4,
    "4 bits, GGUF MXFP4": as_gguf(Kind.MXFP4),
    "3 bits, Q3_K": as_gguf(Kind.Q3_K),
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
    parser.add_argument("--only", default="", help="versions whose name has this in it")
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
            if asked.only not in name:
                continue
            if "_K" in name and any(weight.shape[1] % 256 for weight in weights.values()):
                print(name, "needs rows of a multiple of 256", file=sys.stderr)
                continue
            if "_K" in name and ggml() is None:
                print(name, "needs pywhispercpp", file=sys.stderr)
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
