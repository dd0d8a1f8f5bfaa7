"""The loopback hub as tests use it: started in a process of its own, asked, given faults."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.commands import Result, environment, llama, write_shards
from helpers.hub_server import COMMITS, REFS, TOKEN

COMMIT, OLD_COMMIT, NEXT_COMMIT = COMMITS["tiny"], COMMITS["old"], COMMITS["next"]
CANARY = TOKEN
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens
FILES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
WAYS = {"stream": ["--stream"], "drop": ["--drop-shards"], "keep": []}
RETRY = {"headers": {"Retry-After": "1"}}
GAUNTLET = [
    {"path": "/api/", "do": "status", "status": 502},
    {"path": "/cdn/.*00001-of", "do": "cut", "after": 700},  # in the header
    {"path": "/cdn/.*00003-of", "do": "cut", "after": 9000, "skip": 1},  # in the weights
    {"path": "/cdn/.*00002-of", "do": "slow", "chunk": 5000, "wait": 0.02, "times": 2},
    {"path": "/resolve/.*00002-of", "do": "status", "status": 503, "skip": 1},
    {
        "path": "/resolve/",
        "do": "status",
        "status": 429,
        "skip": 4,
        "headers": {"Retry-After": "1"},
    },
]


class Hub:
    """A running server; ``folder`` holds the files of its only repository."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Every request since ``reset``, in the order of their ends."""
        return json.loads(self._ask("/_requests"))

    def downloads(self) -> list[tuple[str, float, float]]:
        """Whole files that came from the store: (name, start, end)."""
        whole = [r for r in self.requests if r["range"] is None and r["sent"] > 0]
        store = [r for r in whole if "/cdn/" in r["path"]]
        return [(r["path"].rpartition("/")[2], r["start"], r["end"]) for r in store]

    def reset(self, *faults: dict[str, Any], **changes: Any) -> None:
        """Forget requests; these faults are to come."""
        state = {"requests": [], "faults": faults, "refs": REFS, **changes}
        self._ask("/_control", json.dumps(state).encode())

    def _ask(self, path: str, data: bytes | None = None) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, data, timeout=10) as answer:
            return answer.read()


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub with the folder ``tiny`` inside ``folder`` as ``org/tiny``."""
    server = Path(__file__).with_name("hub_server.py")
    process = subprocess.Popen(
        [sys.executable, str(server), str(folder)], stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout is not None
    try:
        yield Hub(process.stdout.readline().strip(), folder / "tiny")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def client_environment(url: str, home: Path, **changes: str) -> dict[str, str]:
    """The environment of a client of this hub, with an empty home."""
    values = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return environment(**{**values, **changes})


def client(url: str, cwd: Path, *args: object, **changes: str) -> Result:
    """The command in a process of its own, with this hub."""
    done = subprocess.run(
        [sys.executable, "-m", "htsr_alloc", *map(str, args)],
        cwd=cwd,
        env=client_environment(url, cwd, **changes),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def sentence(result: Result) -> str:
    """The error's line, after checking that it is a single one."""
    assert result.rc == 1, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert errors[0].endswith(".")
    return errors[0]


def model_files(folder: Path, seed: int = 0) -> Path:
    """A tiny LLaMA of three layers in three shards."""
    parts: list[dict[str, Any]] = [{}, {}, {}]
    for name, tensor in llama(3, seed=seed).items():
        # The second shard has one matrix, so that two workers want two shards at the same time.
        shard = 2 if "layers.2" in name else int(name == "model.layers.1.mlp.up_proj.weight")
        parts[shard][name] = tensor
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3}
    return write_shards(folder, parts, config=config)


def facts(path: Path) -> dict[str, Any]:
    """A metrics file without what may differ between sources: time, name, revision, file name."""
    data = json.loads(path.read_text())
    del data["spectra"]["file"]
    del data["tool"]["created"], data["model"]["name"], data["model"]["revision"]
    return data


def listed(**changes: Any) -> list[dict[str, Any]]:
    """One file as a listing has it, with these changes."""
    return [{"rfilename": "model.safetensors", "size": 8, "blobId": "a" * 40, **changes}]


LISTING, ANALYZE = "/api/models", ["analyze", "org/tiny", "-q"]
UP = "../../../../../../victim"
# name -> (fault of the server, the command)
HOSTILE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an ETag that is a path": (
        {
            "path": "/resolve/|/cdn/",
            "do": "change",
            "headers": {"ETag": f'"{UP}"', "X-Linked-Etag": f'"{UP}"'},
            "times": 1000,
            "harmless": True,  # an ETag is not used in a path
        },
        ANALYZE,
    ),
    "a commit that is a path": (
        {"path": LISTING, "do": "change", "listing": {"sha": UP}},
        ANALYZE,
    ),
    "a blob that is a path": (
        {"path": LISTING, "do": "change", "listing": {"siblings": listed(blobId=UP)}},
        ANALYZE,
    ),
    "a hash that is a path": (
        {"path": LISTING, "do": "change", "listing": {"siblings": listed(lfs={"sha256": UP})}},
        ANALYZE,
    ),
    "a file's name that is a path": (
        {"path": LISTING, "do": "change", "listing": {"siblings": listed(rfilename=UP)}},
        ANALYZE,
    ),
    "a listing that is a bomb": ({"path": LISTING, "do": "bomb", "bytes": 1 << 28}, ANALYZE),
    "a listing without end": (
        {"path": LISTING, "do": "body", "body": " " * 110_000_000},
        ANALYZE,
    ),
    "a small file that is a bomb": (
        {"path": "config.json", "do": "bomb", "bytes": 1 << 28},
        ANALYZE,
    ),
    "a small file that is large": (
        {"path": "config.json", "do": "body", "body": "{}" * 10_000_000},
        ANALYZE,
    ),
    "a small file of another content": (
        {"path": "config.json", "do": "corrupt", "at": 3},
        ANALYZE,
    ),
    "a shard that is a bomb": (
        {"path": "/cdn/.*00003-of", "do": "bomb", "bytes": 1 << 28, "skip": 1},
        ANALYZE,
    ),
    "an error that is a bomb": (
        {
            "path": LISTING,
            "do": "status",
            "status": 404,
            "headers": {"Content-Encoding": "gzip", "X-Error-Code": "RepoNotFound"},
        },
        ANALYZE,
    ),
}


def hostile_cases() -> list[bytes]:
    """Invalid listings."""
    wrong: list[Any] = [None, [], {}, 7, "x", {"sha": COMMIT}, {"sha": COMMIT, "siblings": {}}]
    wrong += [
        {"sha": sha, "siblings": []} for sha in (None, 7, "", "main", COMMIT + "\n", [COMMIT])
    ]
    files = [{"size": size} for size in (None, -1, 1.5, "8", True, [8], {})]
    files += [{"blobId": blob} for blob in (None, 7, "", "../x", "A" * 40, "a" * 39, ["a" * 40])]
    files += [{"lfs": large} for large in ({"sha256": 7}, {"sha256": "x"}, {"size": 8}, [1], "x")]
    wrong += [{"sha": COMMIT, "siblings": listed(**change)} for change in files]
    texts = [json.dumps(data).encode() for data in wrong]
    return [*texts, b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"<html></html>"]


def listing_of(text: bytes) -> Any:
    """What the client makes of a listing."""
    from htsr_alloc.checkpoints.hub import HubRanges, _list_files

    class Answers(HubRanges):
        def whole(self, url: str, limit: int, what: str) -> bytes:
            return text

    return _list_files(Answers({}, "org/tiny", None), "org/tiny", None)
