"""Records as views: JSON, tables and notes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from htsr_alloc.allocation.rounding import Bounds, repair_remainder
from htsr_alloc.cli.inspecting import dequantised
from htsr_alloc.cli.screen import Table, View, bar, short
from htsr_alloc.records import Module, as_json
from htsr_alloc.records.facts import FOR_DECISIONS, NOISY, SHORT

APART = ("name", "farms", "scores", "signal")  # of a strategy's record, said in other words

if TYPE_CHECKING:
    from pathlib import Path

    from htsr_alloc.allocation.sensitivity import Sensitivity
    from htsr_alloc.lora_moe.build import LayerReport
    from htsr_alloc.lora_moe.collapse import Collapsed
    from htsr_alloc.lora_moe.linears import LeftAlone
    from htsr_alloc.records import Allocation, Metrics, Signal, StrategyRecord
    from htsr_alloc.training.evaluate import Score
    from htsr_alloc.training.run import Trained


def metrics(found: Metrics) -> View:
    """One row a layer; 80 columns."""
    from htsr_alloc.reports.explain import explain

    rows, errors, reasons = [], False, False
    for layer, row in zip(found.layers, explain(found), strict=True):
        ks = [part.k for part in row.parts if part.k is not None]
        fits = f"{layer.matrices - layer.unfitted}/{layer.matrices}"
        rows.append([
            layer.layer, short(layer.prefix), fits if layer.unfitted else layer.matrices,
            plus(layer.pl_alpha_hill, row.se), _to(ks),
            layer.alpha_hat, layer.stable_rank, layer.reason or "",
        ])  # fmt: skip
        errors, reasons = errors or row.se is not None, reasons or layer.reason is not None
    alpha = "alpha ± se" if errors else "alpha"
    columns = ["layer", "prefix", "fits", alpha, "k", "alpha_hat", "stable_rank", "note"]
    if not reasons:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    farms = ", FARMS windows" if found.settings.farms else ""
    return View(
        as_json(found),
        [Table(columns, rows, left=["prefix", "note"])],
        [
            f"alpha: PL_Alpha_Hill, mean over the matrices; estimator {found.settings.estimator}"
            f"{farms}; k: eigenvalues in the shortest and the longest tail",
            *dequantised((d.format, d.dtype, d.matrices) for d in found.model.dequantised),
            *_doubtful(found),
        ],
    )


def _to(counts: Sequence[int]) -> str:
    """The least and the greatest of some counts."""
    if not counts:
        return "-"
    low, high = min(counts), max(counts)
    return f"{low}-{high}" if low < high else f"{low}"


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


def plus(value: float | None, se: float | None) -> str:
    """A number with its standard error."""
    if value is None:
        return "-"
    return f"{value:.2f}" + (f" ± {se:.2f}" if se is not None else "")


def allocation(
    result: Allocation, found: Sensitivity | None = None, metrics: Path | None = None
) -> View:
    """One row a layer with a bar, or one row a linear; then how stable the counts are.

    ``metrics`` is the file that it was made from, for a hint.
    """
    data = as_json(result)
    units = result.modules or result.evidence
    largest = max(unit.experts for unit in units)
    top_k = [unit.top_k for unit in result.modules] or result.top_k
    rows = [
        [
            unit.layer,
            short(unit.name, 25) if isinstance(unit, Module) else short(unit.prefix or "-"),
            unit.score,
            None if unit.quota is None else float(unit.quota),
            unit.experts,
            k,
            bar(unit.experts, largest, 14 if result.modules else 20),
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
        if not result.modules:
            line += f", {_moved(result.experts)} moved from uniform"
        notes.append("; ".join([line, ", ".join(said)]) if said else line)
        notes += _signal(strategy.signal)
        notes += _recommended(strategy, metrics)
    if result.parameters is not None:
        money = result.parameters
        notes.append(
            f"{money.spent:,} of {money.asked:,} parameters"
            + (
                f", those of rank {money.r} on every adapted linear"
                if result.holds_ranks
                else f" at r = {money.r}, routers included"
            )
        )
    return View(data, tables, notes)


def _moved(counts: Sequence[int]) -> int:
    """How many are not where the strategy ``uniform`` puts them."""
    budget, layers = sum(counts), len(counts)
    if budget == 0:
        return 0
    uniform = repair_remainder([budget / layers] * layers, budget, Bounds(low=0))
    return sum(max(own - even, 0) for own, even in zip(counts, uniform, strict=True))


def _signal(signal: Signal | None) -> list[str]:
    """How much of each role's spread is signal, and what follows."""
    if signal is None:
        return []
    roles = [f"{x.role} {x.i2:.2f} ({x.i2_low:.2f}-{x.i2_high:.2f})" for x in signal.roles]
    said = [f"I², the share of a role's spread that is signal (95 %): {', '.join(roles)}"]
    return said + ([signal.uniform] if signal.uniform else [])


def _recommended(strategy: StrategyRecord, metrics: Path | None) -> list[str]:
    """Which estimator a decision should use, where this one only reproduces a paper."""
    if strategy.estimator not in NOISY or metrics is None:
        return []
    return [
        f"{strategy.estimator} reproduces a paper. For a decision use the smoother "
        f"{FOR_DECISIONS}: htsr fit {shlex.quote(str(metrics))} --estimator {FOR_DECISIONS}"
    ]


def _said(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sensitivity(found: Sensitivity) -> Table:
    """One row a layer: its range under each cause, and the share of draws within one expert."""
    rows = []
    for layer in found.layers:
        cells: list[object] = [layer.layer, layer.experts]
        for cause in found.causes:
            seen = layer.ranges[cause]
            cells += [f"{seen.low}-{seen.high}", f"{seen.near:.0%}"]
        rows.append([*cells, "stable" if layer.stable else ""])
    columns = [name for cause in found.causes for name in (cause, "±1")]
    return Table(["layer", "experts", *columns, ""], rows, left=[""])


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
    near = ", ".join(f"{share:.0%} ({cause})" for cause, share in found.near.items())
    notes.append(
        f"within one expert: {near} of the counts; {found.chance.near:.0%} where the same counts "
        f"are on layers drawn by chance (95 % of such draws: at most {found.chance.high:.0%})"
    )
    if found.as_far_as_chance:
        causes = " and ".join(found.as_far_as_chance)
        notes.append(f"{causes}: the counts move as far as chance would put them")
    return notes


def build(model: Any, layers: Sequence[LayerReport], left: Sequence[LeftAlone] = ()) -> View:
    """One row a layer, then the sum, then what gets no adapter and why."""
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
    columns = ["layer", "prefix", "experts", "top_k", "modules", "trainable", "of the layer"]
    data = {"layers": [asdict(row) for row in layers], "trainable": trainable, "base": frozen}
    total = f"{trainable:,} trainable parameters, {trainable / frozen:.2%} of the base's {frozen:,}"
    return View(
        {**data, "left_alone": [asdict(row) for row in left]},
        [Table(columns, rows, left=["prefix"])],
        [total, *(f"left alone: {x.name}, {x.count} times: {x.reason}" for x in left)],
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


def scores(rows: Sequence[dict[str, Any]]) -> View:
    """One row a layer or a linear."""
    columns = list(rows[0])

    def cell(value: Any) -> Any:
        if isinstance(value, str):
            return short(value)
        return f"{value:.4g}" if isinstance(value, float) else value

    cells = [[cell(x) for x in row.values()] for row in rows]
    return View(list(rows), [Table(columns, cells, left=["module", "prefix"])])
