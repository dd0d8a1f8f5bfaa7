"""A selection of benchmarks/families.py: from a saved checkpoint to a reloaded adapter."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings

import pytest
from helpers.commands import ROOT

pytest.importorskip("peft", reason="needs the extra [train]")


@pytest.fixture(scope="module")
def families():
    path = ROOT / "benchmarks" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["families"]


@pytest.mark.parametrize(
    ("task", "name"),
    [("vl", "qwen2_vl"), ("lm", "mixtral"), ("lm", "jetmoe"), ("lm", "mamba"),
     ("s2s", "switch_transformers"), ("image", "segformer")],
)  # fmt: skip
def test_a_family_all_the_way_with_the_parameters_that_were_asked(families, task, name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = families.go(task, name, tmp_path)
    assert found.done == list(families.STEPS), found.reason
    assert found.trainable == found.asked > 0


def test_a_family_that_cannot_be_made_says_why(families, tmp_path):
    found = families.go("image", "resnet", tmp_path)
    assert found.done == []
    assert re.fullmatch(r"its smallest model here has \d+ M parameters\.", found.reason)
    assert families.row(found).startswith("| resnet | image |")


def test_what_transformers_raises_is_said_to_be_its_own(families, tmp_path):
    found = families.go("vl", "chameleon", tmp_path)
    assert found.reason.startswith("transformers cannot make it of these small numbers: ")
    assert found.reason.endswith(".")
    assert families.first_line(ValueError("First:\n\n  second. ")) == "First: second."
    assert families.first_line(KeyError()) == "KeyError."
    assert len(families.first_line(ValueError("x" * 999))) == 163
