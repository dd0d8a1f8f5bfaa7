"""What ``htsr serve`` starts, and what it refuses to."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("peft")

from helpers import moe_tiny as tiny
from helpers import training_tiny
from peft import LoraConfig, get_peft_model

from htsr_alloc.errors import HtsrError
from htsr_alloc.serving import launch
from htsr_alloc.serving.launch import needs_of


@pytest.fixture
def folders(tmp_path):
    """model/ with a tokenizer, mixture/ and plain/."""
    training_tiny.folder(tmp_path / "model")
    for name in ("mixture", "plain"):
        base = tiny.llama()
        if name == "mixture":
            asked = {"expert_pattern": {"layers.0": 6, "layers.1": 3}}
            model = tiny.adapted("goat", model=base, target_modules=["q_proj", "up_proj"], **asked)
        else:
            asked = {"rank_pattern": {"layers.0.self_attn.o_proj": 40}}
            asked |= {"alpha_pattern": {"layers.0.self_attn.o_proj": 80}, "lora_alpha": 6}
            model = get_peft_model(base, LoraConfig(r=3, target_modules=["o_proj"], **asked))
        model.save_pretrained(str(tmp_path / name))
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "model")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def after(words, option):
    """The values of an option of vLLM."""
    rest = words[words.index(option) + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]


def test_what_an_adapter_needs(folders):
    mixture, plain = needs_of(folders / "mixture"), needs_of(folders / "plain")
    assert mixture.rank == 2 * 6 * 2  # N r, and the residual has as many
    assert mixture.experts == 6
    assert mixture.linears == {"q_proj", "up_proj"}
    assert (plain.rank, plain.experts, plain.linears) == (40, 0, {"o_proj"})
    with pytest.raises(HtsrError, match="holds no LoRA"):
        needs_of(folders / "model")
    config = folders / "plain" / "adapter_config.json"
    given = json.loads(config.read_text())
    for name, served in (("down_proj.weight", True), ("experts.down_proj", False)):
        config.write_text(json.dumps(given | {"target_parameters": [f"model.layers.0.mlp.{name}"]}))
        if served:  # one linear, named by its weight
            assert needs_of(folders / "plain") == plain
        else:
            with pytest.raises(HtsrError, match=r"adapts the base's own experts .*is not served"):
                needs_of(folders / "plain")


def test_the_server_gets_what_its_adapters_need(folders, invoke):
    done = invoke("serve", folders / "mixture", folders / "plain", "--port", 8123, "--dry-run")
    assert done.rc == 0, done.stderr
    words = done.stdout.split()
    assert words[words.index("-m") + 1] == "vllm.entrypoints.openai.api_server"
    assert after(words, "--model") == [str(folders / "model")]
    assert after(words, "--port") == ["8123"]
    assert after(words, "--host") == ["127.0.0.1"]
    wanted = [f"mixture={folders / 'mixture'}", f"plain={folders / 'plain'}"]
    assert after(words, "--lora-modules") == wanted
    assert after(words, "--max-loras") == after(words, "--max-cpu-loras") == ["2"]
    assert after(words, "--max-lora-rank") == ["64"]
    assert after(words, "--lora-target-modules") == ["o_proj", "q_proj", "up_proj"]
    assert "--tokenizer" not in words
    assert "HTSR_VLLM_MAX_EXPERTS=6" in words
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folders / "model" / name).rename(folders / "mixture" / name)
    asked = ("serve", folders / "plain", folders / "mixture", "--slots", 1, "--dry-run")
    words = invoke(*asked).stdout.split()
    assert after(words, "--tokenizer") == [str(folders / "mixture")]
    assert after(words, "--max-loras") == ["1"]
    assert after(words, "--max-cpu-loras") == ["2"]


def test_an_adapter_has_the_name_that_was_typed_be_it_a_link(folders, invoke):
    (folders / "mine").symlink_to(folders / "mixture")
    done = invoke("serve", folders / "mine", folders / "mixture", "--dry-run")
    names = [own.partition("=")[0] for own in after(done.stdout.split(), "--lora-modules")]
    assert names == ["mine", "mixture"]


def test_without_vllm_one_sentence_says_how_to_install_it(folders, invoke, monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    done = invoke("serve", folders / "mixture")
    assert done.rc == 1
    assert "vLLM, which serves adapters, is not installed here." in done.stderr
    assert "pip install" in done.stderr


def test_the_server_replaces_the_command(folders, invoke, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(launch.os, "execvpe", lambda *call: started.append(call))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert invoke("serve", folders / "plain").rc == 0
    ((program, words, environment),) = started
    assert program == words[0]
    assert "--lora-modules" in words
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"  # the user's own stands


def test_what_cannot_be_served_is_refused(folders, invoke, tmp_path):
    tiny.adapted("em_lora").save_pretrained(str(tmp_path / "em"))
    done = invoke("serve", tmp_path / "em", "--model", folders / "model", "--dry-run")
    assert done.rc == 1
    assert "EM-LoRA chooses by the whole prompt" in done.stderr
    wide = tiny.adapted("alphalora", r=8, expert_pattern={"layers": 65}, target_modules=["q_proj"])
    wide.save_pretrained(str(tmp_path / "wide"))
    done = invoke("serve", tmp_path / "wide", "--model", folders / "model", "--dry-run")
    assert "520 ranks" in done.stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "mixture").rename(tmp_path / "other" / "plain")
    done = invoke("serve", tmp_path / "plain", tmp_path / "other" / "plain", "--dry-run")
    assert "Two adapters are called plain" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alpha_pattern": {}}, "has the scale 0.15, and vLLM takes .* 2."),
        ({"use_rslora": True}, "has the scale 12.65, and vLLM takes .* 3.464"),
        ({"init_lora_weights": "pissa_niter_4"}, "is pissa_niter_4, of which vLLM does not"),
    ],
)
def test_what_vllm_would_compute_otherwise_is_refused(folders, given, said):
    config = folders / "plain" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | given))
    with pytest.raises(HtsrError, match=said) as error:
        needs_of(folders / "plain")
    assert "Merge it" in error.value.hint
