"""Bring many statistics' bases up to date at once: Nyström extraction, batched by shape."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._double import double, like
from .._transfer import sent
from ..convergence import Comparison
from ..orthonormal import orthonormalize, orthonormalize_by_cholesky
from ..symmetric_eigen import symmetric_eigen
from .comparing import comparison_runs, start_comparison
from .core import extract_core, refresh_core_runs
from .statistics import Statistic, bring_home_

# Of the unit diagonal of the scaled ΩᵀY. Each refresh loses half of it in variance; a direction that is only rounding
# may come out larger by the inverse of it. Above the rounding of a float32 product: the README has what less does.
RELATIVE_JITTER = 1e-6
RELATIVE_ALIGNMENT = 5e-4  # ωᵀCω below this fraction of ‖Cω‖ is rounding: no direction is that far from its image
# A column of ΩᵀY that is further than this from its row, or above the geometric mean of two diagonal entries by more,
# is nothing else: it is left out.
RELATIVE_SYMMETRY = 0.1
RELATIVE_ORTHOGONAL = 1e-5  # spectra steeper than this leave a float32 basis too far from orthonormal
RELATIVE_RANK = 1e-12  # eigenvalues below this fraction of the largest are rounding, not directions
POWER_STEPS = 2  # towards the leading right singular vectors of what past and new rows add up to
SPAN_JITTER = 1e-12  # of the unit diagonal of a float64 Gram matrix: it has a Cholesky factor then, whatever its rank
CPU_CACHE_BYTES = 2**21  # bases refreshed at a time on a CPU: about what its second-level cache holds

T = TypeVar("T")
R = TypeVar("R")

_LIMITS = {
    "jitter": RELATIVE_JITTER,
    "alignment": RELATIVE_ALIGNMENT,
    "symmetry": RELATIVE_SYMMETRY,
    "orthogonal": RELATIVE_ORTHOGONAL,
    "rank": RELATIVE_RANK,
    "span_jitter": SPAN_JITTER,
    "power_steps": POWER_STEPS,
}
SOLVED, NOT_FINITE, OBLIQUE, INDEFINITE = range(4)  # what became of an extraction; the last two are mended


@dataclass(frozen=True)
class Refreshed:
    """One statistic's refresh, on the host.

    Attributes:
        cosines: (q,) float64, ``|cosine|`` of each component to the one before the refresh.
        overlaps: (q,) float64, ‖(QᵀQ′)₁..ᵢ‖²_F for every i.
        explained_variance_ratio: (q,) float64.
        gains: (q,) float64, for every i what the refresh before this one gained in captured variance on the rows
            since, relative; zeros where the statistic does not watch it.
        finite: False if NaN or Inf reached the statistic; its basis was then left as it was.
    """

    cosines: npt.NDArray[np.float64]
    overlaps: npt.NDArray[np.float64]
    explained_variance_ratio: npt.NDArray[np.float64]
    gains: npt.NDArray[np.float64]
    finite: bool


@dataclass
class _Extraction:
    """Statistics of one kind and shape, and what was taken out of them: all still on their device."""

    indices: list[int]
    members: list[Statistic]
    sample: Tensor  # (b, d, q)
    product: Tensor  # (b, d, q)
    past: "_Past"
    basis: Tensor  # (b, d, q)
    eigenvalues: Tensor  # (b, q) float64
    counts: Tensor  # (b, 3) float64: see Statistic.counts
    evidence: Tensor  # (b, 4, q) float64: see _evidence
    status: Tensor  # (b,) int


class _Past(NamedTuple):
    """What statistics of one kind and shape knew before the rows of their images."""

    basis: Tensor  # (b, d, q)
    eigenvalues: Tensor  # (b, q) float64
    difference: Tensor  # (b, d), v


def refresh_(statistics: Sequence[Statistic]) -> list[Refreshed]:
    """Refresh every statistic's basis from the rows it has seen. Statistics of one kind and shape go together.

    The host waits once for all statistics of a device, once more where columns of some turn out to be nearly dependent,
    and for every shape of more columns than the eigensolver's kernel takes. Where the device has no float64 it waits
    once for all totals, and for the q × q matrices of every shape. Before the first refresh the basis that cosines and
    overlaps compare with is the start.
    """
    shapes: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, statistic in enumerate(statistics):
        basis = statistic.basis
        shapes[(basis.device, type(statistic), basis.dtype, basis.shape)].append(index)
    bring_home_(statistics)
    results: dict[int, Refreshed] = {}
    others: list[list[int]] = []
    for indices in shapes.values():
        results.update(_refresh_by_core_(statistics, indices))
        others.append([i for i in indices if i not in results])
    for some in _side_by_side(
        lambda group: _refresh_(statistics, group), list(_rounds(statistics, others)), statistics
    ):
        results.update(some)
    return [results[i] for i in range(len(statistics))]


def finish_(statistics: Sequence[Statistic]) -> None:
    """:meth:`Statistic.finish_` of every one."""
    _side_by_side(lambda statistic: statistic.finish_(), statistics, statistics)


def _refresh_by_core_(statistics: Sequence[Statistic], indices: list[int]) -> dict[int, Refreshed]:
    """Refresh those statistics of one kind and shape that compiled code can: none where it does not run."""
    indices = [i for i in indices if refresh_core_runs(statistics[i]) and math.isfinite(statistics[i].square_sum)]
    if not indices:
        return {}
    members = [statistics[i] for i in indices]
    counts = Statistic.counts(members)
    gains, parts = Statistic.gains(members, counts), []
    for part in extract_core(members, _LIMITS):
        for i, member in enumerate(part.members):
            if part.solved[i]:
                member.adopt_(part.bases[i], part.eigenvalues[i].clone(), sample=part.samples[i])
        parts.append(
            (part.eigenvalues, part.cosines, part.overlaps, torch.tensor(part.solved, dtype=torch.bool, device="cpu"))
        )
    eigenvalues, cosines, overlaps, solved = map(torch.cat, zip(*parts, strict=True))
    evidence = _evidence(members, counts, eigenvalues, cosines, overlaps, gains).numpy()
    return {i: _refreshed(one) for i, one, ok in zip(indices, evidence, solved.tolist(), strict=True) if ok}


def _refresh_(statistics: Sequence[Statistic], group: list[list[int]]) -> dict[int, Refreshed]:
    """Refresh some of the statistics, each list of indices of one kind and shape; the host waits once for all."""
    extractions = [_extract(indices, [statistics[i] for i in indices]) for indices in group]
    previous = [basis for e in extractions for basis in e.past.basis.unbind()]
    current = [basis for e in extractions for basis in e.basis.unbind()]
    comparison = start_comparison(previous, current) if comparison_runs(current) else None
    host = _on_host([torch.cat([e.evidence.flatten(1), e.status[:, None].double()], 1) for e in extractions])
    status = [rows[:, -1].astype(int) for rows in host]
    evidence = [rows[:, :-1] for rows in host]
    if comparison is not None:
        _take_(evidence, comparison.result())
    oblique = [np.flatnonzero(each >= OBLIQUE) for each in status]
    for certain in (False, True):
        some = [i for i, which in enumerate(oblique) if which.size]
        mended = [
            _mend_(extractions[i], oblique[i], status[i][oblique[i]] == INDEFINITE, certain=certain) for i in some
        ]
        for i, rows in zip(some, _on_host(mended), strict=True):
            evidence[i][oblique[i]] = rows[:, :-1]
            oblique[i] = oblique[i][rows[:, -1] == 0]
    results: dict[int, Refreshed] = {}
    for extraction, its_status, its_evidence in zip(extractions, status, evidence, strict=True):
        results.update(zip(extraction.indices, _adopt_(extraction, its_status, its_evidence), strict=True))
    return results


def _take_(evidence: list[npt.NDArray[np.float64]], compared: Comparison) -> None:  # (b, 4 q) each
    """Put cosines and overlaps that bases were compared by in the place of those that the refresh's algebra found."""
    first = 0
    for rows in evidence:
        b, q = len(rows), rows.shape[1] // 4
        rows[:, :q] = np.minimum(compared.cosines[first : first + b, :q], 1)
        rows[:, q : 2 * q] = compared.overlaps[first : first + b, :q]
        first += b


