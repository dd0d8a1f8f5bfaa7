"""With another vLLM than the one it knows the plugin changes nothing and says so."""

from __future__ import annotations

import logging
import sys
import types

import pytest

pytest.importorskip("peft")

from htsr_alloc.serving import vllm as plugin


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0rc1", "1.0.0"])
def test_another_version_is_left_alone(version, monkeypatch, caplog):
    module = types.ModuleType("vllm")
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", module)  # anything else of it cannot be imported
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert f"it is {version} and not >=0.32,<0.33" in caplog.text
    assert "adapters (LORA_MOE) are not served" in caplog.text
