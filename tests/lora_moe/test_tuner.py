"""The PEFT tuner: each system's layer against its formula, and everything PEFT offers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import moe_tiny as tiny
from helpers import naive_moe as naive
from helpers.commands import ROOT, environment

pytest.importorskip("peft", reason="needs the extra [train]")

from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import LoraMoeConfig
from htsr_alloc.lora_moe.model import layers_of

TOKEN_SYSTEMS = ["alphalora", "goat", "goat_plus", "mor", "hydra", "adamole"]


class Two(torch.nn.Module):
    """Two linears, the second of which is left alone."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.one = torch.nn.Linear(12, 10).to(dtype)
        self.two = torch.nn.Linear(10, 3).to(dtype)

    def forward(self, x):
        return self.two(self.one(x))


def one_layer(system, dtype=torch.float64, n=4, **settings):
    given = {"num_experts": n, "r": 2, "lora_alpha": 3, "lora_dropout": 0.0}
    if system not in ("mor", "hydra"):
        given["router_aux_loss_coef"] = 0.0
    model = get_peft_model(
        Two(dtype), LoraMoeConfig(system=system, target_modules=["one"], **{**given, **settings})
    )
    tiny.move(model, size=0.1)
    return model, next(layers_of(model))


def formula(system, layer, x, top_k=2, rho=10.0):
    """W₀x + Δ(x) stated naively from the layer's own parameters."""
    p = {k.split(".")[0]: v for k, v in layer.named_parameters() if "base_layer" not in k}
    a, b = p["lora_moe_A"], p["lora_moe_B"]
    n, base = 4, x @ layer.base_layer.weight.T + layer.base_layer.bias
    logits = x @ p["lora_moe_router"].T
    if system == "mor":
        delta = naive.mor(x, logits, a, b, p["lora_moe_lambda_A"], p["lora_moe_lambda_B"], 1.5)
        return base + delta
    if system == "hydra":
        return base + naive.hydra(x, logits, a, b.split(2, 1), 1.5)
    scales = [1.5] * n
    if system.startswith("goat"):
        scales = [(3 * 12 / 2) ** 0.5] * n
        starts = [0, 2, 5, 7] if n * 2 > 10 else [0, 2, 4, 6]
        weight = layer.base_layer.weight.detach()
        if system == "goat_plus":
            scales = naive.goat_scales(weight, starts, 2, scales[0])
        base = base - x @ naive.goat_residual(weight, starts, 2, rho, scales).T
    if system == "adamole":
        taus = x @ p["lora_moe_tau"].T + p["lora_moe_tau_bias"]
        chosen = [naive.adamole_gate(row, tau[0]) for row, tau in zip(logits, taus, strict=True)]
    else:
        chosen = [naive.top_k_gate(row, top_k) for row in logits]
    return base + naive.mixture(x, chosen, a.split(2), b.split(2, 1), scales)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("system", TOKEN_SYSTEMS)
def test_layer_is_its_formula(system, dtype):
    _, layer = one_layer(system, dtype)
    x = torch.randn(6, 12, dtype=dtype, requires_grad=True)
    ours, theirs = layer(x), formula(system, layer, x)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    weight = torch.randn_like(ours)
    mine = torch.autograd.grad((ours * weight).sum(), inputs)
    wanted = torch.autograd.grad((theirs * weight).sum(), inputs)
    for got, want in zip((ours, *mine), (theirs, *wanted), strict=True):
        error = (got - want).abs().max() / max(1.0, float(want.detach().abs().max()))
        assert error <= tolerance


