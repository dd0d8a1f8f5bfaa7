import csv
import dataclasses
import io
import json
import re
import shlex

import pytest
import yaml
from helpers.commands import llama, write_shards

from htsr_alloc.allocation.exports import Lora, Modules, to_axolotl, to_csv, to_mola, to_peft_rank
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Evidence, Module, dumps

LINEARS = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]


def allocation(experts, prefix="model.layers.{}", k=2):
    rows = [
        Evidence(i, prefix and prefix.format(i), 3.25 + i, n + 0.125, n)
        for i, n in enumerate(experts)
    ]
    return Allocation(
        format=Allocation.FORMAT,
        version=Allocation.VERSION,
        budget=sum(experts),
        experts=tuple(experts),
        top_k=tuple(min(k, n) for n in experts),
        evidence=tuple(rows),
    )


def modules(layers, prefix="model.layers.{}", linears=tuple(LINEARS)):
    return {
        prefix.format(i): [f"{prefix.format(i)}.{name}" for name in linears] for i in range(layers)
    }


def matched(key, names):
    """PEFT's own rule, ``get_pattern_key``."""
    return [name for name in names if re.match(rf"(.*\.)?({key})$", name)]


def rank_of(config, name):
    """What PEFT gives a module: the first pattern that matches, else the common rank."""
    keys = [key for key in config["rank_pattern"] if matched(key, [name])]
    key = keys[0] if keys else None
    return (
        config["rank_pattern"].get(key, config["r"]),
        config["alpha_pattern"].get(key, config["lora_alpha"]),
    )


def targeted(config, names):
    """PEFT's own rule, ``check_target_module_exists``."""
    target = config["target_modules"]
    if isinstance(target, str):
        return {name for name in names if re.fullmatch(target, name)}
    return {name for name in names if any(name == t or name.endswith(f".{t}") for t in target)}


# --- MoLA -----------------------------------------------------------------------------------


def test_mola_arguments_parse_as_a_shell_reads_them():
    lora = Lora(r=4, lora_alpha=32, lora_dropout=0.1, target_modules=("q_proj", "v_proj"))
    text = to_mola(allocation([1, 3, 10]), lora)
    words = shlex.split(text.replace("\\\n", " "))
    assert dict(zip(words[::2], words[1::2], strict=True)) == {
        "--lora_r": "4,4,4",
        "--lora_alpha": "32",
        "--lora_dropout": "0.1",
        "--lora_target_modules": "q_proj,v_proj",
        "--number_experts": "1,3,10",
        "--top_k": "1,2,2",
    }
    assert text.endswith("\n")
    assert "target_modules" not in to_mola(allocation([2]), Lora())


def test_mola_refuses_a_layer_without_experts():
    with pytest.raises(HtsrError, match="Layer 1 has no expert"):
        to_mola(allocation([2, 0]), Lora())


# --- PEFT -----------------------------------------------------------------------------------


def test_every_pattern_is_escaped_and_matches_one_module():
    experts = [1, 4, 0, 7, 2, 3, 2, 1, 1, 1, 5, 6]  # layers 1, 10 and 11 must not be mixed up
    own = modules(12)
    every = [name for names in own.values() for name in names]
    config = json.loads(to_peft_rank(allocation(experts), Lora(r=8, lora_alpha=16), Modules(own)))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
    keys = list(config["rank_pattern"])
    assert keys == list(config["alpha_pattern"])
    assert len(keys) == 11 * 7
    for key in keys:
        assert "." not in key.replace("\\.", "")
        assert len(matched(key, every)) == 1
    assert targeted(config, every) == {
        n for i, e in enumerate(experts) if e for n in own_of(own, i)
    }
    for layer, count in enumerate(experts):
        for name in own_of(own, layer) if count else ():
            rank, alpha = rank_of(config, name)
            assert rank == 8 * count
            assert alpha / rank == 16 / 8  # the scale of every module stays


def own_of(own, layer):
    return own[f"model.layers.{layer}"]


def test_odd_names_are_escaped():
    names = {"net+x.(0)": ["net+x.(0).w[a]", "net+x.(0).w1", "net+x.(0).wXa"]}
    rows = (Evidence(0, "net+x.(0)", 1.0, 1.0, 2),)
    loaded = dataclasses.replace(allocation([2]), evidence=rows)
    config = json.loads(to_peft_rank(loaded, Lora(), Modules(names)))
    for key in config["rank_pattern"]:
        assert len(matched(key, names["net+x.(0)"])) == 1


