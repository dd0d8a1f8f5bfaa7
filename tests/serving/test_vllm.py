"""vLLM answers as transformers and PEFT do: base, LoRA and every system in one batch.

make serve-demo      (an environment of its own, because vLLM pins transformers)
"""

from __future__ import annotations

import gc
import itertools
import math
import os

import pytest
from helpers.commands import ROOT

pytest.importorskip("vllm", reason="needs vLLM 0.32 (make serve-demo)")

import torch
from helpers import moe_tiny as tiny

from htsr_alloc.serving.launch import CPU

pytestmark = pytest.mark.server
MODEL = ROOT / ".cache" / "smollm2-gguf"
if not (MODEL / "model.safetensors.index.json").is_file():
    pytest.skip("needs SmolLM2 (make serve-demo)", allow_module_level=True)

os.environ.update({**CPU, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"})

SYSTEMS = ("alphalora", "goat", "goat_plus", "mor", "hydra", "adamole")
# By layer: one expert, several, none; only the first layers, because GOAT takes a weight's SVD.
UNEVEN = {"expert_pattern": {f"layers.{i}": (1 + i % 4) * (i < 8) for i in range(30)}}
PROMPTS = [[504, 3575, 282, 4649, 314], [7158, 2450, 253, 655, 665, 436, 253], [1604, 28], [49] * 9]
TOKENS = 6


def make(folder, kind):
    """A LoRA or a mixture on SmolLM2 with random weights that change its answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from htsr_alloc.lora_moe import LoraMoeConfig

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    torch.manual_seed(0)
    common = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    if kind == "lora":
        config = LoraConfig(target_modules="all-linear", **common)
    else:
        uneven = {} if kind == "mor" else UNEVEN
        config = LoraMoeConfig(system=kind, num_experts=4, lora_dropout=0.0, **uneven, **common)
    adapted = get_peft_model(model, config)
    tiny.move(adapted, seed=len(kind), size=0.03)
    adapted.save_pretrained(str(folder))


@torch.no_grad()
def reference(folder, rows):
    """transformers' log-probabilities after each token of each row, (tokens, vocabulary)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import htsr_alloc.lora_moe  # noqa: F401 - PEFT knows the adapters

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    return [model.eval()(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    found = {"base": None, **{kind: folder / kind for kind in ("lora", *SYSTEMS)}}
    for kind, path in found.items():
        if path is not None:
            make(path, kind)
    gc.collect()
    return found


@pytest.fixture(scope="module")
def server(adapters):
    from vllm import LLM

    return LLM(
        str(MODEL),
        dtype="float32",
        enable_lora=True,
        max_loras=len(adapters) - 1,  # every slot full
        max_lora_rank=64,
        lora_target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        max_model_len=128,
        max_num_seqs=64,
        max_num_batched_tokens=256,
        skip_tokenizer_init=True,
    )


def answers(server, asked):
    """What the server writes for (adapter, folder, prompt), all in one batch."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    numbers = {name: i for i, name in enumerate(dict.fromkeys(name for name, _, _ in asked), 1)}
    requests = [
        None if path is None else LoRARequest(name, numbers[name], str(path))
        for name, path, _ in asked
    ]
    greedy = SamplingParams(
        temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for _, _, prompt in asked]
    return server.generate(prompts, greedy, lora_request=requests, use_tqdm=False)


def test_one_batch_of_everything_gives_transformers_tokens_and_probabilities(server, adapters):
    asked = [(name, path, prompt) for prompt in PROMPTS for name, path in adapters.items()]
    made = answers(server, asked)
    texts, seen = {}, {}
    for name, path in adapters.items():
        own = [one for (kind, _, _), one in zip(asked, made, strict=True) if kind == name]
        rows = [[*one.prompt_token_ids, *one.outputs[0].token_ids] for one in own]
        texts[name] = [tuple(one.outputs[0].token_ids) for one in own]
        worst, seen[name] = 0.0, []
        for one, row, logs in zip(own, rows, reference(path, rows), strict=True):
            start = len(one.prompt_token_ids)
            for i, token in enumerate(one.outputs[0].token_ids):
                before = logs[start + i - 1]
                got = one.outputs[0].logprobs[i][token].logprob
                seen[name].append(got)
                worst = max(worst, math.fabs(got - float(before[token])))
                assert int(before.argmax()) == token, (name, row, i)
        print(f"{name}: largest difference of a log-probability {worst:.1e}")
        assert worst < 1e-4, name
    for one, other in itertools.combinations(adapters, 2):  # no two answer alike
        gap = max(abs(a - b) for a, b in zip(seen[one], seen[other], strict=True))
        assert texts[one] != texts[other] or gap > 1e-2, (one, other)
