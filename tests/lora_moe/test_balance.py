"""The balance loss's gradient in whole models, against the loss added up by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import moe_tiny as tiny
from helpers import naive_moe as naive

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc.lora_moe import router_aux_loss
from htsr_alloc.lora_moe.model import layers_of

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [1] * 6 + [0] * 3])


def batch(rows=3, seed=0):
    ids = tiny.tokens(rows, 9, seed)
    mask = MASK[:rows]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def by_hand(model, inputs, coefficient, parts, top_k=2, half=False):
    """The model's loss (in float16 if asked) and Σ coefficient · L, the formula in loops."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
        for layer in layers_of(model)
        if layer.lora_moe_router
    ]
    with torch.autocast("cpu", dtype=torch.float16, enabled=half):
        loss = model(**inputs).loss
    for hook in hooks:
        hook.remove()
    kept = inputs["attention_mask"].flatten()
    total = torch.zeros(())
    for layer, x in seen:
        router = layer.lora_moe_router["default"]
        logits = (x.to(router.dtype) @ router.T).flatten(0, 1)
        sets = [set(naive.top_k_gate(row, top_k)) for row in logits]
        total = total + coefficient / parts(layer) * naive.balance(logits, sets, kept, top_k)
    return loss, total


def gradients(model):
    """Gradients of what is trainable, taken away from the parameters."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def close(a, b, tolerance=1e-5):
    for name in b:
        assert (a[name] - b[name]).abs().max() <= tolerance * max(1, b[name].abs().max()), name


def reference(reduction="layers", share=1.0, scale=1.0, inputs=None, **how):
    parts = {"sum": lambda _: 1, "mean": lambda _: 14, "layers": lambda _: 7}[reduction]
    model = tiny.adapted(router_aux_loss_coef=0.0).train()
    loss, aux = by_hand(model, inputs or batch(), parts=parts, **{"coefficient": 0.5, **how})
    (scale * (loss + share * aux)).backward()
    return gradients(model), float(loss.detach()), float(aux.detach())


@pytest.mark.parametrize("reduction", ["layers", "sum", "mean"])
def test_gradient_and_value(reduction):
    want, loss, aux = reference(reduction)
    model = tiny.adapted(router_aux_loss_coef=0.5, router_aux_loss_reduction=reduction).train()
    out = model(**batch())
    assert float(out.loss.detach()) == pytest.approx(loss, abs=1e-6), "the loss itself is unchanged"
    out.loss.backward()
    close(gradients(model), want)
    assert router_aux_loss(model) == pytest.approx(aux, rel=1e-5)
    assert router_aux_loss(model) is None
    nothing = tiny.adapted(router_aux_loss_coef=0.0).train()
    nothing(**batch()).loss.backward()
    without = gradients(nothing)
    name = next(n for n in want if "lora_moe_router" in n)
    assert (without[name] - want[name]).abs().max() > 1e-3, "the loss must matter here"


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(reentrant):
    want, _, aux = reference()
    model = tiny.adapted(router_aux_loss_coef=0.5).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch()).loss.backward()
    close(gradients(model), want)
    assert router_aux_loss(model) == pytest.approx(aux, rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_passes_before_one_backward(reentrant):
    """A checkpointed block is recomputed with the mask and weight of its own pass."""
    first = batch(2)
    second = {**batch(2, seed=5), "attention_mask": MASK[1:], "labels": tiny.tokens(2, 9, 5)}
    want = {}
    for inputs, weight in ((first, 1.0), (second, 3.0)):
        got, *_ = reference(inputs=inputs, scale=weight)
        want = {n: want.get(n, 0) + g for n, g in got.items()}
    model = tiny.adapted(router_aux_loss_coef=0.5).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    (model(**first).loss + 3 * model(**second).loss).backward()
    close(gradients(model), want)


def half_precision(scaler=None, coefficient=8.0):
    """Gradients of one pass under float16 autocast, unscaled again where there is a scaler."""
    model = tiny.adapted(router_aux_loss_coef=coefficient).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(**batch()).loss
    if scaler is None:
        loss.backward()
    else:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    return gradients(model)


@pytest.mark.parametrize("scale", [4.0, 64.0])
def test_under_a_grad_scaler(scale):
    """float16: the main gradient and the balance loss's are those of a plain sum of losses."""
    main = half_precision(torch.amp.GradScaler("cpu", init_scale=scale), coefficient=0.0)
    both = half_precision(torch.amp.GradScaler("cpu", init_scale=scale))
    summed, *_ = reference(coefficient=8.0, half=True, scale=scale)
    close(both, {name: grad / scale for name, grad in summed.items()}, 2e-2)
    # The run without a scaler, which loses the smallest gradients.
    close(main, half_precision(coefficient=0.0), 2e-2)
    close(both, half_precision(), 2e-2)
    shares = [(both[n] - main[n]).norm() / main[n].norm() for n in both if "router" in n]
    assert sum(share > 0.05 for share in shares) > 7, "the balance loss must matter"


