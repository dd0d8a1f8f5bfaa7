"""The papers behind the numbers of a file, read from references.bib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from htsr_alloc.records import Allocation, Settings

_ENTRY = re.compile(r"^@(\w+)\{(.+?),\n(.*?)\n\}$", re.MULTILINE | re.DOTALL)
_FIELD = re.compile(r"^  (\w+) = \{(.*)\},?$", re.MULTILINE)

_OF_ESTIMATOR = {
    "official": ("qing2024alphalora", "lu2024alphapruning"),
    "paper": ("qing2024alphalora",),
    "median": ("zhou2023tempbalance",),
    "ks": ("clauset2009power",),
}
_OF_STRATEGY = {"alphalora": ("qing2024alphalora",)}


@dataclass(frozen=True)
class Reference:
    """A BibTeX entry: ``fields`` in order, ``why`` it is cited (its ``annote`` in the file)."""

    key: str
    kind: str
    why: str
    fields: tuple[tuple[str, str], ...]

    @property
    def url(self) -> str:
        """Where to read it."""
        return dict(self.fields)["url"]

    @property
    def line(self) -> str:
        """Authors, title and year in one line."""
        field = dict(self.fields)
        authors = field["author"].split(" and ")
        first = " ".join(reversed(authors[0].split(", ")))
        others = " et al." if len(authors) > 1 else ""
        title = field["title"].replace("{", "").replace("}", "")
        return f"{first}{others}: {title}, {field['year']}"

    @property
    def bibtex(self) -> str:
        """The entry, without its annotation."""
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in self.fields)
        return f"@{self.kind}{{{self.key},\n{body}\n}}"


@cache
def known() -> dict[str, Reference]:
    """Key -> reference, of every entry in references.bib (one field a line)."""
    text = resources.files("htsr_alloc.reports").joinpath("references.bib").read_text("utf-8")
    found = {}
    for kind, key, body in _ENTRY.findall(text):
        fields = dict(_FIELD.findall(body))
        why = fields.pop("annote")
        found[key] = Reference(key, kind, why, tuple(fields.items()))
    return found


def references(settings: Settings, allocations: Sequence[Allocation]) -> tuple[Reference, ...]:
    """The papers that a result with these settings and allocations rests on, each once."""
    keys = [*_OF_ESTIMATOR.get(settings.estimator, ())]
    keys += ["zhou2023tempbalance", "martin2021predicting"]
    if settings.farms:
        keys.append("hu2025farms")
    for strategy in (a.strategy for a in allocations if a.strategy):
        keys += _OF_STRATEGY.get(strategy.name, ())
    if allocations:
        keys.append("gao2025mola")
    return tuple(known()[key] for key in dict.fromkeys(keys))
