"""htsr train and htsr evaluate as commands: they learn, resume, run on two processes, refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.commands import environment

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers import moe_tiny as tiny
from helpers import training_tiny
from safetensors.torch import load_file

from htsr_alloc.errors import HtsrError
from htsr_alloc.training import models
from htsr_alloc.training.baselines import whole_ranks
from htsr_alloc.training.recipe import Recipe, total_steps
from htsr_alloc.training.run import leave


@pytest.fixture
def work(tmp_path):
    return training_tiny.work(tmp_path)


def arguments(output, *more):
    given = ["--model", "model", "--data", "train.jsonl", "-o", output, *training_tiny.QUICK]
    return ["train", "a.json", *given, "--learning-rate", "2e-2", *map(str, more)]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_last_step_is_logged_and_its_loss_is_the_one_that_is_told(invoke, work):
    def ran(name, *more):
        done = invoke(*arguments(name, "--steps", 4, "--json", *more))
        assert done.rc == 0, done.stderr
        rows = [(row["step"], row["loss"]) for row in log(work / name) if "loss" in row]
        return json.loads(done.stdout), rows

    every = [loss for _, loss in ran("each", "--log-every", 1)[1]]
    said, rows = ran("seldom", "--log-every", 10)
    assert [step for step, _ in rows] == [1, 4]
    assert (said["loss"], said["loss_from"]) == (rows[-1][1], 2)
    assert said["loss"] == pytest.approx(sum(every[1:]) / 3, abs=1e-3)
    assert abs(said["loss"] - every[0]) > 1e-2
    assert ran("once", "--steps", 1)[0]["loss_from"] == 1


def test_training_is_better_than_not_beyond_the_interval(invoke, work):
    def accuracy(*adapter):
        done = invoke(
            "evaluate", "--model", "model", "--data", "test.jsonl", "--json", "--device", "cpu",
            "--dtype", "float32", *adapter,
        )  # fmt: skip
        assert done.rc == 0, done.stderr
        return json.loads(done.stdout)

    done = invoke(*arguments("out", "--epochs", 4, "--log-every", 4, "--json"))
    assert done.rc == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["rows"] == 64
    assert said["steps"] == 32
    lines = log(work / "out")
    assert lines[0]["loss"] > 2 * lines[-2]["loss"]
    assert all("router_aux_loss" in line for line in lines if "loss" in line)
    assert (work / "out" / "training.png").stat().st_size > 5000
    before, after = accuracy(), accuracy("--adapter", "out")
    assert after["low"] > before["high"]
    assert len(after["hits"]) == after["n"] == 40


@pytest.mark.parametrize(
    ("system", "more"),
    [
        ("lora", []),
        ("em_lora", []),
        ("goat", ["--gradient-checkpointing"]),
        ("hydra", ["--dtype", "bfloat16"]),
    ],
)
def test_other_systems_train_and_reload(system, more, invoke, work):
    given = arguments("out", "--steps", 2, "--system", system, "--validation", "test.jsonl", *more)
    if system == "em_lora":
        given.remove("a.json")
    done = invoke(*given)
    assert done.rc == 0, done.stderr
    assert any("eval_loss" in line for line in log(work / "out"))
    loaded = models.open_adapter(tiny.llama(eos_token_id=1), work / "out")
    config = json.loads((work / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == ("LORA" if system == "lora" else "LORA_MOE")
    base, inputs = tiny.llama(eos_token_id=1), tiny.tokens()
    assert not torch.allclose(loaded(inputs).logits, base(inputs).logits, atol=1e-4)


def test_activations_that_stay_frozen_are_not_counted(invoke, work):
    """Without validation rows EM-LoRA's two activations of 12 coefficients do not learn."""
    counts = []
    for output, more in (("out", []), ("more", ["--validation", "test.jsonl"])):
        given = arguments(output, "--steps", 1, "--system", "em_lora", "--json", *more)
        given.remove("a.json")
        counts.append(json.loads(invoke(*given).stdout)["trainable"])
    assert counts[1] - counts[0] == 2 * 12