@pytest.mark.parametrize("system", TOKEN_SYSTEMS)
def test_gradcheck_of_the_layer(system):
    _, layer = one_layer(system)
    names, values = zip(
        *[(n, p) for n, p in layer.named_parameters() if p.requires_grad], strict=True
    )

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(v.detach().clone().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("system", TOKEN_SYSTEMS)
def test_one_expert_is_plain_lora(system):
    _, layer = one_layer(system, n=1)
    x = torch.randn(6, 12, dtype=torch.float64)
    a, b = layer.lora_moe_A["default"], layer.lora_moe_B["default"]
    base = layer.base_layer(x)
    assert not layer.lora_moe_router
    if system.startswith("goat"):
        residual = naive.goat_residual(layer.base_layer.weight.detach(), [0], 2, 10)
        want = base - x @ residual.T + (3 * 12 / 2) ** 0.5 * x @ a.T @ b.T
    elif system == "mor":
        la, lb = layer.lora_moe_lambda_A["default"], layer.lora_moe_lambda_B["default"]
        want = base + 1.5 * lb[0] * ((x @ a.T) * la[0] @ b.T)
    else:
        want = base + 1.5 * x @ a.T @ b.T
    assert (layer(x) - want).abs().max() < 1e-12


@pytest.mark.parametrize("segment", ["O", "P", "M", "R"])
def test_goat_starts_at_the_base_and_leaves_its_weight_alone(segment):
    model = Two(torch.bfloat16)
    weight = model.one.weight.detach().clone()
    config = LoraMoeConfig(
        system="goat", target_modules=["one"], r=2, num_experts=4, goat_segment=segment
    )
    model = get_peft_model(model, config).eval()
    layer = next(layers_of(model))
    assert torch.equal(layer.base_layer.weight, weight)
    # Equal gates (a router of zeros, all experts) give W₀x exactly, whatever the base's dtype.
    torch.nn.init.zeros_(layer.lora_moe_router["default"])
    object.__setattr__(layer.mixture["default"], "top_k", 4)
    x = torch.randn(5, 12)
    base = layer.base_layer(x.bfloat16()).float()
    assert (layer.adapt(base, x, "default", base) - base).abs().max() < 1e-5
    assert torch.equal(model.unload().one.weight, weight)


def test_no_host_wait_and_idle_experts_have_gradients():
    _, layer = one_layer("alphalora", n=4, top_k=1)
    layer(torch.randn(1, 12, dtype=torch.float64)).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
    idle = [g.abs().max() == 0 for g in layer.lora_moe_A["default"].grad.split(2)]
    assert sum(idle) == 3


@pytest.mark.parametrize("system", TOKEN_SYSTEMS)
def test_compiles_without_graph_breaks(system):
    _, layer = one_layer(system, torch.float32, router_aux_loss_coef=None)
    assert layer.training
    assert (layer.aux_weight["default"] > 0) == (system not in ("mor", "hydra"))
    x = torch.randn(6, 12)
    want = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    assert torch.allclose(got, want, atol=1e-6)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    mine = torch.autograd.grad(got.square().sum(), parameters)
    wanted = torch.autograd.grad(want.square().sum(), parameters)
    for a, b in zip(mine, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    with torch.no_grad():
        layer.eval()
        assert torch.allclose(compiled(x), layer(x), atol=1e-6)


def test_an_expert_chosen_by_the_prompt_compiles_without_graph_breaks():
    model = tiny.adapted("em_lora", r=2).eval()
    layer = next(layers_of(model))
    model(tiny.tokens())  # which leaves its choice behind
    x = torch.randn(2, 9, 32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)


def test_dtypes():
    ids = tiny.tokens()
    model = tiny.adapted(model=tiny.llama(dtype=torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(ids).logits.dtype == torch.bfloat16
    model = tiny.adapted("goat")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids).logits
    assert torch.isfinite(mixed).all()
    config = LoraMoeConfig(r=2, num_experts=2)
    half = get_peft_model(tiny.llama(dtype=torch.float16), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float16}
    loaded = tiny.llama(dtype=torch.bfloat16)
    loaded.add_adapter(LoraMoeConfig(r=2, num_experts=2))  # transformers' own door
    assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {torch.float32}


RELOAD = """
import sys, torch
from helpers import moe_tiny as tiny
from peft import PeftModel
import htsr_alloc.lora_moe
model = PeftModel.from_pretrained(tiny.llama(), sys.argv[1]).eval()
torch.save(model(tiny.tokens()).logits, sys.argv[2])
"""


@pytest.mark.parametrize("system", TOKEN_SYSTEMS)
def test_reload_by_every_door(system, tmp_path):
    ids = tiny.tokens()
    base = tiny.llama()(ids).logits
    model = tiny.adapted(system).eval()
    want = model(ids).logits
    assert (want - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
    model.save_pretrained(tmp_path / "a")
    reloaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "a").eval()
    assert torch.equal(reloaded(ids).logits, want)
    assert not any(p.requires_grad for p in reloaded.parameters())
    quick = PeftModel.from_pretrained(tiny.llama(), tmp_path / "a", low_cpu_mem_usage=True)
    assert torch.allclose(quick.eval()(ids).logits, want, atol=1e-5)  # unaligned, memory-mapped
    door = tiny.llama()
    door.load_adapter(str(tmp_path / "a"))
    assert torch.allclose(door.eval()(ids).logits, want, atol=1e-5)
    tiny.llama().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    assert torch.equal(auto(ids).logits, want)
    unloaded = reloaded.unload().state_dict()
    for name, value in tiny.llama().state_dict().items():
        assert torch.equal(unloaded[name], value)


def test_reload_in_a_new_process(tmp_path):
    model = tiny.adapted("goat").eval()
    model.save_pretrained(tmp_path / "a")
    subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "a"), str(tmp_path / "logits.pt")],
        check=True,
        env=environment(PYTHONPATH=str(ROOT / "tests")),
        timeout=120,
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tiny.tokens()).logits)


