"""What comes of a run: the statistics that planning needs, and what a report says of the pass."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eva_kernels.streaming_svd import GramStatistic, Statistic

from ..planning import EvaStatistics, InputStatistics, SiteStatistics
from .inputs import DistinctInput
from .measurements import peak_memory
from .run import Run

__all__ = ["statistics_of"]


def statistics_of(run: Run) -> EvaStatistics:
    """The statistics of a run that is finished."""
    decision = run.convergence.decision
    assert decision is not None
    done = dict(zip(run.convergence.members, decision.done, strict=True))
    converged = dict(zip(run.convergence.members, decision.components_converged, strict=True))
    index = {id(entry): i for i, entry in enumerate(run.capture.inputs)}
    return EvaStatistics(
        sites=[
            SiteStatistics(
                name=site.name, inputs=_inputs_of(run, i, index), rank=site.rank, in_features=site.in_features,
                converged=bool(done.get(i, False)), components_converged=int(converged.get(i, 0)),
                rank_multiple=site.rank_multiple, removable=site.removable, rows=run.row_rules.said_of(site.name),
                parameters=site.parameters,
            )
            for i, site in enumerate(run.sites)
        ],
        inputs=_inputs(run),
        config=run.config, num_batches=run.num_batches, num_rows=run.num_rows, seconds=run.seconds,
        history=run.history, stop_reason=run.stop_reason, notes=_notes(run), trace=run.trace,
        peak_memory=peak_memory(),
    )  # fmt: skip


def _inputs_of(run: Run, site: int, index: Mapping[int, int]) -> tuple[int, ...]:
    """Of a site's parts, -1 of one that saw no rows; ``index``: of each input, by its identity."""
    entries = [run.capture.input_of[stream] for stream in run.capture.streams_of[site]]
    return tuple(-1 if entry is None else index[id(entry)] for entry in entries)


def _notes(run: Run) -> tuple[str, ...]:
    left_alone = [f"{name} is not initialised by EVA: {reason}" for name, reason in run.left_alone.items()]
    return (*left_alone, *(f"{name} saw no input: it keeps its rank and its initial A" for name in run.silent()))


def _inputs(run: Run) -> list[InputStatistics]:
    """Of every distinct input. The host waits for a device once for all, and for each basis, which is large."""
    statistics = [entry.statistic for entry in run.capture.inputs]
    vectors = _on_host([v for s in statistics for v in (s.total_scatter()[None], s.eigenvalues, s.mean())])
    return [_input_statistics(run, entry, *vectors[3 * i : 3 * i + 3]) for i, entry in enumerate(run.capture.inputs)]


def _input_statistics(
    run: Run,
    entry: DistinctInput,
    total_scatter: Tensor,  # (1,) float64
    eigenvalues: Tensor,  # (q,) float64
    mean: Tensor,  # (d,) float64
) -> InputStatistics:
    statistic = entry.statistic
    return InputStatistics(
        kind=statistic.kind, num_rows=statistic.num_rows, total_scatter=float(total_scatter),
        nbytes=statistic.nbytes(), reason=entry.reason,
        skipped_rows=sum(run.row_rules.skipped.get(name, 0) for name in run.names(entry)),
        eigenvalues=eigenvalues, components=statistic.basis.T.float().cpu().contiguous(), mean=mean.float(),
        moment=_moment(statistic) if run.config.keep_moments else None,
    )  # fmt: skip


def _on_host(vectors: Sequence[Tensor]) -> list[Tensor]:  # (n,) float64 each
    """Copies on the CPU; the host waits once for those of a device."""
    of_device: dict[torch.device, list[int]] = defaultdict(list)
    for i, vector in enumerate(vectors):
        of_device[vector.device].append(i)
    found = list(vectors)
    for indices in of_device.values():
        together = torch.cat([vectors[i] for i in indices]).cpu()
        for i, part in zip(indices, torch.split(together, [len(vectors[i]) for i in indices]), strict=True):
            found[i] = part.clone()
    return found


def _moment(statistic: Statistic) -> Tensor:  # (d, d) float64
    assert isinstance(statistic, GramStatistic)
    return statistic.second_moment().cpu()
