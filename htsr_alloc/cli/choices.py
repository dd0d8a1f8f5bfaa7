"""Options that take a name from a registry, which is read only when its names are asked for."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules

from htsr_alloc.errors import HtsrError

PACKAGE = Path(__file__).parents[1]
MARK = re.compile(r"\{([\w.]+):(\w+)\}")


class UnknownName(HtsrError):
    """A name that no registry has: wrong usage."""


@dataclass(frozen=True)
class Choice:
    """A registry's names. ``registry`` is ``module:NAME``, and so is ``more``, a second one."""

    noun: str
    registry: str
    more: str | None = None

    def names(self) -> list[str]:
        """All names that may be given."""
        every = filter(None, (self.registry, self.more))
        return [name for registry in every for name in names_in(*registry.split(":"))]

    def check(self, name: str) -> None:
        """Refuse what is not a name.

        Raises:
            UnknownName: it says which name is nearest.
        """
        names = self.names()
        if name not in names:
            import difflib  # for this only: --help is quicker without

            near = difflib.get_close_matches(name, names, 1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UnknownName(
                f"There is no {self.noun} {name!r}.", f"{hint}Choose from {', '.join(names)}."
            )

    def complete(self, incomplete: str) -> list[str]:
        """For the shell: the names that begin like this."""
        try:
            return [name for name in self.names() if name.startswith(incomplete)]
        except HtsrError:  # an extra is not installed
            return []

    @property
    def mark(self) -> str:
        """What stands in a help text until ``filled`` puts the names there."""
        return ", ".join(f"{{{registry}}}" for registry in (self.registry, self.more) if registry)


def names_in(module: str, name: str) -> list[str]:
    """The names of a registry: a dict or a tuple, or ``modules``, the files of a folder.

    Of a class they are the fields that are declared as ``Setting``, each with its type. Where names
    are written out they are read from the source: --help then loads no torch.
    """
    path = PACKAGE.joinpath(*module.split("."))
    if name == "modules":
        return sorted(own.name for own in iter_modules([str(path)]) if own.name != "base")
    source = next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)
    for node in ast.parse(source.read_text("utf-8")).body if source else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            return list(_settings(node))
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            names = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [None])
            if all(isinstance(own, ast.Constant) for own in names):
                return [str(own.value) for own in names if isinstance(own, ast.Constant)]
    return list(getattr(importlib.import_module(f"htsr_alloc.{module}"), name))


def _settings(node: ast.ClassDef) -> Iterator[str]:
    """ "top_k (int)" of each field that a class declares as ``Setting[int]``."""
    for field in node.body:
        kind = getattr(field, "annotation", None)
        if isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Setting":
            yield f"{ast.unparse(field.target)} ({ast.unparse(kind.slice)})"  # type: ignore[attr-defined]


def filled(text: str) -> str:
    """A help text with the names of its registries."""

    def listed(found: re.Match[str]) -> str:
        try:
            return ", ".join(names_in(*found.groups()))
        except HtsrError as error:
            return f"(to see them: {error.hint})"

    return MARK.sub(listed, text)


ADAPTER = Choice("adapter", "allocation.budget:ADAPTERS")
DTYPE = Choice("dtype", "training.settings:DTYPES")
ENGINE = Choice("engine", "spectra.engines:ENGINES")
ESTIMATOR = Choice("estimator", "spectra.estimators:ESTIMATORS")
EXPORT = Choice("export", "allocation.exports:EXPORTS")
METRIC = Choice("metric", "records.facts:METRICS")
OVER = Choice("score_over", "allocation.scope:OVER")
POOL = Choice("pool", "allocation.units:POOLS")
REPAIR = Choice("repair", "allocation.rounding:REPAIRS")
SCORE = Choice("score", "training.scoring.registry:SCORES")
STRATEGY = Choice("strategy", "allocation.strategies:modules")
SYSTEM = Choice("system", "lora_moe.systems:modules")
TASK = Choice("task", "training.tasks:TASKS")
TRAINED_SYSTEM = Choice("system", "lora_moe.systems:modules", "training.baselines:BASELINES")
VIEW = Choice("view", "reports.plots:PLOTS")
