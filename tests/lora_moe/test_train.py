"""Training with the ecosystem's own trainers: stock Trainer, SFTTrainer, DDP, resume."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from helpers import moe_tiny as tiny
from helpers.commands import ROOT, environment

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers.moe_train import parameters, rows, sft_arguments, tokenizer, trainer
from peft import PeftModel
from transformers import TrainerCallback

from htsr_alloc.lora_moe import RouterLossCallback

SYSTEMS = ["alphalora", "goat", "goat_plus", "mor", "hydra", "adamole"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_stock_trainer_learns_saves_and_reloads(system, tmp_path):
    model = tiny.adapted(system, trained=False)
    run = trainer(model, tmp_path, callbacks=[RouterLossCallback()], steps=6)
    run.train()
    logs = [row for row in run.state.log_history if "loss" in row]
    assert logs[-1]["loss"] < logs[0]["loss"]
    has_loss = system not in ("mor", "hydra")
    assert all(("router_aux_loss" in row) == has_loss for row in logs)
    if has_loss:
        assert 0.002 * 0.99 <= logs[0]["router_aux_loss"] < 0.05
    run.save_model(str(tmp_path / "a"))
    model.eval()
    reloaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "a").eval()
    assert torch.equal(reloaded(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_attached_it_reaches_reporters_that_come_first(tmp_path):
    class Reporter(TrainerCallback):
        seen: ClassVar[list] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    run = trainer(tiny.adapted("alphalora"), tmp_path, callbacks=[Reporter()], steps=2)
    RouterLossCallback().attach(run)
    run.train()
    losses = [row for row in Reporter.seen if "loss" in row]
    assert losses
    assert all(row["router_aux_loss"] > 0 for row in losses)


def test_resume_is_as_if_nothing_had_happened(tmp_path):
    whole = trainer(tiny.adapted("goat", lora_dropout=0.1), tmp_path / "whole", steps=4)
    whole.train()
    settings = {"save_strategy": "steps", "save_steps": 2}
    first = trainer(tiny.adapted("goat", lora_dropout=0.1), tmp_path / "cut", steps=4, **settings)
    first.train()
    again = trainer(tiny.adapted("goat", lora_dropout=0.1), tmp_path / "cut", steps=4, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert again.state.global_step == 4
    want = parameters(whole.model)
    for name, value in parameters(again.model).items():
        assert torch.allclose(value, want[name], atol=1e-6), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, tmp_path):
    plain = trainer(tiny.adapted(router_aux_loss_coef=0.5), tmp_path, steps=2)
    plain.train()
    model = tiny.adapted(router_aux_loss_coef=0.5)
    settings = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    trainer(model, tmp_path, steps=2, **settings).train()
    want = parameters(plain.model)
    for name, value in parameters(model).items():
        assert torch.allclose(value, want[name], atol=1e-5), name


def test_bf16_autocast_trains(tmp_path):
    run = trainer(tiny.adapted(trained=False), tmp_path, steps=6, bf16=True)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    kept = {p.dtype for p in run.model.parameters() if p.requires_grad}
    assert kept == {torch.float32}


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_weighs_the_balance_loss_the_same(tmp_path):
    """TRL computes its loss from log-probabilities outside the model's own loss."""
    pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="TRL is not installed")
    from trl import SFTTrainer

    data = datasets.Dataset.from_list(rows())
    # Adam would hide the gradient's size.
    arguments = sft_arguments(
        tmp_path, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-2, optim="sgd"
    )
    from helpers.moe_train import collate

    model = tiny.adapted(router_aux_loss_coef=0.5)
    run = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        processing_class=tokenizer(),
        callbacks=[RouterLossCallback()],
    )
    run.train()
    logs = [row for row in run.state.log_history if "loss" in row]
    assert len(logs) == 3
    assert all(row["router_aux_loss"] > 0.5 for row in logs)
    stock = trainer(tiny.adapted(router_aux_loss_coef=0.5), tmp_path, 4, 2, steps=3, optim="sgd")
    stock.train()
    want = parameters(stock.model)
    for name, value in parameters(model).items():
        assert torch.allclose(value, want[name], atol=1e-4), name


def launch(script, ranks, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / script), *arguments],
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                OMP_NUM_THREADS="1",
                PYTHONPATH=str(ROOT / "tests"),
                ACCELERATE_USE_CPU="true",
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors.decode()[-2000:]
    return torch.load(f"{arguments[0]}.pt")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_as_one(tmp_path):
    """DDP over gloo equals one process that accumulates the same micro-batches."""
    two = launch("moe_ddp.py", 2, str(tmp_path / "two"), "2", "1")
    one = trainer(tiny.adapted(router_aux_loss_coef=0.5), tmp_path, 2, 2)
    one.train()
    losses = [row["loss"] for row in one.state.log_history if "loss" in row]
    assert two["losses"] == pytest.approx(losses, abs=1e-4)
    want = parameters(one.model)
    for name, value in two["parameters"].items():
        assert torch.allclose(value, want[name.removeprefix("module.")], atol=1e-4), name


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_fsdp2_trains_as_one(tmp_path):
    """Sharded over two gloo processes, the loss curve is one process's."""
    from helpers.moe_fsdp import losses

    two = launch("moe_fsdp.py", 2, str(tmp_path / "two"))
    one = losses(tiny.adapted("goat", router_aux_loss_coef=0.5), [0, 1])
    assert two["losses"] == pytest.approx(one, abs=1e-4)
