"""torchrun: several gloo processes on this machine, one result."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import environment, llama, write_shards

from htsr_alloc.analysis.distributed import Processes


def analyze(folder: Path, ranks: int, *arguments: str, start_only: bool = False):
    """``htsr analyze ../model`` in ``folder``, by ``ranks`` processes."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    command = [sys.executable, "-m", *(torchrun if ranks > 1 else []), "htsr_alloc", "analyze"]
    process = subprocess.Popen(
        [*command, "../model", *arguments],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if start_only:
        return process
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    return stdout


def result(folder: Path) -> tuple[bytes, dict]:
    """The spectra's bytes, and the metrics without the time."""
    metrics = json.loads((folder / "model.metrics.json").read_text())
    del metrics["tool"]["created"]
    return (folder / "model.spectra.safetensors").read_bytes(), metrics


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A model in ``model`` and one process's result in ``alone``, side by side; large enough
    for a run to take a second or two, so that it can be killed."""
    root = tmp_path_factory.mktemp("ranks")
    write_shards(root / "model", [llama(layers=6, width=448, inner=512)])
    (root / "alone").mkdir()
    analyze(root / "alone", 1)
    return root


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds ranks through /proc")


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_give_one_processes_bytes(alone, ranks):
    folder = alone / f"ranks{ranks}"
    folder.mkdir()
    stdout = analyze(folder, ranks)
    assert result(folder) == result(alone / "alone")
    assert stdout.count("model.layers.5") == 1  # the first rank alone speaks
    assert sorted(p.name for p in folder.iterdir()) == [
        "model.metrics.json",
        "model.spectra.safetensors",
    ]


def test_a_killed_rank_loses_nothing_that_another_run_does_not_take_up(alone):
    folder = alone / "killed"
    folder.mkdir()
    process = analyze(folder, 2, start_only=True)
    deadline = time.monotonic() + 60
    journals = [folder / "model.journal", folder / "model.journal.rank1"]
    while time.monotonic() < deadline and process.poll() is None:
        lines = [p.read_bytes().count(b"\n") if p.exists() else 0 for p in journals]
        if min(lines) >= 2:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)  # one rank; torchrun then ends the others
    process.communicate()
    assert process.returncode != 0
    kept = [p.read_bytes() for p in journals if p.exists()]
    assert len(kept) == 2, "the run had ended before it could be killed"
    for journal in journals:  # what is in the journals is used, not computed again
        first, *lines = journal.read_bytes().splitlines()
        header, marked = first.rpartition(b" ")[0], [first]
        for line in lines:
            text = line.rpartition(b" ")[0].replace(b'"engine": "', b'"engine": "kept: ')
            marked.append(text + b" " + hashlib.sha256(header + text).hexdigest().encode())
        journal.write_bytes(b"\n".join([*marked, b""]))
    finished = sum(text.count(b'"sha256"') for text in kept)
    assert finished >= 2
    analyze(folder, 1)
    spectra, metrics = result(folder)
    kept_engines = [m for m in metrics["matrices"] if m["engine"].startswith("kept: ")]
    assert len(kept_engines) == finished
    for matrix in kept_engines:
        matrix["engine"] = matrix["engine"].removeprefix("kept: ")
    assert (spectra, metrics) == result(alone / "alone")
    assert not list(folder.glob("*.journal*"))


def test_shares_are_disjoint_complete_and_even():
    costs = [float(i % 7 + 1) ** 3 for i in range(50)]
    shares = [Processes(r, 4).take(range(50), lambda i: costs[i]) for r in range(4)]
    assert sorted(i for share in shares for i in share) == list(range(50))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs)
    assert Processes().take(range(3), float) == [0, 1, 2]


ALONE = """
from datetime import timedelta
from htsr_alloc.analysis import distributed
distributed.TO_MEET, distributed.SILENCE = timedelta(seconds={seconds}), 0.5
from htsr_alloc.cli.main import main
main()
"""


def one_of_two(folder: Path, seconds: int) -> subprocess.Popen:
    """The first of two processes; the second never starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", ALONE.format(seconds=seconds), "analyze", "../model"],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1", **place),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_wait_for_a_missing_rank_is_said_and_ends_by_a_signal(alone, number, code):
    process = one_of_two(alone / "alone", 600)
    lines = iter(process.stderr)
    assert any("Rank 0 of 2 waits for the others, at most 600 s." in line for line in lines)
    process.send_signal(number)
    start = time.monotonic()
    process.communicate(timeout=20)
    assert process.returncode == code
    assert time.monotonic() - start < 10


def test_a_missing_rank_is_a_sentence_after_the_time_that_was_said(alone):
    _, said = one_of_two(alone / "alone", 3).communicate(timeout=60)
    assert "error: Rank 0 of 2 did not meet the others within 3 s" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "wrong",
    [
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "-1"},
        {"WORLD_SIZE": "2", "RANK": "x"},
        {"WORLD_SIZE": "2", "RANK": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},  # and no MASTER_ADDR
        {"LOCAL_WORLD_SIZE": "0"},
    ],
)
def test_variables_of_the_environment_that_are_wrong_are_a_sentence(
    model, invoke, monkeypatch, wrong
):
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    done = invoke("analyze", model)
    assert done.rc == 1
    assert done.stderr.count("error: ") == 1