def test_resumed_is_as_if_nothing_had_happened(invoke, work):
    more = ["--save-every", 5, "--log-every", 1, "--epochs", 2, "--batch-size", 16]
    assert invoke(*arguments("whole", *more)).rc == 0
    shutil.copytree(work / "whole", work / "cut")
    (work / "cut" / "adapter_model.safetensors").unlink()
    shutil.rmtree(work / "cut" / "checkpoints" / "checkpoint-8")
    done = invoke(*arguments("cut", *more, "--resume"))
    assert done.rc == 0, done.stderr
    assert "resumed at checkpoint-5" in done.stderr
    whole = load_file(work / "whole" / "adapter_model.safetensors")
    again = load_file(work / "cut" / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert torch.allclose(value, again[name], atol=1e-6), name
    assert [line["step"] for line in log(work / "cut") if "loss" in line] == list(range(1, 9))


def test_a_run_is_not_overwritten_nor_mixed(invoke, work):
    assert invoke(*arguments("out", "--steps", 1)).rc == 0
    again = invoke(*arguments("out", "--steps", 1))
    assert again.rc == 1
    assert "holds a run already" in again.stderr
    other = invoke(*arguments("out", "--steps", 2, "--resume"))
    assert other.rc == 1
    assert "was started with another steps: 1, not 2" in other.stderr


def test_a_run_stopped_before_its_first_checkpoint_starts_again(invoke, work):
    """It left run.json, and nothing that could be lost."""
    assert invoke(*arguments("out", "--steps", 1)).rc == 0
    shutil.rmtree(work / "out" / "checkpoints")
    for path in (work / "out").glob("adapter*"):
        path.unlink()
    done = invoke(*arguments("out", "--steps", 2))
    assert done.rc == 0, done.stderr
    assert json.loads((work / "out" / "run.json").read_text())["steps"] == 2


def join_a_group(folder):
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def test_a_process_leaves_its_group(tmp_path):
    """One that is alive at Python's exit aborted a process in one run of some hundreds."""
    leave()  # of none
    join_a_group(tmp_path)
    leave()
    assert not torch.distributed.is_initialized()


def test_train_leaves_its_group_at_the_end(invoke, work):
    join_a_group(work)
    try:
        done = invoke(*arguments("out", "--steps", 1))
        assert done.rc == 0, done.stderr
        assert not torch.distributed.is_initialized()
    finally:
        leave()


def test_two_processes_have_the_losses_of_one(invoke, work):
    """torchrun as it is, against one process that accumulates: the same global batch."""
    same = ["--steps", 4, "--log-every", 1, "--batch-size", 2]
    one = invoke(*arguments("one", *same, "--accumulate", 2))
    assert one.rc == 0, one.stderr
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [sys.executable, *launch, "-m", "htsr_alloc", *arguments("two", *same)],
        cwd=work,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("trainable") == 1  # one process's table

    def losses(name):
        return [line["loss"] for line in log(work / name) if "loss" in line]

    assert len(losses("one")) == 4
    assert losses("two") == pytest.approx(losses("one"), abs=1e-4)
    # One micro-batch of all four has that loss too, at the same parameters. From there on its
    # routers go elsewhere: the balance loss is a micro-batch's, and not linear in its rows.
    whole = invoke(*arguments("whole", "--steps", 1, "--log-every", 1, "--batch-size", 4))
    assert whole.rc == 0, whole.stderr
    assert losses("whole") == pytest.approx(losses("two")[:1], abs=1e-4)
    parts = [load_file(work / n / "adapter_model.safetensors") for n in ("one", "two")]
    for name, value in parts[0].items():
        assert torch.allclose(value, parts[1][name], atol=1e-4), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--system", "mixture"], "There is no system 'mixture'"),
        (["--dtype", "int8"], "There is no dtype 'int8'"),
        (["--batch-size", "0"], "batch_size must be positive"),
        (["--system", "em_lora"], "takes no allocation"),
        (["--target", "qq_proj"], "have no linear qq_proj"),
        (["--data", "none.jsonl"], "Cannot read"),
        (["--data", "none.jsonl", "--model", "."], "Cannot read none.jsonl"),
        (["--model", "none"], "There is no folder none"),
    ],
)
def test_wrong_requests_are_one_sentence(changes, said, invoke, work):
    done = invoke(*arguments("out", "--steps", 1, *changes))
    assert done.rc == (2 if said.startswith("There is no ") and "'" in said else 1)
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_rows_are_named(invoke, work):
    with open(work / "train.jsonl", "a") as file:
        file.write('{"prompt": "w9"}\n')
    done = invoke(*arguments("out"))
    assert done.rc == 1
    assert "train.jsonl: line 65 has no completion" in done.stderr


def test_a_missing_extra_is_one_sentence(work):
    """Without accelerate, as after a plain install."""
    code = (
        "import sys; sys.modules['accelerate'] = None\n"
        "from htsr_alloc.cli.main import app\n"
        f"app({arguments('out')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=work, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Training needs transformers, PEFT and accelerate" in done.stderr
    assert "pip install 'htsr-alloc[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_lm_eval_missing_is_one_sentence():
    code = (
        "import runpy, sys; sys.modules['lm_eval'] = None\n"
        "runpy.run_module('htsr_alloc.lm_eval', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "The lm-evaluation-harness cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr


def test_steps_are_counted_as_the_trainer_does():
    assert total_steps(64, Recipe(epochs=4)) == 32
    assert total_steps(65, Recipe(epochs=1)) == 9
    assert total_steps(64, Recipe(epochs=1, accumulate=3), ranks=2) == 2
    assert total_steps(64, Recipe(steps=5)) == 5


def test_recipe_refuses_nonsense():
    with pytest.raises(HtsrError, match="warmup must be in"):
        Recipe(warmup=1.5)
    with pytest.raises(HtsrError, match="steps must be at least 1"):
        Recipe(steps=0)


def test_one_process_does_not_spread_over_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    models.refuse_data_parallel(torch.device("cuda"), 4)
    models.refuse_data_parallel(torch.device("cpu"), 1)
    with pytest.raises(HtsrError, match="One process trains on one GPU, and 4 are visible"):
        models.refuse_data_parallel(torch.device("cuda"), 1)


def test_ranks_are_whole_and_sum_up():
    ranks = whole_ranks({str(i): 42.5 for i in range(10)})
    assert sum(ranks.values()) == 425
    assert set(ranks.values()) <= {42, 43}
