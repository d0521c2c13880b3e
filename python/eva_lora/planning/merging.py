"""Statistics of the same layers from different rows, as one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .statistics import EvaStatistics, InputStatistics, SiteStatistics

__all__ = ["merged"]


def merged(parts: Sequence[EvaStatistics]) -> EvaStatistics:
    """What several processes found, each from rows of its own.

    Means and total scatters are exact; of each part's scatter its leading directions are known, and the leading ones
    of their sum are kept. What counts batches goes on in step, so the most that any saw are counted, and rows are added
    up. The order of the parts decides the last bits.

    Raises:
        ValueError: they are of different layers, or were made with different options.
    """
    first = parts[0]
    if any([site.name for site in part.sites] != [site.name for site in first.sites] for part in parts) or any(
        part.config != first.config for part in parts
    ):
        raise ValueError("process_group: its ranks watch different layers, or with different options")
    found: dict[tuple[int, ...], int] = {}  # the index of an input in each of the parts -> its index here
    sites = []
    for same in zip(*(part.sites for part in parts), strict=True):
        keys = [*zip(*(site.inputs for site in same), strict=True)]
        inputs = tuple(found.setdefault(key, len(found)) if max(key) >= 0 else -1 for key in keys)
        sites.append(_site(same, inputs))
    return EvaStatistics(
        sites=sites,
        inputs=[
            _input([part.inputs[index] for part, index in zip(parts, key, strict=True) if index >= 0]) for key in found
        ],
        config=first.config,
        num_batches=max(part.num_batches for part in parts),
        num_rows=sum(part.num_rows for part in parts),
        seconds={name: max(part.seconds.get(name, 0.0) for part in parts) for name in first.seconds},
        history=[min(counts) for counts in zip(*(part.history for part in parts), strict=False)],
        stop_reason="; ".join(dict.fromkeys(part.stop_reason for part in parts)),
        notes=tuple(note for note in first.notes if all(note in part.notes for part in parts)),
        trace=first.trace,
        peak_memory={
            device: max(part.peak_memory.get(device, 0) for part in parts)
            for device in sorted({device for part in parts for device in part.peak_memory})
        },
    )


def _site(same: Sequence[SiteStatistics], inputs: tuple[int, ...]) -> SiteStatistics:
    rules = sorted({rule for site in same for rule in site.rows.split("; ") if rule})
    return replace(
        same[0],
        inputs=inputs,
        converged=all(site.converged for site in same),
        components_converged=min(site.components_converged for site in same),
        rows="; ".join(rules),
    )


def _input(parts: Sequence[InputStatistics]) -> InputStatistics:
    if len(parts) == 1:
        return parts[0]
    rows = sum(part.num_rows for part in parts)
    mean = torch.stack([part.mean.double() * part.num_rows for part in parts]).sum(0) / max(1, rows)
    off = torch.stack([(part.mean.double() - mean) * part.num_rows**0.5 for part in parts])  # (parts, d)
    # The scatter about the common mean is FᵀF, of each part's own directions and of the means.
    factor = torch.cat([*(part.components.double() * part.eigenvalues.sqrt()[:, None] for part in parts), off])
    _, values, directions = torch.linalg.svd(factor, full_matrices=False)
    kept = max(len(part.eigenvalues) for part in parts)
    return InputStatistics(
        kind=parts[0].kind,
        num_rows=rows,
        total_scatter=sum(part.total_scatter for part in parts) + float(off.square().sum()),
        nbytes=max(part.nbytes for part in parts),
        reason=parts[0].reason,
        skipped_rows=sum(part.skipped_rows for part in parts),
        eigenvalues=values[:kept].square(),
        components=directions[:kept].float().contiguous(),
        mean=mean.float(),
        moment=_moment(parts),
    )


def _moment(parts: Sequence[InputStatistics]) -> Tensor | None:  # (d, d) float64
    """Exact, where every part has its own."""
    moments = [part.moment * part.num_rows for part in parts if part.moment is not None]
    if len(moments) < len(parts):
        return None
    return torch.stack(moments).sum(0) / max(1, sum(part.num_rows for part in parts))
