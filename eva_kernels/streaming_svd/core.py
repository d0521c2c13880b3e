"""Refreshes on a CPU, one statistic a thread: csrc/cpu/refresh_form.h."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._build import cpu_form, use_core
from .._memory import address
from ..orthonormal import greatest_growth
from .statistics import Statistic

MEMBERS_A_THREAD = 8  # whose new bases exist beside the old ones at a time


class CoreExtraction(NamedTuple):
    """What was taken out of some statistics of one kind and shape; indeterminate where ``solved`` is False."""

    members: Sequence[Statistic]
    bases: list[Tensor]  # b of (d, q)
    samples: list[Tensor | None]  # the same rounded to bfloat16, where the kind multiplies rows with that
    eigenvalues: Tensor  # (b, q) float64
    cosines: Tensor  # (b, q) float64
    overlaps: Tensor  # (b, q) float64
    solved: list[bool]  # False: not finite, not positive definite or of lower rank than q


def refresh_core_runs(statistic: Statistic) -> bool:
    """Whether there is compiled code for this statistic on this machine."""
    basis = statistic.basis
    if basis.device.type != "cpu" or basis.dtype != torch.float32 or statistic.impl != "auto":
        return False
    return use_core("auto") is not None and cpu_form() is not None


def extract_core(members: Sequence[Statistic], limits: Mapping[str, float]) -> Iterator[CoreExtraction]:
    """As ``nystrom`` and ``combine`` of :mod:`.refresh` one after the other; ``limits`` are its constants.

    A few members at a time, which are to adopt their new bases before the next: those exist beside the old ones. The
    images of solved members of a kind that summarises are zero afterwards: they are in the bases.
    """
    means, past = members[0].means(members, members[0].counts(members)), members[0].past_eigenvalues(members)
    size = MEMBERS_A_THREAD * torch.get_num_threads()
    for start in range(0, len(members), size):
        part = slice(start, start + size)
        yield _extract(members[part], means[part], past[part], limits)


def _extract(
    members: Sequence[Statistic],
    means: Tensor,  # (b, 2, d)
    past: Tensor,  # (b, q) float64
    limits: Mapping[str, float],
) -> CoreExtraction:
    (d, q), b = members[0].basis.shape, len(members)
    summarises = members[0].summarises
    samples, bases = ([x.contiguous() for x in xs] for xs in zip(*((s.sample, s.basis) for s in members), strict=True))
    images = [s.image() if summarises else s.image().contiguous() for s in members]  # to be cleared where they lie
    new_bases = [basis.new_empty(d, q) for basis in bases]
    next_samples: list[Tensor] = [basis.new_empty(d, q) for basis in bases] if summarises else []
    eigenvalues, cosines, overlaps = past.new_empty(3, b, q)
    solved = past.new_zeros(b, dtype=torch.bool)
    use_core("core").refresh(
        d=d, q=q, samples=_addresses("sample", samples, d, q), images=_addresses("image", images, d, q),
        bases=_addresses("basis", bases, d, q), eigenvalues=address("eigenvalues", past, torch.float64, (b, q)),
        means=address("means", means, torch.float32, (b, 2, d)), summarises=summarises,
        new_bases=_addresses("new_bases", new_bases, d, q),
        rounded_bases=_addresses("next_samples", next_samples, d, q),
        new_eigenvalues=address("new_eigenvalues", eigenvalues, torch.float64, (b, q)),
        cosines=address("cosines", cosines, torch.float64, (b, q)),
        overlaps=address("overlaps", overlaps, torch.float64, (b, q)),
        solved=address("solved", solved, torch.bool, (b,)), threads=torch.get_num_threads(),
        growth=greatest_growth(d, q, torch.float32), **limits,
    )  # fmt: skip
    rounded: list[Tensor | None] = [*next_samples] or [None] * len(members)
    return CoreExtraction(members, new_bases, rounded, eigenvalues, cosines, overlaps, solved.tolist())


def _addresses(name: str, tensors: Sequence[Tensor], d: int, q: int) -> list[int]:
    return [address(name, tensor, torch.float32, (d, q)) for tensor in tensors]
