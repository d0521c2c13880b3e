"""Cholesky QR on a CPU with AVX-512: csrc/cpu/refresh.cpp."""

import torch
from torch import Tensor

from .._build import use_core
from .reference import NEARLY_ORTHOGONAL


def core_runs(y: Tensor) -> bool:
    """Whether there is compiled code for these matrices on this machine."""
    if y.device.type != "cpu" or y.dtype != torch.float32 or y.numel() == 0:
        return False
    core = use_core("auto")
    return core is not None and core.has_refresh()


def cholesky_qr_core(
    y: Tensor,  # (b, d, q) float32
) -> tuple[Tensor, Tensor]:  # (b, d, q), (b,) bool
    """As :func:`~eva_kernels.orthonormal.reference.cholesky_qr`, rounded otherwise."""
    core, y = use_core("core"), y.contiguous()
    out, enough = torch.empty_like(y), torch.zeros(len(y), dtype=torch.bool)
    for i in range(len(y)):
        done, deviation = core.cholesky_qr(
            y=y[i].data_ptr(), d=y.shape[1], q=y.shape[2], out=out[i].data_ptr(), threads=torch.get_num_threads()
        )
        if not done:
            out[i] = y[i]
        enough[i] = done and deviation <= NEARLY_ORTHOGONAL
    return out, enough
