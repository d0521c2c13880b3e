"""What a fit repairs on batches that it has not seen: in each layer's output, and in the model's."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..collecting import Change, Visits

__all__ = ["ModelErrors", "added_by", "layer_errors", "missing_of", "model_errors"]

ROWS = 1024  # whose outputs are made at a time

Error = Callable[[str], tuple[Tensor, Tensor]]  # a layer's name -> its float weight W and M = W − Q, (out, in) float32
#: A layer's name -> A (r, in), s B (out, r) and what is added to that (out,), if anything; float32.
Factors = Mapping[str, tuple[Tensor, Tensor, Tensor | None]]


@dataclass(frozen=True)
class ModelErrors:
    """How far a model is from one with float weights in the layers that were fitted, over all rows that count.

    Attributes:
        hidden: ‖h − h_float‖ / ‖h_float‖ of what the output head is given, or else of the model's first output: without
            and with the fit. None where no batch tells.
        kl: Mean KL divergence of the next token's distribution from the float one's, in nats: without and with the fit.
            None where the model has no output head.
        reason: Why neither is known, where there is more to say than that no batch tells.
    """

    hidden: tuple[float, float] | None = None
    kl: tuple[float, float] | None = None
    reason: str = ""


def layer_errors(
    visits: Visits, batches: Iterable[Any], error_of: Error, factors: Factors
) -> dict[str, tuple[float, float]]:
    """Layer → Σ‖M x‖² and Σ‖(M − s B A) x − c‖², each over Σ‖W x‖², over the rows x that count.

    Layers that no row reached are left out.
    """
    sums: dict[str, Tensor] = {}

    def visit(name: str, rows: Tensor) -> None:
        if name not in factors:
            return
        weight, error = error_of(name)
        change = _added(factors[name], weight.device)
        for x in torch.split(rows, ROWS):
            x = x.to(weight.device, torch.float32)
            wrong = x @ error.T
            parts = (wrong, wrong - change(x), x @ weight.T)
            found = torch.stack([part.square().sum(1).cpu().to(torch.float64).sum() for part in parts])
            sums[name] = sums.get(name, 0) + found

    with visits.rows(visit) as run_batch:
        for batch in batches:
            run_batch(batch)
    totals = {name: found.tolist() for name, found in sums.items()}
    return {name: (before / of, after / of) for name, (before, after, of) in totals.items() if of > 0}


def model_errors(visits: Visits, batches: Iterable[Any], error_of: Error, factors: Factors) -> ModelErrors:
    """What becomes of the layers' errors at the model's end."""

    changes = [missing_of(factors, error_of), added_by(factors)]
    squares, divergences, rows = [0.0, 0.0, 0.0], [0.0, 0.0], 0
    with visits.outputs() as outputs:
        for batch in batches:
            true, fitted, plain = outputs(batch, changes[0]), outputs(batch, changes[1]), outputs(batch)
            if true.kept or fitted.kept or plain.kept:
                return ModelErrors(reason=true.kept or fitted.kept or plain.kept)
            if true.hidden is None or plain.hidden is None or fitted.hidden is None:
                return ModelErrors()
            keep = _rows_that_count(visits.mask(batch), true.hidden)
            wanted = true.hidden[keep].float()
            for i, made in enumerate((plain.hidden, fitted.hidden)):
                squares[i] += float((made[keep].float() - wanted).square().sum())
            squares[2] += float(wanted.square().sum())
            if true.logits is not None and true.logits.shape[:-1] == true.hidden.shape[:-1]:
                for i, logits in enumerate((plain.logits, fitted.logits)):
                    assert logits is not None
                    divergences[i] += _divergence(true.logits[keep], logits[keep])
                rows += len(wanted)
    if not squares[2]:
        return ModelErrors()
    before, after = (float((part / squares[2]) ** 0.5) for part in squares[:2])
    kl = (divergences[0] / rows, divergences[1] / rows) if rows else None
    return ModelErrors((before, after), kl)


def missing_of(names: Iterable[str], error_of: Error) -> dict[str, Change]:
    """Layer → x → M x: what its output lacks to be that of its float weight."""

    def of(name: str) -> Change:
        return lambda x: functional.linear(x.float(), error_of(name)[1].to(x.device))

    return {name: of(name) for name in names}


def added_by(factors: Factors) -> dict[str, Change]:
    """Layer → x → what A and B add to its output."""

    def of(name: str) -> Change:
        return lambda x: _added(factors[name], x.device)(x.float())

    return {name: of(name) for name in factors}


def _added(factors: tuple[Tensor, Tensor, Tensor | None], device: torch.device) -> Callable[[Tensor], Tensor]:
    """x → s B A x + c."""
    a, b, bias = (None if part is None else part.to(device) for part in factors)
    assert a is not None
    assert b is not None
    return lambda x: functional.linear(functional.linear(x, a), b, bias)


def _rows_that_count(mask: Tensor | None, hidden: Tensor) -> Tensor:
    if mask is None or mask.shape != hidden.shape[:-1]:
        return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    return mask.to(hidden.device)


def _divergence(true: Tensor, made: Tensor) -> float:  # (n, vocabulary)
    """Σ over rows of KL(true ‖ made)."""
    total = 0.0
    for p, q in zip(torch.split(true, ROWS), torch.split(made, ROWS), strict=True):
        expected, got = functional.log_softmax(p.float(), -1), functional.log_softmax(q.float(), -1)
        total += float((expected.exp() * (expected - got)).sum())
    return total
