"""The tables that people read: what they hold, and that 80 columns are enough."""

import json
import re
import shutil

import pytest
import torch
from helpers.commands import ROOT
from safetensors.torch import save_file

from htsr_alloc.cli.screen import short, spans

DATA = ROOT / "data"
WIDE = 80


@pytest.fixture
def smollm2(tmp_path):
    for name in ("smollm2.metrics.json", "smollm2.spectra.safetensors"):
        shutil.copy(DATA / name, tmp_path)
    return json.loads((DATA / "smollm2.metrics.json").read_text())


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "smollm2.metrics.json", "--estimator", "median"],
        ["explain", "smollm2.metrics.json"],
        ["allocate", "smollm2.metrics.json", "--T", "160", "--sensitivity", "--draws", "2"],
        ["allocate", "smollm2.metrics.json", "--T", "160", "--per-module"],
        ["allocate", "smollm2.metrics.json", "--for", "lora", "--rank", "16", "--per-module"],
    ],
    ids=lambda words: " ".join(words[:1] + words[2:4]),
)
def test_eighty_columns_are_enough(smollm2, invoke, arguments):
    lines = invoke(*arguments).stdout.splitlines()
    assert len(lines) > 30
    assert max(map(len, lines)) <= WIDE


def test_metrics_show_the_errors_and_the_tails(smollm2, invoke):
    table = invoke("fit", "smollm2.metrics.json", "--estimator", "official").stdout.splitlines()
    assert table[0].split()[3:7] == ["alpha", "±", "se", "k"]
    own = [m for m in smollm2["matrices"] if m["layer"] == 10]
    mean = sum(m["pl_alpha_hill"] for m in own) / 7
    error = sum(m["alpha_se"] ** 2 for m in own) ** 0.5 / 7
    ks = [m["k"] for m in own]
    words = table[11].split()
    assert words[:3] == ["10", "model.layers.10", "7"]
    assert words[3:7] == [f"{mean:.2f}", "±", f"{error:.2f}", f"{min(ks)}-{max(ks)}"]


def test_a_layer_with_a_matrix_without_a_fit_says_so(invoke, tmp_path):
    made = {f"h.{i}.{name}.weight": torch.randn(64, 64) for i in range(2) for name in "ab"}
    save_file(made | {"h.1.b.weight": torch.zeros(64, 64)}, tmp_path / "m.safetensors")
    whole, part = invoke("analyze", "m.safetensors").stdout.splitlines()[1:]
    assert whole.split()[2] == "2"
    assert part.split()[2] == "1/2"
    assert "1 of 2 matrices have no fit" in part


def test_inspect_shows_equal_layers_once(invoke, tmp_path):
    tensors = {}
    for layer in range(12):
        block = f"language_model.model.layers.{layer}"
        tensors[f"{block}.q_proj.weight"] = torch.randn(8, 8)
        if layer in (0, 5):
            tensors[f"{block}.mlp.up_proj.weight"] = torch.randn(16, 8)
        else:
            for expert in range(4):
                tensors[f"{block}.mlp.experts.{expert}.up_proj.weight"] = torch.randn(4, 8)
    save_file(tensors, tmp_path / "m.safetensors")
    lines = invoke("inspect", "m.safetensors").stdout.splitlines()
    assert max(map(len, lines)) <= WIDE
    rows = [re.split(r"  +", line.strip()) for line in lines]
    assert rows[0] == ["layers", "prefix", "role", "shape", "dtype", "each"]
    assert rows[3][:2] == ["1-4, 6-11", "….model.layers.*"]
    assert sorted(row[-4:] for row in rows[1:]) == [
        ["experts.up_proj", "4x8", "F32", "4"],
        ["mlp.up_proj", "16x8", "F32", "1"],
        ["q_proj", "8x8", "F32", "1"],
        ["q_proj", "8x8", "F32", "1"],
    ]
    assert rows[1][0] == "0, 5"


def test_runs_of_numbers_and_ends_of_names():
    assert spans([0, 2, 3, 4, 7]) == "0, 2-4, 7"
    assert spans(range(0, 20, 2)) == "0, 2, 4, … 18"
    assert short("model.layers.10") == "model.layers.10"
    assert short("model.language_model.layers.10") == "…model.layers.10"
