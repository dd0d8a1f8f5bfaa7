"""PEFT knows the method; registering it changes nothing outside the enum."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from helpers.commands import environment

pytest.importorskip("peft", reason="needs the extra [train]")

from peft import mapping
from peft.utils.peft_types import PeftType

from htsr_alloc.lora_moe import LoraMoeConfig, LoraMoeModel
from htsr_alloc.lora_moe.register import register


def test_the_member_is_like_any_other():
    member = PeftType("LORA_MOE")
    assert member is PeftType.LORA_MOE is PeftType["LORA_MOE"]  # type: ignore[attr-defined]
    assert member == "LORA_MOE"
    assert isinstance(member, PeftType)
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(set(PeftType))
    assert pickle.loads(pickle.dumps(member)) is member
    assert repr(member) == "<PeftType.LORA_MOE: 'LORA_MOE'>"
    assert PeftType("LORA") is PeftType.LORA
    assert len({m._sort_order_ for m in PeftType}) == len(PeftType)  # type: ignore[attr-defined]


def test_registering_again_changes_nothing():
    register(LoraMoeConfig, LoraMoeModel)
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["LORA_MOE"] is LoraMoeModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["LORA_MOE"] == "lora_moe_"


def test_without_peft_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from htsr_alloc.errors import HtsrError\n"
        "try:\n    import htsr_alloc.lora_moe\n"
        "except HtsrError as error:\n    print(error.message, error.hint)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    assert "LoRA-MoE needs PEFT" in done.stdout
    assert "pip install 'htsr-alloc[train]'" in done.stdout