@pytest.mark.parametrize("with_model", [True, False])
def test_modules_that_a_head_puts_under_a_prefix_get_their_ranks(with_model):
    own = modules(2)
    lora = Lora(target_modules=() if with_model else ("q_proj", "up_proj"))
    config = json.loads(
        to_peft_rank(allocation([3, 1]), lora, Modules(own) if with_model else None)
    )
    every = [f"bert.{name}" for names in own.values() for name in names]
    chosen = targeted(config, every)
    assert chosen >= {n for n in every if n.endswith(("q_proj", "up_proj"))}
    for name in chosen:
        assert rank_of(config, name)[0] == (24 if ".0." in name else 8)


def test_a_name_that_is_the_end_of_another_is_refused():
    both = modules(1) | modules(1, "draft.model.layers.{}")
    rows = tuple(Evidence(i, prefix, 1.0, 1.0, 2) for i, prefix in enumerate(both))
    loaded = dataclasses.replace(allocation([2, 2]), evidence=rows)
    with pytest.raises(HtsrError, match="does not match exactly one module"):
        to_peft_rank(loaded, Lora(), Modules(both))


def test_targets_choose_among_the_modules():
    own = modules(2)
    config = json.loads(
        to_peft_rank(allocation([3, 1]), Lora(target_modules=("q_proj",)), Modules(own))
    )
    assert targeted(config, [name for names in own.values() for name in names]) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    with pytest.raises(HtsrError, match=r"No module under model\.layers\.0 is one of c_attn"):
        to_peft_rank(allocation([3, 1]), Lora(target_modules=("c_attn",)), Modules(own))
    with pytest.raises(HtsrError, match="is one of proj"):  # whole words only
        to_peft_rank(allocation([3, 1]), Lora(target_modules=("proj",)), Modules(own))


def test_without_the_model_one_pattern_serves_a_layer_and_target():
    lora = Lora(r=2, lora_alpha=4, target_modules=("q_proj", "down_proj"))
    config = json.loads(to_peft_rank(allocation([3, 0, 1] + [1] * 9), lora))
    every = [name for names in modules(12).values() for name in names]
    wanted = {f"model.layers.{i}.{n}" for i in range(12) for n in (LINEARS[0], LINEARS[6])}
    wanted -= {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}
    assert targeted(config, every) == wanted
    for name in wanted:
        layer = int(name.split(".")[2])
        count = {0: 3}.get(layer, 1)
        assert rank_of(config, name) == (2 * count, 4 * count)
        assert sum(bool(matched(key, [name])) for key in config["rank_pattern"]) == 1


def test_peft_rank_refuses_the_wrong_model():
    with pytest.raises(HtsrError, match=r"has transformer\.h\.0, which is not in the allocation"):
        to_peft_rank(allocation([1, 1]), Lora(), Modules(modules(2, "transformer.h.{}")))
    with pytest.raises(HtsrError, match=r"no module under model\.layers\.2"):
        to_peft_rank(allocation([1, 1, 1]), Lora(), Modules(modules(2)))


def test_peft_rank_refuses_a_deeper_model():
    with pytest.raises(HtsrError, match=r"model\.layers\.2, which is not in the allocation"):
        to_peft_rank(allocation([1, 1]), Lora(), Modules(modules(3)))


def test_peft_rank_refuses_what_it_cannot_name():
    with pytest.raises(HtsrError, match="does not say which modules"):
        to_peft_rank(allocation([1], prefix=None), Lora(target_modules=("q_proj",)))
    with pytest.raises(HtsrError, match="which modules to adapt"):
        to_peft_rank(allocation([1]), Lora())
    with pytest.raises(HtsrError, match="nothing to train"):
        to_peft_rank(allocation([0, 0]), Lora(), Modules(modules(2)))
    bare = dataclasses.replace(allocation([1]), evidence=())
    with pytest.raises(HtsrError, match="does not say which modules"):
        to_peft_rank(bare, Lora(target_modules=("q_proj",)))


# --- axolotl --------------------------------------------------------------------------------


def test_axolotl_with_one_rank():
    config = yaml.safe_load(to_axolotl(allocation([4, 4]), Lora(r=8, lora_alpha=16)))
    assert config == {
        "adapter": "lora",
        "lora_dropout": 0.05,
        "lora_target_linear": True,
        "lora_r": 32,
        "lora_alpha": 64,
    }
    lora = Lora(target_modules=("q_proj", "v_proj"))
    config = yaml.safe_load(to_axolotl(allocation([0, 3, 0, 3]), lora))
    assert config["peft_layers_to_transform"] == [1, 3]
    assert config["lora_target_modules"] == ["q_proj", "v_proj"]
    assert "lora_target_linear" not in config


