"""--device means the same in analysis and in training."""

import pytest
import torch

from htsr_alloc.errors import HtsrError
from htsr_alloc.spectra.devices import choose_device
from htsr_alloc.training.models import device_of


@pytest.fixture
def machine(monkeypatch):
    def made(gpus, mps):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return made


def refusal(choose, name):
    with pytest.raises(HtsrError) as caught:
        choose(name)
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("name", ["cuda:9", "cuda:x", "cuda:", "tpu", "", "cpu:0", "mps:0", "CUDA"])
def test_both_refuse_with_the_same_sentence(machine, gpus, name):
    machine(gpus, mps=False)
    assert refusal(choose_device, name) == refusal(device_of, name)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1"])
def test_both_take_what_is_here(machine, name):
    machine(2, mps=False)
    assert str(device_of(name)) == choose_device(name) == name


def test_mps_trains_but_has_no_float64(machine):
    machine(0, mps=True)
    assert device_of("mps").type == device_of("auto").type == "mps"
    assert choose_device("auto") == "cpu"
    assert "no float64" in refusal(choose_device, "mps")
    machine(0, mps=False)
    assert "mps is not here" in refusal(device_of, "mps")
    assert device_of("auto").type == "cpu"


def test_cuda_without_one_is_refused(machine):
    machine(0, mps=False)
    assert refusal(device_of, "cuda") == "cuda is not here: torch sees 0 CUDA devices."
