"""The JSON Schemas of the two files, made from their dataclasses.

``python -m htsr_alloc.records.schema`` writes them to ``schemas/``.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from htsr_alloc.records.convert import strict
from htsr_alloc.records.decisions import Allocation
from htsr_alloc.records.facts import Metrics

FOLDER = Path(__file__).with_name("schemas")


def schema_file(kind: type[Metrics] | type[Allocation]) -> Path:
    """Where the schema is kept, named after the format and its version."""
    return FOLDER / f"{kind.FORMAT.removeprefix('htsr.')}-{kind.VERSION}.json"


def schema_text(kind: type[Metrics] | type[Allocation]) -> str:
    """The schema (draft 2020-12) as JSON text."""
    made = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"htsr_alloc/schemas/{schema_file(kind).name}",
        "title": kind.FORMAT,
        **msgspec.json.schema(strict(kind)),
    }
    return json.dumps(made, indent=1) + "\n"


if __name__ == "__main__":
    for record in (Metrics, Allocation):
        schema_file(record).write_text(schema_text(record), encoding="utf-8")
