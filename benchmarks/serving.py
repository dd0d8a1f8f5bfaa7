"""Tokens per CPU second of vLLM: the base, a LoRA and a mixture of as many ranks, one at a time.

python benchmarks/serving.py MODEL      (in the environment of make serve-demo)

Each answers the same prompts in one batch; the median of three runs, after one that is not counted.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from htsr_alloc.serving.launch import CPU

os.environ.update({**CPU, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
PROMPTS, LENGTH, TOKENS, RANK, EXPERTS, RUNS = 16, 16, 24, 8, 4, 3


def make(model: str, folder: Path) -> dict[str, Path | None]:
    """A LoRA of rank 32 and four experts of rank 8 on every linear, with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from htsr_alloc.lora_moe import LoraMoeConfig

    configs = {
        "LoRA": LoraConfig(r=RANK * EXPERTS, target_modules="all-linear"),
        "mixture": LoraMoeConfig(r=RANK, num_experts=EXPERTS),
    }
    for name, config in configs.items():
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.01)
        adapted.save_pretrained(str(folder / name))
    return {"base": None, **{name: folder / name for name in configs}}


def main(model: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        adapters = make(model, Path(temporary))
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        server = LLM(
            model,
            dtype="float32",
            enable_lora=True,
            max_loras=2,
            max_lora_rank=32,
            lora_target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            max_model_len=128,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )
        settings = SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False
        )
        prompts = [
            {"prompt_token_ids": [100 + 37 * i + j for j in range(LENGTH)]} for i in range(PROMPTS)
        ]
        rates: dict[str, list[float]] = {name: [] for name in adapters}
        for run in range(RUNS + 1):
            for number, (name, path) in enumerate(adapters.items(), 1):
                request = None if path is None else LoRARequest(name, number, str(path))
                start = time.process_time()
                server.generate(prompts, settings, lora_request=request, use_tqdm=False)
                seconds = time.process_time() - start
                if run:
                    rates[name].append(PROMPTS * TOKENS / seconds)
        for name, values in rates.items():
            print(f"{name}: {statistics.median(values):.0f} tokens per CPU second")


if __name__ == "__main__":
    main(sys.argv[1])
