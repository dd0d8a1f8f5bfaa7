"""Several adapters' slots on one linear give each token its own adapter's records."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import torch
from helpers import moe_tiny as tiny

from htsr_alloc.lora_moe.model import layers_of
from htsr_alloc.serving.vllm.slots import Held, SlotGates, add_by_slot

D_IN, D_OUT, RANKS, MOST = 32, 48, 20, 6
SYSTEMS = {
    "alphalora": {"num_experts": 5},
    "goat": {},
    "goat_plus": {"num_experts": 3},
    "mor": {},
    "hydra": {"num_experts": 6},
    "adamole": {"num_experts": 3},
}


@pytest.fixture(scope="module")
def records():
    """Of each system, and at last of plain LoRA, one linear's record."""
    found = []
    for system, settings in SYSTEMS.items():
        model = tiny.adapted(system, **settings)
        layer = next(m for m in layers_of(model) if m.name.endswith("layers.0.mlp.up_proj"))
        found.append(layer.gated("default"))
    single = tiny.adapted("alphalora", num_experts=1)
    layer = next(m for m in layers_of(single) if m.name.endswith("layers.0.mlp.up_proj"))
    return [*found, layer.gated("default")]


def inputs(records, tokens=64):
    """Tokens of every slot, mixed, and of none (−1)."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(-1, len(records), (tokens,), generator=generator)
    assert set(slots.tolist()) == set(range(-1, len(records)))
    return torch.randn(tokens, D_IN, generator=generator), slots


def gates(records):
    made = SlotGates.empty(len(records), MOST, D_IN, RANKS, torch.device("cpu"))
    for slot, record in enumerate(records):
        made.put(slot, record)
    return made


def check_weights(got, records, x, slots):
    for token, slot in zip(range(len(x)), slots.tolist(), strict=True):
        if slot >= 0:
            want = records[slot].by_rank(x[token])
            want = want if isinstance(want, torch.Tensor) else torch.ones(len(records[slot].ranks))
            torch.testing.assert_close(got[token, : len(want)], want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_gate_without_branches_gives_each_tokens_weights(records):
    x, slots = inputs(records)
    check_weights(gates(records).weights(x, slots), records, x, slots)


@torch.no_grad()
def test_a_slot_that_is_filled_again_forgets_what_it_held(records):
    made = gates(records)
    for slot, record in enumerate(reversed(records)):
        made.put(slot, record)
    x, slots = inputs(records)
    check_weights(made.weights(x, slots), records[::-1], x, slots)
    made.put(0, None)
    assert (made.weights(x, torch.zeros_like(slots)) == 1).all()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_the_gate_is_one_graph_for_every_batch(records, backend):
    made = gates(records)
    compiled = torch.compile(made.weights, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (64, 40):
        x, slots = inputs(records, tokens)
        check_weights(compiled(x, slots), records, x, slots)
    made.put(0, records[1])  # other values in the same buffers
    x, slots = inputs(records)
    check_weights(compiled(x, slots), [records[1], *records[1:]], x, slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("only", [None, -1, 0, 5])
@torch.no_grad()
def test_each_token_gets_its_own_adapter_alone_with_all_slots_full(records, only, dtype):
    """In float64 the routers, which are float32, are a product of their own."""
    a = torch.zeros(len(records), 1, RANKS, D_IN, dtype=dtype)
    b = torch.zeros(len(records), 1, D_OUT, RANKS, dtype=dtype)
    held = []
    for slot, record in enumerate(records):
        own_a, own_b = record.flat()
        a[slot, 0, : len(own_a)], b[slot, 0, :, : len(own_a)] = own_a, own_b
        ranks = [0, len(own_a), len(own_a)]  # of three slices the first is not adapted
        held.append(Held.of([a[slot, 0]] * 3, ranks, [None, record, record]))
    x, slots = inputs(records)
    slots = slots if only is None else torch.full_like(slots, only)
    before = torch.randn(len(x), 3 * D_OUT, generator=torch.Generator().manual_seed(1))
    y = before.clone()
    add_by_slot(y, x, slots, held, [b, b, b])
    added = y - before
    assert not added[:, :D_OUT].any()
    for token, slot in enumerate(slots.tolist()):
        want = torch.zeros(D_OUT) if slot < 0 else records[slot].delta(x[token])
        for part in added[token, D_OUT:].split(D_OUT):
            torch.testing.assert_close(part, want, rtol=1e-5, atol=2e-5)
    assert only == -1 or added.abs().max() > 1e-2
