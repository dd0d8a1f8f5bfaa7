"""PEFT's tuners and full fine-tuning as baselines: built, trained, saved, loaded again, refused."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers import moe_tiny as tiny
from helpers import training_tiny

from htsr_alloc.allocation import allocate
from htsr_alloc.errors import HtsrError
from htsr_alloc.training import models
from htsr_alloc.training import run as running
from htsr_alloc.training.baselines import BASELINES
from htsr_alloc.training.methods import METHODS, Adapter, adapter_for, read_settings, recipe_for
from htsr_alloc.training.settings import Recipe

KINDS = {  # what PEFT's own configuration must say of it
    "lora": {"use_dora": False, "use_rslora": False, "init_lora_weights": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "rslora": {"use_rslora": True},
    "eva": {"init_lora_weights": "eva"},
    "adalora": {"peft_type": "ADALORA"},
}


def counts(*experts):
    return allocate(None, strategy="explicit", experts=experts)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with model/ and train.jsonl."""
    folder = tmp_path_factory.mktemp("baselines")
    training_tiny.folder(folder / "model")
    training_tiny.write(folder / "train.jsonl", training_tiny.learnable_rows(64))
    return folder


def trained(work, system, output, **more):
    from htsr_alloc.records import dumps

    (work / "a.json").write_text(dumps(counts(2, 2)))
    recipe = Recipe(steps=12, learning_rate=2e-2, save_every=0, log_every=1)
    whole = system == "full"
    asked = running.Run(
        work / "model",
        work / "train.jsonl",
        output,
        None if whole else work / "a.json",
        adapter=adapter_for(system, **({} if whole else {"r": 4, "lora_dropout": 0.0})),
        recipe=recipe,
        dtype="float32",
        device="cpu",
        **more,
    )
    return running.train(asked, note=print)


def answers(model):
    with torch.no_grad():
        return model.eval()(tiny.tokens()).logits


@pytest.mark.parametrize("system", BASELINES)
def test_a_baseline_trains_and_is_the_same_when_loaded(system, work, tmp_path, monkeypatch):
    kept = []
    plot = running.figure.plot_run
    monkeypatch.setattr(
        running.figure, "plot_run", lambda model, *rest: (kept.append(model), plot(model, *rest))
    )
    done = trained(work, system, tmp_path / "out")
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert losses[-1] < losses[0]
    after = answers(kept[0])
    base = answers(tiny.llama(eos_token_id=1))
    assert not torch.allclose(after, base, atol=1e-2)
    if system == "full":
        loaded = models.open_causal_lm(tmp_path / "out", torch.float32)
        assert done.trainable == sum(p.numel() for p in loaded.parameters())
        assert (tmp_path / "out" / "tokenizer.json").is_file()
    else:
        loaded = models.open_adapter(tiny.llama(eos_token_id=1), tmp_path / "out")
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert {key: config[key] for key in KINDS[system]} == KINDS[system]
    assert torch.allclose(answers(loaded), after, atol=1e-4)


def test_adalora_prunes_to_its_target(work, tmp_path):
    trained(work, "adalora", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["init_r"], config["target_r"], config["total_step"]) == (8, 5, 12)
    left = [sum(kept) for kept in config["rank_pattern"].values()]
    assert len(left) == 14
    assert sum(left) == 5 * 14  # of 8 * 14
    with pytest.raises(HtsrError, match="AdaLoRA cannot be resumed"):
        Adapter("adalora").refuse_resume()
    with pytest.raises(HtsrError, match="AdaLoRA finds its own ranks"):
        Adapter("adalora").put_on(tiny.llama(), counts(2, 3), steps=9)


def test_scales_are_those_of_the_papers():
    """LoRA: alpha / r at every rank; rsLoRA: alpha / √rank with one alpha."""
    from peft.tuners.lora import LoraLayer

    for system, scale in (("lora", lambda rank: 2), ("rslora", lambda rank: 8 / rank**0.5)):
        made = Adapter(system, r=4, lora_alpha=8).put_on(tiny.llama(), counts(2, 3))
        layers = [m for m in made.modules() if isinstance(m, LoraLayer)]
        assert {m.r["default"] for m in layers} == {8, 12}
        for layer in layers:
            assert layer.scaling["default"] == pytest.approx(scale(layer.r["default"]))


def test_eva_starts_at_the_inputs_singular_vectors():
    """Of one linear, against numpy on all tokens of one batch, without padding."""
    from htsr_alloc.training.rows import parse
    from htsr_alloc.training.tokens import Collator, encode

    rows = [parse(row) for row in training_tiny.learnable_rows(40)]
    tokenizer = training_tiny.tokenizer()
    examples = [encode(row, tokenizer, 64) for row in rows]
    adapter = Adapter("eva", r=2, lora_alpha=4, lora_dropout=0.0)
    model = adapter.put_on(tiny.llama(), counts(1, 1))
    adapter.start(model, examples, Collator(0), 40)
    base, batch = tiny.llama(), Collator(0)(examples)
    seen = {}
    base.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: seen.update(x=inputs[0])
    )
    with torch.no_grad():
        base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    x = seen["x"][batch["attention_mask"].bool()].double()
    right = torch.linalg.svd(x - x.mean(0))[2][:2]
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    made = layer.lora_A["default"].weight.detach().double()
    assert torch.allclose((made @ right.T).abs(), torch.eye(2).double(), atol=1e-2)
    with pytest.raises(HtsrError, match="starts from at least"):
        adapter.start(model, examples[:3], Collator(0), 4)


