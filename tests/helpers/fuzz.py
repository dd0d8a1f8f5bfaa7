"""Readers of files from strangers, and what to feed them.

Each of ``TARGETS`` is (strategy, function); the function returns True for a valid object and False
for an ``HtsrError``. Any other exception, or a disagreement with the safetensors library, is a bug.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from helpers.bad_inputs import entry, good
from htsr_alloc.analysis.analyze import plan
from htsr_alloc.analysis.journal import read_journal
from htsr_alloc.checkpoints.header import read_header
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Metrics, Settings, loads

NUMBERS = st.sampled_from([0, 1, 2, 4, 8, 16, -1, 2**31, 2**63, 2**64, 1.5, 1e308, True])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.floats() | st.text(max_size=8),
    lambda child: (
        st.lists(child, max_size=4) | st.dictionaries(st.text(max_size=8), child, max_size=4)
    ),
    max_leaves=10,
)
DTYPES = st.sampled_from(["F64", "F32", "BF16", "F16", "U8", "BOOL", "F4", "F8_E4M3", "X", "f32"])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": DTYPES | JSON,
        "shape": st.lists(NUMBERS | st.integers(0, 5), max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS | st.integers(0, 64), min_size=2, max_size=2) | JSON,
    }
)


@st.composite
def laid_out(draw: Any) -> bytes:
    """A valid or almost valid file: tensors one after the other, then perhaps a change."""
    sizes = {"F64": 8, "F32": 4, "BF16": 2, "U8": 1, "F8_E4M3": 1}
    tensors: dict[str, Any] = {}
    place = 0
    for i in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(sizes)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = sizes[dtype]
        for length in shape:
            size *= length
        tensors[f"t{i}"] = entry(shape, [place, place + size], dtype)
        place += size
    if tensors and draw(st.booleans()):
        which = draw(st.sampled_from(sorted(tensors)))
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
        if key is None:
            tensors[which] = draw(JSON)
        else:
            tensors[which][key] = draw(ENTRY)[key]
    if draw(st.booleans()):
        tensors["__metadata__"] = draw(st.dictionaries(st.text(), st.text(), max_size=2) | JSON)
    text = json.dumps(tensors).encode() + b" " * draw(st.integers(0, 3))
    extra = draw(st.sampled_from([0, 0, 0, 1, -1]))
    return len(text).to_bytes(8, "little") + text + bytes(max(0, place + extra))


def header(data: bytes) -> bool:
    """The same verdict as the safetensors library's; stricter only on a duplicate name or key."""
    try:
        deserialize(data)
        theirs = True
    except SafetensorError:
        theirs = False
    why = None
    try:
        read_header(lambda begin, length: data[begin : begin + length], len(data), "x")
    except HtsrError as error:
        why = error.message
    assert (why is None) == theirs or (theirs and "twice" in str(why)), (data, why)
    return why is None


def folder_with(name: str, text: bytes) -> bool:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "m"
        folder.mkdir()
        good(folder / "a.safetensors", ("h.0.a.weight", "h.1.a.weight"))
        (folder / name).write_bytes(text)
        try:
            checkpoint = open_checkpoint(folder)
            plan(checkpoint, Settings("official"))
            checkpoint.read(checkpoint.tensors[0])
        except HtsrError:
            return False
    return True


def index(text: bytes) -> bool:
    return folder_with("model.safetensors.index.json", text)


def config(text: bytes) -> bool:
    return folder_with("config.json", text)


def reader(kind: type[Metrics] | type[Allocation]) -> Callable[[bytes], bool]:
    def read(text: bytes) -> bool:
        try:
            loads(kind, text, "x.json")
        except HtsrError:
            return False
        return True

    return read


def journal(text: bytes) -> bool:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "x.journal"
        path.write_bytes(text)
        try:
            read_journal(path, {})
        except HtsrError:
            return False
    return True


