"""Figures, pages and comparisons, from the JSON files alone."""

from htsr_alloc.reports.html import report

__all__ = ["report"]
