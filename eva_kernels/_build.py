"""The compiled module where it is built, and what is known about its build.

``python -m eva_kernels._build`` prints it. The environment variable ``EVA_CPU_ISA`` says which of its code for a CPU
runs: the form for a set of instructions by its name, "auto", the greatest form that this machine runs, or "none",
nothing: the module is then as good as not there, its trackers and CUDA part included. It is read once, when the module
is first asked for.
"""

import json
import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from types import ModuleType
from typing import Any

CPU_FORMS = ("amx", "avx512bf16", "avx512", "avx2")  # each asks for all instructions of the next, and more
CPU_ISA = ("auto", *CPU_FORMS, "none")  # what EVA_CPU_ISA may be
SWITCHED_OFF = "switched off by EVA_CPU_ISA=none"


@cache
def cpu_isa() -> str:
    """What ``EVA_CPU_ISA`` asks for.

    Raises:
        ValueError: it is none of ``CPU_ISA``.
    """
    asked = os.environ.get("EVA_CPU_ISA", "auto")
    if asked not in CPU_ISA:
        raise ValueError(f"EVA_CPU_ISA: expected one of {CPU_ISA}, got {asked!r}")
    return asked


@cache
def _import_core() -> tuple[ModuleType | None, str]:
    """The module, or why it cannot be had.

    Raises:
        ValueError: ``EVA_CPU_ISA`` is unknown, or asks for what does not run here.
    """
    asked = cpu_isa()
    if asked == "none":
        return None, SWITCHED_OFF
    core, reason = _load_core()
    here = tuple(core.cpu_forms()) if core is not None else ()
    if asked not in ("auto", *here):
        why = "this machine does not run it" if core is not None else f"the compiled module is {reason}"
        raise ValueError(f"EVA_CPU_ISA: expected one of {('auto', *here, 'none')}, got {asked!r}: {why}")
    if core is not None:
        core.choose_cpu_form(asked if asked != "auto" else here[0] if here else "")
    return core, reason


def _load_core() -> tuple[Any, str]:
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
        ValueError: another ``impl``, or an ``EVA_CPU_ISA`` that is unknown or does not run here.
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
        if reason != SWITCHED_OFF:  # who switches it off knows
            _tell_once()
    return core


def cpu_form() -> str | None:
    """Which form of the compiled code for a CPU runs, one of ``CPU_FORMS``; None where there is none for this machine.

    Raises:
        ValueError: ``EVA_CPU_ISA`` is unknown, or asks for what does not run here.
    """
    core, _ = _import_core()
    return None if core is None else core.cpu_form() or None


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
        return CudaState(
            False, 0, reason if reason == SWITCHED_OFF else f"not built, as the compiled module is {reason}"
        )
    if not hasattr(core, "cuda_devices"):
        return CudaState(False, 0, str(_record().get("cuda", "not built")))
    devices, why = core.cuda_devices()
    return CudaState(True, devices, f"built, {devices} device(s)" if devices else f"built, no device ({why})")


def build_info() -> dict[str, Any]:
    """What is built, with what, and what to do about the rest.

    Keys: ``core`` and ``cuda`` (a sentence each), ``cpu_form`` (which runs), ``cpu_forms`` (those that this machine
    runs), ``built_forms``, ``compiler``, ``cplusplus``, ``nvcc``, ``architectures``, ``cuda_runtime``, ``cuda_driver``
    (None where there is none), ``remedies`` (a list of sentences).
    """
    record, (core, reason), cuda = _record(), _import_core(), cuda_state()
    runtime, driver = core.cuda_versions() if core is not None and cuda.built else (0, 0)
    remedies = []
    if reason == SWITCHED_OFF:
        remedies.append("EVA_CPU_ISA=none switches the compiled module off; unset it to use what is built.")
    elif core is None:
        remedies.append(
            "The compiled module needs a C++17 compiler (Debian: apt-get install g++, macOS: xcode-select --install) "
            "when the package is installed; then reinstall: pip install --force-reinstall --no-deps eva-kernels, or "
            "pip install -e . in a clone."
        )
    if core is not None and core.built_cpu_forms() and not record.get("assembles_tiles", True):
        remedies.append(
            "The form for AMX is not built, as the assembler does not know its instructions: take a newer one."
        )
    if not cuda.built and reason != SWITCHED_OFF:
        remedies.append(
            "For CUDA put nvcc on PATH, or set CUDA_HOME, and reinstall with EVA_BUILD_CUDA=1, which fails with the "
            "reason where it cannot build."
        )
    elif cuda.built and not cuda.devices:
        remedies.append("CUDA is built; it needs an NVIDIA driver and a visible device (CUDA_VISIBLE_DEVICES).")
    return {
        "core": "built" if core is not None else reason,
        "cpu_form": cpu_form(),
        "cpu_forms": core.cpu_forms() if core is not None else [],
        "built_forms": core.built_cpu_forms() if core is not None else [],
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
