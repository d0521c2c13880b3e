"""A GPU that does nothing, for the time its host takes: kernels are compiled for it, launched, and not run.

Within :func:`null_device` tensors of the CPU pass for those of an H100 where the package's kernels are concerned. What
a kernel would write stays as it was.
"""

import contextlib
import inspect
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel

from eva_kernels import _dispatch, _triton, gradient_sketch, gram, subspace
from eva_kernels.gradient_sketch import triton as sketch_triton
from eva_kernels.gram import triton as gram_triton
from eva_kernels.subspace import triton as subspace_triton

ARCHITECTURE, PROCESSORS, L2_BYTES = "sm_90", 132, 50 << 20  # of an H100 SXM
MODULES = (_dispatch, _triton, gram, subspace, gradient_sketch, gram_triton, subspace_triton, sketch_triton)


@dataclass
class Launches:
    """What has been launched: for each launch its grid, stream, kernel, and the rest that Triton's launchers get."""

    arguments: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.arguments)


LAUNCHES = Launches()  # what Triton has compiled outlives a device, and so does where it reports


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": PROCESSORS, "max_num_regs": 65_536, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, ...]:
        most_threads = (1024,) * ("n_max_threads" in inspect.getsource(CompiledKernel._init_handles))  # not before 3.5
        return object(), f"{name} {zlib.crc32(binary):x}", 0, 0, *most_threads

    def unload_module(self, module: object) -> None:
        pass


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        LAUNCHES.arguments.append(arguments)


class NullDriver(DriverBase):
    """Triton's driver of a device whose launches return at once."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = _Utils(), _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "null"  # what Triton has compiled for it is not taken for that of a real device

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
    LAUNCHES.arguments.clear()
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
        driver.set_active(NullDriver())
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", contextlib.nullcontext))
        for module in MODULES:
            for name, fact in facts.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, fact))
        yield LAUNCHES