def _on_host(parts: list[Tensor]) -> list[npt.NDArray[np.float64]]:  # (n, m) each, float64
    """Matrices of one device as arrays that can be written to; the host waits once for all."""
    if not parts:
        return []
    together = torch.cat([part.flatten() for part in parts]).cpu().numpy()
    ends = np.cumsum([part.numel() for part in parts])[:-1]
    return [some.reshape(part.shape) for some, part in zip(np.split(together, ends), parts, strict=True)]


def _adopt_(
    extraction: _Extraction,
    status: npt.NDArray[np.int64],  # (b,)
    evidence: npt.NDArray[np.float64],  # (b, 4 q)
) -> list[Refreshed]:
    for i, member in enumerate(extraction.members):
        if status[i] != NOT_FINITE:
            member.adopt_(extraction.basis[i].clone(), extraction.eigenvalues[i].clone())
    return [
        _refreshed(one.reshape(4, -1), bool(code != NOT_FINITE)) for one, code in zip(evidence, status, strict=True)
    ]


def _side_by_side(work: Callable[[T], R], items: Sequence[T], statistics: Sequence[Statistic]) -> list[R]:
    """``work`` of every item. On a CPU one item a thread: factorising a small matrix keeps no more than one busy."""
    threads = torch.get_num_threads()
    if not 1 < threads <= len(items) or any(s.basis.device.type != "cpu" for s in statistics):
        return [work(item) for item in items]
    inference = torch.is_inference_mode_enabled()  # like all such modes, a thread's own

    def alone(item: T) -> R:
        with torch.inference_mode(inference), torch.no_grad():
            return work(item)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(alone, items))
    finally:
        torch.set_num_threads(threads)  # which the threads to come begin with


