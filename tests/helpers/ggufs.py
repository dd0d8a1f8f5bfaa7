"""GGUF files of small models, written by the package gguf."""

from pathlib import Path

import gguf
import numpy as np

TYPES = [
    kind
    for kind in gguf.quants._type_traits
    if kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
]
OUTSIDE = {"token_embd.weight": (64, 256), "output_norm.weight": (256,)}
BLOCK = {
    "attn_q.weight": (256, 256),
    "attn_k.weight": (64, 256),
    "attn_v.weight": (64, 256),
    "attn_output.weight": (256, 256),
    "ffn_gate.weight": (512, 256),
    "ffn_up.weight": (512, 256),
    "ffn_down.weight": (256, 512),
    "attn_norm.weight": (256,),
}


def weights(blocks: int = 2) -> dict[str, np.ndarray]:
    """Random float32 weights of a LLaMA under the names that llama.cpp gives them."""
    rng = np.random.default_rng(0)
    shapes = dict(OUTSIDE)
    for i in range(blocks):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in BLOCK.items()}
    return {name: rng.standard_normal(s).astype(np.float32) / 16 for name, s in shapes.items()}


def write(
    path: Path,
    tensors,
    *,
    blocks: int = 2,
    architecture: str = "llama",
    predicting: int | None = None,
    **kinds,
) -> Path:
    """A GGUF file.

    Args:
        tensors: name -> floats, or (raw bytes of the rows, type).
        predicting: how many of the blocks predict further tokens.
        kinds: ``default``: the type that matrices are quantised to.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(blocks)
    if predicting is not None:
        writer.add_nextn_predict_layers(predicting)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "", "héllo"] * 50)
    writer.add_array("tokenizer.ggml.scores", [0.5] * 150)
    kind = kinds.get("default", gguf.GGMLQuantizationType.F32)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        elif value.ndim < 2:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(kind, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Bytes of a type, any of them: (rows, blocks * bytes of a block)."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, blocks * size), dtype=np.uint8)
