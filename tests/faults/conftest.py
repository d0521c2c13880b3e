import os

import pytest
import torch


@pytest.fixture(autouse=True)
def as_many_threads_as_the_environment_says():
    """Runs are compared bit for bit, and the models are too small for more than one thread to pay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    yield
    torch.set_num_threads(threads)