def _rounds(statistics: Sequence[Statistic], shapes: list[list[int]]) -> Iterator[list[list[int]]]:
    """What to extract before the host waits: per device all statistics; on a CPU, where waiting is free, a cacheful."""
    devices: dict[torch.device, list[list[int]]] = defaultdict(list)
    for indices in filter(None, shapes):
        basis = statistics[indices[0]].basis
        if basis.device.type == "cpu":
            size = max(1, CPU_CACHE_BYTES // basis.nbytes)
            yield from ([indices[start : start + size]] for start in range(0, len(indices), size))
        else:
            devices[basis.device].append(indices)
    yield from devices.values()


def _extract(indices: list[int], members: list[Statistic]) -> _Extraction:
    kind, counts = type(members[0]), Statistic.counts(members)
    sample = torch.stack([s.sample for s in members])
    mean, difference = kind.means(members, counts).unbind(1)
    product = torch.stack([s.image() for s in members]).baddbmm_(mean[:, :, None], mean[:, None] @ sample, alpha=-1)
    past = _Past(torch.stack([s.basis for s in members]), kind.past_eigenvalues(members), difference)
    approximation, status = nystrom(sample, product)
    basis, eigenvalues, cross = combine(*past, approximation)
    steep = (eigenvalues <= RELATIVE_ORTHOGONAL * eigenvalues[:, :1]).any(1)
    status = torch.where((status == SOLVED) & steep, OBLIQUE, status)
    finite = torch.stack([s.square_sum for s in members]).isfinite()  # squares may overflow before products do
    status = torch.where(finite, status, NOT_FINITE)
    evidence = _evidence(members, counts, eigenvalues, *_agreement(cross), Statistic.gains(members, counts))
    return _Extraction(indices, members, sample, product, past, basis, eigenvalues, counts, evidence, status)


def _agreement(cross: Tensor) -> tuple[Tensor, Tensor]:  # (b, q, q) -> (b, q), (b, q)
    """Per component its ``|cosine|``, per block its overlap."""
    squares = cross.square().cumsum(-1).cumsum(-2)
    return cross.diagonal(dim1=-2, dim2=-1).abs().clamp_max(1), squares.diagonal(dim1=-2, dim2=-1)


def _evidence(
    members: Sequence[Statistic],
    counts: Tensor,  # (b, 3)
    eigenvalues: Tensor,  # (b, q)
    cosines: Tensor,  # (b, q)
    overlaps: Tensor,  # (b, q)
    gains: Tensor,  # (b, q)
) -> Tensor:  # (b, 4, q)
    """Per component its ``|cosine|``, per block its overlap, per component its ratio, per block its gain."""
    ratios = Statistic.explained_variance_ratios(members, eigenvalues, counts)
    return torch.stack([cosines, overlaps, ratios, gains], 1)


def _refreshed(evidence: npt.NDArray[np.float64], finite: bool = True) -> Refreshed:  # (4, q)
    cosines, overlaps, ratios, gains = evidence
    return Refreshed(cosines, overlaps, ratios, gains, finite)


def _mend_(
    extraction: _Extraction,
    which: npt.NDArray[np.int64],  # (n,)
    indefinite: npt.NDArray[np.bool_],  # (n,)
    *,
    certain: bool,
) -> Tensor:  # (n, 4 q + 1) float64
    """Straighten some of the bases, extracted anew where that failed. Returns their evidence, and which it worked for.

    ``certain``: it works for all, and the host waits to see to it.
    """
    basis, values = _rows_of(extraction.basis, which), _rows_of(extraction.eigenvalues, which)
    if indefinite.any():
        anew, again = which[indefinite], np.flatnonzero(indefinite)
        approximation = nystrom_of_indefinite(_rows_of(extraction.sample, anew), _rows_of(extraction.product, anew))
        past = _Past(*(_rows_of(x, anew) for x in extraction.past))
        found, its_values, _ = combine(*past, approximation)
        _put_(basis, again, found)
        _put_(values, again, its_values)
    before = _rows_of(extraction.past.basis, which)
    filled = with_directions_of(before, basis, values)
    if certain:
        straight, done = orthonormalize(filled), torch.ones(len(filled), dtype=torch.bool, device=filled.device)
    else:
        straight, done = orthonormalize_by_cholesky(filled)
    _put_(extraction.basis, which, torch.where(done[:, None, None], straight, basis))
    _put_(extraction.eigenvalues, which, values)
    members, counts = [extraction.members[i] for i in which], _rows_of(extraction.counts, which)
    agreement = _agreement(double(before.mT @ straight))
    evidence = _evidence(members, counts, values, *agreement, Statistic.gains(members, counts))
    return torch.cat([evidence.flatten(1), double(done)[:, None]], 1)


def _rows_of(x: Tensor, indices: npt.NDArray[np.int64]) -> Tensor:  # (b, ...), (n,) -> (n, ...)
    """Some rows of a tensor; NumPy's array as an index would make the host wait."""
    return x[sent(torch.from_numpy(indices), x.device)]


def _put_(x: Tensor, indices: npt.NDArray[np.int64], rows: Tensor) -> None:  # (b, ...), (n,), (n, ...)
    x[sent(torch.from_numpy(indices), x.device)] = rows


def nystrom(
    sample: Tensor,  # (b, d, q), independent columns
    product: Tensor,  # (b, d, q): a positive semidefinite matrix C times sample
) -> tuple[Tensor, Tensor]:  # (b, d, q), (b,) int
    """N with N Nᵀ = Y (ΩᵀY)⁻¹ Yᵀ, the Nyström approximation of C (Tropp et al. 2017, arXiv 1706.05736, alg. 3).

    ΩᵀY is scaled to about a unit diagonal before it is factored, so that outlier directions of any size
    cost the small ones nothing; the q × q algebra is float64. The second result says SOLVED, NOT_FINITE (NaN or Inf is
    in the product; N is then without meaning) or INDEFINITE (rounding made ΩᵀY so: :func:`nystrom_of_indefinite`).
    Nothing here waits for the device.
    """
    scale, scaled = _scaled_core(sample, product)
    finite = scaled.isfinite().flatten(1).all(1)  # what is not finite in Y is not finite in ΩᵀY
    eye = torch.eye(sample.shape[-1], dtype=torch.float64, device=scaled.device)
    factor, info = torch.linalg.cholesky_ex(torch.where(finite[:, None, None], scaled, eye), upper=True)
    factor = torch.where((info == 0)[:, None, None], factor, eye)
    root = scale[:, :, None] * torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True)
    status = torch.where(finite, torch.where(info != 0, INDEFINITE, SOLVED), NOT_FINITE)
    return product @ like(root, product), status


