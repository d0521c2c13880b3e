"""A CUDA device that is not there: its tensors say ``is_cuda``, and where the host would wait for it is written down.

What an operation does on a real one with values that only the device knows, the host waits for; so it does with a copy
from memory that is not pinned. For each Triton kernel the reference stands in, as a launch would: nothing waits for it.
Whether PyTorch was built with CUDA does not matter, nor whether there is Triton.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from eva_kernels import _dispatch, gram, subspace
from eva_kernels.gram.reference import gram_reference
from eva_kernels.subspace.reference import subspace_reference
from eva_kernels.symmetric_eigen.reference import symmetric_eigen_reference
from support.simulated_device import DeviceTensor, SimulatedDevice

aten = torch.ops.aten
OURS = [str(Path(__file__).parents[2] / folder) + "/" for folder in ("eva_kernels", "python/eva_lora")]
PASSED_BY = [str(Path(torch.__file__).parent) + "/", str(Path(__file__).parent) + "/", "<frozen", "/contextlib.py"]
# Operators that wait for what PyTorch does not say: solvers for what they report, counts for the greatest value.
ALSO_WAITS = {"_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq", "bincount", "histc"}


def _is_passed_by(code: CodeType) -> bool:
    """Whether code only hands on what others ask for: PyTorch's, this folder's, and what looks at operations."""
    return code.co_name == "__torch_dispatch__" or code.co_filename.startswith(tuple(PASSED_BY))


class CudaTensor(DeviceTensor):
    """A tensor of the device. What PyTorch's own methods do with a device's driver, these do without."""

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return self if self.is_contiguous(memory_format=memory_format) else self.clone(memory_format=memory_format)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        return aten.copy_.default(self, source, non_blocking)

    def item(self) -> Any:
        return aten._local_scalar_dense.default(self)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    __index__ = __int__

    def __invert__(self) -> Tensor:
        return aten.bitwise_not.default(self)

    def nonzero(self) -> Tensor:
        return aten.nonzero.default(self)

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device)

    def __getitem__(self, index: Any) -> Tensor:
        return CudaTensor(self.value[self._indices(index)], self.device)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, CudaTensor) and value.ndim:
            SimulatedCuda.active().wait("setitem from the CPU")
        self.value[self._indices(index)] = value.value if isinstance(value, CudaTensor) else value

    def _indices(self, index: Any) -> Any:
        """The index as a tensor of the CPU takes it. A mask has to be counted, a list sent from memory not pinned."""
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            if isinstance(part, CudaTensor):
                if part.dtype == torch.bool or not part.ndim:
                    SimulatedCuda.active().wait("index")
            elif isinstance(part, list) or getattr(part, "ndim", 0):
                SimulatedCuda.active().wait("index from the CPU")
        return tuple(part.value if isinstance(part, CudaTensor) else part for part in parts)


def _add_to_product_(
    product: Tensor,
    column_sum: Tensor,
    square_sum: Tensor,
    x: Tensor,
    sample: Any,
    row_mask: Tensor | None,
    sign: float,
) -> None:
    subspace_reference(product, column_sum, square_sum, x, sample.basis, sample.shift, row_mask, sign)


def _symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = symmetric_eigen_reference(matrix.value)
    return CudaTensor(values, matrix.device), CudaTensor(vectors, matrix.device)


class SimulatedCuda(SimulatedDevice):
    """CUDA device 0, for the thread that entered it.

    Attributes:
        places: Where the host waited: "file:line what" of the package's own code -> times; of what a model's code or
            a test waits for, nothing.
    """

    device = torch.device("cuda", 0)
    tensors = CudaTensor
    _entered: "list[SimulatedCuda]" = []  # noqa: RUF012 - the devices of the process

    def __init__(self) -> None:
        super().__init__(dtypes=())
        self.places: Counter[str] = Counter()
        self._pinned: list[StorageWeakRef] = []

    @classmethod
    def active(cls) -> "SimulatedCuda":
        return cls._entered[-1]

    def __enter__(self) -> "SimulatedCuda":
        self._patches = ExitStack()
        states: dict[str, Tensor] = {}
        for module, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "get_rng_state", lambda device="cuda": states.get(str(device), torch.zeros(16).byte())),
            (torch.cuda, "set_rng_state", lambda state, device="cuda": states.update({str(device): state})),
            (torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
            (torch.cuda, "get_device_name", lambda device=None: "a device that is not there"),
            (torch.cuda, "get_device_capability", lambda device=None: (7, 5)),
            (Tensor, "pin_memory", lambda tensor, device=None: self._pin_(tensor.clone())),
            (Tensor, "is_pinned", lambda tensor, device=None: self._is_pinned(tensor)),
            (_dispatch, "HAS_TRITON", True),
            (_dispatch, "has_tiles", lambda device: True),
            (subspace, "_kernels", lambda: SimpleNamespace(add_rows_=_add_to_product_)),
            (gram, "_kernels", lambda: SimpleNamespace(add_rows_=gram_reference, mirror_triangle_=lambda gram: None)),
        ):
            self._patches.enter_context(mock.patch.object(module, name, value))
        eigensolver = SimpleNamespace(symmetric_eigen_triton=_symmetric_eigen)
        self._patches.enter_context(mock.patch.dict(sys.modules, {"eva_kernels.symmetric_eigen.triton": eigensolver}))
        # A module that moves gets new parameters: the old ones cannot become of another class.
        switch = torch.__future__
        self._patches.callback(
            switch.set_overwrite_module_params_on_conversion, switch.get_overwrite_module_params_on_conversion()
        )
        switch.set_overwrite_module_params_on_conversion(True)
        self._entered.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._entered.remove(self)
        self._patches.close()

    def wait(self, what: str) -> None:
        super().wait(what)
        frame = sys._getframe(1)
        while frame is not None and _is_passed_by(frame.f_code):
            frame = frame.f_back  # type: ignore[assignment]
        own = frame is not None and next((ours for ours in OURS if frame.f_code.co_filename.startswith(ours)), None)
        if own:
            self.places[f"{frame.f_code.co_filename.removeprefix(own)}:{frame.f_lineno} {what}"] += 1

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """CUDA has operators for dtypes that the CPU has not."""
        if func is aten.histc.default and not args[0].is_floating_point():
            return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
        return func(*args, **kwargs)

    def _elsewhere(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        return self._pin_(func(*args, **{**kwargs, "pin_memory": False}))

    def _pin_(self, made: Tensor) -> Tensor:
        self._pinned.append(StorageWeakRef(made.untyped_storage()))
        return made

    def _is_pinned(self, x: Tensor) -> bool:
        self._pinned = [reference for reference in self._pinned if not reference.expired()]
        if isinstance(x, DeviceTensor):
            return False
        return any(reference.cdata == x.untyped_storage()._cdata for reference in self._pinned)

    def _waits(self, func: Any, tensors: list[Tensor], lands_here: bool, kwargs: dict[str, Any]) -> bool:
        if super()._waits(func, tensors, lands_here, kwargs) or func.name().removeprefix("aten::") in ALSO_WAITS:
            return True
        if func in (aten._to_copy.default, aten.copy_.default) and not isinstance(tensors[-1], DeviceTensor):
            return not (kwargs.get("non_blocking", False) and self._is_pinned(tensors[-1]))
        return False