def journaled(text: bytes, hashed: bool) -> bytes:
    """A journal of one record, with its hash or another."""
    header = b'{"format": "htsr.journal", "version": 2, "identity": {}}'
    lines = [(header, header), (text, header + text if hashed else text)]
    return b"".join(t + b" " + sha256(of).hexdigest().encode() + b"\n" for t, of in lines)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document."""
    pairs = data.items() if isinstance(data, dict) else ()
    pairs = enumerate(data) if isinstance(data, list) else pairs
    return [path] + [found for key, value in pairs for found in places(value, (*path, key))]


@st.composite
def changed(draw: Any, text: str) -> bytes:
    """The document with one place replaced, and perhaps a byte of its text."""
    data = json.loads(text)
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from(places(data)[1:] or [()]))
        here = data
        for step in path[:-1]:
            here = here[step]
        if path:
            here[path[-1]] = draw(JSON)
    raw = bytearray(json.dumps(data).encode())
    if draw(st.booleans()):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


def with_length(text: bytes, data: int) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(data)


def as_bytes(strategy: Any) -> Any:
    return strategy.map(lambda data: json.dumps(data).encode())


def targets() -> dict[str, tuple[Any, Callable[[bytes], bool]]]:
    """Name -> (strategy, function)."""
    from helpers.records_made import ALLOCATION, METRICS
    from htsr_alloc.records import dumps

    maps = st.dictionaries(
        st.sampled_from(["h.0.a.weight", "h.1.a.weight", "other"]),
        st.sampled_from(["a.safetensors", "../a.safetensors", "b.safetensors"]) | JSON,
        max_size=3,
    )
    keys = ["num_hidden_layers", "n_layer", "text_config", "architectures", "quantization_config"]
    configs = st.dictionaries(st.sampled_from(keys), JSON, max_size=3)
    minimal = '{"format": "htsr.allocation", "version": 1, "budget": 3, "experts": [1, 2]'
    line = '{"name": "a", "sha256": "00", "eigenvalues": "", "n_zero": 0, "engine": "x"'
    line += ', "stamp": "", "windows": null, "reason": null}'
    any_bytes = st.binary(max_size=200)
    return {
        "header": (laid_out() | any_bytes, header),
        "header's entries": (
            st.builds(
                with_length,
                as_bytes(st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=3)),
                st.sampled_from([0, 0, 4, 16]),
            ),
            header,
        ),
        "index": (as_bytes(st.fixed_dictionaries({"weight_map": maps}) | JSON) | any_bytes, index),
        "configuration": (as_bytes(configs | JSON) | any_bytes, config),
        "metrics": (changed(dumps(METRICS)) | any_bytes, reader(Metrics)),
        "allocation": (
            changed(dumps(ALLOCATION)) | changed(minimal + ', "top_k": [1, 2]}') | any_bytes,
            reader(Allocation),
        ),
        "journal": (
            st.builds(journaled, changed(line) | any_bytes, st.booleans()) | any_bytes,
            journal,
        ),
        "rows": (st.lists(line_of_rows(), min_size=1, max_size=3).map(b"\n".join), rows),
        "study": (changed(json.dumps(STUDY)) | YAML.map(str.encode) | any_bytes, study),
        "scores in JSON": (
            changed(json.dumps(SCORES)) | as_bytes(JSON) | any_bytes,
            scores(".json"),
        ),
        "scores in CSV": (table() | any_bytes, scores(".csv")),
    }


STUDY = {
    "model": "model",
    "metrics": "m.json",
    "results": "results.jsonl",
    "experts": 6,
    "seeds": [1, 2],
    "recipe": {"steps": 3, "learning_rate": 0.01},
    "tasks": {"words": {"train": "a.jsonl", "test": "b.jsonl", "test_rows": 20}},
    "rows": [{"name": "uniform", "main": True}, {"name": "MoLA", "groups": "13", "beta": 2}],
}
MARKS = "a: ,- ,&x ,*x,<<: ,!!int ,!!float ,!!set ,!!python/name:os.system ,? ,[,],{,},\n,  ,1e5,"
MARKS += ".nan,0x_,2001-99-99,',|\n,%,@,`,\\"
YAML = st.lists(st.sampled_from(MARKS.split(",")), max_size=12).map("".join)
SCORES = [{"layer": 0, "score": 1.5}, {"layer": 1, "score": 2}]
ROWS = (
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "response": "c"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "choices": ["b", "c"], "answer": 1},
)


def line_of_rows() -> Any:
    return st.sampled_from([json.dumps(row) for row in ROWS]).flatmap(changed) | st.binary(
        max_size=60
    )


@st.composite
def table(draw: Any) -> bytes:
    """A valid or almost valid CSV file of scores."""
    cell = st.sampled_from(["0", "1", "2.5", "layer", "score", "nan", "1e999", '"', "", "=1", "\r"])
    rows = draw(st.lists(st.lists(cell, min_size=1, max_size=3), max_size=4))
    head = draw(st.sampled_from([["layer", "score"], ["prefix", "score"], ["score"], []]))
    return "\n".join(",".join(row) for row in ([head] if head else []) + rows).encode()


def written(name: str, text: bytes, read: Callable[[Path], object]) -> bool:
    """Whether what reads a file takes this text."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / name
        path.write_bytes(text)
        try:
            read(path)
        except HtsrError:
            return False
    return True


def rows(text: bytes) -> bool:
    from htsr_alloc.training.rows import read_rows

    return written("rows.jsonl", text, read_rows)


def study(text: bytes) -> bool:
    from htsr_alloc.training.study.plan import read_study

    return written("study.yaml", text, read_study)


def scores(suffix: str) -> Callable[[bytes], bool]:
    from htsr_alloc.allocation.scorefile import read_scores

    return lambda text: written(f"scores{suffix}", text, read_scores)


def adapters() -> tuple[Any, Callable[[bytes], bool]]:
    """The configuration of a plain LoRA and of a LoRA-MoE, each opened on a tiny model."""
    import atexit
    import shutil

    from helpers import moe_tiny
    from htsr_alloc.allocation import allocate
    from htsr_alloc.training.methods import Adapter
    from htsr_alloc.training.models import open_adapter

    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place)
    texts = []
    for system in ("lora", "alphalora"):
        given = Adapter(system, r=2, target=("q_proj",))
        made = given.put_on(moe_tiny.llama(), allocate(None, strategy="explicit", experts=(2, 2)))
        made.save_pretrained(str(place / system))
        texts.append((place / system / "adapter_config.json").read_text())

    def read(text: bytes) -> bool:
        system = "alphalora" if b"LORA_MOE" in text.upper() else "lora"
        path = place / system / "adapter_config.json"
        path.write_bytes(text)
        try:
            open_adapter(moe_tiny.llama(), path.parent)
        except HtsrError:
            return False
        return True

    strategies = [changed(text) for text in texts]
    return strategies[0] | strategies[1] | st.binary(max_size=50), read


LATE = {"adapter": adapters}  # made when asked for: it loads transformers
SLOW = {"adapter": 40}  # a model is made for each input
