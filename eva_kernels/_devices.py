"""Which devices PyTorch sees here, and what runs on each."""

import subprocess
from pathlib import Path

import torch

from ._cards import card_of, name_of
from ._dispatch import HAS_TRITON, choose_impl
from ._double import home_of
from .gradient_sketch.core import core_runs as sketch_core_runs
from .gram.core import core_runs as gram_core_runs
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

    Keys: ``subspace`` and ``gram`` (products with the rows), ``bfloat16_sketch`` (gradients' products with few columns,
    of rows in bfloat16), ``eigen`` (the eigensolver of refreshes), ``float64`` (the device where that is, and with it
    the small algebra), and for a GPU ``kernels`` (whose tiles it gets, or why it gets none); or ``error``, where the
    device does not work.
    """
    try:
        x = torch.empty(1, 1, dtype=torch.float32, device=device)
        home = home_of(device)
        products = choose_impl("auto", x, x)
        narrow = x.to(torch.bfloat16)
        sketch = choose_impl("auto", narrow, x)
        small = torch.ones(1, 1, dtype=torch.float64, device=home)
        eigen = choose_impl("auto", small, small, dtypes=(torch.float64,), accumulators=(torch.float64,))
    except RuntimeError as error:
        return {"error": str(error).partition("\n")[0]}
    facts = {
        "subspace": "core" if core_runs(x, x) else products,
        "gram": "core" if gram_core_runs(x, x) else products,
        "bfloat16_sketch": "core" if sketch_core_runs(narrow, 1, x.dtype) else sketch,
        "eigen": "core" if eigen_core_runs(small) else eigen,
        "float64": str(home),
    }
    return facts | ({"kernels": _kernels_of(device)} if device.type == "cuda" else {})


def _kernels_of(device: torch.device) -> str:
    if not HAS_TRITON:
        return "none, Triton is not installed"
    card = card_of(device)
    return f"none for {card.name}, {card.why}" if card.tiles is None else f"{card.name} with tiles of {card.tiles}"


def described(device: torch.device) -> str:
    """A GPU in one line: its name, what kernels are compiled for, its driver, and what PyTorch was built with."""
    built = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"HIP {torch.version.hip}"
    name = torch.cuda.get_device_properties(device).name
    return f"{name} ({name_of(device)}), driver {driver_version()}, {built}"


def driver_version() -> str:
    """Of the GPUs' driver, as the driver itself says it; "unknown" where it cannot be asked."""
    try:
        if torch.version.hip is not None:
            return Path("/sys/module/amdgpu/version").read_text(encoding="ascii").strip()
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return asked.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