def test_several_adapters(tmp_path):
    ids = tiny.tokens()
    model = tiny.adapted("goat").eval()
    first = model(ids).logits
    torch.manual_seed(7)
    other = LoraMoeConfig(system="mor", r=2, num_experts=3, lora_dropout=0.0)
    model.add_adapter("other", other)
    assert torch.equal(model(ids).logits, first)
    model.set_adapter("other")
    tiny.move(model, seed=8)
    second = model(ids).logits
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    reloaded.load_adapter(tmp_path / "other", "other")
    assert torch.equal(reloaded(ids).logits, first)
    reloaded.set_adapter("other")
    assert torch.equal(reloaded(ids).logits, second)
    reloaded.delete_adapter("other")
    reloaded.set_adapter("default")
    assert torch.equal(reloaded(ids).logits, first)
    both = model.base_model
    both.set_adapter(["default", "other"])
    logits = model(ids).logits
    assert not torch.allclose(logits, first)
    assert not torch.allclose(logits, second)


@pytest.mark.parametrize("system", TOKEN_SYSTEMS)
def test_generate_with_and_without_cache(system):
    model = tiny.adapted(system).eval()
    ids = tiny.tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(input_ids=ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **options))
    assert cached.shape == (2, 11)


def test_trainable_parameters_are_printed(capsys):
    model = tiny.adapted(num_experts=3, expert_pattern={"layers.0": 0})
    model.print_trainable_parameters()
    per_layer = 3 * (2 * (32 + 32) + 32) * 2 + 3 * (2 * (32 + 16) + 32) * 2
    per_layer += 3 * (2 * (32 + 48) + 32) * 2 + 3 * (2 * (48 + 32) + 48)
    assert f"trainable params: {per_layer:,} " in capsys.readouterr().out


LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("system", "settings", "count"),
    [
        ("alphalora", {"num_experts": 5}, 105_635_840),
        ("alphalora", {"num_experts": 8}, 169_017_344),
        ("alphalora", {"num_experts": 4}, 84_508_672),
        ("mor", {"num_experts": 8}, 23_205_888),
        # GOAT: Σ E (r (d_in + d_out) + d_in); HydraLoRA: Σ r d_in + E (r d_out + d_in).
        ("goat", {"num_experts": 8, "r": 4}, 32 * 8 * (4 * (4 * 8192 + 3 * 15104) + 35584)),
        ("hydra", {"num_experts": 3}, 32 * (8 * 35584 + 3 * (8 * (5 * 4096 + 2 * 11008) + 35584))),
    ],
)
def test_parameter_counts_of_llama_2_7b(system, settings, count):
    with torch.device("meta"):
        base = tiny.llama(**LLAMA_2_7B)
    model = get_peft_model(base, LoraMoeConfig(system=system, r=settings.pop("r", 8), **settings))
    assert model.get_nb_trainable_parameters()[0] == count


