"""Padding by where a linear's tokens come from, on families that see others or in another order."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from helpers import moe_tiny as tiny

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc.lora_moe import router_aux_loss, routing_report
from htsr_alloc.lora_moe.model import layers_of, state_of
from htsr_alloc.lora_moe.tokens import batch_axis, spread

MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 3 + [0] * 5])
SMALL = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def xlnet():
    config = transformers.XLNetConfig(
        vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=24, num_labels=2, dropout=0.0
    )
    return transformers.XLNetForSequenceClassification(config), ["layer_1", "layer_2"]


def longformer():
    config = transformers.LongformerConfig(
        **SMALL, attention_window=[4, 4], pad_token_id=1, max_position_embeddings=20
    )
    return transformers.LongformerForTokenClassification(config), ["query", "value", "dense"]


def deberta():
    config = transformers.DebertaV2Config(
        **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=10,
        share_att_key=True, position_biased_input=False, type_vocab_size=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.DebertaV2ForTokenClassification(config), [
        "query_proj",
        "key_proj",
        "value_proj",
        "dense",
    ]


def switch():
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
        dropout_rate=0.0, router_jitter_noise=0.0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config), None


def clip():
    config = transformers.CLIPConfig(
        text_config={**SMALL, "max_position_embeddings": 16},
        vision_config={**SMALL, "image_size": 14, "patch_size": 7} | {"num_channels": 3},
        projection_dim=8,
    )
    return transformers.CLIPModel(config), None


def given(model, ids, mask):
    """Arguments of a step: labels where the model takes them, images where it does."""
    name = type(model).__name__
    found = {"input_ids": ids, "attention_mask": mask}
    if "CLIP" in name:
        return {**found, "pixel_values": torch.ones(3, 3, 14, 14), "return_loss": True}
    if "Sequence" in name:
        return {**found, "labels": torch.tensor([0, 1, 0])}
    if "Token" in name:
        return {**found, "labels": torch.ones_like(ids).masked_fill(mask == 0, -100)}
    return {**found, "labels": torch.full((3, 4), 5)}


@pytest.mark.parametrize("make", [xlnet, longformer, deberta, switch, clip])
def test_a_step_trains_and_padding_does_not_count(make):
    torch.manual_seed(0)
    base, targets = make()
    model = tiny.adapted(
        model=base, router_aux_loss_coef=0.5, task_type=None, target_modules=targets or "all-linear"
    )
    model.train()
    ids = tiny.tokens(3, 8)
    values, state = [], state_of(model.get_base_model())
    for filler in (7, 9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = given(base, ids.masked_fill(MASK == 0, filler), MASK)
            model(**inputs).loss.backward()
        own = {m.name: m.router_aux_loss for m in layers_of(model) if m.router_aux_loss is not None}
        values.append({name: own[name] for name in own if name not in state.unmasked})
        assert router_aux_loss(model) > 0
    assert len(values[0]) > 2
    for name, value in values[0].items():
        assert torch.allclose(value, values[1][name], rtol=1e-5), name


def test_time_first_is_not_batch_first():
    """XLNet's tokens are left out where they are padding, and no other: the report counts them."""
    torch.manual_seed(0)
    base, targets = xlnet()
    model = tiny.adapted(model=base, target_modules=targets, task_type=None).eval()
    seen = {}

    def look(layer, args):
        x = args[0]  # (S, B, d)
        assert x.shape[:2] == (8, 3)
        p = (x.double() @ layer.lora_moe_router["default"].double().T).topk(2, -1).indices
        kept = [p[s, b] for b in range(3) for s in range(8) if MASK[b, s]]
        seen[layer.name] = torch.bincount(torch.cat(kept), minlength=4) / (2 * len(kept))

    hooks = [layer.register_forward_pre_hook(look) for layer in layers_of(model)]
    ids = tiny.tokens(3, 8)
    rows = routing_report(model, [{"input_ids": ids, "attention_mask": MASK}])
    assert len(rows) == 4
    for hook in hooks:
        hook.remove()
    for row in rows:
        assert row.tokens == int(MASK.sum())
        assert row.load == pytest.approx(seen[row.name].tolist(), abs=1e-6)


def test_other_tokens_are_said_once():
    torch.manual_seed(0)
    base, targets = deberta()
    model = tiny.adapted(
        model=base, router_aux_loss_coef=0.5, task_type=None, target_modules=targets
    )
    inputs = given(base, tiny.tokens(3, 8), MASK)
    model.train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**inputs)
    assert sum("counts every token, padding too" in str(w.message) for w in told) == 1
    state = state_of(model.get_base_model())
    assert any("key_proj" in name or "query_proj" in name for name in state.unmasked)


def test_a_tower_without_padding_has_no_mask():
    """As many patches and rows as tokens and texts: the text's mask is not for the images."""
    torch.manual_seed(0)
    base, _ = clip()
    model = tiny.adapted(model=base, task_type=None, target_modules=["q_proj", "fc1"]).eval()
    ids, mask = tiny.tokens(3, 5), MASK[:, 2:7]
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.ones(3, 3, 14, 14)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = {row.name: row.tokens for row in routing_report(model, [inputs])}
    images = {name: n for name, n in rows.items() if name.startswith("vision")}
    assert len(images) == 4
    assert set(images.values()) == {15}, "3 images of 4 patches and a class token"
    texts = {n for name, n in rows.items() if name.startswith("text")}
    assert texts == {int(mask.sum())}


def test_where_the_rows_are():
    name, expert = "layers.0.q", "layers.0.mlp.experts.3.up"
    assert batch_axis((2, 9), (2, 9), name, False) == 0
    assert batch_axis((2, 9, 4), (2, 9), name, False) == 0
    assert batch_axis((18,), (2, 9), name, False) == 0
    assert batch_axis((9, 2), (2, 9), name, True) == 1
    assert batch_axis((2, 9), (2, 9), name, True) == 0
    for shape, time in (((9, 2), False), ((18,), True), ((17,), False), ((3, 6), False)):
        assert batch_axis(shape, (2, 9), name, time) is None, shape
    assert batch_axis((9, 9), (9, 9), name, False) == 0
    assert batch_axis((9, 9), (9, 9), name, True) is None, "it cannot be known"
    assert batch_axis((18,), (2, 9), expert, False) is None, "in the order of a router"
    mask = torch.arange(6).reshape(2, 3)
    assert spread(mask, (6,), 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert spread(mask, (3, 2), 1).tolist() == [0, 3, 1, 4, 2, 5]
    assert spread(mask, (2, 3, 2), 0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
