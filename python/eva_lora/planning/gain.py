"""How large the features are that A gives B, beside those of PEFT's default A."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from statistics import median
from typing import Literal

from torch import Tensor

from eva_kernels._double import double
from eva_kernels.low_rank_fit import SecondMoment

from .statistics import EvaStatistics, SiteStatistics

__all__ = ["feature_gain", "with_matched_gain"]


def feature_gain(statistics: EvaStatistics, lora_a: Mapping[str, Tensor]) -> dict[str, float]:
    """Layer → g = √(E‖A x‖² / (r · E‖x‖² / 3d)), of any A, from statistics alone.

    The denominator is what PEFT's default gives on average: an A of entries uniform in ±1/√d, whose variance is 1/(3d).
    At one learning rate, the first steps of an adaptive optimizer move B by as much whatever it is fed, and the layer's
    output g times as far. E‖A x‖² is exact where A lies in the span of the components kept, as EVA's does; what lies
    outside counts with the mean variance of the directions left out.

    Args:
        statistics: From :func:`eva_lora.collect` or :meth:`eva_lora.EvaStatistics.load`.
        lora_a: Layer → A, (parts · rank, d), of any floating dtype: a plan's ``lora_a``, or what
            ``eva_lora.reporting.load_directions`` reads of an adapter's folder.

    Returns:
        The gain of every layer that has an A, in the statistics' order. Layers of rank 0, or that saw nothing but
        zeros, have none. Of experts it is that of all of their rows together.

    Raises:
        ValueError: ``lora_a`` has no layer of these statistics, or a layer's A does not fit its input.
    """
    sites = [site for site in statistics.sites if site.name in lora_a]
    if not sites:
        raise ValueError("lora_a: expected matrices A of the layers that the statistics are of, it has none of them")

    @lru_cache(maxsize=1)  # layers that share an input follow each other
    def moment(index: int) -> SecondMoment:
        return SecondMoment(*map(double, statistics.inputs[index].second_moment()))

    gains = {site.name: _gain(site, statistics, moment, lora_a[site.name]) for site in sites}
    return {name: gain for name, gain in gains.items() if gain is not None}


def _gain(
    site: SiteStatistics, statistics: EvaStatistics, moment: Callable[[int], SecondMoment], lora_a: Tensor
) -> float | None:
    parts, d = len(site.inputs), site.in_features
    if lora_a.ndim != 2 or lora_a.shape[1] != d or len(lora_a) % parts:
        raise ValueError(
            f"lora_a: expected A of {site.name} of shape ({f'{parts} · ' if parts > 1 else ''}rank, {d}), "
            f"got {tuple(lora_a.shape)}"
        )
    if not len(lora_a):
        return None
    given = default = 0.0
    for index, a in zip(site.inputs, lora_a.chunk(parts), strict=True):
        if index < 0:
            continue
        rows, known = statistics.inputs[index].num_rows, moment(index)  # float64: A may lie across a mean that is large
        given += rows * float(known.energy(double(a.to(known.factor.device))))
        default += rows * len(a) * known.trace() / (3 * d)
    return (given / default) ** 0.5 if default > 0 else None


def with_matched_gain(
    statistics: EvaStatistics, lora_a: Mapping[str, Tensor], match: Literal["global"] | bool
) -> dict[str, Tensor]:
    """Every A divided by its own gain (True), or by the median of all ("global"): its rows' directions stay.

    An A without a gain, or whose gain is 0, stays as it is.
    """
    gains = feature_gain(statistics, lora_a)
    if match == "global" and gains:
        gains = dict.fromkeys(gains, median(gains.values()))
    return {name: a / gains[name] if gains.get(name) else a for name, a in lora_a.items()}
