"""What AMX's tiles compute, bit by bit, where this machine has them or they are emulated."""

import numpy as np
import torch

from eva_kernels.subspace import core


def test_tiles_add_up_as_they_are_said_to(tile_form):
    """Bit by bit: even and odd pairs apart, each in order, and then together. All of it fits one tile, or two."""
    generator = torch.Generator().manual_seed(7)

    def bfloat16(*shape):  # magnitudes so near each other that float64 holds every sum before it is rounded
        values = torch.randn(shape, generator=generator).bfloat16().float()
        return torch.where(values.abs() < 2**-6, 0, values)

    def product(left, right):
        even, odd = np.zeros((2, len(left), right.shape[1]), np.float32)
        for k in range(0, right.shape[0], 2):
            even = (even + np.outer(left[:, k], right[k])).astype(np.float32)
            odd = (odd + np.outer(left[:, k + 1], right[k + 1])).astype(np.float32)
        return even + odd

    x, basis = bfloat16(32, 32), bfloat16(32, 16)
    found = torch.zeros(32, 16)
    totals = torch.zeros(32, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    core.subspace_core(found, *totals, x, basis, torch.zeros(32), None, 1.0)
    projected = torch.from_numpy(product(x.double().numpy(), basis.double().numpy())).bfloat16().double()
    expected = product(x.T.double().numpy(), projected.numpy())
    assert torch.equal(found, torch.from_numpy(expected))
