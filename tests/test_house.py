"""The package's plan: which wing may import which, and what stands in the root."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers.commands import ROOT

PACKAGE = ROOT / "htsr_alloc"
OPEN = {"errors", "files", "style", "version"}  # what every wing may import
ARROWS = {
    "records": set(),
    "checkpoints": set(),
    "spectra": {"records"},
    "analysis": {"records", "checkpoints", "spectra"},
    "allocation": {"records", "checkpoints", "spectra", "analysis"},
    "lora_moe": {"records", "checkpoints", "allocation"},
    "training": {"records", "spectra", "allocation", "lora_moe"},
    "serving": {"lora_moe"},
    "watching": {"records", "spectra", "analysis", "lora_moe"},
    "reports": {"records", "allocation"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names inside the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            head, _, rest = node.module.partition(".")
            if head == "htsr_alloc":
                found |= {f"{rest}.{n.name}" if rest else n.name for n in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail(f"{path}: a relative import")
        elif isinstance(node, ast.Import):
            found |= {
                n.name.partition(".")[2] for n in node.names if n.name.startswith("htsr_alloc.")
            }
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_root_holds_the_wings_and_nothing_else():
    files = {p.name for p in PACKAGE.glob("*.py")}
    assert files == {
        *(
            "__init__.py",
            "__main__.py",
            "version.py",
            "errors.py",
            "files.py",
            "lm_eval.py",
            "style.py",
        )
    }
    folders = {p.name for p in PACKAGE.iterdir() if any(p.glob("*.py"))}
    assert folders == {*ARROWS, "cli"}


@pytest.mark.parametrize("wing", ARROWS)
def test_a_wing_imports_only_what_lies_behind_it(wing):
    for path in sorted((PACKAGE / wing).rglob("*.py")):
        for name in imported(path):
            first = name.partition(".")[0]
            assert first in ARROWS[wing] | OPEN | {wing}, f"{path.name} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    names = {name_of(path): path for path in MODULES}
    graph = {}
    for name, path in names.items():
        graph[name] = set()
        for target in imported(path):
            while target and target not in names:
                target = target.rpartition(".")[0]
            if target and target != name:
                graph[name].add(target)
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])


def test_no_test_imports_a_test():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            assert not module.split(".")[-1].startswith("test_"), path


OTHERS = {
    "exports/mola.py",
    "exports/axolotl.py",
    "serving/launch.py",
    "ms_swift/__init__.py",
}  # they write other programs' options
COMMANDS = re.compile(r"(htsr|torchrun|python -m) .*")  # a whole command may have its options


@pytest.mark.parametrize("wing", sorted(ARROWS))
def test_below_the_command_line_no_sentence_names_an_option(wing):
    for path in (PACKAGE / wing).rglob("*.py"):
        if "/".join(path.parts[-2:]) in OTHERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = COMMANDS.sub("", node.value)
                assert not re.search(r"(^|[\s`(])(--[a-zA-Z]|-[oq]\b)", text), f"{path}: {text}"
