"""The faults that other tests do not try; ``make faults`` tries all, and kills more often."""

import pytest
from helpers.commands import apart
from helpers.fault_runs import FAULTS, Bench

ELSEWHERE = {  # in test_analysis.py
    "Ctrl-C",
    "a second run on the same output",
    "no room in the journal",
    "a full disk",
    "a folder that cannot be written to",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(autouse=True)
def clean(bench):
    for path in bench.out.iterdir():
        path.unlink()


@pytest.mark.parametrize("name", ["analyze", "fit"])  # the rest: test_distributed, test_study
def test_kills_at_random_moments_lose_nothing(tmp_path, name):
    found = apart("kills", name, 6, tmp_path)
    assert found.pop("ended", 0) >= 1, found
    assert found.pop("killed") == 6
    assert not any(found.values()), found


@pytest.mark.parametrize("name", sorted(set(FAULTS) - ELSEWHERE))
def test_a_fault_loses_nothing(bench, name):
    FAULTS[name](bench)
    assert bench.lost == 0


def test_a_device_gets_the_metrics_and_nothing_beside_it(model, tmp_path, invoke):
    assert invoke("analyze", model, "-q", "-o", "/dev/null").rc == 0
    done = invoke("analyze", model, "-q", "-o", "/dev/full")
    assert done.rc == 1
    assert "No space left on device" in done.stderr


def test_the_newest_metrics_may_be_dated_in_the_future(model, tmp_path, invoke):
    import os

    for name, when in (("old", 1), ("new", 2**33), ("early", -(2**30))):
        assert invoke("analyze", model, "-q", "-o", f"{name}.metrics.json").rc == 0
        os.utime(tmp_path / f"{name}.metrics.json", (when, when))
    done = invoke("allocate", "--T", 4)
    assert done.rc == 0
    assert "metrics: new.metrics.json" in done.stderr
    assert "new.metrics.json is dated in the future" in done.stderr
