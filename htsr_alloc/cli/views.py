"""Records as views: JSON, tables and notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from htsr_alloc.cli.screen import Table, View, bar, duration, size
from htsr_alloc.records import Module, as_json
from htsr_alloc.records.facts import FOR_DECISIONS, NOISY, SHORT

APART = ("name", "farms", "scores", "signal")  # of a strategy's record, said in other words

if TYPE_CHECKING:
    from htsr_alloc.allocation.sensitivity import Sensitivity
    from htsr_alloc.analysis.cost import Estimate
    from htsr_alloc.checkpoints.layers import LayerMap
    from htsr_alloc.checkpoints.listing import Transfer
    from htsr_alloc.checkpoints.reading import Checkpoint
    from htsr_alloc.lora_moe.build import LayerReport
    from htsr_alloc.lora_moe.collapse import Collapsed
    from htsr_alloc.records import Allocation, Metrics, Signal, Strategy
    from htsr_alloc.reports.explain import LayerParts
    from htsr_alloc.training.evaluate import Score
    from htsr_alloc.training.run import Trained


def inspection(
    checkpoint: Checkpoint, layer_map: LayerMap, cost: Estimate, moved: Transfer
) -> View:
    """Layers, matrices, what is left out and why, and what an analysis will take."""
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
    rows = []
    for number, prefix in enumerate(layer_map.prefixes):
        own = [m for m in layer_map.matrices if m.layer == number]
        roles = " ".join(dict.fromkeys(m.role for m in own))
        shapes = " ".join(sorted({f"{m.shape[0]}x{m.shape[1]}" for m in own}))
        rows.append([number, prefix, len(own), roles, shapes])
    columns = ["layer", "prefix", "matrices", "roles", "shapes"]
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped:
        reasons.setdefault(reason, []).append(name)
    return View(
        data,
        [Table(columns, rows, left=["prefix", "roles", "shapes"])],
        [
            *(f"left out, {reason}: {_first(names)}" for reason, names in reasons.items()),
            *_dequantised(quantised.kinds(m.ref for m in layer_map.matrices)),
            f"{checkpoint.name}: {len(layer_map.prefixes)} layers, "
            f"{len(layer_map.matrices)} matrices, {size(nbytes)} in {len(shards)} "
            f"{'file' if len(shards) == 1 else 'files'}",
            f"analyze takes about {duration(cost.seconds or 0)} and at most "
            f"{size(cost.peak_bytes)} of memory on this machine's CPU; --max-memory can lower "
            f"that to {size(cost.least_bytes)}",
        ],
    )


def _dequantised(kinds: Iterable[tuple[str, str, int]]) -> list[str]:
    """One line a kind of quantised matrices."""
    return [f"dequantised: {count} matrices of {dtype} ({form})" for form, dtype, count in kinds]


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def metrics(found: Metrics) -> View:
    """One row a layer."""
    rows = [
        [x.layer, x.prefix, x.matrices, x.pl_alpha_hill, x.alpha_hat, x.stable_rank, x.reason or ""]
        for x in found.layers
    ]
    columns = ["layer", "prefix", "matrices", "pl_alpha_hill", "alpha_hat", "stable_rank", "note"]
    farms = ", FARMS windows" if found.settings.farms else ""
    return View(
        as_json(found),
        [Table(columns, rows, left=["prefix", "note"])],
        [
            f"estimator: {found.settings.estimator}{farms}",
            *_dequantised((d.format, d.dtype, d.matrices) for d in found.model.dequantised),
            *_doubtful(found),
        ],
    )


def _doubtful(found: Metrics) -> list[str]:
    """One line of the matrices whose start jumps or whose tail is short, if any."""
    total = len(found.matrices)
    jumps = sum(matrix.start_jumps for matrix in found.matrices)
    short = sum(matrix.short_tail for matrix in found.matrices)
    if not jumps and not short:
        return []
    return [
        f"of {total} matrices {jumps} depend most on where the tail starts, and {short} have a "
        f"tail of fewer than {SHORT} eigenvalues: htsr explain shows which"
    ]


def explanation(found: Sequence[LayerParts], estimator: str, layer: int | None) -> View:
    """One layer's matrices, or each layer with the one that adds most; 80 columns."""
    rows, notes = [], [f"estimator: {estimator}"]
    for row in found:
        for part in row.parts[: 1 if layer is None else None]:
            own = [part.role[:20], _plus(part.alpha, part.se), part.k, f"{part.share:.0%}"]
            cells = [*own, part.without, ", ".join(part.reasons)]
            score = [_plus(row.score, row.se)] if layer is None else []
            rows.append([row.layer, *score, *cells])
        if layer is not None:
            notes.append(f"{row.prefix}: the mean is {_plus(row.score, row.se)}")
    first = ["layer", "mean"] if layer is None else ["layer"]
    columns = [*first, "role", "alpha ± se", "k", "share", "without", "note"]
    notes.append(
        "without: the layer's mean without that matrix; start: the choice of the tail's start "
        f"decides its alpha; short: k < {SHORT}"
    )
    table = Table(columns, rows, left=["role", "note"])
    return View({"estimator": estimator, "layers": [asdict(x) for x in found]}, [table], notes)


