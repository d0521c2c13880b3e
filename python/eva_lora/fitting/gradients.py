"""What methods that start from gradients ask of them, pass after pass, and the A and B that come of it."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, lcm, prod

import torch
from torch import Tensor

from eva_kernels._double import double
from eva_kernels.gradient_sketch import LowRank, leading_part, random_basis, range_basis

from ..adapters import LoraSite
from ..collecting import Asked
from ..config import EvaConfig
from .methods import GradientMethod

__all__ = ["GradientFit", "fit_drawn", "fit_leading", "importances", "ranks_by_importance", "sketch_columns"]

# The README of eva_kernels/gradient_sketch has the tables that these are from.
PASSES = 5
COLUMNS_PER_RANK = 5.0
EXTRA_COLUMNS = 24  # more than directions that are taken, at least: of few, five for each are not enough
SHARES = 8  # where gradients themselves are asked for, this part of all their bytes is held at once
LEAST, MOST = 0.5, 4.0  # of the rank it has, what importance gives a layer (GoRA)

Shapes = Mapping[str, tuple[int, int]]  # matrix -> (out, in)
Run = Callable[[Mapping[str, Asked]], dict[str, Tensor]]  # one pass: what is asked of matrices' G -> the products


@dataclass(frozen=True)
class GradientFit:
    """What one matrix starts from.

    Attributes:
        lora_a: (r, in) float32.
        lora_b: (out, r) float32: B times the layer's scaling.
        shares: (r,) float64: of the energy that the sketch knows of G, what each direction has. Zeros where A is drawn.
        step: (k, in) and (out, k), the factors of a step down; None where what it starts from is that step.
        slope: Of a step's length, by which it lowers the loss to first order.
        lacking: How many directions less G has than are taken of it.
    """

    lora_a: Tensor
    lora_b: Tensor
    shares: Tensor
    step: tuple[Tensor, Tensor] | None = None
    slope: float = 0.0
    lacking: int = 0


def fit_leading(
    method: GradientMethod,
    run: Run,
    shapes: Shapes,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    config: EvaConfig,
    sparse: Collection[str] = (),
) -> dict[str, GradientFit]:
    """Matrices that start from leading singular vectors of their G, after ``PASSES`` passes.

    Args:
        sparse: Matrices that few rows may have come to, or none: of experts. Where their G has too few directions, what
            is left of A is drawn, as PEFT draws it, and what is left of B is zero.

    Raises:
        ValueError: another G has fewer directions than the method takes.
    """
    directions = {name: method.blocks * rank for name, rank in ranks.items()}
    columns = {n: min(sketch_columns(method, rank, config), *shapes[n]) for n, rank in ranks.items()}
    asked = _noise({name: (shapes[name][1], columns[name]) for name in ranks}, config.seed)
    for index in range(PASSES):
        products = run(asked)
        if index < PASSES - 1:
            turned = index % 2 == 0  # G right was told: Gᵀ left is asked for
            for name in [*products]:
                basis = range_basis(products.pop(name))
                asked[name] = Asked(left=basis) if turned else Asked(right=basis)
    fits = {}
    generator = torch.Generator().manual_seed(config.seed)
    for name in ranks:
        last, product = asked.pop(name).right, products.pop(name)
        assert last is not None
        part = leading_part(last.to(product.device), product, directions[name])
        rounding = columns[name] * torch.finfo(torch.float32).eps * float(part.values[0])
        there = int((part.values > rounding).sum())
        if there < directions[name] and name not in sparse:
            raise ValueError(
                f"loader_or_statistics: method={method.name!r} takes {directions[name]} directions of the gradient of "
                f"{name}, which has {there} on these batches: more of them, or a lower rank"
            )
        known = float(double(product).square().sum())
        drawn = _drawn(ranks[name], shapes[name][1], generator) if there < directions[name] else None
        fits[name] = _leading(method, part, ranks[name], scalings[name], known, there, drawn)
    return fits


def sketch_columns(method: GradientMethod, rank: int, config: EvaConfig) -> int:
    """Columns of a basis, in a large enough matrix."""
    directions = method.blocks * rank
    if config.oversampling is not None:
        return max(ceil(config.oversampling * rank), directions)
    return max(ceil(COLUMNS_PER_RANK * rank), directions + EXTRA_COLUMNS)


def _noise(sizes: Mapping[str, tuple[int, int]], seed: int) -> dict[str, Asked]:
    """One basis for all layers of a width."""
    made: dict[tuple[int, int], Asked] = {}
    return {name: made.setdefault(size, Asked(right=random_basis(*size, seed=seed))) for name, size in sizes.items()}


def _leading(
    method: GradientMethod,
    part: LowRank,
    rank: int,
    scaling: float,
    known: float,
    there: int,
    drawn: Tensor | None,  # (r, in), where G has fewer directions than are taken
) -> GradientFit:
    assert method.taken is not None
    of_a, of_b = (slice(block * rank, (block + 1) * rank) for block in method.taken)
    values = part.values.clone()
    values[there:] = 0
    weights = torch.zeros_like(part.left[0])
    weights[:there] = (values[:there] / values[:1]).pow(method.exponent or 0.0).to(weights) * method.scale(
        len(part.left)
    )
    down = method.base == "kept"
    lora_a, lora_b = weights[of_a, None] * part.right[:, of_a].mT, part.left[:, of_b] * weights[of_b]
    if drawn is not None:
        lora_a = torch.where(weights[of_a, None] > 0, lora_a, drawn.to(lora_a))
    step = None if down else (part.right.mT, -part.left * values.to(part.left))
    shares = values[of_a].square() / known if known > 0 else torch.zeros_like(values[of_a])
    return GradientFit(
        lora_a, lora_b * (-scaling if down else scaling), shares, step, float(values.square().sum()),
        max(method.taken) * rank + rank - there,
    )  # fmt: skip


def _drawn(rank: int, width: int, generator: torch.Generator) -> Tensor:  # (r, in)
    noise = torch.rand(rank, width, generator=generator, dtype=torch.float32, device="cpu")
    return (2 * noise - 1) / width**0.5


def importances(run: Run, shapes: Shapes, read: Callable[[str], Tensor]) -> dict[str, float]:
    """Matrix → mean |W ∘ G|, exact: gradients are held for an eighth of all bytes at a time, a pass for each."""
    found = {}
    for group in _groups(shapes):
        products = run(dict.fromkeys(group, Asked(whole=True)))
        for name in group:
            gradient = products.pop(name)
            found[name] = float((read(name).to(gradient) * gradient).abs().mean())
    return found


def _groups(shapes: Shapes) -> Iterator[list[str]]:
    """Matrices one after the other, as many as fit; the largest fits."""
    sizes = {name: out * width for name, (out, width) in shapes.items()}
    most, held = max(sum(sizes.values()) // SHARES, *sizes.values()), 0
    group: list[str] = []
    for name, size in sizes.items():
        if held + size > most:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def ranks_by_importance(
    of_matrices: Mapping[str, float], shapes: Shapes, sites: Iterable[LoraSite], config: EvaConfig
) -> dict[str, int]:
    """GoRA's ranks: of all parameters of A and B each layer gets its share of the importance, rounded to a rank, no
    less than half of the rank it has and no more than four times that. A layer's importance is the mean of all entries
    of its matrices."""
    sites = list(sites)
    cost = {site.name: sum(sum(shapes[name]) for name in site.matrix_names) for site in sites}
    importance = {}
    for site in sites:
        sizes = [prod(shapes[name]) for name in site.matrix_names]
        total = sum(of_matrices[name] * size for name, size in zip(site.matrix_names, sizes, strict=True))
        importance[site.name] = total / sum(sizes)
    budget = sum(site.rank * cost[site.name] for site in sites)
    total = sum(importance.values())
    if not total > 0:
        raise ValueError("loader_or_statistics: the gradients of all layers are zero on these batches")
    ranks = {}
    for site in sites:
        unit = lcm(site.rank_multiple, config.rank_multiple)
        low = ceil(max(LEAST * site.rank, config.min_rank, 1) / unit)
        directions = min(min(shapes[name]) for name in site.matrix_names)
        high = int(min(MOST * site.rank, directions, config.max_rank or MOST * site.rank) // unit)
        least, most = max(config.min_rank, 1), min(directions, config.max_rank or directions)
        if -(-least // unit) * unit > most:
            raise ValueError(
                f"min_rank, max_rank, rank_multiple: expected such as allow a rank for {site.name}, of {least} to "
                f"{most} in multiples of {unit}"
            )
        wanted = importance[site.name] / total * budget / cost[site.name]
        ranks[site.name] = unit * max(min(round(wanted / unit), high), low)
    return ranks


def fit_drawn(
    method: GradientMethod,
    run: Run,
    shapes: Shapes,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    config: EvaConfig,
) -> dict[str, GradientFit]:
    """Matrices whose A is drawn, as PEFT draws it, and whose B A is what A's rows hold of −G, in one pass: exact.

    It is as long as a step of plain gradient descent at the rate γ would be on average.
    """
    generator = torch.Generator().manual_seed(config.seed)
    drawn = {name: _drawn(rank, shapes[name][1], generator) for name, rank in ranks.items()}
    products = run({name: Asked(right=a.mT) for name, a in drawn.items()})
    fits = {}
    for name, a in drawn.items():
        product = products.pop(name)  # G Aᵀ
        a = a.to(product)
        solved = torch.linalg.solve(double(a) @ double(a).mT, double(product).mT).mT  # G Aᵀ (A Aᵀ)⁻¹
        length = method.gamma * (shapes[name][1] / ranks[name]) ** 0.5
        fits[name] = GradientFit(
            a, (-length * solved).to(product), torch.zeros(ranks[name], dtype=torch.float64, device="cpu")
        )
    return fits
