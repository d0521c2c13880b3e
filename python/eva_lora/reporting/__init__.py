"""What a run did, for people and programs: text, JSON, a page, figures, and two runs side by side.

Knows statistics and plans; knows no model, no loader and no pass.
"""

from .comparing import Comparison, compare, load_directions
from .facts import ReportFacts
from .layer_repair import LayerRepair
from .layout import Grid
from .page import render
from .repair import RepairReport
from .report import EvaReport
from .start import LayerStart, StartReport

__all__ = [
    "Comparison",
    "EvaReport",
    "Grid",
    "LayerRepair",
    "LayerStart",
    "RepairReport",
    "ReportFacts",
    "StartReport",
    "compare",
    "load_directions",
    "render",
]
