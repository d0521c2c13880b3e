"""EVA for LoRA models: ``eva_initialize(model, loader)`` before training, and the steps it is made of.

This package knows models, loaders and LoRA libraries; the numerics are in :mod:`eva_kernels`. Names are
resolved on first use, so that the command line answers without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import (
        LoraSite,
        ParameterSite,
        PlainExport,
        export_plain,
        export_uniform,
        load_adapter,
        register_adapter,
    )
    from .collecting import Watch, collect, estimate, watching
    from .config import EvaConfig
    from .fitting import METHODS
    from .initializing import apply, eva_initialize
    from .planning import EvaPlan, EvaStatistics, feature_gain, plan
    from .repair import fit_quantization_error, require_same_base
    from .reporting import EvaReport, RepairReport, StartReport, compare
    from .starting import initialize

__all__ = [
    "METHODS",
    "EvaConfig",
    "EvaPlan",
    "EvaReport",
    "EvaStatistics",
    "LoraSite",
    "ParameterSite",
    "PlainExport",
    "RepairReport",
    "StartReport",
    "Watch",
    "apply",
    "collect",
    "compare",
    "estimate",
    "eva_initialize",
    "export_plain",
    "export_uniform",
    "feature_gain",
    "fit_quantization_error",
    "initialize",
    "load_adapter",
    "plan",
    "register_adapter",
    "require_same_base",
    "watching",
]

_HOME = {
    "METHODS": "fitting",
    "EvaConfig": "config",
    "EvaPlan": "planning",
    "EvaReport": "reporting",
    "EvaStatistics": "planning",
    "LoraSite": "adapters",
    "ParameterSite": "adapters",
    "PlainExport": "adapters",
    "RepairReport": "reporting",
    "StartReport": "reporting",
    "apply": "initializing",
    "Watch": "collecting",
    "collect": "collecting",
    "compare": "reporting",
    "estimate": "collecting",
    "eva_initialize": "initializing",
    "export_plain": "adapters",
    "export_uniform": "adapters",
    "feature_gain": "planning",
    "load_adapter": "adapters",
    "fit_quantization_error": "repair",
    "initialize": "starting",
    "plan": "planning",
    "register_adapter": "adapters",
    "require_same_base": "repair",
    "watching": "collecting",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'eva_lora' has no attribute {name!r}")
    return getattr(import_module(f"eva_lora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
