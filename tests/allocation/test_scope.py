"""Budgets of single stacks, and scores over the adapted matrices alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.records_made import made_matrix, metrics_with

from htsr_alloc.allocation import Experts, Stacks, allocate, parse_experts
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics, dumps, loads
from htsr_alloc.records.means import summarise

TEXT, VISION = "language_model.model.layers", "vision_tower.encoder.layers"


def two_stacks(text=(2.0, 3.0, 4.0), vision=(5.0, 3.0)):
    """A language model's layers and a vision tower's, two matrices each."""
    stacks = [(TEXT, text), (VISION, vision)]
    places = [(stack, i, a) for stack, alphas in stacks for i, a in enumerate(alphas)]
    matrices = []
    for layer, (stack, i, alpha) in enumerate(places):
        for role in ("q_proj", "up_proj"):
            made = made_matrix(i, role, alpha, prefix=stack)
            matrices.append(replace(made, layer=layer))
    prefixes = [f"{stack}.{i}" for stack, i, _ in places]
    whole = metrics_with([3.0])
    return replace(
        whole, matrices=tuple(matrices), layers=summarise(matrices, prefixes), skipped=()
    )


def test_one_stack_is_allocated_as_if_it_were_the_model():
    alone = metrics_with([2.0, 3.0, 4.0])
    want = allocate(alone, T=18)
    for name in ("language_model", TEXT, "model.layers", "language_model.model"):
        found = allocate(two_stacks(), T=18, stack=name)
        assert found.experts == want.experts
        assert [row.prefix for row in found.evidence] == [f"{TEXT}.{i}" for i in range(3)]
        assert found.strategy is not None
        assert found.strategy.stack == name
    vision = allocate(two_stacks(), T=8, stack="vision_tower", per_module=True)
    assert len(vision.experts) == 2
    assert {module.layer for module in vision.modules} == {0, 1}
    assert all(module.name.startswith(VISION) for module in vision.modules)
    for wrong in ("layer", "audio", ""):
        with pytest.raises(HtsrError, match=f"no stack '{wrong}'") as error:
            allocate(two_stacks(), T=18, stack=wrong)
        assert error.value.hint == (
            f"Name one, or a part of it: {TEXT} (3 layers), {VISION} (2 layers)."
        )


def test_a_stack_has_one_budget():
    made = two_stacks()
    short = [layer.prefix.replace("model.layers", "layer") for layer in made.layers]
    short = [name.replace("layers", "layer") for name in short]
    renamed = [replace(layer, prefix=name) for layer, name in zip(made.layers, short, strict=True)]
    alike = replace(made, layers=tuple(renamed))
    with pytest.raises(HtsrError, match=r"names the stack of language_model\.layer\.0 twice"):
        allocate(alike, T={"layer": 30, "language_model": 18})


def test_each_stacks_beta_is_its_own():
    both = allocate(two_stacks(), T={"language_model": 18, "vision_tower": 8}, spread=3)
    assert both.strategy.spread == 3
    assert both.strategy.beta is None
    same = allocate(two_stacks(), T={"language_model": 18, "vision_tower": 8}, beta=2)
    assert same.strategy.beta == 2


def test_each_stack_has_its_own_budget():
    both = allocate(two_stacks(), T={"language_model": 18, "vision_tower": 8})
    text = allocate(two_stacks(), T=18, stack="language_model")
    vision = allocate(two_stacks(), T=8, stack="vision_tower")
    assert both.experts == text.experts + vision.experts
    assert both.budget == 26
    assert [row.layer for row in both.evidence] == list(range(5))
    assert both.strategy is not None
    assert both.strategy.stack == "language_model=18,vision_tower=8"
    assert loads(type(both), dumps(both), "a") == both
    single = allocate(two_stacks(), T={"vision_tower": 8, "language_model": 18}, per_module=True)
    assert {m.layer for m in single.modules if m.name.startswith(TEXT)} == {2, 3, 4}
    with pytest.raises(HtsrError, match="names its stacks"):
        allocate(two_stacks(), T={"language_model": 18}, stack="vision_tower")


@pytest.mark.parametrize(
    ("text", "budget"),
    [("160", Experts(160)), ("a.b=3, c=4", Stacks((("a.b", 3), ("c", 4))))],
)
def test_budgets_are_read(text, budget):
    assert parse_experts(text) == budget


@pytest.mark.parametrize("text", ["", "1.5", "-3", "=3", "a=3,a=4", "a=3,4", "3,4", "a=x", "a="])
def test_other_budgets_are_refused(text):
    with pytest.raises(HtsrError, match="is not like 160"):
        parse_experts(text)


def mixture() -> Metrics:
    """Two layers: attention of alpha 2 and 4, experts of alpha 6."""
    matrices = []
    for layer, alpha in enumerate((2.0, 4.0)):
        matrices.append(made_matrix(layer, "q_proj", alpha))
        for i in range(3):
            made = made_matrix(layer, "w1", 6.0)
            name = f"model.layers.{layer}.moe.experts.{i}.w1.weight"
            matrices.append(replace(made, tensor=name, expert=i))
    prefixes = [f"model.layers.{i}" for i in range(2)]
    return replace(
        metrics_with([3.0]), matrices=tuple(matrices), layers=summarise(matrices, prefixes)
    )


def test_a_score_over_the_adapted_matrices_leaves_the_experts_out():
    def scores(**request):
        return [row.score for row in allocate(mixture(), T=12, **request).evidence]

    assert scores() == scores(score_over="all") == [(2 + 18) / 4, (4 + 18) / 4]
    assert scores(score_over="adapted") == [2.0, 4.0]
    found = allocate(mixture(), T=10, beta=1.0, score_over="adapted", metric="pl_alpha_hill")
    assert found.experts == (3, 7)  # 10 in proportion to 2 and 4
    assert found.strategy is not None
    assert found.strategy.score_over == "adapted"
    assert allocate(mixture(), T=10).strategy.score_over is None  # type: ignore[union-attr]


def test_of_a_dense_model_both_are_the_same():
    metrics = two_stacks()
    one, other = (allocate(metrics, T=18, score_over=name) for name in ("all", "adapted"))
    assert one.evidence == other.evidence


def test_targets_choose_what_an_adapted_score_is_over():
    metrics = two_stacks()
    changed = [
        replace(m, pl_alpha_hill=2 * m.pl_alpha_hill) if m.role == "up_proj" else m
        for m in metrics.matrices
    ]
    metrics = replace(metrics, matrices=tuple(changed))
    found = allocate(metrics, T=20, score_over="adapted", targets=["up_proj"])
    assert [row.score for row in found.evidence] == [4.0, 6.0, 8.0, 10.0, 6.0]
    for more in ({"per_module": True}, {"strategy": "uniform"}):
        with pytest.raises(HtsrError, match="score_over"):
            allocate(metrics, T=20, score_over="adapted", **more)
