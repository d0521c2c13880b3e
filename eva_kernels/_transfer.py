"""What the host sends to a device without waiting for it."""

import torch
from torch import Tensor

STAGED_BYTES = 2**24  # what is larger is sent from where it lies: pinned memory is the system's, and is kept


def sent(
    x: Tensor,  # (...)
    device: torch.device,
) -> Tensor:  # (...)
    """``x`` on a device, its values as they are now.

    To a GPU nothing waits for work under way: a copy from memory that is not pinned would. What is pinned is sent from
    where it lies, and may not be written to before the device is next waited for; what is not, up to
    ``STAGED_BYTES``, goes through pinned memory that PyTorch keeps until the copy is done. Larger tensors, and those
    that are more than values in memory (nested, sparse, of a class of their own), are moved by PyTorch as ever.
    """
    is_plain = type(x) is Tensor and x.layout == torch.strided and x.device.type == "cpu"
    if device.type != "cuda" or not is_plain:
        return x.to(device)
    if not x.is_pinned() and x.nbytes <= STAGED_BYTES:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
