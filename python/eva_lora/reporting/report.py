"""What a run did: as members, as text, as JSON, as figures and as a page."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..planning import Trace
from .facts import ReportFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EvaReport"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class EvaReport(ReportFacts):
    """The result of :func:`eva_lora.eva_initialize`. Dicts are keyed by the layer's name in the base model.

    Its members are those of :class:`~eva_lora.reporting.ReportFacts`; here is what becomes of them.
    """

    @classmethod
    def load(cls, path: str | Path) -> "EvaReport":
        """Read what :meth:`save` wrote: a ``report.json``, or the folder that holds it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is no report, or of another format version.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"path: there is no file {path}")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"path: {path} is no JSON: {error}") from error
        version = stored.get("format_version") if isinstance(stored, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"path: expected a report of format version {FORMAT_VERSION}, {path} has {version}")
        try:
            stored.setdefault("feature_gain", {})  # reports of before there was one
            values = {f.name: stored[f.name] for f in fields(cls)}
            ratios = {name: tuple(values) for name, values in values["explained_variance_ratio"].items()}
            read = {
                "explained_variance_ratio": ratios,
                "trace": Trace(**values["trace"]),
                "notes": tuple(values["notes"]),
            }
            return cls(**{**values, **read})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"path: {path} is no complete report: {error}") from error

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from .page import render_fragment

        return render_fragment(self)

    def plot_ranks(self) -> "Figure":
        """Rank per layer as a picture of the network: blocks × layers of a block."""
        from . import plots

        return plots.plot_ranks(self)

    def plot_spectra(self) -> "Figure":
        """Explained variance of each layer's candidate components: each one's, and cumulative."""
        from . import plots

        return plots.plot_spectra(self)

    def plot_convergence(self) -> "Figure":
        """Layers converged after each batch, and how far each layer was from the threshold."""
        from . import plots

        return plots.plot_convergence(self)

    def plot_budget(self) -> "Figure":
        """Ranks given and taken against the configured ones, by kind of layer and by block."""
        from . import plots

        return plots.plot_budget(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON; ``report.schema.json`` in this package describes it."""
        return {"format_version": FORMAT_VERSION, **asdict(self), "warnings": self.warnings()}

    def save(self, folder: str | Path, *, plots: Iterable[str] = ()) -> Path:
        """Write ``report.json``, ``report.html`` (one page that needs nothing else) and the plots asked for.

        Args:
            folder: Made if need be.
            plots: File formats, of "png", "svg" and "pdf": one file a figure, for papers.

        Returns:
            The folder.

        Raises:
            ValueError: another plot format; nothing is written then.
        """
        from .page import render

        formats = list(plots)
        unknown = sorted(set(formats) - {"png", "svg", "pdf"})
        if unknown:
            raise ValueError(f"plots: expected formats of 'png', 'svg' and 'pdf', got {unknown}")
        page = render(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        (folder / "report.html").write_text(page, encoding="utf-8")
        if formats:
            from .plots import save_all

            save_all(self, folder, formats)
        return folder
