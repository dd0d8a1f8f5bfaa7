"""From layer scores to whole numbers of experts (AlphaLoRA eq. 6 and 7), and beyond.

Standard library only, but for ``sensitivity``, which is imported by itself.
docs/ALLOCATION.md has the formulas and their sources.
"""

from htsr_alloc.allocation.budget import (
    ADAPTERS,
    Budget,
    Experts,
    Params,
    Rank,
    Share,
    Stacks,
    parse_experts,
    parse_params,
    parse_share,
)
from htsr_alloc.allocation.decide import allocate
from htsr_alloc.allocation.findings import known
from htsr_alloc.allocation.quotas import beta_of_spread, quotas
from htsr_alloc.allocation.request import Request
from htsr_alloc.allocation.rounding import REPAIRS, Bounds, repair_official, repair_remainder
from htsr_alloc.allocation.scorefile import Scores, read_scores
from htsr_alloc.allocation.scores import Metric, layer_scores
from htsr_alloc.allocation.settings import keywords_of, read_settings
from htsr_alloc.allocation.strategies import (
    STRATEGIES,
    AlphaLora,
    Common,
    Explicit,
    Mola,
    Random,
    Shrunk,
    Uniform,
)
from htsr_alloc.allocation.strategies.explicit import parse_counts
from htsr_alloc.allocation.strategies.mola import mola_counts, parse_groups
from htsr_alloc.allocation.units import POOLS

__all__ = [
    "ADAPTERS",
    "POOLS",
    "REPAIRS",
    "STRATEGIES",
    "AlphaLora",
    "Bounds",
    "Budget",
    "Common",
    "Experts",
    "Explicit",
    "Metric",
    "Mola",
    "Params",
    "Random",
    "Rank",
    "Request",
    "Scores",
    "Share",
    "Shrunk",
    "Stacks",
    "Uniform",
    "allocate",
    "beta_of_spread",
    "keywords_of",
    "known",
    "layer_scores",
    "mola_counts",
    "parse_counts",
    "parse_experts",
    "parse_groups",
    "parse_params",
    "parse_share",
    "quotas",
    "read_scores",
    "read_settings",
    "repair_official",
    "repair_remainder",
]
