"""Every system on SmolLM2-135M: trains in Trainer and in SFTTrainer, resumes, reloads, generates.

Minutes each system, so only with HTSR_FULL=1.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import moe_tiny as tiny
from helpers.commands import ROOT, environment

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers.moe_train import collate, parameters, rows, tokenizer, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.checkpoints,
    pytest.mark.skipif(os.environ.get("HTSR_FULL") != "1", reason="minutes: HTSR_FULL"),
]
SYSTEMS = ["alphalora", "goat", "goat_plus", "mor", "hydra", "adamole", "em_lora"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
RELOAD = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
from peft import PeftModel
import htsr_alloc.lora_moe
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
tokens = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save(model(tokens).logits, sys.argv[4])
"""


def adapted(folder, system):
    """SmolLM2 with the allocation under data/, or EM-LoRA, which takes none."""
    from transformers import AutoModelForCausalLM

    from htsr_alloc.lora_moe import build

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    if system == "em_lora":
        return tiny.adapted(system, trained=False, model=base, r=8, target_modules=TARGETS)
    settings = {"r": 4, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", "system": system}
    allocation = ROOT / "data" / "smollm2.allocation.json"
    targets = ["up_proj", "down_proj"] if system == "mor" else TARGETS
    return build(base, allocation, target_modules=targets, **settings)


def data(system):
    """Token rows; EM-LoRA's begin with a prompt of two tokens."""
    if system != "em_lora":
        return rows()
    return [{**row, "labels": [-100] * 2 + row["labels"][2:]} for row in rows()]


def loss_of(model, system):
    """The mean loss over the whole data set, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        loss = float(model(**collate(data(system))).loss)
    model.train()
    return loss


def bilevel_trainer():
    from transformers import Trainer

    from htsr_alloc.lora_moe.systems.em_lora.bilevel import BilevelMixin

    class BilevelTrainer(BilevelMixin, Trainer):
        pass

    return BilevelTrainer


@pytest.mark.parametrize("system", SYSTEMS)
def test_trains_resumes_reloads_and_generates(system, checkpoint, tmp_path):
    folder = checkpoint("smollm2")

    def start(model):
        settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
        if system == "em_lora":
            settings |= {"kind": bilevel_trainer(), "trainer": {"activation_dataset": data(system)}}
        run = trainer(model, tmp_path / "whole", batch=4, steps=4, **settings)
        run.train_dataset = data(system)
        return run

    model = adapted(folder, system)
    whole, before = start(model), loss_of(model, system)
    whole.train()
    assert loss_of(model, system) < before

    again = start(adapted(folder, system))
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    want = parameters(model)
    assert want
    for name, value in parameters(again.model).items():
        assert torch.allclose(value, want[name], atol=1e-6), name

    model.eval()
    tokens = torch.tensor([[5, 9, 20, 33, 41, 7]])
    with torch.no_grad():
        logits = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    torch.save(tokens, tmp_path / "tokens.pt")
    arguments = [folder, tmp_path / "adapter", tmp_path / "tokens.pt", tmp_path / "logits.pt"]
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)

    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=tokens, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=tokens, use_cache=False, **options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("system", SYSTEMS)
def test_trains_in_sft_trainer(system, checkpoint, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="TRL is not installed")
    from helpers.moe_train import sft_arguments
    from trl import SFTTrainer

    model = adapted(checkpoint("smollm2"), system)
    before = loss_of(model, system)
    run = SFTTrainer(
        model=model,
        args=sft_arguments(tmp_path, max_steps=4, learning_rate=1e-3),
        train_dataset=datasets.Dataset.from_list(data(system)),
        data_collator=collate,
        processing_class=tokenizer(),
    )
    run.train()
    assert loss_of(model, system) < before
