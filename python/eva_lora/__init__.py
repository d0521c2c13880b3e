"""EVA for LoRA models: ``eva_initialize(model, loader)`` before training, and the steps it is made of.

This package knows models, loaders and LoRA libraries; the numerics are in :mod:`eva_kernels`.
"""

from .adapters import LoraSite, ParameterSite, register_adapter
from .collecting import collect
from .config import EvaConfig
from .export import export_uniform
from .initialize import apply, eva_initialize
from .planning import EvaPlan, plan
from .report import EvaReport
from .statistics import EvaStatistics

__all__ = [
    "EvaConfig",
    "EvaPlan",
    "EvaReport",
    "EvaStatistics",
    "LoraSite",
    "ParameterSite",
    "apply",
    "collect",
    "eva_initialize",
    "export_uniform",
    "plan",
    "register_adapter",
]
