"""The one place where the address of a tensor or an array is taken for compiled code.

Compiled code sees an address and sizes. Whether the memory there is what it takes it for is asked here, before each
call: a wrong answer is read past, or written past, and found out somewhere else if at all.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tracker's compiled code needs no torch
    import torch
    from torch import Tensor

FLOAT32 = 4  # bytes


def address(
    name: str,
    tensor: "Tensor",  # of ``shape``, on the CPU
    dtype: "torch.dtype",
    shape: tuple[int, ...],
    *,
    rows_apart: bool = False,
) -> int:
    """Where a tensor's elements lie, one after the other in the order of its dimensions.

    Args:
        name: What the tensor is called, for the error.
        tensor: What compiled code is to read or write.
        dtype: What it takes the elements for.
        shape: What it takes the sizes for.
        rows_apart: Whether there may be anything between the rows of a matrix, as the caller passes their stride too.

    Raises:
        TypeError: another dtype.
        ValueError: another device or shape, elements that do not lie side by side, an address that is not a multiple
            of the element's size, no memory (as of a tensor whose storage was freed), or a lazy negation.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if not tensor.is_cpu:
        raise ValueError(f"{name}: expected a tensor on the CPU, got device {str(tensor.device)!r}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if not (tensor.is_contiguous() or (rows_apart and tensor.stride(-1) == 1)) or tensor.is_neg():
        raise ValueError(f"{name}: expected elements side by side in memory, got strides {tensor.stride()}")
    start = tensor.data_ptr()
    size = dtype.itemsize
    if start % size or (start == size * tensor.storage_offset() and 0 not in shape):  # freed: counted from 0
        raise ValueError(f"{name}: expected memory aligned to {size} bytes, got address {start:#x}")
    return start


def readable(
    matrix: "Tensor",  # (n, d)
) -> "Tensor":  # (n, d)
    """The matrix itself where :func:`address` takes it with its rows apart, else a copy that it takes."""
    if matrix.stride(-1) == 1 and matrix.data_ptr() % matrix.element_size() == 0 and not matrix.is_neg():
        return matrix
    return matrix.new_empty(matrix.shape).copy_(matrix)


def cuda_address(
    name: str,
    array: Any,  # (rows, columns) float32
    device: int,
) -> tuple[int, int]:
    """Where an array on CUDA device number ``device`` begins, and how many floats its rows are apart.

    Raises:
        TypeError: not an array of float32 on CUDA.
        ValueError: another device, a column stride, rows that overlap or lie between floats, an address that is none
            of a float.
    """
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None or interface["typestr"] != "<f4":
        found = type(array).__name__ if interface is None else interface["typestr"]
        raise TypeError(f"{name}: expected float32 arrays on a CUDA device, got {found}")
    place = getattr(array, "device", None)  # PyTorch's has an index, CuPy's an id
    number = getattr(place, "index", getattr(place, "id", device))
    if number != device:
        raise ValueError(f"{name}: expected arrays on CUDA device {device}, got one on device {number}")
    rows, columns = interface["shape"]
    row, column = interface.get("strides") or (FLOAT32 * columns, FLOAT32)
    if column != FLOAT32 and columns > 1:
        raise ValueError(f"{name}: expected columns side by side, got a column stride of {column} bytes")
    if rows > 1 and (row < FLOAT32 * columns or row % FLOAT32):
        raise ValueError(f"{name}: expected rows at least {FLOAT32 * columns} bytes apart, got {row}")
    start = interface["data"][0]
    if not start or start % FLOAT32:
        raise ValueError(f"{name}: expected memory aligned to {FLOAT32} bytes, got address {start:#x}")
    return start, row // FLOAT32