@pytest.mark.parametrize(
    ("system", "given", "said"),
    [
        ("alphalora", {"goat_segment": "P"}, "AlphaLoRA does not use goat_segment"),
        ("mor", {"top_k": "1"}, "MoR does not use top_k"),
        ("dora", {"top_k": "1"}, "DoRA does not use top_k"),
        ("goat", {"goat_segmnt": "P"}, "There is no setting 'goat_segmnt'"),
        ("goat", {"goat_segment": "X"}, "goat_segment cannot be 'X'"),
        ("goat", {"goat_rho": "ten"}, "goat_rho: expected float, got str"),
        ("goat", {"top_k": "1.5"}, "top_k: expected int"),
        ("em_lora", {"em_dora": "maybe"}, "em_dora: expected bool"),
        ("nothing", {}, "There is no system 'nothing'"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(system, given, said):
    with pytest.raises(HtsrError) as caught:
        read_settings(system, given)
    assert said in caught.value.message


def test_settings_are_read_by_their_types():
    given = {"goat_segment": "P", "top_k": "1", "goat_rho": "5", "router_aux_loss_coef": "1e-2"}
    read = dict(read_settings("goat", given))
    assert read == {"goat_segment": "P", "top_k": 1, "goat_rho": 5.0, "router_aux_loss_coef": 0.01}
    assert dict(read_settings("em_lora", {"em_dora": "true"})) == {"em_dora": True}
    assert dict(read_settings("hydra", {"init_lora_weights": "gaussian"})) == {
        "init_lora_weights": "gaussian"
    }


def test_a_system_s_defaults_are_its_paper_s_and_an_explicit_value_wins():
    mor = adapter_for("mor", r=None, lora_alpha=None, lora_dropout=None)
    assert (mor.r, mor.lora_alpha, mor.lora_dropout) == (8, 32, 0.05)
    assert recipe_for("mor", Recipe()).learning_rate == 2e-4
    assert adapter_for("mor", lora_alpha=7.0).lora_alpha == 7
    assert recipe_for("mor", Recipe(learning_rate=0.5)).learning_rate == 0.5
    assert adapter_for("alphalora") == Adapter()
    assert recipe_for("lora", Recipe()).learning_rate == 3e-4
    with pytest.raises(HtsrError, match="full fine-tuning does not use r"):
        adapter_for("full", r=8)


CHANGED = {  # a value of each setting that is not its default
    "top_k": 1,
    "router_aux_loss_coef": 0.5,
    "router_aux_loss_reduction": "mean",
    "init_lora_weights": "gaussian",
    "goat_segment": "M",
    "goat_rho": 3.0,
    "goat_eta": 2.0,
    "goat_scale": "alpha",
    "goat_mixture": False,
    "mor_router": "mean",
    "em_pooler": "mean",
    "em_weighting": "straight_through",
    "em_activation": "relu",
    "em_dora": True,
}


def outcome(system, **settings):
    """All that a setting can change: the parameters, the answers and the balance loss's weight."""
    made = tiny.adapted(system, trained=False, **settings)
    start = {n: p.detach().clone() for n, p in made.named_parameters() if "lora_moe" in n}
    weights = [dict(m.aux_weight) for m in made.modules() if hasattr(m, "aux_weight")]
    tiny.move(made)
    batch = tiny.tokens()
    labels = batch.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        logits = made.eval()(batch, labels=labels).logits
    return start, logits, weights


@pytest.mark.parametrize("system", [name for name in METHODS if name not in BASELINES])
def test_a_system_uses_its_settings_and_no_other(system):
    from htsr_alloc.lora_moe.config import SETTINGS

    assert set(CHANGED) == set(SETTINGS)
    plain = outcome(system)
    changes = {**CHANGED, "top_k": 3 - METHODS[system].top_k}  # EM-LoRA's default is 1
    for name, value in changes.items():
        start, logits, weights = plain
        more = {}
        if name == "router_aux_loss_reduction" and name in METHODS[system].settings:
            more = {"router_aux_loss_coef": 0.5}  # MoR's default is 0
            start, logits, weights = outcome(system, **more)
        try:
            other = outcome(system, **{name: value}, **more)
        except HtsrError:
            assert name not in METHODS[system].settings
            continue
        changed = (
            start.keys() != other[0].keys()
            or any(not torch.equal(start[n], other[0][n]) for n in start)
            or not torch.equal(logits, other[1])
            or weights != other[2]
        )
        assert changed == (name in METHODS[system].settings), name
