"""Which matrix of one metrics file is which of another, and why one has no partner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from htsr_alloc.records import Matrix, Metrics

Identity = tuple[int, str, "int | None", int]  # layer, role, expert, which of several alike

# An expert's matrix: Mixtral's, Granite's or Aria's name -> the name in other models.
ALIKE = {"w1": "gate_proj", "w3": "up_proj"}
ALIKE |= dict.fromkeys(("w2", "output_linear", "fc2"), "down_proj")
# What one linear joins in some models -> its parts in others.
JOINS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "qkv": ("q_proj", "k_proj", "v_proj"),
}


def in_like_words(a: Metrics, b: Metrics) -> tuple[Metrics, Metrics]:
    """Both, with one word for the experts' matrices where their words differ."""
    if {m.role for m in a.matrices} == {m.role for m in b.matrices}:
        return a, b
    return _renamed(a), _renamed(b)


def identified(matrices: Iterable[Matrix]) -> dict[Identity, Matrix]:
    """By layer, role and expert: the tensors' names may have another prefix in another file."""
    seen: Counter = Counter()
    found = {}
    for matrix in matrices:
        key = (matrix.layer, matrix.role, matrix.expert)
        found[(*key, seen[key])] = matrix
        seen[key] += 1
    return found


def unmatched(a: dict[Identity, Matrix], b: dict[Identity, Matrix]) -> Iterator[str]:
    """A sentence for each matrix of one side only."""
    for own, other, where in ((a, b, "reference"), (b, a, "other file")):
        roles = {(layer, _last(role)) for layer, role, *_ in other}
        for key, matrix in own.items():
            if key not in other:
                yield f"{matrix.tensor}: only in the {where}{_why(matrix, roles)}"


def _why(matrix: Matrix, roles: set[tuple[int, str]]) -> str:
    """Where one joins what the other has apart; its spectrum is not made of theirs."""
    own = _last(matrix.role)
    for joint, parts in JOINS.items():
        if own == joint and all((matrix.layer, part) in roles for part in parts):
            return f", where it joins {_listed(parts)}"
        if own in parts and (matrix.layer, joint) in roles:
            return f"; the other has it within {joint}"
    return ""


def _renamed(metrics: Metrics) -> Metrics:
    def own(matrix: Matrix) -> Matrix:
        start, dot, last = matrix.role.rpartition(".")
        known = ALIKE.get(last) if matrix.expert is not None else None
        return matrix if known is None else replace(matrix, role=f"{start}{dot}{known}")

    return replace(metrics, matrices=tuple(map(own, metrics.matrices)))


def _last(role: str) -> str:
    return role.rpartition(".")[2]


def _listed(parts: tuple[str, ...]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
