"""Adapters, chat templates and configurations from strangers: bounded time and memory."""

import json
import random
import resource
import signal
import time

import pytest

pytest.importorskip("peft", reason="needs the extra [train]")

from helpers import moe_tiny, training_tiny
from helpers.fuzz import adapters
from helpers.mutator import drawn, mutated

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.build import empty_model
from htsr_alloc.training import bounds
from htsr_alloc.training.models import open_adapter, open_causal_lm
from htsr_alloc.training.rows import parse
from htsr_alloc.training.tokens import question

SLOW = r"([\w.]+)+!"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 2}},
        {"modules_to_save": [SLOW]},
    ],
)
def test_a_regular_expression_that_does_not_end_is_a_sentence(config):
    start = time.monotonic()
    with pytest.raises(HtsrError, match=r"A regular expression .* takes more than 0\.5 s"):
        bounds.check_patterns(config, ["model.layers.0.self_attn.q_proj"], seconds=0.5)
    assert time.monotonic() - start < 10


def test_what_is_no_regular_expression_is_a_sentence():
    with pytest.raises(HtsrError, match="unterminated"):
        bounds.check_patterns({"target_modules": "("}, ["a"])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'x' * 10**10 }}", "takes more than 1024 MiB"),
        ("{{ '%10000000000d' % 1 }}", "takes more than 1024 MiB"),
        ("{{ 1 / 0 }}", "fails"),
        ("{{ nosuch.a.b }}", "fails"),
        ("{% for", "fails"),
    ],
)
def test_a_chat_template_is_bounded(template, said):
    tokenizer = training_tiny.tokenizer(template)
    row = parse(
        {"messages": [{"role": "user", "content": "a"}], "choices": ["b", "c"], "answer": 0}
    )
    with pytest.raises(HtsrError, match=said):
        question(row, tokenizer)


def test_a_block_that_takes_too_long_is_stopped_and_all_is_as_before():
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(HtsrError, match=r"It takes more than 0\.2 s"), bounds.bounded("It", 0.2):
        time.sleep(30)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize("open_model", [empty_model, lambda f: open_causal_lm(f, None)])
def test_a_million_layers_are_refused(tmp_path, open_model):
    training_tiny.folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**6}))
    with pytest.raises(HtsrError, match="num_hidden_layers 1000000: at most 10000"):
        open_model(tmp_path)


def test_broken_adapters_are_a_sentence():
    strategy, function = adapters()
    corpus = drawn(strategy, 20)
    draw = random.Random(0)
    found = [function(mutated(draw.choice(corpus), draw)) for _ in range(50)]
    assert 0 < sum(found) < 50


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b"\xff" * 1000),
        lambda path: path.unlink(),
    ],
)
def test_broken_weights_of_an_adapter_are_a_sentence(tmp_path, damage):
    moe_tiny.adapted().save_pretrained(str(tmp_path))
    damage(tmp_path / "adapter_model.safetensors")
    with pytest.raises(HtsrError):
        open_adapter(moe_tiny.llama(), tmp_path)
