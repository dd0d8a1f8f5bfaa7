"""Systems as objects: the registry, what each one says of itself, and that no other file asks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import moe_tiny as tiny
from helpers.commands import ROOT
from torch import nn

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc.allocation import allocate
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import LoraMoeConfig, build
from htsr_alloc.lora_moe.model import layers_of
from htsr_alloc.lora_moe.systems import SYSTEMS, system_of
from htsr_alloc.lora_moe.systems.base import System

PACKAGE = ROOT / "htsr_alloc"
FOLDER = PACKAGE / "lora_moe" / "systems"
# Also the name of an allocation strategy, which other wings may ask for.
BOTH = {"alphalora"}
OF_SYSTEMS = ("lora_moe", "training", "watching")
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if FOLDER not in path.parents]


def named(source: str, names: set[str]) -> set[str]:
    """Names that stand in code as whole strings, in a mapping, a tuple or a comparison."""
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names
    }


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_other_file_names_a_system(path: Path):
    wing = path.relative_to(PACKAGE).parts[0]
    names = set(SYSTEMS) if wing in OF_SYSTEMS else set(SYSTEMS) - BOTH
    source = path.read_text()
    assert named(source, names) == set()
    modules = re.findall(r"lora_moe\.systems\.(\w+)", source)
    public = path == PACKAGE / "lora_moe" / "__init__.py"
    assert public or not set(modules) & set(SYSTEMS), "only public names are from a system"


def test_the_walk_finds_a_name():
    source = 'DENSE = ("mor", "hydra")\nif system == "em_lora":\n    """goat"""\n'
    assert named(source, set(SYSTEMS)) == {"mor", "hydra", "em_lora", "goat"}


def test_a_file_is_a_system():
    files = {p.stem for p in FOLDER.iterdir() if not p.name.startswith("__")} - {"base"}
    assert set(SYSTEMS) == files
    assert len(SYSTEMS) >= 7
    for name, system in SYSTEMS.items():
        assert isinstance(system, System)
        assert system.name == name
        assert system.title
        assert system.reference
    with pytest.raises(HtsrError, match="system cannot be 'molora'") as told:
        system_of("molora")
    assert "goat_plus" in str(told.value.hint)


def test_their_names_need_no_torch():
    script = (
        "import sys; from htsr_alloc.cli.choices import SYSTEM; print(*SYSTEM.names()); "
        "assert not {'torch', 'peft'} & set(sys.modules)"
    )
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert made.stdout.split() == list(SYSTEMS), made.stderr


@pytest.mark.parametrize("system", SYSTEMS)
def test_parameters_are_those_that_it_names(system):
    model = tiny.adapted(system, trained=False)
    for layer in layers_of(model):
        for name, parameter in layer.named_parameters():
            if name.startswith("lora_moe_"):
                short = name.split(".")[0].removeprefix("lora_moe_")
                kinds = (SYSTEMS[system].trained, SYSTEMS[system].frozen)
                assert short in kinds[0] + kinds[1]
                assert parameter.requires_grad == (short in kinds[0])


@pytest.mark.parametrize("setting", ["goat_segment", "goat_scale", "em_pooler", "em_weighting"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_setting_of_another_system_is_checked_too(system, setting):
    with pytest.raises(HtsrError, match=f"{setting} cannot be 'no such'"):
        LoraMoeConfig(system=system, **{setting: "no such"})


class PackedLinear(nn.Module):
    """A linear as quantisers make it: not an nn.Linear, but integers and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.detach().abs().max()) / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.register_buffer("qweight", packed)

    def forward(self, x):
        return x @ (self.qweight.float() * self.scale).T


def test_build_finds_quantised_linears():
    model = tiny.llama()
    linears = {n: m for n, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.model.get_submodule(parent), child, PackedLinear(linear))
    want = model(tiny.tokens()).logits
    allocation = allocate(None, strategy="explicit", experts=(3, 2), top_k=2)
    adapted = build(model, allocation, r=2).eval()
    assert len(linears) == 14
    assert [m.mixture["default"].experts for m in layers_of(adapted)] == [3] * 7 + [2] * 7
    assert torch.equal(adapted(tiny.tokens()).logits, want)  # B starts at 0
    tiny.move(adapted)
    assert not torch.allclose(adapted(tiny.tokens()).logits, want)


def test_what_is_adapted_is_no_linear_again():
    """A block that has adapters holds each linear once."""
    from htsr_alloc.lora_moe.linears import widths

    adapted = tiny.adapted()
    found = [n for n, m in adapted.named_modules() if widths(m) is not None]
    assert len(found) == 15
    assert all(n.endswith("base_layer") or n.endswith("lm_head") for n in found)