def test_a_step_that_overflows_is_skipped():
    """The scaler halves its scale, and the next step is as if there had been no other."""
    model = tiny.adapted(router_aux_loss_coef=8.0).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-20)
    for step in range(2):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch()).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 0:
            assert any(not p.grad.isfinite().all() for p in trained.values())
            assert all(torch.equal(p.detach(), before[n]) for n, p in trained.items())
            assert scaler.get_scale() == 16
            assert torch.tensor(router_aux_loss(model)).isfinite()
        optimizer.zero_grad()
    want = half_precision()
    for name, parameter in trained.items():
        moved = (before[name] - parameter.detach()) / 1e-2
        assert moved.abs().max() > 0, name
        assert (moved - want[name]).abs().max() <= 2e-2 * max(1, want[name].abs().max()), name


def test_accumulation_as_the_trainer_does_it():
    """num_items_in_batch: each pass's loss has the weight of its tokens, summed over passes."""
    one, two = batch(1), batch(3)
    items = sum((x["labels"][:, 1:] != -100).sum() for x in (one, two))
    model = tiny.adapted(router_aux_loss_coef=0.5).train()
    for inputs in (one, two):
        model(**inputs, num_items_in_batch=items).loss.backward()
    want = {}
    for inputs in (one, two):
        share = float((inputs["labels"][:, 1:] != -100).sum() / items)
        got, *_ = reference(inputs=inputs, scale=share)  # loss is a mean here: share of both
        want = {n: want.get(n, 0) + g for n, g in got.items()}
    close(gradients(model), want)


def test_padding_does_not_count():
    inputs = batch()
    inputs["labels"][0, 2] = -100  # which a padding token would predict
    changed = {**inputs, "input_ids": inputs["input_ids"].masked_fill(MASK == 0, 7)}
    found = []
    for given in (inputs, changed):
        model = tiny.adapted(router_aux_loss_coef=0.5).train()
        model(**given).loss.backward()
        found.append((router_aux_loss(model), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    close(found[0][1], found[1][1])


def test_a_loss_from_outside_is_said():
    from htsr_alloc.lora_moe import passes

    model = tiny.adapted(router_aux_loss_coef=0.5).train()
    passes._Mark.warned = False
    with pytest.warns(UserWarning, match="computed outside the model"):
        model(input_ids=tiny.tokens()).logits.square().mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=tiny.tokens()).logits.square().mean().backward()


def test_evaluation_has_no_balance_loss():
    model = tiny.adapted(router_aux_loss_coef=0.5).eval()
    model(**batch()).loss.backward()
    want = gradients(model)
    plain = tiny.adapted(router_aux_loss_coef=0.0).train()
    plain(**batch()).loss.backward()
    close(want, gradients(plain))
    assert router_aux_loss(model) is None
