"""Plain LoRA inside the base's own experts, by PEFT: counts, layouts, and what is refused."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from helpers import moe_tiny as tiny
from helpers.mixtures import EXPERTS, HIDDEN, INNER, MIXTURES
from safetensors.numpy import load_file

pytest.importorskip("peft", reason="needs the extra [train]")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from htsr_alloc import allocate, analyze, dumps
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import build
from htsr_alloc.lora_moe.plain import control
from htsr_alloc.training.methods import adapter_for

PEFT_CAN = [name for name in MIXTURES if name != "llama4"]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """family -> its checkpoint's metrics, as the hub has its names."""
    found = {}

    def of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name) / "model"
            MIXTURES[name].model().save_pretrained(folder)
            found[name] = analyze(folder, estimator="median"), folder
        return found[name]

    return of


def adapted(model, allocation, targets=("experts",), r=4):
    config = json.loads(
        control(model, allocation, r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=targets)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of patterns that are parameters
        return get_peft_model(model, LoraConfig(**config))


def wrapper_of(model, family, layer, last):
    """PEFT's layer of one stack."""
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and getattr(module, "parameter_name", None) == last
        and f"layers.{layer}.{family.inside}" in name
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", PEFT_CAN)
def test_a_known_change_of_one_expert_is_the_same_change_of_its_weight(metrics, name, tmp_path):
    """Set A and B of one expert; add scale B A to that expert's weight by hand; save and reload."""
    found, folder = metrics(name)
    family = MIXTURES[name]
    apart = {"spread": 2.0} if family.first == 0 else {}  # two layers of unlike ranks
    allocation = allocate(found, adapter_kind="lora", rank=4, targets=("experts",), **apart)
    assert len(set(allocation.experts)) == 2
    model = adapted(family.model(), allocation).eval()
    plain, tokens = family.model(), tiny.tokens()
    with torch.no_grad():
        start = plain(input_ids=tokens).logits
        assert torch.equal(model(input_ids=tokens).logits, start)
    generator = torch.Generator().manual_seed(1)
    expert, layer = 2, 1
    r = allocation.experts[layer]
    for last, d_in, d_out in (("gate_up_proj", HIDDEN, 2 * INNER), ("down_proj", INNER, HIDDEN)):
        a, b = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
        own = wrapper_of(model, family, layer, last)
        with torch.no_grad():
            own.lora_A["default"].weight.view(EXPERTS, r, d_in)[expert] = a
            own.lora_B["default"].weight.view(d_out, r, EXPERTS)[:, :, expert] = b
            change = 2 * b @ a  # alpha / r is 2 everywhere; (d_out, d_in), as LoRA has it
            weight = plain.get_parameter(f"model.layers.{layer}.{family.inside}.{last}")
            weight[expert] += change.T if family.inputs_first else change
    with torch.no_grad():
        want = plain(input_ids=tokens).logits
        got = model(input_ids=tokens).logits
    assert (want - start).abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    base = type(plain).from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, want, rtol=1e-5, atol=1e-5)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PEFT_CAN)
