"""What a run must never do: report success after diverging, resume from half a checkpoint, or run
on another base."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers import training_tiny
from safetensors.torch import load_file, save_file

from htsr_alloc.errors import HtsrError
from htsr_alloc.training import saves
from htsr_alloc.training.identity import check_base, weights_of
from htsr_alloc.training.rows import read_rows
from htsr_alloc.training.study.store import Store


@pytest.fixture
def work(tmp_path):
    return training_tiny.work(tmp_path)


def train(output, *more):
    given = ["--model", "model", "--data", "train.jsonl", "-o", output, *training_tiny.QUICK]
    return ["train", "a.json", *given, *map(str, more)]


def damage(folder):
    """Change one number of the model's weights; names, shapes and sizes stay."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("system", ["alphalora", "lora"])
def test_a_diverged_training_is_an_error_that_keeps_the_last_good_checkpoint(system, invoke, work):
    more = ["--learning-rate", 1e30, "--steps", 6, "--save-every", 1, "--system", system]
    done = invoke(*train("out", *more, "--warmup", 0))
    assert done.rc == 1
    assert "diverged by step" in done.stderr
    assert not (work / "out" / "adapter_model.safetensors").exists()
    for path in (work / "out" / "checkpoints").glob("*/adapter_model.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(path).values())


def test_it_names_the_last_good_checkpoint(invoke, work, monkeypatch):
    from htsr_alloc.training.recipe import RecipeTrainer

    real = RecipeTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(RecipeTrainer, "compute_loss", compute_loss)
    done = invoke(*train("out", "--steps", 6, "--save-every", 2, "--log-every", 100))
    assert done.rc == 1
    assert "checkpoint-2 is the last good checkpoint" in done.stderr
    assert saves.is_whole(work / "out" / "checkpoints" / "checkpoint-2")


def saved(invoke, work):
    """A finished run with checkpoints 5 and 8."""
    more = ["--save-every", 5, "--epochs", 2, "--batch-size", 16, "--log-every", 1]
    more += ["--learning-rate", "2e-2"]
    assert invoke(*train("out", *more)).rc == 0
    (work / "out" / "adapter_model.safetensors").rename(work / "whole.safetensors")
    return [*train("out", *more), "--resume"]


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors", saves.MARK],
)
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_half_a_checkpoint_is_passed_over(name, how, invoke, work):
    again = saved(invoke, work)
    path = work / "out" / "checkpoints" / "checkpoint-8" / name
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    done = invoke(*again)
    assert done.rc == 0, done.stderr
    assert "checkpoint-8: not whole, so not used" in done.stderr
    assert "resumed at checkpoint-5" in done.stderr
    want = load_file(work / "whole.safetensors")
    for key, value in load_file(work / "out" / "adapter_model.safetensors").items():
        assert torch.allclose(value, want[key], atol=1e-6), key


def test_another_base_of_the_same_shape_is_refused(invoke, work):
    again = saved(invoke, work)
    damage(work / "model")
    done = invoke(*again)
    assert done.rc == 1
    assert "started with another weights" in done.stderr


def test_an_adapter_is_checked_against_its_base(invoke, work):
    assert invoke(*train("out", "--steps", 1, "--system", "lora")).rc == 0
    check_base(work / "out", work / "model")
    before = weights_of(work / "model")
    damage(work / "model")
    assert weights_of(work / "model") != before
    with pytest.raises(HtsrError, match="was trained on other weights"):
        check_base(work / "out", work / "model")
    given = ["evaluate", "--model", "model", "--data", "train.jsonl", "--adapter", "out"]
    done = invoke(*given, "--device", "cpu")
    assert done.rc == 1
    assert "was trained on other weights" in done.stderr


def test_a_run_of_an_older_version_goes_on(invoke, work):
    again = saved(invoke, work)
    path = work / "out" / "run.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "weights"})
    )
    assert invoke(*again).rc == 0


def test_weights_are_told_from_their_names_too(work):
    one = weights_of(work / "model")
    shutil.copytree(work / "model", work / "other")
    assert weights_of(work / "other") == one
    (work / "other" / "model.safetensors").rename(work / "other" / "x.safetensors")
    assert weights_of(work / "other") != one


