"""Gradients that autograd forms, what passes tell of them, and the starts that papers make of them: dense float64."""

import copy

import torch

from eva_lora.adapters import find_adapter
from eva_lora.collecting import Asked, GradientPasses, gradient_batches
from support.models import LINEARS, token_batches


def labelled(count=3, **options):
    return [dict(batch, labels=batch["input_ids"]) for batch in token_batches(count, **options)]


def gradients_of(base, batches, names=None, loss_of=lambda model, batch: model(**batch).loss):
    """Layer → the gradient of the mean loss, formed by autograd, as a matrix in float64."""
    model = copy.deepcopy(base).requires_grad_(False).eval()
    layers = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in (names or LINEARS)}
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    for batch in batches:
        (loss_of(model, batch) / len(batches)).backward()
    return {n: m.weight.grad.double().flatten(1) for n, m in layers.items()}


def told(model, batches, asked, **options):
    """The products that one pass tells."""
    passes = GradientPasses(find_adapter(model), model, gradient_batches(batches, 100), **options)
    with passes.frozen():
        return passes.run(asked).products


def whole(model, batches, **options):
    names = [name for site in find_adapter(model).sites for name in site.matrix_names]
    return told(model, batches, dict.fromkeys(names, Asked(whole=True)), **options)


def require_same(found, exact, rounding=1e-5):
    """Of float32 models, whose own backward passes round differently where the graph is another."""
    assert set(found) == set(exact)
    for name, product in found.items():
        assert (product.double() - exact[name]).norm() <= rounding * exact[name].norm(), name


def svd(matrix):
    return torch.linalg.svd(matrix, full_matrices=False)


def cosine(left, right):
    q, p = (torch.linalg.qr(matrix.double()).Q for matrix in (left, right))
    return float(torch.linalg.svdvals(q.T @ p)[-1])


def lora_ga(g, rank, s, *, first=0, second=1, **_):
    u, _, v = svd(g)
    scale = len(g) ** 0.25 / 16**0.5
    of_a, of_b = (slice(block * rank, (block + 1) * rank) for block in (first, second))
    return scale * u[:, of_b], scale * v[of_a]


def lora_ga_a2r(g, rank, s, **_):
    return lora_ga(g, rank, s, first=1, second=0)


def lora_one(g, rank, s, **_):
    u, d, v = svd(-g)
    root = (d[:rank] / d[0]).sqrt() / 128**0.5
    return u[:, :rank] * root, root[:, None] * v[:rank]


def gora(g, rank, s, a, **_):
    return -0.05 * (g.shape[1] / rank) ** 0.5 / s * g @ torch.linalg.pinv(a), a


FORMULAS = {"lora-ga": lora_ga, "lora-ga-a2r": lora_ga_a2r, "lora-one": lora_one, "gora": gora}
