"""EM-LoRA: the prompt-aware router, decided once a prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import moe_tiny as tiny
from helpers import naive_moe as naive

pytest.importorskip("peft", reason="needs the extra [train]")

from peft import PeftModel

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import LoraMoeConfig, router_aux_loss
from htsr_alloc.lora_moe.model import STATE, layers_of
from htsr_alloc.lora_moe.systems.em_lora import activation, prompt

POOLERS = ["last", "mean", "max", "attention"]


def em(seed=0, **settings):
    return tiny.adapted("em_lora", seed, **{"r": 2, **settings}).eval()


def decisions(model):
    state = getattr(model.get_base_model(), STATE)
    return {key[0]: value.weights.detach() for key, value in state.current.decisions.items()}


@pytest.mark.parametrize("how", POOLERS)
def test_poolers(how):
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    w = torch.randn(4, dtype=torch.float64)
    ours = prompt.pool(hidden, mask, how, w)
    for row, kept, got in zip(hidden, mask, ours, strict=True):
        states = [row[i] for i in range(6) if kept[i]]
        if how == "last":
            want = states[-1]
        elif how == "mean":
            want = sum(states) / len(states)
        elif how == "max":
            want = torch.stack([max(s[i] for s in states) for i in range(4)])
        else:
            a = naive.softmax(torch.stack([s @ w for s in states]))
            want = sum(weight * s for weight, s in zip(a, states, strict=True))
        assert (got - want).abs().max() < 1e-12
    (grad,) = torch.autograd.grad(ours.sum(), hidden)
    assert grad.isfinite().all()
    assert grad[0, [0, 1, 5]].abs().max() == 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str
)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("how", POOLERS)
def test_a_layer_is_its_formula(how, dora, dtype, tolerance):
    """Every linear of a block is W₀x + g_j · expert(x), one j a prompt, g_j = p_j.

    The values, and the gradients of four random projections of them; the formula is in float64.
    A projection's gradient may cancel to a tenth of its usual size, and its rounding does not:
    errors are compared with the largest of the four.
    """
    model = em(em_pooler=how, em_dora=dora, model=tiny.llama(dtype=dtype))
    block, seen = model.get_base_model().model.layers[0], {}

    def keep(name, value):
        seen[name] = value

    block.register_forward_pre_hook(lambda m, args: keep("hidden", args[0]))
    for layer in layers_of(block):
        layer.register_forward_hook(lambda m, args, out: keep(m.name, (args[0], out)))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    model(input_ids=tiny.tokens(), attention_mask=mask)
    layers = list(layers_of(block))
    own = {n.split(".")[0]: p for n, p in layers[0].named_parameters() if "base" not in n}
    host = {name: value.double() for name, value in own.items()}
    picks = []
    for row in range(2):
        states = [
            h.double() for h, kept in zip(seen["hidden"][row], mask[row], strict=True) if kept
        ]
        vector = host["lora_moe_pool"] if how == "attention" else None
        pooled = prompt.pool(
            torch.stack(states)[None], torch.ones(1, len(states)).bool(), how, vector
        )[0]
        squeezed = []
        for value in pooled:
            top = sum(a * value**j for j, a in enumerate(host["lora_moe_numerator"]))
            rest = sum(b * value ** (i + 1) for i, b in enumerate(host["lora_moe_denominator"]))
            squeezed.append(top / (1 + abs(rest)))
        p = naive.softmax(torch.stack(squeezed) @ host["lora_moe_router"].T)
        picks.append((int(p.argmax()), p.max()))
    ours, theirs = [], []
    for index, layer in enumerate(layers):
        x, out = (value.double() for value in seen[layer.name])
        a, b = layer.lora_moe_A["default"].double(), layer.lora_moe_B["default"].double()
        weight = layer.base_layer.weight.double()
        for row, (pick, p) in enumerate(picks):
            adapted = weight + 8.0 * b @ a
            if dora:
                adapted = (
                    layer.lora_moe_magnitude["default"].double()[:, None]
                    * adapted
                    / adapted.norm(dim=1).detach()[:, None]
                )
            gate = p if pick == index else 0
            ours.append(out[row])
            theirs.append(x[row] @ weight.T + gate * (x[row] @ (adapted - weight).T))
    trained = [p for p in block.parameters() if p.requires_grad]
    for got, want in zip(ours, theirs, strict=True):
        assert (got - want).abs().max() <= tolerance * max(1, want.abs().max())
    generator = torch.Generator().manual_seed(3)
    sides = ([], [])  # a side: projections of lists of gradients
    for _ in range(4):
        weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in ours]
        for outputs, side in zip((ours, theirs), sides, strict=True):
            total = sum((w * o).sum() for w, o in zip(weights, outputs, strict=True))
            grads = torch.autograd.grad(total, trained, retain_graph=True, allow_unused=True)
            side.append(
                [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(trained, grads, strict=True)
                ]
            )
    routed = [i for i, p in enumerate(trained) if p is own["lora_moe_router"]]
    got, want = ([torch.stack(grads) for grads in zip(*side, strict=True)] for side in sides)
    assert got[routed[0]].abs().max() > 0
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max())


@pytest.mark.parametrize("how", POOLERS)
def test_generate(how):
    """With and without cache, beams, sampling; rows of a batch as if they were alone."""
    model = em(em_pooler=how)
    ids = tiny.tokens(3, 7)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6}
    for extra in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        cached = model.generate(**options, **extra, use_cache=True)
        assert torch.equal(cached, model.generate(**options, **extra, use_cache=False))
    sampled = []
    for cache in (True, False):
        torch.manual_seed(0)
        sampled.append(
            model.generate(**options, do_sample=True, num_return_sequences=2, use_cache=cache)
        )
    assert torch.equal(*sampled)
    greedy = model.generate(**options, do_sample=False)
    for row in range(3):
        kept = ids[row][mask[row].bool()][None]
        alone = model.generate(
            input_ids=kept, attention_mask=torch.ones_like(kept), do_sample=False, max_new_tokens=6
        )
        assert torch.equal(alone[0, -6:], greedy[row, -6:])


def test_the_choice_is_the_prompts():
    model = em()
    ids = tiny.tokens(2, 6)
    left = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    model(input_ids=ids, attention_mask=left)
    want = decisions(model)
    # Right padding, the same prompts: the same choice.
    moved = torch.cat([ids[:, 2:], ids[:, :2]], 1)
    model(input_ids=moved, attention_mask=left.flip(1))
    for key, value in decisions(model).items():
        assert torch.allclose(value, want[key], atol=1e-5)
    # Generated tokens, and answers in training, have no say in it.
    answers = torch.cat([ids, tiny.tokens(2, 3, seed=4)], 1)
    labels = answers.clone()
    labels[:, :6] = -100
    for last in (answers, answers.flip(1)):
        text = torch.cat([ids, last[:, :3]], 1)
        model(input_ids=text, labels=labels, attention_mask=torch.cat([left, left[:, 2:5]], 1))
        for key, value in decisions(model).items():
            assert torch.allclose(value, want[key], atol=1e-5)


def test_decoding_by_hand_keeps_the_choice():
    model = em()
    ids = tiny.tokens(2, 6)
    first = model(input_ids=ids, use_cache=True)
    kept = decisions(model)
    model(input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
    assert all(torch.equal(value, kept[key]) for key, value in decisions(model).items())
    with pytest.raises(HtsrError, match="keeps the choice made at prefill"):
        model(input_ids=tiny.tokens(3, 1), past_key_values=first.past_key_values)


def test_a_cache_by_hand_goes_on_token_by_token():
    """Several more tokens may be more of the prompt, which the choice has not seen."""
    model = em()
    ids = tiny.tokens(2, 8)
    first = model(input_ids=ids[:, :5], use_cache=True)
    with pytest.raises(HtsrError, match="the cache given holds a part of the text already, with 3"):
        model(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
    with pytest.raises(HtsrError, match="the cache given holds a part of the text already"):
        model.generate(input_ids=ids, past_key_values=first.past_key_values, max_new_tokens=2)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_seen_by_either_name(name):
    from htsr_alloc.lora_moe.systems.em_lora.generation import read_prompt

    given = {"input_ids": tiny.tokens(2, 3), name: SimpleNamespace(get_seq_length=lambda: 5)}
    nothing: Any = None
    with pytest.raises(HtsrError, match="holds a part of the text already, with 3"):
        read_prompt(given, None, nothing, nothing, None)


GENERATE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def test_generate_with_a_static_cache():
    """Its masks are 4-d where there is padding, which is refused; else all is as ever."""
    model, ids = em(), tiny.tokens(2, 7)
    want = model.generate(input_ids=ids, **GENERATE)
    choice = decisions(model)
    static = {"cache_implementation": "static", **GENERATE}
    assert torch.equal(model.generate(input_ids=ids, **static), want)
    assert all(torch.allclose(value, choice[key]) for key, value in decisions(model).items())
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    with pytest.raises(HtsrError, match="needs an attention mask of the tokens' shape"):
        model.generate(input_ids=ids, attention_mask=mask, **static)


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_candidates_are_no_prompt(how):
    """Assisted generation: the first pass has candidates behind the prompt."""
    model, ids = em(em_pooler="last"), tiny.tokens(1, 4).repeat(1, 3)
    want = model.generate(input_ids=ids, **GENERATE)
    choice, lengths = decisions(model), []
    base = model.get_base_model()
    watch = base.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    extra = (
        {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": tiny.llama()}
    )
    got = model.generate(input_ids=ids, **GENERATE, **extra)
    watch.remove()
    assert lengths[0] > ids.shape[1], "there must be candidates"
    assert torch.equal(got, want)
    assert all(torch.equal(value, choice[key]) for key, value in decisions(model).items())


def test_generation_that_splits_or_packs_the_prompt_is_refused():
    model, ids = em(), tiny.tokens(1, 12)
    with pytest.raises(HtsrError, match="whole prompt of 12 tokens, and generate ran the first 5"):
        model.generate(input_ids=ids, prefill_chunk_size=5, **GENERATE)
    want = model.generate(input_ids=ids, **GENERATE)
    assert torch.equal(model.generate(input_ids=ids, prefill_chunk_size=12, **GENERATE), want)
    with pytest.raises(HtsrError, match="continuous batching packs several into a row"):
        model.generate(input_ids=ids, cache_implementation="paged", **GENERATE)
    assert torch.equal(model.generate(input_ids=ids, **GENERATE), want)
    # Where EM-LoRA is not active none of it concerns the model.
    with model.disable_adapter():
        assert model.generate(input_ids=ids, prefill_chunk_size=5, **GENERATE).shape == (1, 20)
    # Drafts by the model's own first layers run generate within generate, on a cache of theirs.
    with pytest.raises(HtsrError, match="holds a part of the text already"):
        model.generate(input_ids=ids, assistant_early_exit=1, **GENERATE)


def test_generate_from_embeddings():
    model, ids = em(), tiny.tokens(2, 6)
    embeds = model.get_input_embeddings()(ids)
    want = model.generate(input_ids=ids, **GENERATE)[:, 6:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **GENERATE), want)


def test_two_adapters_on_other_linears():
    """Each keeps its routers in its own linears, and routes when it is active."""
    ids = tiny.tokens()
    model = em()
    first = model(ids).logits
    torch.manual_seed(5)
    model.add_adapter("other", LoraMoeConfig(system="em_lora", r=2, target_modules=["up_proj"]))
    model.set_adapter("other")
    tiny.move(model, seed=8)
    model.eval()
    second = model(ids).logits
    assert not torch.allclose(second, first)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, first)
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(model(ids).logits, first)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(model(ids).logits, second)


def completion(rows=4):
    ids = tiny.tokens(rows, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_balance_loss_over_prompts(reentrant):
    def gradients(coefficient):
        model = em(router_aux_loss_coef=coefficient).train()
        if reentrant is not None and coefficient:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(**completion()).loss
        return model, loss

    plain, _ = gradients(0.0)
    seen = []
    for block in plain.get_base_model().model.layers:
        (host,) = [layer for layer in layers_of(block) if layer.lora_moe_router]
        block.register_forward_pre_hook(lambda m, args, host=host: seen.append((host, args[0])))
    total = plain(**completion()).loss
    value = 0.0
    for host, hidden in seen:
        pooled = prompt.pool(
            hidden[:, :4], torch.ones(4, 4).bool(), "attention", host.lora_moe_pool["default"]
        )
        logits = (
            activation.rational(
                pooled, host.lora_moe_numerator["default"], host.lora_moe_denominator["default"]
            )
            @ host.lora_moe_router["default"].T
        )
        sets = [{int(row.argmax())} for row in logits]
        value = value + 0.5 * naive.balance(logits, sets, [1] * 4, 1)
    (total + value).backward()
    model, loss = gradients(0.5)
    loss.backward()
    want = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - want[name]).abs().max()
            assert error <= 2e-5 * max(1, want[name].abs().max()), name
    assert router_aux_loss(model) == pytest.approx(float(value), rel=1e-5)


def test_save_reload_and_unload(tmp_path):
    for dora in (False, True):
        model = em(em_dora=dora)
        ids = tiny.tokens()
        want = model(ids).logits
        model.save_pretrained(tmp_path)
        reloaded = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
        assert torch.equal(reloaded(ids).logits, want)
        assert not any(p.requires_grad for p in reloaded.parameters())
        with reloaded.disable_adapter():
            assert torch.equal(reloaded(ids).logits, tiny.llama()(ids).logits)
        base = reloaded.unload()
        assert not base._forward_pre_hooks
        assert not base.model.layers[0]._forward_pre_hooks
        assert torch.equal(base(ids).logits, tiny.llama()(ids).logits)


def test_what_it_cannot_do_is_refused():
    model = em()
    ids = tiny.tokens(2, 6)
    with pytest.raises(HtsrError, match="packs several texts into a row"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2))
    with pytest.raises(HtsrError, match="a row of this batch has none"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(HtsrError, match="needs an attention mask of the tokens' shape"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(HtsrError, match="em_pooler cannot be 'sum'"):
        LoraMoeConfig(system="em_lora", em_pooler="sum")
    # Position ids of padding do not mean packing.
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


def prompts(count=16, seed=0):
    from helpers.moe_train import rows

    return [{**row, "labels": [-100, -100, *row["labels"][2:]]} for row in rows(count, seed)]


def bilevel(out, **settings):
    from helpers.moe_train import trainer
    from transformers import Trainer

    from htsr_alloc.lora_moe.systems.em_lora.bilevel import BilevelMixin

    class BilevelTrainer(BilevelMixin, Trainer):
        pass

    extra = {"activation_dataset": prompts(8, seed=3), "activation_lr": 1e-2}
    model = em(lora_dropout=0.0)
    run = trainer(
        model,
        out,
        4,
        kind=BilevelTrainer,
        trainer={**extra, **settings.pop("trainer", {})},
        **settings,
    )
    run.train_dataset = prompts()
    return run


def test_weights_and_activations_step_in_turn(tmp_path):
    from htsr_alloc.lora_moe.systems.em_lora.bilevel import activation_parameters

    run = bilevel(tmp_path, steps=3)
    theta = activation_parameters(run.model)
    assert len(theta) == 4
    assert sum(p.numel() for p in theta) == 2 * 12
    before = [p.detach().clone() for p in theta]
    omega = [
        p for p in run.model.parameters() if p.requires_grad and all(p is not t for t in theta)
    ]
    first = [p.detach().clone() for p in omega]
    run.train()
    assert run.activation_steps == 3
    in_optimizer = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not in_optimizer & {id(p) for p in theta}
    assert in_optimizer == {id(p) for p in omega}
    assert all((a - b).abs().max() > 0 for a, b in zip(theta, before, strict=True))
    assert any((a - b).abs().max() > 0 for a, b in zip(omega, first, strict=True))
    # Without a learning rate Θ stays, whatever the training batches do.
    still = bilevel(tmp_path, steps=2, trainer={"activation_lr": 0.0})
    still.train()
    for got, want in zip(activation_parameters(still.model), before, strict=True):
        assert torch.equal(got, want)


def test_bilevel_resumes(tmp_path):
    whole = bilevel(tmp_path / "whole", steps=4)
    whole.train()
    bilevel(tmp_path / "cut", steps=4, save_strategy="steps", save_steps=2).train()
    again = bilevel(tmp_path / "cut", steps=4, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    want = dict(whole.model.named_parameters())
    for name, value in again.model.named_parameters():
        assert torch.allclose(value, want[name], atol=1e-6), name


def test_bilevel_needs_an_activation(tmp_path):
    from helpers.moe_train import trainer
    from transformers import Trainer

    from htsr_alloc.lora_moe.systems.em_lora.bilevel import BilevelMixin

    class BilevelTrainer(BilevelMixin, Trainer):
        pass

    with pytest.raises(HtsrError, match="needs activation_dataset"):
        trainer(em(), tmp_path, kind=BilevelTrainer)
    with pytest.raises(HtsrError, match="no activation to learn"):
        trainer(tiny.adapted(), tmp_path, kind=BilevelTrainer, trainer={"activation_dataset": [1]})
