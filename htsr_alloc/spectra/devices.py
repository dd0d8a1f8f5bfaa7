"""Which device a name means: one rule for analysis and for training."""

from __future__ import annotations

import torch

from htsr_alloc.errors import HtsrError


def choose_device(name: str, *, float64: bool = True) -> str:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` stands for here.

    ``auto`` is ``cuda`` where there is one, then ``mps`` where float64 is not needed and it is
    there, then ``cpu``.

    Raises:
        HtsrError: another name, a device that is not here, or one without float64 (mps) where
            that is needed.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return "cuda" if count else "mps" if mps and not float64 else "cpu"
    kind, colon, number = name.partition(":")
    if name == "mps" and float64:
        raise HtsrError("mps has no float64, which exact spectra need.", "Use `device` cpu.")
    if name == "mps" and not mps:
        raise HtsrError("mps is not here: torch sees no Apple GPU.", "Use `device` auto.")
    if kind == "cuda" and number.isdecimal() == bool(colon):
        if int(number or 0) >= count:
            raise HtsrError(
                f"{name} is not here: torch sees {count} CUDA devices.", "Use `device` auto."
            )
    elif name not in ("cpu", "mps"):
        raise HtsrError(
            f"There is no device {name!r}.", "Choose from auto, cpu, cuda, cuda:N, mps."
        )
    return name
