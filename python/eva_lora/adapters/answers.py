"""What a layer makes of its matrices A and B, as its answers to one input show."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .sites import Patches, Rows

__all__ = ["Answers", "AskedLayer"]

LARGER = 256.0  # than the base's output, what B A x is made to be while its scaling is looked for
ALIKE = 2.0**-5  # of what is seen: what the rounding of a layer in 16 bits may be off by


@dataclass(frozen=True)
class Answers:
    """What a layer makes of its matrices A and B, as it was seen.

    Attributes:
        scaling: What it multiplies B A x with.
        outputs: For each pair of A and B, which of the layer's outputs (n,) int64 the rows of that B add to, in order.
        base: (out,) float32: the output with B = 0 for some input.
    """

    scaling: float
    outputs: list[Tensor]
    base: Tensor


@dataclass(frozen=True)
class AskedLayer:
    """A layer that computes B A x from matrices that it keeps as parameters, to be asked what it makes of them.

    Attributes:
        name: The layer's.
        module: What is called.
        owner: What holds A and B.
        first, second: The parameters A, and B, one for each A.
        transposed, groups, in_features, row_maker: As of a :class:`~eva_lora.ParameterSite`.
    """

    name: str
    module: nn.Module
    owner: nn.Module
    first: Sequence[nn.Parameter]
    second: Sequence[nn.Parameter]
    transposed: bool
    groups: int
    in_features: int
    row_maker: Rows | None

    @torch.no_grad()
    def answers(self) -> Answers:
        """What the layer makes of its matrices: seen in its answers to one input, with matrices that are written for a
        moment.

        Raises:
            ValueError: what it adds to its base's output is no multiple of B A x.
        """
        values = [(factor, factor.detach().clone()) for factor in (*self.first, *self.second)]
        try:
            with _without_dropout(self.module, self.owner), torch.autocast(values[0][0].device.type, enabled=False):
                return self._seen()
        finally:
            for factor, value in values:
                factor.data.copy_(value)

    def _seen(self) -> Answers:
        first, second = ([_as_matrix(factor, self.transposed) for factor in part] for part in (self.first, self.second))
        x, row, place = self._example(first[0])
        groups = [a.chunk(self.groups) for a in first]  # each (rank, d)

        def answer() -> Tensor:  # (out,) float32
            y = self.module(x).float()
            return y[0, 0] if self.row_maker is None else y.flatten(2)[0, :, place]

        def clear() -> None:
            for matrix in (*first, *second):
                matrix.zero_()

        clear()
        base = answer()
        level = LARGER * max(1.0, float(base.abs().max()))  # so that little is rounded off beside the base's output
        outputs, scalings = [], []
        for mine, b in zip(groups, second, strict=True):
            for a in mine:
                clear()
                a[0], b[:, 0] = row, level
                added = (answer() - base) / (level * float(row.float().square().sum()))
                hit = added.abs() > added.abs().max() / 2
                scalings.append(float(added[hit].mean()) if bool(hit.any()) else 0.0)
                outputs.append(hit.nonzero().flatten())
                self._require(scalings[-1] != 0 and _near(added, scalings[-1] * hit))
            self._require(sum(map(len, outputs[-self.groups :])) == len(b))
        scaling = scalings[0]
        self._require(all(abs(other - scaling) <= ALIKE * abs(scaling) for other in scalings))
        clear()
        expected, taken = torch.zeros_like(base), iter(outputs)
        generator = torch.Generator("cpu").manual_seed(0)
        for mine, b in zip(groups, second, strict=True):
            b.copy_(torch.randn(b.shape, generator=generator, dtype=torch.float32, device="cpu") * level)
            start = 0
            for a in mine:
                a.copy_(torch.randn(a.shape, generator=generator, dtype=torch.float32, device="cpu"))
                where = next(taken)
                rows = b[start : start + len(where)].float()
                expected[where] += scaling * rows @ (a.float() @ row.float())
                start += len(where)
        self._require(_near(answer() - base, expected))
        return Answers(scaling, outputs, base)

    def _example(self, a: Tensor) -> tuple[Tensor, Tensor, int]:
        """An input, one of the rows that it makes, and where in the output that is."""
        if self.row_maker is None:
            row = a.new_full((self.in_features,), self.in_features**-0.5)
            return row[None, None], row, 0
        patches = self.row_maker
        assert isinstance(patches, Patches)
        reach = [d * (k - 1) + 1 for d, k in zip(patches.dilation, patches.kernel_size, strict=True)]
        x = a.new_full((1, patches.channels, *reach), patches.width**-0.5)
        rows = torch.cat([*patches.pieces(x)])
        place = int(rows.float().norm(dim=1).argmax())
        return x, rows[place].to(a), place

    def _require(self, holds: bool) -> None:
        if not holds:
            raise ValueError(f"layer {self.name}: what it adds to its base layer's output is no multiple of B A x")


def _as_matrix(factor: Tensor, transposed: bool) -> Tensor:  # (rows, columns), of the same memory
    return factor.data.T if transposed else factor.data.view(len(factor), -1)


def _near(seen: Tensor, expected: Tensor) -> bool:
    return bool((seen - expected).norm() <= ALIKE * expected.norm())


@contextmanager
def _without_dropout(*modules: nn.Module) -> Iterator[None]:
    training = [member for module in modules for member in module.modules() if member.training]
    for member in training:
        member.training = False  # not eval(), in which some libraries merge weights
    try:
        yield
    finally:
        for member in training:
            member.training = True
