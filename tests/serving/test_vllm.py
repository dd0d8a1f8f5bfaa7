"""vLLM answers as transformers and PEFT do: base, LoRA and every system in one batch.

make serve-demo      (an environment of its own, because vLLM pins transformers)
"""

from __future__ import annotations

import contextlib
import gc
import itertools
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
torch.manual_seed(0)
PROMPTS = [[504, 3575, 282, 4649, 314], [7158, 2450, 253, 655, 665, 436, 253], [1604, 28], [49] * 9]
PROMPTS += [torch.randint(3, 40000, (3 + i % 9,)).tolist() for i in range(28)]
TOKENS = 6
# Of the adapters' noise. Rounding then moves no model's log-probabilities much further than the
# base's; at three times this size it moves MoR's a hundred times as far, in transformers too.
SIZE = 0.01


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
    tiny.move(adapted, seed=len(kind), size=SIZE)
    adapted.save_pretrained(str(folder))


@torch.no_grad()
def reference(folder, rows, dtype=torch.float32):
    """transformers' log-probabilities after each token of each row, (tokens, vocabulary)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import htsr_alloc.lora_moe  # noqa: F401 - PEFT knows the adapters

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    return [model.eval()(torch.tensor([row])).logits[0].double().log_softmax(-1) for row in rows]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    found = {"base": None, **{kind: folder / kind for kind in ("lora", *SYSTEMS)}}
    for kind, path in found.items():
        if path is not None:
            make(path, kind)
    gc.collect()
    return found


@contextlib.contextmanager
def serving(dtype, slots):
    """A server with as many slots as adapters, so that all are full; its prefix cache is on."""
    from vllm import LLM

    made = LLM(
        str(MODEL),
        dtype=dtype,
        enable_lora=True,
        max_loras=slots,
        max_lora_rank=64,
        lora_target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        max_model_len=128,
        max_num_seqs=64,
        max_num_batched_tokens=256,
        skip_tokenizer_init=True,
    )
    yield made
    made.llm_engine.engine_core.shutdown()


def answers(server, adapters, prompts):
    """What the server writes for each adapter's prompts, all in one batch."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = {
        name: None if path is None else LoRARequest(name, number, str(path))
        for number, (name, path) in enumerate(adapters.items(), 1)
    }
    greedy = SamplingParams(
        temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True, detokenize=False
    )
    asked = [(name, prompt) for prompt in prompts for name in adapters]
    made = server.generate(
        [{"prompt_token_ids": prompt} for _, prompt in asked],
        greedy,
        lora_request=[requests[name] for name, _ in asked],
        use_tqdm=False,
    )
    return {
        name: [one for (own, _), one in zip(asked, made, strict=True) if own == name]
        for name in adapters
    }


def read(made):
    """Each answer's whole row of tokens, and the log-probabilities of those that were written."""
    rows = [[*one.prompt_token_ids, *one.outputs[0].token_ids] for one in made]
    logs = [
        [step[token].logprob for step, token in zip(x.logprobs, x.token_ids, strict=True)]
        for one in made
        for x in one.outputs
    ]
    return rows, torch.tensor(logs)


def of_written(logs, rows):
    """Of a reference, the log-probabilities of each row's last tokens, and of the likeliest."""
    before = [own[-TOKENS - 1 : -1] for own in logs]
    said = [
        own.gather(1, torch.tensor(row[-TOKENS:])[:, None])[:, 0]
        for own, row in zip(before, rows, strict=True)
    ]
    return torch.stack(said), torch.stack([own.amax(1) for own in before])


def test_one_batch_of_everything_gives_transformers_tokens_and_probabilities(adapters):
    with serving("float32", len(adapters) - 1) as server:
        made = answers(server, adapters, PROMPTS)
    seen = {}
    for name, path in adapters.items():
        rows, got = seen[name] = read(made[name])
        want, best = of_written(reference(path, rows, torch.float64), rows)
        own, _ = of_written(reference(path, rows), rows)
        off, usual = (got - want).abs().max(), (own - want).abs().max()
        print(f"{name}: largest error of a log-probability {off:.1e}, transformers' {usual:.1e}")
        assert off < 1e-4, name
        assert (best - want).max() < 1e-4, name  # transformers' own choice, but for ties
    for one, other in itertools.combinations(adapters, 2):  # no two answer alike
        (rows, got), (others, values) = seen[one], seen[other]
        assert rows != others or (got - values).abs().max() > 1e-2, (one, other)


def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(adapters):
    with serving("bfloat16", len(adapters) - 1) as server:
        made = answers(server, adapters, PROMPTS[:8])
    for name, path in adapters.items():
        rows, got = read(made[name])
        exact, _ = of_written(reference(path, rows), rows)
        own, _ = of_written(reference(path, rows, torch.bfloat16), rows)
        off, usual = (got - exact).abs().mean(), (own - exact).abs().mean()
        print(f"{name}, bfloat16: mean error {off:.1e}, transformers' {usual:.1e}")
        assert off < 1.5 * usual, name
