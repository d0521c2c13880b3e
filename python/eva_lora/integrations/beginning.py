"""EVA at a trainer's beginning: once, with a plan beside the run, from which a run that is resumed gets its ranks."""

from pathlib import Path

from torch import nn

from ..initializing import apply
from ..planning import EvaPlan

__all__ = ["PLAN", "planned_before"]

PLAN = "eva_plan.safetensors"  # in the run's output folder


def planned_before(model: nn.Module, folder: str | Path) -> None:
    """Give a model that is built anew the ranks of the run that is resumed, whose checkpoint then fits.

    Raises:
        ValueError: the run has left no plan, or one of other layers.
    """
    path = Path(folder) / PLAN
    if not path.is_file():
        raise ValueError(
            f"resume_from_checkpoint: there is no {path}, from which the adapter's ranks are known; load the "
            "checkpoint's adapter with PeftModel.from_pretrained, and train that without EVA"
        )
    apply(model, EvaPlan.load(path))
