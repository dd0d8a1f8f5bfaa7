"""What the plugin changes in vLLM itself, and what it leaves."""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

import pytest

pytest.importorskip("vllm", reason="needs vLLM 0.32 (make serve-demo)")

from helpers import moe_tiny as tiny

from htsr_alloc.serving import vllm as plugin
from htsr_alloc.serving.vllm import touched

pytestmark = pytest.mark.server


@pytest.fixture
def runner(monkeypatch):
    """vLLM's own module, as if the plugin had not been there."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.v1.worker import lora_model_runner_mixin

    name = "LRUCacheWorkerLoRAManager"
    monkeypatch.setattr(lora_model_runner_mixin, name, LRUCacheWorkerLoRAManager)
    return lora_model_runner_mixin


def test_vllm_finds_the_plugin():
    found = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert found["htsr_alloc"] == "htsr_alloc.serving.vllm:register"


def test_the_one_name_is_bound_once(runner):
    plugin.register()
    bound = runner.LRUCacheWorkerLoRAManager
    assert bound.__module__ == "htsr_alloc.serving.vllm.managers"
    plugin.register()
    assert runner.LRUCacheWorkerLoRAManager is bound


@pytest.mark.parametrize("table", ["PARAMETERS", "SOURCES"])
def test_a_changed_name_leaves_vllm_as_it_is(table, runner, monkeypatch, caplog, tmp_path):
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    assert touched.differences() == []
    changed = {"PARAMETERS": "self x y", "SOURCES": ("self.moved",)}[table]
    name = f"{touched.LINEAR}._apply_lora_to_output"
    monkeypatch.setitem(getattr(touched, table), name, changed)
    monkeypatch.setitem(touched.PARAMETERS, "vllm.lora.utils:gone", "x")
    before = runner.LRUCacheWorkerLoRAManager
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert runner.LRUCacheWorkerLoRAManager is before
    assert name in caplog.text
    assert "vllm.lora.utils:gone is missing" in caplog.text
    tiny.adapted("alphalora").save_pretrained(str(tmp_path))
    helper = PEFTHelper.from_local_dir(str(tmp_path), 64)
    with pytest.raises(ValueError, match="lora_moe_A is unsupported LoRA weight"):
        LoRAModel.from_local_checkpoint(str(tmp_path), {"q_proj"}, helper, device="cpu")
