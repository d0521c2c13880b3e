"""Which devices PyTorch sees here, and what runs on each."""

import torch

from ._dispatch import choose_impl
from ._double import home_of
from .subspace.core import core_runs
from .symmetric_eigen.core import core_runs as eigen_core_runs


def seen_devices() -> list[torch.device]:
    """The CPU, and every accelerator that this build of PyTorch can use."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices += [torch.device("xpu", index) for index in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps", 0))
    other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if other is not None and other.type not in {device.type for device in devices}:
        devices += [torch.device(other.type, index) for index in range(torch.accelerator.device_count())]
    return devices


def device_info(device: torch.device) -> dict[str, str]:
    """What ``impl="auto"`` runs on a device for float32 rows: "triton", "core" or "reference".

    Keys: ``subspace`` and ``gram`` (products with the rows), ``eigen`` (the eigensolver of refreshes), ``float64`` (the
    device where that is, and with it the small algebra); or ``error``, where the device does not work.
    """
    try:
        x = torch.empty(1, 1, dtype=torch.float32, device=device)
        home = home_of(device)
        products = choose_impl("auto", x, x)
        small = torch.ones(1, 1, dtype=torch.float64, device=home)
        eigen = choose_impl("auto", small, small, dtypes=(torch.float64,), accumulators=(torch.float64,))
    except RuntimeError as error:
        return {"error": str(error).partition("\n")[0]}
    return {
        "subspace": "core" if core_runs(x, x) else products,
        "gram": products,
        "eigen": "core" if eigen_core_runs(small) else eigen,
        "float64": str(home),
    }
