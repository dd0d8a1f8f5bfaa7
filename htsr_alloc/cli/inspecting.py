"""What ``htsr inspect`` shows: layers, matrices, what is left out, what an analysis will take."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from htsr_alloc.cli.screen import Table, View, duration, short, size, spans

if TYPE_CHECKING:
    from htsr_alloc.analysis.cost import Estimate
    from htsr_alloc.checkpoints.layers import LayerMap, MatrixRef
    from htsr_alloc.checkpoints.listing import Transfer
    from htsr_alloc.checkpoints.reading import Checkpoint


def inspection(
    checkpoint: Checkpoint, layer_map: LayerMap, cost: Estimate, moved: Transfer
) -> View:
    """Equal layers once, a row for each role and shape of theirs; 80 columns."""
    from htsr_alloc.checkpoints import quantised

    skipped = [
        *layer_map.skipped,
        *((name, "not in the index") for name in checkpoint.listing.unindexed),
        *((name, "quantised in a format that is not read") for name in layer_map.quantised),
    ]
    shards = checkpoint.listing.shards
    nbytes = sum(shard.nbytes for shard in shards)
    data = {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "architecture": checkpoint.architecture,
        "layers": list(layer_map.prefixes),
        "matrices": [
            {
                "tensor": m.name,
                "layer": m.layer,
                "role": m.role,
                "expert": m.expert,
                "shape": m.shape,
                "dtype": m.ref.dtype,
            }
            for m in layer_map.matrices
        ],
        "skipped": [{"tensor": name, "reason": reason} for name, reason in skipped],
        "bytes": nbytes,
        "download_bytes": moved.download,
        "disk_bytes": moved.disk,
        "seconds": cost.seconds,
        "peak_bytes": cost.peak_bytes,
        "least_bytes": cost.least_bytes,
    }
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped:
        reasons.setdefault(reason, []).append(name)
    columns = ["layers", "prefix", "role", "shape", "dtype", "each"]
    return View(
        data,
        [Table(columns, _rows(layer_map), left=["layers", "prefix", "role"])],
        [
            *(f"left out, {reason}: {_first(names)}" for reason, names in reasons.items()),
            *dequantised(quantised.kinds(m.ref for m in layer_map.matrices)),
            f"{checkpoint.name}: {len(layer_map.prefixes)} layers, "
            f"{len(layer_map.matrices)} matrices, {size(nbytes)} in {len(shards)} "
            f"{'file' if len(shards) == 1 else 'files'}",
            f"analyze takes about {duration(cost.seconds or 0)} and at most "
            f"{size(cost.peak_bytes)} of memory on this machine's CPU; --max-memory can lower "
            f"that to {size(cost.least_bytes)}",
        ],
    )


def dequantised(kinds: Iterable[tuple[str, str, int]]) -> list[str]:
    """One line for each (format, dtype, count) of quantised matrices."""
    return [f"dequantised: {count} matrices of {dtype} ({form})" for form, dtype, count in kinds]


def _rows(layer_map: LayerMap) -> list[list[object]]:
    """One row a kind of matrix of equal layers: same stack, roles, shapes, dtypes and counts."""
    own: dict[int, list[MatrixRef]] = {}
    for matrix in layer_map.matrices:
        own.setdefault(matrix.layer, []).append(matrix)
    groups: dict[tuple[object, ...], list[int]] = {}
    kinds: dict[tuple[object, ...], Counter[tuple[str, tuple[int, ...], str]]] = {}
    for layer, prefix in enumerate(layer_map.prefixes):
        matrices = Counter((m.role, tuple(m.shape), m.ref.dtype) for m in own.get(layer, []))
        key = (re.sub(r"\d+$", "*", prefix), *sorted(matrices.items()))
        groups.setdefault(key, []).append(layer)
        kinds.setdefault(key, matrices)
    rows: list[list[object]] = []
    for key, layers in groups.items():
        head: list[object] = [spans(layers), short(str(key[0]))]
        for (role, shape, dtype), each in kinds[key].items():
            rows.append([*head, role, "x".join(map(str, shape)), dtype, each])
            head = ["", ""]
        if not kinds[key]:
            rows.append([*head, "-", "-", "-", 0])
    return rows


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
