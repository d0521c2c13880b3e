"""What a method has started, in each layer and in all: as members, as text and as JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..planning import storage, versions
from .layout import Grid

__all__ = ["LayerStart", "StartReport"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerStart:
    """One layer. With L = B A (times the scaling where that moves out of the base):

    Attributes:
        rank: The rank that is trained; where the base weight stays as it is, though the method takes part of it, the
            layer has twice that.
        configured_rank: The rank it was configured with.
        weight_share: ‖Uᵀ M‖² / ‖W‖²: of the weight, what the directions hold that A and B start from. None where they
            are a gradient's.
        output_share: E‖Uᵀ M x‖² / E‖W x‖²: the same of the layer's outputs, on the inputs that were given.
        kept_share: The same on the inputs that are to be kept. None where there were none.
        rounding: ‖W − (base) − s B A‖ / ‖W‖, what the base's dtype rounds off of it. None where the base stays as it
            is.
    """

    rank: int
    configured_rank: int
    weight_share: float | None
    output_share: float | None = None
    kept_share: float | None = None
    rounding: float | None = None


@dataclass(frozen=True)
class StartReport:
    """The result of :func:`eva_lora.initialize`.

    Attributes:
        method: Its name.
        layers: Name in the base model → what became of the layer.
        budget: Ranks there were to give.
        base: "less": W is W − s B A now, or what the layer computes without its trained matrices is; or "kept".
        num_batches, num_rows: Of the inputs that were given; 0 where none are looked at.
        seconds: Wall time.
        notes: What was not as asked.
        config: The options of the pass and of the ranks.
        losses: The mean loss of the base on the batches that gradients were taken of, and after a step along what the
            layers start from: that start itself where the base stays as it is, else one that would lower the loss by a
            hundredth if it went on as it begins. None where no gradients are.
        versions: Of what the result depends on.
    """

    method: str
    layers: dict[str, LayerStart]
    budget: int
    base: str
    num_batches: int
    num_rows: int
    seconds: float
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    losses: tuple[float, float] | None = None
    versions: dict[str, str] = field(default_factory=versions)

    @classmethod
    def load(cls, path: str | Path) -> "StartReport":
        """Read what :meth:`save` wrote: a ``start.json``, or the folder that holds it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is no complete report.
        """
        path = Path(path)
        path = path / "start.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"path: there is no file {path}")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            version = stored.pop("format_version")
            layers = {name: storage.checked(LayerStart, layer) for name, layer in stored.pop("layers").items()}
            report = storage.checked(cls, {"losses": None, **stored}, layers=layers)  # absent in older files
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {path} is no complete report of a start: {error}") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"path: {path} is no complete report of a start: expected format version {FORMAT_VERSION}")
        return report

    @property
    def ranks(self) -> dict[str, int]:
        """Name → the rank of each layer that is trained."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def mean(self, share: str) -> float | None:
        """Mean over layers of one of :class:`LayerStart`'s numbers; None where no layer has it."""
        known = [value for layer in self.layers.values() if (value := getattr(layer, share)) is not None]
        return sum(known) / len(known) if known else None

    def facts(self) -> list[tuple[str, str]]:
        """The summary, as (label, value) pairs."""
        rows = [
            ("layers", f"{len(self.layers)}, method {self.method}"),
            ("ranks", f"{sum(self.ranks.values())} of a budget of {self.budget}"),
            ("data", self._data()),
        ]
        if self.losses is not None:
            before, after = self.losses
            rows.append(("loss", f"{before:.4g}, {after:.4g} after a step along what the layers start from"))
        for name, label, of in (
            ("weight_share", "of weights", "‖Uᵀ M‖² / ‖W‖²"),
            ("output_share", "of outputs", "E‖Uᵀ M x‖² / E‖W x‖²"),
            ("kept_share", "of outputs to keep", "the same on inputs to keep"),
        ):
            if (value := self.mean(name)) is not None:
                rows.append((label, f"{value:.3g} on average, {of}"))
        rounding = self.mean("rounding")
        base = "stays as it is"
        if rounding is not None:
            base = f"is W less s B A now; its dtype rounds off {rounding:.1e} of ‖W‖"
        return [*rows, ("base", base), ("time", f"{self.seconds:.1f} s")]

    def _data(self) -> str:
        if self.losses is not None:
            return f"gradients of {self.num_batches} batches"
        return f"{self.num_rows:,} rows in {self.num_batches} batches" if self.num_rows else "none is looked at"

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.facts())
        lines = ["Start of LoRA layers", *(f"  {label:<{width}}  {value}" for label, value in self.facts())]
        notes = [f"  ! {note}" for note in self.notes]
        return "\n".join([*lines, *notes, "", "Rank per layer", Grid.of(self.ranks).text()])

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def save(self, folder: str | Path) -> Path:
        """Write ``start.json`` into a folder, made if need be; returns it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "start.json").write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        return folder
