"""Statistics as a pass needs them: which kind, how wide, on which device."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from eva_kernels.streaming_svd import GramStatistic, Statistic, SubspaceStatistic

from ..adapters import LoraSite
from ..config import GRAM_MAX_WIDENING, EvaConfig

__all__ = ["StatisticMaker", "device_of"]

_KINDS: dict[str, type[GramStatistic] | type[SubspaceStatistic]] = {
    kind.kind: kind for kind in (GramStatistic, SubspaceStatistic)
}


class StatisticMaker:
    """Makes the statistics of a run's inputs, and keeps within its memory.

    Args:
        sites: The LoRA layers.
        candidates: Components that each may be given.
        config: Of the run.

    Attributes:
        columns: Of each site's bases.
        site_of: Part of a site, counted over all sites → the site's index.
        gram_bytes: Of the exact statistics made so far.
    """

    def __init__(self, sites: Sequence[LoraSite], candidates: Sequence[int], config: EvaConfig) -> None:
        self._sites, self._config = sites, config
        self.columns = [min(site.in_features, config.columns_for(k)) for site, k in zip(sites, candidates, strict=True)]
        self.site_of = [i for i, site in enumerate(sites) for _ in range(site.parts)]
        self.gram_bytes = 0

    def make(self, stream: int) -> tuple[Statistic, str]:
        """The statistic of a layer's input, and why it is of that kind."""
        index, config = self.site_of[stream], self._config
        width, columns = self._sites[index].in_features, self.columns[index]
        gram_bytes = GramStatistic.predict_nbytes(width, columns)
        kind: type[GramStatistic] | type[SubspaceStatistic] = SubspaceStatistic
        if config.keep_moments:
            kind, reason = GramStatistic, "its whole second moment is kept"
        elif config.statistic != "auto":
            kind, reason = (GramStatistic if config.statistic == "gram" else SubspaceStatistic), "asked for"
        elif width > GRAM_MAX_WIDENING * columns:
            reason = f"wider than {GRAM_MAX_WIDENING} times its {columns} columns"
        elif config.memory_budget is not None and self.gram_bytes + gram_bytes > config.memory_budget:
            reason = f"memory_budget of {config.memory_budget} bytes is spent"
        else:
            kind, reason = GramStatistic, f"at most {GRAM_MAX_WIDENING} times as wide as its {columns} columns"
        if kind is GramStatistic:
            self.gram_bytes += gram_bytes
        return self.empty(stream, kind.kind, columns), reason

    def empty(self, stream: int, kind: str, columns: int) -> Statistic:
        """An empty statistic of a layer's input, of a kind that is settled already."""
        site, config = self._sites[self.site_of[stream]], self._config
        return _KINDS[kind](
            site.in_features, columns, device=device_of(site.module.modules()) or "cpu", seed=config.seed + stream,
            dtype=torch.float64 if config.keep_moments else torch.float32,
            impl=config.impl, watch_gain=config.convergence == "captured",
        )  # fmt: skip


def device_of(modules: Iterable[nn.Module]) -> torch.device | None:
    """Where modules compute: the device of their first parameter or buffer that is on one, or, of weights that are
    loaded as they are needed, where their hook says. None where nothing tells."""
    modules = list(modules)
    hooks = [vars(module)["_hf_hook"] for module in modules if "_hf_hook" in vars(module)]
    told = next((hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None), None)
    if told is not None:
        return torch.device(told)
    tensors = (t for name in ("_parameters", "_buffers") for module in modules for t in vars(module)[name].values())
    return next((tensor.device for tensor in tensors if tensor is not None and tensor.device.type != "meta"), None)
