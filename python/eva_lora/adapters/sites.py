"""A LoRA site: one LoRA layer as the pass over the data sees it, and how its inputs become rows."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["InnerWeight", "LayerInput", "LeftAlone", "LoraSite", "Patches", "Rows", "first_tensor"]

PIECE_ELEMENTS = 2**20  # values of unfolded patches that exist at a time: 4 MiB in float32


class LeftAlone(Exception):
    """A layer that EVA does not apply to; the message is the reason."""


@dataclass(slots=True)  # not frozen: made for every layer of every batch, which freezing would make twice as slow
class LayerInput:
    """A tensor that one call brings to a site.

    Attributes:
        tensor: The input. Sites that take the same live tensor, and make rows of it in the same way, share
            one statistic; so where a site can hand on what it was given, it does not make a copy.
        part: Which of the site's parts it belongs to.
        tokens: (n,) int64, for each row the index of the token it is, in a batch of shape ``batch``. None:
            the rows are laid out as the batch's tokens are.
        batch: Shape of the batch that ``tokens`` counts in.
        of: The batch's tokens, ``(*batch, d)``, if ``tokens`` counts in them: what is known of their order is known of
            that of the rows.
    """

    tensor: Tensor
    part: int = 0
    tokens: Tensor | None = None
    batch: tuple[int, ...] = ()
    of: Tensor | None = None


class Rows(Protocol):
    """How a tensor becomes rows, where it is not (..., d) already. Equal ones make equal rows (``==``, ``hash``)."""

    @property
    def width(self) -> int:
        """d, the width of a row."""

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of all rows of ``x`` together, the last dimension left out."""

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        """The rows in order, as (n, d) pieces of bounded size."""


@dataclass(frozen=True)
class InnerWeight:
    """A parameter whose matrices are multiplied inside of a module, so that nobody sees what each of them puts out.

    Attributes:
        owner: The module that computes with it.
        name: Its attribute there.
        transposed: A matrix is (in, out), not (out, in).
    """

    owner: nn.Module
    name: str
    transposed: bool = False

    def matrices(self, tensor: Tensor | None = None) -> Tensor:  # (k, out, in)
        """The parameter, or a tensor that is laid out as it is, matrix by matrix: a view."""
        tensor = getattr(self.owner, self.name) if tensor is None else tensor
        tensor = tensor if tensor.ndim == 3 else tensor[None]
        return tensor.mT if self.transposed else tensor


@dataclass(frozen=True)
class LoraSite:
    """One LoRA layer.

    A subclass may say otherwise what a call brings (:meth:`inputs`), and how that becomes rows (:attr:`rows`).

    Attributes:
        name: Its name in the base model, unique.
        module: The module whose calls are watched.
        in_features: d, the width of a row.
        rank: Its rank as it stands.
        rank_multiple: What its rank must be a multiple of, for instance the tensor-parallel workers it is split over.
        removable: Whether its rank may become 0.
        parts: How many matrices A it has, all of its rank, each with inputs of its own (experts, for instance).
        parameters: Of its matrices A and B together, for each unit of its rank. 0: not known.
    """

    name: str
    module: nn.Module
    in_features: int
    rank: int
    rank_multiple: int = 1
    removable: bool = True
    parts: int = 1
    parameters: int = 0

    @property
    def rows(self) -> Rows | None:
        """How what is taken becomes rows; None where it is (..., d) as it is."""
        return None

    @property
    def inner(self) -> tuple[InnerWeight, ...]:
        """Where the base's matrices are parameters of a larger module: these, with the matrices of all parts in order.
        Empty where the module is the one matrix, and what it puts out is its product."""
        return ()

    @property
    def matrix_names(self) -> tuple[str, ...]:
        """What its parts' matrices are called, unique in a model."""
        return (self.name,) if self.parts == 1 else tuple(f"{self.name}[{part}]" for part in range(self.parts))

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterable[LayerInput]:
        """What one call of :attr:`module` brings.

        Raises:
            TypeError: it brings no floating-point tensor.
        """
        return (LayerInput(first_tensor(self.name, args, kwargs)),)

    def output_rows(self, output: Tensor) -> Tensor:
        """What :attr:`module` puts out, or its gradient, as (..., out): a view, in the order of the rows of what it
        was called with."""
        return output


def first_tensor(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The first tensor of a call.

    Raises:
        TypeError: there is none, or it is not floating point; the message names the layer ``name``.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            if value.is_floating_point():
                return value
            break
    kinds = [type(value).__name__ for value in (*args, *kwargs.values())]
    raise TypeError(f"layer {name}: expected a floating-point tensor as its first input, got {kinds}")


@dataclass(frozen=True)
class Patches:
    """The patches that a convolution's kernel sees, one row each: (channels · kernel) values in the weight's order.

    Attributes:
        channels: Of the input.
        kernel_size, stride, dilation: Per spatial dimension.
        padding: As :func:`torch.nn.functional.pad` takes it: last dimension first, before and after.
        padding_mode: As ``torch.nn.Conv2d`` names it.
    """

    channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> "Patches":
        """Those of a convolution with one group."""
        return cls(
            conv.in_channels, tuple(conv.kernel_size), tuple(conv.stride), tuple(conv.dilation),
            tuple(conv._reversed_padding_repeated_twice), conv.padding_mode,
        )  # fmt: skip

    @property
    def width(self) -> int:
        return self.channels * math.prod(self.kernel_size)

    def shape(self, x: Tensor) -> tuple[int, ...]:  # x (batch, channels, *spatial), or without batch
        x = self._batched(x)
        sizes = []
        for i, size in enumerate(x.shape[2:]):
            before, after = self.padding[2 * (len(self.stride) - 1 - i) :][:2]
            reach = self.dilation[i] * (self.kernel_size[i] - 1) + 1
            sizes.append((size + before + after - reach) // self.stride[i] + 1)
        return (x.shape[0], *sizes)

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        x = self._batched(x)
        samples, *sizes = self.shape(x)
        per_sample = math.prod(sizes) * self.width
        together = max(1, PIECE_ELEMENTS // max(1, per_sample))
        lines = max(1, PIECE_ELEMENTS * sizes[0] // max(1, per_sample))  # of the first spatial dimension
        for start in range(0, samples, together):
            windows = self._windows(x[start : start + together])  # (n, *sizes, channels, *kernel), a view
            if together > 1:
                yield windows.reshape(-1, self.width)
                continue
            for line in range(0, sizes[0], lines):
                yield windows[:, line : line + lines].reshape(-1, self.width)

    def _batched(self, x: Tensor) -> Tensor:
        return x[None] if x.ndim == len(self.stride) + 1 else x

    def _windows(self, x: Tensor) -> Tensor:
        spatial = len(self.stride)
        if any(self.padding):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, self.padding, mode)
        for i in range(spatial):
            reach = self.dilation[i] * (self.kernel_size[i] - 1) + 1
            x = x.unfold(2 + i, reach, self.stride[i])[..., :: self.dilation[i]]
        return torch.movedim(x, 1, 1 + spatial)
