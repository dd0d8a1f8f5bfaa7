"""Other trainers train an allocation's experts, given the path of its file."""

from __future__ import annotations

import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="needs the extra [train]")

from helpers import moe_tiny as tiny
from helpers import training_tiny
from helpers.commands import ROOT
from safetensors.torch import load_file

from htsr_alloc.allocation import allocate
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.model import layers_of
from htsr_alloc.records import dumps

EXPERTS = (3, 2)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """model/, a.json and rows.jsonl."""
    training_tiny.folder(tmp_path / "model")
    made = allocate(None, strategy="explicit", experts=EXPERTS)
    (tmp_path / "a.json").write_text(dumps(made))
    training_tiny.write(tmp_path / "rows.jsonl", training_tiny.learnable_rows(16))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def counts(model):
    """Experts of each layer, each linear's being the same."""
    found: dict[int, set[int]] = {}
    for layer in layers_of(model):
        number = int(layer.name.split(".layers.")[1].split(".")[0])
        found.setdefault(number, set()).add(layer.mixture["default"].experts)
    return [found[i] for i in sorted(found)]


def test_the_trl_script_trains_the_allocation(work, monkeypatch):
    pytest.importorskip("trl", reason="needs trl")
    monkeypatch.setattr(
        sys, "argv", ["trl_sft.py", "model", "a.json", "rows.jsonl", "adapter", "3"]
    )
    runpy.run_path(str(ROOT / "docs" / "trl_sft.py"), run_name="__main__")
    saved = load_file("adapter/adapter_model.safetensors")
    routers = {name: len(value) for name, value in saved.items() if name.endswith("_router")}
    assert len(routers) == 2 * 7
    assert all(n == EXPERTS[int(name.split(".layers.")[1][0])] for name, n in routers.items())
    assert all(value.any() for name, value in saved.items() if name.endswith("lora_moe_B"))


def test_the_ms_swift_tuner_puts_the_allocation_on(work, monkeypatch):
    base, mapping = types.ModuleType("swift.tuner_plugin.base"), types.ModuleType("mapping")
    base.PeftTuner = type("PeftTuner", (), {})
    mapping.tuners_map = {}
    for name in ("swift", "swift.tuner_plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "swift.tuner_plugin.base", base)
    monkeypatch.setitem(sys.modules, "swift.tuner_plugin.mapping", mapping)
    command = [sys.executable, "-m", "htsr_alloc.training.ms_swift"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert [p.name for p in Path(path).parent.glob("*.py") if not p.name.startswith("__")] == [
        "plugin.py"  # ms-swift puts this folder first on sys.path
    ]
    runpy.run_path(path)
    tuner = mapping.tuners_map["lora_moe"]
    args = types.SimpleNamespace(lora_rank=2, lora_alpha=4, lora_dropout=0.0)
    with pytest.raises(HtsrError, match="HTSR_ALLOCATION is not set"):
        tuner.prepare_model(args, tiny.llama())
    monkeypatch.setenv("HTSR_ALLOCATION", "a.json")
    monkeypatch.setenv("HTSR_SYSTEM", "adamole")
    made = tuner.prepare_model(args, tiny.llama())
    assert counts(made) == [{3}, {2}]
    config = made.peft_config["default"]
    assert (config.r, config.lora_alpha, config.system) == (2, 4, "adamole")


class Config(dict):
    """As axolotl's DictDefault: None for what is not there."""

    def __missing__(self, key):
        return None

    def __getattr__(self, key):
        return self[key]


def test_the_axolotl_plugin_puts_the_allocation_on_and_loads_it_again(work, monkeypatch):
    stub = types.ModuleType("axolotl.integrations.base")
    stub.BasePlugin = type("BasePlugin", (), {})
    stub.AdapterCapabilities = types.SimpleNamespace
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", stub)
    monkeypatch.delitem(sys.modules, "htsr_alloc.training.axolotl", raising=False)
    from htsr_alloc.training import axolotl

    plugin = axolotl.LoraMoePlugin()
    assert plugin.get_adapter_capabilities()[0].name == "lora_moe"
    assert plugin.get_input_args() == "htsr_alloc.training.axolotl.LoraMoeArgs"
    assert plugin.load_adapter(tiny.llama(), Config(adapter="lora")) is None
    with pytest.raises(HtsrError, match="names no allocation"):
        plugin.load_adapter(tiny.llama(), Config(adapter="lora_moe"))
    given = {"allocation": "a.json", "system": "hydra"}
    asked = Config(adapter="lora_moe", lora_moe=given, lora_r=4)
    nothing, config = plugin.load_adapter(tiny.llama(), asked, config_only=True)
    assert nothing is None
    assert (config.r, config.lora_alpha, config.system) == (4, 16, "hydra")
    made, _ = plugin.load_adapter(tiny.llama(), asked)
    assert counts(made) == [{3}, {2}]
    made.save_pretrained("saved")
    again, _ = plugin.load_adapter(tiny.llama(), Config(asked, lora_model_dir="saved"), True)
    assert counts(again) == [{3}, {2}]
    assert not any(p.requires_grad for p in again.parameters())
