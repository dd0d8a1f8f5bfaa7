"""A saved adapter's GatedLora records give what its layers give."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("peft")

import torch
from helpers import moe_tiny as tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.collapse import collapse
from htsr_alloc.lora_moe.gated import UNGATED
from htsr_alloc.lora_moe.model import layers_of
from htsr_alloc.lora_moe.saved import read_gated

UNEVEN = {"expert_pattern": {"layers.0": 3, "layers.1.mlp": 1, "layers.1.self_attn": 5}}
CASES = {
    "alphalora": ("alphalora", {}),
    "alphalora, N by layer": ("alphalora", {**UNEVEN, "top_k_pattern": {"layers.0": 3}}),
    "goat": ("goat", {}),
    "goat, zero": ("goat", {"goat_segment": "zero"}),
    "goat, one LoRA": ("goat", {"goat_mixture": False}),
    "goat_plus": ("goat_plus", {}),
    "mor": ("mor", {}),
    "mor, mean": ("mor", {"mor_router": "mean"}),
    "hydra": ("hydra", UNEVEN),
    "adamole": ("adamole", UNEVEN),
}


def saved(tmp_path, system, settings, dtype=torch.float32):
    """A trained adapter's model, and its folder."""
    model = tiny.adapted(system, model=tiny.llama(dtype=dtype), **settings).eval()
    model.save_pretrained(str(tmp_path))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_record_gives_what_its_layer_gives(case, dtype, tmp_path):
    model = saved(tmp_path, *CASES[case], dtype)
    records = read_gated(tmp_path)
    layers = {layer.name: layer for layer in layers_of(model)}
    assert records.keys() == layers.keys()
    generator = torch.Generator().manual_seed(1)
    for name, layer in layers.items():
        x = torch.randn(3, 7, layer.in_features, generator=generator, dtype=dtype)
        want = layer(x) - layer.base_layer(x)
        got = records[name].delta(x)
        assert got.dtype == dtype
        assert want.abs().max() > 1e-2
        close = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(got, want, rtol=close, atol=close * float(want.abs().max()))


def test_a_live_layer_gives_the_same_record(tmp_path):
    model = saved(tmp_path, "adamole", {})
    records = read_gated(tmp_path)
    for layer in layers_of(model):
        live = layer.gated("default")
        assert torch.equal(live.b, records[layer.name].b)
        assert torch.equal(live.expert_of_rank, records[layer.name].expert_of_rank)


def test_what_is_ungated_is_said_rank_by_rank(tmp_path):
    saved(tmp_path, "goat", {"expert_pattern": {"layers.0": 3, "layers.1": 1}})
    for name, record in read_gated(tmp_path).items():
        (a, b), expert = record.flat(), record.ranks
        n = 3 if ".0." in name else 1
        assert len(a) == b.shape[1] == len(expert) == 2 * n * 2  # the residual has as many ranks
        wanted = [0, 0, 1, 1, 2, 2] if n == 3 else [UNGATED] * 2
        assert expert.tolist() == wanted + [UNGATED] * 2 * n


def test_em_lora_is_refused_with_what_can_be_done(tmp_path):
    saved(tmp_path, "em_lora", {})
    with pytest.raises(HtsrError, match="chooses by the whole prompt") as caught:
        read_gated(tmp_path)
    assert "htsr collapse" in caught.value.hint


def test_another_adapter_and_trained_modules_are_refused(tmp_path):
    plain = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    plain.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(HtsrError, match="LORA adapter"):
        read_gated(tmp_path / "plain")
    saved(tmp_path / "whole", "alphalora", {"modules_to_save": ["lm_head"]})
    with pytest.raises(HtsrError, match="trained modules or tokens \\(lm_head\\)"):
        read_gated(tmp_path / "whole")
    saved(tmp_path / "head", "alphalora", {"target_modules": ["lm_head"]})
    with pytest.raises(HtsrError, match=r"holds .*lm_head"):
        read_gated(tmp_path / "head")
    saved(tmp_path / "tokens", "alphalora", {"trainable_token_indices": [5, 7]})
    with pytest.raises(HtsrError, match="trained modules or tokens \\(5, 7\\)"):
        read_gated(tmp_path / "tokens")


def test_trained_tokens_are_saved_and_loaded_with_the_experts(tmp_path):
    model = saved(tmp_path, "alphalora", {"trainable_token_indices": [5, 7]})
    again = PeftModel.from_pretrained(tiny.llama(), str(tmp_path)).eval()
    tokens = torch.tensor([[3, 5, 7, 9]])
    with torch.no_grad():
        want, got = model(tokens).logits, again(tokens).logits
        with model.disable_adapter():
            bare = model(tokens).logits
    torch.testing.assert_close(got, want)
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    assert rows.requires_grad
    assert (rows - tiny.llama().get_input_embeddings().weight[[5, 7]]).abs().max() > 0.1
    assert (bare - want).abs().max() > 1e-2


def test_tensors_of_another_configuration_are_refused(tmp_path):
    saved(tmp_path, "alphalora", {})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "num_experts": 3}))
    with pytest.raises(HtsrError, match="configuration says"):
        read_gated(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = next(name for name in tensors if name.endswith("lora_moe_B"))
    save_file(
        {n: t for n, t in tensors.items() if n != lost}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(HtsrError, match="not A and B"):
        read_gated(tmp_path)


def test_one_prompt_of_em_lora_becomes_a_plain_lora_exactly(tmp_path):
    """The documented way to serve EM-LoRA: collapse it on the one prompt it will answer."""
    model = saved(tmp_path / "em", "em_lora", {})
    prompt = tiny.tokens(1, 7)
    row = torch.cat([prompt, tiny.tokens(1, 3, seed=1)], 1)
    labels = row.clone()
    labels[:, :7] = -100
    made = collapse(model, [{"input_ids": row, "labels": labels}])
    assert made.error < 1e-6
    made.save(tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "plain")).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want, got = model.generate(prompt, **settings), plain.generate(prompt, **settings)
    assert torch.equal(want, got)
    with torch.no_grad(), model.disable_adapter():
        bare = model(row, labels=labels).logits
    assert (bare - plain(row).logits).abs().max() > 1e-2
