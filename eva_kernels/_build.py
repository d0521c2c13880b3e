"""The compiled module where it is built, and what is known about its build.

``python -m eva_kernels._build`` prints it.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from types import ModuleType
from typing import Any


@cache
def _import_core() -> tuple[ModuleType | None, str]:
    """The module, or why it cannot be had."""
    try:
        return import_module("eva_kernels._core"), ""
    except ModuleNotFoundError:
        reason = str(_record().get("core", "not built"))
        return None, f"built, but not for {sys.implementation.cache_tag}" if reason == "built" else reason
    except ImportError as error:  # built, but for another interpreter or C++ library
        return None, f"built, but cannot be loaded: {error}"


@cache
def _record() -> dict[str, Any]:
    """What setup.py wrote when it built the module; empty where it never ran."""
    try:
        record = json.loads(files("eva_kernels").joinpath("_build_record.json").read_text())
    except FileNotFoundError:
        return {}
    return dict(record)


@cache
def _tell_once() -> None:
    warnings.warn(
        f"eva_kernels works without its compiled module ({_import_core()[1]}): same results, slower "
        "bookkeeping. `python -m eva_kernels._build` says what to do.",
        RuntimeWarning,
        stacklevel=4,
    )


def use_core(impl: str) -> Any:
    """The compiled module for ``impl`` "auto" or "core"; None where the reference is to be used.

    Raises:
        ValueError: another ``impl``.
        RuntimeError: "core" was asked for and there is none.
    """
    if impl not in ("auto", "core", "reference"):
        raise ValueError(f"impl: expected 'auto', 'core' or 'reference', got {impl!r}")
    if impl == "reference":
        return None
    core, reason = _import_core()
    if core is None:
        if impl == "core":
            raise RuntimeError(f"impl='core': expected the compiled module, but it is {reason}")
        _tell_once()
    return core


@dataclass(frozen=True)
class CudaState:
    """Of the compiled module's CUDA part on this machine."""

    built: bool
    devices: int
    summary: str


@cache
def cuda_state() -> CudaState:
    core, reason = _import_core()
    if core is None:
        return CudaState(False, 0, f"not built, as the compiled module is {reason}")
    if not hasattr(core, "cuda_devices"):
        return CudaState(False, 0, str(_record().get("cuda", "not built")))
    devices, why = core.cuda_devices()
    return CudaState(True, devices, f"built, {devices} device(s)" if devices else f"built, no device ({why})")


def build_info() -> dict[str, Any]:
    """What is built, with what, and what to do about the rest.

    Keys: ``core`` and ``cuda`` (a sentence each), ``compiler``, ``cplusplus``, ``nvcc``, ``architectures``,
    ``cuda_runtime``, ``cuda_driver`` (None where there is none), ``remedies`` (a list of sentences).
    """
    record, (core, reason), cuda = _record(), _import_core(), cuda_state()
    runtime, driver = core.cuda_versions() if core is not None and cuda.built else (0, 0)
    remedies = []
    if core is None:
        remedies.append(
            "The compiled module needs a C++17 compiler (Debian: apt-get install g++, macOS: xcode-select --install) "
            "when the package is installed; then reinstall: pip install --force-reinstall --no-deps eva-kernels, or "
            "pip install -e . in a clone."
        )
    if not cuda.built:
        remedies.append(
            "For CUDA put nvcc on PATH, or set CUDA_HOME, and reinstall with EVA_BUILD_CUDA=1, which fails with the "
            "reason where it cannot build."
        )
    elif not cuda.devices:
        remedies.append("CUDA is built; it needs an NVIDIA driver and a visible device (CUDA_VISIBLE_DEVICES).")
    return {
        "core": "built" if core is not None else reason,
        "compiler": record.get("compiler") if core is not None else None,
        "cplusplus": f"C++{core.cplusplus // 100 % 100}" if core is not None else None,
        "cuda": cuda.summary,
        "nvcc": record.get("nvcc") if cuda.built else None,
        "architectures": record.get("architectures", []) if cuda.built else [],
        "cuda_runtime": _version(runtime),
        "cuda_driver": _version(driver),
        "remedies": remedies,
    }


def _version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def main() -> None:
    for name, value in build_info().items():
        if name == "remedies":
            for remedy in value:
                print(f"-> {remedy}")
        else:
            shown = ", ".join(value) if isinstance(value, list) else value
            print(f"{name + ':':14} {shown or '-'}")


if __name__ == "__main__":
    main()
