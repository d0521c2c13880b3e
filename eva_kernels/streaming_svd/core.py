"""Refreshes on a CPU with AVX-512, one statistic a thread: csrc/cpu/refresh.cpp."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._build import use_core
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
    core = use_core("auto")
    return core is not None and core.has_refresh()


def extract_core(members: Sequence[Statistic], limits: Mapping[str, float]) -> Iterator[CoreExtraction]:
    """As ``nystrom`` and ``combine`` of :mod:`.refresh` one after the other; ``limits`` are its constants.

    A few members at a time, which are to adopt their new bases before the next: those exist beside the old ones. The
    images of solved members of a kind that summarises are zero afterwards: they are in the bases.
    """
    means, past = members[0].means(members), members[0].past_eigenvalues(members)
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
    d, q = members[0].basis.shape
    summarises = members[0].summarises
    samples, images, bases = ([x.contiguous() for x in matrices] for matrices in zip(
        *((s.sample, s.image(), s.basis) for s in members), strict=True))  # fmt: skip
    new_bases = [torch.empty(d, q) for _ in members]
    next_samples: list[Tensor] = [torch.empty(d, q) for _ in members] if summarises else []
    eigenvalues, cosines, overlaps = torch.empty(3, len(members), q, dtype=torch.float64)
    solved = torch.zeros(len(members), dtype=torch.bool)
    use_core("core").refresh(
        d=d, q=q, samples=_addresses(samples), images=_addresses(images),
        bases=_addresses(bases), eigenvalues=past.data_ptr(), means=means.data_ptr(), summarises=summarises,
        new_bases=_addresses(new_bases),
        rounded_bases=_addresses(next_samples), new_eigenvalues=eigenvalues.data_ptr(), cosines=cosines.data_ptr(),
        overlaps=overlaps.data_ptr(), solved=solved.data_ptr(), threads=torch.get_num_threads(),
        growth=greatest_growth(d, q, torch.float32), **limits,
    )  # fmt: skip
    rounded: list[Tensor | None] = [*next_samples] or [None] * len(members)
    return CoreExtraction(members, new_bases, rounded, eigenvalues, cosines, overlaps, solved.tolist())


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
