"""Products of rows with few columns on a CPU: csrc/cpu."""

import torch
from torch import Tensor

from .._build import cpu_form, use_core
from .._memory import address, readable
from .._rows import row_views


def core_runs(rows: Tensor, columns: int, dtype: torch.dtype, basis: torch.dtype = torch.bfloat16) -> bool:
    """Whether there is a compiled kernel for these rows on this machine, and a result in ``dtype``.

    Of float32 rows there is none, as PyTorch's own products are as fast; nor for a basis that is not bfloat16 already,
    which it would be rounded to. What torch.compile traces has no addresses.
    """
    if torch.compiler.is_compiling() or dtype != torch.float32 or basis != torch.bfloat16:
        return False
    if rows.device.type != "cpu" or rows.dtype != torch.bfloat16 or not rows.shape[-1] or not columns:
        return False
    return use_core("auto") is not None and cpu_form() is not None


def outer_core(
    product: Tensor,  # (a, q) float32
    rows: Tensor,  # (..., a) bfloat16
    weights: Tensor,  # (..., q) float32
    row_mask: Tensor | None,  # (...) bool
) -> None:
    """Products accumulate in float32, of weights that where the processor multiplies bfloat16 are two such each."""
    flat, done, (d, q) = weights.reshape(-1, weights.shape[-1]), 0, product.shape
    if flat.shape != (wanted := (rows.shape[:-1].numel(), q)):
        raise ValueError(f"weights: expected shape {wanted}, got {tuple(flat.shape)}")
    target = product.contiguous()
    for x, mask in row_views(rows, row_mask):
        own = readable(flat[done : done + len(x)]).contiguous()
        done += len(x)
        factor = address("weights", own, torch.float32, (len(x), q))
        to = address("product", target, torch.float32, (d, q))
        _multiply(x, mask, factor, to, (d, q), outer=True)
    if target is not product:
        product.copy_(target)


def projected_core(
    rows: Tensor,  # (..., a) bfloat16
    basis: Tensor,  # (a, q) bfloat16
    row_mask: Tensor | None,  # (...) bool
) -> Tensor:  # (rows, q) float32
    """Products accumulate in float32."""
    d, q = basis.shape
    found, done = rows.new_empty(rows.shape[:-1].numel(), q, dtype=torch.float32), 0
    wide = basis.to(torch.float32).contiguous()
    factor = address("basis", wide, torch.float32, (d, q))
    for x, mask in row_views(rows, row_mask):
        to = address("product", found[done : done + len(x)], torch.float32, (len(x), q))
        done += len(x)
        _multiply(x, mask, factor, to, (d, q), outer=False)
    return found


def _multiply(
    x: Tensor, mask: Tensor | None, factor: int, product: int, shape: tuple[int, int], *, outer: bool
) -> None:
    x, n, (d, q) = readable(x), len(x), shape
    mask = None if mask is None else mask.contiguous()
    use_core("core").thin(
        x=address("rows", x, torch.bfloat16, (n, d), rows_apart=True), n=n, d=d, row_stride=x.stride(0),
        mask=0 if mask is None else address("row_mask", mask, torch.bool, (n,)), factor=factor, q=q,
        product=product, outer=outer, threads=torch.get_num_threads(),
    )  # fmt: skip
