"""Cholesky QR on a CPU: csrc/cpu/refresh_form.h."""

import torch
from torch import Tensor

from .._build import cpu_form, use_core
from .._memory import address
from .reference import greatest_growth, householder_qr


def core_runs(y: Tensor) -> bool:
    """Whether there is compiled code for these matrices on this machine."""
    if y.device.type != "cpu" or y.dtype != torch.float32 or y.numel() == 0:
        return False
    return use_core("auto") is not None and cpu_form() is not None


def orthonormalize_core(
    y: Tensor,  # (d, q) float32
) -> Tensor:  # (d, q) contiguous
    """Cholesky QR, twice where once is not enough, else Householder QR."""
    y = given = y.contiguous()
    growth = greatest_growth(y.shape[0], y.shape[1], y.dtype)
    for _ in range(2):
        out = torch.empty_like(y)
        written, is_enough = use_core("core").cholesky_qr(
            y=address("y", y, torch.float32, y.shape), d=y.shape[0], q=y.shape[1],
            out=address("out", out, torch.float32, y.shape), growth=growth, threads=torch.get_num_threads(),
        )  # fmt: skip
        if is_enough:
            return out
        if not written:
            break
        y = out
    return householder_qr(given.double()[None])[0].to(given.dtype).contiguous()
