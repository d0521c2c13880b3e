"""Forwards of the frozen model in which somebody is shown what a pass would have folded in, and the model's outputs."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..adapters import InnerWeight, LoraAdapter, LoraSite, ModelOutline
from ..config import EvaConfig
from .batches import ForwardFn, default_forward, to_device
from .ending import ForwardEnd, output_head
from .forwards import Forwards, input_device
from .masks import RowMaskFn, row_mask
from .rerunning import ForwardState
from .restoring import borrowed, without_autocast
from .run import Run
from .substituting import substituted

__all__ = ["Change", "LowRankChange", "Outputs", "Visits"]

Visit = Callable[[str, Tensor], None]  # a layer's name, some of its rows (n, d)
Change = Callable[
    [Tensor], Tensor
]  # a layer's inputs (..., d), or rows (n, d) -> what is added to its outputs (..., out)


@dataclass(frozen=True)
class LowRankChange:
    """B A x, as a change of a matrix, which can also be made to one that is multiplied inside of a module.

    Attributes:
        a: (r, in).
        b: (out, r).
    """

    a: Tensor
    b: Tensor

    def __call__(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return (x.to(self.a.dtype) @ self.a.mT) @ self.b.mT


class Outputs(NamedTuple):
    """What a model makes of a batch.

    Attributes:
        hidden: What its output head is given, or, where it has none, the first tensor that it returns, if any.
        logits: What its output head gives.
        kept: What the forward has changed of the model for good, or may have; "" where a second one is the same.
    """

    hidden: Tensor | None
    logits: Tensor | None
    kept: str = ""


class Visits:
    """Forwards of the frozen model, its adapter switched off: what layers' inputs are, and what becomes of outputs.

    Arguments are those of :func:`eva_lora.collect`, which decide what rows count.
    """

    def __init__(
        self,
        adapter: LoraAdapter,
        model: nn.Module,
        config: EvaConfig,
        forward_fn: ForwardFn | None = None,
        row_mask_fn: RowMaskFn | None = None,
    ) -> None:
        self._adapter, self._model, self._config = adapter, model, config
        self._forward_fn, self._row_mask_fn = forward_fn, row_mask_fn
        self._outline = ModelOutline(model)

    @contextmanager
    def rows(self, visit: Visit) -> Iterator[Callable[[Any], None]]:
        """Within it the function given runs a batch, in which ``visit`` sees each layer's rows that count.

        Raises:
            As :func:`eva_lora.collect` of what is wrong with a batch.
        """

        def maker(sites: Sequence[LoraSite], candidates: Sequence[int], config: EvaConfig) -> _Viewers:
            return _Viewers(sites, visit)

        alone = EvaConfig.from_dict({**self._config.to_dict(), "share_inputs": False})
        run = Run(self._adapter, alone, end=ForwardEnd(), maker=maker)  # type: ignore[arg-type]
        forwards = Forwards(self._model, self._outline, run, self._forward_fn, self._row_mask_fn)

        def run_batch(batch: Any) -> None:
            forwards.fold(own(batch))
            run.num_batches += 1

        with borrowed(self._outline), self._adapter.disabled(), run.capture.hooks():
            yield run_batch

    @contextmanager
    def outputs(self) -> Iterator[Callable[..., Outputs]]:
        """Within it ``outputs(batch, changes)`` gives what the model makes of a batch; with ``changes``, by layer, what
        it makes of it with something added to those layers' outputs. Each forward finds the model as the first did."""
        forward, device = self._forward_fn or default_forward, input_device(self._outline)
        head = output_head(self._model, ())
        parameters = self._outline.parameters
        state = ForwardState(self._outline.modules, parameters, {p.device for p in parameters})

        def outputs(batch: Any, changes: Mapping[str, Change] | None = None) -> Outputs:
            seen: list[Tensor] = []
            mine = to_device(own(batch), device)
            unknown = state.note(contents=True)
            with ExitStack() as stack:
                stack.enter_context(self.changed(changes or {}))
                if head is not None:
                    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
                    stack.callback(hook.remove)
                made = forward(self._model, mine)
            logits = getattr(made, "logits", None)
            first = next((leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.ndim > 1), None)
            hidden = seen[0] if len(seen) == 1 else first
            hidden = None if hidden is None else hidden.clone()  # which may be what is put back
            kept = ""
            if not state.restore():
                kept = "its forwards edit tensors that it keeps"
            elif unknown:
                kept = f"it holds what cannot be put back after a forward ({unknown})"
            return Outputs(hidden, logits if seen else None, kept)

        with borrowed(self._outline), self._adapter.disabled():
            yield outputs

    @contextmanager
    def changed(self, changes: Mapping[str, Change]) -> Iterator[None]:
        """Within it forwards have something added to the outputs of the layers named; a :class:`LowRankChange` of the
        name of a matrix that is multiplied inside of a module is added to that."""
        with ExitStack() as stack:
            for site in self._adapter.sites:
                names = iter(site.matrices)
                for weight in site.inner:
                    mine = [changes.get(name) for name in islice(names, len(weight.matrices()))]
                    if any(mine):
                        stack.enter_context(substituted(site.module, weight, partial(_moved, weight, mine)))
                if site.name in changes and not site.inner:
                    handle = site.module.register_forward_hook(_adding(site, changes[site.name]), with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def order(self, batch: Any) -> list[str]:
        """The layers in the order in which a forward calls them first; those that it does not call are left out."""
        called: dict[str, None] = {}
        with self.rows(lambda name, rows: called.setdefault(name)) as run_batch:
            run_batch(batch)
        return [*called]

    @contextmanager
    def still(self) -> Iterator[None]:
        """Within it layers can be asked what they compute: no forward runs, no dropout, no autocast, no adapter."""
        with borrowed(self._outline), self._adapter.disabled(), without_autocast(input_device(self._outline)):
            yield

    def mask(self, batch: Any) -> Tensor | None:  # (batch, tokens) bool
        """Which tokens of a batch count at the model's end, the decoder's where it has two sides; None: all."""
        found = row_mask(batch, self._config, self._row_mask_fn)
        return found.mask if found.decoder is None else found.decoder.mask


def own(batch: Any) -> Any:
    """A copy of a batch, for a forward that may change it or a loader that fills it anew; itself where it has none."""
    try:
        return copy.deepcopy(batch)
    except Exception:
        return batch


def _moved(weight: InnerWeight, changes: Sequence[Any], parameter: Tensor) -> Tensor:
    moved = parameter.detach().clone()
    for matrix, change in zip(weight.matrices(moved), changes, strict=True):
        if change is not None:
            matrix += (change.b @ change.a).to(matrix)
    return moved


def _adding(site: LoraSite, change: Change) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        (given,) = site.inputs(args, kwargs)
        x, rows = given.tensor, site.rows
        added = change(x) if rows is None else torch.cat([change(piece) for piece in rows.pieces(x)])
        changed = output.clone()
        of_rows = site.output_rows(changed)
        of_rows += added.reshape(of_rows.shape).to(output.dtype)
        return changed

    return hook


class _Viewers:
    """In the place of a run's maker of statistics: what rows are handed to is not kept."""

    gram_bytes = 0

    def __init__(self, sites: Sequence[LoraSite], visit: Visit) -> None:
        self._sites, self._visit = sites, visit
        self.columns = [1] * len(sites)
        self.site_of = [i for i, site in enumerate(sites) for _ in range(site.parts)]

    def make(self, stream: int) -> tuple["_Viewer", str]:
        return _Viewer(self._sites[self.site_of[stream]].name, self._visit), ""


class _Viewer:
    """In the place of a statistic: hands rows on."""

    num_components, num_refreshes, shift = 1, 0, None
    pending_rows = 0  # there is never anything to refresh

    def __init__(self, name: str, visit: Visit) -> None:
        self._name, self._visit = name, visit
        self.num_rows = 0
        self.square_sum = self.basis = self.eigenvalues = torch.zeros((), dtype=torch.float32, device="cpu")

    def accumulate_(self, x: Tensor, row_mask: Tensor | None = None, *, num_rows: int, sign: int = 1) -> None:
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if row_mask is None else rows[row_mask.reshape(-1)]
        self._visit(self._name, rows)
        self.num_rows += num_rows
        self.square_sum = self.square_sum + (rows * 0).sum().float().cpu()  # NaN where anything is not finite
