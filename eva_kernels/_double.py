"""Float64 for devices that have none: their own numbers of that precision live on the CPU.

Apple's MPS has no float64, nor have some of Intel's GPUs. Totals and the algebra of small matrices need it. Code that
may run on such a device therefore asks for no float64 there: it takes :func:`double` of a tensor, which moves home,
goes on there and comes back by :func:`like`. Everywhere else home is the device itself and neither moves anything. What
is added in every batch, where nobody may wait for the device, goes to a :class:`DistantSum`.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

CPU = torch.device("cpu")
_WITH_FLOAT64, _WITHOUT = ("cpu", "cuda", "meta"), ("mps",)
MAX_PARTS = 16  # of a distant sum: float32 tensors that it keeps on the device


@cache
def home_of(device: torch.device) -> torch.device:
    """Where float64 of this device's tensors lives: there, or on the CPU where the device has none."""
    return device if _has_float64(device) else CPU


def _has_float64(device: torch.device) -> bool:
    if device.type in _WITH_FLOAT64 or device.type in _WITHOUT:
        return device.type in _WITH_FLOAT64
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    third = torch.ones((), dtype=torch.float64, device=CPU) / 3
    try:  # some refuse to make such a tensor, some to compute with it, some compute in less
        return bool((torch.ones((), dtype=torch.float64, device=device) / 3).to(CPU) == third)
    except (RuntimeError, TypeError):
        return False


def double(x: Tensor) -> Tensor:
    """``x`` in float64, at home."""
    return x.to(home_of(x.device)).double()


def like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` in the dtype of ``other`` and on its device."""
    return x.to(other.dtype).to(other.device)


class DistantSum:
    """A sum in float64 of tensors on a device without it.

    What is added stays on the device, as it came, until somebody reads: nothing waits, and the sum costs the device
    next to nothing. When there are ``MAX_PARTS`` of them they are made two by :func:`distilled`; that is as exact as
    float64, beside the 2⁻²⁴ to which sums of a chunk of rows are rounded before they come here.
    """

    def __init__(self, total: Tensor, device: torch.device) -> None:  # (...) float64, at home
        self._total, self._device = total, device
        self._parts: list[Tensor] = []  # float32, on the device

    def add_(self, values: Tensor, *, alpha: float = 1) -> "DistantSum":  # (...) float32
        """Add ``alpha`` (1 or −1) times the values, which nobody may write to from then on."""
        self._parts.append(values if alpha == 1 else values * alpha)
        if len(self._parts) == MAX_PARTS:
            self._parts = list(distilled(torch.stack(self._parts)))
        return self

    def __getitem__(self, where: slice) -> "_Window":
        return _Window(self, where)

    def read(self) -> Tensor:
        """The sum itself, (...) float64, at home: what is written to it counts. Waits for the device."""
        settle_([self])
        return self._total

    def hold_(self, total: Tensor) -> None:  # (...) float64, at home
        """Hold another sum in the place of this one."""
        self._total = total
        self._parts.clear()

    def clone(self) -> "DistantSum":
        other = DistantSum(self._total.clone(), self._device)
        other._parts = list(self._parts)  # which nobody writes to
        return other

    @property
    def shape(self) -> torch.Size:
        return self._total.shape

    @property
    def nbytes(self) -> int:
        return self._total.nbytes + sum(part.nbytes for part in self._parts)


class _Window:
    """A slice of a distant sum, to add to."""

    def __init__(self, whole: DistantSum, where: slice) -> None:
        self._whole, self._where = whole, where

    def add_(self, values: Tensor, *, alpha: float = 1) -> None:
        padded = values.new_zeros(self._whole.shape)
        padded[self._where] = values
        self._whole.add_(padded, alpha=alpha)


def settle_(sums: Iterable[DistantSum]) -> None:
    """Bring home what has been added to some sums: the host waits once for each device."""
    devices: dict[torch.device, list[tuple[DistantSum, Tensor]]] = defaultdict(list)
    for one in sums:
        if one._parts:
            devices[one._device] += [(one, part) for part in one._parts]
            one._parts.clear()
    for parts in devices.values():
        brought = double(torch.cat([part.reshape(-1) for _, part in parts]))
        for (one, _), values in zip(parts, torch.split(brought, [part.numel() for _, part in parts]), strict=True):
            one._total += values.view(one.shape)


def zeros(shape: tuple[int, ...], device: torch.device) -> Tensor | DistantSum:
    """A total of tensors on a device, to be added to with ``add_``."""
    total = torch.zeros(shape, dtype=torch.float64, device=home_of(device))
    return total if total.device.type == device.type else DistantSum(total, device)


def distilled(parts: Tensor) -> tuple[Tensor, Tensor]:  # (n, ...) float32 -> (...), (...)
    """Two tensors whose exact sum is that of all n, up to 2⁻⁴⁷ log₂² n of the sum of their magnitudes.

    The first is their sum by halves, over log₂ n levels; the second adds up what each of its additions rounded off, at
    most 2⁻²⁴ of the magnitudes a level and known exactly (Knuth, The Art of Computer Programming 2, 4.2.2, theorem B),
    in no more than 2 log₂ n additions one after the other. Every operation has to round: compiled into one, with leave
    to reassociate, they would cancel.
    """
    low = torch.zeros_like(parts[0])
    while len(parts) > 1:
        half = len(parts) // 2
        a, b, odd = parts[:half], parts[half : 2 * half], parts[2 * half :]
        total = a + b
        rounded = total - a
        low = low + ((a - (total - rounded)) + (b - rounded)).sum(0)
        parts = torch.cat([total, odd]) if len(odd) else total
    return parts[0], low
