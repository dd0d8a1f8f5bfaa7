"""Only what the roles of a layer agree on: no one matrix makes a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from htsr_alloc.allocation.strategies.shrunk import Shrunk


@dataclass(frozen=True)
class Common(Shrunk):
    """Eq. 6 and 7 on what the roles of a layer agree on: shrunk alphas without each role's own
    part, so that no one matrix makes a layer."""

    name: ClassVar[str] = "common"
    own: ClassVar[bool] = False


STRATEGY = Common
