"""uv.lock and constraints.txt agree, and name only the public registry."""

from __future__ import annotations

import re

import pytest
from helpers.commands import ROOT

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;]+)(?: ; .*)?$")
CUDA = ("cuda-", "nvidia-", "triton")  # pinned by torch's own build for CUDA


@pytest.fixture(scope="module")
def lock() -> list[dict]:
    return tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]


def test_the_pins_for_pip_are_those_of_the_lock(lock):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    pins = {match.groups() for line in lines if (match := PIN.match(line))}
    assert len(pins) == len(lines)
    locked = {(p["name"], p["version"]) for p in lock if "registry" in p["source"]}
    assert pins == {p for p in locked if not p[0].startswith(CUDA)}


def test_the_lock_has_every_dependency(lock):
    """A name in pyproject.toml that the lock lacks: `make lock` was not run."""
    text = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [text["project"]["dependencies"], *text["project"]["optional-dependencies"].values()]
    asked = [item for group in groups for item in group]
    asked += [
        item for g in text["dependency-groups"].values() for item in g if isinstance(item, str)
    ]
    names = {re.match(r"[A-Za-z0-9._-]+", item)[0].lower().replace("_", "-") for item in asked}
    assert len(names) > 20
    assert names <= {p["name"] for p in lock}


def test_the_lock_names_the_public_registry_alone(lock):
    for package in lock:
        if package["name"] == "htsr-alloc":
            continue
        assert package["source"] == {"registry": "https://pypi.org/simple"}, package["name"]
        for file in [*package.get("wheels", ()), *filter(None, [package.get("sdist")])]:
            assert file["url"].startswith("https://files.pythonhosted.org/"), package["name"]
            assert file["hash"].startswith("sha256:")
