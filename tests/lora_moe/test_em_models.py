"""EM-LoRA on other architectures: the router reads what the block reads, or one sentence says why
it cannot."""

from __future__ import annotations

import pytest
import torch
from helpers import moe_tiny as tiny

pytest.importorskip("peft", reason="needs the extra [train]")

import transformers

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.model import STATE

SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 12}
MLA = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
MODELS = {
    "Qwen3": GROUPED,
    "Gemma3": {**GROUPED, "layer_types": ["full_attention"] * 2},
    "Exaone4": {**GROUPED, "layer_types": ["full_attention"] * 2},
    "Lfm2": {**SIZES, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "DeepseekV3": MLA,
    "OPT": {**SIZES, **OPT},
    "GPT2": {"vocab_size": tiny.VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoX": SIZES,
}


def random_model(name, head, settings):
    config = getattr(transformers, f"{name}TextConfig", None)
    config = config or getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    return getattr(transformers, name + head)(config(**settings)).float()


@pytest.mark.parametrize("name", MODELS)
def test_each_router_reads_its_block_s_input(name):
    base = random_model(name, "LMHeadModel" if name == "GPT2" else "ForCausalLM", MODELS[name])
    model = tiny.adapted("em_lora", model=base, em_pooler="mean", em_activation="relu").eval()
    state, seen = getattr(base, STATE), {}
    for key in state.block_routers:
        base.get_submodule(key).register_forward_pre_hook(
            lambda m, args, kwargs, key=key: seen.update(
                {key: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    with torch.no_grad():
        model(input_ids=tiny.tokens(), attention_mask=mask)
        assert len(seen) == 2
        for key, hidden in seen.items():
            host, _ = state.block_routers[key].hosts["default"]
            pooled = torch.stack([hidden[0, 2:].mean(0), hidden[1].mean(0)])
            want = pooled.relu() @ host.lora_moe_router["default"].T
            got = state.current.decisions[key, "default"].logits
            assert torch.allclose(got, want, atol=1e-5)
        ids = tiny.tokens(3, 6)
        together = model.generate(
            input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        for row in range(3):
            alone = model.generate(
                input_ids=ids[row : row + 1], max_new_tokens=4, min_new_tokens=4, do_sample=False
            )
            assert torch.equal(together[row], alone[0])


def test_tokens_in_a_line_have_their_own_prompt_s_gate():
    """OPT's feed-forward reads (B S, d)."""
    model = tiny.adapted(
        "em_lora",
        model=random_model("OPT", "ForCausalLM", {**SIZES, **OPT}),
        target_modules=["fc1", "fc2"],
        em_pooler="last",
    ).eval()
    ids = tiny.tokens(4, 6)
    with torch.no_grad():
        together = model(ids).logits
        alone = torch.cat([model(ids[i : i + 1]).logits for i in range(4)])
        assert torch.allclose(together, alone, atol=1e-5)
        routings = getattr(model.get_base_model(), STATE)
    assert routings.block_routers


@pytest.mark.parametrize("name", ["Qwen3", "Llama"])
def test_a_class_for_each_row(name):
    """Labels (B,) are classes and hide no token of the prompt."""
    settings = {**GROUPED, "num_labels": 3}
    model = tiny.adapted(
        "em_lora",
        model=random_model(name, "ForSequenceClassification", settings),
        task_type="SEQ_CLS",
    )
    out = model(input_ids=tiny.tokens(), labels=torch.tensor([0, 2]))
    out.loss.backward()
    state = getattr(model.get_base_model(), STATE)
    assert state.current.prompt.all()
    host, _ = state.block_routers["model.layers.0"].hosts["default"]
    assert host.lora_moe_router["default"].grad.abs().max() > 0


def test_an_encoder_s_rows_are_prompts():
    base = random_model("Bert", "ForSequenceClassification", SIZES)
    model = tiny.adapted(
        "em_lora", model=base, task_type="SEQ_CLS", target_modules=["query", "value"]
    )
    assert model(input_ids=tiny.tokens(), labels=torch.tensor([0, 1])).loss.isfinite()


def test_what_has_no_prompt_is_one_sentence():
    whisper = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    base = random_model("Whisper", "ForConditionalGeneration", {**whisper, **ids, "vocab_size": 64})
    with pytest.raises(HtsrError, match="the prompt of a decoder-only model"):
        tiny.adapted("em_lora", model=base)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = {"image_size": 16, "patch_size": 8, **{name: SIZES[name] for name in sizes}}
    base = random_model("ViT", "ForImageClassification", vision)
    model = tiny.adapted("em_lora", model=base, target_modules=["fc1", "fc2"], task_type=None)
    with pytest.raises(HtsrError, match="neither input_ids nor inputs_embeds"):
        model(pixel_values=torch.randn(2, 3, 16, 16))


def test_linears_that_no_prompt_can_choose_are_refused():
    with pytest.raises(HtsrError, match="and lm_head is in none"):
        tiny.adapted("em_lora", target_modules=["q_proj", "lm_head"])
    base = tiny.llama()
    for block in base.model.layers:
        block.mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
        block.mlp.experts[0].up = torch.nn.Linear(32, 32)
    with pytest.raises(
        HtsrError, match="sees only the tokens that the model's own router gives it"
    ):
        tiny.adapted("em_lora", model=base, target_modules=["up"])
    # Another width than the language model's.
    base = tiny.llama()
    base.config.hidden_size = 48
    with pytest.raises(HtsrError, match=r"layers.0 reads \(2, 9, 32\), and EM-LoRA's router needs"):
        tiny.adapted("em_lora", model=base)(tiny.tokens())