@pytest.mark.parametrize("targets", [("experts",), ("experts", "q_b_proj"), ()])
def test_what_allocate_counts_is_what_becomes_trainable(metrics, name, targets):
    if "q_b_proj" in targets and name != "deepseek_v3":
        targets = tuple(t.replace("q_b_proj", "q_proj") for t in targets)
    found, _ = metrics(name)
    made = allocate(found, adapter_kind="lora", rank=5, targets=targets, beta=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted(MIXTURES[name].model(), made, targets or made.strategy.targets)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == made.parameters.spent > 0
    for module in model.modules():
        stacked = getattr(module, "parameter_name", "weight") != "weight"
        assert not isinstance(module, LoraLayer) or stacked == (stacked and "experts" in targets)


def test_a_layer_without_experts_gets_no_rank(metrics):
    made = allocate(metrics("glm4_moe")[0], adapter_kind="lora", rank=4, targets=("experts",))
    assert made.experts == (0, 4)
    model = adapted(MIXTURES["glm4_moe"].model(), made)
    assert not any("layers.0." in n for n, p in model.named_parameters() if p.requires_grad)


def test_each_expert_learns(metrics):
    made = allocate(metrics("gpt_oss")[0], adapter_kind="lora", rank=2, targets=("experts",))
    model = adapted(MIXTURES["gpt_oss"].model(), made, r=2)
    tiny.move(model)
    model.train()(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    own = wrapper_of(model, MIXTURES["gpt_oss"], 0, "gate_up_proj")
    gradient = own.lora_A["default"].weight.grad.view(EXPERTS, -1, HIDDEN)
    assert (gradient.abs().amax((1, 2)) > 0).all()


def test_what_peft_would_turn_round_is_refused(metrics):
    """Llama-4's experts are (experts, d_in, d_out), and PEFT takes d_out for their input."""
    family = MIXTURES["llama4"]
    names = ["feed_forward.experts.gate_up_proj"]
    model = get_peft_model(
        family.model(), LoraConfig(r=2, target_modules=[], target_parameters=names)
    )
    own = wrapper_of(model, family, 0, "gate_up_proj")
    assert own.lora_A["default"].weight.shape == (2 * EXPERTS, 2 * INNER)  # where HIDDEN is right
    made = allocate(metrics("llama4")[0], adapter_kind="lora", rank=4, targets=("experts",))
    with pytest.raises(HtsrError, match=r"takes the inputs of .*gate_up_proj for its outputs"):
        adapted(family.model(), made)
    rest = allocate(metrics("llama4")[0], adapter_kind="lora", rank=4)
    model = adapted(family.model(), rest, rest.strategy.targets)
    assert model.get_nb_trainable_parameters()[0] == rest.parameters.spent


def test_what_experts_cannot_have_is_refused(metrics):
    found, _ = metrics("mixtral")
    for more in ({"T": 4}, {"params": 10**5, "r": 2}):
        with pytest.raises(HtsrError, match="can have ranks of plain LoRA alone"):
            allocate(found, targets=("experts",), score_over="adapted", **more)
    with pytest.raises(HtsrError, match="can have ranks of plain LoRA alone"):
        allocate(found, adapter_kind="lora", rank=4, targets=("experts",), per_module=True)
    made = allocate(found, adapter_kind="lora", rank=4, targets=("experts",))
    base = MIXTURES["mixtral"].model()
    with pytest.raises(HtsrError, match="PEFT has no dropout on a parameter"):
        control(base, made, lora_dropout=0.1, target_modules=["experts"])
    given = allocate(None, strategy="explicit", experts=(2, 2))
    with pytest.raises(HtsrError, match="AlphaLoRA cannot be put inside the base's own experts"):
        build(base, given, target_modules=["experts"])
    for system in ("dora", "pissa", "adalora", "eva"):
        with pytest.raises(HtsrError, match="cannot adapt a parameter"):
            adapter_for(system, made, lora_dropout=0.0).put_on(base, made)
    dense = allocate(None, strategy="explicit", experts=(2, 2))
    with pytest.raises(HtsrError, match="no linear experts"):
        control(tiny.llama(), dense, lora_dropout=0.0, target_modules=["experts"])


@pytest.mark.parametrize("system", ["lora", "rslora"])
def test_htsr_trains_them(metrics, system):
    made = allocate(metrics("qwen3_moe")[0], adapter_kind="lora", rank=4, targets=("experts",))
    adapter = adapter_for(system, made, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = adapter.put_on(MIXTURES["qwen3_moe"].model(), made)
    assert model.get_nb_trainable_parameters()[0] == made.parameters.spent


def test_peft_does_not_take_shared_experts_for_the_experts(metrics):
    """By its rule for adapters of transformers 4, that a name ends in down_proj."""
    found, _ = metrics("deepseek_v3")
    for more in ({}, {"per_module": True}):
        made = allocate(found, adapter_kind="lora", rank=4, **more)
        model = adapted(MIXTURES["deepseek_v3"].model(), made, made.strategy.targets)
        names = {n for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        assert {n.rpartition("layers.")[2] for n in names if "mlp" in n} == {
            f"{layer}.{name}_proj"
            for layer in ("0.mlp", "1.mlp.shared_experts")
            for name in ("gate", "up", "down")
        }
        assert model.get_nb_trainable_parameters()[0] == made.parameters.spent


def test_the_export_names_what_transformers_names(metrics, invoke, tmp_path):
    found, folder = metrics("mixtral")  # whose file says block_sparse_moe.experts.0.w1
    (tmp_path / "m.json").write_text(dumps(found))
    done = invoke(
        "allocate", "m.json", "--for", "lora", "--rank", 4, "--target", "experts", "-o", "a.json"
    )
    assert done.rc == 0, done.stderr
    done = invoke("export", "a.json", "--to", "peft-rank")
    assert done.rc == 1
    assert "names of a model's own experts are transformers'" in done.stderr
    done = invoke("export", "a.json", "--to", "peft-rank", "--model", folder)
    assert done.rc == 1
    assert "Give --lora-dropout 0" in done.stderr
    done = invoke("export", "a.json", "--to", "peft-rank", "--model", folder, "--lora-dropout", 0)
    assert done.rc == 0, done.stderr
    config = json.loads(done.stdout)
    assert config["target_modules"] == []
    assert config["target_parameters"] == [
        f"model.layers.{layer}.mlp.experts.{last}"
        for layer in range(2)
        for last in ("gate_up_proj", "down_proj")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        model = get_peft_model(MIXTURES["mixtral"].model(), LoraConfig(**config))
    spent = json.loads((tmp_path / "a.json").read_text())["parameters"]["spent"]
    assert model.get_nb_trainable_parameters()[0] == spent
    done = invoke("export", "a.json", "--to", "axolotl", "--model", folder, "--lora-dropout", 0)
    made = yaml.safe_load(done.stdout)
    assert made["lora_target_parameters"] == config["target_parameters"]
    assert made["lora_rank_pattern"] == config["rank_pattern"]


def test_without_the_model_a_shared_experts_linear_is_not_exported(metrics):
    from htsr_alloc.allocation.exports import Lora, to_axolotl, to_peft_rank

    made = allocate(metrics("deepseek_v3")[0], adapter_kind="lora", rank=4)
    for export in (to_peft_rank, to_axolotl):
        with pytest.raises(HtsrError, match="In a mixture PEFT takes every"):
            export(made, Lora.of(made))
    plain = replace(Lora.of(made), target_modules=("o_proj",))
    assert json.loads(to_peft_rank(made, plain))["rank_pattern"]


def test_from_metrics_to_a_trained_adapter(metrics, invoke, tmp_path):
    from helpers import training_tiny

    found, _ = metrics("mixtral")
    MIXTURES["mixtral"].model().save_pretrained(tmp_path / "model")
    training_tiny.tokenizer().save_pretrained(tmp_path / "model")
    training_tiny.write(tmp_path / "rows.jsonl", training_tiny.learnable_rows(16))
    made = allocate(found, adapter_kind="lora", rank=2, targets=("experts", "q_proj"))
    (tmp_path / "a.json").write_text(dumps(made))
    shared = ("--model", "model", "--data", "rows.jsonl", "--device", "cpu", "--dtype", "float32")
    done = invoke(
        "train", "a.json", "--system", "lora", "--lora-dropout", 0, *shared, "--steps", 2,
        "-o", "adapter",
    )  # fmt: skip
    assert done.rc == 0, done.stderr
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.size for t in tensors.values()) == made.parameters.spent
    assert any((t != 0).any() for n, t in tensors.items() if "experts" in n and "lora_B" in n)
    done = invoke("evaluate", *shared, "--adapter", "adapter")
    assert done.rc == 0, done.stderr


def test_of_a_hub_the_names_need_no_weights(tmp_path):
    """Nor does build --dry-run: the configuration and the headers say it all."""
    from helpers.hubs import client, serving

    MIXTURES["mixtral"].model().save_pretrained(tmp_path / "hub" / "tiny")
    found = analyze(tmp_path / "hub" / "tiny", estimator="median")
    here = tmp_path / "here"
    here.mkdir()
    ranks = allocate(found, adapter_kind="lora", rank=2, targets=("experts",))
    (here / "ranks.json").write_text(dumps(ranks))
    (here / "counts.json").write_text(dumps(allocate(found, T=4)))
    with serving(tmp_path / "hub") as hub:
        hub.reset()
        model = ("--model", "org/tiny")
        done = client(
            hub.url, here, "export", "ranks.json", "--to", "peft-rank", *model, "--lora-dropout", 0
        )
        assert done.rc == 0, done.stderr
        assert len(json.loads(done.stdout)["target_parameters"]) == 4
        done = client(hub.url, here, "build", "counts.json", *model, "--dry-run")
        assert done.rc == 0, done.stderr
        assert hub.downloads() == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--T", 8, "--per-module"), True),
        (("--params", "10k", "--r", 2), True),
        (("--T", 8), False),
        (("--for", "lora", "--rank", 4, "--target", "experts"), False),
    ],
)
def test_allocate_says_that_it_passes_over_the_bases_experts(
    invoke, metrics, tmp_path, asked, said
):
    found, _ = metrics("mixtral")
    (tmp_path / "m.metrics.json").write_text(dumps(found))
    done = invoke("allocate", *asked)
    assert done.rc == 0, done.stderr
    count = 2 * EXPERTS * 3  # gate, up and down of each
    sentence = f"{count} matrices of the base's own experts are passed over: they get none."
    assert (sentence in done.stderr) == said
