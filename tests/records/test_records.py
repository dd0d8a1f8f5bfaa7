import copy
import dataclasses
import json

import jsonschema
import pytest
from helpers.commands import ROOT
from helpers.records_made import ALLOCATION, METRICS, WHOLE, matrix
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import (
    Allocation,
    Metrics,
    dumps,
    loads,
)
from htsr_alloc.records.schema import schema_file, schema_text

RECORDS = [METRICS, ALLOCATION, WHOLE]


def schema(kind: type) -> dict:
    return json.loads(schema_file(kind).read_text())


def accepts(kind: type, data: object) -> tuple[bool, bool]:
    """Whether our loader and the JSON Schema accept it."""
    try:
        loads(kind, json.dumps(data), "x.json")
        ours = True
    except HtsrError:
        ours = False
    return ours, jsonschema.Draft202012Validator(schema(kind)).is_valid(data)


def every_path(data, path=()):
    """Each place in a JSON document."""
    yield path
    children = data.items() if isinstance(data, dict) else ()
    children = enumerate(data) if isinstance(data, list) else children
    for key, value in children:
        yield from every_path(value, (*path, key))


@pytest.mark.parametrize("kind", [Metrics, Allocation])
def test_the_schemas_are_those_of_the_dataclasses(kind):
    """python -m htsr_alloc.records.schema writes them."""

    def unordered(found: dict) -> dict:  # msgspec's versions differ in what they list first
        return {k: sorted(v, key=str) if k == "anyOf" else v for k, v in found.items()}

    written, made = schema_file(kind).read_text(), schema_text(kind)
    assert json.loads(written, object_hook=unordered) == json.loads(made, object_hook=unordered)
    jsonschema.Draft202012Validator.check_schema(schema(kind))


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("*.json")), ids=lambda p: p.name)
def test_published_files_are_written_as_they_were(path):
    text = path.read_text()
    kind = {"htsr.metrics": Metrics, "htsr.allocation": Allocation}[json.loads(text)["format"]]
    assert dumps(loads(kind, text, path.name)) == text
    assert accepts(kind, json.loads(text)) == (True, True)


@pytest.mark.parametrize("record", RECORDS, ids=["metrics", "allocation", "whole"])
def test_round_trip(record):
    text = dumps(record)
    assert loads(type(record), text, "x.json") == record
    assert loads(type(record), text.encode(), "x.json") == record
    assert accepts(type(record), json.loads(text)) == (True, True)


def test_a_trainer_needs_only_experts_and_top_k():
    minimal = {"format": "htsr.allocation", "version": 1, "budget": 3}
    minimal |= {"experts": [1, 2], "top_k": [1, 2]}
    assert accepts(Allocation, minimal) == (True, True)


@pytest.mark.parametrize("record", RECORDS, ids=["metrics", "allocation", "whole"])
def test_loader_and_schema_refuse_the_same_damage(record):
    """Every place of the document, wrong in turn: another type, an extra key, a missing one."""
    kind, whole = type(record), json.loads(dumps(record))
    tried = 0
    for path in every_path(whole):
        if not path:
            continue
        damages = [{"unknown": 1}, [[[]]], True]
        for wrong in (*damages, "__delete__", "__extra__"):
            data = copy.deepcopy(whole)
            parent = data
            for step in path[:-1]:
                parent = parent[step]
            if wrong == "__delete__":
                if not isinstance(parent, dict):
                    continue
                del parent[path[-1]]
            elif wrong == "__extra__":
                if not isinstance(parent[path[-1]], dict):
                    continue
                parent[path[-1]]["surprise"] = 1
            else:
                parent[path[-1]] = wrong
            ours, theirs = accepts(kind, data)
            if wrong == "__delete__":  # a schema cannot know which lists must agree in length
                assert not ours or theirs, (path, wrong)
            else:
                assert (ours, theirs) == (False, False), (path, wrong)
            tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": 2}, "version 2 is newer than this htsr reads"),
        ({"version": True}, "version: expected 1"),
        ({"format": "htsr.metrics"}, "its format is 'htsr.metrics'"),
        ({"budget": 6}, "experts: sum to 5, not to budget 6"),
        ({"top_k": [2]}, "top_k: 1 entries for 2 layers"),
        ({"top_k": [3, 2]}, r"top_k\[0\]: 3 does not fit 2 experts"),
        ({"top_k": [0, 2]}, r"top_k\[0\]: 0 does not fit 2 experts"),
        ({"experts": [-1, 6]}, r"experts\[0\]: expected int >= 0"),
        ({"experts": [2.0, 3]}, r"experts\[0\]: expected int, got float"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"evidence": [{"layer": 0}]}, r"evidence\[0\]: missing key 'prefix'"),
        ({"unit": "experts"}, "unit: unknown value 'experts'"),
        ({"metrics": {"file": "/etc/passwd", "sha256": ""}}, "must be a bare file name"),
        ({"metrics": {"file": "..", "sha256": ""}}, "must be a bare file name"),
        ({"budget": 10**400}, "experts: sum to 5"),
    ],
)
def test_a_wrong_allocation_is_refused_with_the_place(change, sentence):
    data = json.loads(dumps(ALLOCATION)) | change
    with pytest.raises(HtsrError, match=sentence):
        loads(Allocation, json.dumps(data), "x.json")


