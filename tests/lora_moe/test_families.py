"""A selection of benchmarks/families.py: from a saved checkpoint to a reloaded adapter."""

from __future__ import annotations

import importlib
import re
import sys
import warnings

import pytest
from helpers.commands import ROOT

pytest.importorskip("peft", reason="needs the extra [train]")

DIFFER = {"gte", "minimax_m3_vl"}  # q, k and v apart in the model; gate and up apart in the file


@pytest.fixture(scope="module")
def families():
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)  # where a benchmark finds its neighbours
    yield importlib.import_module("families")
    sys.path.remove(folder)
    for name in ("families", "family_models", "family_inputs"):
        del sys.modules[name]


@pytest.mark.parametrize(
    ("task", "name"),
    [("vl", "qwen2_vl"), ("lm", "mixtral"), ("lm", "jetmoe"), ("lm", "mamba"),
     ("lm", "deepseek_v4"), ("s2s", "switch_transformers"), ("image", "segformer"),
     ("mlm", "ibert"), ("mlm", "gte"), ("vl", "minimax_m3_vl")],
)  # fmt: skip
def test_a_family_all_the_way_with_the_parameters_that_were_asked(families, task, name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = families.go(task, name, tmp_path)
    assert found.done == list(families.STEPS), found.reason
    assert found.trainable == found.asked > 0
    assert found.same == (name not in DIFFER)


@pytest.mark.parametrize(
    ("task", "name", "wanted"),
    [("vl", "qwen2_vl", {"input_ids": (2, 12), "attention_mask": (2, 12)}),
     ("vl", "pix2struct", {"flattened_patches": (2, 16, 66), "decoder_input_ids": (2, 6)}),
     ("image", "siglip2", {"pixel_values": (2, 16, 192), "pixel_attention_mask": (2, 16),
                           "spatial_shapes": (2, 2)})],
)  # fmt: skip
def test_inputs_follow_the_arguments_and_are_the_plainest_that_are_taken(
    families, task, name, wanted
):
    given = families.inputs_of(families.tiny_model(task, name))
    assert {name: tuple(value.shape) for name, value in given.items()} == wanted


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
