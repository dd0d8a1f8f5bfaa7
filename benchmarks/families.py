"""Tiny random models of transformers' families, from a hub checkpoint to a trained adapter.

    python benchmarks/families.py [--tasks vl lm s2s image mlm] [--only NAME ...]

Each family's default configuration is made small by the names of its numbers, a random model of it
is saved as hub checkpoints look, and goes the whole way: analyze, allocate, build, a forward pass
with padding, backward, save, reload. One row a family says how far it came, and why no further.
"""

import argparse
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from family_inputs import inputs_of, outcome
from family_models import TASKS, R, Unfit, classes, tiny_model


@dataclass
class Family:
    """How far one family came: ``done`` holds the steps, ``reason`` why there are no more.

    ``same`` is whether the file's matrices cost what the model's linears do.
    """

    task: str
    name: str
    done: list[str] = field(default_factory=list)
    matrices: int = 0
    asked: int = 0
    trainable: int = 0
    same: bool = False
    reason: str = ""

    @property
    def counted(self) -> bool:
        """Whether what allocate says is what became trainable."""
        return "built" in self.done and self.asked == self.trainable


STEPS = ("made", "analysed", "allocated", "built", "trained", "reloaded")


def go(task: str, model_type: str, folder: Path) -> Family:
    """One family, the whole way."""
    from htsr_alloc import HtsrError

    family = Family(task, model_type)
    steps = iter(STEPS)
    try:
        for _ in walk(family, folder):
            family.done.append(next(steps))
    except Exception as error:  # whatever a family raises is a row of the table
        own = isinstance(error, HtsrError | Unfit)
        who = "" if own else f"{FAILS[len(family.done)]}: "
        family.reason = f"{who}{first_line(error)}"
    return family


# Who fails on the way to each of the STEPS, if we do not say so ourselves.
FAILS = (
    "transformers cannot make it of these small numbers",
    "htsr cannot analyse it",
    "htsr cannot allocate for it",
    "transformers cannot load what it saved",
    "its forward or backward pass refuses these inputs",
    "it cannot be saved and loaded again",
)


def first_line(error: Exception) -> str:
    """An exception's first line with its last sign, at most 160 signs of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines or [type(error).__name__])[0]
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    text = text.replace("|", "/").rstrip(".:!")
    return f"{text[:160].rstrip()}{'...' if len(text) > 160 else '.'}"


def walk(family: Family, folder: Path) -> Iterator[None]:
    """The steps, one after the other."""
    from peft import PeftModel

    from htsr_alloc import allocate, analyze
    from htsr_alloc.allocation import Bounds
    from htsr_alloc.allocation.units import costed_layers
    from htsr_alloc.lora_moe import build, linears_of

    base = tiny_model(family.task, family.name)
    base.save_pretrained(folder / "base")
    yield
    metrics = analyze(folder / "base")
    assert metrics is not None
    family.matrices = len(metrics.matrices)
    yield
    linears = linears_of(base, metrics)
    costs = costed_layers(metrics, (), R, linears=linears)
    family.same = costs == costed_layers(metrics, (), R)
    params = 3 * sum(unit.cost.of(1) for unit in costs if unit.cost is not None)
    allocation = allocate(metrics, params=params, r=R, bounds=Bounds(1), linears=linears)
    assert allocation.parameters is not None
    family.asked = allocation.parameters.spent
    yield
    kind = type(base)
    base = kind.from_pretrained(folder / "base", dtype=torch.float32).eval()
    loaded = base.state_dict()
    model: Any = build(base, allocation, r=R, lora_dropout=0.0)
    family.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield
    with model.disable_adapter():
        given = inputs_of(base)
    move(model)
    loss = outcome(model, given).float().square().mean()
    if not math.isfinite(loss.item()):
        raise Unfit("its output is not finite")
    loss.backward()
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not any(p.grad is not None and p.grad.abs().max() > 0 for _, p in own):
        raise Unfit("no adapter has a gradient")
    yield
    with torch.no_grad():
        want = outcome(model, given)
    model.save_pretrained(folder / "adapter")
    base = kind.from_pretrained(folder / "base", dtype=torch.float32).eval()
    if not all(torch.equal(value, loaded[n]) for n, value in base.state_dict().items()):
        raise Unfit("transformers loads other weights than it saved, new ones each time")
    again = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        got = outcome(again, given)
    if not torch.allclose(got, want, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise Unfit("a reloaded adapter gives another output")
    yield


def move(model: Any) -> None:
    """Put every trainable parameter off its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def run(tasks: list[str], only: list[str], show: Callable[[Family], None]) -> list[Family]:
    """Every family of the tasks; one that several tasks have goes with the first."""
    found: dict[str, Family] = {}
    for task in tasks:
        for name in classes(task):
            if name in found or (only and name not in only):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found[name] = go(task, name, Path(folder))
            show(found[name])
    return list(found.values())


def row(family: Family) -> str:
    """A line of the table."""
    marks = ["yes" if step in family.done else "" for step in STEPS[1:]]
    counts = f"{family.trainable:,}" if "built" in family.done else ""
    if counts and not family.counted:
        counts = f"{counts} of {family.asked:,}"
    reason = family.reason or ("" if family.same else "by `--model`: the file's matrices differ")
    cells = [family.name, family.task, str(family.matrices or ""), *marks, counts, reason]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    heads = ["family", "task", "matrices", *STEPS[1:], "trainable", "reason"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    start = time.perf_counter()
    families = run(arguments.tasks, arguments.only, lambda f: print(row(f), flush=True))
    made = [f for f in families if "made" in f.done]
    print(f"\n{len(families)} families, {len(made)} made", end="")
    for step in STEPS[1:]:
        count = sum(step in f.done for f in made)
        print(f", {count} {step} ({count / max(1, len(made)):.1%})", end="")
    equal = sum(f.counted for f in made)
    same = sum(f.counted and f.same for f in made)
    print(f", {equal} with the trainable parameters that allocate says", end="")
    print(f" ({same} from the metrics alone);", end=" ")
    print(f"{time.perf_counter() - start:.0f} s; transformers {transformers.__version__}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
