"""From statistics to ranks and A matrices, under one budget. No model, no data, no forward pass."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eva_kernels.allocation import allocate_ranks, candidate_components

from . import storage
from .config import EvaConfig
from .statistics import EvaStatistics, InputStatistics, SiteStatistics

__all__ = ["EvaPlan", "PlannedSite", "plan"]


@dataclass(frozen=True)
class PlannedSite:
    """What one LoRA layer will be.

    Attributes:
        name: The layer's name in the base model.
        rank: Its new rank; 0 removes the adapter from the layer.
        configured_rank: The rank it was configured with.
        in_features: Width of its input.
        explained_variance_ratio: Ratio of every candidate component, descending.
        input: Index of its input among the distinct inputs.
    """

    name: str
    rank: int
    configured_rank: int
    in_features: int
    explained_variance_ratio: tuple[float, ...]
    input: int


@dataclass(frozen=True)
class EvaPlan:
    """The result of :func:`plan`.

    Attributes:
        sites: Name → plan of each LoRA layer, in the model's order.
        lora_a: Name → (rank, d) float32; rows orthonormal, or divided by √σ where ``whiten`` is set.
        config: The configuration it was planned with.
        budget: Ranks there were to give.
    """

    sites: dict[str, PlannedSite]
    lora_a: dict[str, Tensor]
    config: EvaConfig
    budget: int

    @property
    def ranks(self) -> dict[str, int]:
        return {name: site.rank for name, site in self.sites.items()}

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file; returns its path."""
        facts = {
            "sites": [asdict(site) for site in self.sites.values()],
            "config": self.config.to_dict(),
            "budget": self.budget,
        }
        return storage.save(path, "plan", self.lora_a, facts)

    @classmethod
    def load(cls, path: str | Path) -> "EvaPlan":
        """Read what :meth:`save` wrote; raises as :func:`eva_lora.storage.load` does."""
        lora_a, facts = storage.load(path, "plan")
        try:
            entries = [storage.checked(PlannedSite, entry) for entry in facts.pop("sites")]
            config = EvaConfig.from_dict(facts.pop("config"))
            result = storage.checked(
                cls, facts, sites={site.name: site for site in entries}, lora_a=lora_a, config=config
            )
            result._check(len(entries))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {path} is no complete plan file: {error}") from error
        return result

    def _check(self, count: int) -> None:
        """Raise ValueError where the parts of a file do not fit together."""
        if not count or len(self.sites) < count:
            raise ValueError("expected sites of different names")
        if set(self.lora_a) != set(self.sites):
            raise ValueError(f"A of {sorted(set(self.sites) ^ set(self.lora_a))} is missing or has no site")
        for name, site in self.sites.items():
            a = self.lora_a[name]
            if tuple(a.shape) != (site.rank, site.in_features) or a.dtype != torch.float32:
                raise ValueError(
                    f"A of {name} is {a.dtype} of shape {tuple(a.shape)}, expected float32 of shape "
                    f"{(site.rank, site.in_features)}"
                )
            ratios = site.explained_variance_ratio
            if site.configured_rank < 1 or site.input < 0 or len(ratios) < site.rank:
                raise ValueError(f"site {name} is out of range or has fewer ratios than ranks")
            if not all(0 <= ratio < float("inf") for ratio in ratios):
                raise ValueError(f"site {name} has a ratio that is negative or not finite")
            if not bool(a.isfinite().all()):
                raise ValueError(f"A of {name} holds NaN or Inf")


def plan(statistics: EvaStatistics, config: Any = None, budget: int | None = None) -> EvaPlan:
    """Give the budget to the components that explain most variance, and cut A from them.

    Ranks: every candidate component of every layer is pooled, and the ``budget`` with the largest
    explained-variance ratios are taken; a layer's rank is how many of them are its own (arXiv 2410.07170,
    §3.3). A row's sign makes its largest entry positive.

    Args:
        statistics: From :func:`collect` or :meth:`EvaStatistics.load`.
        config: Ours or PEFT's ``EvaConfig``; ``rho``, ``whiten`` and the rank bounds may differ from those
            of the pass. None: the pass's own.
        budget: Ranks to give over all layers. None: the sum of the configured ranks.

    Raises:
        ValueError: ``rho`` asks for more components than the pass kept, or the bounds cannot be met.
    """
    config = statistics.config if config is None else EvaConfig.of(config)
    ranks = [site.rank for site in statistics.sites]
    if budget is None:
        budget = sum(ranks)
    elif budget < 1:
        raise ValueError(f"budget: expected at least 1, got {budget}")
    groups = [site.input for site in statistics.sites]
    widths = [site.in_features for site in statistics.sites]
    candidates = candidate_components(
        ranks, config.rho, widths=widths, groups=groups, rank_multiple=config.rank_multiple
    )
    ratios = np.zeros((len(ranks), int(candidates.max())))
    for i, site in enumerate(statistics.sites):
        kept = statistics.inputs[site.input].explained_variance_ratio().numpy()
        if candidates[i] > len(kept):
            raise ValueError(
                f"rho: {config.rho} asks for {candidates[i]} components of {site.name}, but the statistics hold "
                f"{len(kept)}; collect with this rho"
            )
        ratios[i, : candidates[i]] = kept[: candidates[i]]
    allocated = allocate_ranks(
        ratios, candidates, budget, groups=groups, min_rank=config.min_rank, max_rank=config.max_rank,
        rank_multiple=config.rank_multiple,
    )  # fmt: skip
    sites, lora_a = {}, {}
    for i, (site, rank) in enumerate(zip(statistics.sites, allocated.tolist(), strict=True)):
        sites[site.name] = PlannedSite(
            site.name, rank, site.rank, site.in_features, tuple(ratios[i, : candidates[i]].tolist()), site.input
        )
        lora_a[site.name] = _lora_a(site, statistics.inputs[site.input], rank, config.whiten)
    return EvaPlan(sites, lora_a, config, budget)


def _lora_a(site: SiteStatistics, entry: InputStatistics, rank: int, whiten: bool) -> Tensor:  # (rank, d)
    rows = entry.components[:rank].clone()
    largest = rows.abs().argmax(1, keepdim=True) if rank else torch.empty(0, 1, dtype=torch.long)
    rows *= torch.where(rows.gather(1, largest) < 0, -1.0, 1.0)
    if whiten:
        singular_values = entry.eigenvalues[:rank].sqrt()
        if bool((singular_values <= 0).any()):
            raise ValueError(f"whiten: {site.name} is given a component without variance, which cannot be whitened")
        rows /= singular_values.sqrt()[:, None].to(rows.dtype)
    return rows
