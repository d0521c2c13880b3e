"""From statistics to ranks and A, and the files that hold both. No model, no data, no forward pass.

Knows numbers and names of layers; what a pass leaves behind (:class:`EvaStatistics`) and what is to be written
(:class:`EvaPlan`) are its records, which every other room reads.
"""

from . import storage
from .eva_plan import Allocation, EvaPlan, PlannedSite, plan, require_affordable, require_bounds
from .gain import feature_gain
from .merging import merged
from .provenance import command_line, versions
from .statistics import EvaStatistics, InputStatistics, SiteStatistics
from .storage import raw_bytes
from .trace import Trace

__all__ = [
    "Allocation",
    "EvaPlan",
    "EvaStatistics",
    "InputStatistics",
    "PlannedSite",
    "SiteStatistics",
    "Trace",
    "command_line",
    "feature_gain",
    "merged",
    "plan",
    "raw_bytes",
    "require_affordable",
    "require_bounds",
    "storage",
    "versions",
]
