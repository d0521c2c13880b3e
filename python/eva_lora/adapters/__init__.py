"""What the pass needs to know of a LoRA library, and where its adapters are found."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import nn

if TYPE_CHECKING:
    from ..planning import EvaPlan

__all__ = ["LoraAdapter", "LoraSite", "find_adapter"]


@dataclass(frozen=True)
class LoraSite:
    """One LoRA layer.

    Attributes:
        name: Its name in the base model, unique.
        module: The module whose first positional input is the layer's input.
        in_features: Width of that input.
        rank: Its rank as it stands.
    """

    name: str
    module: nn.Module
    in_features: int
    rank: int


class LoraAdapter(Protocol):
    """One adapter of a model, whatever library made it. A library is supported by implementing this."""

    @property
    def sites(self) -> list[LoraSite]:
        """Layers EVA applies to, in the model's order."""

    @property
    def eva_config(self) -> object | None:
        """The EVA options the library itself carries, taken where the caller gives none."""

    def disabled(self) -> AbstractContextManager[None]:
        """Within it the model computes what its base computes; afterwards all is as before."""

    def apply(self, plan: "EvaPlan") -> None:
        """Write the plan into the model: all of it, or none of it and an error."""


def find_adapter(model: nn.Module) -> LoraAdapter:
    """The adapter of ``model``.

    Raises:
        ValueError: no LoRA layer of a supported library is found, or the adapter cannot be initialised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module with LoRA layers, got {type(model).__name__}")
    from . import peft

    adapter = peft.find(model)
    if adapter is None:
        raise ValueError(
            "model: found no LoRA layers. Add them first, for example peft.get_peft_model(model, LoraConfig(...)). "
            "Supported today: PEFT's LoRA on nn.Linear and transformers' Conv1D."
        )
    return adapter
