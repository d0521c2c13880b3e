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
    otherwise: Tensor | None = None,  # (d, q) float32
) -> Tensor:  # (d, q) contiguous
    """Cholesky QR, twice where once is not enough, else Householder QR; of ``otherwise`` where y has NaN or Inf."""
    given, (d, q) = y, y.shape
    growth = greatest_growth(d, q, y.dtype)
    for _ in range(2):
        transposed = not y.is_contiguous() and y.mT.is_contiguous()
        kept = y.mT if transposed else y.contiguous()
        out = y.new_empty(d, q)
        written, is_enough = use_core("core").cholesky_qr(
            y=address("y", kept, torch.float32, kept.shape), transposed=transposed, d=d, q=q,
            out=address("out", out, torch.float32, (d, q)), growth=growth, threads=torch.get_num_threads(),
        )  # fmt: skip
        if is_enough:
            return out
        if not written:
            break
        y = out
    if otherwise is not None and not bool(given.isfinite().all()):  # of which there is no Cholesky factor
        return orthonormalize_core(otherwise)
    return householder_qr(given.double()[None])[0].to(given.dtype).contiguous()
