"""From layer scores to whole numbers of experts (AlphaLoRA eq. 6 and 7), and beyond.

Standard library only, but for ``sensitivity``, which is imported by itself.
docs/ALLOCATION.md has the formulas and their sources.
"""

from htsr_alloc.allocation.costs import parse_params, parse_share
from htsr_alloc.allocation.decide import STRATEGIES, allocate
from htsr_alloc.allocation.patterns import mola_counts, parse_counts, parse_groups
from htsr_alloc.allocation.quotas import beta_of_spread, quotas
from htsr_alloc.allocation.repair import REPAIRS, Bounds, repair_official, repair_remainder
from htsr_alloc.allocation.scorefile import Scores, read_scores
from htsr_alloc.allocation.scores import layer_scores

__all__ = [
    "REPAIRS",
    "STRATEGIES",
    "Bounds",
    "Scores",
    "allocate",
    "beta_of_spread",
    "layer_scores",
    "mola_counts",
    "parse_counts",
    "parse_groups",
    "parse_params",
    "parse_share",
    "quotas",
    "read_scores",
    "repair_official",
    "repair_remainder",
]