def as_peft(text):
    """What axolotl 0.19 hands to ``LoraConfig`` (``_build_peft_lora_config``)."""
    config = yaml.safe_load(text)
    assert config["adapter"] == "lora"
    return {
        "r": config["lora_r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": config.get("lora_target_modules") or [x.split(".")[1] for x in LINEARS],
        "rank_pattern": config["lora_rank_pattern"],
        "alpha_pattern": config["lora_alpha_pattern"],
    }


@pytest.mark.parametrize("targets", [(), ("q_proj", "up_proj")])
@pytest.mark.parametrize("with_model", [True, False])
def test_axolotl_with_several_ranks_has_peft_s_patterns(targets, with_model):
    experts = [1, 4, 2] + [3] * 9  # layers 1, 10 and 11 must not be mixed up
    own = modules(12)
    lora = Lora(r=8, lora_alpha=16, target_modules=targets)
    config = as_peft(to_axolotl(allocation(experts), lora, Modules(own) if with_model else None))
    every = [name for names in own.values() for name in names]
    wanted = {n for n in every if not targets or n.endswith(targets)}
    assert targeted(config, every) == wanted
    for name in wanted:
        count = experts[int(name.split(".")[2])]
        assert rank_of(config, name) == (8 * count, 16 * count)


def test_axolotl_leaves_out_layers_without_experts():
    config = yaml.safe_load(to_axolotl(allocation([1, 0, 4]), Lora()))
    assert config["peft_layers_to_transform"] == [0, 2]
    assert len(config["lora_rank_pattern"]) == 2
    with pytest.raises(HtsrError, match="nothing to train"):
        to_axolotl(allocation([0]), Lora())
    with pytest.raises(HtsrError, match="does not say which modules"):
        to_axolotl(allocation([1, 2], prefix=None), Lora())


def test_axolotl_takes_whole_alphas_only():
    with pytest.raises(HtsrError, match="whole numbers as alpha"):
        to_axolotl(allocation([1, 2]), Lora(lora_alpha=1.5))


# --- CSV ------------------------------------------------------------------------------------


def test_csv_parses_back():
    loaded = allocation([2, 0, 5], prefix='odd, "name"\n.{}')
    rows = list(csv.DictReader(io.StringIO(to_csv(loaded), newline="")))
    assert [int(row["layer"]) for row in rows] == [0, 1, 2]
    assert [row["prefix"] for row in rows] == [e.prefix for e in loaded.evidence]
    assert [float(row["score"]) for row in rows] == [e.score for e in loaded.evidence]
    assert [float(row["quota"]) for row in rows] == [e.quota for e in loaded.evidence]
    assert [int(row["experts"]) for row in rows] == [2, 0, 5]
    assert [int(row["top_k"]) for row in rows] == [2, 0, 2]


def test_csv_without_evidence_has_empty_cells():
    loaded = dataclasses.replace(allocation([2, 1]), evidence=())
    rows = list(csv.DictReader(io.StringIO(to_csv(loaded))))
    assert rows[1] == {
        "layer": "1",
        "prefix": "",
        "score": "",
        "quota": "",
        "experts": "1",
        "top_k": "1",
    }


# --- the command ----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny.allocation.json"
    path.write_text(dumps(allocation([3, 1])))
    return path


def test_export_checks_the_real_model(saved, model, invoke, tmp_path):
    done = invoke("export", saved, "--to", "peft-rank", "--model", model, "--r", 4)
    assert done.rc == 0
    config = json.loads(done.stdout)
    every = [name.removesuffix(".weight") for name in llama()]
    assert len(targeted(config, every)) == 14
    assert rank_of(config, "model.layers.0.mlp.up_proj") == (12, 48)
    other = write_shards(
        tmp_path / "other", [{"h.0.attn.c_attn.weight": llama()["lm_head.weight"]}]
    )
    done = invoke("export", saved, "--to", "peft-rank", "--model", other)
    assert done.rc == 1
    assert "The model has h.0, which is not in the allocation" in done.stderr
    assert done.stdout == ""


def test_export_to_a_file_and_to_stdout_is_the_same_text(saved, invoke, tmp_path):
    for to in ("mola", "axolotl", "csv"):
        out = invoke("export", saved, "--to", to)
        assert out.rc == 0
        assert invoke("export", saved, "--to", to, "-o", "-").stdout == out.stdout
        done = invoke("export", saved, "--to", to, "-o", "x.txt")
        assert (done.stdout, done.stderr) == ("", "wrote x.txt\n")
        assert (tmp_path / "x.txt").read_text() == out.stdout


def test_an_unknown_export_names_the_known_ones(saved, invoke):
    done = invoke("export", saved, "--to", "deepspeed")
    assert done.rc == 2
    assert "mola, peft-rank, axolotl, csv" in done.stderr


def test_a_metrics_file_is_no_allocation(model, invoke):
    assert invoke("analyze", model, "-q").rc == 0
    done = invoke("export", "tiny.metrics.json", "--to", "csv")
    assert done.rc == 1
    assert "not a valid htsr.allocation file: its format is 'htsr.metrics'" in done.stderr


# --- one count a linear ---------------------------------------------------------------------


def by_linears(counts, names=("self_attn.q_proj", "mlp.up_proj")):
    """An allocation whose layers have these counts, linear by linear."""
    listed = [
        Module(i, f"model.layers.{i}.{name}", name.rpartition(".")[2], 3.0, n + 0.25, n, min(2, n))
        for i, row in enumerate(counts)
        for name, n in zip(names, row, strict=True)
    ]
    layers = [round(sum(row) / len(row)) for row in counts]
    return dataclasses.replace(allocation(layers), modules=tuple(listed))


@pytest.mark.parametrize("named", [False, True])
def test_each_linear_gets_its_own_rank_and_no_other_is_targeted(named):
    made = by_linears([[3, 1], [0, 2]])
    lora = Lora(r=4, lora_alpha=8)
    config = json.loads(to_peft_rank(made, lora, Modules(modules(2)) if named else None))
    every = [name for names in modules(2).values() for name in names]
    wanted = {m.name: m.experts for m in made.modules if m.experts}
    assert targeted(config, every) == set(wanted)
    for name, experts in wanted.items():
        assert rank_of(config, name) == (4 * experts, 8 * experts)


def test_targets_choose_among_the_listed_linears():
    made = by_linears([[3, 1], [1, 2]])
    config = json.loads(to_peft_rank(made, Lora(target_modules=("up_proj",))))
    assert config["target_modules"] == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    with pytest.raises(HtsrError, match="lists no v_proj"):
        to_peft_rank(made, Lora(target_modules=("v_proj",)))


def test_a_listed_linear_that_the_model_lacks_is_refused():
    made = by_linears([[3, 1], [1, 2]], names=("self_attn.q_proj", "mlp.w1"))
    with pytest.raises(HtsrError, match=r"model\.layers\.0\.mlp\.w1, which is not a linear"):
        to_peft_rank(made, Lora(), Modules(modules(2)))


def test_mola_has_no_words_for_linears():
    with pytest.raises(HtsrError, match="one count a layer, and this allocation one a linear"):
        to_mola(by_linears([[3, 1]]), Lora())


def test_axolotl_has_a_pattern_for_each_listed_linear():
    """Equal layers with unequal linears still need ranks of their own."""
    made = by_linears([[3, 1], [1, 3]])
    config = as_peft(to_axolotl(made, Lora()))
    assert targeted(config, [n for own in modules(2).values() for n in own]) == {
        m.name for m in made.modules
    }
    for module in made.modules:
        assert rank_of(config, module.name) == (8 * module.experts, 16 * module.experts)


def test_csv_has_a_row_a_linear():
    made = by_linears([[3, 1], [0, 2]])
    rows = list(csv.DictReader(io.StringIO(to_csv(made))))
    assert [(r["module"], r["role"], int(r["experts"]), int(r["top_k"])) for r in rows] == [
        (m.name, m.role, m.experts, m.top_k) for m in made.modules
    ]


def test_a_model_is_for_exports_that_name_modules(saved, model, invoke):
    done = invoke("export", saved, "--to", "csv", "--model", model)
    assert done.rc == 1
    assert "The csv export does not name modules, so that --model means nothing" in done.stderr


def test_axolotl_leaves_out_layers_by_number_in_one_stack_only():
    assert "peft_layers_to_transform: [0, 2]" in to_axolotl(allocation([1, 0, 1]), Lora())
    counts = allocation([1, 0, 1, 1])
    rows = [f"model.{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)]
    two = [
        dataclasses.replace(row, prefix=name)
        for row, name in zip(counts.evidence, rows, strict=True)
    ]
    with pytest.raises(HtsrError, match=r"Layer 2 is model\.decoder\.layers\.0, so that its"):
        to_axolotl(dataclasses.replace(counts, evidence=tuple(two)), Lora())
    with pytest.raises(HtsrError, match=r"Layer 0 is block\.0\.layer\.0"):
        to_axolotl(allocation([1, 0], "block.{}.layer.0"), Lora())


def test_a_target_that_no_layer_has_is_refused():
    lora = Lora(target_modules=("q_proj", "vproj"))
    with pytest.raises(HtsrError, match="No layer has a linear vproj"):
        to_peft_rank(allocation([2, 2]), lora, Modules(modules(2)))
