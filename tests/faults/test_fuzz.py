"""Any content of a file gives a valid object or an HtsrError, in bounded time."""

import os

import pytest
from helpers.fuzz import targets
from hypothesis import HealthCheck, given, settings

TARGETS = targets()
EXAMPLES = int(os.environ.get("HTSR_FUZZ", "200"))


@pytest.mark.parametrize("name", TARGETS)
def test_anything_gives_an_object_or_a_sentence(name):
    strategy, function = TARGETS[name]
    valid = [0, 0]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def feed(data):
        valid[function(data)] += 1

    feed()
    assert min(valid) > 0, valid  # both outcomes were met
