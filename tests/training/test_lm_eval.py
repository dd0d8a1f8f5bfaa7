"""python -m htsr_alloc.lm_eval: the harness loads our adapter and agrees with htsr evaluate."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers.commands import environment

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")
pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install lm_eval")

from helpers import moe_tiny as tiny
from helpers import training_tiny

from htsr_alloc.training.evaluate import evaluate
from htsr_alloc.training.models import open_adapter
from htsr_alloc.training.rows import parse

TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{path}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


def test_the_harness_agrees(tmp_path):
    training_tiny.folder(tmp_path / "model")
    model = tiny.adapted("goat", model=tiny.llama(eos_token_id=1))
    model.save_pretrained(tmp_path / "adapter")
    rows = training_tiny.choice_rows(40)
    stripped = [{**row, "choices": [c.strip() for c in row["choices"]]} for row in rows]
    data = training_tiny.write(tmp_path / "rows.jsonl", stripped)
    (tmp_path / "tiny.yaml").write_text(TASK.format(path=data))
    arguments = f"pretrained={tmp_path / 'model'},peft={tmp_path / 'adapter'},dtype=float32"
    done = subprocess.run(
        [
            *[sys.executable, "-m", "htsr_alloc.lm_eval", "--model", "hf"],
            *["--model_args", arguments, "--tasks", "tiny", "--include_path", str(tmp_path)],
            *["--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "out")],
        ],
        env=environment(HF_DATASETS_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (tmp_path / "out").rglob("results*.json")
    harness = json.loads(found.read_text())["results"]["tiny"]["acc_norm,none"]
    loaded = open_adapter(tiny.llama(eos_token_id=1), tmp_path / "adapter")
    with torch.no_grad():
        ours = evaluate(loaded, training_tiny.tokenizer(), [parse(row) for row in rows])
    assert ours.accuracy == pytest.approx(harness, abs=1e-9)
    bare = evaluate(tiny.llama(eos_token_id=1), training_tiny.tokenizer(), [parse(r) for r in rows])
    assert bare.hits != ours.hits  # so that the harness has run the adapter and not its base
