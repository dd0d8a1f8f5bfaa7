"""A command never writes over what it reads, and never waits for a pipe."""

import os

import pytest
from helpers.records_made import ALLOCATION, METRICS

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import dumps
from htsr_alloc.training.rows import read_rows

COMMANDS = {
    "allocate": ("allocate", "m.json", "--T", 8, "-o", "m.json"),
    "allocate's scores": (
        *("allocate", "--strategy", "alphalora", "--scores", "s.json", "--T", 8),
        *("--layers", 2, "-o", "s.json"),
    ),
    "report": ("report", "m.json", "a.json", "-o", "a.json"),
    "export": ("export", "a.json", "--to", "csv", "-o", "a.json"),
    "plot": ("plot", "m.json", "-o", "m.svg"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_input_is_overwritten(tmp_path, invoke, name):
    (tmp_path / "m.json").write_text(dumps(METRICS))
    (tmp_path / "a.json").write_text(dumps(ALLOCATION))
    (tmp_path / "s.json").write_text("[1, 2]")
    (tmp_path / "m.svg").symlink_to("m.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = invoke(*COMMANDS[name])
    assert done.rc == 1
    assert "is read by this command and would be overwritten" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_pipe_that_nobody_writes_to_is_a_sentence(tmp_path, run):
    os.mkfifo(tmp_path / "pipe")
    done = run("allocate", "pipe", "--T", 4, timeout=60)
    assert done.rc == 1
    assert "error: pipe is a pipe." in done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"[" * 100_000, "line 1 is nested too deeply"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "line 1 is not UTF-8"),
        (b'{"prompt": "\xff", "completion": "b"}', "line 1 is not UTF-8"),
        (b'{"prompt": "a", "completion": " "}', "line 1 has an empty completion"),
    ],
)
def test_a_bad_row_is_a_sentence(tmp_path, line, said):
    (tmp_path / "rows.jsonl").write_bytes(line)
    with pytest.raises(HtsrError, match=said):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\t=1", "\r=1"])
def test_a_name_in_csv_is_no_formula(name):
    import csv
    import dataclasses
    import io

    from htsr_alloc.allocation.exports import EXPORTS
    from htsr_alloc.records.lora import Lora

    row = dataclasses.replace(ALLOCATION.evidence[0], prefix=name)
    made = dataclasses.replace(ALLOCATION, evidence=(row, *ALLOCATION.evidence[1:]))
    table = list(csv.reader(io.StringIO(EXPORTS["csv"](made, Lora(), None), newline="")))
    assert table[1][1] == "'" + name.replace("\r", " ")
    assert table[2][1] == ALLOCATION.evidence[1].prefix
