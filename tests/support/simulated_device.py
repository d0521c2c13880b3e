"""A device that is not there: its tensors are the CPU's, under another name and with what it lacks refused.

Within ``with SimulatedDevice() as simulated`` whatever is made on ``simulated.device``, or moved there, is a
:class:`DeviceTensor`. As on a real one, an operation raises where it meets a dtype that the device has not, an operator
that nobody has written for it, or tensors of another device beside its own; and what the host can only know by waiting
for the device is counted. The device exists for the thread that entered it.
"""

from collections import Counter
from collections.abc import Collection
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchgen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey, NativeFunction

aten = torch.ops.aten
_TRANSFERS = (aten._to_copy.default, aten.copy_.default)  # may name two devices
_INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)  # take their indices from the CPU too


@cache
def not_on(backend: str) -> frozenset[str]:
    """The operators that this PyTorch has no kernel of for a backend ("MPS"), by its own list of them."""
    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    kernels = parsed.backend_indices[DispatchKey[backend]]
    functions = {str(function.func.name): function for function in parsed.native_functions}

    def has_kernel(function: NativeFunction) -> bool:
        delegate = function.structured_delegate
        its = function if delegate is None else functions[str(delegate)]
        return kernels.has_kernel(its) or its.has_composite_kernel

    return frozenset(name for name, function in functions.items() if not has_kernel(function))


class DeviceTensor(Tensor):
    """A tensor of a simulated device; ``value`` is what it holds, a plain tensor of the CPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device) -> "DeviceTensor":
        made = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=device, requires_grad=False,
        )  # fmt: skip
        made.value = value
        return made

    def __repr__(self, **_: Any) -> str:
        return f"{self.value!r} on {self.device}"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of a simulated device outlived it, or met another thread")


class SimulatedDevice(TorchDispatchMode):
    """A device that PyTorch knows by name, and that no code can mean otherwise.

    Its type is "lazy", the one besides "cpu" and "meta" that every build can assign to slices of.

    Args:
        dtypes: The dtypes it refuses.
        operators: The operators it refuses, by their names in ATen: :func:`not_on`.

    Attributes:
        device: The device.
        waits: How often the host had to wait for it: for values, or for shapes that depend on values.
        operations: How often each operator ran on it.
    """

    device = torch.device("lazy", 0)
    tensors: type[DeviceTensor] = DeviceTensor

    def __init__(self, *, dtypes: Collection[torch.dtype] = (torch.float64,), operators: Collection[str] = ()) -> None:
        super().__init__()
        self.waits = 0
        self.operations: Counter[str] = Counter()
        self._dtypes, self._operators = dtypes, operators

    def __enter__(self) -> "SimulatedDevice":
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) then moves a tensor of the CPU, seen here
        self._plain_autocast = torch.autocast
        torch.autocast = self._autocast
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        torch.autocast = self._plain_autocast

    def _autocast(self, device_type: str, *args: Any, enabled: bool = True, **kwargs: Any) -> Any:
        """Where it is not on, it may be switched off, as models of transformers 4 do by the device's name."""
        if device_type == self.device.type and not enabled:
            return nullcontext()
        return self._plain_autocast(device_type, *args, enabled=enabled, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        target = kwargs.get("device")
        is_made_here = target is not None and torch.device(target).type == self.device.type
        if not ours and not is_made_here:
            return self._elsewhere(func, args, kwargs)
        name = func.name().removeprefix("aten::")
        lands_here = is_made_here or (target is None and isinstance(tensors[0], DeviceTensor))
        if func not in _TRANSFERS:
            self._refuse_mixture(func, tensors[:1] if func in _INDEXING else tensors)
        if name in self._operators:
            raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for {self.device}")
        if self._waits(func, tensors, lands_here, kwargs):
            self.wait(name)
        self.operations[name] += 1
        known = {id(tensor.value): tensor for tensor in ours}
        if is_made_here:
            kwargs = {**kwargs, "device": torch.device("cpu")}
            kwargs.pop("pin_memory", None)
        args, kwargs = tree_map_only(DeviceTensor, lambda tensor: tensor.value, (args, kwargs))
        self._refuse_dtype(kwargs.get("dtype"))  # a copy converts where it comes from
        result = self._computed(func, args, kwargs)
        if not lands_here:
            return result
        return tree_map_only(Tensor, lambda value: self._placed(value, known), result)

    def _placed(self, value: Tensor, known: dict[int, DeviceTensor]) -> DeviceTensor:
        """What an operation returned, on the device: where that is one of its arguments, the argument itself."""
        if id(value) in known:
            return known[id(value)]
        self._refuse_dtype(value.dtype)
        return self.tensors(value, self.device)

    def _computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operator gives for values of the CPU."""
        return func(*args, **kwargs)

    def wait(self, what: str) -> None:
        """The host waits, for ``what``."""
        self.waits += 1

    def _elsewhere(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the device has no part in."""
        return func(*args, **kwargs)

    def _refuse_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype in self._dtypes:
            raise TypeError(f"{self.device} has no {dtype}")

    def _refuse_mixture(self, func: Any, tensors: list[Tensor]) -> None:
        """A number of the CPU, without dimensions, may stand beside a device's tensors, as everywhere in PyTorch."""
        others = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.ndim]
        if others and any(isinstance(tensor, DeviceTensor) for tensor in tensors):
            raise RuntimeError(f"{func}: expected all tensors on {self.device}, got one on {others[0].device}")

    def _waits(self, func: Any, tensors: list[Tensor], lands_here: bool, kwargs: dict[str, Any]) -> bool:
        if func in _TRANSFERS:
            return isinstance(tensors[-1], DeviceTensor) and not lands_here
        if func in _INDEXING:  # of a mask the device counts what is True
            return any(tensor.dtype == torch.bool and isinstance(tensor, DeviceTensor) for tensor in tensors[1:])
        return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