def _plus(value: float | None, se: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ± {se:.2f}" if se is not None else "")


def allocation(result: Allocation, found: Sensitivity | None = None) -> View:
    """One row a layer with a bar, or one row a linear; then how stable the counts are."""
    data = as_json(result)
    units = result.modules or result.evidence
    largest = max(unit.experts for unit in units)
    top_k = [unit.top_k for unit in result.modules] or result.top_k
    rows = [
        [
            unit.layer,
            (unit.name if isinstance(unit, Module) else unit.prefix) or "-",
            unit.score,
            unit.quota,
            unit.experts,
            k,
            bar(unit.experts, largest),
        ]
        for unit, k in zip(units, top_k, strict=True)
    ]
    name = "module" if result.modules else "prefix"
    columns = ["layer", name, "score", "quota", "experts", "top_k", ""]
    if result.holds_ranks:  # all ranks work on every token
        columns = ["layer", name, "score", "quota", "rank", ""]
        rows = [[*row[:5], row[6]] for row in rows]
    tables = [Table(columns, rows, left=[name, ""])]
    notes = []
    if found is not None:
        data = {"allocation": data, "sensitivity": asdict(found)}
        tables.append(_sensitivity(found))
        notes += _causes(found)
    if result.strategy is not None:
        strategy = result.strategy
        fields = as_json(strategy).items()
        given = {k: v for k, v in fields if v is not None and k not in APART}
        said = [f"{key} {_said(value)}" for key, value in given.items()]
        said += [f"scores {strategy.scores.file}"] if strategy.scores else []
        said += ["FARMS windows"] if strategy.farms else []
        what = "ranks" if result.holds_ranks else "T"
        line = f"{strategy.name}: {what} = {result.budget} over {len(result.experts)} layers"
        notes.append("; ".join([line, ", ".join(said)]) if said else line)
        notes += _signal(strategy.signal)
        notes += _recommended(strategy)
    if result.parameters is not None:
        money = result.parameters
        notes.append(
            f"{money.spent:,} of {money.asked:,} parameters"
            + (
                f", those of rank {money.r} on every linear"
                if result.holds_ranks
                else f" at r = {money.r}, routers included"
            )
        )
    return View(data, tables, notes)


def _signal(signal: Signal | None) -> list[str]:
    """How much of each role's spread is signal, and what follows."""
    if signal is None:
        return []
    roles = [f"{x.role} {x.i2:.2f} ({x.i2_low:.2f}-{x.i2_high:.2f})" for x in signal.roles]
    said = [f"I², the share of a role's spread that is signal (95 %): {', '.join(roles)}"]
    return said + ([signal.uniform] if signal.uniform else [])


def _recommended(strategy: Strategy) -> list[str]:
    """Which estimator a decision should use, where this one only reproduces a paper."""
    if strategy.estimator not in NOISY:
        return []
    return [
        f"{strategy.estimator} reproduces a paper. For a decision use the smoother "
        f"{FOR_DECISIONS}: htsr fit METRICS --estimator {FOR_DECISIONS}"
    ]


def _said(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sensitivity(found: Sensitivity) -> Table:
    """One row a layer: its range under each cause, and the share of draws within one expert."""
    rows = []
    for layer in found.layers:
        cells: list[object] = [layer.layer, layer.prefix or "-", layer.experts]
        for cause in found.causes:
            seen = layer.ranges[cause]
            cells += [f"{seen.low}-{seen.high}", f"{seen.near:.0%}"]
        rows.append([*cells, "stable" if layer.stable else ""])
    columns = [name for cause in found.causes for name in (cause, "±1")]
    return Table(["layer", "prefix", "experts", *columns, ""], rows, left=["prefix", ""])


def _causes(found: Sensitivity) -> list[str]:
    notes = []
    for cause, draws in found.causes.items():
        said = f"{draws} draws, seed {found.seed}" if isinstance(draws, int) else draws
        if isinstance(said, list):
            said = ", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in said)
        notes.append(f"{cause}: {said}")
    stable = sum(layer.stable for layer in found.layers)
    notes.append(
        f"{stable} of {len(found.layers)} layers are stable: within one expert in 90 % of the "
        "draws of every cause"
    )
    return notes


def build(model: Any, layers: Sequence[LayerReport]) -> View:
    """One row a layer, then the sum."""
    trainable, _ = model.get_nb_trainable_parameters()
    frozen = sum(p.numel() for n, p in model.named_parameters() if "lora_moe_" not in n)
    rows = [
        [
            x.layer,
            x.prefix,
            x.experts if x.fewest == x.experts else f"{x.fewest}-{x.experts}",
            x.top_k,
            x.modules,
            f"{x.trainable:,}",
            f"{x.share:.2%}",
        ]
        for x in layers
    ]
    columns = ["layer", "prefix", "experts", "top_k", "modules", "trainable", "share"]
    return View(
        {"layers": [asdict(row) for row in layers], "trainable": trainable, "base": frozen},
        [Table(columns, rows, left=["prefix"])],
        [f"{trainable:,} trainable parameters, {trainable / frozen:.2%} of the base's {frozen:,}"],
    )


def trained(done: Trained) -> View:
    """One row a run."""
    columns = ["rows", "steps", "loss", "seconds", "trainable"]
    row = [done.rows, done.steps, done.loss, f"{done.seconds:.0f}", f"{done.trainable:,}"]
    return View(asdict(done), [Table(columns, [row])])


def collapsed(made: Collapsed, rows: int) -> View:
    """One row."""
    ranks = [a.shape[0] for a, _ in made.factors.values()]
    data = {"error": made.error, "exact": made.exact, "rows": rows, "modules": len(ranks)}
    columns = ["modules", "rank", "rows", "error of the logits"]
    spread = f"{min(ranks)}-{max(ranks)}" if min(ranks) < max(ranks) else max(ranks)
    notes = [] if made.exact else ["the gates are fixed at their means: check the plain LoRA"]
    return View(data, [Table(columns, [[len(ranks), spread, rows, f"{made.error:.3g}"]])], notes)


def score(found: Score) -> View:
    """One row an evaluation."""
    columns = ["rows", "right", "accuracy", "95 % interval", "loss"]
    interval = f"{found.low:.1%} to {found.high:.1%}"
    row = [found.n, found.correct, f"{found.accuracy:.1%}", interval, found.loss]
    return View(asdict(found), [Table(columns, [row])])
