import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Runs are compared bit for bit, and the models are too small for more threads to pay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
