"""One rule for every op's ``impl`` argument."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from ._cards import card_of, has_tiles

IMPLS = ("auto", "triton", "reference")
HAS_TRITON = find_spec("triton") is not None  # looked for, not imported
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_impl(
    impl: str,
    x: Tensor,
    accumulator: Tensor,
    *,
    dtypes: tuple[torch.dtype, ...] = TRITON_DTYPES,
    accumulators: tuple[torch.dtype, ...] = (torch.float32,),
) -> str:
    """Resolve ``impl`` to "triton" or "reference"; an explicit name never falls back.

    "auto" takes Triton for CUDA and HIP tensors it has kernels for, on the cards they are for (``_cards.py``), and the
    reference elsewhere. With ``TRITON_INTERPRET=1`` an explicit "triton" works on CPU tensors too.

    Raises:
        ValueError: ``impl`` is unknown, or "triton" and Triton is missing, or the tensors are not on a GPU or on one
            that there are no kernels for.
        TypeError: ``impl`` is "triton" and there is no kernel for these dtypes.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    if impl == "reference":
        return impl
    has_dtypes = x.dtype in dtypes and accumulator.dtype in accumulators
    if impl == "auto":
        return "triton" if x.is_cuda and has_dtypes and HAS_TRITON and has_tiles(x.device) else "reference"
    if not HAS_TRITON:
        raise ValueError("impl: expected Triton to be installed for 'triton', and it is not")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"impl: expected CUDA or HIP tensors for 'triton', got device {str(x.device)!r}")
    if x.is_cuda and not has_tiles(x.device):
        card = card_of(x.device)
        raise ValueError(f"impl: expected a GPU that there are kernels for with 'triton', got {card.name}: {card.why}")
    if not has_dtypes:
        raise TypeError(
            f"impl: expected dtypes {dtypes} and accumulators {accumulators} for 'triton', "
            f"got {x.dtype} and {accumulator.dtype}"
        )
    return impl
