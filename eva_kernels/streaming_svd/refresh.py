"""Bring many statistics' bases up to date at once: Nyström extraction, batched by shape."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..orthonormal import orthonormalize
from ..symmetric_eigen import symmetric_eigen
from .statistics import Statistic

RELATIVE_JITTER = 1e-6  # of the unit diagonal of the scaled ΩᵀY: the rounding of a float32 product
RELATIVE_ALIGNMENT = 5e-4  # ωᵀCω below this fraction of ‖Cω‖ is rounding: no direction is that far from its image
RELATIVE_ORTHOGONAL = 1e-5  # spectra steeper than this leave a float32 basis too far from orthonormal
CPU_CACHE_BYTES = 2**21  # bases refreshed at a time on a CPU: about what its second-level cache holds
RELATIVE_RANK = 1e-12  # eigenvalues below this fraction of the largest are rounding, not directions


@dataclass(frozen=True)
class Refreshed:
    """One statistic's refresh, on the host.

    Attributes:
        cosines: (q,) float64, \\|cosine\\| of each component to the one before the refresh.
        overlaps: (q,) float64, ‖(QᵀQ′)₁..ᵢ‖²_F for every i.
        explained_variance_ratio: (q,) float64.
        finite: False if NaN or Inf reached the statistic; its basis was then left as it was.
    """

    cosines: npt.NDArray[np.float64]
    overlaps: npt.NDArray[np.float64]
    explained_variance_ratio: npt.NDArray[np.float64]
    finite: bool


def refresh_(statistics: Sequence[Statistic]) -> list[Refreshed]:
    """Refresh every statistic's basis from the rows it has seen. Statistics of one shape go together.

    Before the first refresh there is no earlier basis: cosines and overlaps then compare with the
    random start and mean nothing.
    """
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, statistic in enumerate(statistics):
        groups[(statistic.basis.device, statistic.basis.dtype, statistic.basis.shape)].append(index)
    results: dict[int, Refreshed] = {}
    for indices in groups.values():
        first = statistics[indices[0]].basis
        size = max(1, CPU_CACHE_BYTES // first.nbytes) if first.device.type == "cpu" else len(indices)
        for start in range(0, len(indices), size):
            some = indices[start : start + size]
            results.update(zip(some, _refresh_group_([statistics[i] for i in some]), strict=True))
    return [results[i] for i in range(len(statistics))]


def _refresh_group_(members: list[Statistic]) -> list[Refreshed]:
    old = torch.stack([s.basis for s in members])
    sample = torch.stack([s.sample for s in members])
    basis, eigenvalues, finite = nystrom(sample, torch.stack([s.product() for s in members]))
    for i, ok in enumerate(finite.tolist()):
        if ok:
            members[i].adopt_(basis[i].clone(), eigenvalues[i].clone())
    cosines, overlaps = compare(old, basis)
    ratios = torch.stack([s.explained_variance_ratio() for s in members])
    host = torch.stack([cosines, overlaps, ratios], 1).cpu().numpy()
    return [
        Refreshed(cosines=c, overlaps=o, explained_variance_ratio=r, finite=bool(ok))
        for (c, o, r), ok in zip(host, finite.tolist(), strict=True)
    ]


def nystrom(
    sample: Tensor,  # (b, d, q), independent columns
    product: Tensor,  # (b, d, q): a positive semidefinite matrix times sample
) -> tuple[Tensor, Tensor, Tensor]:  # (b, d, q), (b, q) float64 descending, (b,) bool
    """Eigenpairs of the Nyström approximation Y (ΩᵀY)⁻¹ Yᵀ (Tropp et al. 2017, arXiv 1706.05736, alg. 3).

    ΩᵀY is scaled to about a unit diagonal before it is factored, so that outlier directions of any size
    cost the small ones nothing; the q × q algebra is float64. Directions without variance keep the
    sample's. The third result is False where NaN or Inf is in the product; the others then mean nothing.
    """
    eye = torch.eye(sample.shape[-1], dtype=torch.float64, device=sample.device)
    core = (sample.mT @ product).double()
    finite = core.isfinite().flatten(1).all(1)  # what is not finite in Y is not finite in ΩᵀY
    if not bool(finite.all()):
        core, product = (torch.where(finite[:, None, None], x, 0) for x in (core, product))
    core = (core + core.mT) / 2
    image = torch.linalg.vector_norm(product, dim=-2).double()
    diagonal = torch.maximum(core.diagonal(dim1=-2, dim2=-1), RELATIVE_ALIGNMENT * image)
    scale = torch.where(diagonal > 0, diagonal.where(diagonal > 0, 1).rsqrt(), 0)
    scaled = scale[:, :, None] * core * scale[:, None, :] + RELATIVE_JITTER * eye
    factor, info = torch.linalg.cholesky_ex(scaled, upper=True)
    if bool((info != 0).any()):  # rounding made it indefinite: the same inverse root through eigenvalues
        values, vectors = torch.linalg.eigh(scaled)
        root = vectors * values.clamp_min(RELATIVE_JITTER).rsqrt()[:, None, :]
    else:
        root = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True)
    sketch = product @ (scale[:, :, None] * root).to(product.dtype)  # B: B Bᵀ is the approximation
    values, vectors = symmetric_eigen((sketch.mT @ sketch).double())
    values = values.clamp_min(0)
    alive = values > RELATIVE_RANK * values[:, :1]
    inverse = torch.where(alive, values.where(alive, 1).rsqrt(), 0)
    basis = sketch @ (vectors * inverse[:, None, :]).to(sketch.dtype)
    if not bool((values > RELATIVE_ORTHOGONAL * values[:, :1]).all()):
        basis = orthonormalize(torch.where(alive[:, None, :], basis, sample))
    return basis, values, finite


def compare(
    old: Tensor,  # (b, d, q)
    new: Tensor,  # (b, d, q)
) -> tuple[Tensor, Tensor]:  # (b, q), (b, q) float64
    """\\|Cosine\\| per component, and the squared overlap of the leading blocks, both in [0, i]."""
    cross = (old.mT @ new).double()
    cosines = cross.diagonal(dim1=-2, dim2=-1).abs().clamp_max(1)
    overlaps = cross.square().cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)
    return cosines, overlaps
