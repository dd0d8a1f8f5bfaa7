"""Checkpoints as made by mistake or by an attacker.

Each entry of ``BAD`` writes one into a folder and returns the command's arguments; the command must
end with exit code 1, one sentence, no traceback. ``bad_json`` adds metrics and allocations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Build = Callable[[Path], list[object]]
BAD: dict[str, Build] = {}
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
NAME = "h.0.a.weight"


def bad(name: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        BAD[name] = build
        return build

    return add


def entry(shape: Any = (2, 2), offsets: Any = (0, 16), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(path: Path, header: bytes, data: bytes = bytes(16), length: int | None = None) -> Path:
    """A file with this header, right or wrong; ``length`` is the length that the file states."""
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return path


def weights(path: Path, tensors: dict[str, Any], data: bytes = bytes(16)) -> Path:
    return raw(path, json.dumps(tensors).encode(), data)


def good(path: Path, names: tuple[str, ...] = (NAME,)) -> Path:
    places = {name: entry(offsets=(16 * i, 16 * i + 16)) for i, name in enumerate(names)}
    return weights(path, places, bytes(16 * len(names)))


def bad_file(name: str, make: Callable[[Path], object]) -> None:
    """A single broken ``model.safetensors``."""

    def build(folder: Path) -> list[object]:
        make(folder / "model.safetensors")
        return ["inspect", folder]

    BAD[name] = build


def bad_header(name: str, tensors: Any, data: bytes = bytes(16)) -> None:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    bad_file(f"header: {name}", lambda path: raw(path, text, data))


# --- headers --------------------------------------------------------------------------------

HUGE = 10**4000
bad_file("header: claims exabytes", lambda path: raw(path, b"{}", length=1 << 60))
bad_file("header: longer than the file", lambda path: raw(path, b"{}", length=1000))
bad_file("header: a byte longer than the format allows", lambda p: sparse(p, 100_000_001))
bad_file("header: an empty file", lambda path: path.write_bytes(b""))
bad_file("header: seven bytes", lambda path: path.write_bytes(bytes(7)))
bad_file("header: of length zero", lambda path: raw(path, b""))
bad_header("not JSON", b"{,}")
bad_header("not UTF-8", b'{"\xff": 1}')
bad_header("UTF-16", '{"a": 1}'.encode("utf-16"))
bad_header("a list", b"[]")
bad_header("a number", b"17")
bad_header("a tensor's description in place of tensors", json.dumps(entry()).encode())
bad_header("nested a million deep", b'{"a":' * 1_000_000)
bad_header("a list a million deep", b'{"a":' + b"[" * 1_000_000)
bad_header("a number of a million digits", b'{"a": 1' + b"0" * 1_000_000 + b"}")
bad_header("NaN for an offset", b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [NaN, 4]}}')
bad_header("no tensors for the data", {})
bad_header("a string for a tensor", {NAME: "F32"})
bad_header("no dtype", {NAME: {"shape": [2, 2], "data_offsets": [0, 16]}})
bad_header("an unknown dtype", {NAME: entry(dtype="F33")})
bad_header("a dtype that is a list", {NAME: entry(dtype=["F32"])})
bad_header("the wrong dtype for its bytes", {NAME: entry(dtype="F64")})
bad_header("a negative length", {NAME: entry(shape=[-2, -2])})
bad_header("a length of 4000 digits", {NAME: entry(shape=[HUGE, 0])})
bad_header("lengths that overflow 64 bits", {NAME: entry(shape=[2**63, 2**63])})
bad_header("lengths that are fractions", {NAME: entry(shape=[2.0, 2.0])})
bad_header("lengths that are true", {NAME: entry(shape=[True, 4])})
bad_header("lengths that are not a list", {NAME: entry(shape="22")})
bad_header("offsets out of the file", {NAME: entry(offsets=[0, 1 << 40], shape=[1 << 38])})
bad_header("offsets of 4000 digits", {NAME: entry(offsets=[HUGE, HUGE + 16])})
bad_header("offsets in the wrong order", {NAME: entry(offsets=[16, 0])})
bad_header("negative offsets", {NAME: entry(offsets=[-16, 0])})
bad_header("three offsets", {NAME: entry(offsets=[0, 8, 16])})
bad_header("overlapping tensors", {NAME: entry(), "h.0.b.weight": entry()})
bad_header("half overlapping", {NAME: entry(), "b": entry(offsets=[8, 24])}, bytes(24))
bad_header("a gap between tensors", {NAME: entry(), "b": entry(offsets=[20, 36])}, bytes(36))
bad_header("data after the last tensor", {NAME: entry()}, bytes(17))
bad_header("data missing", {NAME: entry()}, bytes(15))
bad_header("metadata that is a number", {"__metadata__": 3, NAME: entry()})
bad_header("metadata that holds lists", {"__metadata__": {"a": []}, NAME: entry()})
bad_header("a name twice", b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2))
bad_header("a key twice", b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2, 2]}}')


def sparse(path: Path, length: int) -> None:
    raw(path, b"", b"", length)
    os.truncate(path, length + 8)


@bad("header: a million names, the last twice")
def _(folder: Path) -> list[object]:
    names = ",".join(f'"{i}": 0' for i in range(1_000_000))
    raw(folder / "model.safetensors", f'{{{names},"999999": 0}}'.encode())
    return ["inspect", folder]


# --- files that are none --------------------------------------------------------------------


@bad("file: a pipe")
def _(folder: Path) -> list[object]:
    os.mkfifo(folder / "model.safetensors")
    return ["inspect", folder]


@bad("file: a folder")
def _(folder: Path) -> list[object]:
    (folder / "model.safetensors").mkdir()
    return ["inspect", folder]


@bad("file: a link to an endless device")
def _(folder: Path) -> list[object]:
    (folder / "model.safetensors").symlink_to("/dev/zero")
    return ["inspect", folder]


@bad("file: a link to itself")
def _(folder: Path) -> list[object]:
    (folder / "model.safetensors").symlink_to("model.safetensors")
    return ["inspect", folder]


@bad("file: a link to a text outside, which is not shown")
def _(folder: Path) -> list[object]:
    (folder / "model.safetensors").symlink_to("/etc/passwd")
    return ["inspect", folder]


@bad("file: a configuration that links to a text outside")
def _(folder: Path) -> list[object]:
    good(folder / "model.safetensors")
    (folder / "config.json").symlink_to("/etc/passwd")
    return ["inspect", folder]


@bad("file: pickled weights")
def _(folder: Path) -> list[object]:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    return ["inspect", folder]


@bad("file: a name that is not UTF-8, and no weights")
def _(folder: Path) -> list[object]:
    (folder / os.fsdecode(b"\xff\xfe.bin")).write_bytes(b"")
    return ["inspect", folder]


# --- indexes --------------------------------------------------------------------------------


def bad_index(name: str, index: Any) -> None:
    def build(folder: Path) -> list[object]:
        good(folder / "a.safetensors")
        good(folder.parent / "outside.safetensors", ("h.0.b.weight",))
        text = index if isinstance(index, bytes) else json.dumps(index).encode()
        (folder / "model.safetensors.index.json").write_bytes(text)
        return ["inspect", folder]

    BAD[f"index: {name}"] = build


def maps(**files: Any) -> dict[str, Any]:
    return {"weight_map": {NAME: "a.safetensors", "h.0.b.weight": files["b"]}}


bad_index("out of its folder", maps(b="../outside.safetensors"))
bad_index("an absolute path", maps(b="/etc/outside.safetensors"))
bad_index("a path that backs out", maps(b="..\\outside.safetensors"))
bad_index("a drive", maps(b="C:outside.safetensors"))
bad_index("a zero byte", maps(b="a\0.safetensors"))
bad_index("a folder below", maps(b="sub/b.safetensors"))
bad_index("a missing shard", maps(b="b.safetensors"))
bad_index("a name of a megabyte", maps(b="b" * (1 << 20) + ".safetensors"))
bad_index("terminal escapes in a name", maps(b=f"{ESCAPE}.safetensors"))
bad_index("a lone surrogate in a name", maps(b="\ud800.safetensors"))
bad_index("a tensor that its shard has not", maps(b="a.safetensors"))
bad_index("a pickle", maps(b="b.bin"))
bad_index("a number for a shard", maps(b=7))
bad_index("no map", {"metadata": {}})
bad_index("an empty map", {"weight_map": {}})
bad_index("not JSON", b"{")
bad_index("not UTF-8", b'{"weight_map": {"\xff": "a.safetensors"}}')
bad_index("nested a million deep", b"[" * 1_000_000)
bad_index("a number of a million digits", b'{"weight_map": 1' + b"0" * 1_000_000 + b"}")


@bad("index: larger than is read of one")
def _(folder: Path) -> list[object]:
    good(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(b"{}")
    os.truncate(folder / "model.safetensors.index.json", 200_000_000)
    return ["inspect", folder]


@bad("shards: a tensor in two of them")
def _(folder: Path) -> list[object]:
    good(folder / "a.safetensors")
    good(folder / "b.safetensors")
    return ["inspect", folder]


@bad("shards: one of three missing, no index")
def _(folder: Path) -> list[object]:
    for i in (1, 3):
        good(folder / f"model-0000{i}-of-00003.safetensors", (f"h.{i}.a.weight",))
    return ["inspect", folder]


# --- configurations -------------------------------------------------------------------------


def bad_config(name: str, text: bytes) -> None:
    def build(folder: Path) -> list[object]:
        good(folder / "model.safetensors")
        (folder / "config.json").write_bytes(text)
        return ["inspect", folder]

    BAD[f"config: {name}"] = build


bad_config("not JSON", b"{,}")
bad_config("a list", b"[1]")
bad_config("nested a million deep", b'{"a":' * 1_000_000)
bad_config("a number of a million digits", b'{"n_layer": 1' + b"0" * 1_000_000 + b"}")


# --- tensors --------------------------------------------------------------------------------


@bad("tensors: a block of an absurd number")
def _(folder: Path) -> list[object]:
    good(folder / "model.safetensors", ("model.layers.999999999.a.weight",))
    return ["inspect", folder]


@bad("tensors: two billion experts of no size")
def _(folder: Path) -> list[object]:
    places = {"h.0.experts.w": entry((1 << 31, 0, 4), (0, 0))}
    weights(folder / "model.safetensors", places, b"")
    return ["analyze", folder]


@bad("tensors: a million experts of a byte")
def _(folder: Path) -> list[object]:
    places = {"h.0.experts.w": entry((1_000_000, 1, 1), (0, 1_000_000), "F8_E4M3")}
    weights(folder / "model.safetensors", places, bytes(1_000_000))
    return ["inspect", folder]


@bad("tensors: a name of 60,000 parts")
def _(folder: Path) -> list[object]:
    good(folder / "model.safetensors", ("x" + ".0" * 60_000 + ".weight",))
    return ["inspect", folder]


@bad("tensors: half of a surrogate pair in a name")
def _(folder: Path) -> list[object]:
    good(folder / "model.safetensors", ("h.0.\ud800.weight",))
    return ["analyze", folder]


@bad("settings: a billion bins")
def _(folder: Path) -> list[object]:
    good(folder / "model.safetensors")
    return ["analyze", folder, "--bins", 1_000_000_000]


@bad("output: the weights themselves")
def _(folder: Path) -> list[object]:
    good(folder / "model.safetensors")
    return ["analyze", folder, "-o", folder / "model.safetensors"]


@bad("tensors: nothing but 0-d, 1-d and 4-d ones")
def _(folder: Path) -> list[object]:
    shapes: list[Any] = [[], [1], [1, 1, 1, 1]]
    places = {f"h.{i}.a.weight": entry(s, (4 * i, 4 * i + 4)) for i, s in enumerate(shapes)}
    weights(folder / "model.safetensors", places, bytes(12))
    return ["analyze", folder]


@bad("tensors: a scale that fits nothing")
def _(folder: Path) -> list[object]:
    places = {NAME: entry((4, 4), (0, 16), "F8_E4M3")}
    places[f"{NAME}_scale"] = entry((3, 3), (16, 52))
    weights(folder / "model.safetensors", places, bytes(52))
    return ["analyze", folder]


@bad("tensors: one of a terabyte in a sparse file")
def _(folder: Path) -> list[object]:
    side = 1 << 19
    text = json.dumps({NAME: entry((side, side), (0, 4 * side * side))}).encode()
    raw(folder / "model.safetensors", text, b"")
    os.truncate(folder / "model.safetensors", 8 + len(text) + 4 * side * side)
    return ["analyze", folder]
