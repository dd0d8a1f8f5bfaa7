"""TRL trains the exported ranks as they are (docs/lora.md)."""

import json

import pytest

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("trl", reason="needs trl")

from helpers import moe_tiny as tiny
from helpers import training_tiny
from safetensors.torch import load_file


def test_sft_trainer_takes_the_exported_ranks(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from htsr_alloc import allocate, analyze
    from htsr_alloc.allocation.exports import Lora, to_peft_rank

    tiny.llama(layers=4).save_pretrained(tmp_path / "model")
    metrics = analyze(tmp_path / "model", estimator="median")
    made = allocate(metrics, adapter_kind="lora", rank=16, beta=20)  # beta: ranks that differ
    assert len(set(made.experts)) > 1
    exported = json.loads(to_peft_rank(made, Lora.of(made)))
    trainer = SFTTrainer(
        tiny.llama(layers=4, eos_token_id=1),
        args=SFTConfig(
            str(tmp_path / "adapter"),
            max_steps=2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=4,
            max_length=32,
            learning_rate=1e-2,
        ),
        train_dataset=Dataset.from_list(training_tiny.learnable_rows(16)),
        processing_class=training_tiny.tokenizer(chat=None),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **exported),
    )
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {name: value.shape[0] for name, value in saved.items() if "lora_A" in name}
    assert len(ranks) == 4 * 7
    for name, rank in ranks.items():
        assert rank == made.experts[int(name.split(".layers.")[1].split(".")[0])]
    assert any(float(value.abs().max()) > 0 for name, value in saved.items() if "lora_B" in name)
