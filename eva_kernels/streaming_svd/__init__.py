"""Streaming singular value decomposition of rows that are seen once and never kept."""

from .gram_statistic import GramStatistic
from .refresh import Refreshed, finish_, refresh_
from .statistics import Sketch, Statistic
from .subspace_statistic import SubspaceStatistic

__all__ = ["GramStatistic", "Refreshed", "Sketch", "Statistic", "SubspaceStatistic", "finish_", "refresh_"]
