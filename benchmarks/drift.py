"""What float32 accumulation costs over very many rows.

    python benchmarks/drift.py                  # 10⁸ rows, a few minutes on one core
    python benchmarks/drift.py --rows 1000000

The stream repeats a pool of 32 distinct batches of 4096 rows (64 columns, means of 100 standard deviations, a spectrum
that falls by 10⁴), so that its exact scatter is known at every length: the float64 sums of the pool, weighted by how
often each batch came. The arithmetic is that of a stream of distinct rows: every row is subtracted, multiplied and
added as a new one would be. What does not happen is that the data change their distribution.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eva_kernels import GramStatistic, Statistic, SubspaceStatistic, refresh_

D, Q, TOP, POOL, BATCH = 64, 48, 16, 32, 4096
REFRESH_EVERY = 4  # batches, as in a pass


@dataclass(frozen=True)
class Drift:
    """Errors at one length of the stream, relative, against float64.

    Attributes:
        rows: Rows so far.
        scatter: Of the whole centred scatter, ‖·‖_F; None for a statistic that does not keep it.
        eigenvalues: The worst of the top 16.
        total: Of the total scatter, which ratios are taken over.
        loss: 1 − captured variance / optimum of the top 16.
    """

    rows: int
    scatter: float | None
    eigenvalues: float
    total: float
    loss: float


def pool(seed: int = 0) -> list[Tensor]:
    """The distinct batches, (4096, 64) float32 each."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    scales = 10 ** torch.linspace(0, -2, D)  # of the standard deviations: eigenvalues fall by 10⁴
    mean = 100 * torch.randn(D, generator=generator)
    return [torch.randn(BATCH, D, generator=generator) * scales @ mixing + mean for _ in range(POOL)]


def drift(statistic: Statistic, batches: list[Tensor], rows: int, marks: list[int]) -> Iterator[Drift]:
    """Stream ``rows`` rows through ``statistic``; yield its errors once each of ``marks`` is reached."""
    shift = batches[0].double().mean(0)
    shifted = [batch.double() - shift for batch in batches]
    sums = torch.stack([z.sum(0) for z in shifted])
    scatters = torch.stack([z.T @ z for z in shifted])
    counts = torch.zeros(POOL, dtype=torch.float64)
    marks = sorted(mark for mark in marks if mark <= rows)
    for number in range(-(-rows // BATCH)):
        statistic.accumulate_(batches[number % POOL])
        counts[number % POOL] += 1
        if (number + 1) % REFRESH_EVERY == 0:
            refresh_([statistic])
        if marks and statistic.num_rows >= marks[0]:
            marks.pop(0)
            total = counts @ sums
            exact = torch.einsum("b,bij->ij", counts, scatters) - torch.outer(total, total) / statistic.num_rows
            yield _errors(statistic, exact)


def _errors(statistic: Statistic, exact: Tensor) -> Drift:
    now = statistic.clone()
    if now.pending_rows:
        refresh_([now])
    scatter = None
    if isinstance(now, GramStatistic):
        own = now.gram.double() - torch.outer(now.column_sum, now.column_sum / now.num_rows)
        scatter = float(torch.linalg.norm(own - exact) / torch.linalg.norm(exact))
    now.finish_()
    values = torch.linalg.eigvalsh(exact).flip(0)[:TOP]
    basis = now.basis.double()[:, :TOP]
    captured = torch.trace(basis.T @ exact @ basis)
    return Drift(
        rows=now.num_rows,
        scatter=scatter,
        eigenvalues=float(((now.eigenvalues[:TOP] - values) / values).abs().max()),
        total=float((now.total_scatter() / exact.trace() - 1).abs()),
        loss=float(1 - captured / values.sum()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10**8)
    rows = parser.parse_args().rows
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, d = {D}, q = {Q}, batches of {BATCH} rows")
    print(f"{'statistic':22} {'rows':>11}  {'scatter':>8}  {'top-16 eigenvalues':>18}  {'total':>8}  {'loss':>8}")
    for name, kind, impl in (
        ("gram", GramStatistic, "auto"),
        ("subspace", SubspaceStatistic, "auto"),
        ("subspace, reference", SubspaceStatistic, "reference"),
    ):
        start = time.perf_counter()
        for result in drift(kind(D, Q, impl=impl), pool(), rows, [10**n for n in range(5, 12)]):
            scatter = "" if result.scatter is None else f"{result.scatter:.1e}"
            print(
                f"{name:22} {result.rows:11,}  {scatter:>8}  {result.eigenvalues:18.1e}  {result.total:8.1e}  "
                f"{result.loss:8.1e}",
                flush=True,
            )
        print(f"{name:22} {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
