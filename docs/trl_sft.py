"""TRL trains an allocation's experts: ``pip install trl 'htsr-alloc[train]'``.

python trl_sft.py MODEL ALLOCATION ROWS.jsonl OUTPUT [STEPS]
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from htsr_alloc.lora_moe import RouterLossCallback, config_for


def main(model: str, allocation: str, rows: str, output: str, steps: str = "-1") -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    on_gpu = torch.cuda.is_available()
    settings = {"bf16": on_gpu, "use_cpu": not on_gpu, "report_to": []}
    trainer = SFTTrainer(
        base,
        args=SFTConfig(output, max_steps=int(steps), per_device_train_batch_size=4, **settings),
        train_dataset=load_dataset("json", data_files=rows, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=config_for(base, allocation, r=8, lora_alpha=16, task_type="CAUSAL_LM"),
    )
    RouterLossCallback().attach(trainer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