def listed(*changes: dict) -> dict:
    """WHOLE's modules, changed one by one."""
    modules = json.loads(dumps(WHOLE))["modules"]
    return {"modules": [row | change for row, change in zip(modules, changes, strict=True)]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (listed({"layer": 2}, {}), r"modules\[0\].layer: 2 is not among the layers"),
        (listed({}, {"experts": -1}), r"modules\[1\].experts: expected int >= 0"),
        (listed({"top_k": 3}, {}), r"modules\[0\].top_k: 3 does not fit 2 experts"),
        (listed({}, {"name": "model.layers.0.self_attn.q_proj"}), "a linear is listed twice"),
        (listed({}, {"experts": 5}), "layer 1 has 5 experts a linear, and experts says 3"),
        ({"strategy": {"name": "x", "scores": {"file": "/a", "sha256": ""}}}, "bare file name"),
    ],
)
def test_linears_that_contradict_their_layers_are_refused(change, sentence):
    with pytest.raises(HtsrError, match=sentence):
        loads(Allocation, json.dumps(json.loads(dumps(WHOLE)) | change), "x.json")


def test_what_came_later_is_written_only_where_it_is_used():
    """A reader of the first version 1 takes every file that does without."""
    first = json.loads(dumps(ALLOCATION))
    later = json.loads(dumps(WHOLE))
    assert set(later) - set(first) == {"modules", "parameters"}
    assert set(later["strategy"]) - set(first["strategy"]) == {
        "spread", "farms", "scores", "pool", "targets", "stack", "score_over",
    }  # fmt: skip
    assert set(later["model"]) - set(first["model"]) == {"parameters"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Expecting value"),
        ("[1, 2]", 'no "format" key'),
        ('{"format": "htsr.allocation", "version": 1, "budget": NaN}', "NaN is not a number"),
        ('{"format": "htsr.allocation", "version": 1, "budget": -Infinity}', "-Infinity is not"),
        ('{"format": "a", "format": "htsr.allocation"}', "duplicate key 'format'"),
        (b"\xff\xfe", "codec can't decode"),
        ('{"a":' * 200_000, "nested too deeply"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_is_refused(text, sentence):
    with pytest.raises(HtsrError, match=sentence) as caught:
        loads(Allocation, text, "x.json")
    assert caught.value.message.startswith("x.json ")


@pytest.mark.parametrize(
    ("matrices", "sentence"),
    [
        ((matrix(0), matrix(0)), "listed twice"),
        ((matrix(2),), "not among the layers"),
        ((matrix(0, status="fine"),), "unknown status"),
        ((matrix(0, reason=None),), "needs a reason"),
        ((matrix(0, pl_alpha_hill=None),), "null without status failed"),
    ],
)
def test_metrics_that_contradict_themselves_are_not_written(matrices, sentence):
    with pytest.raises(ValueError, match=sentence):
        dumps(dataclasses.replace(METRICS, matrices=matrices))


def test_every_null_of_a_layer_has_a_reason():
    layers = (dataclasses.replace(METRICS.layers[0], alpha_hat=None), METRICS.layers[1])
    with pytest.raises(ValueError, match="a null number needs a reason"):
        dumps(dataclasses.replace(METRICS, layers=layers))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_is_never_written(number):
    with pytest.raises(ValueError, match="Out of range float"):
        dumps(dataclasses.replace(METRICS, matrices=(matrix(0, xmin=number), matrix(1))))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda child: st.lists(child, max_size=4) | st.dictionaries(st.text(), child, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from([f.name for f in dataclasses.fields(Allocation)]), value=JSON)
def test_any_value_in_any_place_gives_a_record_or_a_sentence(key, value):
    data = json.loads(dumps(ALLOCATION)) | {key: value}
    try:
        found = loads(Allocation, json.dumps(data), "x.json")
    except HtsrError as error:
        found = error.message
    assert isinstance(found, Allocation) or (found.endswith(".") and "\n" not in found)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_sentence(text):
    with pytest.raises(HtsrError):
        loads(Metrics, text, "x.json")
