"""What a run did, for people and programs: text, JSON, a page, figures, and two runs side by side.

Knows statistics and plans; knows no model, no loader and no pass.
"""

from .comparing import Comparison, compare, load_directions
from .facts import ReportFacts
from .layout import Grid
from .page import render
from .report import EvaReport

__all__ = ["Comparison", "EvaReport", "Grid", "ReportFacts", "compare", "load_directions", "render"]
