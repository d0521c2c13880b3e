"""Streaming singular value decomposition of rows that are seen once and never kept."""

from .refresh import Refreshed, finish_, refresh_
from .statistics import GramStatistic, Sketch, Statistic, SubspaceStatistic

__all__ = ["GramStatistic", "Refreshed", "Sketch", "Statistic", "SubspaceStatistic", "finish_", "refresh_"]
