"""EVA for LoRA models: ``eva_initialize(model, loader)`` before training, and the steps it is made of.

This package knows models, loaders and LoRA libraries; the numerics are in :mod:`eva_kernels`. Names are
resolved on first use, so that the command line answers without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import LoraSite, ParameterSite, export_uniform, register_adapter
    from .collecting import Watch, collect, estimate, watching
    from .config import EvaConfig
    from .initialize import apply, eva_initialize
    from .planning import EvaPlan, EvaStatistics, plan
    from .repair import fit_quantization_error, require_same_base
    from .reporting import EvaReport, RepairReport, compare

__all__ = [
    "EvaConfig",
    "EvaPlan",
    "EvaReport",
    "EvaStatistics",
    "LoraSite",
    "ParameterSite",
    "RepairReport",
    "Watch",
    "apply",
    "collect",
    "compare",
    "estimate",
    "eva_initialize",
    "export_uniform",
    "fit_quantization_error",
    "plan",
    "register_adapter",
    "require_same_base",
    "watching",
]

_HOME = {
    "EvaConfig": "config",
    "EvaPlan": "planning",
    "EvaReport": "reporting",
    "EvaStatistics": "planning",
    "LoraSite": "adapters",
    "ParameterSite": "adapters",
    "RepairReport": "reporting",
    "Watch": "collecting",
    "apply": "initialize",
    "collect": "collecting",
    "compare": "reporting",
    "estimate": "collecting",
    "eva_initialize": "initialize",
    "export_uniform": "adapters",
    "fit_quantization_error": "repair",
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
