"""The compiled module, if it is there, and what is known about its build."""

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any


@cache
def _import_core() -> tuple[ModuleType | None, str]:
    """The module, or why it is missing."""
    try:
        return import_module("eva_kernels._core"), ""
    except ImportError as error:
        return None, str(error)


@cache
def _tell_once() -> None:
    warnings.warn(
        f"eva_kernels runs without its compiled module ({_import_core()[1]}): results are the same, the "
        "bookkeeping is slower. `python -m eva_kernels._build` says what to do.",
        RuntimeWarning,
        stacklevel=4,
    )


def use_core(impl: str) -> Any:
    """The compiled module for ``impl`` "auto" or "core"; None where the reference is to be used.

    Raises:
        ValueError: another ``impl``.
        RuntimeError: "core" was asked for and is not built.
    """
    if impl not in ("auto", "core", "reference"):
        raise ValueError(f"impl: expected 'auto', 'core' or 'reference', got {impl!r}")
    if impl == "reference":
        return None
    core, reason = _import_core()
    if core is None:
        if impl == "core":
            raise RuntimeError(f"impl='core': the compiled module is not built: {reason}")
        _tell_once()
    return core