def nystrom_of_indefinite(
    sample: Tensor,  # (b, d, q)
    product: Tensor,  # (b, d, q), finite
) -> Tensor:  # (b, d, q)
    """As :func:`nystrom` where there is no Cholesky factor: the same inverse root through eigenvalues.

    What the jitter alone keeps above zero, or not even that, is rounding; its inverse would be variance from nowhere.
    """
    scale, scaled = _scaled_core(sample, product)
    values, vectors = symmetric_eigen(scaled)
    seen = values > 2 * RELATIVE_JITTER
    inverse = torch.where(seen, values.where(seen, 1).rsqrt(), 0)
    return product @ like(scale[:, :, None] * vectors * inverse[:, None, :], product)


def combine(
    basis: Tensor,  # (b, d, q), orthonormal columns
    eigenvalues: Tensor,  # (b, q) float64
    difference: Tensor,  # (b, d)
    approximation: Tensor,  # (b, d, q)
) -> tuple[Tensor, Tensor, Tensor]:  # (b, d, q), (b, q) float64 descending, (b, q, q) float64
    """The leading q eigenpairs of A Aᵀ with the columns A = [Q √Λ, N, v], and Qᵀ times the eigenvectors.

    Block power steps in the small space of AᵀA find its leading right singular vectors, starting from the sum of each
    column of Q √Λ and the one of N that goes on from it; within their span the eigenpairs are exact. What Q holds of N
    and v already is taken out of them before anything is squared: rounding of a large direction, seen twice, would come
    out as another one. Eigenvectors without variance are zero. Nothing here waits for the device.
    """
    q = basis.shape[-1]
    new = torch.cat([approximation, difference[:, :, None]], -1)  # (b, d, q + 1)
    along = basis.mT @ new
    new = new - basis @ along
    held = torch.cat([torch.diag_embed(eigenvalues.sqrt()), double(along)], -1)  # Qᵀ A, (b, q, 2 q + 1)
    gram = held.mT @ held
    gram[:, q:, q:] += double(new.mT @ new)
    finite = gram.isfinite().flatten(1).all(1)[:, None, None]
    gram = torch.where(finite, gram, torch.eye(2 * q + 1, dtype=gram.dtype, device=gram.device))
    image = gram[..., :q] + gram[..., q : 2 * q]
    for _ in range(POWER_STEPS):
        span = _orthonormal(image)
        image = gram @ span
    values, vectors = symmetric_eigen(span.mT @ image)
    values = values.clamp_min(0)
    alive = values > RELATIVE_RANK * values[:, :1]
    turn = span @ (vectors * torch.where(alive, values.where(alive, 1).rsqrt(), 0)[:, None, :])
    cross = held @ turn
    return basis @ like(cross, basis) + new @ like(turn[:, q:], new), values, cross


