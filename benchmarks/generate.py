"""`generate` with every LoRA-MoE system, LoRA, DoRA and the bare base, unmerged, in one run.

    python benchmarks/generate.py [--batches 1 4] [--beams 1 3] [--tokens 32] [--rounds 3]
        [--systems base lora em_lora] [--checkpoint .cache/checkpoints/smollm2] [--layers 30]

A LLaMA of SmolLM2-135M's shape (random weights, unless a checkpoint is given) reads 274 tokens and
writes some, as in EM-LoRA's table 3. LoRA and DoRA have rank 32, EM-LoRA's experts too, the other
systems 8 experts of rank 4 with 2 of them used; MoR adapts the feed-forward linears alone, as in
its paper. ``goat_folded`` has W_res in a copy of the base's weights, not as a product of its own.

Every round runs all models in turn on one thread. Seconds are CPU seconds of this process, so that
other jobs count little; figures are medians over rounds, and ratios medians of each round's ratio
to LoRA. Peak memory (Linux) is the most that a generation adds to the resident memory, plus the
adapter's own weights; the models share one copy of the base.
"""

import argparse
import ctypes
import gc
import os
import statistics
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StoppingCriteria

from htsr_alloc.lora_moe import LoraMoeConfig

PROMPT, TOTAL_RANK, N = 274, 32, 8
PROBE = torch.arange(3, 11)[None]
MIXTURE = {"r": TOTAL_RANK // N, "num_experts": N, "top_k": 2}


def adapter(system, **settings):
    return LoraMoeConfig(system=system, lora_dropout=0.0, **{**MIXTURE, **settings})


def lora(**settings):
    return LoraConfig(r=TOTAL_RANK, target_modules="all-linear", **settings)


CONFIGS = {
    "base": lambda: None,
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "em_lora": lambda: adapter("em_lora", r=TOTAL_RANK),
    "em_dora": lambda: adapter("em_lora", r=TOTAL_RANK, em_dora=True),
    "alphalora": lambda: adapter("alphalora"),
    "adamole": lambda: adapter("adamole"),
    "hydra": lambda: adapter("hydra"),
    "mor": lambda: adapter("mor"),
    "goat": lambda: adapter("goat"),
    "goat_plus": lambda: adapter("goat_plus"),
    "goat_folded": lambda: adapter("alphalora"),  # see fold
}


def llama(arguments):
    if arguments.checkpoint:
        return AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = LlamaConfig(num_hidden_layers=arguments.layers, **shape, **heads)
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def shared(base):
    """Another model over the same weights."""
    with torch.device("meta"):
        model = type(base)(base.config)
    model.load_state_dict(base.state_dict(), assign=True)
    model.model.rotary_emb = base.model.rotary_emb
    model.tie_weights()
    return model.requires_grad_(False)


def linears(model):
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_moe_A")}


def fold(goat, folded):
    """Give ``folded``, AlphaLoRA's forward, GOAT's experts; W_res goes into copies of the base.

    Both gate in the same way. The scale that AlphaLoRA does not have goes into B.
    """
    others = linears(folded)
    for name, mine in linears(goat).items():
        other, scale = others[name], (3 * mine.in_features / MIXTURE["r"]) ** 0.5
        for part, factor in (("A", 1.0), ("B", scale / (16 / MIXTURE["r"])), ("router", 1.0)):
            own = getattr(mine, f"lora_moe_{part}")["default"].data
            getattr(other, f"lora_moe_{part}")["default"].data.copy_(own * factor)
        a, b = mine.lora_moe_A["default"].data, mine.lora_moe_B["default"].data
        weight = other.get_base_layer().weight
        weight.data = weight.data - scale / N * b @ a


def models(names, arguments):
    base, made = llama(arguments), {}
    for name in names:
        config, model = CONFIGS[name](), shared(base)
        made[name] = (get_peft_model(model, config) if config else model).eval()
    if "goat_folded" in made:
        goat = made.get("goat") or get_peft_model(shared(base), adapter("goat")).eval()
        fold(goat, made["goat_folded"])
        with torch.no_grad():
            torch.testing.assert_close(
                made["goat_folded"](PROBE).logits, goat(PROBE).logits, rtol=1e-3, atol=1e-3
            )
    return made


class FirstToken(StoppingCriteria):
    """Notes when the first token was there; stops nothing."""

    at = None

    def __call__(self, input_ids, scores, **kwargs):
        self.at = self.at or time.process_time()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def resident(key):
    """MiB of VmRSS, or VmHWM since the last reset; None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    row = next(x for x in status.read_text().splitlines() if x.startswith(key))
    return int(row.split()[1]) / 1024


def measured(model, ids, beams, tokens):
    """CPU seconds to the first token, tokens a CPU second after it, MiB added at the peak."""
    gc.collect()
    first, before = FirstToken(), resident("VmRSS")
    if before is not None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    start = time.process_time()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beams,
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            stopping_criteria=[first],
        )
    end = time.process_time()
    assert out.shape == (len(ids), PROMPT + tokens)
    peak = None if before is None else resident("VmHWM") - before
    return first.at - start, len(ids) * (tokens - 1) / (end - first.at), peak


def processor():
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    return next((r.split(": ")[1] for r in rows if r.startswith("model name")), "unknown processor")


def load():
    return ", ".join(f"{value:.1f}" for value in os.getloadavg())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--checkpoint")
    parser.add_argument("--layers", type=int, default=30, help="of the random model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    made = models(arguments.systems, arguments)
    print(f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}; load {load()}")
    own = {
        name: sum(p.numel() * 4 for n, p in model.named_parameters() if "lora" in n) / 2**20
        for name, model in made.items()
    }
    for model in made.values():  # the first pass of each is not counted
        model.generate(input_ids=PROBE, max_new_tokens=2, pad_token_id=0)
    for batch in arguments.batches:
        for beams in arguments.beams:
            ids = torch.randint(3, 49152, (batch, PROMPT), generator=torch.Generator())
            rounds = []
            for _ in range(arguments.rounds):
                cell = (ids, beams, arguments.tokens)
                rounds.append({name: measured(model, *cell) for name, model in made.items()})
            print(f"\nbatch {batch}, beams {beams}; load {load()}\n")
            print("| model | first token, CPU s | tokens/CPU s | vs LoRA | peak, MiB |")
            print("|---|---|---|---|---|")
            for name in made:
                first, rate = (statistics.median(r[name][i] for r in rounds) for i in (0, 1))
                peaks = [r[name][2] for r in rounds]
                peak = "-" if None in peaks else f"{statistics.median(peaks) + own[name]:.0f}"
                ratio = "-"
                if "lora" in made:
                    ratio = f"{statistics.median(r[name][1] / r['lora'][1] for r in rounds):.2f}"
                print(f"| {name} | {first:.2f} | {rate:.1f} | {ratio} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
