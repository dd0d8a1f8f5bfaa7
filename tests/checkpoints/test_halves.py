"""The same experts' weights, gate and up joined in one file and apart in another."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.mixtures import MIXTURES
from safetensors.numpy import load_file, save_file

from htsr_alloc import analyze
from htsr_alloc.analysis.cost import matrix_bytes, transfer
from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.checkpoints.shards import StreamedShards
from htsr_alloc.reports.compare import compare

LAYERS, EXPERTS, HIDDEN, INNER = 2, 3, 64, 56
SHAPES = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}


def weights():
    """(layer, expert, word) -> (d_out, d_in)."""
    generator = np.random.default_rng(0)
    return {
        (i, e, word): generator.standard_normal(shape).astype(np.float32)
        for i in range(LAYERS)
        for e in range(EXPERTS)
        for word, shape in SHAPES.items()
    }


def split(made):
    words = {"gate": "w1", "up": "w3", "down": "w2"}
    return {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{words[word]}.weight": weight
        for (i, e, word), weight in made.items()
    }


def by_turns(gate, up):
    both = np.empty((2 * len(gate), gate.shape[1]), np.float32)
    both[0::2], both[1::2] = gate, up
    return both


def joined(made, first, second, join, inputs_first, more=None):
    """Two stacks a layer, and ``more(layer)``."""
    tensors = {}
    for i in range(LAYERS):
        top = f"model.layers.{i}."
        pairs = [join(made[i, e, "gate"], made[i, e, "up"]) for e in range(EXPERTS)]
        downs = [made[i, e, "down"] for e in range(EXPERTS)]
        for name, stack in ((first, np.stack(pairs)), (second, np.stack(downs))):
            lies = stack.transpose(0, 2, 1) if inputs_first else stack
            tensors[top + name] = np.ascontiguousarray(lies)
        tensors |= {top + name: value for name, value in (more or {}).items()}
    return tensors


def in_rows(gate, up):
    return np.concatenate([gate, up])


BIASES = {"mlp.experts.gate_up_proj_bias": np.ones((EXPERTS, 2 * INNER), np.float32)}
STORED = {
    "MixtralForCausalLM": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", in_rows, False),
    "Llama4ForCausalLM": (
        "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", in_rows, True),
    "GptOssForCausalLM": (
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj", by_turns, True, BIASES),
    "GraniteMoeForCausalLM": (
        "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight",
        in_rows, False),
    "AriaTextForCausalLM": (
        "mlp.experts.fc1.weight", "mlp.experts.fc2.weight", in_rows, True),
}  # fmt: skip


def saved(folder, tensors, architecture):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": [architecture], "num_hidden_layers": LAYERS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("architecture", STORED)
def test_the_same_weights_have_the_same_spectra(architecture, tmp_path):
    made = weights()
    reference = analyze(saved(tmp_path / "apart", split(made), "MixtralForCausalLM"))
    folder = saved(tmp_path / "joined", joined(made, *STORED[architecture]), architecture)
    other = analyze(folder, output=tmp_path / "joined.metrics.json")
    assert len(other.matrices) == len(reference.matrices) == LAYERS * EXPERTS * 3
    found = compare(reference, other)
    assert found.same(1e-9)
    assert len(found.matrices) == LAYERS * EXPERTS * 3
    spectra = load_file(tmp_path / other.spectra.file)
    for m in other.matrices:
        word = m.role.rpartition(".")[2].removesuffix("_proj")
        word = "down" if word in ("output_linear", "fc2") else word
        want = np.linalg.svd(made[m.layer, m.expert, word].astype(float), compute_uv=False) ** 2
        np.testing.assert_allclose(np.sort(spectra[m.tensor])[::-1], want, rtol=1e-9)
        if word != "down":
            assert m.shape == SHAPES[word]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_model_that_transformers_saves_both_ways(name, tmp_path):
    pytest.importorskip("transformers")
    base = MIXTURES[name].model()
    for way in (True, False):
        base.save_pretrained(tmp_path / str(way), save_original_format=way)
    apart, whole = (analyze(tmp_path / str(way), estimator="median") for way in (True, False))
    assert any("[0,gate_proj]" in m.tensor for m in whole.matrices)
    assert not any("[" in m.tensor for m in apart.matrices)
    assert compare(apart, whole).same(1e-9)


@pytest.mark.parametrize(("architecture", "times"), [("MixtralForCausalLM", 1),
                                                     ("Llama4ForCausalLM", 2)])  # fmt: skip
def test_a_slice_is_read_once_where_its_halves_lie_apart(
    tmp_path, monkeypatch, architecture, times
):
    folder = saved(tmp_path / "a", joined(weights(), *STORED[architecture]), architecture)
    checkpoint, read = open_checkpoint(folder), []
    layers = map_layers(checkpoint.tensors, architecture=architecture)
    store = type(checkpoint.store).read
    monkeypatch.setattr(
        type(checkpoint.store),
        "read",
        lambda own, shard, begin, into: read.append(len(into)) or store(own, shard, begin, into),
    )
    halves = [m for m in layers.matrices if m.half]
    for matrix in halves:
        matrix.read(checkpoint)
    assert len(halves) == LAYERS * EXPERTS * 2
    whole = LAYERS * EXPERTS * 2 * 4 * INNER * HIDDEN  # bytes of every gate and up
    assert sum(read) == times * whole
    store = StreamedShards(None, {})
    assert transfer(replace(checkpoint, store=store), halves).download == times * whole
    half = halves[0]
    alone = replace(half, ref=replace(half.ref, shape=half.shape), index=None, half=None)
    more = matrix_bytes(half) - matrix_bytes(alone)
    assert more == (times - 1) * 2 * 4 * INNER * HIDDEN


def test_a_dense_linear_stays_the_one_that_is_trained_and_compare_says_so(tmp_path):
    """Phi-3's gate_up_proj is one linear of the model, whose spectrum its parts do not have."""
    made = weights()
    apart, whole = {}, {}
    for i in range(LAYERS):
        gate, up, down = (made[i, 0, word] for word in SHAPES)
        own = {"gate_proj": gate, "up_proj": up, "down_proj": down}
        top = f"model.layers.{i}."
        apart |= {f"{top}mlp.{name}.weight": weight for name, weight in own.items()}
        whole[f"{top}mlp.gate_up_proj.weight"] = in_rows(gate, up)
        whole[f"{top}mlp.down_proj.weight"] = down
        qkv = {f"{top}self_attn.{n}_proj.weight": made[i, e, "gate"] for e, n in enumerate("qkv")}
        apart |= qkv
        whole[f"{top}self_attn.qkv_proj.weight"] = np.concatenate(list(qkv.values()))
    a = analyze(saved(tmp_path / "a", apart, "LlamaForCausalLM"), estimator="median")
    b = analyze(saved(tmp_path / "b", whole, "Phi3ForCausalLM"), estimator="median")
    found = compare(a, b)
    assert [pair.name for pair in found.matrices] == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(LAYERS)
    ]
    said = dict(line.split(": ", 1) for line in found.unmatched)
    assert said["model.layers.0.mlp.gate_up_proj.weight"] == (
        "only in the other file, where it joins gate_proj and up_proj"
    )
    assert said["model.layers.1.self_attn.k_proj.weight"] == (
        "only in the reference; the other has it within qkv_proj"
    )
    assert len(said) == LAYERS * 7
