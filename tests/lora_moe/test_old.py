"""Adapters that version 0.1.0 saved give the logits that they gave (fixtures/make_adapters.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import htsr_alloc.lora_moe  # noqa: F401 - PEFT knows the adapters

ADAPTERS = Path(__file__).parents[1] / "fixtures" / "adapters"
SYSTEMS = ("alphalora", "goat", "goat_plus", "mor", "hydra", "adamole", "em_lora")


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_adapter_of_the_first_version_gives_its_logits(system):
    kept = load_file(ADAPTERS / "logits.safetensors")
    base = AutoModelForCausalLM.from_pretrained(ADAPTERS / "base", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, str(ADAPTERS / system)).double().eval()
    with torch.no_grad():
        logits = model(kept["tokens"]).logits
        with model.disable_adapter():
            bare = model(kept["tokens"]).logits
    torch.testing.assert_close(logits, kept[system], rtol=1e-9, atol=1e-9)
    assert (bare - kept[system]).abs().max() > 1e-2