def test_patterns():
    model = tiny.adapted(
        expert_pattern={
            "model.layers.0": 3,
            "model.layers.1.mlp": 1,
            "model.layers.1.self_attn": 0,
        },
        top_k=2,
        top_k_pattern={"layers.0": 3},
    )
    found = {layer.name: layer.mixture["default"] for layer in layers_of(model)}
    assert len(found) == 10
    assert found["model.layers.0.mlp.up_proj"].experts == 3
    assert found["model.layers.0.mlp.up_proj"].top_k == 3
    assert found["model.layers.1.mlp.up_proj"].experts == 1
    assert found["model.layers.1.mlp.up_proj"].top_k == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"top_k_pattern": {"layers.0": 5}}, "asks for 5 of 4 experts on model.layers.0"),
        ({"expert_pattern": {"layers.7": 2}}, "'layers.7' matches no adapted module"),
        ({"expert_pattern": {"layers.1": 2, "q_proj": 3}}, "disagree on model.layers.1"),
        ({"target_modules": ["embed_tokens"]}, "only linear modules can have experts"),
        ({"system": "goat", "r": 5}, "need 20 singular directions"),
    ],
)
def test_bad_layouts_are_refused(settings, sentence):
    with pytest.raises(HtsrError, match=sentence):
        tiny.adapted(**{"system": "alphalora", **settings})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"system": "moe"}, "system cannot be 'moe'"),
        ({"r": 0}, "r must be an integer"),
        ({"top_k": 0}, "top_k must be"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"system": "hydra", "router_aux_loss_coef": 0.1}, "no balance loss"),
        ({"system": "hydra", "top_k_pattern": {"x": 1}}, "has no top_k"),
        ({"expert_pattern": {"x": -1}}, "at least 0"),
        ({"router_aux_loss_coef": -1}, "negative"),
        ({"em_dora": True}, "EM-LoRA's variant"),
    ],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(HtsrError, match=sentence):
        LoraMoeConfig(**settings)


def test_merging_is_refused():
    model = tiny.adapted()
    with pytest.raises(HtsrError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(HtsrError, match="cannot be merged"):
        model.merge_adapter()
    with pytest.raises(HtsrError, match="cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_another_base_is_refused(tmp_path):
    tiny.adapted().save_pretrained(tmp_path)
    with pytest.raises(HtsrError, match="is not the one the adapter was made on"):
        PeftModel.from_pretrained(tiny.llama(seed=5), tmp_path)
    with pytest.raises(HtsrError, match=r"was made for a .* of shape"):
        PeftModel.from_pretrained(tiny.llama(hidden_size=64), tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.check_base = False
    PeftModel.from_pretrained(tiny.llama(seed=5), tmp_path, config=config)
    # The same base rounded to another dtype is the same base.
    PeftModel.from_pretrained(tiny.llama(dtype=torch.bfloat16), tmp_path)


def test_a_config_can_be_used_twice():
    config = LoraMoeConfig(system="goat", r=2, num_experts=2)
    for seed in (0, 1):
        layer = next(layers_of(get_peft_model(tiny.llama(seed), config)))
        assert layer.lora_moe_A["default"].abs().max() > 0


def test_a_newer_adapter_is_refused(tmp_path):
    tiny.adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "format_version": 3, "surprise": 1}))
    with pytest.raises(HtsrError, match="format version 3, newer than"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


@pytest.mark.parametrize(
    "stored",
    [torch.zeros(60, 1, dtype=torch.uint8), torch.ones(10, 12).to(torch.float8_e4m3fn)],
    ids=["4-bit", "fp8"],
)
def test_goat_on_a_quantised_base_is_refused(stored):
    model = Two(torch.float32)
    model.one.weight = torch.nn.Parameter(stored, requires_grad=False)
    for settings in ({"system": "goat"}, {"system": "goat_plus"}):
        with pytest.raises(HtsrError, match="one is quantised, and GOAT needs"):
            get_peft_model(model, LoraMoeConfig(target_modules=["one"], r=2, **settings))


def test_one_config_for_two_bases_holds_neither(tmp_path):
    config = LoraMoeConfig(r=2, num_experts=2, target_modules=["q_proj"])
    first = get_peft_model(tiny.llama(0), config)
    get_peft_model(tiny.llama(1), config)
    first.save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny.llama(0), tmp_path)
    with pytest.raises(HtsrError, match="is not the one"):
        PeftModel.from_pretrained(tiny.llama(1), tmp_path)
