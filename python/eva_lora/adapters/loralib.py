"""loralib: ``Linear``, ``MergedLinear`` and ``ConvLoRA`` (github.com/microsoft/LoRA)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .parameters import ParameterSite
from .recognition import is_a, require_unmerged
from .sites import LeftAlone, LoraSite, Patches

__all__ = ["site_of"]

_NAMES: dict[str, Any] = {"rank": "r", "alpha": "lora_alpha", "scaling": "scaling"}


@dataclass(frozen=True)
class PatchChunks:
    """The patches of a convolution, each cut into as many rows as the kernel is wide."""

    patches: Patches

    @property
    def width(self) -> int:
        return self.patches.width // self._chunks

    @property
    def _chunks(self) -> int:
        return self.patches.kernel_size[0]

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return (*self.patches.shape(x), self._chunks)

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        for piece in self.patches.pieces(x):
            yield piece.reshape(-1, self.width)


def site_of(name: str, module: Any) -> LoraSite | None:
    """The site that a layer of loralib with a LoRA is.

    ``ConvLoRA`` views B A as the weight, so that every A row meets each of the k chunks of a patch; one of its
    ranks is k rows of A.

    Raises:
        LeftAlone: EVA does not apply to it.
        ValueError: its adapter is merged, or it cannot run.
    """
    if not is_a(module, "loralib.", "LoRALayer") or not hasattr(module, "lora_A"):
        return None
    if isinstance(module, nn.Embedding):
        raise LeftAlone("an embedding's input is token numbers, which have no directions of variance")
    require_unmerged(name, module, module.lora_B, "model.train() takes it out again")
    if is_a(module, "loralib.", "ConvLoRA"):
        return _convolution(name, module)
    groups = sum(module.enable_lora) if is_a(module, "loralib.", "MergedLinear") else 1
    return ParameterSite.of(name, module, "lora_A", "lora_B", groups=groups, **_NAMES)


def _convolution(name: str, module: Any) -> LoraSite:
    conv = module.conv
    if conv.groups > 1:
        raise LeftAlone(f"with groups={conv.groups} each group of outputs reads a part of A of its own")
    if conv.weight.numel() != module.lora_B.shape[0] * module.lora_A.shape[1]:
        raise ValueError(
            f"model: loralib's adapter of {name} cannot run: B A has {module.lora_B.shape[0]} x "
            f"{module.lora_A.shape[1]} values, the layer's weight {tuple(conv.weight.shape)}"
        )
    size = conv.kernel_size[0]
    chunks = PatchChunks(Patches.of(conv))
    return ParameterSite.of(name, module, "lora_A", "lora_B", rows=chunks, rows_per_rank=size, **_NAMES)
