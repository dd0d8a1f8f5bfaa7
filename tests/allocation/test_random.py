"""The strategy ``random``: AlphaLoRA's counts in random places."""

import random
from collections import Counter
from pathlib import Path

import pytest

from htsr_alloc import allocate
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Metrics, dumps, loads

DATA = Path(__file__).parents[2] / "data" / "smollm2.metrics.json"
METRICS = loads(Metrics, DATA.read_text(), DATA.name)


@pytest.mark.parametrize("repair", ["remainder", "official"])
def test_the_counts_are_alphaloras_in_the_order_that_the_shuffle_has(repair):
    own = allocate(METRICS, T=150, repair=repair)
    for seed in range(5):
        made = allocate(METRICS, T=150, repair=repair, strategy="random", seed=seed)
        places = list(range(30))
        random.Random(seed).shuffle(places)
        if repair == "remainder":
            assert made.experts == tuple(own.experts[i] for i in places)
        assert made.budget == 150
        assert made.strategy.seed == seed
        assert loads(Allocation, dumps(made), "here") == made
        assert [row.score for row in made.evidence] == [row.score for row in own.evidence]


def test_by_modules_each_role_is_shuffled_by_itself():
    own, made = (
        allocate(METRICS, T=150, per_module=True, strategy=name) for name in ("alphalora", "random")
    )
    roles = {m.role for m in own.modules}

    def counts(allocation, role):
        return [m.experts for m in allocation.modules if m.role == role]

    assert all(Counter(counts(own, role)) == Counter(counts(made, role)) for role in roles)
    assert any(counts(own, role) != counts(made, role) for role in roles)


def test_every_place_is_as_likely():
    own = allocate(METRICS, T=150).experts
    most = own.index(max(own))
    assert own.count(max(own)) == 1
    found = Counter(
        allocate(METRICS, T=150, strategy="random", seed=seed).experts.index(max(own))
        for seed in range(900)
    )
    assert most in found
    expected = 900 / 30
    chi = sum((found[i] - expected) ** 2 / expected for i in range(30))
    assert chi < 58.3  # 29 degrees of freedom, 0.1 %


def test_on_the_command_line_a_seed_is_a_draw(invoke, tmp_path):
    asked = ("allocate", DATA, "--T", 150, "--strategy", "random", "-o")
    for seed in (1, 2):
        assert invoke(*asked, tmp_path / f"{seed}.json", "--seed", seed).rc == 0
    first, second = (
        loads(Allocation, (tmp_path / f"{seed}.json").read_text(), "a") for seed in (1, 2)
    )
    assert (first.strategy.seed, second.strategy.seed) == (1, 2)
    assert first.experts != second.experts
    done = invoke("allocate", DATA, "--T", 150, "-o", tmp_path / "a.json", "--seed", 1)
    assert done.rc == 1
    assert "--seed belongs to the random strategy" in done.stderr


def test_a_seed_of_another_strategy_is_refused():
    with pytest.raises(HtsrError, match="seed belongs to the random strategy"):
        allocate(METRICS, T=150, seed=1)
