"""The formulas of methods' papers in dense float64, written from the papers."""

import torch

from eva_lora import METHODS

BETA = 0.3
#: Those that one statistic of inputs serves; of the others see test_gradients.py.
FROM_INPUTS = [name for name, method in METHODS.items() if method.data != "gradients"]
GAP = 0.01  # between the last direction and the next one, of the larger: below it neither is the answer


def svd(matrix):
    return torch.linalg.svd(matrix, full_matrices=False)


def pissa(w, r, rank, s, **_):
    u, d, v = svd(w)
    root = (d[:rank] / s).sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank], d[rank - 1] - d[rank], d[rank - 1]


def milora(w, r, rank, s, **_):
    u, d, v = svd(w)
    root = (d[-rank:] / s).sqrt()
    return u[:, -rank:] * root, root[:, None] * v[-rank:], d[-rank - 1] - d[-rank], d[-rank - 1]


def mica(w, r, rank, s, **_):
    u, d, v = svd(w)
    return u[:, -rank:], torch.zeros_like(v[-rank:]), d[-rank - 1] - d[-rank], d[-rank - 1]


def corda(w, r, rank, s, **_):
    """The decomposition of W C, multiplied back with the inverse of C, which is not damped: C is of full rank."""
    u, d, v = svd(w @ r)
    root = (d[:rank] / s).sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank] @ torch.linalg.inv(r), d[rank - 1] - d[rank], d[rank - 1]


def corda_kpm(w, r, rank, s, **_):
    u, d, v = svd(w @ r)
    root = (d[-rank:] / s).sqrt()
    return u[:, -rank:] * root, root[:, None] * v[-rank:] @ torch.linalg.inv(r), d[-rank - 1] - d[-rank], d[-rank - 1]


def astra(w, r, rank, s, **_):
    """The outputs' covariance at its small end, among the outputs that the weight can give."""
    inside = svd(w)[0]
    values, vectors = torch.linalg.eigh(inside.T @ w @ r @ w.T @ inside)
    u = inside @ vectors[:, :rank]
    return u, u.T @ w, values[rank].sqrt() - values[rank - 1].sqrt(), values[rank].sqrt()


def sc_lora(w, r, rank, s, kept, **_):
    values, u = torch.linalg.eigh((1 - BETA) * w @ r @ w.T - BETA * w @ kept @ w.T)
    return u[:, -rank:], u[:, -rank:].T @ w, values[-rank] - values[-rank - 1], values[-rank].abs()


def lora_null(w, r, rank, s, **_):
    values, q = torch.linalg.eigh(r)
    u, d, v = svd(w @ q[:, :rank] @ q[:, :rank].T)
    root = (d[:rank] / s).sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank], values[rank] - values[rank - 1], values[rank]


FORMULAS = {
    "pissa": pissa, "milora": milora, "mica": mica, "corda": corda, "corda-kpm": corda_kpm, "astra": astra,
    "sc-lora": sc_lora, "lora-null": lora_null,
}  # fmt: skip


def cosine(left, right):
    """The smallest of the angles between two column spaces, as its cosine."""
    q, p = (torch.linalg.qr(matrix.double()).Q for matrix in (left, right))
    return float(torch.linalg.svdvals(q.T @ p)[-1])
