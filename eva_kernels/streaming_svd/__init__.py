"""Streaming singular value decomposition of rows that are seen once and never kept."""

from .._transfer import sent
from .._workspace import release_workspaces
from .gram_statistic import GramStatistic
from .refresh import Refreshed, finish_, refresh_
from .statistics import Sketch, Statistic, bring_home_
from .subspace_statistic import SubspaceStatistic

__all__ = [
    "GramStatistic",
    "Refreshed",
    "Sketch",
    "Statistic",
    "SubspaceStatistic",
    "bring_home_",
    "finish_",
    "refresh_",
    "release_workspaces",
    "sent",
]
