"""The strategies, one file each: a module of this folder holds ``STRATEGY`` and gives its name.

A new strategy is a new file here; ``base.Strategy`` says what it answers.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from htsr_alloc.allocation.strategies.alphalora import AlphaLora
from htsr_alloc.allocation.strategies.base import Plan, Strategy
from htsr_alloc.allocation.strategies.common import Common
from htsr_alloc.allocation.strategies.explicit import Explicit
from htsr_alloc.allocation.strategies.mola import Mola
from htsr_alloc.allocation.strategies.random import Random
from htsr_alloc.allocation.strategies.shrunk import Shrunk
from htsr_alloc.allocation.strategies.uniform import Uniform

NAMES = sorted(module.name for module in iter_modules(__path__) if module.name != "base")
STRATEGIES: dict[str, type[Strategy]] = {
    name: import_module(f"{__name__}.{name}").STRATEGY for name in NAMES
}

__all__ = [
    "STRATEGIES",
    "AlphaLora",
    "Common",
    "Explicit",
    "Mola",
    "Plan",
    "Random",
    "Shrunk",
    "Strategy",
    "Uniform",
]
