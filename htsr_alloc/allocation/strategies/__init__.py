"""The strategies: one file and one row each."""

from htsr_alloc.allocation.strategies.alphalora import AlphaLora
from htsr_alloc.allocation.strategies.base import Plan, Strategy
from htsr_alloc.allocation.strategies.explicit import Explicit
from htsr_alloc.allocation.strategies.mola import Mola
from htsr_alloc.allocation.strategies.shrunk import Common, Shrunk
from htsr_alloc.allocation.strategies.uniform import Uniform

STRATEGIES: dict[str, type[Strategy]] = {
    "alphalora": AlphaLora,
    "shrunk": Shrunk,
    "common": Common,
    "uniform": Uniform,
    "mola": Mola,
    "explicit": Explicit,
}

__all__ = [
    "STRATEGIES",
    "AlphaLora",
    "Common",
    "Explicit",
    "Mola",
    "Plan",
    "Shrunk",
    "Strategy",
    "Uniform",
]
