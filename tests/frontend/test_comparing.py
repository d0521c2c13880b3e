"""Overlap of subspaces against SciPy's principal angles."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from eva_lora import compare
from eva_lora.reporting.comparing import load_directions


def matrix(rank, width=20, seed=0):
    return torch.randn(rank, width, generator=torch.Generator().manual_seed(seed))


def test_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    first, second = {"a": matrix(3, seed=1), "b": matrix(5, seed=2)}, {"a": matrix(6, seed=3), "b": matrix(2, seed=4)}
    result = compare(first, second)
    assert result.ranks == {"a": (3, 6), "b": (5, 2)}
    for name in first:
        angles = subspace_angles(first[name].double().numpy().T, second[name].double().numpy().T)
        assert result.overlap[name] == pytest.approx(np.mean(np.cos(angles) ** 2))
    assert result.mean_overlap == pytest.approx((3 * result.overlap["a"] + 2 * result.overlap["b"]) / 5)
    assert result.moved == 3


def test_scale_sign_and_rotation_do_not_matter():
    rows = matrix(4).double()  # whose rotation rounds to nothing that a float of six digits shows
    rotation = torch.linalg.qr(matrix(4, 4, seed=9).double()).Q
    assert compare({"a": rows}, {"a": -3 * rotation @ rows}).mean_overlap == pytest.approx(1.0)


def test_absent_layers_have_no_overlap():
    result = compare({"a": matrix(2), "b": matrix(2)}, {"a": matrix(0), "b": matrix(2), "c": matrix(1)})
    assert result.overlap["a"] is None
    assert result.overlap["c"] is None
    assert result.ranks == {"a": (2, 0), "b": (2, 2), "c": (0, 1)}


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shares no layer with the first"):
        compare({"a": matrix(2)}, {"b": matrix(2)})
    with pytest.raises(ValueError, match="A of a has width 7, in the first run 20"):
        compare({"a": matrix(2)}, {"a": matrix(2, 7)})
    with pytest.raises(FileNotFoundError, match="is no plan file"):
        load_directions(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged"):
        load_directions(tmp_path)