def with_directions_of(
    before: Tensor,  # (b, d, q)
    basis: Tensor,  # (b, d, q)
    values: Tensor,  # (b, q) descending
) -> Tensor:  # (b, d, q)
    """The basis, in which directions without variance are those from before."""
    alive = values > RELATIVE_RANK * values[:, :1]
    return torch.where(alive[:, None, :].to(basis.device), basis, before)


def _orthonormal(matrix: Tensor) -> Tensor:  # (b, m, q) float64 both
    """Columns with the span of the matrix's, orthonormal but for directions that it lacks, which come out shorter."""
    gram = matrix.mT @ matrix
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal.where(diagonal > 0, 1).rsqrt(), 0)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(scale[:, :, None] * gram * scale[:, None, :] + SPAN_JITTER * eye, upper=True)
    return matrix @ (scale[:, :, None] * torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=True))


def _scaled_core(sample: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:  # (b, q), (b, q, q)
    """A scale that brings the diagonal of ΩᵀY to about one, and its symmetric part scaled, with jitter: float64.

    A direction that the rows lack has an image of rounding alone, which scaled up would be variance from nowhere: it
    gets 0. What tells it from a small one beside an outlier, whose image is the outlier's for the most part, is that
    ΩᵀY is symmetric there. If by chance its image is no more than its diagonal, the rounding of larger directions in
    its row is more than any semidefinite matrix could have there, and scaled up would hide those directions.
    """
    core = double(sample.mT @ product)
    image = double(torch.linalg.vector_norm(product, dim=-2))
    diagonal = torch.maximum(core.diagonal(dim1=-2, dim2=-1), RELATIVE_ALIGNMENT * image)
    scale = torch.where(diagonal > 0, diagonal.where(diagonal > 0, 1).rsqrt(), 0)
    skew, size = (torch.linalg.vector_norm(x, dim=-2) for x in (core - core.mT, core))
    is_rounding = (core.diagonal(dim1=-2, dim2=-1) <= RELATIVE_ALIGNMENT * image) & (skew > RELATIVE_SYMMETRY * size)
    scale = torch.where(is_rounding, 0, scale)
    scaled = scale[:, :, None] * ((core + core.mT) / 2) * scale[:, None, :]
    is_smaller = diagonal[:, :, None] < diagonal[:, None, :]
    is_rounding = ((scaled.abs() > 1 + RELATIVE_SYMMETRY) & is_smaller).any(-1)
    scale, scaled = scale.where(~is_rounding, 0), scaled.where(~is_rounding[:, :, None] & ~is_rounding[:, None, :], 0)
    eye = torch.eye(sample.shape[-1], dtype=torch.float64, device=core.device)
    return scale, scaled + RELATIVE_JITTER * eye
