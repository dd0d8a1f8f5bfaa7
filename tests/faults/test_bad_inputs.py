"""A bad input ends in one sentence, an odd one is marked; there is never a traceback."""

import resource
import subprocess
import sys
import time

import pytest
from helpers import bad_json  # noqa: F401 - adds to BAD
from helpers.bad_inputs import BAD, ESCAPE
from helpers.commands import environment
from helpers.hubs import sentence
from helpers.odd_inputs import ODD

SECONDS, MEMORY = 30, 3 << 30


def unhurt(result):
    text = result.stdout + result.stderr
    assert "Traceback" not in text
    assert "\x1b" not in text
    assert "root:" not in text  # of /etc/passwd
    assert ESCAPE not in text


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_sentence(tmp_path, invoke, name):
    folder = tmp_path / "input"
    folder.mkdir()
    arguments = BAD[name](folder)
    start = time.monotonic()
    result = invoke(*arguments)
    assert time.monotonic() - start < SECONDS
    said = sentence(result)
    unhurt(result)
    assert len(said) < 10_000 or "megabyte" in name


@pytest.mark.parametrize("name", ODD)
def test_an_odd_input_goes_through_and_is_marked(tmp_path, invoke, name):
    build, said = ODD[name]
    folder = tmp_path / "input"
    folder.mkdir()
    arguments = build(folder)
    result = invoke(*arguments)
    assert result.rc == 0, result
    unhurt(result)
    assert said in result.stderr
    if "has no fit" in result.stderr:
        assert invoke(*arguments, "--strict", "-o", folder / "y.json").rc == 3


def test_a_header_of_a_million_tensors_is_read_in_bounded_time_and_memory(tmp_path):
    places = (
        f'"h.{i % 50}.{i // 50}.weight":'
        f'{{"dtype":"F16","shape":[1,1],"data_offsets":[{2 * i},{2 * i + 2}]}}'
        for i in range(1_000_000)
    )
    header = ("{" + ",".join(places) + "}").encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + bytes(2_000_000))
    script = (
        "import sys, resource; from htsr_alloc import open_checkpoint\n"
        "print(len(open_checkpoint(sys.argv[1]).tensors))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        capture_output=True,
        encoding="utf-8",
        timeout=4 * SECONDS,
        check=True,
    )
    assert done.stdout == "1000000\n"
