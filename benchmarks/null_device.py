"""A GPU that does nothing, for the time its host takes: kernels are compiled for it, launched, and not run.

Within :func:`null_device` tensors of the CPU pass for those of an H100 where the package's kernels are concerned. What
a kernel would write stays as it was.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from eva_kernels import _dispatch, _triton, gram, subspace
from eva_kernels.gram import triton as gram_triton
from eva_kernels.subspace import triton as subspace_triton

ARCHITECTURE, PROCESSORS, L2_BYTES = "sm_90", 132, 50 << 20  # of an H100 SXM
MODULES = (_dispatch, _triton, gram, subspace, gram_triton, subspace_triton)


@dataclass
class Launches:
    """How many there have been."""

    count: int = 0


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": PROCESSORS, "max_num_regs": 65_536, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class NullDriver(DriverBase):
    """Triton's driver of a device whose launches return at once; each adds one to ``launches``."""

    def __init__(self, launches: Launches) -> None:
        class Launcher:
            def __init__(self, src: Any, metadata: Any) -> None:
                pass

            def __call__(self, *arguments: Any, **options: Any) -> None:
                launches.count += 1

        self.utils, self.launcher_cls = _Utils(), Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def _choose_impl(impl: str, x: Tensor, accumulator: Tensor, **_: Any) -> str:
    return "triton" if impl == "triton" else "reference"


@contextlib.contextmanager
def null_device() -> Iterator[Launches]:
    """Within it ``impl="triton"`` takes tensors of the CPU, with the tiles and plans of an H100."""
    launches = Launches()
    driver = triton.runtime.driver
    before = dict(vars(driver))
    facts: dict[str, Any] = {
        "architecture": lambda device: ARCHITECTURE,
        "multiprocessors": lambda device: PROCESSORS,
        "l2_bytes": lambda device: L2_BYTES,
        "choose_impl": _choose_impl,
    }
    with contextlib.ExitStack() as stack:
        stack.callback(vars(driver).update, before)  # to reset it would look for a device
        driver.set_active(NullDriver(launches))
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", contextlib.nullcontext))
        for module in MODULES:
            for name, fact in facts.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, fact))
        yield launches
