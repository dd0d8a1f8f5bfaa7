"""Records as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from htsr_alloc.cli.screen import Screen, bar, duration, size

if TYPE_CHECKING:
    from htsr_alloc.cost import Cost
    from htsr_alloc.layers import LayerMap
    from htsr_alloc.lora_moe.build import LayerReport
    from htsr_alloc.records import Allocation, Metrics
    from htsr_alloc.sources.listing import Transfer
    from htsr_alloc.sources.reading import Checkpoint


def show_inspection(
    screen: Screen, checkpoint: Checkpoint, layer_map: LayerMap, cost: Cost, moved: Transfer
) -> None:
    """Layers, matrices, what is left out and why, and what an analysis will take."""
    skipped = [
        *layer_map.skipped,
        *((name, "not in the index") for name in checkpoint.listing.unindexed),
    ]
    skipped += [(name, "quantised to integers") for name in layer_map.quantised]
    if screen.as_json:
        screen.result(
            {
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
                "bytes": sum(shard.nbytes for shard in checkpoint.listing.shards),
                "download_bytes": moved.download,
                "disk_bytes": moved.disk,
                "seconds": cost.seconds,
                "peak_bytes": cost.peak_bytes,
                "least_bytes": cost.least_bytes,
            }
        )
        return
    rows = []
    for number, prefix in enumerate(layer_map.prefixes):
        own = [m for m in layer_map.matrices if m.layer == number]
        shapes = sorted({f"{m.shape[0]}x{m.shape[1]}" for m in own})
        rows.append(
            [
                number,
                prefix,
                len(own),
                " ".join(dict.fromkeys(m.role for m in own)),
                " ".join(shapes),
            ]
        )
    screen.table(
        ["layer", "prefix", "matrices", "roles", "shapes"], rows, left=["prefix", "roles", "shapes"]
    )
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        screen.note(f"left out, {reason}: {names[0]}{more}")
    shards = checkpoint.listing.shards
    screen.note(
        f"{checkpoint.name}: {len(layer_map.prefixes)} layers, {len(layer_map.matrices)} matrices, "
        f"{size(sum(shard.nbytes for shard in shards))} in {len(shards)} files; analyze takes "
        f"about {duration(cost.seconds or 0)} and "
        f"at most {size(cost.peak_bytes)} of memory on this machine's CPU (--max-memory can bring "
        f"that down to {size(cost.least_bytes)})."
    )


def show_metrics(screen: Screen, metrics: Metrics) -> None:
    """One row a layer."""
    if screen.as_json:
        screen.result(asdict(metrics))
        return
    rows = [
        [x.layer, x.prefix, x.matrices, x.pl_alpha_hill, x.alpha_hat, x.stable_rank, x.reason or ""]
        for x in metrics.layers
    ]
    columns = ["layer", "prefix", "matrices", "pl_alpha_hill", "alpha_hat", "stable_rank", "note"]
    screen.table(columns, rows, left=["prefix", "note"])
    farms = ", FARMS windows" if metrics.settings.farms else ""
    screen.note(f"estimator: {metrics.settings.estimator}{farms}")


def show_allocation(screen: Screen, result: Allocation) -> None:
    """One row a layer, with a bar."""
    if screen.as_json:
        screen.result(asdict(result))
        return
    largest = max(result.experts)
    rows = [
        [
            row.layer,
            row.prefix or "-",
            row.score,
            row.quota,
            row.experts,
            k,
            bar(row.experts, largest),
        ]
        for row, k in zip(result.evidence, result.top_k, strict=True)
    ]
    columns = ["layer", "prefix", "score", "quota", "experts", "top_k", ""]
    screen.table(columns, rows, left=["prefix", ""])
    strategy = result.strategy
    if strategy is not None:
        given = {k: v for k, v in asdict(strategy).items() if v is not None and k != "name"}
        said = ", ".join(f"{key} {value}" for key, value in given.items())
        screen.note(
            f"{strategy.name}: T = {result.budget} over {len(result.experts)} layers; {said}"
        )


def show_build(screen: Screen, model: Any, layers: Sequence[LayerReport]) -> None:
    """One row a layer, then the sum."""
    trainable, _ = model.get_nb_trainable_parameters()
    frozen = sum(p.numel() for n, p in model.named_parameters() if "lora_moe_" not in n)
    if screen.as_json:
        rows = [asdict(row) for row in layers]
        screen.result({"layers": rows, "trainable": trainable, "base": frozen})
        return
    columns = ["layer", "prefix", "experts", "top_k", "modules", "trainable", "share"]
    screen.table(
        columns,
        [
            [x.layer, x.prefix, x.experts, x.top_k, x.modules, f"{x.trainable:,}", f"{x.share:.2%}"]
            for x in layers
        ],
        left=["prefix"],
    )
    screen.note(
        f"{trainable:,} trainable parameters, {trainable / frozen:.2%} of the base's {frozen:,}"
    )
