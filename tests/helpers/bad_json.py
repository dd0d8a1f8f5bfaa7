"""Invalid metrics, allocations and journals; importing them adds them to ``BAD``."""

from __future__ import annotations

from pathlib import Path

from helpers.bad_inputs import BAD, ESCAPE, bad, good


def bad_json(name: str, text: bytes) -> None:
    def metrics(folder: Path) -> list[object]:
        (folder / "x.metrics.json").write_bytes(text)
        return ["allocate", folder / "x.metrics.json", "--T", 4]

    def allocation(folder: Path) -> list[object]:
        (folder / "x.json").write_bytes(text)
        return ["export", folder / "x.json", "--to", "mola"]

    BAD[f"metrics: {name}"], BAD[f"allocation: {name}"] = metrics, allocation


START = b'{"format": "htsr.allocation", "version": 1, "budget": '
bad_json("empty", b"")
bad_json("not JSON", b"{,}")
bad_json("not UTF-8", b"\xff\xfe\xfd")
bad_json("a list a million deep", b"[" * 1_000_000)
bad_json("objects a million deep", b'{"a":' * 1_000_000)
bad_json("a number of a million digits", START + b"1" + b"0" * 1_000_000 + b"}")
bad_json("a number of 4299 digits", START + b"9" * 4299 + b', "experts": [1], "top_k": [1]}')
bad_json("NaN", START + b"NaN}")
bad_json("Infinity", START + b"-Infinity}")
bad_json("1e999", START + b"1e999}")
bad_json("a key twice", b'{"format": "htsr.allocation", "format": "htsr.metrics"}')
bad_json("a million keys, the last twice", b'{"a": %b, "a": 1}' % (b"[" + b"0," * 10**6 + b"0]"))
bad_json("a newer version", b'{"format": "htsr.metrics", "version": 99}')
bad_json("another format", b'{"format": "%b", "version": 1}' % ESCAPE.encode("unicode_escape"))
bad_json("no version", b'{"format": "htsr.metrics"}')
bad_json("nothing in it", b'{"format": "htsr.metrics", "version": 1}')
bad_json("escapes in a key", b'{"format": "htsr.metrics", "version": 1, "\\u001b[2J": 1}')


@bad("metrics: an endless device")
def _(folder: Path) -> list[object]:
    return ["allocate", "/dev/zero", "--T", 4]


@bad("metrics: a folder")
def _(folder: Path) -> list[object]:
    return ["allocate", folder, "--T", 4]


@bad("journal: somebody else's file")
def _(folder: Path) -> list[object]:
    good(folder / "model.safetensors")
    (folder / "x.journal").write_text("Dear diary\n")
    return ["analyze", folder, "-o", folder / "x.json"]
