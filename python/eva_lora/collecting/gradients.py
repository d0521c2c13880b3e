"""Products of layers' weight gradients with few columns, from forwards and backwards that form no gradient."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eva_kernels.gradient_sketch import outer_add_, projected

from ..adapters import InnerWeight, LoraAdapter, LoraSite, ModelOutline, noted_generators, require_loaded
from ..config import EvaConfig
from ..distributed import Ranks, together
from .batches import default_forward, to_device
from .forwards import input_device
from .freed_memory import give_back_freed_memory
from .reader import END, BatchReader
from .restoring import borrowed, without_autocast
from .substituting import substituted
from .visiting import Change, Visits, own

__all__ = ["Asked", "GradientPasses", "LossFn", "Told", "gradient_batches"]

CUT_OFF = (
    "checkpointing with use_reentrant=True cuts the graph off, as nothing before it needs a gradient: call "
    "model.enable_input_require_grads()"
)

GIVEN_BACK = 2  # times in a forward: more take time and leave no less that nothing fits into
IGNORED = -100  # the label of what does not count

LossFn = Callable[[nn.Module, Any], Tensor]


class Asked(NamedTuple):
    """What is asked of one matrix's gradient G (out, in): one of these.

    Attributes:
        right: (in, q). G right is told.
        left: (out, q). Gᵀ left is told. The layer's inputs are kept until its outputs' gradients come.
        whole: G itself is told.
    """

    right: Tensor | None = None
    left: Tensor | None = None
    whole: bool = False


class Told(NamedTuple):
    """The answers of one pass.

    Attributes:
        products: Matrix (:attr:`LoraSite.matrix_names`) → (out, q), (in, q) or (out, in), on its device, float32 (of
            float64 inputs float64): of the gradient of the mean loss.
        loss: The mean over all batches.
    """

    products: dict[str, Tensor]
    loss: float


def gradient_batches(loader: Iterable[Any], most: int) -> list[Any]:
    """The first batches of one round through a loader, kept: every pass has to see the same.

    Raises:
        TypeError, ValueError: as :func:`eva_lora.collect` of a loader.
    """
    reader = BatchReader(loader)
    found: list[Any] = []
    while len(found) < most and (batch := reader.take()) is not END:
        found.append(own(batch))
    return found


class GradientPasses:
    """Passes over the same batches: a forward, the loss and a backward of each, of the frozen model.

    No parameter requires a gradient and none gets one. A layer's outputs carry a function that hands their gradient on,
    and adds what it is asked for of it and of what was kept of the layer's inputs. What gradient checkpointing computes
    again carries another one, which no gradient reaches. Of matrices that are multiplied inside of a module (experts,
    attention) it is the parameter that carries it while the module runs, so that G is there for a moment, of one
    parameter at a time.

    Args:
        adapter, model: As in a pass of EVA; the adapter is switched off.
        loss_fn: (model, batch) → the loss, one number. None: what the model itself returns as ``loss``.
        ranks: Processes whose products are added up, each with batches of its own.
    """

    def __init__(
        self,
        adapter: LoraAdapter,
        model: nn.Module,
        batches: Sequence[Any],
        loss_fn: LossFn | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._adapter, self._model, self._batches, self._ranks = adapter, model, batches, ranks
        self._loss_fn = loss_fn or _own_loss
        self._outline = ModelOutline(model)
        require_loaded(self._outline)
        self._device = input_device(self._outline)
        self._restart: Callable[[], None] = lambda: None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within it passes can be run. Modes, ``requires_grad``, gradients and generators are given back however it
        ends, also where a loss function changed them.

        Modules are in eval mode, but those that checkpoint activations, which many do in training alone. All passes
        draw the same random numbers.
        """
        before = [(p, p.requires_grad, p.grad) for p in self._outline.parameters]
        with borrowed(self._outline, backward=True), self._adapter.disabled():
            self._restart = noted_generators({p.device for p, *_ in before})
            try:
                for parameter, *_ in before:
                    parameter.requires_grad_(False)
                    parameter.grad = None  # what a loss function has parameters learn is added to none that is there
                yield
            finally:
                for parameter, requires_grad, gradient in before:
                    parameter.requires_grad_(requires_grad)
                    parameter.grad = gradient

    def run(self, asked: Mapping[str, Asked]) -> Told:
        """One pass.

        Raises:
            TypeError: the loss is no tensor of one number.
            ValueError: the model returns no loss; a loss, or a product, is NaN or Inf; no gradient reaches a layer.
        """
        products, losses = together(self._ranks, lambda: self._run_own(asked))
        loss, count = self._mean(losses)
        for name, product in products.items():
            if self._ranks is not None:
                self._ranks.all_reduce_([product])
            if not bool(torch.isfinite(product.sum())):
                raise ValueError(f"model: the gradient of layer {name} holds NaN or Inf")
            product /= count
        return Told(products, loss)

    def loss(self, changes: Mapping[str, Change] | None = None) -> float:
        """The mean loss over the batches, without a backward; with something added to the outputs of layers named."""
        visits = Visits(self._adapter, self._model, EvaConfig())

        def run() -> list[float]:
            self._restart()
            with torch.no_grad(), visits.changed(changes or {}):
                return [float(self._loss(number, batch)) for number, batch in enumerate(self._batches, 1)]

        return self._mean(together(self._ranks, run))[0]

    def _mean(self, losses: list[float]) -> tuple[float, int]:
        """Of all processes' batches the mean loss, and how many there are."""
        sums = torch.tensor([sum(losses), len(losses)], dtype=torch.float64, device="cpu")
        if self._ranks is not None:
            self._ranks.all_reduce_([sums])
        return float(sums[0] / sums[1]), int(sums[1])

    def _run_own(self, asked: Mapping[str, Asked]) -> tuple[dict[str, Tensor], list[float]]:
        self._restart()
        of_sites = [(site, [asked.get(name) for name in site.matrix_names]) for site in self._adapter.sites]
        of_sites = [(site, mine) for site, mine in of_sites if any(mine)]
        products, losses = _Products(0 if self._checkpoints() else ceil(len(of_sites) / GIVEN_BACK)), []
        with ExitStack() as stack:
            for site, mine in of_sites:
                stack.enter_context(_listening(site, mine, products))
            for number, batch in enumerate(self._batches, 1):
                loss = self._loss(number, batch)
                losses.append(float(loss.detach()))
                if not loss.requires_grad:
                    raise ValueError(
                        f"loss_fn: the loss of batch {number} depends on no LoRA layer: it was computed without "
                        f"gradients, from no output of theirs, or {CUT_OFF}"
                    )
                with products.taken():
                    torch.autograd.backward(loss)
        for name in asked:
            if name not in products:
                raise ValueError(
                    f"model: no gradient has reached layer {name}: the loss does not depend on it, or {CUT_OFF}"
                )
        return {name: products[name] for name in asked}, losses

    def _checkpoints(self) -> bool:
        """Whether activations are not kept for the backward, as far as transformers' switch says so."""
        return any(vars(m).get("gradient_checkpointing") is True and m.training for m in self._outline.modules)

    def _loss(self, number: int, batch: Any) -> Tensor:
        loss: Any = self._loss_fn(self._model, to_device(own(batch), self._device))
        if loss is None:
            raise ValueError(
                f"loss_fn: expected a callable, since the model returns no loss for batch {number}; or batches with "
                "the labels that it takes"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.dtype.is_floating_point:
            got = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn: expected the loss, a floating-point tensor of one number, got {got}")
        if not bool(torch.isfinite(loss.detach()).all()):
            why = ", as none of its labels counts: leave it out" if _counts_nothing(batch) else ""
            raise ValueError(f"loss_fn: the loss of batch {number} is {float(loss.detach())}{why}")
        return loss.reshape(())


def _own_loss(model: nn.Module, batch: Any) -> Any:
    outputs = default_forward(model, batch)
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


def _counts_nothing(batch: Any) -> bool:
    """Whether a batch has labels, and none but the first of a sequence, which nothing predicts, counts."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return isinstance(labels, Tensor) and labels.ndim > 1 and bool((labels[..., 1:] == IGNORED).all())


class _Products(dict[str, Tensor]):
    """The products so far, and what is common to all layers that add to them.

    Args:
        every: After so many calls of layers memory that was freed is given back. 0: never.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self._every, self._called = every, 0
        self._taken = False

    def called(self, device: torch.device) -> None:
        """A layer was called, and a graph goes on from it."""
        self._called += 1
        if device.type == "cpu" and self._every and self._called % self._every == 0:
            give_back_freed_memory()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within it gradients that come are of the loss."""
        self._taken = True
        try:
            yield
        finally:
            self._taken = False

    def require_taken(self) -> None:
        """Raise where a gradient comes at another time."""
        if not self._taken:
            raise ValueError(
                "loss_fn: it takes gradients through the model itself (backward, torch.autograd.grad), which would be "
                "counted beside the loss's: only return the loss"
            )

    def outer_add(self, name: str, rows: Tensor, weights: Tensor, dtype: torch.dtype) -> None:  # (..., a), (..., b)
        if name not in self:
            self[name] = torch.zeros(rows.shape[-1], weights.shape[-1], dtype=dtype, device=rows.device)
        outer_add_(self[name], rows, weights)


@contextmanager
def _listening(site: LoraSite, asked: Sequence[Asked | None], products: _Products) -> Iterator[None]:
    """Within it a layer's forwards and backwards add what is asked of each of its matrices to products."""
    with ExitStack() as stack:
        if not site.inner:
            (one,) = asked
            assert one is not None
            layer = _Layer(site, one, products)
            stack.callback(site.module.register_forward_hook(layer.hook, with_kwargs=True).remove)
        named = iter(zip(site.matrix_names, asked, strict=True))
        for weight in site.inner:
            mine = [(name, one) for name, one in islice(named, len(weight.matrices()))]
            stack.enter_context(substituted(site.module, weight, _Parameter(weight, mine, products).shown))
        yield


class _Layer:
    """What is asked of the matrix that a layer is."""

    def __init__(self, site: LoraSite, asked: Asked, products: _Products) -> None:
        self._site, self._asked, self._products = site, asked, products
        self._anchor = _anchor()

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():  # a checkpointed part, which comes again
            return None
        self._products.called(output.device)
        (given,) = self._site.inputs(args, kwargs)
        x, right = given.tensor.detach(), self._asked.right
        if right is not None:
            with torch.no_grad(), without_autocast(x.device):
                basis, dtype = right.to(x.device), _kept_in(x)
                images = [projected(piece, basis, dtype=dtype) for piece in self._pieces(x)]
                x = images[0] if len(images) == 1 else torch.cat(images)
        made: Tensor = _Handing.apply(output, self._anchor, x, self.add)  # type: ignore[no-untyped-call]
        return made

    def add(self, gradient: Tensor, kept: Tensor) -> None:
        """The outputs' gradient, whose rows are δ, and what was kept of the rows x."""
        self._products.require_taken()
        left, dtype = self._asked.left, _kept_in(gradient)
        with torch.no_grad(), without_autocast(gradient.device):
            rows = self._site.output_rows(gradient)
            if self._asked.right is not None:
                self._add(rows, kept, dtype)
                return
            rows = (
                rows.reshape(-1, rows.shape[-1]) if left is None else projected(rows, left.to(rows.device), dtype=dtype)
            )
            done = 0
            for piece in self._pieces(kept):
                mine = rows[done : done + len(piece)]
                self._add(*((mine, piece) if left is None else (piece, mine)), dtype)
                done += len(piece)

    def _add(self, rows: Tensor, weights: Tensor, dtype: torch.dtype) -> None:  # (..., a), (n, b)
        self._products.outer_add(self._site.name, rows, weights, dtype)

    def _pieces(self, x: Tensor) -> Iterable[Tensor]:  # each (n, d)
        """The rows x, in order: all at once, or of a convolution so many patches at a time."""
        rows = self._site.rows
        return (x.reshape(-1, x.shape[-1]),) if rows is None else rows.pieces(x)


class _Parameter:
    """What is asked of the matrices of a parameter, whose gradient is formed, looked at and let go."""

    def __init__(self, weight: InnerWeight, asked: Sequence[tuple[str, Asked | None]], products: _Products) -> None:
        self._weight, self._asked, self._products = weight, asked, products
        self._anchor = _anchor()

    def shown(self, parameter: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        self._products.called(parameter.device)
        made: Tensor = _Handing.apply(parameter, self._anchor, None, self.add)  # type: ignore[no-untyped-call]
        return made

    def add(self, gradient: Tensor, _: None) -> None:
        self._products.require_taken()
        dtype = _kept_in(gradient)
        with torch.no_grad(), without_autocast(gradient.device):
            for matrix, (name, asked) in zip(self._weight.matrices(gradient), self._asked, strict=True):
                if asked is None:
                    continue
                if asked.whole:
                    self._products[name] = self._products.get(name, 0) + matrix.to(dtype)
                elif asked.right is not None:
                    self._products.outer_add(name, matrix.mT, asked.right.to(matrix.device), dtype)
                elif asked.left is not None:
                    self._products.outer_add(name, matrix, asked.left.to(matrix.device), dtype)


def _anchor() -> Tensor:
    """Its gradient is nobody's: what is computed with nothing else that requires one would be no part of a graph."""
    return torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)


class _Handing(torch.autograd.Function):
    """A tensor as it is, whose gradient is shown to somebody as it passes.

    What was kept is a saved tensor, so that checkpointing lets go of it and computes it again. The same memory is put
    out as a tensor of its own: models may change outputs in place, which a view from here would refuse, and as nothing
    was saved of them before they may.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, anchor: Tensor, kept: Tensor | None, add: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.add = add
        return given.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (kept,) = ctx.saved_tensors
        ctx.add(gradient, kept)
        return gradient if ctx.needs_input_grad[0] else None, None, None, None


def _kept_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
