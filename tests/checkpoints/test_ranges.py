"""Ranges of a hub's file by the real client, from a server that fails on demand."""

import hashlib
import time

import numpy as np
import pytest
from helpers.hubs import COMMIT, NOWHERE, serving

from htsr_alloc.checkpoints import ranges
from htsr_alloc.checkpoints.ranges import TRIES, Ranges, RemoteFile
from htsr_alloc.errors import HtsrError

NAME = "model.safetensors"
DATA = np.random.default_rng(0).bytes(5_000_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranges")
    (folder / "tiny").mkdir()
    (folder / "tiny" / NAME).write_bytes(DATA)
    with serving(folder) as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch):
    monkeypatch.setattr(ranges, "FIRST_WAIT", 0.01)
    server.reset()
    return server


def remote(hub, **changes):
    values = {
        "url": f"{hub.url}/org/tiny/resolve/{COMMIT}/{NAME}",
        "name": NAME,
        "commit": COMMIT,
        "nbytes": len(DATA),
        "sha256": hashlib.sha256(DATA).hexdigest(),
    }
    return RemoteFile(**{**values, **changes})


def read(hub, begin, length, **changes):
    buffer = bytearray(length)
    Ranges({}).read(remote(hub, **changes), begin, memoryview(buffer))
    return bytes(buffer)


def asked(hub):
    return [r["range"] for r in hub.requests if "/cdn/" in r["path"]]


def test_a_range_is_asked_for_once_and_is_the_files_own_bytes(hub):
    for begin, length in ((0, 1), (0, len(DATA)), (3_000_001, 12_345), (len(DATA) - 1, 1)):
        hub.reset()
        assert read(hub, begin, length) == DATA[begin : begin + length]
        assert asked(hub) == [f"bytes={begin}-{begin + length - 1}"]


@pytest.mark.parametrize("kind", ["cut", "short"])
def test_a_cut_connection_goes_on_where_it_was_cut(hub, kind):
    hub.reset({"path": "/cdn/", "do": kind, "after": 1_500_000, "times": 2})
    assert read(hub, 10, 4_000_000) == DATA[10:4_000_010]
    ends = "-4000009"
    assert asked(hub) == [f"bytes={10 + at}{ends}" for at in (0, 1_500_000, 3_000_000)]


def test_a_connection_that_is_always_cut_at_once_ends_in_a_bounded_time(hub):
    hub.reset({"path": "/cdn/", "do": "short", "after": 100, "times": 1000})
    with pytest.raises(HtsrError, match="ends at byte 600 of model"):
        read(hub, 0, 1_000_000)
    assert len(asked(hub)) == TRIES


def test_a_connection_that_is_cut_often_but_gets_on_is_followed(hub):
    hub.reset({"path": "/cdn/", "do": "cut", "after": 1 << 20, "times": 1000})
    assert read(hub, 0, len(DATA)) == DATA


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(hub, status):
    hub.reset({"path": "/resolve/", "do": "status", "status": status, "times": TRIES - 1})
    assert read(hub, 0, 100) == DATA[:100]


def test_what_the_server_asks_us_to_wait_is_waited(hub):
    busy = {"status": 429, "headers": {"Retry-After": "1"}}
    hub.reset({"path": "/resolve/", "do": "status", **busy})
    start = time.monotonic()
    assert read(hub, 0, 100) == DATA[:100]
    assert time.monotonic() - start >= 1


def test_a_long_wait_is_said_and_one_that_is_too_long_is_refused(hub, monkeypatch, caplog):
    waits = []
    monkeypatch.setattr(ranges.time, "sleep", waits.append)
    for seconds in ("60", "3600"):
        busy = {"status": 429, "headers": {"Retry-After": seconds}}
        hub.reset({"path": "/resolve/", "do": "status", **busy})
        if seconds == "60":
            assert read(hub, 0, 100) == DATA[:100]
        else:
            with pytest.raises(Exception, match="429"):
                read(hub, 0, 100)
    assert waits == [60.0]
    assert "The hub asks to wait for 60 s." in caplog.text


def test_a_server_that_never_answers_is_given_up(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(ranges, "PATIENCE", 0.5)
    hub.reset({"path": "/resolve/", "do": "hang", "seconds": 1, "times": 1000})
    start = time.monotonic()
    with pytest.raises(Exception, match="timed out"):
        read(hub, 0, 100)
    assert time.monotonic() - start < 2
    time.sleep(1)
    assert len(hub.requests) >= 2  # and no answer is still to come


def test_a_server_that_drips_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(ranges, "GRACE", 0.3)
    monkeypatch.setattr(ranges, "PATIENCE", 0.5)
    hub.reset({"path": "/cdn/", "do": "slow", "chunk": 1, "wait": 0.1, "times": 1000})
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        read(hub, 0, 100)
    assert time.monotonic() - start < 3
    assert len(hub.requests) >= 2  # and no answer is still being given


def test_headers_that_drip_are_given_up(hub, monkeypatch):
    """Each byte is within the client's own time-out, and the header would take two seconds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    drip = {"path": "/cdn/", "do": "drip", "wait": 0.1, "bytes": 20}
    hub.reset(drip)
    start = time.monotonic()
    assert read(hub, 5, 100) == DATA[5:105]  # the second try is answered
    assert 0.5 < time.monotonic() - start < 1.8
    monkeypatch.setattr(ranges, "PATIENCE", 0.5)
    hub.reset({**drip, "times": 1000})
    with pytest.raises(TimeoutError, match="no whole header"):
        read(hub, 0, 100)
    time.sleep(2)
    assert len(hub.requests) >= 2  # and no answer is still being given


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_asked_again(hub, status):
    hub.reset({"path": "/resolve/", "do": "status", "status": status, "times": 1000})
    with pytest.raises(Exception, match=str(status)):
        read(hub, 0, 100)
    assert len(hub.requests) == 1


def test_a_server_that_stays_busy_is_given_up(hub):
    hub.reset({"path": "/resolve/", "do": "status", "status": 503, "times": 1000})
    with pytest.raises(Exception, match="503"):
        read(hub, 0, 100)
    assert len(hub.requests) == TRIES


def test_a_server_that_is_not_there_is_given_up(hub):
    with pytest.raises(Exception, match="refused"):
        read(hub, 0, 100, url=NOWHERE)


def test_slow_bytes_arrive(hub):
    hub.reset({"path": "/cdn/", "do": "slow", "chunk": 40, "wait": 0.01})
    assert read(hub, 7, 2000) == DATA[7:2007]
    assert len(asked(hub)) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"do": "whole"}, "does not send ranges"),
        ({"do": "long"}, "sent more of model.safetensors than was asked for"),
        ({"do": "size"}, "has 5000001 bytes; the hub's listing says 5000000"),
        ({"do": "commit"}, "changed while it was read"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(hub, fault, said):
    path = "/resolve/" if fault["do"] == "commit" else "/cdn/"
    hub.reset({"path": path, **fault})
    with pytest.raises(HtsrError, match=said):
        read(hub, 0, 100)


def test_another_file_under_the_same_name_is_refused(hub):
    with pytest.raises(HtsrError, match="changed while it was read"):
        read(hub, 0, 100, sha256="0" * 64)
    with pytest.raises(HtsrError, match="has 5000000 bytes; the hub's listing says 4"):
        read(hub, 0, 4, nbytes=4)
