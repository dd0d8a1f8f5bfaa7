"""Llama-2-7B's shapes with seeded, heavy-tailed weights, as an ordinary checkpoint folder.

    python benchmarks/synthetic.py --layers 1 --out .cache/checkpoints/llama-block
    python benchmarks/synthetic.py --layers 1 --uneven 0.3 --out .cache/checkpoints/llama-uneven

No unquantised LLaMA checkpoint is at hand; times depend on shapes, not on what the weights say.
Each weight is Gaussian noise plus 256 directions whose strength falls as a power law, in float16.
With --uneven the columns have sizes of that log-normal spread, and six of them are eight times as
large: real weights have uneven columns and outlier channels.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, INNER, RANK, OUTLIERS = 4096, 11008, 256, 6
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def weight(rows: int, columns: int, generator: torch.Generator, uneven: float = 0) -> torch.Tensor:
    """(rows, columns) float16: 0.02 (noise + sum_k 3 k^-0.7 u_k v_k^T), its columns scaled."""
    noise = torch.randn(rows, columns, generator=generator)
    left = torch.randn(rows, RANK, generator=generator) / rows**0.5
    right = torch.randn(RANK, columns, generator=generator) / columns**0.5
    strength = 3 * (rows**0.5 + columns**0.5) * torch.arange(1, RANK + 1) ** -0.7
    made = 0.02 * (noise + (left * strength) @ right)
    if uneven:
        sizes = torch.exp(uneven * torch.randn(columns, generator=generator))
        sizes[torch.randperm(columns, generator=generator)[:OUTLIERS]] *= 8
        made *= sizes
    return made.half()


def write(folder: Path, layers: int, seed: int = 0, uneven: float = 0) -> Path:
    """One shard a layer; ``folder`` is complete when it exists."""
    if folder.exists():
        return folder
    temporary = folder.with_name(f"{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    index = {}
    for layer in range(layers):
        names = {f"model.layers.{layer}.{role}.weight": shape for role, shape in SHAPES.items()}
        shard = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        save_file({n: weight(*s, generator, uneven) for n, s in names.items()}, temporary / shard)
        index |= dict.fromkeys(names, shard)
    (temporary / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    (temporary / "config.json").write_text(json.dumps(config))
    temporary.replace(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(".cache/checkpoints/llama-block"))
    parser.add_argument("--uneven", type=float, default=0, help="log-normal spread of the columns")
    arguments = parser.parse_args()
    print(write(arguments.out, arguments.layers, uneven=arguments.uneven))
