"""Rows of one batch that belong to different adapters (``adapter_names``), against single ones."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import moe_tiny as tiny

pytest.importorskip("peft", reason="needs the extra [train]")

from peft import LoraConfig, get_peft_model

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import LoraMoeConfig
from htsr_alloc.lora_moe.systems import SYSTEMS

MASK = torch.ones(8, 9, dtype=torch.long)
MASK[1, :4] = MASK[4, :2] = MASK[7, :5] = 0  # padding on the left
ROWS = ["one", "two", "__base__", "three", "two", "one", "three", "__base__"]


def several(systems, **settings):
    """A model with the adapters one, two and three."""
    model = tiny.llama(layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (name, system) in enumerate(zip(("one", "two", "three"), systems, strict=True)):
            torch.manual_seed(i)
            config = LoraMoeConfig(
                system=system, r=2, num_experts=3, task_type="CAUSAL_LM", **settings
            )
            if i == 0:
                model = get_peft_model(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            model.set_adapter(name)
            tiny.move(model, seed=i)
    return model.eval()


def alone(model, name, run):
    """What the model gives with one adapter active, or none."""
    if name == "__base__":
        with model.disable_adapter():
            return run()
    model.set_adapter(name)
    return run()


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_row_is_its_adapters(system):
    model, ids = several([system] * 3).double(), tiny.tokens(8, 9)
    with torch.no_grad():
        single = {
            name: alone(model, name, lambda: model(input_ids=ids, attention_mask=MASK).logits)
            for name in set(ROWS)
        }
        for active in ("one", "three"):  # which says nothing
            model.set_adapter(active)
            mixed = model(input_ids=ids, attention_mask=MASK, adapter_names=ROWS).logits
            for row, name in enumerate(ROWS):
                kept = MASK[row].bool()
                want = single[name][row][kept]
                error = (mixed[row][kept] - want).abs().max() / want.abs().max()
                assert error <= 1e-9, (row, name)
                others = [single[n][row][kept] for n in single if n != name]
                assert all((mixed[row][kept] - o).abs().max() > 1e-2 for o in others)
        after = model(input_ids=ids, attention_mask=MASK).logits
        assert torch.equal(after, single["three"]), "the names are of one call"


MIXES = [("alphalora", "goat_plus", "em_lora"), ("mor", "hydra", "adamole"), ("em_lora",) * 3]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1}])
@pytest.mark.parametrize("systems", MIXES)
def test_eight_rows_of_three_tenants_generate(systems, how):
    """Different systems in one batch, and every row gets its own adapter's answer."""
    model, ids = several(systems), tiny.tokens(8, 9)
    if "do_sample" in how:
        how = {**how, "num_return_sequences": 2}
    each = how.get("num_return_sequences", 1)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **how}
    single = {}
    for name in set(ROWS):
        rows = [i for i, n in enumerate(ROWS) if n == name]
        given = {"input_ids": ids[rows], "attention_mask": MASK[rows]}
        answers = alone(model, name, lambda given=given: model.generate(**given, **settings))
        single.update(zip(rows, answers.split(each), strict=True))
    got = model.generate(input_ids=ids, attention_mask=MASK, adapter_names=ROWS, **settings)
    for row, answer in enumerate(got.split(each)):
        assert torch.equal(answer, single[row]), row
    wrong = model.generate(input_ids=ids, attention_mask=MASK, **settings)
    assert not torch.equal(wrong, got)


def test_as_pefts_lora_does():
    """What is refused, by PEFT's own LoRA too."""
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear")).eval()
    model, ids = tiny.adapted().eval(), tiny.tokens(2, 9)
    for bad, message in (
        (["default", "other"], "has 'other', and the model has no such adapter"),
        (["default"], "has 1 names for 2 rows"),
    ):
        with pytest.raises(ValueError, match=r".+"):
            lora(input_ids=ids, adapter_names=bad)
        for call in (model, model.generate):
            with pytest.raises(HtsrError, match=message):
                call(input_ids=ids, adapter_names=bad)
    with pytest.raises(HtsrError, match="a list of names"):
        model(input_ids=ids, adapter_names="default")
    want = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, adapter_names=["default"] * 2).logits, want)
    for trained in (lora.train(), model.train()):
        with pytest.raises((ValueError, HtsrError), match="training"):
            trained(input_ids=ids, adapter_names=["default", "default"])
    model.eval()
    with pytest.raises(HtsrError, match="at the head"):
        raise_inside(model, ids)
    assert torch.equal(model(input_ids=ids).logits, want), "an error leaves nothing behind"


def raise_inside(model, ids):
    def refuse(*_):
        raise HtsrError("at the head")

    handle = model.get_base_model().lm_head.register_forward_hook(refuse)
    try:
        model(input_ids=ids, adapter_names=["__base__", "__base__"])
    finally:
        handle.remove()


def test_what_is_saved_whole_is_by_row_too():
    model = tiny.llama()
    settings = {"r": 2, "num_experts": 2, "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraMoeConfig(**settings), adapter_name="one")
    model.add_adapter("two", LoraMoeConfig(**settings))
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        tiny.move(model, seed)
    model.eval().double()
    ids = tiny.tokens(2, 9)
    want = [alone(model, name, lambda: model(input_ids=ids).logits) for name in ("one", "two")]
    got = model(input_ids=ids, adapter_names=["two", "one"]).logits
    assert (got[0] - want[1][0]).abs().max() <= 1e-9
    assert (got[1] - want[0][1]).abs().max() <= 1e-9


def test_an_encoder_decoder_with_beams():
    """The encoder sees the rows, the decoder the beams."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    settings = {"r": 2, "num_experts": 2, "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(
        T5ForConditionalGeneration(config), LoraMoeConfig(**settings), adapter_name="one"
    )
    model.add_adapter("two", LoraMoeConfig(**settings))
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        tiny.move(model, seed, size=1.0)
    model.eval()
    ids = tiny.tokens(3, 7)
    how = {"num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5}
    want = {
        n: alone(model, n, lambda: model.generate(input_ids=ids, **how)) for n in ("one", "two")
    }
    got = model.generate(input_ids=ids, adapter_names=["two", "one", "two"], **how)
    assert torch.equal(got[1], want["one"][1])
    assert torch.equal(got[::2], want["two"][::2])
    assert not torch.equal(want["one"], want["two"])
