"""Others' ways to the leading principal directions of a stream of rows, and how much variance any of them finds.

Every one takes a list of batches, (n, d) each, and gives k or more components as rows, the leading first.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from peft.utils.incremental_pca import IncrementalPCA
from scipy.sparse.linalg import eigsh
from sklearn.decomposition import IncrementalPCA as SklearnPCA
from torch import Tensor

from eva_kernels import GramStatistic, SubspaceStatistic, refresh_
from eva_lora.config import default_columns

REFRESH_PERIOD = 4  # of a pass under the default criterion

Batches = Sequence[Tensor]
Method = Callable[[Batches, int], Tensor]  # batches, k -> components (≥ k, d)


def ours_subspace(batches: Batches, k: int, columns: int | None = None) -> Tensor:
    """With as many columns as a pass keeps, or so many."""
    return _ours(SubspaceStatistic, batches, columns or default_columns(k))


def ours_gram(batches: Batches, k: int) -> Tensor:
    return _ours(GramStatistic, batches, default_columns(k))


def _ours(kind: type[GramStatistic] | type[SubspaceStatistic], batches: Batches, columns: int) -> Tensor:
    """As a pass does it: refreshes after 1, 2, 4, 8 batches and every fourth from then on, and at the end."""
    x = batches[0]
    statistic = kind(x.shape[1], min(x.shape[1], columns), device=x.device)
    pending = 0
    for batch in batches:
        statistic.accumulate_(batch)
        pending += 1
        if pending >= min(2 ** max(statistic.num_refreshes - 1, 0), REFRESH_PERIOD):
            refresh_([statistic])
            pending = 0
    if pending:
        refresh_([statistic])
    statistic.finish_()
    return statistic.basis.T


def peft_pca(batches: Batches, k: int) -> Tensor:
    """PEFT's IncrementalPCA with the options that its EVA uses."""
    pca = IncrementalPCA(n_components=k, lowrank=True, lowrank_seed=42)
    for batch in batches:
        pca.partial_fit(batch.float())
    return pca.components_


def sklearn_pca(batches: Batches, k: int) -> Tensor:
    pca = SklearnPCA(n_components=k)
    for batch in batches:
        pca.partial_fit(batch.float().cpu().numpy())
    return torch.from_numpy(pca.components_).to(batches[0].device)


def torch_incremental_pca(batches: Batches, k: int) -> Tensor:
    """The package torch-incremental-pca, with the backend that it recommends for fewer rows than columns."""
    from torch_incremental_pca import IncrementalPCA as TorchPCA

    pca = TorchPCA(n_components=k, gram=True)
    for batch in batches:
        pca.partial_fit(batch.float())
    return pca.components_


def svd_lowrank(batches: Batches, k: int) -> Tensor:
    """torch.svd_lowrank on all rows at once, which have to be kept for it."""
    x = torch.cat(list(batches)).float()
    return torch.svd_lowrank(x - x.mean(0), q=2 * k, niter=4)[2].mT


def pca_lowrank(batches: Batches, k: int) -> Tensor:
    """torch.pca_lowrank with its own defaults, two iterations, on all rows at once."""
    return torch.pca_lowrank(torch.cat(list(batches)).float(), q=2 * k)[2].mT


def full_eigh(batches: Batches, k: int) -> Tensor:
    """The whole d × d product of all rows, and all its eigenvectors."""
    x = torch.cat(list(batches)).float()
    x = x - x.mean(0)
    return torch.linalg.eigh(x.mT @ x).eigenvectors.flip(-1).mT


OURS: dict[str, Method] = {"subspace": ours_subspace, "gram": ours_gram}
PEERS: dict[str, Method] = {
    "PEFT IncrementalPCA": peft_pca,
    "scikit-learn IncrementalPCA": sklearn_pca,
    "torch.svd_lowrank": svd_lowrank,
    "torch.pca_lowrank": pca_lowrank,
    "full product + eigh": full_eigh,
}
if find_spec("torch_incremental_pca"):
    PEERS["torch-incremental-pca"] = torch_incremental_pca


def centred_rows(batches: Batches) -> Tensor:  # (n, d) float64
    x = torch.cat([batch.double() for batch in batches])
    return x - x.mean(0)


def leading_eigenvalues(x: Tensor, k: int) -> Tensor:  # (k,) float64 descending
    """Of XᵀX for rows (n, d) float64, to rounding: by Lanczos on whichever of XᵀX and XXᵀ is smaller."""
    gram = (x.T @ x if x.shape[0] > x.shape[1] else x @ x.T).cpu().numpy()
    values = eigsh(gram, k=k, which="LA", return_eigenvectors=False, tol=0)
    return torch.from_numpy(np.sort(values)[::-1].copy()).to(x.device)


def variance_missed(
    captured: Tensor,  # (≥ k,) float64, variance along each of the orthonormal directions found
    values: Tensor,  # (≥ k,) float64, leading eigenvalues of the exact scatter, descending
    k: int,
) -> float:
    """1 − captured / optimum: the share of the most variance that k directions can hold which these k do not."""
    return float(1 - captured[:k].sum() / values[:k].sum())
