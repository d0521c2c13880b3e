"""Cholesky QR on a CPU with AVX-512: csrc/cpu/refresh.cpp."""

import torch
from torch import Tensor

from .._build import use_core
from .._memory import address
from .reference import NEARLY_ORTHOGONAL, householder_qr


def core_runs(y: Tensor) -> bool:
    """Whether there is compiled code for these matrices on this machine."""
    if y.device.type != "cpu" or y.dtype != torch.float32 or y.numel() == 0:
        return False
    core = use_core("auto")
    return core is not None and core.has_refresh()


def orthonormalize_core(
    y: Tensor,  # (d, q) float32
) -> Tensor:  # (d, q)
    """Cholesky QR, twice where once is not enough, else Householder QR.

    Columns that are orthonormal up to rounding (4e-6) are left as they are.
    """
    y = given = y.contiguous()
    for _ in range(2):
        out = torch.empty_like(y)
        written, is_enough = use_core("core").cholesky_qr(
            y=address("y", y, torch.float32, y.shape), d=y.shape[0], q=y.shape[1],
            out=address("out", out, torch.float32, y.shape), nearly=NEARLY_ORTHOGONAL, threads=torch.get_num_threads(),
        )  # fmt: skip
        if is_enough:
            return out if written else y
        if not written:
            break
        y = out
    return householder_qr(given[None])[0]
