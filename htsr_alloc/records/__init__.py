"""The two JSON files, metrics (facts) and allocation (decisions), as frozen dataclasses.

No torch and no numpy, so that a trainer can read an allocation without them. The dataclasses are
the source: msgspec reads a file into them, and the JSON Schemas in ``schemas/`` are made from them.

A version stays as long as a reader of that version cannot misread a file. Within it, keys may be
added that are left out at their default; a reader that does not know such a key refuses the file.
"""

from htsr_alloc.records.decisions import (
    EXPERTS,
    RANKS,
    Allocation,
    Evidence,
    Module,
    Parameters,
    RoleSignal,
    Signal,
    StrategyRecord,
)
from htsr_alloc.records.facts import (
    FAILED,
    MARKED,
    METRICS,
    OK,
    Dequantised,
    Farms,
    File,
    Layer,
    Matrix,
    Metrics,
    Model,
    Settings,
    Skipped,
    Tool,
    this_tool,
)
from htsr_alloc.records.json import as_json, dumps, loads

__all__ = [
    "EXPERTS",
    "FAILED",
    "MARKED",
    "METRICS",
    "OK",
    "RANKS",
    "Allocation",
    "Dequantised",
    "Evidence",
    "Farms",
    "File",
    "Layer",
    "Matrix",
    "Metrics",
    "Model",
    "Module",
    "Parameters",
    "RoleSignal",
    "Settings",
    "Signal",
    "Skipped",
    "StrategyRecord",
    "Tool",
    "as_json",
    "dumps",
    "loads",
    "this_tool",
]
