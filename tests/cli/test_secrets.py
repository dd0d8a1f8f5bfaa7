"""A token that is given to the command is in no output, file or child of it.

The command line itself can be read by others, as the help of --token says.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.hub_server import SIGNATURE
from helpers.hubs import CANARY, client, client_environment

from htsr_alloc.cli.secrets import HIDDEN, redacted


def nowhere(folder, *texts):
    for text in texts:
        assert CANARY not in text
        assert SIGNATURE not in text
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert CANARY.encode() not in data, path
            assert SIGNATURE.encode() not in data, path


FAILURES = {
    "an answer that repeats the token": {"path": "/api/", "do": "status", "status": 400},
    "a store that refuses": {"path": "/cdn/", "do": "status", "status": 403, "skip": 3},
    "a damaged shard": {"path": "/cdn/.*00001-of", "do": "corrupt", "at": 99_999, "skip": 1},
    "a store that stays busy": {"path": "/cdn/", "do": "status", "status": 500, "times": 99},
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_with_its_traceback_shows_no_token(tiny_hub, tmp_path, name):
    tiny_hub.reset(FAILURES[name])
    given = {"HF_TOKEN": CANARY} if "busy" in name else {}
    args = [] if given else ["--token", CANARY]
    way = ["--stream"] if "refuses" in name else []
    arguments = ["analyze", "org/tiny", *way, *args]
    done = client(tiny_hub.url, tmp_path, *arguments, HTSR_DEBUG="1", **given)
    assert done.rc == 1
    assert "Traceback" in done.stderr  # as HTSR_DEBUG=1 asks for
    assert tiny_hub.requests[0]["authorization"] == f"Bearer {CANARY}"
    nowhere(tmp_path, done.stdout, done.stderr)


def test_the_journal_and_the_threads_of_a_killed_run_show_no_token(tiny_hub, tmp_path):
    tiny_hub.reset(
        {"path": "/cdn/", "do": "slow", "chunk": 2000, "wait": 0.05, "skip": 9, "times": 99}
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "htsr_alloc", "analyze", "org/tiny", "--stream", "--token", CANARY],
        cwd=tmp_path,
        env=client_environment(tiny_hub.url, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        journal, deadline = tmp_path / "tiny.journal", time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        own = Path(f"/proc/{process.pid}")
        if own.exists():
            children = [path.read_text() for path in own.glob("task/*/children")]
            assert set(children) == {""}  # none that could show it
            assert CANARY not in "".join(p.read_text() for p in own.glob("task/*/comm"))
    finally:
        process.kill()
        stdout, stderr = process.communicate()
    nowhere(tmp_path, stdout, stderr)


def test_every_token_that_is_known_is_taken_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    text = "a hf_given b hf_of_the_environment c"
    assert redacted(text, "hf_given") == f"a {HIDDEN} b {HIDDEN} c"
    signed = f"<GET 'https://store/x?signature={SIGNATURE}&a=b'> failed"
    assert redacted(signed, None) == "<GET 'https://store/x?...'> failed"
    assert redacted(text, None) == f"a hf_given b {HIDDEN} c"


def test_help_recommends_the_environment(invoke):
    assert "Better set HF_TOKEN" in " ".join(invoke("analyze", "--help").stdout.split())