def test_a_folder_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    store = Store(tmp_path / "results.jsonl")
    with pytest.raises(HtsrError, match="No locks available"), store.claim(("a", "b", 1)):
        pass
    with pytest.raises(HtsrError, match="No locks available"):
        store.add({"task": "a", "row": "b", "seed": 1})


def test_a_completion_of_spaces_is_refused(tmp_path):
    path = training_tiny.write(tmp_path / "a.jsonl", [{"prompt": "w3", "completion": " "}])
    with pytest.raises(HtsrError, match="line 1 has an empty completion"):
        read_rows(path)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_an_encoder_is_not_trained_as_a_causal_model(kind, invoke, work):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
    )
    model = getattr(transformers, f"{kind}ForMaskedLM")(config)
    model.save_pretrained(work / "encoder")
    training_tiny.tokenizer().save_pretrained(work / "encoder")
    given = train("out", "--steps", 1)
    given[given.index("model")] = "encoder"
    done = invoke(*given)
    assert done.rc == 1
    assert "is not a causal language model" in done.stderr


def test_no_code_of_a_models_folder_is_run(run, work):
    config = json.loads((work / "model" / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"auto_map": names, "model_type": "own"}
    (work / "model" / "config.json").write_text(json.dumps(config))
    (work / "model" / "own.py").write_text(
        "import pathlib\npathlib.Path('/tmp/htsr-was-run').write_text('x')\n"
        "class OwnConfig: pass\nclass OwnModel: pass\n"
    )
    marker = Path("/tmp/htsr-was-run")
    marker.unlink(missing_ok=True)
    done = run(*train("out", "--steps", 1), input="y\ny\n")
    assert done.rc == 1
    assert not marker.exists()
    assert "Traceback" not in done.stderr


def test_pickled_weights_are_not_read(invoke, work):
    tensors = load_file(work / "model" / "model.safetensors")
    torch.save(tensors, work / "model" / "pytorch_model.bin")
    (work / "model" / "model.safetensors").unlink()
    done = invoke(*train("out", "--steps", 1))
    assert done.rc == 1
    assert "safetensors" in done.stderr


def test_a_study_marks_the_cells_that_diverged(invoke, work):
    assert invoke("analyze", "model", "-o", "tiny.metrics.json", "-q").rc == 0
    rows = [{"name": "uniform", "main": True}, {"name": "hot", "learning_rate": 10**30}]
    task = {"train": "train.jsonl", "test": "train.jsonl", "test_rows": 8}
    plan = {
        **{"model": "model", "metrics": "tiny.metrics.json", "results": "results.jsonl"},
        **{"experts": 6, "r": 2, "dtype": "float32", "seeds": [1], "tasks": {"words": task}},
        "recipe": {"steps": 3, "batch_size": 4, "warmup": 0.0},
        "rows": rows,
    }
    (work / "study.yaml").write_text(json.dumps(plan))  # JSON is YAML
    done = invoke("study", "study.yaml", "--device", "cpu")
    assert done.rc == 0, done.stderr
    cells = [json.loads(line) for line in (work / "results.jsonl").read_text().splitlines()]
    found = {cell["row"]: cell for cell in cells}
    assert found["uniform"]["diverged"] is None
    assert "diverged by step" in found["hot"]["diverged"]
    assert found["hot"]["accuracy"] is None
    (row,) = [line for line in done.stdout.splitlines() if "| hot |" in line]
    assert "| 0 (1 diverged) |" in row
    damage(work / "model")
    done = invoke("study", "study.yaml", "--device", "cpu")
    assert done.rc == 1
    assert "with other weights than those in model" in done.stderr


def test_an_adapter_of_a_forks_type_is_one_sentence(invoke, work):
    fork = work / "fork"
    fork.mkdir()
    (fork / "adapter_config.json").write_text('{"peft_type": "MOLA", "r": 8}')
    done = invoke("generate", fork, "w1", "--model", "model")
    assert done.rc == 1
    assert "is of a type that this PEFT does not have: MOLA." in done.stderr
    assert "train them again" in done.stderr
