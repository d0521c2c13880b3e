"""Every kernel against its reference on the user's own device, in well under a minute."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._dispatch import choose_impl
from .gradient_sketch import outer_add_, projected
from .gram import gram_accumulate_
from .subspace import subspace_accumulate_
from .symmetric_eigen import symmetric_eigen

_SHAPES = ((1000, 384), (777, 130), (2048, 1024))
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_EIGEN_SIZES = (16, 48, 128)
ALLOWANCE = 2.0  # times the error of plain PyTorch at the same precision


@dataclass(frozen=True)
class KernelCheck:
    """One kernel on one input.

    Attributes:
        name: of the kernel, with dtype and shape.
        error: largest error against float64, relative to the largest entry of the result.
        allowed: twice the error plain PyTorch makes with this dtype on this device, or a few roundings of the
            accumulator where that is smaller.
        failure: what was raised instead, in one line; ``error`` and ``allowed`` are NaN then.
    """

    name: str
    error: float
    allowed: float
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def check_kernels(device: torch.device | str) -> list[KernelCheck]:
    """Run every kernel, on aligned, odd, masked and poisoned rows, and compare with float64.

    A kernel that does not compile or run is a check that has not passed; the others are run all the same.

    Raises:
        ValueError: Triton does not run on ``device``.
    """
    probe = torch.zeros(1, 1, dtype=torch.float32, device=device)
    choose_impl("triton", probe, probe)
    generator = torch.Generator().manual_seed(0)
    checks: list[KernelCheck] = []
    for n, d in _SHAPES:
        for dtype in _DTYPES:
            x = (_normal(n, d, generator) + 1).to(dtype)
            mask = torch.rand(n, generator=generator, dtype=torch.float32, device="cpu").lt(0.7)
            basis = torch.linalg.qr(_normal(d, min(d, 48), generator)).Q
            x[~mask] = torch.nan  # must never be seen
            label = f"{str(dtype).removeprefix('torch.')} {n} x {d}"
            checks.append(_checked(f"gram {label}", _check_rows, device, x, mask))
            checks.append(_checked(f"subspace {label}", _check_rows, device, x, mask, basis))
            weights = _normal(n, basis.shape[1], generator)
            checks.append(_checked(f"gradient_sketch {label}", _check_sketch, device, x, mask, weights, basis))
    for k in _EIGEN_SIZES:
        root = _normal(8, k * k, generator).reshape(8, k, k)
        checks.append(_checked(f"symmetric_eigen float32 8 x {k} x {k}", _check_eigen, device, root @ root.mT))
    return checks


def _checked(
    name: str, check: Callable[..., tuple[float, float]], device: torch.device | str, *arguments: Tensor
) -> KernelCheck:
    """The arguments are the CPU's: once a kernel has broken the device, nothing works there any more."""
    try:
        return KernelCheck(name, *check(*(argument.to(device) for argument in arguments)))
    except Exception as error:  # whatever compilers and drivers raise
        return KernelCheck(name, math.nan, math.nan, " ".join(f"{type(error).__name__}: {error}".split()))


def _check_rows(x: Tensor, mask: Tensor, basis: Tensor | None = None) -> tuple[float, float]:  # error, and what may be
    shift = torch.ones(x.shape[1], dtype=torch.float32, device=x.device)
    d = x.shape[1]
    result = shift.new_zeros(d, d if basis is None else basis.shape[1])
    totals = shift.new_zeros(d, dtype=torch.float64), shift.new_zeros((), dtype=torch.float64)
    if basis is None:
        gram_accumulate_(result, *totals, x, shift, mask, impl="triton")
    else:
        subspace_accumulate_(result, *totals, x, basis, shift, mask, impl="triton")

    def product(z: Tensor, basis: Tensor | None) -> Tensor:
        return z.mT @ z if basis is None else z.mT @ (z @ basis.to(z.dtype))

    z = x[mask].double() - shift
    exact = product(z, None if basis is None else basis.double())
    plain = product(x[mask] - shift.to(x.dtype), basis).double()
    error = max(_relative(result, exact), _relative(totals[0], z.sum(0)), _relative(totals[1], z.square().sum()))
    rounding = 8 * len(z) ** 0.5 * torch.finfo(torch.float32).eps
    return error, max(ALLOWANCE * _relative(plain, exact), rounding)


def _check_sketch(x: Tensor, mask: Tensor, weights: Tensor, basis: Tensor) -> tuple[float, float]:
    """Error, and what may be: of float32 sums, as nothing that is multiplied is rounded to fewer than 16 bits."""
    basis = basis.bfloat16()
    product = weights.new_zeros(x.shape[1], weights.shape[1])
    outer_add_(product, x, weights, mask, impl="triton")
    z = x[mask].double()
    images = projected(x, basis, mask, impl="triton")[mask]
    error = max(_relative(product, z.mT @ weights[mask].double()), _relative(images, z @ basis.double()))
    return error, 8 * max(x.shape) ** 0.5 * torch.finfo(torch.float32).eps


def _check_eigen(matrix: Tensor) -> tuple[float, float]:  # error, and what may be
    values, vectors = symmetric_eigen(matrix, impl="triton")
    plain = torch.linalg.eigh(matrix)

    def residual(values: Tensor, vectors: Tensor) -> float:
        left = matrix.double() @ vectors.double()
        return _relative(left, vectors.double() * values.double()[:, None, :])

    rounding = 8 * matrix.shape[-1] * torch.finfo(torch.float32).eps
    return residual(values, vectors), max(ALLOWANCE * residual(plain.eigenvalues, plain.eigenvectors), rounding)


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:  # (rows, columns) float32, on the CPU
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).abs().max() / exact.abs().max())
