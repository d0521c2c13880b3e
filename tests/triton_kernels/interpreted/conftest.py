import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") != "1":
        skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1; test_interpreter.py runs it so")
        for item in items:
            if "interpreted" in item.path.parts:
                item.add_marker(skip)


@pytest.fixture
def nan_workspaces(monkeypatch):
    """Every workspace starts as NaN, so that nothing may rely on memory it did not write."""
    import torch

    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
