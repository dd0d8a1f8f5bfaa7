"""CSV, for whatever reads tables."""

from __future__ import annotations

import csv
import io

from htsr_alloc.allocation.exports.lora import Lora, Modules, refuse_modules
from htsr_alloc.records import Allocation


def to_csv(allocation: Allocation, lora: Lora | None = None, modules: Modules | None = None) -> str:
    """One row a layer: layer, prefix, score, quota, experts (or rank), top_k.

    Where linears have counts of their own, one row a linear: layer, module, role and the same.
    """
    refuse_modules("csv", modules)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    count = "rank" if allocation.holds_ranks else "experts"
    if allocation.modules:
        writer.writerow(["layer", "module", "role", "score", "quota", count, "top_k"])
        for m in allocation.modules:
            writer.writerow([m.layer, m.name, m.role, m.score, m.quota, m.experts, m.top_k])
        return text.getvalue()
    writer.writerow(["layer", "prefix", "score", "quota", count, "top_k"])
    for i, (experts, top_k) in enumerate(zip(allocation.experts, allocation.top_k, strict=True)):
        row = allocation.evidence[i] if allocation.evidence else None
        known = [row.prefix, row.score, row.quota] if row else [None] * 3
        writer.writerow([i, *known, experts, top_k])
    return text.getvalue()
