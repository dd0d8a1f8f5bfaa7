"""Ranks of plain LoRA as what is allocated: the budget is a uniform rank's, to the parameter."""

import json
from dataclasses import replace

import pytest
import yaml
from helpers import moe_tiny as tiny
from hypothesis import given, settings
from hypothesis import strategies as some

from htsr_alloc.allocation import Rank, Request, Uniform, allocate
from htsr_alloc.allocation.exports import Lora, to_axolotl, to_csv, to_mola, to_peft_rank
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import RANKS, Allocation, dumps, loads

SHAPES = {"q_proj": (32, 32), "k_proj": (16, 32), "up_proj": (48, 32), "down_proj": (32, 48)}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """Of a tiny LLaMA of six layers."""
    from htsr_alloc import analyze

    folder = tmp_path_factory.mktemp("ranks") / "model"
    tiny.llama(layers=6).save_pretrained(folder)
    return analyze(folder, estimator="median")


def parameters(metrics, r, targets=None):
    """Of plain LoRA: r (d_in + d_out) of each linear."""
    chosen = [m for m in metrics.matrices if targets is None or m.role in targets]
    return sum(r * sum(m.shape) for m in chosen)


@pytest.mark.parametrize("more", [{}, {"per_module": True}, {"per_module": True, "pool": "all"}])
@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj")])
def test_the_budget_is_the_uniform_rank_s(metrics, more, targets):
    made = allocate(metrics, adapter_kind="lora", rank=16, targets=targets or (), **more)
    assert made.unit == RANKS
    assert made.parameters.asked == made.parameters.spent == parameters(metrics, 16, targets)
    assert made.parameters.r == 16
    assert made.top_k == made.experts  # every rank works on every token
    ranks = [(m.name, m.experts) for m in made.modules]
    if not more:
        assert sum(made.experts) == 16 * 6
        assert len(set(made.experts)) > 1
    elif "pool" not in more:
        for role in {m.role for m in made.modules}:
            own = [m.experts for m in made.modules if m.role == role]
            assert sum(own) / len(own) == pytest.approx(16, abs=0.5)
    assert len(ranks) == (0 if not more else 6 * len(targets or range(7)))


@settings(max_examples=40, deadline=None)
@given(rank=some.integers(1, 64), beta=some.floats(-3, 3))
def test_by_layers_the_mean_rank_is_exact(metrics, rank, beta):
    made = allocate(metrics, adapter_kind="lora", rank=rank, beta=beta)
    assert sum(made.experts) == rank * 6
    assert min(made.experts) >= 1


def test_uniform_is_the_rank_everywhere(metrics):
    made = allocate(metrics, Request(Uniform(), Rank(16)))
    assert set(made.experts) == {16}


def test_peft_builds_it_and_counts_the_uniform_rank_s_parameters(metrics):
    peft = pytest.importorskip("peft")
    for more in ({}, {"per_module": True}):
        made = allocate(metrics, adapter_kind="lora", rank=16, **more)
        config = json.loads(to_peft_rank(made, Lora.of(made)))
        assert (config["r"], config["lora_alpha"]) == (16, 32)
        model = peft.get_peft_model(tiny.llama(layers=6), peft.LoraConfig(**config))
        roles = sorted({m.role for m in metrics.matrices})
        plain = peft.LoraConfig(r=16, target_modules=roles)
        uniform = peft.get_peft_model(tiny.llama(layers=6), plain)
        assert model.get_nb_trainable_parameters() == uniform.get_nb_trainable_parameters()
        listed = {m.name: m.experts for m in made.modules}
        seen = 0
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, peft.tuners.lora.Linear):
                number = int(name.split(".")[2])
                assert layer.r["default"] == (listed[name] if listed else made.experts[number])
                assert layer.scaling["default"] == pytest.approx(2)  # everywhere
                seen += 1
        assert seen == 6 * 7


def test_lora_alpha_is_that_of_the_uniform_rank(metrics):
    made = allocate(metrics, adapter_kind="lora", rank=16)
    config = json.loads(to_peft_rank(made, Lora.of(made, lora_alpha=16)))
    assert config["alpha_pattern"] == config["rank_pattern"]  # scale 1
    with pytest.raises(HtsrError, match="holds the linears' ranks"):
        Lora.of(made, r=8)


def test_other_exports(metrics):
    made = allocate(metrics, adapter_kind="lora", rank=32, targets=("q_proj",))
    lora = Lora.of(made)
    config = yaml.safe_load(to_axolotl(made, lora))
    plain = json.loads(to_peft_rank(made, lora))
    assert config["lora_rank_pattern"] == plain["rank_pattern"]
    assert config["lora_target_modules"] == plain["target_modules"]
    assert to_csv(made).startswith("layer,prefix,score,quota,rank,top_k\n")
    with pytest.raises(HtsrError, match="holds ranks of plain LoRA"):
        to_mola(made, lora)


def test_a_mixture_is_refused_and_plain_lora_is_trained(metrics):
    pytest.importorskip("peft")
    from htsr_alloc.lora_moe import build
    from htsr_alloc.training.methods import Adapter
    from htsr_alloc.training.models import trainable

    made = allocate(metrics, adapter_kind="lora", rank=4)
    with pytest.raises(HtsrError, match="A mixture needs experts"):
        build(tiny.llama(layers=6), made)
    lora = Lora.of(made)
    own = Adapter("lora", lora.r, lora.lora_alpha, 0.0, lora.target_modules)
    assert trainable(own.put_on(tiny.llama(layers=6), made)) == parameters(metrics, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"adapter_kind": "lora"}, "budget of adapter_kind lora is rank"),
        ({"adapter_kind": "lora", "T": 9}, "budget of adapter_kind lora is rank"),
        ({"rank": 4, "T": 9, "adapter_kind": "lora"}, "are both budgets"),
        ({"rank": 4}, "budget of adapter_kind lora-moe is T"),
        ({"rank": 0, "adapter_kind": "lora"}, "rank must be at least 1"),
        ({"rank": 4, "adapter_kind": "lora", "top_k": 1}, "top_k means nothing"),
        ({"rank": 4, "adapter_kind": "dora"}, "dora"),
        ({"rank": 4, "adapter_kind": "lora", "r": 2}, "r matters to"),
    ],
)
def test_wrong_requests(metrics, given, said):
    with pytest.raises(HtsrError, match=said):
        allocate(metrics, **given)
    with pytest.raises(HtsrError, match="from metrics only"):
        allocate(None, Request(Uniform(), Rank(4), layers=2))


def test_the_file(metrics):
    made = allocate(metrics, adapter_kind="lora", rank=4)
    assert loads(Allocation, dumps(made), "here") == made
    with pytest.raises(ValueError, match="ranks need them"):
        dumps(replace(made, parameters=None))
