"""Whether a plan is one for these layers."""

from collections.abc import Sequence

from ..planning import EvaPlan
from .sites import LoraSite

__all__ = ["check_plan"]


def check_plan(plan: EvaPlan, sites: Sequence[LoraSite]) -> None:
    """Whether a plan was made for these sites, as they were or built with the ranks that it gives them.

    Raises:
        ValueError: for others, or for sites of another rank, width or number of parts, or ones that cannot
            have the rank it gives them.
    """
    names = {site.name for site in sites}
    removed = {name for name, planned in plan.sites.items() if planned.rank == 0}
    missing, unknown = sorted(names - set(plan.sites)), sorted(set(plan.sites) - names - removed)
    if missing or unknown:
        raise ValueError(
            f"plan: it is for other layers than the model's: not in the plan {missing}, not in the model {unknown}"
        )
    for site in sites:
        planned = plan.sites[site.name]
        if site.rank not in (planned.configured_rank, planned.rank) or planned.in_features != site.in_features:
            raise ValueError(
                f"plan: {site.name} was planned from rank {planned.configured_rank} and width {planned.in_features}, "
                f"the model has rank {site.rank} and width {site.in_features}"
            )
        if planned.parts != site.parts:
            raise ValueError(f"plan: {site.name} was planned with {planned.parts} parts, the model has {site.parts}")
        if planned.rank % site.rank_multiple or (planned.rank == 0 and not site.removable):
            floor = "" if site.removable else " and not 0"
            raise ValueError(
                f"plan: {site.name} is given rank {planned.rank}, it must be a multiple of {site.rank_multiple}{floor}"
            )
