import os

import pytest

# Triton reads the variable when it is imported, so these files are collected in a session of their own only, which
# tests/triton_kernels/test_interpreter.py starts. Skipped instead, they would hide every skip that means something.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture
def nan_workspaces(monkeypatch):
    """Every workspace starts as NaN, so that nothing may rely on memory it did not write."""
    import torch

    new_empty = torch.Tensor.new_empty

    def unwritten(*args, **kwargs):
        made = new_empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)
