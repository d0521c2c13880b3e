"""What a fit of the quantisation error has repaired: as members, as text, as JSON and as a figure."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..planning import storage, versions
from .layer_repair import LayerRepair, Pair
from .layout import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RepairReport"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class RepairReport:
    """The result of :func:`eva_lora.fit_quantization_error`.

    Attributes:
        method: "repair", "eva+repair" or "loftq".
        layers: Name in the base model → what became of the layer.
        hidden_error: ‖h − h_float‖ / ‖h_float‖ of what the model's output head is given (without a head: of its
            output), on the batches held back, without and with the fit; the float model is this one with the float
            weights in the layers that were fitted. None where nothing was held back.
        kl: Mean divergence of its distribution of the next token from the float model's, in nats. None without a head.
        num_batches, num_rows: Of the fit.
        held_batches: Held back.
        seconds: Wall time, measuring included.
        budget: Ranks there were to give.
        notes: What was not as asked.
        config: The options of the pass and of the ranks.
        base: Name → some entries of what each layer's base computes with, to know it again
            (:func:`eva_lora.require_same_base`).
        quantization: How the base was quantised, as far as its config says.
        versions: Of what the result depends on.
    """

    method: str
    layers: dict[str, LayerRepair]
    hidden_error: Pair | None
    kl: Pair | None
    num_batches: int
    num_rows: int
    held_batches: int
    seconds: float
    budget: int
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, tuple[float, ...]] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    @classmethod
    def load(cls, path: str | Path) -> "RepairReport":
        """Read what :meth:`save` wrote: a ``repair.json``, or the folder that holds it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is no complete report.
        """
        path = Path(path)
        path = path / "repair.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"path: there is no file {path}")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            version = stored.pop("format_version")
            layers = {name: storage.checked(LayerRepair, layer) for name, layer in stored.pop("layers").items()}
            report = storage.checked(cls, stored, layers=layers)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path: {path} is no complete report of a fit: {error}") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"path: {path} is no complete report of a fit: expected format version {FORMAT_VERSION}")
        return report

    @property
    def ranks(self) -> dict[str, int]:
        """Name → the rank each layer has now."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def facts(self) -> list[tuple[str, str]]:
        """The summary, as (label, value) pairs."""
        rows = [
            ("layers", f"{len(self.layers)}, method {self.method}"),
            ("ranks", f"{sum(self.ranks.values())} of a budget of {self.budget}"),
            ("data", f"{self.num_rows:,} rows in {self.num_batches} batches; {self.held_batches} more held back"),
            ("layers' outputs", _said(self._mean("fitted"), "mean error, on the fit's own rows")),
        ]
        held = self._mean("held")
        if held is not None:
            rows.append(("held back", _said(held, "mean error of layers' outputs")))
        if self.hidden_error is not None:
            rows.append(("the model's end", _said(self.hidden_error, "relative error of its hidden states")))
        if self.kl is not None:
            rows.append(
                ("next token", f"{self.kl[0]:.4f} nats from the float model without the fit, {self.kl[1]:.4f} with")
            )
        return [*rows, ("time", f"{self.seconds:.1f} s")]

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.facts())
        lines = ["Fit of the quantisation error", *(f"  {label:<{width}}  {value}" for label, value in self.facts())]
        return "\n".join(
            [*lines, *(f"  ! {note}" for note in self.notes), "", "Rank per layer", Grid.of(self.ranks).text()]
        )

    def plot(self) -> "Figure":
        """Each layer's output error without and with the fit, on rows held back where there are any."""
        from .plots import plot_repair

        return plot_repair(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def save(self, folder: str | Path) -> Path:
        """Write ``repair.json`` and ``repair.svg`` into a folder, made if need be; returns it."""
        from .plots import save_figure

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "repair.json").write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        save_figure(self.plot(), folder / "repair.svg")
        return folder

    def _mean(self, which: str) -> Pair | None:
        pairs = [pair for layer in self.layers.values() if (pair := getattr(layer, which)) is not None]
        if not pairs:
            return None
        return sum(before for before, _ in pairs) / len(pairs), sum(after for _, after in pairs) / len(pairs)


def _said(pair: Pair | None, what: str) -> str:
    assert pair is not None
    return f"{pair[0]:.3g} without the fit, {pair[1]:.3g} with: {what}"
